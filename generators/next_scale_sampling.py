"""How next-scale generators sample: whole scales at a time, in as many passes of the network as there are scales.

A scale may be drawn anew: further passes read what was drawn before in the place of what the coarser scales give, and
every later scale looks at the first pass alone (TokenFlow, Qu et al. 2024, arXiv 2412.03069, section 3.3).

The loop knows nothing of the network, nor of what codes are. It asks a network for hidden states at the tokens of a
scale, with all coarser scales in the network's cache, and a quantizer (`codes`) for

    scales                            tokens of each scale
    accumulate(sum, k, ids)           the sum so far with scale k added
    view(sum, k)                      the sum so far as scale k reads it

Shape suffixes: B items, R rows (B, or 2B when guided: the unconditional rows last), L latents, S tokens of all scales,
k tokens of one scale, C channels, W width, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.multiscale import split_scales

MAX_TEMPERATURE = 10.0


@dataclass(frozen=True)
class NextScaleSettings:
    """How to sample; `settings` of the model checks and makes it.

    guidance: w of c + w (c - u) at the last scale; it grows linearly from 0 at the first.
    temperature: of the draws; 0 takes the likeliest codes.
    top_k: draw among so many of the likeliest codes; 0 for all.
    top_p: draw among the likeliest codes that have this share of the probability together; 1 for all.
    again: (top_k, top_p) of each further pass over a scale; the first scale, which reads nothing, has none.
    """

    num_scales: int
    guidance: float
    temperature: float
    top_k: int
    top_p: float
    again: tuple[tuple[int, float], ...] = ()

    @property
    def total_steps(self) -> int:
        return self.num_scales + (self.num_scales - 1) * len(self.again)

    def of_pass(self, number: int) -> NextScaleSettings:
        """The settings of pass 0, 1, ... over a scale."""
        if not number:
            return self
        top_k, top_p = self.again[number - 1]
        return replace(self, top_k=top_k, top_p=top_p)

    def guidance_weight(self, scale: int) -> float:
        """w of scale 0, 1, ..."""
        last = self.num_scales - 1
        return self.guidance * (scale / last if last else 1.0)


def probabilities(logits: Tensor, settings: NextScaleSettings) -> Tensor:
    """What to draw from: fp32 [..., V], zero for the codes that `top_k` and then `top_p` leave out.

    Codes as likely as the last one that stays do so, too; the likeliest always stays. `temperature` must not be 0.
    """
    logits = logits.float() / settings.temperature
    vocab_size = logits.shape[-1]
    count = min(settings.top_k or vocab_size, vocab_size)
    if count < vocab_size or settings.top_p < 1:
        best = logits.topk(count, dim=-1).values
        kept = best.new_full(best.shape[:-1], count, dtype=torch.int64)
        if settings.top_p < 1:
            shares = best.softmax(dim=-1)
            kept = (shares.cumsum(dim=-1) - shares < settings.top_p).sum(dim=-1).clamp(min=1)
        logits = logits.masked_fill(logits < best.gather(-1, kept[..., None] - 1), float("-inf"))
    return logits.softmax(dim=-1)


class SeededDraws:
    """One random number for each token and pass of an item, all from the item's own generator before the first scale.

    So a token's draw depends neither on the batch, nor on whether the scales before it are drawn or given.
    """

    def __init__(self, rngs: Sequence[torch.Generator], num_tokens: int, device: torch.device, num_passes: int = 1):
        def chances(rng: torch.Generator) -> Tensor:
            return torch.rand(num_tokens, generator=rng, dtype=torch.float64, device=rng.device)

        rows = [torch.stack([chances(rng) for _ in range(num_passes)]) for rng in rngs]
        self.chance_BPS = torch.stack(rows).to(device)

    @property
    def chance_BS(self) -> Tensor:
        """The numbers of the first pass."""
        return self.chance_BPS[:, 0]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.chance_BPS)

    def draw(self, places: slice, logits_BkV: Tensor, settings: NextScaleSettings, number: int = 0) -> Tensor:
        """Codes int64 [B, k] for the tokens at `places` of the sequence, in pass `number` over their scale."""
        if settings.temperature == 0:
            return logits_BkV.argmax(dim=-1)
        sums_BkV = probabilities(logits_BkV, settings).cumsum(dim=-1, dtype=torch.float64)
        target_Bk1 = self.chance_BPS[:, number, places, None] * sums_BkV[..., -1:]
        drawn_Bk = torch.searchsorted(sums_BkV, target_Bk1, right=True)[..., 0]
        return drawn_Bk.clamp(max=sums_BkV.shape[-1] - 1)  # a product that was rounded up to the whole sum


def sample_scales(
    codes,
    hidden_of: Callable[[int, Tensor | None], Tensor],
    logits_of: Callable[[Tensor], Tensor],
    settings: NextScaleSettings,
    draws: SeededDraws,
    start_BL: Tensor | None = None,
    on_pass: Callable[[int, Tensor], None] | None = None,
    again_of: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Ids int64 [B, S] of all scales.

    Args:
        codes: the quantizer.
        hidden_of: hidden_of(k, view) runs the network on scale k, counted from 0, and keeps its keys and values. It
            gets what the scale reads, [R, k, C] (None for the first scale), and gives hidden states [R, k, W].
        logits_of: the network's linear head, [..., W] to [..., V]. It is linear, so guidance acts on what goes into
            it: one product instead of two.
        draws: of the items; it says how many there are.
        start_BL: ids of the first scales, which stay.
        on_pass: called with the number of finished passes, and the ids of all scales so far, after each one.
        again_of: as `hidden_of`, for the further passes over scale k: its keys and values are not kept. Needed where
            there are any.
    """
    batch, device = len(draws), draws.chance_BPS.device
    ids_BS = torch.zeros(batch, sum(codes.scales), dtype=torch.int64, device=device)
    num_given = 0 if start_BL is None else start_BL.shape[1]
    ids_BS[:, :num_given] = 0 if start_BL is None else start_BL
    sum_BLC = torch.zeros(batch, codes.scales[-1], codes.code_width, device=device)
    num_done = 0

    def view_of(sum_BLC: Tensor, scale: int) -> Tensor:
        view_BkC = codes.view(sum_BLC, scale)
        return view_BkC.repeat(2, 1, 1) if settings.guidance else view_BkC

    for scale, places in enumerate(split_scales(codes.scales)):
        for number in range(1 + len(settings.again) if scale else 1):
            num_done += 1
            if num_given < ids_BS.shape[1] and (number == 0 or places.start >= num_given):
                if number == 0:  # of given scales, too: finer ones look at them
                    before_BLC = sum_BLC
                    hidden_RkW = hidden_of(scale, view_of(sum_BLC, scale) if scale else None)
                else:
                    hidden_RkW = again_of(scale, view_of(sum_BLC, scale))
                if places.start >= num_given:
                    logits_BkV = logits_of(_guided(hidden_RkW, batch, settings.guidance_weight(scale)))
                    ids_BS[:, places] = draws.draw(places, logits_BkV, settings.of_pass(number), number)
                sum_BLC = codes.accumulate(before_BLC, scale, ids_BS[:, places])
            if on_pass is not None:
                on_pass(num_done, ids_BS[:, : places.stop].clone())
    return ids_BS


def _guided(hidden_RkW: Tensor, batch: int, weight: float) -> Tensor:
    if not weight:  # the first scale's, or no unconditional rows at all
        return hidden_RkW[:batch]
    conditional, unconditional = hidden_RkW.chunk(2)
    return conditional + weight * (conditional - unconditional)
