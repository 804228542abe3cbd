"""Figures of shapes: against analytic answers, with a tokenizer that knows a ball and nothing else."""

import json
import math

import numpy as np
import pytest
import torch
import trimesh
from mediatok.core.errors import InvalidInput
from mediatok.core.meshes import normalise, restore, write_mesh
from mediatok.core.tokens import Tokens
from mediatok.evaluation import shape_generation
from mediatok.evaluation.decimate import cluster_vertices, simplify
from mediatok.evaluation.mesh_packing import pack_mesh, unpack_mesh
from mediatok.evaluation.render import contact_sheet, render_mesh, render_points
from mediatok.evaluation.report import Report, compare
from mediatok.evaluation.shape_distances import SurfacePoints, chamfer, figures_of_nothing, surface_figures
from mediatok.evaluation.shape_generation import evaluate_generated, matching_and_coverage
from mediatok.evaluation.shape_points import intersection_over_union
from mediatok.evaluation.shape_rate import BASELINE, format_points, plot_shape_rate, rate_shapes
from mediatok.evaluation.shapes import evaluate_shapes

RADII = (0.475, 0.95)  # after the first scale, and after both
POINTS = 4000


class BallField:
    device = torch.device("cpu")

    def __init__(self, radius):
        self.radius = radius

    def occupancy(self, xyz_BP3):
        return self.radius - xyz_BP3.norm(dim=2)


