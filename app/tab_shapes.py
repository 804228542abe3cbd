"""The 3D tab: a mesh becomes tokens and comes back, scale by scale; new shapes of a class."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from ..core.meshes import MESH_SUFFIXES
from . import studio_shapes_actions as actions
from . import studio_shapes_views as views
from .studio_context import SAMPLE_SCRIPT, Studio, html, mesh_input
from .studio_models import SHAPE_GENERATOR
from .studio_shapes import KINDS, ShapeEvents
from .studio_speech_views import TAB_SCRIPT, no_numbers
from .tab_speech import CODE_STYLE, MOVED, QUIET, RUN


def build(studio: Studio, session: gr.State, title: gr.HTML) -> SimpleNamespace:
    """Lay the tab out and connect it; returns the components that other tabs need."""
    events = ShapeEvents(studio)
    parts = {"codec": _codec, "generate": _generate}
    subtabs: dict[str, SimpleNamespace] = {}
    with gr.Tabs(elem_id="shapes-tabs", elem_classes="mt-inner"):
        for task, part in parts.items():
            with gr.Tab(task.capitalize(), id=task) as tab:
                subtabs[task] = _subtab(studio, events, task, part)
                subtabs[task].tab = tab
    codec, generate = subtabs["codec"], subtabs["generate"]
    _connect_codec(session, title, events, codec)
    _connect_generate(session, title, events, generate, codec)
    models = {ui.model: KINDS[task] for task, ui in subtabs.items()}
    lists = [part for ui in subtabs.values() for part in (ui.notice, ui.body, ui.model)]

    def open_with(listener) -> None:
        """Look again which models there are, take the first sample, and show it."""
        refreshed = listener(events.refresh, [ui.model for ui in subtabs.values()], lists, **QUIET)
        codec.follow(refreshed.success(events.open, [session], codec.taken, **QUIET))
        generate.adapt(refreshed.success)

    return SimpleNamespace(models=models, open_with=open_with, subtabs=subtabs)


def _subtab(studio: Studio, events: ShapeEvents, task: str, part) -> SimpleNamespace:
    """A notice for when no model is here, and in its place the controls and the results of `part`."""
    kind, ui = KINDS[task], SimpleNamespace()
    here = bool(studio.catalogue.choices(kind))
    ui.notice = html(
        views.missing(kind, studio.public), js_on_load=TAB_SCRIPT, visible=not here, elem_id=f"shapes-{task}-missing"
    )
    with gr.Row(equal_height=False, elem_classes="mt-page", visible=here) as ui.body:
        with gr.Column(scale=0, min_width=300, elem_classes="mt-controls"):
            part(ui, studio, events)
        with gr.Column(scale=1, min_width=320, elem_classes="mt-results mt-speech"):
            _results(ui, task)
    return ui


def _model(ui: SimpleNamespace, task: str, studio: Studio, events: ShapeEvents, label: str, info: str) -> None:
    kind = KINDS[task]
    ui.model = gr.Dropdown(
        studio.catalogue.choices(kind), value=studio.first_source(kind), label=label, info=info, filterable=False,
        elem_id=f"shapes-{task}-model",
    )  # fmt: skip


def _resolution(ui: SimpleNamespace, task: str) -> None:
    ui.resolution = gr.Radio(
        [(str(cells), cells) for cells in actions.RESOLUTIONS], value=actions.FIRST_RESOLUTION, label="Resolution",
        elem_id=f"shapes-{task}-resolution", info="Cells a side of the decoded shape.",
    )  # fmt: skip


def _codec(ui: SimpleNamespace, studio: Studio, events: ShapeEvents) -> None:
    ui.mesh = mesh_input(
        label="Mesh: OBJ, STL, PLY, OFF, GLB", file_types=list(MESH_SUFFIXES), height=100, elem_id="shapes-codec-mesh",
        elem_classes="mt-mesh",
    )  # fmt: skip
    ui.samples = html(
        views.clip_strip(studio.shapes), js_on_load=SAMPLE_SCRIPT, elem_id="shapes-codec-samples",
        visible=bool(studio.shapes),
    )  # fmt: skip
    _model(ui, "codec", studio, events, "Tokenizer", "The model that turns the shape into tokens.")
    with gr.Group(elem_classes="mt-budget"):
        ui.scales = gr.Slider(
            1, 8, value=8, step=1, label="Scales", buttons=[], elem_id="shapes-codec-scales",
            info="Tokens come over scales; the first ones give the rough shape.",
        )  # fmt: skip
        _resolution(ui, "codec")
    with gr.Row(elem_classes="mt-buttons"):
        ui.open = gr.UploadButton(
            "Open .mtok", file_types=[".mtok"], size="sm", elem_id="shapes-codec-open", min_width=110
        )
        ui.stop = gr.Button("Stop", size="sm", elem_id="shapes-codec-stop", elem_classes="mt-stop", min_width=50)
    ui.names, ui.figures = views.CODEC_NUMBERS, ("before", "after")
    hint = views.no_shape(bool(studio.shapes))
    ui.view = views.viewers(dict.fromkeys(ui.figures), hints={"before": hint})


def _generate(ui: SimpleNamespace, studio: Studio, events: ShapeEvents) -> None:
    _model(ui, "generate", studio, events, "Generator", "The model that makes the shape.")
    ui.last_model = gr.State(None)  # that the classes belong to
    ui.label = gr.Dropdown(
        [("any", -1)], value=-1, label="What to make", info="A class; type to search.",
        elem_id="shapes-generate-label",
    )  # fmt: skip
    with gr.Group(elem_classes="mt-budget"):
        ui.seed = gr.Number(
            7, label="Seed", step=1, elem_id="shapes-generate-seed", info="The same seed gives the same shape."
        )
        ui.fresh = gr.Checkbox(True, label="New seed each time", elem_id="shapes-generate-fresh")
    _resolution(ui, "generate")
    with gr.Accordion("More", open=False, elem_id="shapes-generate-more"):
        ui.guidance = gr.Number(
            2.0, label="Guidance", step=0.5, elem_id="shapes-generate-guidance",
            info="Higher follows the class more closely and varies less.",
        )  # fmt: skip
    with gr.Row(elem_classes="mt-buttons"):
        ui.run = gr.Button("Generate", size="sm", variant="primary", elem_id="shapes-generate-run", min_width=110)
        ui.stop = gr.Button("Stop", size="sm", elem_id="shapes-generate-stop", elem_classes="mt-stop", min_width=50)
    ui.names, ui.figures = views.GENERATE_NUMBERS, ("made",)
    ui.view = views.made_viewer(None)


def _results(ui: SimpleNamespace, task: str) -> None:
    ui.numbers = html(no_numbers(ui.names), elem_id=f"shapes-{task}-numbers")
    with gr.Column(elem_classes=["mt-panel", "mt-heard"]):
        ui.progress = html(views.idle(), elem_id=f"shapes-{task}-progress")
        ui.viewers = html(
            ui.view, html_template=views.viewer_template(*ui.figures), js_on_load=views.VIEWER_SCRIPT,
            elem_id=f"shapes-{task}-viewers",
        )  # fmt: skip
    with gr.Row(equal_height=False, elem_classes="mt-split mt-speech-lower"):
        ui.python = gr.Code(
            "# Comes with the first result.", language="python", label="Show code: Python", scale=4,
            elem_id=f"shapes-{task}-python", **CODE_STYLE,
        )  # fmt: skip
        ui.command = gr.Code(
            "# Comes with the first result.", language="shell", label="Show code: command", scale=4,
            elem_id=f"shapes-{task}-command", **CODE_STYLE,
        )  # fmt: skip
        with gr.Column(scale=1, min_width=150, elem_classes="mt-downloads"):
            ui.downloads = [
                gr.DownloadButton(label, interactive=False, size="sm", elem_id=f"shapes-{task}-{key}")
                for label, key in (("Shape .glb", "glb"), ("Shape .stl", "stl"), ("Tokens .mtok", "mtok"))
            ]
            if KINDS[task] == SHAPE_GENERATOR:
                ui.use = gr.Button("Use in Codec", size="sm", elem_id=f"shapes-{task}-use")


def _shown(ui: SimpleNamespace, last: gr.components.Component, title: gr.HTML) -> list:
    """Outputs of a run, in the order of what ShapeEvents shows."""
    return [ui.progress, ui.numbers, ui.viewers, *ui.downloads, ui.python, ui.command, last, title]


def _connect_codec(session: gr.State, title: gr.HTML, events: ShapeEvents, ui: SimpleNamespace) -> None:
    ui.taken = [ui.mesh, ui.samples]
    shown = _shown(ui, ui.scales, title)
    ui.follow = lambda event: event.success(events.follow_codec, [session, ui.model, ui.resolution], shown, **RUN)
    ui.follow(ui.mesh.upload(events.take, [session, ui.mesh], ui.taken, **RUN))
    ui.follow(ui.samples.click(events.take_sample, [session], ui.taken, **RUN))
    ui.follow(ui.tab.select(lambda: None, None, None, queue=False, **QUIET))
    ui.model.input(events.run_codec, [session, ui.model, ui.resolution], shown, **RUN)
    for control in (ui.scales, ui.resolution):
        control.input(events.show_scales, [session, ui.model, ui.scales, ui.resolution], shown, **MOVED)
    ui.open.upload(events.open_tokens, [session, ui.open, ui.resolution], [ui.model, *ui.taken, *shown], **RUN)
    ui.stop.click(events.stop("codec"), [session], None, queue=False, **QUIET)


def _connect_generate(
    session: gr.State, title: gr.HTML, events: ShapeEvents, ui: SimpleNamespace, codec: SimpleNamespace
) -> None:
    inputs = [session, ui.model, ui.label, ui.seed, ui.fresh, ui.guidance, ui.resolution]
    for listener in (ui.run.click, ui.seed.submit, ui.guidance.submit):
        listener(events.run_generate, inputs, _shown(ui, ui.seed, title), **RUN)
    adapted = [ui.last_model, ui.label, ui.guidance, title]
    ui.adapt = lambda listener: listener(events.adapt, [ui.model, ui.label, ui.last_model], adapted, **QUIET)
    ui.adapt(ui.model.input)
    ui.use.click(events.use, [session], codec.taken, **QUIET)
    ui.stop.click(events.stop("generate"), [session], None, queue=False, **QUIET)
