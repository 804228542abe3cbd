"""PLY files, as text and in both byte orders, with triangles and polygons mixed; what they carry beside is skipped.

Shape suffixes: V vertices, F triangles, P polygons, C corners of polygons, N bytes of a list, 3 coordinates or corners.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from .errors import InvalidInput
from .mesh_header import MAX_FACES, check_counts, fan
from .mesh_text import check_declared, polygons_of, table

MAX_HEADER = 2**16
MAX_PROPERTIES = 256
MAX_CORNERS = 2**17  # of one polygon
BLOCK_ROWS = 2**12
NUMBERS = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
NUMBERS |= {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
NUMBERS |= {"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"}
CORNERS = ("vertex_indices", "vertex_index")


@dataclass
class Element:
    """One kind of rows of the file. properties: name -> (type of the list's length or None, type of the numbers)."""

    name: str
    count: int
    properties: dict[str, tuple[str | None, str]] = field(default_factory=dict)

    @property
    def least_bytes(self) -> int:
        """Bytes of a row whose lists are empty."""
        return sum(np.dtype(length or number).itemsize for length, number in self.properties.values())

    @property
    def has_lists(self) -> bool:
        return any(length for length, _ in self.properties.values())


def read_ply(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices fp64 [V, 3] and triangles int64 [F, 3]."""
    form, elements, body = _read_header(data, where)
    by_name = {element.name: element for element in elements}
    if len(by_name) != len(elements) or "vertex" not in by_name or "face" not in by_name:
        raise InvalidInput(f"{where} has no faces; a PLY file needs one element 'vertex' and one 'face' (no strips)")
    vertex, face = by_name["vertex"], by_name["face"]
    corners = next((name for name in CORNERS if name in face.properties), None)
    length, index = face.properties.get(corners, (None, "f4"))
    if not set("xyz") <= set(vertex.properties) or vertex.has_lists:
        raise InvalidInput(f"{where} has vertices without x, y and z, or with lists; save it as plain PLY")
    if length is None or "f" in length + index:
        raise InvalidInput(f"{where} has faces without a list of whole numbers 'vertex_indices'")
    is_text = form == "ascii"
    least = sum(element.count * (2 if is_text else element.least_bytes) for element in elements)
    check_declared(vertex.count, face.count, least - is_text, len(data) - body, where)
    if is_text:
        return _read_text(data, body, elements, corners, where)
    for element in elements:
        order = ">" if form == "binary_big_endian" else "<"
        element.properties = {
            name: (length and order + length, order + number) for name, (length, number) in element.properties.items()
        }
    points_V3 = triangles_F3 = None
    for element in elements:
        if element is vertex:
            points_V3 = _read_vertices(data, body, element, where)
        elif element is face:
            triangles_F3 = _read_faces(data, body, element, corners, where)
        if points_V3 is not None and triangles_F3 is not None:
            break
        body = _end_of(data, body, element, where)
    return points_V3, triangles_F3


def _read_header(data: bytes, where: str) -> tuple[str, list[Element], int]:
    """The form of the body, its elements and where it begins."""
    end = re.compile(rb"^end_header[ \t]*\r?\n", re.MULTILINE).search(data, 0, MAX_HEADER)
    if end is None:
        raise InvalidInput(f"{where} is a PLY file whose header does not end")
    form, elements = "", []
    for line in data[: end.start()].decode("latin-1").splitlines():
        words = line.split()
        match words:
            case ["format", ("ascii" | "binary_little_endian" | "binary_big_endian") as form, _]:
                pass
            case ["element", name, count] if count.isdecimal() and len(count) < 20:
                elements.append(Element(name, int(count)))
            case ["property", "list", length, number, name] if _is_new(name, elements) and length in NUMBERS:
                elements[-1].properties[name] = (NUMBERS[length], NUMBERS.get(number))
            case ["property", number, name] if _is_new(name, elements):
                elements[-1].properties[name] = (None, NUMBERS.get(number))
            case [] | ["ply"] | ["comment" | "obj_info", *_]:
                pass
            case _:
                raise InvalidInput(f"{where} is a PLY file with a header line {line[:60]!r} that is not read here")
    types = [number for element in elements for _, number in element.properties.values()]
    if not form or len(types) > MAX_PROPERTIES or None in types:
        raise InvalidInput(
            f"{where} is a PLY file with a damaged header: no format, an unknown type or too many of them"
        )
    return form, elements, end.end()


def _is_new(name: str, elements: list[Element]) -> bool:
    return bool(elements) and name not in elements[-1].properties


def _read_text(data: bytes, body: int, elements: list[Element], corners: str, where: str):
    lines = (match[0] for match in re.compile(rb"\S[^\n]*").finditer(data, body))
    points_V3 = triangles_F3 = None
    for element in elements:
        rows = islice(lines, element.count)
        names = list(element.properties)
        if element.name == "vertex":
            points_V3 = table(rows, element.count, [names.index(axis) for axis in "xyz"], where)
        elif element.name == "face":
            before = names[: names.index(corners)]
            if any(element.properties[name][0] for name in before):
                raise InvalidInput(f"{where} has faces with a list before their corners; save it as plain PLY")
            triangles_F3 = polygons_of(rows, element.count, len(before), where)
        else:
            for _ in rows:
                pass
    return points_V3, triangles_F3


def _read_vertices(data: bytes, at: int, element: Element, where: str) -> np.ndarray:
    _check_room(at + element.count * element.least_bytes, data, where)
    row = np.dtype([(name, number) for name, (_, number) in element.properties.items()])
    rows_V = np.frombuffer(data, row, element.count, at)
    return np.stack([rows_V[axis].astype(np.float64) for axis in "xyz"], axis=1)


def _read_faces(data: bytes, at: int, element: Element, corners: str, where: str) -> np.ndarray:
    if element.count == 0:
        return np.zeros((0, 3), np.int64)
    rows_P = _equal_rows(data, at, element)
    if rows_P is not None:
        num_corners = rows_P[corners].shape[1]
        check_counts(0, element.count * max(num_corners - 2, 0), where)
        return fan(rows_P[corners].astype(np.int64).reshape(-1), np.full(element.count, num_corners), where)
    lists, _ = _walk(data, at, element, where, corners)
    at_P, counts_P = np.frombuffer(lists, np.int64).reshape(-1, 2).T
    check_counts(0, int(np.maximum(counts_P - 2, 0).sum()), where)
    number = np.dtype(element.properties[corners][1])
    bytes_N = np.frombuffer(data, np.uint8)
    blocks = []
    for rows in np.split(np.arange(element.count), np.arange(BLOCK_ROWS, element.count, BLOCK_ROWS)):
        # Lists begin at any byte, so they are gathered byte by byte and then read as numbers.
        sizes = counts_P[rows] * number.itemsize
        shift_N = np.repeat(at_P[rows] - (np.cumsum(sizes) - sizes), sizes)
        blocks.append(bytes_N[shift_N + np.arange(len(shift_N))].view(number).astype(np.int64))
    return fan(np.concatenate(blocks), counts_P, where)


def _equal_rows(data: bytes, at: int, element: Element) -> np.ndarray | None:
    """All rows as one structured array if their lists are as long as those of the first, else None.

    The layout is right when every length is the first row's: each row then begins where the one before it ends.
    """
    row, position, lengths = [], at, {}
    for name, (length, number) in element.properties.items():
        if length is None:
            row.append((name, number))
            position += np.dtype(number).itemsize
            continue
        raw = data[position : position + np.dtype(length).itemsize]
        if len(raw) < np.dtype(length).itemsize:
            return None
        lengths[f"length of {name}"] = count = int(np.frombuffer(raw, length)[0])
        position += len(raw) + count * np.dtype(number).itemsize
        if count < 0 or position > len(data):
            return None
        row += [(f"length of {name}", length), (name, number, (count,))]
    row = np.dtype(row)
    if at + element.count * row.itemsize > len(data):
        return None
    rows_P = np.frombuffer(data, row, element.count, at)
    return rows_P if all((rows_P[name] == count).all() for name, count in lengths.items()) else None


def _end_of(data: bytes, at: int, element: Element, where: str) -> int:
    """Where the element that begins at `at` ends."""
    if not element.has_lists:
        end = at + element.count * element.least_bytes
        _check_room(end, data, where)
        return end
    return _walk(data, at, element, where)[1]


def _walk(data: bytes, at: int, element: Element, where: str, wanted: str = "") -> tuple[array, int]:
    """Go from list to list; returns where those of `wanted` begin and how long they are, in turn, and the end."""
    if element.count > MAX_FACES:
        check_counts(0, element.count, where)
    steps = []
    for name, (length, number) in element.properties.items():
        length_bytes = np.dtype(length).itemsize if length else 0
        steps.append((name == wanted, length_bytes, np.dtype(number).itemsize))
    order = "big" if any(number[0] == ">" for _, number in element.properties.values()) else "little"
    found, size = array("q"), len(data)
    for _ in range(element.count):
        for is_wanted, length_bytes, number_bytes in steps:
            count = 1
            if length_bytes:
                count = int.from_bytes(data[at : at + length_bytes], order)  # a negative length is a huge one here
                at += length_bytes
            if is_wanted:
                if count > MAX_CORNERS:
                    raise InvalidInput(f"{where} has a face of {count:,} corners; at most {MAX_CORNERS:,} are read")
                found.extend((at, count))
            at += count * number_bytes
            if at > size:
                _check_room(at, data, where)
    return found, at


def _check_room(end: int, data: bytes, where: str) -> None:
    if end > len(data):
        raise InvalidInput(f"{where} declares more than its {len(data):,} bytes hold: it is truncated or damaged")
