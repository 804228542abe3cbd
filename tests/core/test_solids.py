"""Inside and outside against solids whose formula is known, for meshes as they are found in the wild."""

import mediatok as mt
import numpy as np
import pytest
import torch
import trimesh
from mediatok.core.mesh_winding import Winding
from mediatok.core.solids import solid_of

BOX = trimesh.creation.box()
INNER = trimesh.creation.box((0.5, 0.5, 0.5))
MOVE = np.array([0.4, 0.3, 0.2])
POINTS = np.random.default_rng(0).uniform(-1.5, 1.5, (20_000, 3))


def mesh_of(vertices, faces):
    return trimesh.Trimesh(vertices, faces, process=False)


def turned(mesh):
    return mesh_of(mesh.vertices, mesh.faces[:, ::-1])


def moved(mesh, by):
    return mesh_of(mesh.vertices + np.asarray(by), mesh.faces)


def together(*meshes):
    return trimesh.util.concatenate(meshes)


def soup(mesh):
    return mesh_of(mesh.triangles.reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3))


def some_turned(mesh, share=0.5):
    faces = mesh.faces.copy()
    chosen = np.random.default_rng(1).random(len(faces)) < share
    faces[chosen] = faces[chosen][:, ::-1]
    return mesh_of(mesh.vertices, faces)


def without(mesh, is_dropped):
    return mesh_of(mesh.vertices, mesh.faces[~is_dropped])


