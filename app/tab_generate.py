"""The Generate tab: pictures of chosen classes that fill in as they are made; keep what you like, redo the rest."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from . import studio_gallery as views
from .label_picker import label_picker
from .studio_context import Studio, html
from .studio_decoding import decoding_controls
from .studio_generate import MAX_OF_EACH, GenerateEvents, Shown, label_names
from .studio_generation import FIRST_PROMPT, FIRST_SEED, MAX_PICTURES, Gallery, own_settings
from .studio_models import GENERATOR
from .studio_session import Session


def build(studio: Studio, session: gr.State, prototype: Session, title: gr.HTML) -> SimpleNamespace:
    """Lay the tab out and connect it; returns the components that other tabs need."""
    with gr.Row(equal_height=False, elem_classes="mt-page"):
        with gr.Column(scale=0, min_width=300, elem_classes="mt-controls"):
            ui = _controls(studio, prototype.gallery)
        with gr.Column(scale=1, min_width=320, elem_classes="mt-results"):
            _results(prototype, ui)
    _connect(studio, session, title, ui)
    return ui


def _controls(studio: Studio, first: Gallery) -> SimpleNamespace:
    generator = studio.catalogue.get(first.source, GENERATOR)
    steps, guidance = own_settings(generator)
    ui = SimpleNamespace()
    labels = list(dict.fromkeys(picture.recipe.label for picture in first.pictures))
    with gr.Group(elem_id="generate-what"):
        ui.model = gr.Dropdown(
            studio.catalogue.choices(GENERATOR), value=first.source, label="Generator", elem_id="generate-model",
            filterable=False, info="The model that makes the pictures.",
        )  # fmt: skip
        ui.last_model = gr.State(first.source)  # that the labels belong to
        ui.labels = label_picker(
            label_names(generator), [] if generator.accepts_text else labels, label="What to make",
            info="One label or several; type to search.", elem_id="generate-labels", visible=not generator.accepts_text,
        )  # fmt: skip
        ui.prompt = gr.Textbox(
            FIRST_PROMPT, label="What to make", max_lines=4, visible=generator.accepts_text, elem_id="generate-prompt",
            info="What the picture shows, in words; press Enter. Empty: anything.",
        )  # fmt: skip
        ui.count = gr.Slider(
            1, MAX_OF_EACH, value=len(first.pictures) // len(labels), step=1, label="Pictures of each", buttons=[],
            elem_id="generate-count", info=f"At most {MAX_PICTURES} in all.",
        )  # fmt: skip
    # No bounds on the number fields: the handlers' messages name the field, Gradio's do not.
    with gr.Group(elem_classes="mt-budget"):
        ui.seed = gr.Number(
            FIRST_SEED, label="Seed", step=1, elem_id="generate-seed",
            info="Of the first picture; the others count on.",
        )  # fmt: skip
        ui.fresh = gr.Checkbox(True, label="New seed each time", elem_id="generate-fresh")
    with gr.Accordion("More", open=False, elem_id="generate-more"):
        ui.steps = gr.Number(
            steps, label="Steps", step=1, elem_id="generate-steps",
            info="More is slower, and better up to a point.",
        )  # fmt: skip
        ui.guidance = gr.Number(
            guidance, label="Guidance", step=0.5, elem_id="generate-guidance",
            info="Higher follows what is asked for more closely and varies less.",
        )  # fmt: skip
    ui.decoder, ui.decoding = decoding_controls(generator, "generate-decoder", "generate-decoder")
    with gr.Row(elem_classes="mt-buttons"):
        ui.generate = gr.Button("Generate", size="sm", variant="primary", elem_id="generate-run", min_width=110)
        ui.stop = gr.Button("Stop", size="sm", elem_id="generate-stop", elem_classes="mt-stop", min_width=50)
    return ui


def _results(prototype: Session, ui: SimpleNamespace) -> None:
    gallery, shown = prototype.gallery, Shown.of(prototype)
    ui.numbers = html(views.gallery_numbers(gallery), elem_id="generate-numbers")
    with gr.Row(equal_height=False, elem_classes="mt-split"):
        with gr.Column(scale=5, min_width=320, elem_classes="mt-panel mt-show"):
            ui.grid = html(views.gallery_grid(gallery), js_on_load=views.GALLERY_SCRIPT, elem_id="generate-grid")
        with gr.Column(scale=4, min_width=320, elem_classes="mt-panel mt-show"):
            ui.panel = html(views.chosen_panel(gallery, 0), js_on_load=views.VARY_SCRIPT, elem_id="generate-panel")
            with gr.Row(elem_classes="mt-buttons mt-bottom"):
                ui.to_image = gr.Button("Use in Image", size="sm", elem_id="generate-to-image", min_width=80)
                ui.png = gr.DownloadButton("Picture .png", shown.png, size="sm", elem_id="generate-png", min_width=80)
                ui.zip = gr.DownloadButton("All .zip", shown.zip, size="sm", elem_id="generate-zip", min_width=80)
    with gr.Row(equal_height=True, elem_classes="mt-split", elem_id="generate-code"):
        style = {"interactive": False, "show_line_numbers": False, "wrap_lines": True, "buttons": ["copy"]}
        style |= {"lines": 8, "max_lines": 8, "min_width": 320}
        ui.python = gr.Code(
            shown.python, language="python", label="Show code: Python", elem_id="generate-python", **style
        )
        ui.command = gr.Code(
            shown.command, language="shell", label="Show code: command", elem_id="generate-command", **style
        )


def _connect(studio: Studio, session: gr.State, title: gr.HTML, ui: SimpleNamespace) -> None:
    events = GenerateEvents(studio)
    # The order of GenerateEvents' results:
    outputs = [ui.grid, ui.numbers, ui.seed, ui.panel, ui.png, ui.zip, ui.python, ui.command, title]
    settings = [ui.model, ui.labels, ui.prompt, ui.count, ui.seed, ui.fresh, ui.steps, ui.guidance, *ui.decoding]
    # The gallery shows its own progress.
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    # "multiple": a new run replaces the one under way; else Gradio drops clicks until it has wound the last run up.
    run = {**quiet, "trigger_mode": "multiple"}
    numbers = [field for field in ui.decoding if isinstance(field, gr.Number)]
    fields = (ui.labels, ui.prompt, ui.seed, ui.steps, ui.guidance, *numbers)
    for listener in (ui.generate.click, *(field.submit for field in fields)):
        listener(events.make, [session, *settings], outputs, **run)
    ui.panel.submit(events.vary, [session, ui.model, *settings[3:]], outputs, **run)
    adapted = [ui.model, ui.last_model, ui.labels, ui.prompt, ui.steps, ui.guidance, ui.decoder, *ui.decoding, title]
    ui.model.input(events.adapt, [session, ui.model, ui.labels, ui.last_model], adapted, **quiet)
    ui.grid.click(events.choose, [session], [ui.panel, ui.png], **quiet)
    ui.stop.click(events.stop, [session], None, queue=False, **quiet)
