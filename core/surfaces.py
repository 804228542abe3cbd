"""Points on a mesh: drawn evenly from its surface, and spread out by farthest-point sampling.

Shape suffixes: B batch, N points, M chosen points, F triangles, 3 coordinates or corners.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidInput

if TYPE_CHECKING:
    import trimesh

MAX_POINTS = 2**24


def sample_surface(mesh: trimesh.Trimesh, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points evenly by area; the same seed gives the same points.

    Returns:
        points_N3 and the unit normals of their faces normals_N3, fp32, in the mesh's own coordinates, N = count.

    Raises:
        InvalidInput: a count outside 1 to 2**24, or a mesh whose triangles all have no area.
    """
    if not 1 <= count <= MAX_POINTS:
        raise InvalidInput(f"count must be 1 to {MAX_POINTS:,} points, not {count!r}")
    normals_F3, area_F = face_normals_and_areas(mesh.vertices, mesh.faces)
    total_F = np.cumsum(area_F)
    if not len(total_F) or not total_F[-1] > 0:
        raise InvalidInput("the mesh has no triangle with an area; there is no surface to draw points from")
    random = np.random.default_rng(seed)
    face_N = np.searchsorted(total_F, random.random(count) * total_F[-1], side="right")
    face_N = np.minimum(face_N, np.flatnonzero(area_F)[-1])  # rounding may end beyond the last one
    # Uniform in a triangle: the root makes up for its growing width (Osada et al. 2002, section 4.2).
    root_N1, along_N1 = np.sqrt(random.random((count, 1))), random.random((count, 1))
    a_N3, b_N3, c_N3 = (mesh.vertices[mesh.faces[face_N, corner]] for corner in range(3))
    points_N3 = (1 - root_N1) * a_N3 + root_N1 * (1 - along_N1) * b_N3 + root_N1 * along_N1 * c_N3
    return torch.from_numpy(points_N3).float(), torch.from_numpy(normals_F3[face_N]).float()


def face_normals_and_areas(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [F, 3] and areas [F] in units of the largest extent squared, fp64; zeros for triangles without area.

    The unit keeps the squares of very large and very small meshes within the numbers.
    """
    if not len(faces_F3):
        return np.zeros((0, 3)), np.zeros(0)
    low_3 = vertices_V3.min(axis=0)
    extent = float((vertices_V3.max(axis=0) - low_3).max()) or 1.0
    a_F3, b_F3, c_F3 = (((vertices_V3[faces_F3[:, corner]] - low_3) / extent) for corner in range(3))
    cross_F3 = np.cross(b_F3 - a_F3, c_F3 - a_F3)
    length_F = np.sqrt(np.einsum("fc,fc->f", cross_F3, cross_F3))
    return cross_F3 / np.where(length_F > 0, length_F, 1)[:, None], length_F / 2


def farthest_points(points_BN3: Tensor, count: int) -> Tensor:
    """Choose points one by one, each the farthest from those chosen before; int64 [B, M], M = count.

    Starts at index 0 of each cloud; among equally far points the lowest index wins, and no index comes twice. A cloud's
    choice does not depend on the others in the batch.

    Args:
        points_BN3: floating-point clouds of N >= count points.

    Raises:
        InvalidInput: another shape, or more points wanted than there are.
    """
    if points_BN3.ndim != 3 or points_BN3.shape[2] != 3 or not points_BN3.is_floating_point():
        raise InvalidInput(f"points must be floating-point [B, N, 3], not {points_BN3.dtype} {list(points_BN3.shape)}")
    batch, num_points = points_BN3.shape[:2]
    if not 1 <= count <= num_points:
        raise InvalidInput(f"count must be 1 to {num_points:,}, the number of points, not {count!r}")
    with torch.no_grad():
        x_BN, y_BN, z_BN = (axis.contiguous() for axis in points_BN3.detach().float().unbind(dim=2))
        chosen_BM = torch.zeros(batch, count, dtype=torch.int64, device=points_BN3.device)
        distance_BN = torch.full_like(x_BN, torch.inf)
        for step in range(1, count):
            last_B1 = chosen_BM[:, step - 1 : step]
            squares = ((axis_BN - axis_BN.gather(1, last_B1)).square_() for axis_BN in (x_BN, y_BN, z_BN))
            distance_BN = torch.minimum(distance_BN, sum(squares))
            distance_BN.scatter_(1, last_B1, -1.0)  # below every distance: never chosen again
            chosen_BM[:, step] = _first_largest(distance_BN)
        return chosen_BM


def _first_largest(values_BN: Tensor) -> Tensor:
    """As argmax(dim=1), by NumPy on the CPU: torch is far slower there."""
    if values_BN.device.type == "cpu":
        return torch.from_numpy(values_BN.numpy().argmax(axis=1))
    return values_BN.argmax(dim=1)
