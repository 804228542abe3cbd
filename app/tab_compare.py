"""The Compare tab: two tokenizers on one picture, at equal bytes or equal tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from PIL import Image

from . import studio_actions as actions
from . import studio_views as views
from .studio_context import SAMPLE_SCRIPT, Studio, hold_back, html, picture_input, sample_strip, skips, speaks
from .studio_session import Session

KINDS = [("Equal bytes", "bytes"), ("Equal tokens", "tokens")]
FIRST_BYTES, FIRST_TOKENS = 96, 64
NUM_OUTPUTS = 6


def build(studio: Studio, session: gr.State, prototype: Session, title: gr.HTML) -> SimpleNamespace:
    """Lay the tab out and connect it."""
    ui = SimpleNamespace()
    first = (*first_choice(studio), "bytes", FIRST_TOKENS, FIRST_BYTES)
    results, notes = compare(studio, prototype, prototype.picture, *first)
    most = _most_tokens(studio, first[:2])
    choices = studio.catalogue.choices()
    with gr.Row(equal_height=False, elem_classes="mt-page"):
        with gr.Column(scale=0, min_width=300, elem_classes="mt-controls"):
            ui.picture = picture_input(
                prototype.picture, label="Picture", sources=["upload", "webcam", "clipboard"], height=170,
                buttons=[],
                elem_id="compare-picture", placeholder="Drop, paste or choose a picture",
            )  # fmt: skip
            ui.samples = html(sample_strip(studio.samples), js_on_load=SAMPLE_SCRIPT, elem_id="compare-samples")
            ui.models = [
                gr.Dropdown(
                    choices, value=source, label=f"Tokenizer {letter}", elem_id=f"compare-{letter.lower()}",
                    info=info, filterable=False,
                )
                for letter, source, info in zip(
                    "AB", first_choice(studio), ("Shown in the middle.", "Shown on the right."), strict=True
                )
            ]  # fmt: skip
            with gr.Group(elem_classes="mt-budget"):
                ui.kind = gr.Radio(
                    KINDS, value="bytes", label="Compare at", elem_id="compare-kind", info="What is made equal."
                )
                ui.count = gr.Slider(
                    1, most, value=min(FIRST_TOKENS, most), step=1, label="Tokens", buttons=[],
                    elem_id="compare-count", info="Models with a fixed count keep theirs.", visible=False,
                )  # fmt: skip
                ui.size = gr.Number(
                    FIRST_BYTES, label="Bytes", precision=0, minimum=1, elem_id="compare-bytes",
                    info="Of each .mtok file, at most; press Enter. Both get what the smaller one takes.",
                )  # fmt: skip
            with gr.Row(elem_classes="mt-buttons"):
                ui.stop = gr.Button("Stop", size="sm", elem_id="compare-stop", elem_classes="mt-stop", min_width=50)
        with gr.Column(scale=1, min_width=320, elem_classes="mt-results"):
            with gr.Row(equal_height=False, elem_classes="mt-three"):
                ui.views = [
                    gr.Image(
                        value, label=label, interactive=False, height=340, format="png", buttons=["fullscreen"],
                        elem_id=f"compare-view-{index}", min_width=220,
                    )
                    for index, (label, value) in enumerate(three_views(results))
                ]  # fmt: skip
            with gr.Column(elem_classes="mt-panel"):
                ui.table = html(views.compare_table(results, notes), elem_id="compare-table")
    ui.events = CompareEvents(studio)
    _connect(session, title, ui)
    return ui


def _connect(session: gr.State, title: gr.HTML, ui: SimpleNamespace) -> None:
    events = ui.events
    controls = [*ui.models, ui.kind, ui.count, ui.size]
    outputs = [ui.picture, *ui.views, ui.table, title]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    work = {"show_progress": "minimal", "show_progress_on": ui.views, "api_visibility": "private"}
    ui.picture.upload(events.upload, [session, ui.picture, *controls], outputs, **work)
    ui.samples.click(events.sample, [session, *controls], outputs, **work)
    ui.kind.input(lambda kind: (gr.Slider(visible=kind == "tokens"), gr.Number(visible=kind == "bytes")),
                  [ui.kind], [ui.count, ui.size], **quiet)  # fmt: skip
    ui.count.input(events.run, [session, *controls], outputs, trigger_mode="always_last", **work)
    for model in ui.models:
        fitted = model.input(events.adapt, [ui.count, *ui.models], [ui.count], **quiet)
        fitted.success(events.run, [session, *controls], outputs, **work)
    for listener in (ui.kind.input, ui.size.submit, ui.size.blur):  # a new run replaces the one under way
        listener(events.run, [session, *controls], outputs, trigger_mode="multiple", **work)
    ui.stop.click(events.stop, [session], None, queue=False, **quiet)
    ui.start = lambda event: event.success(events.take, [session, *controls], outputs, **work)


def _most_tokens(studio: Studio, sources: tuple[str, str]) -> int:
    """Of either tokenizer."""
    return max(studio.catalogue.get(source).max_tokens for source in sources)


def first_choice(studio: Studio) -> tuple[str, str]:
    """The default model and, where there is one, another."""
    default = studio.catalogue.default_source()
    others = [source for _, source in studio.catalogue.choices() if source != default]
    return default, others[0] if others else default


def compare(
    studio: Studio, session: Session, picture: Path, a: str, b: str, kind: str, count: int, size: int
) -> tuple[list[actions.Result], list[str]]:
    """Run both tokenizers; returns their results and remarks on them."""
    job = session.start("compare")
    tokenizers = [studio.catalogue.get(source) for source in (a, b)]
    budgets = [actions.Budget("tokens", count)] * 2
    if kind == "bytes":
        budgets = actions.equal_bytes(tokenizers, picture, size)
    results = []
    for source, tokenizer, budget in zip((a, b), tokenizers, budgets, strict=True):
        with studio.device.hold(job):
            results.append(actions.encode_picture(tokenizer, source, picture, picture.name, budget, job))
    notes = [_note(result, tokenizer, kind, count, size) for result, tokenizer in zip(results, tokenizers, strict=True)]
    job.check()
    session.finish(job)
    return results, notes


def three_views(results: list[actions.Result]) -> list[tuple[str, Image.Image]]:
    """(label, picture) of the original, at the larger of the two sizes, and of both reconstructions."""
    original = max((result.reference for result in results), key=lambda image: image.width)
    return [
        ("Original", original),
        *((f"{letter}: {result.model_name}", result.image) for letter, result in zip("AB", results, strict=True)),
    ]


def _note(result: actions.Result, tokenizer, kind: str, count: int, size: int) -> str:
    """Why a result is not what was asked for."""
    name, length = result.model_name, result.tokens_per_tile
    if result.tokens is None:
        return f"{name} has continuous latents: no tokens and no file size."
    if kind == "bytes":
        if result.tokens.num_bytes <= size:
            return ""
        what = "shown whole" if not tokenizer.is_variable_length else "its shortest"
        return f"{name} does not fit {size} bytes: {what}, {result.tokens.num_bytes} bytes."
    if length != int(count) and not tokenizer.is_variable_length:
        return f"{name} always uses {length} tokens."
    if int(count) > tokenizer.max_tokens:
        return f"{name} has {tokenizer.max_tokens} tokens at most."
    return f"{name} ends with whole scales: {length} tokens." if length != int(count) else ""


class CompareEvents:
    """The tab's event handlers."""

    def __init__(self, studio: Studio):
        self.studio = studio

    @speaks(NUM_OUTPUTS)
    def run(self, session: Session, *controls):
        """The picture of this tab with the controls as they are now."""
        return self._run(session, session.pictures["compare"], *controls)

    @speaks(1)
    def adapt(self, count: int, *sources: str):
        """Fit the token slider to other tokenizers."""
        most = _most_tokens(self.studio, sources)
        return gr.Slider(maximum=most, **({"value": most} if count > most else {}))

    @speaks(NUM_OUTPUTS)
    def take(self, session: Session, *controls):
        """The picture of the Image tab."""
        return self._run(session, session.picture, *controls, show_picture=True)

    def upload(self, session: Session, path: str | None, *controls):
        """A new picture; back to the one before if it cannot be read."""
        if path is None:
            return skips(NUM_OUTPUTS)
        session.pictures["compare"] = Path(path)  # at once: a control that moves meanwhile means this picture
        with hold_back() as failed:
            return self._run(session, Path(path), *controls)
        return [str(session.revert("compare")) if failed else gr.skip(), *skips(NUM_OUTPUTS - 1)]

    @speaks(NUM_OUTPUTS)
    def sample(self, session: Session, event: gr.EventData, *controls):
        """The sample that was clicked."""
        return self._run(session, self.studio.samples[int(event.index)], *controls, show_picture=True)

    def _run(self, session: Session, picture: Path, *controls, show_picture: bool = False) -> list:
        session.pictures["compare"] = picture
        results, notes = compare(self.studio, session, picture, *controls)
        session.accept("compare", picture)
        return [
            str(picture) if show_picture else gr.skip(),
            *(gr.Image(image, label=label) for label, image in three_views(results)),
            views.compare_table(results, notes), self.studio.title(),
        ]  # fmt: skip

    def stop(self, session: Session) -> None:
        """End this page's comparison."""
        if not session.stop("compare"):
            gr.Info("Nothing is running.", duration=2)
