"""Winding numbers of triangles: how often a surface goes around a point. Exact, also for surfaces with holes.

For a closed surface it is a whole number: what a ray from the point to infinity crosses, outward counted +1 and inward
-1. An open surface M is closed by the cone C from its edges to any one apex, and w(M) = w(M + C) - w(C): the first is a
ray count again, the second a sum of the solid angles of a few triangles (Jacobson et al. 2013, section 3, define it so;
the sum there runs over all triangles).

The ray count must not depend on rounding where a ray meets an edge. Along the ray, which side of an edge a point is on
is computed from that edge and the point alone, by the same operations for both triangles that share the edge; so a
crossing is never lost or counted twice. The mesh is turned first, so that walls along the axes are not along the ray.

Shape suffixes: N points, P (point, triangle) pairs, F triangles, V vertices, E edges, H half-edges (3 a triangle),
3 coordinates or corners.
"""

from __future__ import annotations

import math

import numpy as np
import torch

MAX_CELLS = 1024  # a side of the grid of triangles
PAIRS_PER_BLOCK = 2**18
FACES_PER_BLOCK = 2**17
ANGLES_PER_BLOCK = 2**13  # their terms fit the cache: twice as fast as 2**17

# Any turn will do that no mesh is built along.
_A, _B = 0.7351, 1.1327
TURN_33 = np.array([[math.cos(_A), -math.sin(_A), 0], [math.sin(_A), math.cos(_A), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, math.cos(_B), -math.sin(_B)], [0, math.sin(_B), math.cos(_B)]]
)


