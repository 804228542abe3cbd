"""Tokenizers that a generator was trained with and does not own.

The generator's config names each one and keeps its fingerprint. It is loaded when it is first needed, and checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .base import Model, Tokenizer
from .errors import InvalidInput, TokenizerMismatch


@dataclass
class Companion:
    """Holds a tokenizer where `state_dict`, `parameters` and `save_pretrained` of its generator do not see it."""

    tokenizer: Tokenizer | None = None

    def __deepcopy__(self, memo: dict) -> Companion:
        return Companion(self.tokenizer)  # a copy of the generator (its averaged weights, say) shares the tokenizer

    def on(self, device: torch.device) -> Tokenizer:
        """The tokenizer, which follows its generator to `device`."""
        return self.tokenizer if self.tokenizer.device == device else self.tokenizer.to(device)


def load_companion(generator: Model, name: str | None, way_out: str, what: str = "tokenizer") -> Tokenizer:
    """The tokenizer that a config names: a known model or a local folder, never somebody's repository.

    A name is looked for beside the generator's own folder, too: models that were trained together stay together.

    what, way_out: what it is to `generator`, and how to give it one, for the messages.

    Raises:
        InvalidInput: the config names none, or one that is not here.
    """
    from .registry import find_entry, load

    if name is None:
        raise InvalidInput(f"{generator.name} names no {what}; {way_out}")
    source = name
    folder = getattr(generator, "folder", None)  # parts of models have none
    if isinstance(name, str) and folder is not None and Path(name).name == name:
        beside = folder.parent / name
        if find_entry(name) is None and not Path(name).is_dir() and beside.is_dir():
            source = str(beside)
    if not isinstance(name, str) or not name or (find_entry(name) is None and not Path(source).is_dir()):
        raise InvalidInput(f"the {what} {name!r} of {generator.name} is neither a known model nor a folder; {way_out}")
    return load(source, dtype="bfloat16" if generator.dtype == torch.bfloat16 else "float32")


def check_companion(generator: Model, tokenizer: Tokenizer, name: str | None, fingerprint: str | None) -> None:
    """Raise TokenizerMismatch when `tokenizer` is another one than that with the `name` and `fingerprint` of a config.

    Where a config has no fingerprint, any is right.
    """
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise TokenizerMismatch(
            f"{generator.name} was trained with {name} (fingerprint {fingerprint}), and {tokenizer.name} "
            f"({tokenizer.fingerprint}) is another one"
        )
