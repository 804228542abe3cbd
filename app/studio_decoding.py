"""The fields for how tokens become a picture, as the chosen model wants them: it is asked what it has.

A model is a tokenizer, or a generator, which has the options of its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from .studio_context import html

# Options of decoders that the page has fields for, in their order: label, and decimals of numbers.
DECODING: dict[str, tuple[str, int | None]] = {
    "steps": ("Steps", 0), "guidance": ("Guidance", None), "seed": ("Seed", 0),
    "norm_guidance": ("Guide without saturating colours", None),
}  # fmt: skip
NUMBERS = ("steps", "guidance", "seed")  # the others are yes or no
HINT = '<p class="mt-hint">More steps help up to a point; guidance 1 is none. Press Enter.</p>'


def decoding_controls(model, group_id: str, field_id: str) -> tuple[gr.Accordion, list[gr.components.Component]]:
    """The group, and a field for each of `DECODING`, shown where the model has that option.

    group_id: the group's id on the page. field_id: what the fields' ids begin with.
    """
    made = {}
    for (name, (label, _)), (value, shown) in zip(DECODING.items(), _values(model), strict=True):
        elem_id = f"{field_id}-{name.replace('_', '-')}"
        made[name] = _field(name)(value, label=label, elem_id=elem_id, min_width=60, render=False, **shown)
    with gr.Accordion("Decoder", open=False, visible=has_decoding_options(model), elem_id=group_id) as group:
        html(HINT)
        with gr.Row():
            for name in NUMBERS:
                made[name].render()
        for name in [name for name in made if name not in NUMBERS]:
            made[name].render()
    return group, list(made.values())


def decoding_updates(model) -> list:
    """The group of these fields, and each of them, for another model, with its own values."""
    named = zip(DECODING, _values(model), strict=True)
    fields = [_field(name)(value=value, **shown) for name, (value, shown) in named]
    return [gr.Accordion(visible=has_decoding_options(model)), *fields]


def named_fields(values: Sequence) -> dict[str, Any]:
    """What the fields of `DECODING` say, by the names of the options; None where one is empty or hidden."""
    return dict(zip(DECODING, values, strict=True))


def has_decoding_options(model) -> bool:
    """Whether there is anything to choose in decoding."""
    return any(name in model.decoding_option_names for name in DECODING)


def _values(model) -> list[tuple[Any, dict[str, Any]]]:
    """Value and visibility of each field."""
    own = model.decoding_defaults() if has_decoding_options(model) else {}
    return [
        (own.get(name), {"visible": name in own} | ({} if decimals is None else {"precision": decimals}))
        for name, (_, decimals) in DECODING.items()
    ]


def _field(name: str) -> type:
    return gr.Number if name in NUMBERS else gr.Checkbox
