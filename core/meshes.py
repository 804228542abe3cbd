"""Meshes in and out: safe reading of geometry alone, the box of the tokenizers, writing.

Files are read by our own short readers and not by trimesh's: those open materials and pictures, take no PLY file of
triangles and quads mixed, and need the checks ahead of them anyhow. A mesh is a `trimesh.Trimesh` from then on.

Shape suffixes: V vertices, F triangles, 3 coordinates or corners.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import InvalidInput, LimitExceeded
from .files import atomic_write, read_limited, shown
from .mesh_glb import read_glb
from .mesh_header import MAX_MESH_BYTES, STL_FACE, STL_HEADER, check_counts, declared_stl_faces, kind_of
from .mesh_ply import read_ply
from .mesh_text import read_ascii_stl, read_obj, read_off
from .surfaces import face_normals_and_areas
from .tokens import ShapeFrame

if TYPE_CHECKING:
    import trimesh

MESH_SUFFIXES = (".obj", ".stl", ".ply", ".off", ".glb")
WRITABLE_SUFFIXES = (".glb", ".obj", ".stl", ".ply")
BOX_FILL = 0.95  # of the box [-1, 1]^3 is taken by the longest side of a mesh
MAX_COORDINATE = 1e18  # what is computed from coordinates in fp32 stays finite: their squares do
MIN_EXTENT = 1e-18
FACES_PER_BLOCK = 2**18


def read_mesh(source: str | Path | bytes | trimesh.Trimesh | tuple) -> trimesh.Trimesh:
    """Return the triangles of a mesh: vertices fp64 [V, 3], faces int64 [F, 3], nothing else.

    Args:
        source: a path or the bytes of an OBJ, STL, PLY, OFF or GLB file; a `trimesh.Trimesh`; or the two arrays
            (vertices [V, 3], faces [F, 3]). All objects of a file become one mesh.

    Polygons are cut into triangles. Vertices at the same place become one, those that no face uses and triangles with
    two equal corners are dropped. Normals, colours and textures are not read, and no other file is ever opened.

    Raises:
        InvalidInput: missing, damaged or truncated files, archives and other formats, references to other files,
            vertices that are NaN or infinite, faces of vertices that are not there, no triangle with an area.
        LimitExceeded: more than `MAX_MESH_BYTES`, `MAX_FACES` or `MAX_VERTICES`; refused from the header where there
            is one.
    """
    if isinstance(source, (str, Path)):
        where = shown(source)
        return _read_bytes(read_limited(source, MAX_MESH_BYTES), Path(source).suffix.lower(), where)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) > MAX_MESH_BYTES:
            raise LimitExceeded(f"the mesh has {len(source):,} bytes; the limit is {MAX_MESH_BYTES:,}")
        return _read_bytes(bytes(source), "", "the mesh")
    if hasattr(source, "vertices") and hasattr(source, "faces"):
        return _sound_mesh(source.vertices, source.faces, "the mesh")
    if isinstance(source, (tuple, list)) and len(source) == 2:
        return _sound_mesh(*source, "the mesh")
    raise InvalidInput(
        f"a mesh is a path, the bytes of a file, a trimesh.Trimesh or (vertices, faces), not {type(source).__name__}"
    )


def write_mesh(mesh: trimesh.Trimesh, path: str | Path) -> None:
    """Write a mesh as .glb, .obj, .stl or .ply, by the suffix; coordinates are rounded to fp32 in all of them.

    Raises:
        InvalidInput: another suffix, a mesh without faces, or coordinates beyond fp32.
        MediatokError: the file cannot be written; what was there stays.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITABLE_SUFFIXES:
        raise InvalidInput(f"{shown(path)} does not end with {', '.join(WRITABLE_SUFFIXES[:-1])} or .ply")
    if not len(mesh.faces):
        raise InvalidInput("the mesh has no faces; there is nothing to write")
    with np.errstate(over="ignore"):
        vertices_V3 = np.asarray(mesh.vertices, np.float32)
    if not np.isfinite(vertices_V3).all():
        raise InvalidInput("the mesh has coordinates that are NaN, infinite or beyond fp32; scale it first")
    if suffix == ".obj":
        data = _obj_text(vertices_V3, np.asarray(mesh.faces))
    else:
        data = _trimesh(vertices_V3, np.asarray(mesh.faces)).export(file_type=suffix[1:])
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def normalise(mesh: trimesh.Trimesh) -> tuple[trimesh.Trimesh, ShapeFrame]:
    """Move and scale a mesh into the box [-1, 1]^3: centre of its bounds to 0, longest side to 2 * 0.95.

    Returns:
        The mesh in the box, and the frame that leads back (`restore`). A frame has fp32 numbers; the mesh is placed by
        the rounded ones, so that nothing is lost between them.

    Raises:
        InvalidInput: no faces, or so far from the origin that fp32 cannot hold its place.
    """
    if not len(mesh.faces):
        raise InvalidInput("the mesh has no faces; there is nothing to put into the box")
    low_3, high_3 = np.asarray(mesh.bounds, np.float64)
    centre_3 = ((low_3 + high_3) / 2).astype(np.float32).astype(np.float64)
    half = float((high_3 - low_3).max() / 2)
    reach = float(np.maximum(high_3 - centre_3, centre_3 - low_3).max())  # half and what rounding the centre adds
    if reach > 1.5 * half:
        raise InvalidInput(
            f"the mesh is {2 * half:g} long but lies {np.abs(centre_3).max():g} from the origin, too far for fp32; "
            "move it to the origin first"
        )
    scale = np.nextafter(np.float32(reach / BOX_FILL), np.float32(math.inf))  # up, so that it fits
    frame = ShapeFrame(*centre_3.tolist(), float(scale))
    return _trimesh((mesh.vertices - centre_3) / frame.scale, mesh.faces), frame