def open_edges(faces_F3: np.ndarray, num_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges along which the surface ends: [E, 2] in the direction of their faces, and how often each is left over [E].

    An edge is not open if as many faces run along it one way as the other; so this is the boundary in the sense of
    topology, and none means that the surface goes around every point a whole number of times.
    """
    a_H, b_H = half_edges(faces_F3)
    low_H, high_H = np.minimum(a_H, b_H), np.maximum(a_H, b_H)
    key_E, edge_H = np.unique(low_H * num_vertices + high_H, return_inverse=True)
    surplus_E = np.bincount(edge_H, weights=np.where(a_H < b_H, 1.0, -1.0), minlength=len(key_E))
    low_E, high_E = np.divmod(key_E[surplus_E != 0], num_vertices)
    surplus_E = surplus_E[surplus_E != 0]
    edges_E2 = np.stack([np.where(surplus_E > 0, low_E, high_E), np.where(surplus_E > 0, high_E, low_E)], axis=1)
    return edges_E2, np.abs(surplus_E)


def half_edges(faces_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From which vertex to which each side of each triangle runs; half-edge h belongs to face h // 3."""
    return faces_F3.reshape(-1), np.roll(faces_F3, -1, axis=1).reshape(-1)


class Winding:
    """Prepared for asking about many points.

    Args:
        vertices_V3: fp64, finite. Faces that touch share vertices.
        faces_F3: counterclockwise from outside.
    """

    def __init__(self, vertices_V3: np.ndarray, faces_F3: np.ndarray):
        low_3, high_3 = vertices_V3.min(axis=0), vertices_V3.max(axis=0)
        self._centre_3, self._half = (low_3 + high_3) / 2, float((high_3 - low_3).max()) / 2 or 1.0
        vertices_V3 = self._placed(vertices_V3)
        edges_E2, times_E = open_edges(faces_F3, len(vertices_V3))
        self.num_open_edges = len(edges_E2)
        apex_13 = np.array([[0.0137, -0.0219, 0.0083]])  # near the middle, but in no plane of symmetry
        cone_E3 = np.column_stack([np.full(len(edges_E2), len(vertices_V3)), edges_E2[:, ::-1]])
        self._cone_angles = _SolidAngles(apex_13[0], vertices_V3[cone_E3[:, 1]], vertices_V3[cone_E3[:, 2]], times_E)
        vertices_V3 = np.concatenate([vertices_V3, apex_13])
        weight_F = np.concatenate([np.ones(len(faces_F3)), times_E])
        self._crossings = _Crossings(vertices_V3, np.concatenate([faces_F3, cone_E3]), weight_F)

    def at(self, points_N3: np.ndarray) -> np.ndarray:
        """Winding numbers, fp64 [N]."""
        points_N3 = self._placed(points_N3)
        winding_N = self._crossings.count(points_N3)
        if self.num_open_edges:
            winding_N -= self._cone_angles.sum(points_N3) / (4 * math.pi)
        return winding_N

    def _placed(self, points_N3: np.ndarray) -> np.ndarray:
        return (points_N3 - self._centre_3) / self._half @ TURN_33.T


class _Crossings:
    """Counts what rays along +z cross. The triangles lie in a grid of the (x, y) plane."""

    def __init__(self, vertices_V3: np.ndarray, faces_F3: np.ndarray, weight_F: np.ndarray):
        self._low_2 = vertices_V3[:, :2].min(axis=0)
        self._size_2 = np.maximum(vertices_V3[:, :2].max(axis=0) - self._low_2, 1e-300)
        self._table_F, low_F2, high_F2 = (np.empty((len(faces_F3), columns)) for columns in (15, 2, 2))
        for start in range(0, len(faces_F3), FACES_PER_BLOCK):
            rows = slice(start, start + FACES_PER_BLOCK)
            parts = _table_of(vertices_V3, faces_F3[rows], weight_F[rows])
            self._table_F[rows], low_F2[rows], high_F2[rows] = parts
        self._fill_grid(low_F2, high_F2)

    def _fill_grid(self, low_F2: np.ndarray, high_F2: np.ndarray) -> None:
        """Which triangles may be above a cell: those whose bounds reach into it."""
        num_faces = len(low_F2)
        self._cells = min(MAX_CELLS, 2 * math.isqrt(num_faces) + 1)
        while True:
            first_F2 = self._cell_of(low_F2)
            span_F2 = self._cell_of(high_F2) - first_F2 + 1
            covered_F = span_F2[:, 0].astype(np.int64) * span_F2[:, 1]
            if covered_F.sum() <= 16 * num_faces + 2**16 or self._cells == 1:
                break
            self._cells = -(-self._cells // 2)
        face_P = np.repeat(np.arange(num_faces, dtype=np.int32), covered_F)
        step_P = _steps(covered_F).astype(np.int32)
        row_P, column_P = np.divmod(step_P, span_F2[face_P, 0])
        cell_P = (first_F2[face_P, 1] + row_P) * self._cells + first_F2[face_P, 0] + column_P
        self._face_P = face_P[np.argsort(cell_P, kind="stable")]
        self._count_of_cell = np.bincount(cell_P, minlength=self._cells**2)
        self._start_of_cell = np.cumsum(self._count_of_cell) - self._count_of_cell

    def _cell_of(self, points_N2: np.ndarray) -> np.ndarray:
        """Column and row of a point. Monotone even with rounding, so that a triangle's cells hold all its points."""
        return np.clip((points_N2 - self._low_2) / self._size_2 * self._cells, 0, self._cells - 1).astype(np.int32)

    def count(self, points_N3: np.ndarray) -> np.ndarray:
        """Signed crossings of the ray from each point, fp64 [N]."""
        column_N, row_N = self._cell_of(points_N3[:, :2]).T
        cell_N = row_N * self._cells + column_N
        pairs_N = self._count_of_cell[cell_N]
        block_N = np.cumsum(pairs_N) // PAIRS_PER_BLOCK
        starts = np.flatnonzero(np.diff(block_N, prepend=-1)).tolist()
        total_N = np.zeros(len(points_N3))
        for start, end in zip(starts, [*starts[1:], len(points_N3)], strict=True):
            rows = slice(start, end)
            total_N[rows] = self._count_block(points_N3[rows], self._start_of_cell[cell_N[rows]], pairs_N[rows])
        return total_N

    def _count_block(self, points_N3: np.ndarray, start_N: np.ndarray, pairs_N: np.ndarray) -> np.ndarray:
        point_P = np.repeat(np.arange(len(points_N3)), pairs_N)
        face_P = self._face_P[start_N[point_P] + _steps(pairs_N)]
        x_P, y_P, z_P = points_N3[point_P].T
        table_P = self._table_F[face_P, :4]
        is_near_P = (table_P[:, 0] <= y_P) & (y_P < table_P[:, 2]) & (z_P < table_P[:, 3])
        point_P, face_P, x_P, y_P, z_P = (array[is_near_P] for array in (point_P, face_P, x_P, y_P, z_P))
        # The line y = py meets the long side and one of the two short ones; the point must be between these crossings.
        y0, y1, _, _, sign, x0, z0, x1, z1, long_x, long_z, lower_x, lower_z, upper_x, upper_z = self._table_F[face_P].T
        is_lower = y_P < y1
        from_start, from_bend = y_P - y0, y_P - np.where(is_lower, y0, y1)
        long_x, long_z = x0 + from_start * long_x, z0 + from_start * long_z
        short_x = np.where(is_lower, x0, x1) + from_bend * np.where(is_lower, lower_x, upper_x)
        short_z = np.where(is_lower, z0, z1) + from_bend * np.where(is_lower, lower_z, upper_z)
        turns = sign * ((x_P < short_x) * 1.0 - (x_P < long_x))
        is_hit = turns != 0
        point_P, turns = point_P[is_hit], turns[is_hit]
        across = (x_P[is_hit] - short_x[is_hit]) / (long_x[is_hit] - short_x[is_hit])  # they differ: x lies between
        height = short_z[is_hit] + across * (long_z[is_hit] - short_z[is_hit])
        return np.bincount(point_P, weights=turns * (height > z_P[is_hit]), minlength=len(points_N3))


def _table_of(
    vertices_V3: np.ndarray, faces_F3: np.ndarray, weight_F: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `_Crossings` reads of each triangle, [F, 15], and the bounds of the triangles in the plane, [F, 2] each.

    The corners go up, y0 <= y1 <= y2. Columns: y0, y1, y2, the largest z, the weight (negative where the corners now
    run the other way), x0, z0, x1, z1, and dx/dy and dz/dy of the sides 0-2, 0-1 and 1-2.
    """
    order_F3 = np.argsort(vertices_V3[faces_F3, 1], axis=1)
    is_same_way_F = (order_F3[:, 1] - order_F3[:, 0]) % 3 == 1
    corners_F3 = np.take_along_axis(faces_F3, order_F3, axis=1)
    (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = (vertices_V3[corners_F3[:, i]].T for i in range(3))
    sign_F = np.where(is_same_way_F, weight_F, -weight_F)
    columns = [y0, y1, y2, np.maximum(np.maximum(z0, z1), z2), sign_F, x0, z0, x1, z1]
    for rise, run_x, run_z in (
        (y2 - y0, x2 - x0, z2 - z0),
        (y1 - y0, x1 - x0, z1 - z0),
        (y2 - y1, x2 - x1, z2 - z1),
    ):
        with np.errstate(all="ignore"):  # a level side is never crossed
            columns += [np.where(rise > 0, run_x / rise, 0), np.where(rise > 0, run_z / rise, 0)]
    low_F2 = np.stack([np.minimum(np.minimum(x0, x1), x2), y0], axis=1)
    return np.stack(columns, axis=1), low_F2, np.stack([np.maximum(np.maximum(x0, x1), x2), y2], axis=1)


def _steps(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class _SolidAngles:
    """Solid angles of triangles that share one corner (Van Oosterom and Strackee 1983, equation 8).

    Each of its terms is linear in the point p or a product of such terms, so one matrix product gives them all.
    """

    def __init__(self, apex_3: np.ndarray, b_E3: np.ndarray, c_E3: np.ndarray, times_E: np.ndarray):
        a_3, b_E3, c_E3 = (torch.from_numpy(np.ascontiguousarray(x)) for x in (apex_3, b_E3, c_E3))
        self._apex_3, self._times_E = a_3, torch.from_numpy(times_E)
        # With p moved to the apex, the corners are -p, b - p and c - p.
        b_E3, c_E3 = b_E3 - a_3, c_E3 - a_3
        self._b_3E, self._c_3E = b_E3.T.contiguous(), c_E3.T.contiguous()
        self._normal_3E = torch.linalg.cross(b_E3, c_E3).T.contiguous()
        self._bb_E, self._cc_E, self._bc_E = (b_E3**2).sum(1), (c_E3**2).sum(1), (b_E3 * c_E3).sum(1)

    def sum(self, points_N3: np.ndarray) -> np.ndarray:
        """Sum over the triangles, fp64 [N]; 4 pi inside a closed surface."""
        points_N3 = torch.from_numpy(np.ascontiguousarray(points_N3)) - self._apex_3
        block = max(1, ANGLES_PER_BLOCK // max(1, len(self._times_E)))
        return torch.cat([self._sum_block(points) for points in points_N3.split(block)]).numpy()

    def _sum_block(self, p_N3: torch.Tensor) -> torch.Tensor:
        pb_NE, pc_NE = p_N3 @ self._b_3E, p_N3 @ self._c_3E
        pp_N1 = (p_N3**2).sum(dim=1, keepdim=True)
        a_length = pp_N1.sqrt()
        b_length = (pp_N1 - 2 * pb_NE + self._bb_E).clamp_(min=0).sqrt_()
        c_length = (pp_N1 - 2 * pc_NE + self._cc_E).clamp_(min=0).sqrt_()
        bottom = a_length * (b_length * c_length + pp_N1 - pb_NE - pc_NE + self._bc_E)
        bottom += (pp_N1 - pb_NE) * c_length + (pp_N1 - pc_NE) * b_length
        top = -(p_N3 @ self._normal_3E)
        return 2 * (torch.atan2(top, bottom) @ self._times_E)
