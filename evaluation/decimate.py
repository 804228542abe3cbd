"""Meshes with fewer faces, by edge collapses that keep the planes of the faces (Garland & Heckbert 1997).

Meshes of many faces are thinned first: vertices in one cell of a grid become one, where the planes of their faces meet
best (Lindstrom 2000). Nothing here asks for a manifold; pieces may close, and thin ones vanish.

Shape suffixes: V vertices, F faces, C cells.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from ..core.surfaces import face_normals_and_areas

COLLAPSED_FACES = 3000  # more are thinned on a grid first: collapsing is plain Python
GRIDS = (64, 48, 32, 24, 16)  # cells along the longest side, tried in turn
PULL = 1e-5  # towards the middle of what is merged, relative to the planes
BORDER_WEIGHT = 4.0  # of planes that hold the edges of open surfaces
Quadric = tuple[float, ...]  # xx xy xz yy yz zz of sum n n^T, x y z of sum d n, sum d^2; planes are n . p + d = 0


def simplify(mesh, face_counts: Sequence[int]) -> list:
    """Meshes of at most each of `face_counts` faces, from the most faces on; fewer where a step removes several."""
    vertices_V3, faces_F3 = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
    for grid in GRIDS:
        if len(faces_F3) <= COLLAPSED_FACES:
            break
        vertices_V3, faces_F3 = cluster_vertices(np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces), grid)
    collapse = _Collapse(vertices_V3, faces_F3)
    return [collapse.down_to(count) for count in sorted(face_counts, reverse=True)]


def cluster_vertices(vertices_V3: np.ndarray, faces_F3: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """One vertex for each cell of a grid of `grid` cells along the longest side; faces that collapse are dropped."""
    low, high = vertices_V3.min(axis=0), vertices_V3.max(axis=0)
    size = float((high - low).max()) / grid
    cells_V3 = ((vertices_V3 - low) / size).astype(np.int64).clip(0, grid - 1)
    cells_C3, cell_V = np.unique(cells_V3, axis=0, return_inverse=True)
    cell_V = cell_V.reshape(-1)
    count_C1 = np.bincount(cell_V)[:, None]
    mean_C3 = np.stack([np.bincount(cell_V, vertices_V3[:, axis]) for axis in range(3)], axis=1) / count_C1
    normals_F3, area_F = face_normals_and_areas(vertices_V3, faces_F3)
    corner_F3 = vertices_V3[faces_F3[:, 0]]
    matrix_C33, right_C3 = np.zeros((len(cells_C3), 3, 3)), np.zeros((len(cells_C3), 3))
    planes_F33 = area_F[:, None, None] * normals_F3[:, :, None] * normals_F3[:, None, :]
    for corner in range(3):
        cell_F = cell_V[faces_F3[:, corner]]
        # Distances are counted from the cell's middle: its vertex is then found to full precision.
        offset_F3 = corner_F3 - mean_C3[cell_F]
        np.add.at(matrix_C33, cell_F, planes_F33)
        np.add.at(right_C3, cell_F, np.einsum("fij,fj->fi", planes_F33, offset_F3))
    pull_C = PULL * np.trace(matrix_C33, axis1=1, axis2=2) + 1e-12
    step_C3 = np.linalg.solve(matrix_C33 + pull_C[:, None, None] * np.eye(3), right_C3[:, :, None])[:, :, 0]
    merged = cell_V[faces_F3]
    a, b, c = merged.T
    merged = merged[(a != b) & (b != c) & (c != a)]
    _, first = np.unique(np.sort(merged, axis=1), axis=0, return_index=True)
    return mean_C3 + step_C3.clip(-size, size), merged[np.sort(first)]


class _Collapse:
    """A mesh whose cheapest edges are collapsed one after another."""

    def __init__(self, vertices_V3: np.ndarray, faces_F3: np.ndarray):
        self.places: list[tuple[float, ...]] = list(map(tuple, vertices_V3.tolist()))
        self.faces: dict[int, tuple[int, ...]] = dict(enumerate(map(tuple, faces_F3.tolist())))
        self.faces_of: list[set[int]] = [set() for _ in self.places]
        for number, face in self.faces.items():
            for vertex in face:
                self.faces_of[vertex].add(number)
        self.quadrics = _quadrics(vertices_V3, faces_F3)
        self.stamps = [0] * len(self.places)  # counts the changes of a vertex: older entries of the heap are void
        self.heap: list[tuple] = []
        for a, b in {tuple(sorted(edge)) for face in self.faces.values() for edge in _edges(face)}:
            self._offer(a, b)

    def down_to(self, num_faces: int):
        """Collapse until at most `num_faces` are left; the mesh as it is then."""
        while len(self.faces) > num_faces and self.heap:
            _, a, b, stamp_a, stamp_b, place = heapq.heappop(self.heap)
            if (self.stamps[a], self.stamps[b]) == (stamp_a, stamp_b) and not self._flips(a, b, place):
                self._merge(a, b, place)
        return self._mesh()

    def _offer(self, a: int, b: int) -> None:
        quadric = tuple(x + y for x, y in zip(self.quadrics[a], self.quadrics[b], strict=True))
        place, cost = _best_place(quadric, self.places[a], self.places[b])
        heapq.heappush(self.heap, (cost, a, b, self.stamps[a], self.stamps[b], place))

    def _flips(self, a: int, b: int, place: tuple[float, ...]) -> bool:
        """Whether a face that stays would turn over."""
        for number in self.faces_of[a] ^ self.faces_of[b]:
            before = [self.places[vertex] for vertex in self.faces[number]]
            after = [place if vertex in (a, b) else self.places[vertex] for vertex in self.faces[number]]
            if _dot(_cross(before), _cross(after)) < 0:
                return True
        return False

    def _merge(self, a: int, b: int, place: tuple[float, ...]) -> None:
        """Vertex `b` becomes `a`, which moves to `place`."""
        for number in self.faces_of[a] & self.faces_of[b]:
            for vertex in self.faces.pop(number):
                self.faces_of[vertex].discard(number)
        for number in self.faces_of[b]:
            self.faces[number] = tuple(a if vertex == b else vertex for vertex in self.faces[number])
        self.faces_of[a] |= self.faces_of[b]
        self.faces_of[b] = set()
        self.quadrics[a] = tuple(x + y for x, y in zip(self.quadrics[a], self.quadrics[b], strict=True))
        self.places[a] = place
        self.stamps[a] += 1
        self.stamps[b] = -1
        for neighbour in {vertex for number in self.faces_of[a] for vertex in self.faces[number]} - {a}:
            self._offer(a, neighbour)

    def _mesh(self):
        import trimesh

        faces_F3 = np.array(list(self.faces.values()), dtype=np.int64).reshape(-1, 3)
        used, numbers = np.unique(faces_F3, return_inverse=True)
        vertices_V3 = np.array([self.places[vertex] for vertex in used]).reshape(-1, 3)
        return trimesh.Trimesh(vertices_V3, numbers.reshape(-1, 3), process=False)


def _quadrics(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> list[Quadric]:
    """The planes of each vertex's faces, weighted by area, and of the open edges that it ends."""
    normals_F3, area_F = face_normals_and_areas(vertices_V3, faces_F3)
    edges = np.concatenate([faces_F3[:, [0, 1]], faces_F3[:, [1, 2]], faces_F3[:, [2, 0]]])
    _, index, counts = np.unique(np.sort(edges, axis=1), axis=0, return_inverse=True, return_counts=True)
    is_open = counts[index.reshape(-1)] == 1
    ends_E2, face_E = edges[is_open], np.tile(np.arange(len(faces_F3)), 3)[is_open]
    along_E3 = vertices_V3[ends_E2[:, 1]] - vertices_V3[ends_E2[:, 0]]
    across_E3 = np.cross(along_E3, normals_F3[face_E])
    across_E3 /= np.linalg.norm(across_E3, axis=1, keepdims=True).clip(1e-30)
    table = np.zeros((len(vertices_V3), 10))
    for corner in range(3):
        planes = _planes(normals_F3, vertices_V3[faces_F3[:, 0]]) * area_F[:, None]
        np.add.at(table, faces_F3[:, corner], planes)
    for end in range(2):
        planes = _planes(across_E3, vertices_V3[ends_E2[:, 0]]) * BORDER_WEIGHT * area_F[face_E][:, None]
        np.add.at(table, ends_E2[:, end], planes)
    return list(map(tuple, table.tolist()))


