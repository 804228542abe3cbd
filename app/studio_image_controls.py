"""The Image tab's controls as the chosen tokenizer wants them: it is asked what it has."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .studio_context import html

QUALITY_AND_BYTES = [("Quality", "quality"), ("Bytes", "bytes")]
# Options of decoders that the page has fields for, in their order: label, and decimals of numbers.
DECODING: dict[str, tuple[str, int | None]] = {
    "steps": ("Steps", 0), "guidance": ("Guidance", None), "seed": ("Seed", 0),
    "norm_guidance": ("Guide without saturating colours", None),
}  # fmt: skip
NUMBERS = ("steps", "guidance", "seed")  # the others are yes or no
HINT = '<p class="mt-hint">More steps help up to a point; guidance 1 is none. Press Enter.</p>'


def budget_kinds(tokenizer) -> list[tuple[str, str]]:
    """What can be fixed: (label, kind of `Budget`)."""
    return [("Scales", "scales") if tokenizer.scales else ("Tokens", "tokens"), *QUALITY_AND_BYTES]


def count_slider(tokenizer) -> dict[str, Any]:
    """How the slider of tokens, or of whole scales, is for a tokenizer."""
    options = {"maximum": len(tokenizer.scales) or tokenizer.max_tokens, "interactive": tokenizer.is_variable_length}
    options["label"] = "Scales" if tokenizer.scales else "Tokens"
    if not tokenizer.is_variable_length:
        return options | {"info": f"{tokenizer.name} always uses all of them."}
    if tokenizer.scales:
        return options | {"info": f"Coarse ones first; {tokenizer.max_tokens} tokens in all."}
    return options | {"info": "More tokens, closer picture."}


def decoding_controls(tokenizer) -> tuple[gr.Accordion, list[gr.components.Component]]:
    """The group, and a field for each of `DECODING`, shown where the tokenizer has that option."""
    made = {}
    for (name, (label, _)), (value, shown) in zip(DECODING.items(), _values(tokenizer), strict=True):
        elem_id = f"image-{name.replace('_', '-')}"
        made[name] = _field(name)(value, label=label, elem_id=elem_id, min_width=60, render=False, **shown)
    with gr.Accordion("Decoder", open=False, visible=has_decoding_options(tokenizer), elem_id="image-decoder") as group:
        html(HINT)
        with gr.Row():
            for name in NUMBERS:
                made[name].render()
        for name in [name for name in made if name not in NUMBERS]:
            made[name].render()
    return group, list(made.values())


def decoding_updates(tokenizer) -> list:
    """The group of these fields, and each of them, for another tokenizer, with its own values."""
    named = zip(DECODING, _values(tokenizer), strict=True)
    fields = [_field(name)(value=value, **shown) for name, (value, shown) in named]
    return [gr.Accordion(visible=has_decoding_options(tokenizer)), *fields]


def has_decoding_options(tokenizer) -> bool:
    """Whether there is anything to choose in decoding."""
    return any(name in tokenizer.decoding_option_names for name in DECODING)


def _values(tokenizer) -> list[tuple[Any, dict[str, Any]]]:
    """Value and visibility of each field."""
    own = tokenizer.decoding_defaults() if has_decoding_options(tokenizer) else {}
    return [
        (own.get(name), {"visible": name in own} | ({} if decimals is None else {"precision": decimals}))
        for name, (_, decimals) in DECODING.items()
    ]


def _field(name: str) -> type:
    return gr.Number if name in NUMBERS else gr.Checkbox
