"""GLB files (glTF 2.0 in one binary file): the triangles of the default scene, each node at its place.

Everything the JSON says is checked against the binary chunk before a byte of geometry is read. Nothing outside the file
is opened; materials, pictures, animations, skins and morph targets are not looked at.

Shape suffixes: V vertices, F triangles, N nodes, 3 coordinates or corners, 44 a transform of homogeneous columns.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from .errors import InvalidInput, LimitExceeded
from .mesh_header import check_counts

MAX_JSON_BYTES = 8 * 2**20
MAX_NODES = 100_000
MAX_DEPTH = 256
MAX_PARTS = 100_000  # primitives, each time a node shows them
JSON_CHUNK, BINARY_CHUNK = 0x4E4F534A, 0x004E4942
POINTS, TRIANGLES, STRIP, FAN = 0, 4, 5, 6
COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
# Extensions that a file may require without changing where its triangles are.
HARMLESS = ("KHR_materials_", "KHR_texture_", "KHR_lights_", "KHR_mesh_quantization", "EXT_texture_", "KHR_xmp")


@dataclass(frozen=True)
class Accessor:
    """`count` rows of `width` numbers in the binary chunk."""

    dtype: np.dtype
    width: int
    count: int
    offset: int
    stride: int
    normalized: bool

    def rows(self, binary: bytes) -> np.ndarray:
        shape, strides = (self.count, self.width), (self.stride, self.dtype.itemsize)
        return np.ndarray(shape, self.dtype, binary, self.offset, strides)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """What rows of this accessor stand for, fp64."""
        is_fraction = self.normalized and self.dtype.kind != "f"
        return np.maximum(rows / np.iinfo(self.dtype).max, -1.0) if is_fraction else rows.astype(np.float64)


@dataclass(frozen=True)
class Part:
    """One primitive of a mesh: accessors of its points and, unless they are in order, of its indices."""

    points: Accessor
    indices: Accessor | None
    mode: int

    @property
    def num_faces(self) -> int:
        corners = (self.indices or self.points).count
        return corners // 3 if self.mode == TRIANGLES else max(corners - 2, 0)


def read_glb(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices fp64 [V, 3] and triangles int64 [F, 3]."""
    try:
        return _Reader(data, where).read()
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{where} is a damaged GLB file: its JSON is not as glTF 2.0 has it") from error


