"""Finite scalar quantization as a layer without weights; see `kernels/fsq.py`.

Shape suffixes: D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..kernels.fsq import check_levels, codes_of, fsq


class FSQ(nn.Module):
    """Rounds each channel to one of its `levels`. Always computes in fp32."""

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        check_levels(levels)
        self.levels = tuple(levels)

    @property
    def vocab_size(self) -> int:
        return math.prod(self.levels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes fp32 [..., D] with a straight-through gradient, and ids int64 [...], of values [..., D]."""
        return fsq(z, self.levels)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes fp32 [..., D] of ids int64 [...]."""
        return codes_of(ids, self.levels)
