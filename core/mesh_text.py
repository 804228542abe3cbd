"""Meshes written as text: OBJ, OFF and ASCII STL. Only the geometry is read; materials and other files never are.

Lines are taken a block at a time, so that the words of a large file never stand in memory all at once.

Shape suffixes: V vertices, F triangles, P polygons, C corners of polygons, 3 coordinates or corners.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from .errors import InvalidInput
from .mesh_header import MAX_FACES, MAX_VERTICES, OBJ_VERTEX, OFF_HEADER, check_counts, fan

BLOCK_BYTES = 2**21
MAX_LINE = 2**20  # bytes; a polygon of more than 100,000 corners
OBJ_POINT = re.compile(rb"^[ \t]*v[ \t]+(\S+[ \t]+\S+[ \t]+\S+)", re.MULTILINE)
OBJ_FACE = re.compile(rb"^[ \t]*f[ \t]+([^\n#]*)", re.MULTILINE)
STL_POINT = re.compile(rb"\bvertex\s+(\S+\s+\S+\s+\S+)", re.IGNORECASE)
STL_VERTEX = re.compile(rb"\bvertex\s", re.IGNORECASE)
STL_FACET = re.compile(rb"\bendfacet\b", re.IGNORECASE)


def read_obj(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices fp64 [V, 3] and triangles int64 [F, 3] of an OBJ file; all its objects and groups together."""
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    data = re.sub(rb"\\\r?\n", b" ", data) if b"\\" in data else data
    vertices = _count(OBJ_VERTEX, data, MAX_VERTICES)
    check_counts(vertices, _count(OBJ_FACE, data, MAX_FACES), where)
    points_V3 = _points(OBJ_POINT, data, vertices, where)
    corners, counts = [], []
    for lines in _blocks((match[1] for match in OBJ_FACE.finditer(data)), where):
        polygons = [re.sub(rb"/\S*", b"", line).split() for line in lines]  # "3/7/2": vertex, texture, normal
        counts.append(np.fromiter(map(len, polygons), np.int64))
        corners.append(numbers((word for polygon in polygons for word in polygon), int, where))
    corners_C, counts_P = _joined(corners), _joined(counts)
    if (corners_C == 0).any():
        raise InvalidInput(f"{where} has a face of vertex 0; an OBJ file counts from 1")
    if (corners_C < 0).any():  # counted back from the last vertex above the face
        position_V = np.fromiter((match.start() for match in OBJ_POINT.finditer(data)), np.int64)
        position_P = np.fromiter((match.start() for match in OBJ_FACE.finditer(data)), np.int64)
        above_C = np.repeat(np.searchsorted(position_V, position_P), counts_P)
        corners_C = np.where(corners_C < 0, np.maximum(above_C + corners_C, -1) + 1, corners_C)
    return points_V3, fan(corners_C - 1, counts_P, where)


