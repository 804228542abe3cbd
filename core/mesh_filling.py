"""Filling what a surface encloses, on a grid: for faces that do not agree on which side is out.

Shape suffixes: N points, V vertices, F triangles, XYZ cells of a grid, 3 coordinates or corners.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RESOLUTIONS = (128, 64, 32)  # cells along the longest side; coarser ones for huge heaps of large faces
MARGIN = 2  # empty cells on each side
MAX_SAMPLES = 2**26
SAMPLES_PER_BLOCK = 2**20


class Filling:
    """Cells of a grid that are inside, bool [X, Y, Z]; cell (0, 0, 0) begins at `low_3`."""

    def __init__(self, is_enclosed_XYZ: np.ndarray, is_inside_XYZ: np.ndarray, low_3: np.ndarray, cell: float):
        self._is_enclosed_XYZ, self._is_inside_XYZ = is_enclosed_XYZ, is_inside_XYZ
        self._low_3, self._cell = low_3, cell

    def contains(self, points_N3: np.ndarray) -> np.ndarray:
        """Whether each point is in a cell that is inside, bool [N]. The points are in the bounds of the surface."""
        cells_N3 = np.floor((points_N3 - self._low_3) / self._cell).astype(np.int64)
        return self._is_inside_XYZ[tuple(cells_N3.T)]

    def enclosed_points(self, count: int) -> np.ndarray:
        """Middles of at most `count` cells that the surface encloses and does not touch, fp64 [N, 3]."""
        cells_N3 = np.argwhere(self._is_enclosed_XYZ)
        chosen = np.unique(np.linspace(0, len(cells_N3) - 1, min(count, len(cells_N3))).astype(np.int64))
        return self._low_3 + (cells_N3[chosen] + 0.5) * self._cell


def fill(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> Filling | None:
    """Fill what no path from outside reaches, from cell to cell over their sides; None if that is nothing.

    Cells that the surface goes through count as inside if more of their neighbours are enclosed than outside. A gap
    narrower than a cell lets nothing in.
    """
    from scipy import ndimage

    low_3 = vertices_V3.min(axis=0)
    size_3 = vertices_V3.max(axis=0) - low_3
    for resolution in RESOLUTIONS:
        cell = float(size_3.max()) / resolution
        shape = tuple((np.ceil(size_3 / cell).astype(np.int64) + 1 + 2 * MARGIN).tolist())
        origin_3 = low_3 - MARGIN * cell
        parts_F = _parts_of_edges(vertices_V3, faces_F3, cell)
        if ((parts_F + 1) * (parts_F + 2) // 2).sum() <= MAX_SAMPLES:
            break
    else:
        return None
    is_surface_XYZ = np.zeros(shape, bool)
    for points_N3 in _samples(vertices_V3, faces_F3, parts_F):
        is_surface_XYZ[tuple(np.floor((points_N3 - origin_3) / cell).astype(np.int64).T)] = True
    label_XYZ, _ = ndimage.label(~is_surface_XYZ)  # cells that share a side are joined
    is_outside_XYZ = label_XYZ == label_XYZ[0, 0, 0]  # the margin is one region
    is_enclosed_XYZ = ~is_surface_XYZ & ~is_outside_XYZ
    if not is_enclosed_XYZ.any():
        return None
    balance_XYZ = is_enclosed_XYZ.astype(np.int8) - is_outside_XYZ.astype(np.int8)
    for axis in range(3):
        balance_XYZ = ndimage.correlate1d(balance_XYZ, np.ones(3), axis=axis, mode="nearest")
    return Filling(is_enclosed_XYZ, is_enclosed_XYZ | (is_surface_XYZ & (balance_XYZ > 0)), origin_3, cell)


def _parts_of_edges(vertices_V3: np.ndarray, faces_F3: np.ndarray, cell: float) -> np.ndarray:
    """Into how many parts to cut the edges of each triangle, int64 [F].

    Parts of half a cell leave no way through: where the line between two neighbouring cells' middles meets a triangle,
    a sample is within 0.5 / sqrt(3) of a cell, hence in one of the two.
    """
    corners_F33 = vertices_V3[faces_F3]
    longest_F = np.sqrt(((corners_F33 - np.roll(corners_F33, 1, axis=1)) ** 2).sum(axis=2)).max(axis=1)
    return np.maximum(np.ceil(2 * longest_F / cell), 1).astype(np.int64)


def _samples(vertices_V3: np.ndarray, faces_F3: np.ndarray, parts_F: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of points [N, 3] on a lattice of each triangle, corners and edges included."""
    for parts in np.unique(parts_F).tolist():
        i, j = (index.reshape(-1) for index in np.indices((parts + 1, parts + 1)))
        i, j = i[i + j <= parts], j[i + j <= parts]
        weights = np.stack([i, j, parts - i - j], axis=1) / parts
        corners_F33 = vertices_V3[faces_F3[parts_F == parts]]
        step = max(1, SAMPLES_PER_BLOCK // len(weights))
        for start in range(0, len(corners_F33), step):
            yield (weights @ corners_F33[start : start + step]).reshape(-1, 3)
