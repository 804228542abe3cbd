"""A few hundred bytes for a mesh of few faces, the plain way: rounded coordinates, differences of indices, zlib.

What a tokenizer is compared with. Everything a decoder needs is counted: the frame, the numbers, the triangles.

Shape suffixes: V vertices, F faces.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from ..core.tokens import ShapeFrame

HEADER = struct.Struct("<4fHHB")  # the frame, vertices, faces, bits of a coordinate
MAX_COUNT = 2**16 - 1
RAW_DEFLATE = -15  # zlib's window without the header and the checksum


def pack_mesh(boxed, frame: ShapeFrame, bits: int) -> bytes | None:
    """A mesh in the box [-1, 1]^3 as bytes, its coordinates rounded to `bits` (1 to 16).

    None where rounding leaves no face, or where there are more than 65,535 vertices or faces.
    """
    steps = 2**bits - 1
    grid_V3 = ((np.asarray(boxed.vertices).clip(-1, 1) + 1) / 2 * steps).round().astype(np.int64)
    # Sorted by their places, so that the first coordinates differ little from one to the next.
    grid_V3, number_V = np.unique(grid_V3, axis=0, return_inverse=True)
    faces_F3 = number_V.reshape(-1)[np.asarray(boxed.faces)]
    a, b, c = faces_F3.T
    faces_F3 = faces_F3[(a != b) & (b != c) & (c != a)]
    if not len(faces_F3) or max(len(grid_V3), len(faces_F3)) > MAX_COUNT:
        return None
    used, numbers = np.unique(faces_F3, return_inverse=True)
    grid_V3, faces_F3 = grid_V3[used], numbers.reshape(-1, 3)
    # The smallest index first keeps the orientation; the others are told by their distance from it.
    turn_F3 = (faces_F3.argmin(axis=1)[:, None] + np.arange(3)) % 3
    faces_F3 = np.unique(np.take_along_axis(faces_F3, turn_F3, axis=1), axis=0)
    columns = [
        np.diff(grid_V3[:, 0], prepend=0), grid_V3[:, 1], grid_V3[:, 2],
        np.diff(faces_F3[:, 0], prepend=0), faces_F3[:, 1] - faces_F3[:, 0], faces_F3[:, 2] - faces_F3[:, 0],
    ]  # fmt: skip
    wide = [max(len(grid_V3) - 1, steps) > 255] * len(columns)
    body = b"".join(_plane(column, is_wide) for column, is_wide in zip(columns, wide, strict=True))
    packer = zlib.compressobj(9, zlib.DEFLATED, RAW_DEFLATE)
    header = HEADER.pack(frame.x, frame.y, frame.z, frame.scale, len(grid_V3), len(faces_F3), bits)
    return header + packer.compress(body) + packer.flush()


def unpack_mesh(data: bytes):
    """The mesh in the box that `pack_mesh` wrote, and its frame."""
    import trimesh

    *place, num_vertices, num_faces, bits = HEADER.unpack_from(data)
    body = zlib.decompress(data[HEADER.size :], RAW_DEFLATE)
    steps = 2**bits - 1
    size = 2 if max(num_vertices - 1, steps) > 255 else 1
    columns, start = [], 0
    for count in (num_vertices,) * 3 + (num_faces,) * 3:
        planes = np.frombuffer(body, np.uint8, size * count, start).reshape(size, count).astype(np.int64)
        columns.append(planes[0] + (planes[1] << 8 if size == 2 else 0))
        start += size * count
    vertices_V3 = np.stack([np.cumsum(columns[0]), columns[1], columns[2]], axis=1) / steps * 2 - 1
    first_F = np.cumsum(columns[3])
    faces_F3 = np.stack([first_F, first_F + columns[4], first_F + columns[5]], axis=1)
    return trimesh.Trimesh(vertices_V3, faces_F3, process=False), ShapeFrame(*place)


def _plane(column: np.ndarray, is_wide: bool) -> bytes:
    """Low bytes, then the high bytes where there are any."""
    low = column.astype(np.uint8).tobytes()
    return low + (column >> 8).astype(np.uint8).tobytes() if is_wide else low
