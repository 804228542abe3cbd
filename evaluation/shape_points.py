"""Points at which the inside of a shape is asked for, and how well two answers agree.

Everything is in the tokenizers' box [-1, 1]^3. Shape suffixes: N points.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Near points are surface points moved by Gaussian noise of these deviations, half of them each: 0.6 % and 2.5 % of the
# box's side.
NEAR_SPREADS = (0.0125, 0.05)


def uniform_points(count: int, rng: np.random.Generator) -> Tensor:
    """Points fp32 [N, 3], uniform in the box."""
    return torch.from_numpy(rng.uniform(-1, 1, (count, 3)).astype(np.float32))


def near_points(surface_N3: Tensor, rng: np.random.Generator) -> Tensor:
    """One point fp32 [N, 3] near each point of the surface, in the box."""
    spread_N1 = np.resize(NEAR_SPREADS, len(surface_N3))[:, None]
    moved_N3 = surface_N3.numpy() + rng.normal(size=surface_N3.shape) * spread_N1
    return torch.from_numpy(moved_N3.clip(-1, 1).astype(np.float32))


def intersection_over_union(inside_N: Tensor, other_N: Tensor) -> float:
    """Of two sets of points, given as booleans; 1 where both are empty."""
    union = int((inside_N | other_N).sum())
    return int((inside_N & other_N).sum()) / union if union else 1.0
