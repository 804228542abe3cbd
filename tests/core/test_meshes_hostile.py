"""Damaged and hostile mesh files are refused in one sentence, before much is parsed and without opening others."""

import gzip
import io
import json
import struct
import tarfile
import time
import tracemalloc
import zipfile

import mediatok as mt
import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from mediatok.core.meshes import MAX_MESH_BYTES, read_mesh

OBJ = b"v 0 0 0\nv 1 0 0\nv 0 1 0\n"
BOX = trimesh.creation.box()
PLY_VERTEX = b"property float x\nproperty float y\nproperty float z\n"
PLY_FACE = b"property list uchar int vertex_indices\nend_header\n"


def ply(vertices, faces, body=b"", form=b"binary_little_endian", lists=PLY_FACE):
    counts = (b"element vertex %d\n" % vertices, b"element face %d\n" % faces)
    return b"ply\nformat " + form + b" 1.0\n" + counts[0] + PLY_VERTEX + counts[1] + lists + body


def stl(declared, faces=1):
    return b"made by hand".ljust(80) + struct.pack("<I", declared) + b"\0" * (50 * faces)


def glb(document, binary=b"\0" * 48):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(binary), 0x004E4942) + binary
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes() + np.arange(3, dtype="<u4").tobytes()


def document(**changes):
    return {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": 48}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": 12}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5125, "count": 3, "type": "SCALAR"},
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
    } | changes


def accessor(index, **changes):
    accessors = document()["accessors"]
    accessors[index] |= changes
    return glb(document(accessors=accessors), TRIANGLE)


