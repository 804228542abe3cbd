"""How texts and pictures make one sequence of ids for SEED-LLaMA, and how they are read from it again.

    begin  text  <img> 32 codes </img>  text  end

Shape suffixes: B prompts, L ids, T ids with those that are still to come, Q codes of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidInput, LimitExceeded
from ..core.prompts import check_text
from .seed_llama_sampling import ImageVocabulary

PROMPTS = {"plain": ("", ""), "vicuna": ("USER: ", "\nASSISTANT:"), "llama2": ("[INST] ", " [/INST]\n")}
MAX_PROMPT_CHARACTERS = 100_000


@dataclass(frozen=True)
class Reply:
    """What was written: `parts` are texts, and pictures, or `Tokens` where they were not to be drawn; `ids` are all."""

    parts: list
    ids: list[int] = field(repr=False)

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list:
        return [part for part in self.parts if not isinstance(part, str)]


@dataclass(frozen=True)
class Layout:
    """The ids of pictures, and those that begin, end and pad a sequence; the first `vocab_size` ids are known."""

    vocab_size: int
    images: ImageVocabulary
    begin: int
    end: int
    padding: int

    def sequence(self, parts: Sequence[Tensor | Sequence[int]], is_whole: bool = True) -> Tensor:
        """Ids int64 [L] of a document: begin, its parts, and end where it `is_whole`.

        parts: codes of a picture as a tensor int64 [Q], or the ids of a text.

        Raises:
            InvalidInput: a picture that is not Q codes.
        """
        ids = [self.begin]
        for part in parts:
            ids += self.image_ids(part) if isinstance(part, Tensor) else list(part)
        return torch.tensor([*ids, self.end] if is_whole else ids)

    def image_ids(self, codes_Q: Tensor) -> list[int]:
        """Codes of a picture as they stand in a text, opened and closed."""
        own = self.images
        num_codes = own.codes.stop - own.codes.start
        if codes_Q.shape != (own.length,) or not 0 <= int(codes_Q.min()) <= int(codes_Q.max()) < num_codes:
            raise InvalidInput(
                f"a picture is {own.length} codes from 0 to {num_codes - 1}, got {list(codes_Q.shape)} "
                f"from {int(codes_Q.min())} to {int(codes_Q.max())}"
            )
        return [own.begin, *(codes_Q + own.codes.start).tolist(), own.end]

    def text_ids(self, text: str, tokenizer: Any) -> list[int]:
        """Ids of a text (see `check_text`), none of them a picture's."""
        ids = tokenizer.encode(check_text(text, MAX_PROMPT_CHARACTERS), add_special_tokens=False).ids if text else []
        return [i for i in ids if i < self.vocab_size and not self._is_picture(i)]

    def parts(self, ids: Sequence[int]) -> Iterator[list[int] | Tensor]:
        """The texts (their ids) and pictures (codes int64 [Q]) of a sequence; pictures that are not whole are left out.

        Ids that are no text, as the one that ends a sequence, are left out of texts.
        """
        own, text, at = self.images, [], 0
        while at < len(ids):
            if ids[at] != own.begin:
                text.append(ids[at])
                at += 1
                continue
            yield self._readable(text)
            text, first = [], at + 1
            at = first
            while at < len(ids) and own.codes.start <= ids[at] < own.codes.stop:
                at += 1
            if at - first == own.length:
                yield torch.tensor(ids[first:at]) - own.codes.start
            at += at < len(ids) and ids[at] == own.end
        yield self._readable(text)

    def _readable(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i not in (self.begin, self.end, self.padding) and not self._is_picture(i)]

    def _is_picture(self, token: int) -> bool:
        own = self.images
        return own.codes.start <= token < own.codes.stop or token in (own.begin, own.end)

    def left_padded(self, prompts: Sequence[Tensor], num_more: int) -> tuple[Tensor, Tensor]:
        """Prompts, each int64 [L], as one batch: ids int64 [B, L], and where its tokens are, int64 [B, T] of 0 and 1.

        The places of `num_more` tokens that are still to come count as tokens.
        """
        longest = max(map(len, prompts))
        ids_BL = torch.full((len(prompts), longest), self.padding)
        is_token_BT = torch.zeros(len(prompts), longest + num_more, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BL[row, longest - len(prompt) :] = prompt
            is_token_BT[row, longest - len(prompt) :] = 1
        return ids_BL, is_token_BT


def prompt_parts(prompt: Any, form: str) -> list:
    """A text, or a tuple of texts and pictures, as the `form` (one of `PROMPTS`) puts it; neighbouring texts are one.

    Raises:
        InvalidInput: no prompt, an empty one, control characters.
        LimitExceeded: more characters than are read.
    """
    parts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, (tuple, list)) else None
    if not parts:
        raise InvalidInput(f"a prompt is a text, or a tuple of texts and pictures, not {prompt!r:.80}")
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts) and not any(text.strip() for text in texts):
        raise InvalidInput("the prompt is empty")
    if sum(map(len, texts)) > MAX_PROMPT_CHARACTERS:
        raise LimitExceeded(f"a prompt of more than {MAX_PROMPT_CHARACTERS} characters is not read")
    before, after = PROMPTS[form]
    pieces: list[Any] = []
    for part in (before, *parts, after):
        if isinstance(part, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += part
        else:
            pieces.append(part)
    return pieces