class _Reader:
    """Holds the document and the binary chunk while one file is read."""

    def __init__(self, data: bytes, where: str):
        self.where = where
        version, length = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8))
        if version != 2 or not 20 <= length <= len(data):
            raise InvalidInput(
                f"{where} is a GLB file of version {version} that declares {length:,} of {len(data):,} bytes"
            )
        text, at = self._chunk(data, 12, length, JSON_CHUNK)
        if len(text) > MAX_JSON_BYTES:
            raise LimitExceeded(f"{where} has {len(text):,} bytes of JSON; at most {MAX_JSON_BYTES:,} are read")
        self.binary = self._chunk(data, at, length, BINARY_CHUNK)[0] if at < length else b""
        try:
            self.json = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{where} is a GLB file whose JSON is damaged") from error
        self._check_document()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        parts_of = [self._parts(mesh) for mesh in self.json.get("meshes", [])]
        nodes = self.json.get("nodes", [])
        walk = self._scene()
        # A mesh may be shown many times, so what is shown is counted before it is made.
        shown = sum(len(_at(parts_of, nodes[number]["mesh"])) for number, _ in walk if "mesh" in nodes[number])
        if shown > MAX_PARTS:
            raise LimitExceeded(f"{self.where} shows {shown:,} parts; at most {MAX_PARTS:,} are read")
        places, placed = [], []
        for number, above in walk:
            with np.errstate(all="ignore"):  # numbers that overflow are refused with the vertices
                places.append(_transform(nodes[number]) if above is None else places[above] @ _transform(nodes[number]))
            if "mesh" in nodes[number]:
                placed += [(part, places[-1]) for part in parts_of[nodes[number]["mesh"]]]
        check_counts(0, sum(part.num_faces for part, _ in placed), self.where)
        vertices, faces, total = [np.zeros((0, 3))], [np.zeros((0, 3), np.int64)], 0
        for part, place_44 in placed:
            points_V3, triangles_F3 = self._triangles(part)
            with np.errstate(all="ignore"):
                vertices.append(points_V3 @ place_44[:3, :3].T + place_44[:3, 3])
                is_mirror = np.linalg.det(place_44[:3, :3]) < 0
            faces.append((triangles_F3[:, ::-1] if is_mirror else triangles_F3) + total)
            total += len(points_V3)
        return np.concatenate(vertices), np.concatenate(faces)

    def _chunk(self, data: bytes, at: int, length: int, kind: int) -> tuple[bytes, int]:
        size, found = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4))
        end = at + 8 + size
        if found != kind or end > length:
            raise InvalidInput(f"{self.where} is a GLB file with a damaged or truncated chunk")
        return data[at + 8 : end], end

    def _check_document(self) -> None:
        document, where = self.json, self.where
        if not str(document["asset"]["version"]).startswith("2."):
            raise InvalidInput(f"{where} is glTF {str(document['asset']['version'])[:9]!r}; version 2 is read")
        for name in document.get("extensionsRequired", []):
            if not name.startswith(HARMLESS):
                raise InvalidInput(f"{where} requires {name[:60]!r}; save it without compression or extensions")
        buffers = document.get("buffers", [])
        if any("uri" in buffer for buffer in buffers) or len(buffers) > 1:
            raise InvalidInput(f"{where} keeps geometry outside its binary chunk (a uri); save it as GLB in one file")
        for image in document.get("images", []):
            if not str(image.get("uri", "data:")).startswith("data:"):
                raise InvalidInput(f"{where} refers to another file, {image['uri'][:60]!r}; save it as GLB in one file")

    def _scene(self) -> list[tuple[int, int | None]]:
        """The nodes of the scene, see `_walk`. All nodes of the file must form trees."""
        nodes, where = self.json.get("nodes", []), self.where
        if len(nodes) > MAX_NODES:
            raise LimitExceeded(f"{where} has {len(nodes):,} nodes; at most {MAX_NODES:,} are read")
        parents = [0] * len(nodes)
        for node in nodes:
            for child in node.get("children", []):
                _at(nodes, child)
                parents[child] += 1
        roots = [number for number, count in enumerate(parents) if count == 0]
        # First the parents, for only then is the walk a short one.
        if max(parents, default=0) > 1 or len(self._walk(roots)) < len(nodes):
            raise InvalidInput(f"{where} has nodes that are their own ancestors or have two parents; glTF forbids it")
        if scenes := self.json.get("scenes", []):
            roots = _at(scenes, self.json.get("scene", 0)).get("nodes", [])
        return self._walk(roots)

    def _walk(self, roots: list[int]) -> list[tuple[int, int | None]]:
        """All nodes at and below the roots, each with the position of its parent in this list."""
        nodes, seen = self.json.get("nodes", []), []
        waiting = [(root, None, 1) for root in roots]
        while waiting:
            number, above, depth = waiting.pop()
            if depth > MAX_DEPTH:
                raise LimitExceeded(f"{self.where} has nodes more than {MAX_DEPTH:,} deep; they are not read")
            if len(seen) == len(nodes):
                raise InvalidInput(f"{self.where} has a scene that shows a node twice; glTF forbids it")
            children = _at(nodes, number).get("children", [])
            waiting += [(child, len(seen), depth + 1) for child in children]
            seen.append((number, above))
        return seen

    def _parts(self, mesh: dict) -> list[Part]:
        parts = []
        for primitive in mesh["primitives"]:
            mode = primitive.get("mode", TRIANGLES)
            if mode not in (TRIANGLES, STRIP, FAN) or "POSITION" not in primitive["attributes"]:
                continue  # points and lines
            indices = self._accessor(primitive["indices"], "SCALAR") if "indices" in primitive else None
            if indices is not None and (indices.dtype.kind != "u" or indices.normalized):
                raise InvalidInput(f"{self.where} has indices that are no whole numbers")
            parts.append(Part(self._accessor(primitive["attributes"]["POSITION"], "VEC3"), indices, mode))
        return parts

    def _accessor(self, number: int, kind: str) -> Accessor:
        accessor = _at(self.json.get("accessors", []), number)
        if accessor["type"] != kind or "sparse" in accessor or "bufferView" not in accessor:
            raise InvalidInput(f"{self.where} has sparse, empty or mistyped geometry; save it as plain GLB")
        view = _at(self.json.get("bufferViews", []), accessor["bufferView"])
        dtype, width = np.dtype(COMPONENTS[accessor["componentType"]]), {"SCALAR": 1, "VEC3": 3}[kind]
        row = dtype.itemsize * width
        count, inner = _whole(accessor["count"]), _whole(accessor.get("byteOffset", 0))
        start, size = _whole(view.get("byteOffset", 0)), _whole(view["byteLength"])
        stride = _whole(view.get("byteStride", row))
        if _whole(view.get("buffer", 0)) != 0 or start + size > len(self.binary) or stride < row:
            raise InvalidInput(f"{self.where} has a view beyond its {len(self.binary):,} bytes of binary data")
        if count and inner + stride * (count - 1) + row > size:
            raise InvalidInput(f"{self.where} declares {count:,} numbers or points where there is room for fewer")
        return Accessor(dtype, width, count, start + inner, stride, accessor.get("normalized", False) is True)

    def _triangles(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """The points of a part that it uses, fp64 [V, 3], and its triangles, int64 [F, 3].

        Many parts may share one long list of points, so that only those used are copied.
        """
        if part.indices is None:
            order = np.arange(part.points.count)
        else:
            order = part.indices.rows(self.binary)[:, 0].astype(np.int64)
        if len(order) and order.max() >= part.points.count:
            raise InvalidInput(f"{self.where} has a face of vertex {order.max():,} of {part.points.count:,}")
        if part.mode == TRIANGLES:
            triangles_F3 = order[: len(order) // 3 * 3].reshape(-1, 3)
        else:
            step_F = np.arange(part.num_faces)
            turn_F = step_F % 2 if part.mode == STRIP else 0 * step_F  # every second triangle of a strip is turned
            first_F = step_F if part.mode == STRIP else 0 * step_F
            triangles_F3 = np.stack([order[first_F], order[step_F + 1 + turn_F], order[step_F + 2 - turn_F]], axis=1)
        used_V, corners = np.unique(triangles_F3, return_inverse=True)
        return part.points.values(part.points.rows(self.binary)[used_V]), corners.reshape(-1, 3)


def _transform(node: dict) -> np.ndarray:
    """The matrix of a node, or translation * rotation * scale, [4, 4]."""
    if "matrix" in node:
        return _floats(node["matrix"], 16).reshape(4, 4).T  # stored column by column
    x, y, z, w = _floats(node.get("rotation", [0, 0, 0, 1]), 4)
    if not 0.9 < math.hypot(x, y, z, w) < 1.1:
        raise ValueError("a rotation is a unit quaternion")
    rotation_33 = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    place_44 = np.eye(4)
    place_44[:3, :3] = rotation_33 * _floats(node.get("scale", [1, 1, 1]), 3)
    place_44[:3, 3] = _floats(node.get("translation", [0, 0, 0]), 3)
    return place_44


def _floats(values: list, count: int) -> np.ndarray:
    numbers = np.array([float(value) for value in values])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError("a transform has finite numbers")
    return numbers


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a count or an offset is a whole number")
    return value


def _at(items: list, number: object):
    """An entry by its number, which a hostile file may set to anything."""
    return items[_whole(number)]