class BallTokenizer:
    """Encodes every mesh as a ball that fills the box; `is_empty` decodes nothing."""

    name, fingerprint, modality = "ball", "0" * 16, "shape"
    scales, vocab_size, max_tokens = (1, 2), 16, 3
    dtype, device = torch.float32, torch.device("cpu")
    is_empty = False

    def encode(self, mesh, seed=0):
        return Tokens(
            ids=torch.ones(1, 3, dtype=torch.int64), lengths=torch.tensor([3]), tokenizer=self.name,
            fingerprint=self.fingerprint, vocab_size=16, modality="shape", frames=(normalise(mesh)[1],),
            is_batch=False, scales=self.scales,
        )  # fmt: skip

    def decode_fields(self, tokens, up_to_scale=None):
        num_tokens = int(tokens.lengths[0]) if up_to_scale is None else sum(self.scales[:up_to_scale])
        return [BallField(RADII[num_tokens > 1])]

    def decode(self, tokens, resolution=128):
        if self.is_empty:
            return trimesh.Trimesh()
        radius = self.decode_fields(tokens)[0].radius
        return restore(trimesh.creation.icosphere(4, radius=radius), tokens.frames[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    ball = trimesh.creation.icosphere(4, radius=3)
    ball.apply_translation((10, -5, 2))
    write_mesh(ball, path / "ball.ply")
    write_mesh(trimesh.creation.box((2, 2, 2)), path / "cube.stl")
    return path


def test_a_ball_is_told_from_a_cube(folder, tmp_path):
    seen = []
    report = evaluate_shapes(
        BallTokenizer(), [folder / "ball.ply"], num_points=POINTS, on_step=lambda *args, **kwargs: seen.append(args)
    )  # fmt: skip
    figures = report.figures
    assert seen == [(1, 1)]
    assert figures["IoU (uniform)"] > 0.98
    assert figures["IoU (near)"] > 0.95
    assert figures["CS-IoU"] == pytest.approx(1 / 8, abs=0.02)
    # A surface sampled twice: half of one over the root of the points by area, as the specification's check says.
    density = POINTS / (4 * math.pi * 0.95**2)
    assert figures["Chamfer L1"] == pytest.approx(0.5 / density**0.5, rel=0.1)
    assert figures["F-score at 0.05"] > 0.9
    assert figures["normal consistency"] > 0.98
    assert figures["share of empty meshes"] == 0
    tokens = BallTokenizer().encode(trimesh.creation.box())
    assert figures["bytes (.mtok file)"] == tokens.num_bytes
    assert figures["bytes (ids alone)"] == 1.5
    assert "watertight 1" in " ".join(report.notes)

    both = evaluate_shapes(BallTokenizer(), folder, num_points=POINTS)
    assert both.protocol.num_items == 2
    assert both.protocol.set_name == folder.name
    iou = 2 * both.figures["IoU (uniform)"] - figures["IoU (uniform)"]
    assert iou == pytest.approx(math.pi / 6, abs=0.02)  # a ball in its cube
    both.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert "IoU (uniform)" in compare(both, again)
    with pytest.raises(InvalidInput, match="differently"):
        compare(report, again)
    assert json.loads(both.to_json())["num_tokens"] == 3


def test_the_seed_decides(folder):
    first, same, other = (
        evaluate_shapes(BallTokenizer(), [folder / "cube.stl"], num_points=500, seed=seed).figures for seed in (1, 1, 2)
    )
    assert first["Chamfer L1"] == same["Chamfer L1"] != other["Chamfer L1"]


def test_empty_results_and_bad_meshes(folder):
    tokenizer = BallTokenizer()
    tokenizer.is_empty = True
    errors = []
    report = evaluate_shapes(
        tokenizer, [folder / "cube.stl", folder / "missing.ply"], num_points=500, on_error=lambda *a: errors.append(a)
    )
    assert len(errors) == 1
    assert report.figures["share of empty meshes"] == 1
    assert report.figures["F-score at 0.05"] == 0
    assert "Chamfer L1" not in report.figures
    assert any("Chamfer L1" in note and "without 1 of 1" in note for note in report.notes)
    with pytest.raises(InvalidInput, match="does not exist"):
        evaluate_shapes(tokenizer, [folder / "missing.ply"], num_points=500)
    with pytest.raises(InvalidInput, match="none of the 1"):
        evaluate_shapes(tokenizer, [folder / "missing.ply"], num_points=500, on_error=lambda *a: None)
    with pytest.raises(InvalidInput, match="no meshes"):
        evaluate_shapes(tokenizer, [])
    tokenizer.modality = "image"
    with pytest.raises(InvalidInput, match="no shape tokenizer"):
        evaluate_shapes(tokenizer, folder)


# Distances.


def plane(height, count=2500, tilt=0.0):
    """Points of a square sheet, all in one place of a grid."""
    x, y = (axis.ravel() for axis in np.meshgrid(*[np.linspace(-0.5, 0.5, round(count**0.5))] * 2))
    points = np.stack([x, np.full_like(x, height), y], axis=1).astype(np.float32)
    normal = np.array([math.sin(tilt), math.cos(tilt), 0], dtype=np.float32)
    return SurfacePoints.from_arrays(points, np.broadcast_to(normal, points.shape))


def test_figures_of_parallel_sheets():
    figures = surface_figures(plane(0), plane(0.03, tilt=math.radians(60)))
    assert figures["Chamfer L1"] == pytest.approx(0.03, rel=1e-4)
    assert figures["Chamfer L2"] == pytest.approx(0.03**2, rel=1e-4)
    assert [figures[f"F-score at {t}"] for t in (0.01, 0.02, 0.05)] == [0, 0, 1]
    assert figures["normal consistency"] == pytest.approx(0.5, rel=1e-4)
    assert figures.keys() == figures_of_nothing().keys()
    half = SurfacePoints.from_arrays(plane(0).points_N3[:1250], plane(0).normals_N3[:1250])
    whole = surface_figures(plane(0), half)
    recall = float((plane(0).nearest(half)[0] <= 0.01).mean())
    assert whole["F-score at 0.01"] == pytest.approx(2 * recall / (1 + recall))
    assert chamfer(plane(0), half) == pytest.approx(whole["Chamfer L1"])


def test_intersection_over_union():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert intersection_over_union(a, b) == pytest.approx(1 / 3)
    assert intersection_over_union(~a, a) == 0
    assert intersection_over_union(torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)) == 1


def test_generated_shapes():
    box, ball = trimesh.creation.box((1, 2, 3)), trimesh.creation.icosphere(2)
    other, rod = trimesh.creation.box((1, 2, 2.5)), trimesh.creation.cylinder(0.2, 3)
    report = evaluate_generated([box, ball, trimesh.Trimesh()], [ball, other], [box, rod])
    assert report.empty_share == pytest.approx(1 / 3)
    assert report.coverage == 1
    assert report.copied_share == pytest.approx(0.5)  # the box is one of the training set
    assert report.nearest_training > 0
    assert report.floor_coverage <= 1
    assert "coverage" in str(report)
    assert json.loads(report.to_json())["num_made"] == 3
    with pytest.raises(InvalidInput, match="empty"):
        evaluate_generated([trimesh.Trimesh()], [ball], [box])
    with pytest.raises(InvalidInput, match="heldout"):
        evaluate_generated([ball], [], [box])
    matching, coverage = matching_and_coverage(np.array([[1.0, 3.0], [2.0, 5.0]]))
    assert (matching, coverage) == (2.0, 0.5)


class Sculptor:
    """Makes balls, and remembers what it was asked for."""

    modality, label_names = "shape", ("lamp", "kitchen")

    def generate(self, labels, seed, resolution):
        self.asked = labels
        return [trimesh.creation.icosphere(2) for _ in labels]


def test_generation_is_measured_by_one_command(tmp_path, monkeypatch, capsys):
    entries = {}
    for key, split, kind, category in (
        ("a", "train", "lamp", "Lights"), ("b", "val", "lamp", "Lights"), ("c", "val", "spoon", "Kitchen"),
    ):  # fmt: skip
        (tmp_path / split).mkdir(exist_ok=True)
        write_mesh(trimesh.creation.box((1, 2, 3)), tmp_path / split / f"{key}.ply")
        entries[key] = {"name": key, "split": split, "object": kind, "category": category}
    (tmp_path / "catalogue.json").write_text(json.dumps(entries))
    sculptor = Sculptor()
    monkeypatch.setattr(shape_generation, "load", lambda name: sculptor)
    assert shape_generation.main(["a-sculptor", str(tmp_path)]) == 0
    assert sculptor.asked == ["lamp", "kitchen"]  # the object, or else the category
    report = json.loads(capsys.readouterr().out)
    assert (report["num_made"], report["num_heldout"], report["num_training"]) == (2, 2, 1)
    for change, words in (
        ({"label_names": ("sofa",)}, "neither the object nor the category of 'b'"),
        ({"label_names": ()}, "makes no labelled shapes"),
    ):
        for name, value in change.items():
            setattr(sculptor, name, value)
        assert shape_generation.main(["a-sculptor", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


# Rate.


def test_rate(folder, tmp_path):
    points = rate_shapes(BallTokenizer(), [folder / "ball.ply", folder / "cube.stl"], num_points=500)
    assert [point.bytes for point in points] == sorted(point.bytes for point in points)
    own = [point for point in points if point.codec == "ball"]
    assert [point.setting for point in own] == ["1 scale, 1 tokens", "2 scales, 3 tokens"]
    assert own[0].figures["IoU (uniform)"] < own[1].figures["IoU (uniform)"]
    baseline = [point for point in points if point.codec == BASELINE]
    assert baseline
    assert all(point.figures["share of empty meshes"] == 0 for point in baseline)
    assert "F-score at 0.05" in format_points(points)
    plot_shape_rate(points, tmp_path / "rate.png")
    assert (tmp_path / "rate.png").stat().st_size > 1000


@pytest.mark.parametrize("bits", [3, 8, 11])
def test_packed_meshes_come_back_rounded(bits):
    mesh, frame = normalise(trimesh.creation.torus(2, 0.7, major_sections=16, minor_sections=8))
    data = pack_mesh(mesh, frame, bits)
    unpacked, its_frame = unpack_mesh(data)
    assert its_frame == frame
    steps = 2**bits - 1
    rounded = ((np.asarray(mesh.vertices) + 1) / 2 * steps).round() / steps * 2 - 1
    corners = rounded[np.asarray(mesh.faces)]
    whole = np.array([len(np.unique(face.round(6), axis=0)) == 3 for face in corners])
    expected = {_cycle(face) for face in corners[whole]}
    assert {_cycle(face) for face in unpacked.triangles} == expected
    if bits == 11:
        assert unpacked.is_watertight
        assert unpacked.volume == pytest.approx(mesh.volume, rel=0.01)  # the faces still look outward


def _cycle(face):
    """The corners of a face in their order, from the smallest on."""
    corners = [tuple(corner) for corner in (np.asarray(face) * 1e4).round().astype(int)]
    first = corners.index(min(corners))
    return tuple(corners[first:] + corners[:first])


def test_meshes_too_large_or_too_small_to_pack():
    mesh, frame = normalise(trimesh.creation.box())
    assert pack_mesh(mesh, frame, 1) is not None
    mesh.vertices = np.asarray(mesh.vertices) * 1e-3 + 0.2
    assert pack_mesh(mesh, frame, 4) is None


def test_simplified_meshes():
    box = trimesh.creation.box((1, 2, 3)).subdivide().subdivide()
    (small,) = simplify(box, [12])
    assert len(small.faces) == 12
    assert small.volume == pytest.approx(6, rel=0.01)
    ball = trimesh.creation.icosphere(5)  # more faces than are collapsed one by one
    more, fewer = simplify(ball, [100, 1000])
    assert (len(more.faces), len(fewer.faces)) == (1000, 100)
    assert more.is_watertight
    assert more.volume == pytest.approx(4 / 3 * math.pi, rel=0.03)
    assert fewer.volume == pytest.approx(4 / 3 * math.pi, rel=0.12)
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    (sheet_again,) = simplify(sheet.subdivide().subdivide(), [2])
    assert sheet_again.area == pytest.approx(1, rel=0.01)  # its border is kept
    vertices, faces = cluster_vertices(np.asarray(ball.vertices), np.asarray(ball.faces), 8)
    assert len(vertices) < 400
    assert np.abs(np.linalg.norm(vertices, axis=1) - 1).max() < 0.1
    assert faces.max() < len(vertices)


# Pictures.


def test_renders():
    front = trimesh.creation.box((0.4, 0.4, 0.4))
    front.apply_translation((0, 0, 0.6))
    wall = trimesh.creation.box((1.8, 1.8, 0.1))
    wall.apply_translation((0, 0, -0.6))
    picture = render_mesh(trimesh.util.concatenate([front, wall]), 64, azimuth=0, elevation=0)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert (picture[0] == 255).all()
    assert (picture[20:44, 20:44] < 255).all()  # no holes
    turned = render_mesh(front, 64, azimuth=90, elevation=0)
    assert (turned[32, :32, 0] < 255).sum() > (turned[32, 32:, 0] < 255).sum()  # z to the left, seen from x
    assert (render_mesh(trimesh.Trimesh(), 16) == 255).all()
    one = render_points(np.zeros((1, 3)), np.array([[0.0, 0, 1]]), 16, splat=3)
    assert (one[:, :, 0] < 255).sum() == 9
    assert contact_sheet([[one, one], [one, one]]).shape == (32, 32, 3)
