"""Texts for next-token generators: prompts, and what a T5 encoder makes of them (FlexAR: Flan-T5 XL).

Shape suffixes: N prompts, M text positions, E text width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint, ModelNotFound

TEXT_ENCODER = "google/flan-t5-xl"
KNOWN_ENCODERS = re.compile(r"google/flan-t5-(small|base|large|xl|xxl)")  # that a config may name: nobody else's
TEXTS_AT_ONCE = 8


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts, in the place that class numbers have in a class-conditional generator.

    states_NME: fp32. is_text_NM: bool, False where a text has ended. nothing_ME, is_nothing_M: the same of "", which
    stands for no prompt.
    """

    texts: tuple[str, ...]
    states_NME: Tensor
    is_text_NM: Tensor
    nothing_ME: Tensor
    is_nothing_M: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor) -> Prompts:
        texts = tuple(self.texts[row] for row in rows.tolist())
        return Prompts(texts, self.states_NME[rows], self.is_text_NM[rows], self.nothing_ME, self.is_nothing_M)

    def to(self, device: torch.device) -> Prompts:
        tensors = (self.states_NME, self.is_text_NM, self.nothing_ME, self.is_nothing_M)
        return Prompts(self.texts, *(tensor.to(device) for tensor in tensors))

    def tolist(self) -> list[str]:
        return list(self.texts)

    def without(self, is_dropped_N: Tensor) -> Prompts:
        """The same, with no prompt where `is_dropped_N` is True."""
        is_dropped_N = is_dropped_N.to(self.states_NME.device)
        states_NME = torch.where(is_dropped_N[:, None, None], self.nothing_ME, self.states_NME)
        is_text_NM = torch.where(is_dropped_N[:, None], self.is_nothing_M, self.is_text_NM)
        return Prompts(self.texts, states_NME, is_text_NM, self.nothing_ME, self.is_nothing_M)


class T5Features:
    """A T5 encoder through transformers: one of Google's Flan-T5, or a local folder with tokenizer and weights.

    Raises:
        ModelNotFound: it is neither, or not here. InvalidCheckpoint: weights are missing.
    """

    def __init__(self, path: str, max_length: int):
        self.path, self.max_length = path, max_length
        self.tokenizer = _load("AutoTokenizer", path)
        self.model, report = _load("T5EncoderModel", path, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):  # which would be drawn at random
            raise InvalidCheckpoint(f"the text encoder {path!r} lacks {len(missing)} weights, such as {missing[0]}")
        self.model.eval().requires_grad_(False)
        self.width: int = self.model.config.d_model  # E

    def __deepcopy__(self, memo: dict) -> T5Features:
        return self  # frozen: copies of a generator (its averaged weights, say) share it

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Prompts:
        """Encode prompts; longer ones are cut at `max_length` positions, as in training."""
        batch = self.tokenizer(
            [*texts, ""], padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        states = []
        for rows in torch.arange(len(texts) + 1).split(TEXTS_AT_ONCE):
            mask = batch.attention_mask[rows]
            states.append(self.model(input_ids=batch.input_ids[rows], attention_mask=mask).last_hidden_state.float())
        states_NME, is_text_NM = torch.cat(states), batch.attention_mask.bool()
        is_text_NM[:, 0] = True  # where a tokenizer writes nothing for "": attention needs something to look at
        return Prompts(tuple(texts), states_NME[:-1], is_text_NM[:-1], states_NME[-1], is_text_NM[-1])


def encoder_width(path: str) -> int:
    """E of the T5 encoder in `path`; raises as `T5Features` does."""
    return _load("T5Config", path).d_model


def _load(kind: str, path: str, **options: bool) -> Any:
    """What `path` holds, by a class of transformers."""
    import transformers

    if not Path(path).is_dir() and not KNOWN_ENCODERS.fullmatch(path):
        raise ModelNotFound(f"the text encoder {path!r} is neither a folder nor a Flan-T5, such as {TEXT_ENCODER}")
    try:
        return getattr(transformers, kind).from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers hands on what the libraries below it raise
        raise ModelNotFound(
            f"the text encoder {path!r} could not be loaded ({error.__class__.__name__}); download {TEXT_ENCODER} "
            "and set generator.text_encoder to its folder"
        ) from error
