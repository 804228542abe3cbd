"""Meshes are read from every format as they were written, and come back to their own place and scale."""

import io
import json
import struct

import mediatok as mt
import numpy as np
import pytest
import trimesh
from mediatok.core.meshes import BOX_FILL, normalise, read_mesh, restore, write_mesh

TETRAHEDRON = ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
CUBE_POINTS = [[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
CUBE_QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]


def triangles(mesh):
    """Corners of all triangles as fp32, in an order that does not depend on the file."""
    corners = np.asarray(mesh.triangles, np.float32) + np.float32(0)
    first = [np.lexsort(triangle.T)[0] for triangle in corners]
    turned = np.stack([np.roll(triangle, -i, axis=0) for triangle, i in zip(corners, first, strict=True)])
    return turned[np.lexsort(turned.reshape(len(turned), 9).T)]


def mixed_ply(form, order, lists=("uchar", "B", "int", "i"), extra=False):
    """A cube of two triangles and five quads."""
    faces = [CUBE_QUADS[0][:3], [CUBE_QUADS[0][0], *CUBE_QUADS[0][2:]], *CUBE_QUADS[1:]]
    length, length_code, index, index_code = lists
    header = ["ply", f"format {form} 1.0", "comment made by hand"]
    header += ["element odd 2", f"property list {length} {index} ids", "property uchar a"] if extra else []
    header += ["element vertex 8", "property float x", "property uchar grey", "property double y", "property float z"]
    header += [f"element face {len(faces)}", "property uchar flag", f"property list {length} {index} vertex_indices"]
    header += ["property float quality", "end_header", ""]
    head = "\n".join(header).encode()
    if form == "ascii":
        rows = [[2, 5, 6, 1], [0, 1]] if extra else []
        rows += [[x, 7, y, z] for x, y, z in CUBE_POINTS] + [[9, len(f), *f, 0.5] for f in faces]
        return head + "\n".join(" ".join(map(str, row)) for row in rows).encode()
    body = b""
    for ids, a in (([5, 6], 1), ([], 1)) if extra else ():
        body += struct.pack(f"{order}{length_code}{len(ids)}{index_code}B", len(ids), *ids, a)
    body += b"".join(struct.pack(order + "fBdf", x, 7, y, z) for x, y, z in CUBE_POINTS)
    for f in faces:
        body += struct.pack(f"{order}B{length_code}{len(f)}{index_code}f", 9, len(f), *f, 0.5)
    return head + body


def glb(document, binary=b""):
    """A GLB file of a document and a binary chunk."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    if binary:
        binary += b"\0" * (-len(binary) % 4)
        chunks += struct.pack("<II", len(binary), 0x004E4942) + binary
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def triangle_document(**changes):
    """One triangle with indices, 36 + 6 bytes; `changes` replace parts of the document."""
    binary = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes() + np.array([0, 1, 2], "<u2").tobytes()
    document = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": len(binary)}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": 6}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5123, "count": 3, "type": "SCALAR"},
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
    }
    return document | changes, binary


FORMATS = {
    "obj": {"file_type": "obj"},
    "binary stl": {"file_type": "stl"},
    "ascii stl": {"file_type": "stl_ascii"},
    "binary ply": {"file_type": "ply"},
    "ascii ply": {"file_type": "ply", "encoding": "ascii"},
    "off": {"file_type": "off"},
    "glb": {"file_type": "glb"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_trimesh_writes_is_read(name):
    mesh = trimesh.creation.torus(1.0, 0.3, major_sections=12, minor_sections=8)
    mesh.vertices = np.round(mesh.vertices * 64) / 64  # a few digits say them exactly
    data = mesh.export(**FORMATS[name])
    found = read_mesh(data.encode() if isinstance(data, str) else data)
    assert np.array_equal(triangles(found), triangles(mesh))
    assert found.is_watertight  # also of STL, which has three vertices for each triangle
    assert found.vertices.dtype == np.float64
    assert found.faces.dtype == np.int64


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".stl", ".ply"])
def test_writing_and_reading_is_exact_to_fp32(tmp_path, suffix):
    mesh = trimesh.creation.icosphere(2)
    mesh.vertices = (mesh.vertices * [3e-5, 7.7e4, 1] + [0.1, -5e3, 1e-3]).astype(np.float32)
    write_mesh(mesh, tmp_path / f"a{suffix}")
    assert np.array_equal(triangles(read_mesh(tmp_path / f"a{suffix}")), triangles(mesh))
    assert len(list(tmp_path.iterdir())) == 1


def test_writing_what_cannot_be(tmp_path):
    mesh = trimesh.creation.box()
    with pytest.raises(mt.InvalidInput, match=r"does not end with \.glb"):
        write_mesh(mesh, tmp_path / "a.dae")
    with pytest.raises(mt.InvalidInput, match="no faces"):
        write_mesh(trimesh.Trimesh(), tmp_path / "a.glb")
    mesh.vertices = mesh.vertices * 1e200
    with pytest.raises(mt.InvalidInput, match="beyond fp32"):
        write_mesh(mesh, tmp_path / "a.glb")
    assert not list(tmp_path.iterdir())


def test_the_content_decides_and_not_the_name(tmp_path):
    path = tmp_path / "mesh.OBJ"
    path.write_bytes(trimesh.creation.box().export(file_type="ply"))
    assert len(read_mesh(path).faces) == 12
    data = trimesh.creation.box().export(file_type="stl")
    assert len(read_mesh(b"solid of a liar".ljust(80) + data[80:]).faces) == 12  # binary, whatever its text says
    path = tmp_path / "mesh.stl"
    path.write_bytes(data + b"left behind by a program")
    assert len(read_mesh(path).faces) == 12


@pytest.mark.parametrize(
    ("form", "order", "lists"),
    [
        ("ascii", "", ("uchar", "B", "int", "i")),
        ("binary_little_endian", "<", ("uchar", "B", "int", "i")),
        ("binary_big_endian", ">", ("uchar", "B", "uint", "I")),
        ("binary_big_endian", ">", ("ushort", "H", "ushort", "H")),
        ("binary_little_endian", "<", ("int", "i", "uchar", "B")),
    ],
)
@pytest.mark.parametrize("extra", [False, True])
def test_ply_of_triangles_and_quads_with_other_properties(form, order, lists, extra):
    mesh = read_mesh(mixed_ply(form, order, lists, extra))
    assert len(mesh.faces) == 12
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(1)


def test_obj_as_programs_write_it():
    vertices = "".join(f"v {x} {y} {z} 0.5 0.5 0.5\n" for x, y, z in CUBE_POINTS)
    quads = "".join("f " + " ".join(f"{i + 1}/1/{i + 1}" for i in quad) + "\n" for quad in CUBE_QUADS[:3])
    relative = "".join("f " + " ".join(f"{i - 8}//1" for i in quad) + " # counted back\n" for quad in CUBE_QUADS[3:])
    text = f"# a cube\r\nmtllib /etc/passwd\nusemtl x\no one\n{vertices}vt 0 0\nvn 0 0 1\n{quads}g two\n  {relative}"
    text = text.replace("f 1/1/1 ", "f \\\n 1/1/1 ") + "v 5 5 5\nl 1 2\n"
    mesh = read_mesh(text.encode())
    assert len(mesh.faces) == 12
    assert len(mesh.vertices) == 8
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(1)
    assert len(read_mesh(text.replace("\r\n", "\n").replace("\n", "\r").replace("\\\r", "").encode()).faces) == 12


def test_off_with_comments_and_colours():
    rows = [f"{x} {y} {z} 1 0 0 1 # point" for x, y, z in CUBE_POINTS]
    rows += ["4 " + " ".join(map(str, quad)) + " 0.5 0.5 0.5" for quad in CUBE_QUADS]
    mesh = read_mesh(("# first\nCOFF\n\n8 6 0\n" + "\n".join(rows)).encode())
    assert len(mesh.faces) == 12
    assert mesh.volume == pytest.approx(1)
    assert len(read_mesh(b"OFF 3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2").faces) == 1


def test_ascii_stl_of_several_solids():
    facet = "FACET NORMAL 0 0 1\n outer loop\n  vertex {} 0 0\n  vertex {} 0 0\n  vertex 0 1 0\n endloop\nendfacet\n"
    mesh = read_mesh(
        ("solid a\n" + facet.format(0, 1) + "endsolid a\nsolid b\n" + facet.format(2, 3) + "endsolid").encode()
    )
    assert len(mesh.faces) == 2
    assert len(mesh.vertices) == 5


def test_glb_nodes_place_mirror_and_repeat_a_mesh():
    turn = [0, 0, np.sin(np.pi / 4), np.cos(np.pi / 4)]  # a quarter around z
    nodes = [
        {"children": [1, 2], "translation": [10, 0, 0]},
        {"mesh": 0, "rotation": turn, "scale": [2, 1, 1]},
        {"mesh": 0, "matrix": [-1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 5, 1]},
    ]
    document, binary = triangle_document(nodes=nodes, scenes=[{"nodes": []}, {"nodes": [0]}], scene=1)
    mesh = read_mesh(glb(document, binary))
    expected = [[[10, 0, 0], [10, 2, 0], [9, 0, 0]], [[10, 0, 5], [10, 1, 5], [9, 0, 5]]]
    mesh.vertices = mesh.vertices.round(6)
    assert np.array_equal(triangles(mesh), triangles(trimesh.Trimesh(**trimesh.triangles.to_kwargs(expected))))
    assert np.allclose(mesh.face_normals, [0, 0, 1])  # the mirrored one, too


@pytest.mark.parametrize(("mode", "faces"), [(5, [[0, 1, 2], [1, 3, 2]]), (6, [[0, 1, 2], [0, 2, 3]])])
def test_glb_strips_and_fans(mode, faces):
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], "<f4")
    document, _ = triangle_document(
        accessors=[{"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"}],
        bufferViews=[{"buffer": 0, "byteLength": 48}],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0}, "mode": mode}]}],
    )
    assert np.array_equal(read_mesh(glb(document, points.tobytes())).triangles, points[faces])


def test_glb_of_quantised_interleaved_points():
    rows = np.zeros(3, np.dtype([("point", "<i2", 3), ("pad", "<i2", 3)]))
    rows["point"] = [[0, 0, 0], [32767, 0, 0], [0, -32768, 0]]
    document, _ = triangle_document(
        accessors=[{"bufferView": 0, "componentType": 5122, "count": 3, "type": "VEC3", "normalized": True}],
        bufferViews=[{"buffer": 0, "byteLength": 36, "byteStride": 12}],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0}}]}],
        extensionsRequired=["KHR_mesh_quantization"],
    )
    assert np.array_equal(read_mesh(glb(document, rows.tobytes())).vertices, [[0, 0, 0], [1, 0, 0], [0, -1, 0]])


def test_arrays_and_trimesh_are_read_and_cleaned():
    vertices, faces = TETRAHEDRON
    soup = ([*np.array(vertices)[np.array(faces)].reshape(-1, 3).tolist(), [np.nan] * 3], np.arange(12).reshape(4, 3))
    for source in (TETRAHEDRON, soup, trimesh.Trimesh(*TETRAHEDRON)):
        mesh = read_mesh(source)
        assert mesh.is_watertight
        assert len(mesh.vertices) == 4
        assert len(mesh.faces) == 4
    mesh = read_mesh((vertices, [*faces, [0, 0, 1]]))
    assert len(mesh.faces) == 4  # a face of two corners is none
    assert len(read_mesh((vertices[:3], faces[:1])).faces) == 1  # one triangle is a mesh


@pytest.mark.parametrize(("scale", "move"), [(1, 0), (1e-12, 3e-11), (1e12, -5e12), (2.5, 1000.0)])
def test_the_box_and_back(scale, move):
    mesh = trimesh.creation.torus(1.0, 0.3)
    mesh.vertices = mesh.vertices * scale + move
    boxed, frame = normalise(mesh)
    assert np.abs(boxed.vertices).max() == pytest.approx(BOX_FILL, abs=1e-3)
    assert np.abs(boxed.vertices).max() <= BOX_FILL
    assert np.array_equal(boxed.faces, mesh.faces)
    assert np.allclose(restore(boxed, frame).vertices, mesh.vertices, rtol=0, atol=1e-13 * max(scale, abs(move)))
    corner = np.array([frame.x, frame.y, frame.z]) + frame.scale * boxed.vertices[5]
    assert np.allclose(corner, mesh.vertices[5], rtol=1e-12)


def test_a_place_that_fp32_cannot_hold():
    mesh = trimesh.creation.box()
    mesh.vertices = mesh.vertices + 1e9 + 17
    with pytest.raises(mt.InvalidInput, match="too far for fp32"):
        normalise(mesh)
    with pytest.raises(mt.InvalidInput, match="no faces"):
        normalise(trimesh.Trimesh())


def test_trimesh_reads_what_is_written(tmp_path):
    mesh = trimesh.creation.icosphere(1)
    for suffix in (".glb", ".obj", ".stl", ".ply"):
        write_mesh(mesh, tmp_path / f"a{suffix}")
        found = trimesh.load_mesh(io.BytesIO((tmp_path / f"a{suffix}").read_bytes()), file_type=suffix[1:])
        assert len(found.faces) == 80
        assert found.volume == pytest.approx(mesh.volume, rel=1e-5)
