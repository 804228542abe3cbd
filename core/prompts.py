"""Prompts: what people write to models. Whatever text reaches a model has passed `check_text`."""

from __future__ import annotations

import unicodedata
from typing import Any

from .errors import InvalidInput, LimitExceeded
from .labels import MAX_LABELS

MAX_CHARACTERS = 2000  # of one prompt; models read a few hundred at most
NO_PROMPT = ""  # stands for a picture of anything


def check_text(text: Any, largest: int = MAX_CHARACTERS) -> str:
    """`text` as it is.

    Raises:
        InvalidInput: what is no text, control characters (but line breaks and tabs).
        LimitExceeded: text longer than `largest` characters.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"a prompt is text, not {text!r:.80}")
    if len(text) > largest:
        raise LimitExceeded(f"a prompt has {len(text)} characters; at most {largest} are read, so shorten it")
    for character in text:
        if character not in "\n\r\t" and unicodedata.category(character) in ("Cc", "Cs"):
            raise InvalidInput(f"a prompt holds the control character {character!r}; leave it out")
    return text


def read_prompts(prompts: Any) -> list[str]:
    """One prompt or a list of them as a list of texts without outer spaces; None is `NO_PROMPT`.

    Raises:
        InvalidInput: none or too many of them, what is no text, empty text, control characters (but line breaks and
            tabs, which become spaces).
        LimitExceeded: a prompt longer than `MAX_CHARACTERS`.
    """
    given = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    if not 1 <= len(given) <= MAX_LABELS:
        raise InvalidInput(f"give 1 to {MAX_LABELS} prompts, not {len(given)}")
    return [_read_prompt(prompt) for prompt in given]


def _read_prompt(prompt: Any) -> str:
    if prompt is None:
        return NO_PROMPT
    text = " ".join(check_text(prompt).split())
    if not text:
        raise InvalidInput("a prompt is empty; write what the picture shows, or give None for any picture")
    return text
