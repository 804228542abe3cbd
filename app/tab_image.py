"""The Image tab: a picture becomes tokens and comes back; every token can be looked at and changed."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from . import studio_views as views
from .studio_context import SAMPLE_SCRIPT, Studio, html, picture_input, sample_strip
from .studio_decoding import decoding_controls
from .studio_image import ImageEvents, Shown, first_effect
from .studio_image_controls import budget_kinds, count_slider
from .studio_session import Session


def build(studio: Studio, session: gr.State, prototype: Session, title: gr.HTML) -> SimpleNamespace:
    """Lay the tab out and connect it; returns the components that other tabs need."""
    with gr.Row(equal_height=False, elem_classes="mt-page"):
        with gr.Column(scale=0, min_width=300, elem_classes="mt-controls"):
            ui = _controls(studio, prototype)
        with gr.Column(scale=1, min_width=320, elem_classes="mt-results"):
            _results(studio, prototype, ui)
    _connect(studio, session, title, ui)
    return ui


def _controls(studio: Studio, prototype: Session) -> SimpleNamespace:
    first = prototype.result
    tokenizer = studio.catalogue.get(first.source)
    kinds, slider = budget_kinds(tokenizer), count_slider(tokenizer)
    ui = SimpleNamespace()
    ui.picture = picture_input(
        prototype.picture, label="Picture", sources=["upload", "webcam", "clipboard"], height=170, buttons=[],
        elem_id="image-picture", placeholder="Drop, paste or choose a picture",
    )  # fmt: skip
    ui.samples = html(sample_strip(studio.samples), js_on_load=SAMPLE_SCRIPT, elem_id="image-samples")
    ui.model = gr.Dropdown(
        studio.catalogue.choices(), value=first.source, label="Tokenizer", elem_id="image-model", filterable=False,
        info="The model that turns the picture into tokens.",
    )  # fmt: skip
    with gr.Group(elem_classes="mt-budget"):
        ui.kind = gr.Radio(
            kinds, value=kinds[0][1], label="Choose by", info="What you fix; the rest follows.", elem_id="image-kind",
            interactive=first.is_variable_length,
        )  # fmt: skip
        ui.count = gr.Slider(
            1, value=slider["maximum"], step=1, buttons=[], elem_id="image-count", **slider
        )  # fmt: skip
        ui.quality = gr.Slider(
            10, 45, value=22, step=0.5, label="PSNR, dB", visible=False, buttons=[], elem_id="image-quality",
            info="The fewest tokens that reach it.",
        )  # fmt: skip
        ui.size = gr.Number(
            96, label="Bytes", precision=0, minimum=1, visible=False, elem_id="image-bytes",
            info="As many tokens as a .mtok file of this size holds; press Enter.",
        )  # fmt: skip
    ui.caption = gr.Textbox(
        label="Caption", visible=False, max_lines=2, elem_id="image-caption",
        info="This decoder reads a caption along with the tokens; press Enter.",
    )  # fmt: skip
    ui.decoder, ui.decoding = decoding_controls(tokenizer, "image-decoder", "image")
    ui.tile = gr.Checkbox(
        False, label="Keep size and shape", elem_id="image-tile", info="Tiles instead of one cropped square.",
    )  # fmt: skip
    with gr.Row(elem_classes="mt-buttons"):
        ui.upload = gr.UploadButton(
            "Open .mtok", file_types=[".mtok"], size="sm", elem_id="image-mtok-in", min_width=70
        )
        ui.to_compare = gr.Button("Compare", size="sm", elem_id="image-to-compare", min_width=70)
        ui.stop = gr.Button("Stop", size="sm", elem_id="image-stop", elem_classes="mt-stop", min_width=50)
    return ui


def _results(studio: Studio, prototype: Session, ui: SimpleNamespace) -> None:
    first, shown = prototype.result, Shown.of(prototype)
    ids = first.ids()
    ui.numbers = html(views.numbers(first), elem_id="image-numbers")
    with gr.Row(equal_height=False, elem_classes="mt-split"):
        with gr.Column(scale=5, min_width=320):
            ui.slider = gr.ImageSlider(
                shown.pair, label="Original | reconstruction", type="filepath", format="png", height=434,
                max_height=434, interactive=False, buttons=["fullscreen"], elem_id="image-slider",
            )  # fmt: skip
        with gr.Column(scale=4, min_width=320, elem_classes="mt-panel", elem_id="image-tokens"):
            html('<h3 class="mt-heading">Tokens <small>in order, coloured by code; click one</small></h3>')
            ui.grid = html(views.token_grid(first), js_on_load=views.GRID_SCRIPT, elem_id="image-grid")
            with gr.Row(elem_classes="mt-edit"):
                ui.code = gr.Number(
                    ids[0] if ids else None, label="Code of token 1", precision=0, minimum=0, elem_id="image-code",
                    min_width=100,
                )  # fmt: skip
                ui.change = gr.Button("Change and decode", size="sm", elem_id="image-change", min_width=120)
                ui.undo = gr.Button("Undo all", size="sm", elem_id="image-undo", min_width=70)
    with gr.Row(equal_height=False, elem_classes="mt-split"):
        with gr.Column(scale=5, min_width=320, elem_classes="mt-panel mt-lower"), gr.Tabs(elem_classes="mt-subtabs"):
            with gr.Tab("Rate and distortion"):
                ui.plot = html(shown.plot, elem_id="image-plot")
            with gr.Tab("Show code", elem_id="image-code-tab"):
                code_view = {"interactive": False, "show_line_numbers": False, "wrap_lines": True, "buttons": ["copy"]}
                ui.python = gr.Code(
                    shown.python,
                    language="python",
                    label="Python",
                    lines=7,
                    max_lines=7,
                    elem_id="image-python",
                    **code_view,
                )
                ui.command = gr.Code(
                    shown.command,
                    language="shell",
                    label="Command",
                    lines=2,
                    max_lines=2,
                    elem_id="image-command",
                    **code_view,
                )
        with gr.Column(scale=4, min_width=320, elem_classes="mt-panel mt-lower"), gr.Row(elem_classes="mt-effect"):
            ui.effect = gr.Image(
                first_effect(studio, prototype), label="Where token 1 acts", interactive=False, height=262,
                format="png", buttons=[], elem_id="image-effect", min_width=180, scale=3,
            )  # fmt: skip
            with gr.Column(scale=2, min_width=120, elem_classes="mt-downloads"):
                html(
                    '<p class="mt-hint">Bright is where the picture changes when other codes take the place of the '
                    "chosen token.</p>"
                )
                ui.png = gr.DownloadButton("Picture .png", shown.png, size="sm", elem_id="image-png")
                ui.mtok = gr.DownloadButton("Tokens .mtok", shown.mtok, size="sm", elem_id="image-mtok")


def _connect(studio: Studio, session: gr.State, title: gr.HTML, ui: SimpleNamespace) -> None:
    events = ImageEvents(studio)
    controls = [ui.model, ui.kind, ui.count, ui.quality, ui.size, ui.tile, ui.caption, *ui.decoding]
    # The order of Shown.outputs:
    shown = [ui.numbers, ui.slider, ui.grid, ui.code, ui.png, ui.mtok, ui.python, ui.command, ui.plot, title]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    work = {"show_progress": "minimal", "show_progress_on": ui.slider, "api_visibility": "private"}

    def look(event, with_curves: bool = True) -> None:
        """After a new result: where its token acts, then the curves. Both give way to a newer result."""
        event = event.success(events.effect, [session], [ui.effect], **quiet)
        if with_curves:
            event.success(events.curves, [session], [ui.plot], **quiet)

    look(ui.picture.upload(events.encode_upload, [session, ui.picture, *controls], [ui.picture, *shown], **work))
    look(ui.samples.click(events.encode_sample, [session, *controls], [ui.picture, *shown], **work))
    adapted = [ui.model, ui.kind, ui.count, ui.quality, ui.size, ui.caption, ui.decoder, *ui.decoding]
    fitted = ui.model.input(events.adapt, [session, ui.model, ui.kind, ui.count], adapted, **work)
    look(fitted.success(events.encode, [session, *controls], shown, **work))
    ui.kind.input(events.show_kind, [ui.kind], [ui.count, ui.quality, ui.size], **quiet)
    for slider in (ui.count, ui.quality):
        # While a slider moves, requests do not pile up: the newest waits for the one that runs.
        look(slider.input(events.encode, [session, *controls], shown, trigger_mode="always_last", **work))
    decoding = [field.input if isinstance(field, gr.Checkbox) else field.submit for field in ui.decoding]
    for listener in (ui.kind.input, ui.tile.input, ui.size.submit, ui.size.blur, ui.caption.submit, *decoding):
        # "multiple": a new run replaces the one under way; else Gradio would not hear of it.
        look(listener(events.encode, [session, *controls], shown, trigger_mode="multiple", **work))
    opened = ui.upload.upload(events.open_tokens, [session, ui.upload, ui.caption], [ui.model, *shown], **work)
    opened = opened.success(events.adapt, [session, ui.model, ui.kind, ui.count], adapted, **quiet)
    look(opened)
    ui.grid.click(events.choose, [session], [ui.code, ui.effect], **(work | {"show_progress_on": ui.effect}))
    for listener in (ui.change.click, ui.code.submit):
        look(listener(events.change, [session, ui.code], shown, **work), with_curves=False)
    look(ui.undo.click(events.undo, [session], shown, **work), with_curves=False)
    ui.stop.click(events.stop, [session], None, queue=False, **quiet)
    ui.start = lambda event: look(event.success(events.take, [session, *controls], [ui.picture, *shown], **work))
