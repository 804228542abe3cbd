"""The control that says what to make: chosen classes as chips, a search over all names, and free text.

Gradio's dropdown lists matches in the order of the classes ("tig" finds "antigua" before "tiger") and forgets a typed
word when the next button is pressed. With some thousand names both are in the way.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

SCRIPT = (Path(__file__).parent / "label_picker.js").read_text()


def label_picker(
    names: list[str], value: list[int | str], *, label: str, info: str, elem_id: str, visible: bool = True
) -> gr.HTML:
    """An input whose value is a list of class numbers, and of what was typed and is no name.

    names: of all classes, by number; in this order they are listed before anything is typed. To change them, return
    `gr.HTML(value=[...], names=[...])`. Triggers "input" when the value changes and "submit" on Enter without a word.
    """
    template = (
        f'<label class="mt-label" for="{elem_id}-box">{escape(label)}</label><p class="mt-info">{escape(info)}</p>'
        f'<div class="mt-chips"><input id="{elem_id}-box" type="text" role="combobox" aria-expanded="false" '
        f'aria-autocomplete="list" aria-controls="{elem_id}-list" autocomplete="off" autocapitalize="off" '
        f'spellcheck="false" maxlength="200"></div>'
        f'<div class="mt-options" hidden><p></p><ul id="{elem_id}-list" role="listbox" '
        f'aria-label="{escape(label)}"></ul></div>'
    )
    return gr.HTML(
        value, html_template=template, js_on_load=SCRIPT, apply_default_css=False, names=names, elem_id=elem_id,
        elem_classes="mt-picker", visible=visible,
    )  # fmt: skip
