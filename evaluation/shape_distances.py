"""How far two surfaces are from each other, from points sampled on both.

Everything is in the tokenizers' box [-1, 1]^3, whose side is 2. Shape suffixes: N points of one, M points of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..core.surfaces import sample_surface

F_THRESHOLDS = (0.01, 0.02, 0.05)  # half a percent, one and two and a half percent of the box's side


@dataclass(frozen=True)
class SurfacePoints:
    """Points fp32 [N, 3] of a surface with their normals, and the tree that finds the nearest of them."""

    points_N3: np.ndarray
    normals_N3: np.ndarray
    tree: object

    @classmethod
    def of(cls, mesh, count: int, seed: int) -> SurfacePoints:
        """`count` points of `mesh`, uniform by area."""
        points_N3, normals_N3 = sample_surface(mesh, count, seed)
        return cls.from_arrays(points_N3.numpy(), normals_N3.numpy())

    @classmethod
    def from_arrays(cls, points_N3: np.ndarray, normals_N3: np.ndarray) -> SurfacePoints:
        from scipy.spatial import cKDTree

        return cls(points_N3, normals_N3, cKDTree(points_N3))

    def nearest(self, other: SurfacePoints) -> tuple[np.ndarray, np.ndarray]:
        """For each point: the distance to, and the number of, the nearest of `other`."""
        return other.tree.query(self.points_N3)


def surface_figures(original: SurfacePoints, decoded: SurfacePoints) -> dict[str, float]:
    """Chamfer distances, F-scores and normal consistency of two surfaces.

    Chamfer L1 is half the sum of the mean distances of both directions, L2 the same of squared distances. The F-score
    is the harmonic mean of the shares of either surface's points that are within the threshold of the other. Normal
    consistency is the mean of |cos| between the normals of nearest points, of both directions.
    """
    there, back = original.nearest(decoded), decoded.nearest(original)
    figures = {
        "Chamfer L1": (there[0].mean() + back[0].mean()) / 2,
        "Chamfer L2": (np.square(there[0]).mean() + np.square(back[0]).mean()) / 2,
    }
    for threshold in F_THRESHOLDS:
        recall, precision = (float((distances <= threshold).mean()) for distances, _ in (there, back))
        both = precision + recall
        figures[f"F-score at {threshold:g}"] = 2 * precision * recall / both if both else 0.0
    cosines = [
        np.abs((near.normals_N3 * far.normals_N3[indices]).sum(axis=1)).mean()
        for near, far, (_, indices) in ((original, decoded, there), (decoded, original, back))
    ]
    return {name: float(value) for name, value in figures.items()} | {"normal consistency": float(np.mean(cosines))}


def figures_of_nothing() -> dict[str, float]:
    """What an empty mesh has for figures: no point is near it, and distances to it do not exist (NaN)."""
    figures = dict.fromkeys(("Chamfer L1", "Chamfer L2"), math.nan)
    return figures | {f"F-score at {threshold:g}": 0.0 for threshold in F_THRESHOLDS} | {"normal consistency": math.nan}


def chamfer(one: SurfacePoints, other: SurfacePoints) -> float:
    """Chamfer L1 alone."""
    return float((one.nearest(other)[0].mean() + other.nearest(one)[0].mean()) / 2)
