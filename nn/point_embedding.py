"""Points of a surface as vectors: waves of their coordinates, and their normals.

Shape suffixes: B items, N points, W width, E values of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Linear

OCTAVES = 8
EMBEDDED = 3 * (2 * OCTAVES + 1) + 3


class PointEmbedding(nn.Module):
    """Points [B, N, 3] of the box [-1, 1]^3 with unit normals to [B, N, W].

    A coordinate x becomes x and the sines and cosines of x, 2 x, .. 128 x (3DShape2VecSet, Zhang et al. 2023, arXiv
    2301.11445, section 5.1, in the form of its successors: without pi).
    """

    def __init__(self, width: int):
        super().__init__()
        self.proj = Linear(EMBEDDED, width)

    def forward(self, points_BN3: Tensor, normals_BN3: Tensor) -> Tensor:
        points_BN3 = points_BN3.float()
        octave_O = 2.0 ** torch.arange(OCTAVES, device=points_BN3.device)
        waves_BNE = (points_BN3[..., None] * octave_O).flatten(2)
        embedded_BNE = torch.cat([points_BN3, waves_BNE.sin(), waves_BNE.cos(), normals_BN3.float()], dim=2)
        return self.proj(embedded_BNE)
