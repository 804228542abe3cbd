"""Inside and outside of a mesh: exact for closed surfaces, by winding numbers or by filling for others.

Meshes of the wild have faces turned inward, vertices and faces twice, holes, and sheets without thickness. `solid_of`
repairs what has one right answer, picks the way that fits the rest and says in `notes` what it did.

Shape suffixes: N points, V vertices, F triangles, XYZ cells of a grid, 3 coordinates or corners.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidInput
from .mesh_filling import Filling, fill
from .mesh_orientation import drop_repeated_faces, face_outward
from .mesh_winding import Winding, open_edges
from .meshes import merge_vertices
from .surfaces import face_normals_and_areas

if TYPE_CHECKING:
    import trimesh

WELD = 1e-6  # of the longest side: vertices this close are joined where that closes gaps
MAX_OPEN_EDGES = 20_000  # summing over more takes minutes for 100,000 points
AGREEMENT, CLEARLY_OUTSIDE = 0.8, 0.15
PROBES = 1024


class Solid:
    """What is inside a mesh; made by `solid_of`.

    method: "watertight" (exact), "winding number" (open surfaces: inside where they go more than half around) or
        "filled" (what no path from outside reaches on a grid of 128 cells, where faces do not agree on a side).
    notes: what was found and done, one short sentence each.
    """

    def __init__(self, method: str, notes: tuple[str, ...], bounds_23: np.ndarray, source: Winding | Filling):
        self.method = method
        self.notes = notes
        self._bounds_23 = bounds_23
        self._source = source

    def contains(self, points_N3: Tensor) -> Tensor:
        """Whether points, of any floating dtype in the mesh's own coordinates, are inside; bool [N] on the CPU.

        Raises:
            InvalidInput: another shape, or NaN or infinite coordinates.
        """
        if points_N3.ndim != 2 or points_N3.shape[1] != 3 or not points_N3.is_floating_point():
            raise InvalidInput(f"points must be floating-point [N, 3], not {points_N3.dtype} {list(points_N3.shape)}")
        array_N3 = points_N3.detach().cpu().double().numpy()
        if not np.isfinite(array_N3).all():
            raise InvalidInput("the points hold NaN or infinite coordinates")
        is_inside_N = np.zeros(len(array_N3), bool)
        near_N = np.flatnonzero(((array_N3 >= self._bounds_23[0]) & (array_N3 <= self._bounds_23[1])).all(axis=1))
        if len(near_N):
            is_inside_N[near_N] = _is_inside(self._source, array_N3[near_N])
        return torch.from_numpy(is_inside_N)


def solid_of(mesh: trimesh.Trimesh) -> Solid:
    """Find out what is inside a mesh.

    Closed bodies may lie in, over or beside one another: inside is what any of them holds, less the hollows.

    Raises:
        InvalidInput: no triangle with an area, or vertices that are NaN or infinite.
    """
    vertices_V3, faces_F3 = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    if not np.isfinite(vertices_V3).all() or not face_normals_and_areas(vertices_V3, faces_F3)[1].any():
        raise InvalidInput("the mesh has no triangle with an area, or vertices that are NaN or infinite")
    vertices_V3, faces_F3, notes = _joined(vertices_V3, faces_F3)
    bounds_23 = np.stack([vertices_V3.min(axis=0), vertices_V3.max(axis=0)])
    faces_F3, more = drop_repeated_faces(faces_F3, len(vertices_V3))
    notes += more
    outward_F3, more = face_outward(vertices_V3, faces_F3)
    source: Winding | Filling = Winding(vertices_V3, outward_F3)
    method = "watertight"
    if source.num_open_edges or len(outward_F3) < len(faces_F3):
        method = "winding number"
        filling = fill(vertices_V3, faces_F3)
        share = 1.0 if filling is None else _agreement(source, filling)
        if share < AGREEMENT:  # open patches may have been turned for the worse
            as_it_was = Winding(vertices_V3, faces_F3)
            if _agreement(as_it_was, filling) > share:
                source, outward_F3, more, share = as_it_was, faces_F3, [], _agreement(as_it_was, filling)
        more.append(f"open edges: {source.num_open_edges:,}")
        if share < AGREEMENT:
            source, method = filling, "filled"
            more.append("the faces do not agree on a side: what they enclose was filled")
    notes += more
    solid = Solid(method, (), bounds_23, source)
    if not _has_inside(solid, vertices_V3, outward_F3):
        notes.append("nothing is inside: the surface encloses no space")
    solid.notes = tuple(notes)
    return solid


def _is_inside(source: Winding | Filling, points_N3: np.ndarray) -> np.ndarray:
    # Of either sign: a tube that crosses itself may go around a place the other way.
    return np.abs(source.at(points_N3)) > 0.5 if isinstance(source, Winding) else source.contains(points_N3)


def _joined(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Join vertices at the same place; those that are only very close, too, if this leaves fewer edges open."""
    num_vertices, num_faces, notes = len(np.unique(faces_F3)), len(faces_F3), []
    vertices_V3, faces_F3 = merge_vertices(vertices_V3, faces_F3)
    num_open = len(open_edges(faces_F3, len(vertices_V3))[0])
    if num_open:
        low_3 = vertices_V3.min(axis=0)
        step = float((vertices_V3.max(axis=0) - low_3).max()) * WELD
        rounded_V3, welded_F3 = merge_vertices(np.rint((vertices_V3 - low_3) / step), faces_F3)
        if len(welded_F3) and len(open_edges(welded_F3, len(rounded_V3))[0]) < num_open:
            vertices_V3, faces_F3 = rounded_V3 * step + low_3, welded_F3
    if joined := num_vertices - len(vertices_V3):
        notes.append(f"vertices at the same place joined: {joined:,}")
    if dropped := num_faces - len(faces_F3):
        notes.append(f"triangles without an area dropped: {dropped:,}")
    return vertices_V3, faces_F3, notes


def _agreement(winding: Winding, filling: Filling) -> float:
    """How much of what is enclosed the surface goes around, or clearly does not, as around the air in a cupboard.

    Where it goes half around and no way leads out, its faces look both ways.
    """
    if winding.num_open_edges > MAX_OPEN_EDGES:
        return 0.0
    winding_N = np.abs(winding.at(filling.enclosed_points(PROBES)))
    return float(np.mean((winding_N > 0.5) | (winding_N < CLEARLY_OUTSIDE)))


def _has_inside(solid: Solid, vertices_V3: np.ndarray, faces_F3: np.ndarray) -> bool:
    """Whether a point just beside some face is inside."""
    if isinstance(solid._source, Filling) or not len(faces_F3):
        return isinstance(solid._source, Filling)
    faces_F3 = faces_F3[np.linspace(0, len(faces_F3) - 1, min(PROBES, len(faces_F3))).astype(np.int64)]
    normals_F3, _ = face_normals_and_areas(vertices_V3, faces_F3)
    step = 1e-4 * float(np.ptp(vertices_V3, axis=0).max())
    middle_F3 = vertices_V3[faces_F3].mean(axis=1)
    points_N3 = np.concatenate([middle_F3 + step * normals_F3, middle_F3 - step * normals_F3])
    return bool(solid.contains(torch.from_numpy(points_N3)).any())