def panels(gap=1e-4):
    """A box of six sheets that do not touch; every second one faces inward."""
    fine = BOX.subdivide().subdivide()
    sheets = []
    for side in range(6):
        normal = np.eye(3)[side // 2] * (-1) ** side
        triangles = fine.triangles[fine.face_normals @ normal > 0.5]
        sheets.append(normal / 2 + (triangles - normal / 2) * (1 - gap))
    sheets = [sheet[:, ::-1] if side % 2 else sheet for side, sheet in enumerate(sheets)]
    return mesh_of(np.concatenate(sheets).reshape(-1, 3), np.arange(3 * sum(map(len, sheets))).reshape(-1, 3))


def moebius(width=0.3, count=60):
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    edges = [
        np.stack([(1 + s * np.cos(turn / 2)) * f(turn) for f in (np.cos, np.sin)] + [s * np.sin(turn / 2)], axis=1)
        for s in (-width, width)
    ]
    faces = []
    for i in range(count):
        a, b = i, i + count
        c, d = (i + 1, i + 1 + count) if i + 1 < count else (count, 0)
        faces += [[a, c, b], [b, c, d]]
    return mesh_of(np.concatenate(edges), faces)


def in_box(points, at=(0, 0, 0), half=0.5):
    return (np.abs(points - np.asarray(at)) < half).all(axis=1)


def in_both(points):
    return in_box(points) | in_box(points, MOVE)


def in_shell(points):
    return in_box(points) & ~in_box(points, half=0.25)


def nowhere(points):
    return np.zeros(len(points), bool)


SHEET = mesh_of([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
WALL = mesh_of([[0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5]], [[0, 1, 2], [0, 2, 3]])
LID = BOX.face_normals[:, 2] > 0.5
FACES_TWICE = mesh_of(BOX.vertices, np.concatenate([BOX.faces] * 2))
BOTH_SIDES = mesh_of(BOX.vertices, np.concatenate([BOX.faces, BOX.faces[:, ::-1]]))
STACKED = together(BOX, turned(mesh_of(BOX.vertices * [1, 1, -1] + [0, 0, 1], BOX.faces)))  # their common sides match

SOLIDS = {
    "a box": (BOX, in_box, "watertight", ""),
    "turned": (turned(BOX), in_box, "watertight", "faces turned to face outward: 12 of 12"),
    "some faces turned": (some_turned(BOX), in_box, "watertight", "faces turned"),
    "a soup": (soup(BOX), in_box, "watertight", "vertices at the same place joined: 28"),
    "a soup, some faces turned": (some_turned(soup(BOX)), in_box, "watertight", "faces turned"),
    "faces twice": (FACES_TWICE, in_box, "watertight", "repeated faces dropped: 12"),
    "both sides": (BOTH_SIDES, in_box, "watertight", "for both sides, of which one was kept: 12"),
    "overlapping": (together(BOX, moved(BOX, MOVE)), in_both, "watertight", "closed bodies: 2"),
    "overlapping, one turned": (together(BOX, turned(moved(BOX, MOVE))), in_both, "watertight", "outward: 12 of 24"),
    "nested": (together(BOX, INNER), in_box, "watertight", "closed bodies: 2"),
    "hollow": (together(BOX, turned(INNER)), in_shell, "watertight", "hollows: 1"),
    "hollow, turned": (turned(together(BOX, turned(INNER))), in_shell, "watertight", "hollows: 1"),
    "stacked": (STACKED, lambda p: in_box(p) | in_box(p, [0, 0, 1]), "watertight", "touching solids dropped: 2"),
    "sharing an edge": (
        together(BOX, moved(BOX, [1, 1, 0])), lambda p: in_box(p) | in_box(p, [1, 1, 0]), "watertight", "bodies: 2"
    ),
    "without a lid": (without(BOX, LID), in_box, "winding number", "open edges: 4"),
    "without a lid, turned": (turned(without(BOX, LID)), in_box, "winding number", "turned to face outward: 10 of 10"),
    "with a wall inside": (together(BOX, WALL), in_box, "winding number", "open edges: 4"),
    "sheets facing both ways": (panels(), in_box, "filled", "do not agree"),
    "a sheet": (SHEET, nowhere, "winding number", "nothing is inside"),
    "one triangle": (mesh_of(SHEET.vertices[:3], [[0, 1, 2]]), nowhere, "winding number", "nothing is inside"),
    "a Moebius strip": (moebius(), nowhere, "winding number", "one side only: 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLIDS)
def test_inside(name):
    mesh, formula, method, note = SOLIDS[name]
    solid = solid_of(mesh)
    wrong = np.mean(solid.contains(torch.from_numpy(POINTS)).numpy() != formula(POINTS))
    if method == "watertight":
        assert wrong == 0
    else:  # the lid that is not there, and cells of the grid
        assert wrong < 0.002
    assert solid.method == method
    assert note in "; ".join(solid.notes)
    if not note:
        assert solid.notes == ()


def test_round_solids():
    sphere, torus = trimesh.creation.icosphere(4), trimesh.creation.torus(1, 0.3, major_sections=100, minor_sections=50)
    points = torch.from_numpy(POINTS)
    radius = np.linalg.norm(POINTS, axis=1)
    tube = np.hypot(np.hypot(POINTS[:, 0], POINTS[:, 1]) - 1, POINTS[:, 2])
    for mesh, distance in ((sphere, radius - 1), (torus, tube - 0.3)):
        is_clear = np.abs(distance) > 0.01  # a mesh is not quite the round solid
        assert np.array_equal(solid_of(mesh).contains(points).numpy()[is_clear], distance[is_clear] < 0)


def test_a_sphere_with_holes():
    sphere = trimesh.creation.icosphere(4)
    holes = np.random.default_rng(0).random(len(sphere.faces)) < 0.03
    solid = solid_of(without(sphere, holes))
    wrong = solid.contains(torch.from_numpy(POINTS)).numpy() != (np.linalg.norm(POINTS, axis=1) < 1)
    assert solid.method == "winding number"
    assert wrong.mean() < 0.005


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("name", ["hollow", "without a lid", "sheets facing both ways"])
def test_any_scale_and_place(name, scale):
    mesh, formula, method, _ = SOLIDS[name]
    solid = solid_of(mesh_of((mesh.vertices + 3) * scale, mesh.faces))
    wrong = solid.contains(torch.from_numpy((POINTS + 3) * scale)).numpy() != formula(POINTS)
    assert solid.method == method
    assert wrong.mean() < 0.002


def test_points_of_a_grid_that_lines_up_with_edges():
    axis = np.linspace(-1, 1, 17)
    points = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3)
    is_clear = (np.abs(np.abs(points) - 0.5) > 1e-9).all(axis=1)
    for mesh in (BOX, BOX.subdivide().subdivide()):
        found = solid_of(mesh).contains(torch.from_numpy(points)).numpy()
        assert np.array_equal(found[is_clear], in_box(points)[is_clear])


@pytest.mark.parametrize("kind", ["closed", "open", "turned"])
def test_winding_numbers_are_sums_of_solid_angles(kind):
    """Van Oosterom and Strackee's formula over all triangles: what the ray count and the cone must add up to."""
    mesh = trimesh.creation.torus(1, 0.4, major_sections=16, minor_sections=8)
    vertices, faces = np.array(mesh.vertices), np.array(mesh.faces)
    if kind == "open":
        faces = faces[np.random.default_rng(0).random(len(faces)) < 0.6]
    elif kind == "turned":
        faces = np.array(some_turned(mesh, 0.3).faces)
    points = POINTS[:500]
    a, b, c = (vertices[faces[:, i]][None] - points[:, None] for i in range(3))
    la, lb, lc = (np.linalg.norm(x, axis=2) for x in (a, b, c))
    top = np.einsum("nfi,nfi->nf", a, np.cross(b, c))
    bottom = la * lb * lc + (a * b).sum(2) * lc + (b * c).sum(2) * la + (a * c).sum(2) * lb
    expected = 2 * np.arctan2(top, bottom).sum(axis=1) / (4 * np.pi)
    winding = Winding(vertices, faces)
    assert np.abs(winding.at(points) - expected).max() < 1e-10
    assert (winding.num_open_edges == 0) == (kind == "closed")


def test_wrong_points_and_meshes():
    solid = solid_of(BOX)
    for points in (torch.zeros(3), torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises(mt.InvalidInput, match="floating-point"):
            solid.contains(points)
    with pytest.raises(mt.InvalidInput, match="NaN"):
        solid.contains(torch.full((1, 3), float("nan")))
    assert solid.contains(torch.zeros(0, 3)).shape == (0,)
    assert solid.contains(torch.zeros(1, 3, dtype=torch.float16)).tolist() == [True]
    for mesh in (trimesh.Trimesh(), mesh_of([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]])):
        with pytest.raises(mt.InvalidInput, match="no triangle with an area"):
            solid_of(mesh)
    with pytest.raises(mt.InvalidInput, match="NaN"):
        solid_of(mesh_of([[0, 0, 0], [1, 0, 0], [np.nan, 0, 0]], [[0, 1, 2]]))