def _planes(normals_F3: np.ndarray, through_F3: np.ndarray) -> np.ndarray:
    """The quadrics [F, 10] of planes."""
    x, y, z = normals_F3.T
    d = -(normals_F3 * through_F3).sum(axis=1)
    return np.stack([x * x, x * y, x * z, y * y, y * z, z * z, x * d, y * d, z * d, d * d], axis=1)


def _best_place(q: Quadric, a: tuple[float, ...], b: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    """Where the planes of `q` are nearest, and the cost there; at the edge's middle as far as they do not say."""
    middle = tuple((x + y) / 2 for x, y in zip(a, b, strict=True))
    xx, xy, xz, yy, yz, zz, x, y, z, _ = q
    pull = PULL * (xx + yy + zz) + 1e-12
    xx, yy, zz = xx + pull, yy + pull, zz + pull
    rx, ry, rz = (pull * m - d for m, d in zip(middle, (x, y, z), strict=True))
    cx, cy, cz = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy  # cofactors of the first row
    determinant = xx * cx + xy * cy + xz * cz
    if determinant <= 1e-300:
        return middle, _cost(q, middle)
    place = (
        (rx * cx + ry * cy + rz * cz) / determinant,
        (rx * cy + ry * (xx * zz - xz * xz) + rz * (xy * xz - xx * yz)) / determinant,
        (rx * cz + ry * (xy * xz - xx * yz) + rz * (xx * yy - xy * xy)) / determinant,
    )
    return place, _cost(q, place)


def _cost(q: Quadric, p: tuple[float, ...]) -> float:
    xx, xy, xz, yy, yz, zz, dx, dy, dz, dd = q
    x, y, z = p
    square = xx * x * x + yy * y * y + zz * z * z + 2 * (xy * x * y + xz * x * z + yz * y * z)
    return max(square + 2 * (dx * x + dy * y + dz * z) + dd, 0.0)


def _edges(face: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    a, b, c = face
    return (a, b), (b, c), (c, a)


def _cross(corners: list[tuple[float, ...]]) -> tuple[float, float, float]:
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = corners
    ux, uy, uz, vx, vy, vz = bx - ax, by - ay, bz - az, cx - ax, cy - ay, cz - az
    return uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx


def _dot(u: tuple[float, ...], v: tuple[float, ...]) -> float:
    return sum(x * y for x, y in zip(u, v, strict=True))
