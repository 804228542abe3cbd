"""Cutting recordings of any length into pieces that the recogniser was trained for, at quiet places, in flat memory.

A piece lasts at most `LONGEST` seconds. It ends at the quietest moment of its second half: measured on the energy of
`PAUSE` seconds, so that it is a pause between words rather than inside one. Pieces in which nothing is louder than
`SILENT_DB` are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 20.0  # seconds: what the released models were trained with
SHORTEST = 0.025  # one window of the frontend
HOP = 0.01
PAUSE = 0.2
SILENT_DB = -60.0  # of a HOP's mean power against full scale
BLOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Segment:
    """Samples [N] that begin `start` seconds into clip number `clip`."""

    clip: int
    start: float
    samples: Tensor


def segments(blocks_N: Iterable[Tensor], sample_rate: int, clip: int = 0) -> Iterator[Segment]:
    """Pieces with sound in them, in order; no more than one of them and a block of the clip are held."""
    longest, start = round(LONGEST * sample_rate), 0
    held_N = torch.zeros(0)
    for block_N in blocks_N:
        held_N = torch.cat([held_N, block_N])
        while len(held_N) > longest:
            cut = quietest(held_N[:longest], sample_rate)
            if is_audible(held_N[:cut], sample_rate):
                yield Segment(clip, start / sample_rate, held_N[:cut].clone())
            held_N, start = held_N[cut:], start + cut
    if is_audible(held_N, sample_rate):
        yield Segment(clip, start / sample_rate, held_N)


def powers(samples_N: Tensor, sample_rate: int) -> Tensor:
    """Mean power of each HOP; what is left over at the end counts as one."""
    hop = max(1, round(HOP * sample_rate))
    return F.avg_pool1d(samples_N.square()[None, None], hop, ceil_mode=True)[0, 0]


def quietest(samples_N: Tensor, sample_rate: int) -> int:
    """The sample in the second half around which PAUSE seconds have the least energy; the latest among equals."""
    hop = max(1, round(HOP * sample_rate))
    power_T = powers(samples_N, sample_rate)
    size = max(1, round(PAUSE / HOP))
    first = len(power_T) // 2
    around_T = F.avg_pool1d(power_T[None, None, first:].double(), size, stride=1)[0, 0]
    best = int(torch.where(around_T == around_T.min())[0][-1])
    return min((first + best + size // 2) * hop, len(samples_N))


def is_audible(samples_N: Tensor, sample_rate: int) -> bool:
    """Whether there is a moment of speech's length, and one that is louder than SILENT_DB."""
    if len(samples_N) < SHORTEST * sample_rate:
        return False
    return float(powers(samples_N, sample_rate).max()) > 10 ** (SILENT_DB / 10)
