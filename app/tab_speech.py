"""The Speech tab: a clip becomes tokens and comes back, loses its noise, is written down; a text is spoken."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from . import studio_speech_actions as actions
from . import studio_speech_views as views
from .studio_context import SAMPLE_SCRIPT, Studio, clip_input, html
from .studio_speech import CLIP_TASKS, KINDS, OWN_NOISE, SpeechEvents

CODE_STYLE = {
    "interactive": False, "show_line_numbers": False, "wrap_lines": True, "buttons": ["copy"], "lines": 10,
    "max_lines": 10, "min_width": 260,
}  # fmt: skip
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
RUN = {**QUIET, "trigger_mode": "multiple"}  # what is newer replaces what is under way; runs show their own progress
MOVED = {**QUIET, "trigger_mode": "always_last"}  # while a slider moves, requests do not pile up


def build(studio: Studio, session: gr.State, title: gr.HTML) -> SimpleNamespace:
    """Lay the tab out and connect it; returns the components that other tabs need."""
    events = SpeechEvents(studio)
    parts = {"codec": _codec, "enhance": _enhance, "transcribe": _transcribe, "speak": _speak}
    subtabs: dict[str, SimpleNamespace] = {}
    with gr.Tabs(elem_id="speech-tabs", elem_classes="mt-inner"):
        for task, part in parts.items():
            with gr.Tab(task.capitalize(), id=task) as tab:
                subtabs[task] = _subtab(studio, events, task, part)
                subtabs[task].tab = tab
    _connect_clip(session, events, subtabs)
    _connect_codec(session, title, events, subtabs["codec"])
    _connect_enhance(session, title, events, subtabs["enhance"])
    _connect_transcribe(session, title, events, subtabs["transcribe"])
    _connect_speak(session, title, events, subtabs["speak"])
    return _openers(session, events, subtabs)


def _subtab(studio: Studio, events: SpeechEvents, task: str, part) -> SimpleNamespace:
    """A notice for when no model is here, and in its place the controls and the results of `part`."""
    kind, ui = KINDS[task], SimpleNamespace()
    here = bool(studio.catalogue.choices(kind))
    ui.notice = html(
        views.missing(kind, studio.public), js_on_load=views.TAB_SCRIPT, visible=not here,
        elem_id=f"speech-{task}-missing",
    )  # fmt: skip
    with gr.Row(equal_height=False, elem_classes="mt-page", visible=here) as ui.body:
        with gr.Column(scale=0, min_width=300, elem_classes="mt-controls"):
            if task in CLIP_TASKS:
                ui.clip = clip_input(
                    label="Clip",
                    buttons=["download"],
                    editable=False,
                    elem_id=f"speech-{task}-clip",
                    elem_classes="mt-clip",
                )
                ui.samples = html(
                    views.clip_strip(studio.clips), js_on_load=SAMPLE_SCRIPT, elem_id=f"speech-{task}-samples",
                    visible=bool(studio.clips),
                )  # fmt: skip
            part(ui, task, studio, events)
        with gr.Column(scale=1, min_width=320, elem_classes="mt-results mt-speech"):
            _results(ui, task)
    return ui


def _model(ui: SimpleNamespace, task: str, studio: Studio, events: SpeechEvents, label: str, info: str) -> None:
    kind = KINDS[task]
    ui.model = gr.Dropdown(
        studio.catalogue.choices(kind), value=studio.first_source(kind), label=label, info=info, filterable=False,
        elem_id=f"speech-{task}-model",
    )  # fmt: skip


def _buttons(ui: SimpleNamespace, task: str, run: str | None = None) -> None:
    with gr.Row(elem_classes="mt-buttons"):
        if run is not None:
            ui.run = gr.Button(run, size="sm", variant="primary", elem_id=f"speech-{task}-run", min_width=110)
        ui.stop = gr.Button("Stop", size="sm", elem_id=f"speech-{task}-stop", elem_classes="mt-stop", min_width=50)


def _seed(ui: SimpleNamespace, task: str) -> None:
    with gr.Group(elem_classes="mt-budget"):
        ui.seed = gr.Number(
            7, label="Seed", step=1, elem_id=f"speech-{task}-seed", info="The same seed gives the same sound."
        )
        ui.fresh = gr.Checkbox(True, label="New seed each time", elem_id=f"speech-{task}-fresh")


def _codec(ui: SimpleNamespace, task: str, studio: Studio, events: SpeechEvents) -> None:
    _model(ui, task, studio, events, "Tokenizer", "The model that turns the clip into tokens.")
    ui.open = gr.UploadButton("Open .mtok", file_types=[".mtok"], size="sm", elem_id="speech-codec-open")
    _buttons(ui, task)
    ui.names, ui.files = views.CODEC_NUMBERS, (("Sound .wav", "wav"), ("Tokens .mtok", "mtok"))
    ui.view, ui.can_use = views.pair_view(None, None, hint=views.no_clip(bool(studio.clips))), True


def _enhance(ui: SimpleNamespace, task: str, studio: Studio, events: SpeechEvents) -> None:
    _model(ui, task, studio, events, "Enhancer", "The model that makes the clip clean.")
    with gr.Group(elem_classes="mt-budget"):
        ui.noise = gr.Dropdown(
            [(name.capitalize(), name) for name in actions.NOISES], value=OWN_NOISE, label="Added noise",
            filterable=False, elem_id="speech-enhance-noise", info="Samples are clean: make one noisy.",
        )  # fmt: skip
        ui.snr = gr.Slider(
            actions.LOUDEST, actions.QUIETEST, value=5, step=1, label="Speech over noise, dB", buttons=[],
            elem_id="speech-enhance-snr", info="Less is noisier.",
        )  # fmt: skip
    _seed(ui, task)
    with gr.Accordion("More", open=False, elem_id="speech-enhance-more"):
        ui.greedy = gr.Checkbox(
            False, label="Likeliest tokens", elem_id="speech-enhance-greedy", info="No chance, and no seed."
        )
        ui.temperature = gr.Number(
            1.0, label="Temperature", step=0.1, elem_id="speech-enhance-temperature",
            info="Below 1, draws are more careful.",
        )  # fmt: skip
    _buttons(ui, task, "Enhance")
    ui.names, ui.files = views.ENHANCE_NUMBERS, (("Noisy .wav", "noisy"), ("Clean .wav", "wav"))
    ui.view, ui.can_use = views.pair_view(None, None, hint=views.no_clip(bool(studio.clips))), True


def _transcribe(ui: SimpleNamespace, task: str, studio: Studio, events: SpeechEvents) -> None:
    _model(ui, task, studio, events, "Recogniser", "The model that writes the clip down.")
    with gr.Accordion("More", open=False, elem_id="speech-transcribe-more"):
        ui.hotwords = gr.Textbox(
            label="Hotwords", max_lines=3, elem_id="speech-transcribe-hotwords",
            info="Names and terms to expect, for models that take them.",
        )  # fmt: skip
    _buttons(ui, task, "Transcribe")
    ui.names, ui.files = views.TRANSCRIBE_NUMBERS, (("Captions .srt", "srt"), ("Times .json", "json"))
    ui.view, ui.can_use = views.transcript_view(None, None, views.no_clip(bool(studio.clips))), False


def _speak(ui: SimpleNamespace, task: str, studio: Studio, events: SpeechEvents) -> None:
    ui.text = gr.Textbox(
        label="Text", max_lines=6, max_length=actions.MAX_TEXT, elem_id="speech-speak-text",
        info="What to say; press Enter.", placeholder="A sentence or two",
    )  # fmt: skip
    _model(ui, task, studio, events, "Voice", "The model that speaks.")
    _seed(ui, task)
    _buttons(ui, task, "Speak")
    ui.names, ui.files = views.SPEAK_NUMBERS, (("Sound .wav", "wav"),)
    ui.view, ui.can_use = views.single_view(None, None, "Spoken", "Type a text and press Speak."), True


def _results(ui: SimpleNamespace, task: str) -> None:
    ui.numbers = html(views.no_numbers(ui.names), elem_id=f"speech-{task}-numbers")
    with gr.Column(elem_classes=["mt-panel", "mt-heard"]):
        ui.progress = html(views.idle(), elem_id=f"speech-{task}-progress")
        ui.player = html(
            ui.view, html_template=views.PLAYER_TEMPLATE, js_on_load=views.PLAYER_SCRIPT,
            elem_id=f"speech-{task}-player",
        )  # fmt: skip
    with gr.Row(equal_height=False, elem_classes="mt-split mt-speech-lower"):
        ui.python = gr.Code(
            "# Comes with the first result.", language="python", label="Show code: Python", scale=4,
            elem_id=f"speech-{task}-python", **CODE_STYLE,
        )  # fmt: skip
        ui.command = gr.Code(
            "# Comes with the first result.", language="shell", label="Show code: command", scale=4,
            elem_id=f"speech-{task}-command", **CODE_STYLE,
        )  # fmt: skip
        with gr.Column(scale=1, min_width=150, elem_classes="mt-downloads"):
            ui.downloads = [
                gr.DownloadButton(label, interactive=False, size="sm", elem_id=f"speech-{task}-{key}")
                for label, key in ui.files
            ]
            if ui.can_use:
                ui.use = gr.Button("Use as clip", size="sm", elem_id=f"speech-{task}-use")


def _shown(ui: SimpleNamespace, title: gr.HTML, seeded: bool = False) -> list:
    """Outputs of a run, in the order of what SpeechEvents shows."""
    results = [ui.progress, ui.numbers, ui.player, *ui.downloads, ui.python, ui.command]
    return [*results, *([ui.seed] if seeded else []), title]


def _connect_clip(session: gr.State, events: SpeechEvents, subtabs: dict[str, SimpleNamespace]) -> None:
    """The inputs that share one clip; `follow` of a sub-tab shows what becomes of a new one."""
    inputs, strips = ([getattr(subtabs[task], part) for task in CLIP_TASKS] for part in ("clip", "samples"))
    clips = [*inputs, *strips, subtabs["enhance"].noise]
    for task in CLIP_TASKS:
        ui = subtabs[task]
        ui.clips = clips
        ui.new_clip = [
            ui.clip.upload(events.take(task), [session, ui.clip], clips, **RUN),
            ui.clip.stop_recording(events.take(task, "recording.wav"), [session, ui.clip], clips, **RUN),
            ui.samples.click(events.take_sample, [session], clips, **RUN),
        ]
    for task in ("codec", "enhance", "speak"):
        subtabs[task].use.click(events.use(task), [session], clips, **QUIET)
    for task, ui in subtabs.items():
        ui.stop.click(events.stop(task), [session], None, queue=False, **QUIET)


def _connect_codec(session: gr.State, title: gr.HTML, events: SpeechEvents, ui: SimpleNamespace) -> None:
    shown = _shown(ui, title)
    ui.follow = lambda event: event.success(events.follow_codec, [session, ui.model], shown, **RUN)
    for event in ui.new_clip:
        ui.follow(event)
    ui.model.input(events.run_codec, [session, ui.model], shown, **RUN)
    ui.open.upload(events.open_tokens, [session, ui.open], [ui.model, *shown], **RUN)


def _connect_enhance(session: gr.State, title: gr.HTML, events: SpeechEvents, ui: SimpleNamespace) -> None:
    settings = [ui.noise, ui.snr]
    mixed = [ui.numbers, ui.player, *ui.downloads]
    ui.follow = lambda event: event.success(events.mix, [session, *settings], mixed, **QUIET)
    for event in ui.new_clip:
        ui.follow(event)
    for listener in (ui.noise.input, ui.snr.input):
        listener(events.mix, [session, *settings], mixed, **MOVED)
    inputs = [session, ui.model, *settings, ui.seed, ui.fresh, ui.greedy, ui.temperature]
    for listener in (ui.run.click, ui.seed.submit, ui.temperature.submit):
        enhanced = listener(events.run_enhance, inputs, _shown(ui, title, seeded=True), **RUN)
        enhanced.success(events.measure, [session], [ui.numbers], **QUIET)


def _connect_transcribe(session: gr.State, title: gr.HTML, events: SpeechEvents, ui: SimpleNamespace) -> None:
    inputs, shown = [session, ui.model, ui.hotwords], _shown(ui, title)
    ui.follow = lambda event: event.success(events.follow_transcript, inputs, shown, **RUN)
    for event in ui.new_clip:
        ui.follow(event)
    adapted = ui.model.input(events.adapt_hotwords, [ui.model], [ui.hotwords], **QUIET)
    adapted.success(events.run_transcribe, inputs, shown, **RUN)
    for listener in (ui.run.click, ui.hotwords.submit):
        listener(events.run_transcribe, inputs, shown, **RUN)


def _connect_speak(session: gr.State, title: gr.HTML, events: SpeechEvents, ui: SimpleNamespace) -> None:
    inputs = [session, ui.model, ui.text, ui.seed, ui.fresh]
    for listener in (ui.run.click, ui.text.submit, ui.seed.submit):
        listener(events.run_speak, inputs, _shown(ui, title, seeded=True), **RUN)


def _openers(session: gr.State, events: SpeechEvents, subtabs: dict[str, SimpleNamespace]) -> SimpleNamespace:
    """What happens when a sub-tab, or the tab itself, is opened."""
    for task in CLIP_TASKS:
        subtabs[task].follow(subtabs[task].tab.select(lambda: None, None, None, queue=False, **QUIET))
    models = {ui.model: KINDS[task] for task, ui in subtabs.items()}
    lists = [part for ui in subtabs.values() for part in (ui.notice, ui.body, ui.model)]

    def open_with(listener) -> None:
        """Look again which models there are, take the first sample, and show it."""
        event = listener(events.refresh, [ui.model for ui in subtabs.values()], lists, **QUIET)
        event = event.success(events.open, [session], subtabs["codec"].clips, **QUIET)
        subtabs["codec"].follow(event)

    return SimpleNamespace(models=models, open_with=open_with, subtabs=subtabs)
