"""The Image tab's controls as the chosen tokenizer wants them: it is asked what it has."""

from __future__ import annotations

from typing import Any

QUALITY_AND_BYTES = [("Quality", "quality"), ("Bytes", "bytes")]


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
