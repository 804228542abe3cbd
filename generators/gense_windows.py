"""Long sound in windows of one length, and back by cross-fades.

Shape suffixes: N windows, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_SECONDS = 10.0
OVERLAP_SECONDS = 1.0  # of two windows at least, and the length of a cross-fade


@dataclass(frozen=True)
class WindowPlan:
    """Where the windows of a clip begin, in samples. All are of one size, so that they can go through in batches.

    A clip that fits into one window is padded with zeros at the right up to the next whole token, or where the model
    has no room for windows of 10 s, to a whole window: it was trained on no other length then. A longer clip needs no
    padding, since its windows are spread evenly from its beginning to its end.
    """

    starts: tuple[int, ...]
    size: int
    fade: int

    @classmethod
    def make(cls, num_samples: int, sample_rate: int, unit: int, largest: int) -> WindowPlan:
        """For windows of whole tokens, one every `unit` samples, and of no more than `largest` samples."""
        wanted = int(WINDOW_SECONDS * sample_rate)
        size = max(1, min(wanted, largest) // unit) * unit
        overlap = min(int(OVERLAP_SECONDS * sample_rate), size // 2)
        if num_samples <= size:
            return cls((0,), size if largest < wanted else -(-num_samples // unit) * unit, overlap)
        steps = -(-(num_samples - size) // (size - overlap))
        return cls(tuple(round(i * (num_samples - size) / steps) for i in range(steps + 1)), size, overlap)

    def windows(self, samples_S: Tensor) -> Tensor:
        """The windows of a clip, [N, S]."""
        padded_S = F.pad(samples_S, (0, max(0, self.size - len(samples_S))))
        return torch.stack([padded_S[start : start + self.size] for start in self.starts])

    def join(self, windows_NS: Tensor) -> Tensor:
        """The clip [S] of its windows: linear cross-fades in the middle of the overlaps, the windows alone elsewhere.

        The windows are made apart, but of the same sound in time with each other, so their samples mostly agree.
        """
        joined_S = F.pad(windows_NS[0], (0, self.starts[-1]))
        ramp_S = (torch.arange(self.fade) + 0.5) / self.fade
        end = self.size
        for window_S, start in zip(windows_NS[1:], self.starts[1:], strict=True):
            begin = (start + end - self.fade) // 2  # of the cross-fade
            fade = slice(begin, begin + self.fade)
            joined_S[fade] = torch.lerp(joined_S[fade], window_S[begin - start :][: self.fade], ramp_S)
            end = start + self.size
            joined_S[fade.stop : end] = window_S[fade.stop - start :]
        return joined_S