def restore(mesh: trimesh.Trimesh, frame: ShapeFrame) -> trimesh.Trimesh:
    """The mesh of the box at its own place and scale."""
    return _trimesh(np.asarray(mesh.vertices) * frame.scale + (frame.x, frame.y, frame.z), mesh.faces)


def _read_bytes(data: bytes, suffix: str, where: str) -> trimesh.Trimesh:
    if not data:
        raise InvalidInput(f"{where} is empty (0 bytes)")
    kind = kind_of(data, suffix, where)
    if kind == "binary STL":
        return _sound_mesh(*_read_binary_stl(data, where), where)
    reader = {"GLB": read_glb, "PLY": read_ply, "OFF": read_off, "OBJ": read_obj, "STL": read_ascii_stl}[kind]
    return _sound_mesh(*reader(data, where), where)


def _read_binary_stl(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices fp64 [3 F, 3] and triangles int64 [F, 3]; `kind_of` has seen that all faces are there."""
    num_faces = declared_stl_faces(data)
    check_counts(0, num_faces, where)
    row = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("spare", "<u2")])
    assert row.itemsize == STL_FACE
    corners_F33 = np.frombuffer(data, row, num_faces, STL_HEADER)["corners"]
    return corners_F33.reshape(-1, 3).astype(np.float64), np.arange(3 * num_faces).reshape(-1, 3)


def _sound_mesh(vertices: object, faces: object, where: str) -> trimesh.Trimesh:
    """Check arrays of any origin and drop what is superfluous."""
    try:
        vertices_V3, faces_F3 = np.asarray(vertices, np.float64), np.asarray(faces)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{where} has vertices or faces that are no arrays of numbers") from error
    if vertices_V3.ndim != 2 or vertices_V3.shape[1] != 3:
        raise InvalidInput(f"{where} has vertices of shape {list(vertices_V3.shape)}; [V, 3] is needed")
    if not faces_F3.size:
        raise InvalidInput(f"{where} has no faces; a cloud of points is not read")
    if faces_F3.ndim != 2 or faces_F3.shape[1] != 3 or faces_F3.dtype.kind not in "iu":
        raise InvalidInput(
            f"{where} has faces of {faces_F3.dtype} {list(faces_F3.shape)}; whole numbers [F, 3] are needed"
        )
    check_counts(0, len(faces_F3), where)
    lowest, highest = int(faces_F3.min()), int(faces_F3.max())
    if lowest < 0 or highest >= len(vertices_V3):
        wrong = lowest if lowest < 0 else highest
        raise InvalidInput(f"{where} has a face of vertex number {wrong:,}; there are {len(vertices_V3):,} from 0 on")
    vertices_V3, faces_F3 = _compact(vertices_V3, faces_F3.astype(np.int64, copy=False))
    if not np.isfinite(vertices_V3).all():
        raise InvalidInput(f"{where} has vertices that are NaN or infinite")
    if max(-vertices_V3.min(), vertices_V3.max()) > MAX_COORDINATE:
        raise InvalidInput(f"{where} has coordinates beyond {MAX_COORDINATE:g}; scale it first")
    vertices_V3, faces_F3 = merge_vertices(vertices_V3, faces_F3)
    check_counts(len(vertices_V3), len(faces_F3), where)
    if len(vertices_V3) and np.ptp(vertices_V3, axis=0).max() < MIN_EXTENT:
        raise InvalidInput(f"{where} is smaller than {MIN_EXTENT:g} on every side, or a single point; scale it first")
    blocks = (faces_F3[start : start + FACES_PER_BLOCK] for start in range(0, len(faces_F3), FACES_PER_BLOCK))
    if not any(face_normals_and_areas(vertices_V3, block_F3)[1].any() for block_F3 in blocks):
        raise InvalidInput(f"{where} has no triangle with an area")
    return _trimesh(vertices_V3, faces_F3)


def merge_vertices(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make one vertex of those at the same place; drop triangles with two equal corners and vertices without a face.

    The order of what stays is kept. Vertices are finite.
    """
    vertices_V3 = vertices_V3 + 0.0  # -0 is the same place as 0
    order_V = np.lexsort(vertices_V3.T)
    is_new_V = np.zeros(len(order_V), bool)
    is_new_V[:1] = True
    for axis_V in vertices_V3.T:
        is_new_V[1:] |= np.diff(axis_V[order_V]) != 0
    if not is_new_V.all():
        # The sort is stable, so that the first of equal vertices is the one that comes first.
        first_V = np.empty(len(order_V), np.int64)
        first_V[order_V] = order_V[np.flatnonzero(is_new_V)[np.cumsum(is_new_V) - 1]]
        faces_F3 = first_V[faces_F3]
    a_F, b_F, c_F = faces_F3.T
    return _compact(vertices_V3, faces_F3[(a_F != b_F) & (b_F != c_F) & (c_F != a_F)])


def _compact(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the vertices that no face uses."""
    is_used_V = np.zeros(len(vertices_V3), bool)
    is_used_V[faces_F3] = True
    if is_used_V.all():
        return vertices_V3, faces_F3
    return vertices_V3[is_used_V], (np.cumsum(is_used_V) - 1)[faces_F3]


def _trimesh(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> trimesh.Trimesh:
    import trimesh

    return trimesh.Trimesh(vertices_V3, faces_F3, process=False)


def _obj_text(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> bytes:
    """9 digits tell all fp32 numbers apart."""
    lines = [f"v {x:.9g} {y:.9g} {z:.9g}\n" for x, y, z in vertices_V3.tolist()]
    lines += [f"f {a} {b} {c}\n" for a, b, c in (faces_F3 + 1).tolist()]
    return "".join(lines).encode()
