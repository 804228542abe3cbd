"""Which kind of file a mesh comes in, and the limits: decided from its first bytes, before anything is parsed.

The name of a file is only a hint. Archives, glTF in JSON form and formats of other programs are named and refused.

Shape suffixes: C corners of polygons, P polygons, F triangles, V vertices, 3 corners of a triangle.
"""

from __future__ import annotations

import re

import numpy as np

from .errors import InvalidInput, LimitExceeded

# A scan of 2 million faces fits twice over. Reading takes up to 500 bytes a face beside the file (STL: three vertices
# for each face before they are joined).
MAX_MESH_BYTES = 256 * 2**20
MAX_FACES = 4_000_000
MAX_VERTICES = 4_000_000

ACCEPTED = "OBJ, STL, PLY, OFF and GLB are read"
STL_HEADER, STL_FACE = 84, 50  # bytes: 80 of text and the number of faces; 12 floats and 2 spare bytes a face
FOREIGN = {
    b"PK\x03\x04": "a ZIP archive (3MF files are such, too)",
    b"PK\x05\x06": "an empty ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"BLENDER": "a Blender file",
    b"Kaydara FBX Binary": "an FBX file",
    b"DRACO": "a Draco file",
    b"<": "an XML file",
}
OBJ_VERTEX = re.compile(rb"^[ \t]*v[ \t]", re.MULTILINE)
OFF_HEADER = re.compile(rb"(?:\s|#[^\n]*\n)*(\w*OFF)\b(?:[ \t]+BINARY\b)?")


def kind_of(data: bytes, suffix: str, where: str) -> str:
    """Return "GLB", "PLY", "OFF", "OBJ", "STL" or "binary STL".

    Args:
        data: the whole file.
        suffix: of its name, such as ".stl", or ""; it decides only where the content leaves room.
        where: names the file in messages.

    Raises:
        InvalidInput: archives, other formats, and a binary STL whose faces are not all there.
    """
    if data[:4] == b"glTF":
        return "GLB"
    if re.match(rb"ply[ \t]*\r?\n", data):
        return "PLY"
    # By its size first: the 80 bytes of text may begin with anything, "solid" included.
    if _has_stl_size(data):
        return "binary STL"
    _refuse_foreign(data, where)
    if OFF_HEADER.match(data[:4096]):
        return "OFF"
    start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"solid") and (b"facet" in start or b"endsolid" in start):
        return "STL"
    if suffix == ".stl" and len(data) >= STL_HEADER:
        return _odd_binary_stl(data, where)
    if b"\0" not in data[:4096] and re.search(rb"(?:^|[\r\n])[ \t]*v[ \t]", data):
        return "OBJ"
    raise InvalidInput(f"{where} is no mesh file that is read here; {ACCEPTED}: convert it first")


def declared_stl_faces(data: bytes) -> int:
    """The number of faces in the header of a binary STL file."""
    return int.from_bytes(data[STL_HEADER - 4 : STL_HEADER], "little")


def check_counts(vertices: int, faces: int, where: str) -> None:
    """Refuse what is beyond the limits.

    Raises:
        LimitExceeded: too many vertices or faces (triangles or polygons).
    """
    for count, limit, what in ((vertices, MAX_VERTICES, "vertices"), (faces, MAX_FACES, "faces")):
        if count > limit:
            raise LimitExceeded(f"{where} has {count:,} {what}; at most {limit:,} are read: simplify it first")


def fan(corners_C: np.ndarray, counts_P: np.ndarray, where: str) -> np.ndarray:
    """Cut polygons into triangles around their first corners, int64 [F, 3].

    Args:
        corners_C: the vertices of all polygons, one polygon after the other.
        counts_P: how many corners each has; those with fewer than 3 have no triangle.

    A concave polygon gives triangles that overlap; in sums with a sign, such as winding numbers, the excess cancels.
    """
    triangles_P = np.maximum(counts_P - 2, 0)
    check_counts(0, int(triangles_P.sum()), where)
    first_P = np.cumsum(counts_P) - counts_P
    first_F = np.repeat(first_P, triangles_P)
    step_F = np.arange(len(first_F)) - np.repeat(np.cumsum(triangles_P) - triangles_P, triangles_P)
    return np.stack([corners_C[first_F], corners_C[first_F + step_F + 1], corners_C[first_F + step_F + 2]], axis=1)


def _has_stl_size(data: bytes) -> bool:
    faces = declared_stl_faces(data)
    return len(data) >= STL_HEADER and faces > 0 and len(data) == STL_HEADER + STL_FACE * faces


def _odd_binary_stl(data: bytes, where: str) -> str:
    """A file named .stl that is no text: some programs leave bytes behind the faces, none may be missing."""
    faces, room = declared_stl_faces(data), (len(data) - STL_HEADER) // STL_FACE
    if faces == 0:
        raise InvalidInput(f"{where} is a binary STL file without faces")
    if faces > room:
        raise InvalidInput(
            f"{where} declares {faces:,} faces but has room for {room:,}: it is truncated or its header is wrong"
        )
    return "binary STL"


def _refuse_foreign(data: bytes, where: str) -> None:
    if data[257:262] == b"ustar":
        raise InvalidInput(f"{where} is a tar archive; {ACCEPTED}: unpack it first")
    for magic, name in FOREIGN.items():
        if data.startswith(magic):
            way_out = "unpack it first" if "archive" in name else "convert it first"
            raise InvalidInput(f"{where} is {name}; {ACCEPTED}: {way_out}")
    if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        raise InvalidInput(f"{where} is glTF in JSON form, whose data lie in other files; save it as GLB, in one file")
