"""How MaskGIT samples: the schedules of a run, its noise, and which tokens a step is about.

Shape suffixes: B batch, N tokens of a picture, K masked tokens, C codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

DECAYS = ("constant", "linear", "power-cosine")
TINY = 1e-20  # keeps the logarithms of Gumbel noise finite


@dataclass(frozen=True)
class MaskGITSettings:
    """How to sample; `settings` of the model checks and makes it.

    guidance_decay: "constant", "linear" (from 0 in the first step to `guidance` (S - 1) / S in the last) or
    "power-cosine" (from 0 to `guidance` - 1, slowly at first; the authors count this one from 1).
    temperature: of the Gumbel noise in the first step; it falls linearly to 0 in the last.
    annealing: also divide the logits by 0.5 + 0.8 * (share of steps to come).
    """

    steps: int
    guidance: float
    guidance_decay: str
    guidance_pow: float
    temperature: float
    annealing: bool

    @property
    def total_steps(self) -> int:
        return self.steps

    def guidance_weight(self, step: int) -> float:
        """w of step 0, 1, ... in logits = c + w (c - u); the unconditional u need not be computed where it is 0."""
        progress = step / self.steps
        if self.guidance_decay == "constant":
            return self.guidance
        if self.guidance_decay == "linear":
            return self.guidance * progress
        return (self.guidance - 1) * (1 - math.cos(math.pi * progress**self.guidance_pow)) / 2

    def noise_temperature(self, step: int) -> float:
        return self.temperature * (1 - (step + 1) / self.steps)

    def logit_divisor(self, step: int) -> float:
        return 0.5 + 0.8 * (1 - (step + 1) / self.steps) if self.annealing else 1.0

    def masked_counts(self, num_free: int) -> list[int]:
        """Tokens of a picture that are masked before each step, and 0 at the end: the arccos schedule."""
        counts = [num_free]
        for step in range(self.steps - 1):
            ratio = math.acos((step + 1) / self.steps) / (math.pi / 2)
            counts.append(min(num_free, max(1, min(counts[-1] - 1, math.floor(num_free * ratio)))))
        return [*counts, 0]


class GumbelNoise:
    """Gumbel noise of a batch: each picture's from its own generator, so that the batch does not matter."""

    def __init__(self, rngs: Sequence[torch.Generator], device: torch.device):
        self.rngs, self.device = rngs, device

    def tokens(self, step: int, masked_BK: Tensor, counts: list[int], num_codes: int) -> Tensor:
        """For the draw of the tokens at `masked_BK`: fp32 [B, K, C]; only the first `counts[b]` of a row matter."""
        return self._draw(counts, masked_BK.shape[1], num_codes)

    def confidence(self, step: int, masked_BK: Tensor, counts: list[int]) -> Tensor:
        """For the choice of the tokens that are masked again: fp32 [B, K]."""
        return self._draw(counts, masked_BK.shape[1])

    def _draw(self, counts: list[int], num_masked: int, *shape: int) -> Tensor:
        noise = torch.ones(len(counts), num_masked, *shape, device=self.device)
        for row, count, rng in zip(noise, counts, self.rngs, strict=True):
            drawn = torch.empty(count, *shape, device=rng.device).exponential_(generator=rng)
            row[:count] = drawn.to(self.device, non_blocking=True)
        return noise.clamp_(min=TINY).log_().neg_()  # minus the log of an exponential number is Gumbel


class Step(NamedTuple):
    """What is known of a step before it runs; `masked_now` and `masked_next` count each picture's masked tokens."""

    number: int
    noise_scale: float
    masked_now: list[int]
    masked_next: list[int]


def plan_steps(settings: MaskGITSettings, num_free: list[int]) -> list[Step]:
    """The steps of pictures of which so many tokens are to be made."""
    counts = list(zip(*(settings.masked_counts(count) for count in num_free), strict=True))
    return [
        Step(number, settings.noise_temperature(number), list(now), list(after))
        for number, (now, after) in enumerate(pairwise(counts))
    ]


def first_places(places_BN: Tensor, counts: list[int], dummy: int) -> Tensor:
    """The first `counts[b]` places of row b, int64 [B, K] for the largest count K; the others' ends are `dummy`."""
    width = max(counts)
    counts_B = torch.tensor(counts).to(places_BN.device, non_blocking=True)
    is_beyond_BK = torch.arange(width, device=places_BN.device) >= counts_B[:, None]
    return places_BN[:, :width].masked_fill(is_beyond_BK, dummy)