def archive(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as box:
            box.writestr("a.obj", OBJ)
    else:
        with tarfile.open(fileobj=file, mode="w") as box:
            box.addfile(tarfile.TarInfo("a.obj"))
    return file.getvalue()


MANY = 50_000_000
DEEP = [{"children": [i + 1]} for i in range(400)] + [{"mesh": 0}]
CROWD = {"nodes": [{"mesh": 0}] * 90_000, "meshes": [{"primitives": document()["meshes"][0]["primitives"] * 1000}]}
HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"hello world, I am no mesh", "no mesh file"),
    "zip": (archive("zip"), "ZIP archive.*unpack"),
    "tar": (archive("tar"), "tar archive"),
    "gzip": (gzip.compress(OBJ), "gzip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + b"\0" * 50, "7z archive"),
    "Blender": (b"BLENDER-v300" + b"\0" * 50, "Blender"),
    "FBX": (b"Kaydara FBX Binary  \0", "FBX"),
    "XML": (b"<?xml version='1.0'?><COLLADA/>", "XML"),
    "glTF in JSON": (json.dumps(document()).encode(), "save it as GLB"),
    "OBJ of points": (OBJ, "no faces"),
    "OBJ of NaN": (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3", "NaN or infinite"),
    "OBJ of infinity": (b"v 1e999 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3", "NaN or infinite"),
    "OBJ beyond fp32": (b"v 1e30 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3", r"beyond 1e\+18"),
    "OBJ of words": (b"v a b c\nv 1 0 0\nv 0 1 0\nf 1 2 3", "a number should be"),
    "OBJ of short vertices": (b"v 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3", "fewer than 3 coordinates"),
    "OBJ face too high": (OBJ + b"f 1 2 4", "vertex number 3; there are 3"),
    "OBJ face 0": (OBJ + b"f 0 1 2", "counts from 1"),
    "OBJ face too far back": (OBJ + b"f -1 -2 -4", "vertex number -1"),
    "OBJ face beyond 64 bits": (OBJ + b"f 1 2 99999999999999999999999", "a whole number should be"),
    "OBJ face of fractions": (OBJ + b"f 1 2 2.5", "a whole number should be"),
    "OBJ in a line": (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3", "no triangle with an area"),
    "OBJ in a point": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3", "a single point|no triangle with an area"),
    "OBJ of one corner twice": (OBJ + b"f 1 1 2", "no triangle with an area"),
    "OBJ of a huge polygon": (OBJ + b"f" + b" 1" * 2**20, "line of"),
    "STL of many": (stl(MANY), "no mesh file"),
    "STL of nothing": (b"solid a\nendsolid a\n", "no faces"),
    "STL of half a facet": (b"solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\n", "damaged or truncated"),
    "STL of no area": (stl(2, 2), "single point|no triangle with an area"),
    "STL of NaN": (b"\0" * 80 + struct.pack("<I12fH", 1, *[float("nan")] * 12, 0), "NaN or infinite"),
    "PLY of many": (ply(MANY, MANY), "50,000,000 vertices; at most"),
    "PLY of many faces": (ply(3, MANY), "50,000,000 faces; at most"),
    "PLY of more than it holds": (ply(3, 4_000_000, b"\0" * 900), "truncated or its header is wrong"),
    "PLY in text of more": (ply(3, 4_000_000, b"0 0 0\n", b"ascii"), "truncated or its header is wrong"),
    "PLY of 10^18": (ply(10**18, 1), "vertices; at most"),
    "PLY of 10^40": (ply(10**40, 1), "header line"),
    "PLY without an end": (b"ply\nformat ascii 1.0\n" + b"comment x\n" * 10, "does not end"),
    "PLY of points": (b"ply\nformat ascii 1.0\nelement vertex 1\n" + PLY_VERTEX + b"end_header\n0 0 0\n", "no faces"),
    "PLY of another form": (ply(3, 1, b"", b"zipped"), "header line"),
    "PLY of unknown types": (
        ply(3, 1, b"", lists=b"property list uchar int256 vertex_indices\nend_header\n"),
        "an unknown type",
    ),
    "PLY with faces of floats": (ply(3, 1, b"\0" * 60, lists=PLY_FACE.replace(b" int ", b" float ")), "whole numbers"),
    "PLY with a list of -1": (
        ply(3, 1, b"\0" * 36 + b"\xff" * 16, lists=PLY_FACE.replace(b"uchar", b"int")),
        "a face of 4,294,967,295 corners",
    ),
    "PLY with a long list": (
        ply(3, 2, b"\0" * 36 + b"\x03" + b"\0" * 12 + b"\xff" + b"\0" * 12),
        "truncated or damaged",
    ),
    "PLY face too high": (ply(3, 1, TRIANGLE[:36] + b"\x03" + struct.pack("<3i", 0, 1, 7)), "vertex number 7"),
    "PLY face below 0": (ply(3, 1, TRIANGLE[:36] + b"\x03" + struct.pack("<3i", 0, 1, -7)), "vertex number -7"),
    "OFF of many": (b"OFF\n50000000 50000000 0\n0 0 0\n", "50,000,000 vertices; at most"),
    "OFF of more than it holds": (b"OFF\n3 4000000 0\n0 0 0\n", "truncated or its header is wrong"),
    "OFF cut short": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0      ", "declares 1 faces but has 0"),
    "OFF with a short face": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1", "fewer corners than it says"),
    "OFF without counts": (b"OFF\n", "without its counts"),
    "OFF below 0": (b"OFF\n-3 1 0\n0 0 0\n", "header is damaged"),
    "OFF in 4 dimensions": (b"4OFF\n3 1 0\n0 0 0 0\n", "another kind"),
    "OFF in binary": (b"OFF BINARY\n" + b"\0" * 99, "another kind"),
    "GLB alone": (b"glTF", "version 0"),
    "GLB of version 1": (glb(document()).replace(struct.pack("<I", 2), struct.pack("<I", 1), 1), "version 1"),
    "GLB cut short": (glb(document(), TRIANGLE)[:-60], "declares 528 of 468 bytes"),
    "GLB without JSON": (b"glTF" + struct.pack("<IIII", 2, 20, 0, 0x004E4942), "damaged or truncated chunk"),
    "GLB of broken JSON": (glb(b"{'asset'"), "JSON is damaged"),
    "GLB of deep JSON": (glb(b"[" * 200_000), "JSON is damaged"),
    "GLB of a list": (glb([]), "not as glTF 2.0 has it"),
    "GLB of nothing": (glb({"asset": {"version": "2.0"}}), "no faces"),
    "GLB of glTF 1": (glb(document(asset={"version": "1.0"})), "version 2 is read"),
    "GLB with a file": (
        glb(document(buffers=[{"byteLength": 48, "uri": "file:///etc/passwd"}])),
        "outside its binary chunk",
    ),
    "GLB with a path": (
        glb(document(buffers=[{"byteLength": 48, "uri": "../secret.bin"}])),
        "outside its binary chunk",
    ),
    "GLB with a URL": (glb(document(buffers=[{"byteLength": 48, "uri": "http://127.0.0.1/a"}])), "outside its binary"),
    "GLB with data": (
        glb(document(buffers=[{"byteLength": 3, "uri": "data:;base64,AAAA"}])),
        "outside its binary chunk",
    ),
    "GLB with two buffers": (glb(document(buffers=[{"byteLength": 48}] * 2)), "outside its binary chunk"),
    "GLB with a picture elsewhere": (glb(document(images=[{"uri": "file:///etc/passwd"}])), "refers to another file"),
    "GLB with Draco": (glb(document(extensionsRequired=["KHR_draco_mesh_compression"])), "without compression"),
    "GLB, its own parent": (glb(document(nodes=[{"mesh": 0}, {"children": [1]}]), TRIANGLE), "own ancestors"),
    "GLB, a ring": (glb(document(nodes=[{"mesh": 0, "children": [1]}, {"children": [0]}]), TRIANGLE), "own ancestors"),
    "GLB, two parents": (
        glb(document(nodes=[{"children": [2]}, {"children": [2]}, {"mesh": 0}]), TRIANGLE),
        "own ancestors or have two parents",
    ),
    "GLB, doubling": (
        glb(document(nodes=[*({"children": [i + 1] * 2} for i in range(60)), {"mesh": 0}]), TRIANGLE),
        "two parents",
    ),
    "GLB, a node shown twice": (glb(document(scenes=[{"nodes": [0, 0]}]), TRIANGLE), "shows a node twice"),
    "GLB, deep": (glb(document(nodes=DEEP), TRIANGLE), "more than 256 deep"),
    "GLB of many nodes": (glb(document(nodes=[{}] * 200_000), TRIANGLE), "200,000 nodes"),
    "GLB of many instances": (
        glb(document(**CROWD, scenes=[{"nodes": list(range(90_000))}]), TRIANGLE),
        "90,000,000 parts",
    ),
    "GLB of a child that is not there": (glb(document(nodes=[{"children": [9]}]), TRIANGLE), "not as glTF"),
    "GLB of a child -1": (glb(document(nodes=[{"mesh": 0, "children": [-1]}]), TRIANGLE), "not as glTF"),
    "GLB of no rotation": (glb(document(nodes=[{"mesh": 0, "rotation": [0, 0, 0, 0]}]), TRIANGLE), "not as glTF"),
    "GLB of a NaN transform": (
        glb(document(nodes=[{"mesh": 0, "scale": [float("nan")] * 3}]), TRIANGLE),
        "not as glTF",
    ),
    "GLB of an infinite place": (
        glb(document(nodes=[{"mesh": 0, "scale": [1e308] * 3, "translation": [1e308] * 3}]), TRIANGLE),
        "beyond|infinite",
    ),
    "GLB of many points": (accessor(0, count=MANY), "room for fewer"),
    "GLB of many indices": (accessor(1, count=MANY), "room for fewer"),
    "GLB of 10^30 points": (accessor(0, count=10**30), "room for fewer|not as glTF"),
    "GLB of -1 points": (accessor(0, count=-1), "not as glTF"),
    "GLB of true points": (accessor(0, count=True), "not as glTF"),
    "GLB before the buffer": (accessor(0, byteOffset=-12), "not as glTF"),
    "GLB beyond the buffer": (accessor(0, byteOffset=24), "room for fewer"),
    "GLB of sparse points": (accessor(0, sparse={"count": 1}), "sparse"),
    "GLB of pairs": (accessor(0, type="VEC2"), "mistyped"),
    "GLB of 128 bits": (accessor(0, componentType=5130), "not as glTF"),
    "GLB of signed indices": (accessor(1, componentType=5120), "whole numbers"),
    "GLB face too high": (glb(document(), TRIANGLE[:36] + struct.pack("<3I", 0, 1, 9)), "vertex 9 of 3"),
    "GLB of NaN": (glb(document(), struct.pack("<9f", *[float("nan")] * 9) + TRIANGLE[36:]), "NaN or infinite"),
    "GLB of lines": (
        glb(document(meshes=[{"primitives": [{"attributes": {"POSITION": 0}, "mode": 1}]}]), TRIANGLE),
        "no faces",
    ),
}


def test_the_plain_files_are_read():
    assert len(read_mesh(OBJ + b"f 1 2 3").faces) == 1
    assert len(read_mesh(glb(document(), TRIANGLE)).faces) == 1
    assert len(read_mesh(ply(3, 1, TRIANGLE[:36] + b"\x03" + TRIANGLE[36:])).faces) == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(name):
    data, words = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(mt.InvalidInput, match=words) as caught:
        read_mesh(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.monotonic() - start < 5


def test_refused_by_its_name(tmp_path):
    path = tmp_path / "scan.stl"
    path.write_bytes(stl(MANY, 20))
    with pytest.raises(mt.InvalidInput, match=r"scan\.stl declares 50,000,000 faces but has room for 20"):
        read_mesh(path)
    path.write_bytes(stl(0))
    with pytest.raises(mt.InvalidInput, match="without faces"):
        read_mesh(path)


def test_limits_of_what_has_no_header(monkeypatch):
    monkeypatch.setattr("mediatok.core.mesh_header.MAX_FACES", 100)
    monkeypatch.setattr("mediatok.core.mesh_text.MAX_FACES", 100)
    for data in (
        OBJ + b"f 1 2 3\n" * 101,
        OBJ + b"f" + b" 1 2 3" * 40,
        BOX.subdivide().subdivide().export(file_type="stl"),
        BOX.subdivide().subdivide().export(file_type="stl_ascii").encode(),
        BOX.subdivide().subdivide().export(file_type="ply"),
        BOX.subdivide().subdivide().export(file_type="glb"),
        (np.zeros((3, 3)), np.zeros((101, 3), int)),
    ):
        with pytest.raises(mt.LimitExceeded, match="faces; at most 100 are read"):
            read_mesh(data)


def test_too_many_bytes(tmp_path):
    path = tmp_path / "big.obj"
    with open(path, "wb") as file:
        file.truncate(MAX_MESH_BYTES + 1)  # a file of holes takes no room
    with pytest.raises(mt.LimitExceeded, match="more than 268,435,456 bytes"):
        read_mesh(path)


@pytest.mark.parametrize(
    "source",
    [3, None, [1.0], torch.zeros(3, 3), (np.zeros((3, 3)),), ([[0, 0]], [[0, 0, 0]]), (BOX.vertices, [[0.5, 1, 2]]),
     (BOX.vertices, [[0, 1, 2, 3]]), (BOX.vertices, "abc"), ("abc", BOX.faces), (BOX.vertices, [[0, 1], [2]]),
     (BOX.vertices, []), trimesh.Trimesh()],
)  # fmt: skip
def test_what_is_no_mesh(source):
    with pytest.raises(mt.InvalidInput):
        read_mesh(source)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(mt.InvalidInput, match="a folder"):
        read_mesh(tmp_path)
    with pytest.raises(mt.InvalidInput, match="does not exist"):
        read_mesh(tmp_path / "none.obj")


def test_no_other_file_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.obj"
    path.write_bytes(b"mtllib a.mtl\nusemtl a\n" + OBJ + b"vt 0 0\nf 1/1 2/1 3/1\n")
    (tmp_path / "a.mtl").write_text("newmtl a\nmap_Kd a.png\n")
    real, opened = open, []
    monkeypatch.setattr(
        "builtins.open", lambda name, *rest, **more: opened.append(str(name)) or real(name, *rest, **more)
    )
    assert len(read_mesh(path).faces) == 1
    assert [name for name in opened if name.startswith(str(tmp_path))] == [str(path)]


SEEDS = [
    OBJ + b"f 1 2 3\nf -1 -2 -3\n",
    BOX.export(file_type="stl"),
    BOX.export(file_type="stl_ascii").encode(),
    BOX.export(file_type="ply"),
    BOX.export(file_type="ply", encoding="ascii"),
    BOX.export(file_type="off").encode(),
    glb(document(), TRIANGLE),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    st.integers(0, 600),
)
def test_damaged_files_give_a_mesh_or_a_message(data, changes, cut):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    try:
        mesh = read_mesh(bytes(damaged[: len(damaged) - cut]) if cut < len(damaged) else bytes(damaged))
    except mt.MediatokError:
        return
    assert np.isfinite(mesh.vertices).all()
    assert len(mesh.faces) > 0


@pytest.mark.parametrize("kind", ["obj", "stl", "stl_ascii", "ply", "off", "glb"])
def test_a_scan_is_read_in_bounded_memory(kind):
    """20,000 faces: 700 bytes each are 1.4 GiB for 2 million; the least that is ever taken does not count."""
    data = trimesh.creation.torus(1.0, 0.3, major_sections=100, minor_sections=100).export(file_type=kind)
    data = data.encode() if isinstance(data, str) else data
    read_mesh(OBJ + b"f 1 2 3")  # what is imported late
    tracemalloc.start()
    try:
        assert len(read_mesh(data).faces) == 20_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - 2**23 < 700 * 20_000