def read_ascii_stl(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices fp64 [3 F, 3] and triangles int64 [F, 3] of an ASCII STL file; all its solids together."""
    faces = _count(STL_FACET, data, MAX_FACES)
    check_counts(0, faces, where)
    vertices = _count(STL_VERTEX, data, 3 * MAX_FACES)
    if vertices != 3 * faces:
        raise InvalidInput(f"{where} has {vertices:,} vertices for {faces:,} whole facets: it is damaged or truncated")
    return _points(STL_POINT, data, vertices, where), np.arange(vertices).reshape(-1, 3)


def read_off(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices fp64 [V, 3] and triangles int64 [F, 3] of an OFF file, with or without normals or colours."""
    header = OFF_HEADER.match(data)
    if header[1] not in (b"OFF", b"COFF", b"NOFF", b"CNOFF") or header[0].endswith(b"BINARY"):
        raise InvalidInput(
            f"{where} is an OFF file of another kind, {header[0].split()[-1].decode()!r}; save it as PLY"
        )
    data = data[header.end() :]
    data = re.sub(rb"#[^\n]*", b"", data) if b"#" in data else data
    lines = (match[0] for match in re.finditer(rb"[^\s][^\n]*", data))
    first = next(lines, b"").split()
    if len(first) < 2:
        raise InvalidInput(f"{where} is an OFF file without its counts of vertices and faces")
    num_vertices, num_faces = (int(count) for count in numbers(first[:2], int, where))
    check_declared(num_vertices, num_faces, 6 * num_vertices + 2 * num_faces - 1, len(data), where)
    points_V3 = table(islice(lines, num_vertices), num_vertices, [0, 1, 2], where)
    return points_V3, polygons_of(islice(lines, num_faces), num_faces, 0, where)


def check_declared(vertices: int, faces: int, least_bytes: int, has_bytes: int, where: str) -> None:
    """Refuse a header that is beyond the limits or declares more than the file can hold.

    Raises:
        LimitExceeded, InvalidInput: see above.
    """
    if vertices < 0 or faces < 0:
        raise InvalidInput(f"{where} declares {vertices:,} vertices and {faces:,} faces; its header is damaged")
    check_counts(vertices, faces, where)
    if least_bytes > has_bytes:
        raise InvalidInput(
            f"{where} declares {vertices:,} vertices and {faces:,} faces, which take {least_bytes:,} bytes or more, "
            f"but has {has_bytes:,}: it is truncated or its header is wrong"
        )


def table(lines: Iterator[bytes], count: int, columns: list[int], where: str) -> np.ndarray:
    """The given columns of `count` lines of numbers, fp64."""
    blocks = [np.zeros((0, len(columns)))]
    try:
        for block in _blocks(lines, where):
            words = (row[column] for row in map(bytes.split, block) for column in columns)
            blocks.append(numbers(words, float, where).reshape(-1, len(columns)))
    except IndexError as error:
        raise InvalidInput(f"{where} has a vertex with fewer numbers than it should have") from error
    rows = _joined(blocks)
    if len(rows) != count:
        raise InvalidInput(f"{where} declares {count:,} vertices but has {len(rows):,}: it is truncated")
    return rows


def polygons_of(lines: Iterator[bytes], count: int, before: int, where: str) -> np.ndarray:
    """Triangles int64 [F, 3] of `count` lines "n i1 ... in", with `before` other numbers ahead and any behind."""
    corners, counts = [], []
    for block in _blocks(lines, where):
        rows = [line.split()[before:] for line in block]
        counts_P = numbers((row[0] if row else b"?" for row in rows), int, where)
        lengths_P = np.fromiter(map(len, rows), np.int64)
        if (counts_P < 0).any() or (counts_P >= lengths_P).any():
            raise InvalidInput(f"{where} has a face with fewer corners than it says")
        sizes = counts_P.tolist()
        corners.append(numbers((w for row, n in zip(rows, sizes, strict=True) for w in row[1 : n + 1]), int, where))
        counts.append(counts_P)
    corners_C, counts_P = _joined(corners), _joined(counts)
    if len(counts_P) != count:
        raise InvalidInput(f"{where} declares {count:,} faces but has {len(counts_P):,}: it is truncated")
    return fan(corners_C, counts_P, where)


def numbers(words: Iterable[bytes], number: Callable[[bytes], float], where: str) -> np.ndarray:
    """The words as an array: fp64 with `number` float, int64 with int."""
    try:
        return np.fromiter(map(number, words), np.float64 if number is float else np.int64)
    except (ValueError, OverflowError) as error:
        kind = "a number" if number is float else "a whole number"
        raise InvalidInput(f"{where} is damaged: it has a word where {kind} should be ({str(error)[:80]})") from error


def _points(pattern: re.Pattern, data: bytes, count: int, where: str) -> np.ndarray:
    """Three numbers of each match, fp64 [count, 3]."""
    blocks = [np.zeros((0, 3))]
    for block in _blocks((match[1] for match in pattern.finditer(data)), where):
        blocks.append(numbers(b" ".join(block).split(), float, where).reshape(-1, 3))
    points_V3 = np.concatenate(blocks)
    if len(points_V3) != count:
        raise InvalidInput(f"{where} has a vertex with fewer than 3 coordinates")
    return points_V3


def _count(pattern: re.Pattern, data: bytes, limit: int) -> int:
    """How often the pattern is there; counting ends above the limit."""
    return sum(1 for _ in islice(pattern.finditer(data), limit + 1))


def _blocks(lines: Iterable[bytes], where: str) -> Iterator[list[bytes]]:
    block, size = [], 0
    for line in lines:
        if len(line) > MAX_LINE:
            raise InvalidInput(f"{where} has a line of {len(line):,} bytes; at most {MAX_LINE:,} are read")
        block.append(line)
        size += len(line) + 16
        if size > BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
