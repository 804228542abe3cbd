"""How SEED-LLaMA writes: one token after the other, with pictures as spans that cannot go wrong.

A picture is `<img>`, then so many codes, then `</img>`. Within a span only codes may be written, and behind it only the
closing token; outside, no code is. So every picture is whole, and for most of its tokens the head computes the rows of
the codes alone.

Shape suffixes: B prompts, K beams of each, R rows (prompts, or the beams of all), N tokens, T all of a row, W width,
V ids, C choices, Q codes of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .next_scale_sampling import probabilities

OUTSIDE = -1  # of a picture


@dataclass(frozen=True)
class ImageVocabulary:
    """Where pictures are in a vocabulary: `codes` ids (a slice), the opening and the closing id, codes of a picture."""

    codes: slice
    begin: int
    end: int
    length: int


@dataclass(frozen=True)
class WritingSettings:
    """How to write; `settings` of the model checks and makes it.

    max_tokens: of a reply. temperature: of the draws; 0 takes the likeliest. top_p: draw among the likeliest tokens
    that have this share of the probability together. max_images: of a reply. starts_with_image: open one at once.
    """

    max_tokens: int
    temperature: float
    top_p: float
    max_images: int
    starts_with_image: bool
    top_k: int = 0


class Reading:
    """Rows that are read a few tokens at a time, with a cache of what was read before.

    hidden_states: of ids int64 [R, N] by `LlamaModel`'s options. is_token_RT: int64 of 0 (padding) and 1, for all
    tokens that are ever read.
    """

    def __init__(self, hidden_states: Callable[..., Tensor], is_token_RT: Tensor):
        from transformers import DynamicCache

        self.hidden_states, self.is_token_RT = hidden_states, is_token_RT
        self.cache, self.length = DynamicCache(), 0

    def __call__(self, ids_RN: Tensor) -> Tensor:
        """Read N more tokens of each row: hidden states [R, W] of the last ones."""
        start, self.length = self.length, self.length + ids_RN.shape[1]
        position_RT = (self.is_token_RT.cumsum(dim=1) - 1).clamp(min=0)
        hidden_RNW = self.hidden_states(
            ids_RN.to(self.is_token_RT.device), past_key_values=self.cache, use_cache=True,
            attention_mask=self.is_token_RT[:, : self.length], position_ids=position_RT[:, start : self.length],
        )  # fmt: skip
        return hidden_RNW[:, -1]

    def select(self, rows_R: Tensor) -> None:
        """Go on with these rows (int64) of those that there are; one may be taken several times."""
        self.cache.reorder_cache(rows_R)
        self.is_token_RT = self.is_token_RT[rows_R]


class Spans:
    """Where each reply is: outside of pictures, or before which code of one; and what may come next."""

    def __init__(self, batch: int, vocabulary: ImageVocabulary, settings: WritingSettings):
        self.vocabulary, self.settings = vocabulary, settings
        self.place = [0 if settings.starts_with_image else OUTSIDE] * batch
        self.images = [1 if settings.starts_with_image else 0] * batch
        self.written = [1 if settings.starts_with_image else 0] * batch

    def forced(self, row: int) -> int | None:
        """The only token that may come next, if there is just one."""
        return self.vocabulary.end if self.place[row] == self.vocabulary.length else None

    def wants_code(self, row: int) -> bool:
        return 0 <= self.place[row] < self.vocabulary.length

    def may_open(self, row: int) -> bool:
        """Whether another picture is allowed, and has room in what is left of the reply."""
        room = self.settings.max_tokens - self.written[row]
        return self.images[row] < self.settings.max_images and room >= self.vocabulary.length + 2

    def mask(self, row: int, logits_V: Tensor) -> Tensor:
        """Logits of all ids with -inf for those that may not come next."""
        vocabulary = self.vocabulary
        if self.wants_code(row):
            masked_V = torch.full_like(logits_V, float("-inf"))
            masked_V[vocabulary.codes] = logits_V[vocabulary.codes]
            return masked_V
        masked_V = logits_V.clone()
        masked_V[vocabulary.codes] = float("-inf")
        masked_V[vocabulary.end] = float("-inf")
        if not self.may_open(row):
            masked_V[vocabulary.begin] = float("-inf")
        return masked_V

    def advance(self, row: int, token: int) -> None:
        """Put `token` behind reply `row`."""
        self.written[row] += 1
        if self.place[row] == OUTSIDE:
            if token == self.vocabulary.begin:
                self.place[row], self.images[row] = 0, self.images[row] + 1
        elif token == self.vocabulary.end:
            self.place[row] = OUTSIDE
        else:
            self.place[row] += 1


def draw(logits_BV: Tensor, settings: WritingSettings, rngs: Sequence[torch.Generator]) -> Tensor:
    """One id for each row, int64 [B], by one number from its own generator."""
    if settings.temperature == 0:
        return logits_BV.argmax(dim=-1)
    sums_BV = probabilities(logits_BV, settings).cumsum(dim=-1, dtype=torch.float64)
    chances = [torch.rand(1, generator=rng, dtype=torch.float64, device=rng.device) for rng in rngs]
    target_B1 = torch.stack(chances).to(sums_BV.device) * sums_BV[:, -1:]
    drawn_B = torch.searchsorted(sums_BV, target_B1, right=True)[:, 0]
    return drawn_B.clamp(max=sums_BV.shape[-1] - 1)  # a product that was rounded up to the whole sum


def write(
    reading: Reading,
    logits_of: Callable[[Tensor, slice], Tensor],
    first_BW: Tensor,
    vocabulary: ImageVocabulary,
    settings: WritingSettings,
    rngs: Sequence[torch.Generator],
    end_of_text: int,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The tokens of each reply, without the one that ends it.

    Args:
        reading: has read the prompts (and `<img>`, where replies start with a picture).
        logits_of: the head, [B, W] to fp32 [B, V] over the ids in a slice.
        first_BW: hidden states of the last tokens that it read.
        on_token: called with the number of tokens there are after each.
    """
    batch = len(rngs)
    spans = Spans(batch, vocabulary, settings)
    replies = [[vocabulary.begin] if settings.starts_with_image else [] for _ in range(batch)]
    is_open = [True] * batch
    hidden_BW = first_BW
    for step in range(settings.max_tokens - int(settings.starts_with_image)):
        tokens = [end_of_text] * batch
        drawing = []
        for row in range(batch):
            forced = spans.forced(row)
            if not is_open[row]:
                continue
            if forced is None:
                drawing.append(row)
            else:
                tokens[row] = forced
        if drawing:
            rows_D = torch.tensor(drawing, device=hidden_BW.device)
            if all(spans.wants_code(row) for row in drawing):
                logits_DV, first = logits_of(hidden_BW[rows_D], vocabulary.codes), vocabulary.codes.start
            else:
                logits_DV, first = logits_of(hidden_BW[rows_D], slice(None)), 0
                logits_DV = torch.stack([spans.mask(row, x_V) for row, x_V in zip(drawing, logits_DV, strict=True)])
            drawn = draw(logits_DV, settings, [rngs[row] for row in drawing]) + first
            for row, token in zip(drawing, drawn.tolist(), strict=True):
                tokens[row] = token
        for row in range(batch):
            if is_open[row] and spans.place[row] == OUTSIDE and tokens[row] == end_of_text:
                is_open[row] = False
            elif is_open[row]:
                replies[row].append(tokens[row])
                spans.advance(row, tokens[row])
        if on_token is not None:
            on_token(step + 1)
        if not any(is_open):
            break
        hidden_BW = reading(torch.tensor(tokens, device=hidden_BW.device)[:, None])
    return replies


