"""The Models tab: what is shipped, released or in local folders; load, unload, memory in use."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from . import studio_views as views
from .studio_context import Studio, html, speaks

NUM_OUTPUTS = 4


def build(studio: Studio, pickers: dict[gr.Dropdown, str], title: gr.HTML) -> SimpleNamespace:
    """Lay the tab out; `pickers` are dropdowns of other tabs and the kind of model in them: they learn of new ones."""
    ui = SimpleNamespace()
    events = ModelEvents(studio, list(pickers.values()))
    with gr.Row(equal_height=False, elem_classes="mt-page"):
        with gr.Column(scale=0, min_width=300, elem_classes="mt-controls"):
            ui.name = gr.Dropdown(
                events.names(), value=studio.catalogue.default_source(), label="Model", allow_custom_value=True,
                elem_id="models-name", info="From the list, or type a folder or a hub id (owner/name).",
            )  # fmt: skip
            with gr.Row(elem_classes="mt-buttons"):
                ui.load = gr.Button("Load", size="sm", variant="primary", elem_id="models-load", min_width=80)
                ui.unload = gr.Button("Unload", size="sm", elem_id="models-unload", min_width=80)
            ui.memory = html(events.memory(), elem_id="models-memory")
            html(
                '<p class="mt-hint">Models load on first use, are shared by everybody who uses this studio, and leave '
                "memory when it runs short, the least recently used first. Released models are downloaded from the "
                "authors' pages on Hugging Face when you load them.</p>"
            )
        with gr.Column(scale=1, min_width=320, elem_classes="mt-results"), gr.Column(elem_classes="mt-panel"):
            ui.table = html(events.table(), elem_id="models-table")
    outputs = [ui.table, ui.memory, title, ui.name, *pickers]
    work = {"show_progress": "minimal", "show_progress_on": ui.table, "api_visibility": "private"}
    ui.load.click(events.load, [ui.name], outputs, **work)
    ui.unload.click(events.unload, [ui.name], outputs, **work)
    ui.refresh = lambda listener: listener(
        events.refresh, None, outputs, show_progress="hidden", api_visibility="private"
    )
    return ui


class ModelEvents:
    """The tab's event handlers."""

    def __init__(self, studio: Studio, picker_kinds: list[str]):
        self.studio, self.catalogue, self.picker_kinds = studio, studio.catalogue, picker_kinds
        num_outputs = NUM_OUTPUTS + len(picker_kinds)
        self.load, self.unload = speaks(num_outputs)(self._load), speaks(num_outputs)(self._unload)

    def _load(self, name: str | None):
        model = self.catalogue.load_by_name(name or "")
        gr.Info(f"{model.name} is loaded.", duration=3)
        return self.refresh()

    def _unload(self, name: str | None):
        source = next((row.source for row in self.catalogue.rows() if name in (row.label, row.source)), name)
        if not self.catalogue.shelf.unload(source or ""):
            gr.Info(f"{name} was not loaded.", duration=3)
        return self.refresh()

    def refresh(self) -> list:
        """The tab as things are now, and the dropdowns of the other tabs."""
        return [
            self.table(), self.memory(), self.studio.title(), gr.Dropdown(choices=self.names()),
            *(gr.Dropdown(choices=self.catalogue.choices(kind)) for kind in self.picker_kinds),
        ]  # fmt: skip

    def names(self) -> list[tuple[str, str]]:
        """(label, source) of every known model."""
        return [(row.label, row.source) for row in self.catalogue.rows()]

    def table(self) -> str:
        """All known models."""
        return views.models_table(self.catalogue.rows(), self.catalogue.shelf.loaded())

    def memory(self) -> str:
        """Memory of the loaded models and its limit."""
        shelf = self.catalogue.shelf
        share = min(100, 100 * shelf.used_bytes / shelf.max_bytes)
        return (
            f'<p class="mt-memory">{views.file_size(shelf.used_bytes)} of {views.file_size(shelf.max_bytes)} for models'
            f'<span class="bar"><span style="width:{share:.1f}%"></span></span></p>'
        )