def likeliest_picture(
    reading: Reading,
    logits_of: Callable[[Tensor, slice], Tensor],
    first_BW: Tensor,
    vocabulary: ImageVocabulary,
    num_beams: int,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Codes int64 [B, Q] behind `<img>`: the likeliest that a beam search finds, one beam taking the likeliest code.

    All beams are as long as a picture, so none ends early and sums of log-probabilities can be compared as they are.

    The arguments are those of `write`, and `reading` has read `<img>`.
    """
    hidden_RW, batch = first_BW, len(first_BW)
    device = hidden_RW.device
    score_BK = torch.zeros(batch, 1, device=device)
    codes_BKQ = torch.zeros(batch, 1, 0, dtype=torch.int64, device=device)
    for step in range(vocabulary.length):
        beams = score_BK.shape[1]
        chance_BKV = logits_of(hidden_RW, vocabulary.codes).log_softmax(dim=-1).unflatten(0, (batch, beams))
        sums_BC = (score_BK[:, :, None] + chance_BKV).flatten(1)
        score_BK, choice_BK = sums_BC.topk(min(num_beams, sums_BC.shape[1]), dim=1)
        parent_BK, code_BK1 = choice_BK // chance_BKV.shape[2], (choice_BK % chance_BKV.shape[2])[..., None]
        codes_BKQ = torch.cat([codes_BKQ.take_along_dim(parent_BK[..., None], dim=1), code_BK1], dim=2)
        if on_token is not None:
            on_token(step + 1)
        if step + 1 < vocabulary.length:
            reading.select((torch.arange(batch, device=device)[:, None] * beams + parent_BK).flatten())
            hidden_RW = reading(code_BK1.flatten(0, 1) + vocabulary.codes.start)
    return codes_BKQ[:, 0]
