"""Shards of shapes and what is drawn from them: true to the meshes, whatever the shapes are turned and stretched by."""

import json

import numpy as np
import pytest
import torch
import trimesh
from mediatok.core.errors import InvalidInput
from mediatok.core.meshes import write_mesh
from mediatok.training.shape_data import (
    Move,
    ShapeDataRecipe,
    ShapeShards,
    TrainingShapes,
    shape_batches,
    validation_shapes,
)
from mediatok.training.shape_shards import main, read_catalogue, write_shards

SURFACE, QUERIES = 512, 1024
HALF = np.array([0.95, 0.475, 0.2375])  # of the box below, once it fills the tokenizers' box


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of four meshes, one of them to validate."""
    path = tmp_path_factory.mktemp("set")
    entries = {}
    for number in range(4):
        split = "val" if number == 3 else "train"
        (path / split).mkdir(exist_ok=True)
        mesh = trimesh.creation.box((4, 2, 1)) if number == 0 else trimesh.creation.icosphere(1, radius=number)
        mesh.apply_translation((5, 0, 0))
        write_mesh(mesh, path / split / f"s{number}.ply")
        entries[f"s{number}"] = {
            "name": f"Shape {number}", "category": "Toys", "object": "shape", "split": split, "faces": len(mesh.faces)
        }  # fmt: skip
    (path / "catalogue.json").write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    assert write_shards(folder, out, SURFACE, QUERIES, say=lambda text: None) == 4
    return out


def recipe(shards, **changes):
    values = {"train": [str(shards)], "points": 128, "uniform_queries": 256, "near_queries": 128} | changes
    return ShapeDataRecipe(**values)


def in_box(places_N3, margin):
    return (np.abs(places_N3) <= HALF + margin).all(axis=-1)


def test_shards_hold_the_box(shards):
    source = ShapeShards((shards,), "train")
    assert [entry.key for entry in source.entries] == ["s0", "s1", "s2"]
    assert source.entries[0].facts["object"] == "shape"
    points_N3, normals_N3 = source.surface(0)
    assert points_N3.shape == normals_N3.shape == (SURFACE, 3)
    on_a_side = np.abs(np.abs(points_N3) - HALF).min(axis=1)
    assert on_a_side.max() < 1e-3
    assert np.allclose(np.abs(normals_N3).max(axis=1), 1)
    assert ((points_N3 * normals_N3).sum(axis=1) > 0).all()  # outward
    for kind in ("uniform", "near"):
        places_M3, inside_M = source.queries(0, kind, 0, QUERIES)
        sure = in_box(places_M3, -1e-4) == in_box(places_M3, 1e-4)
        assert (inside_M == in_box(places_M3, 0))[sure].all()
    share = source.queries(0, "uniform", 0, QUERIES)[1].mean()
    assert share == pytest.approx(HALF.prod(), abs=0.03)
    assert 0.3 < source.queries(0, "near", 0, QUERIES)[1].mean() < 0.7
    around = source.queries(0, "near", QUERIES - 1, 2)
    assert np.array_equal(around[0][1], source.queries(0, "near", 0, 1)[0][0])


def test_shards_are_the_same_with_more_processes(folder, shards, tmp_path):
    write_shards(folder, tmp_path / "again", SURFACE, QUERIES, workers=2, say=lambda text: None)
    names = sorted(path.name for path in shards.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (shards / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_samples_are_true_to_the_moved_shape(shards):
    """The box stays a box under quarter turns, mirrors and stretching; its inside is known for every place."""
    shapes = TrainingShapes(ShapeShards((shards,), "train"), recipe(shards, turned=0.0), seed=3)
    boxes = [position for position in range(12) if shapes.order.index(position) == 0]
    assert len(boxes) == 4
    for position in boxes:
        points_N3, normals_N3, places_Q3, inside_Q = (part.numpy() for part in shapes[position])
        half = np.abs(points_N3).max(axis=0)
        assert half.max() == pytest.approx(0.95, abs=2e-3)
        assert np.allclose(np.linalg.norm(normals_N3, axis=1), 1, atol=1e-5)
        assert ((points_N3 * normals_N3).sum(axis=1) > 0).all()
        assert np.abs(places_Q3).max() <= 1
        truth = (np.abs(places_Q3) <= half).all(axis=1)
        sure = (np.abs(places_Q3 - 0) <= half * 0.99).all(axis=1) | (np.abs(places_Q3) > half * 1.02).any(axis=1)
        assert (inside_Q == truth)[sure].all()
        assert 0.1 < inside_Q[256:].mean() < 0.9


def test_uniform_places_stay_uniform_when_the_shape_is_turned(shards):
    shapes = TrainingShapes(ShapeShards((shards,), "train"), recipe(shards, turned=1.0, min_scale=0.5), seed=0)
    places = torch.cat([shapes[position][2][:256] for position in range(60)]).numpy()
    counts, _ = np.histogramdd(places, bins=4, range=[(-1, 1)] * 3)
    expected = len(places) / 64
    assert np.abs(counts - expected).max() < 5 * expected**0.5 + 0.2 * expected
    corner = (np.abs(places) > 0.8).all(axis=1).mean()  # where the turned box of stored places does not reach
    assert corner == pytest.approx(0.2**3, rel=0.35)


def test_moves():
    rng = np.random.default_rng(0)
    sphere_N3 = rng.normal(size=(2000, 3))
    sphere_N3 /= np.linalg.norm(sphere_N3, axis=1, keepdims=True)
    settings = ShapeDataRecipe(train=["x"], turned=1.0, mirror=1.0, min_scale=0.5)
    move = Move.drawn(sphere_N3, settings, rng)
    moved, normals = move(sphere_N3), move.normals(sphere_N3)
    assert np.abs(moved).max() == pytest.approx(0.95, abs=1e-6)
    assert np.allclose(move.back(moved), sphere_N3, atol=1e-5)
    assert np.linalg.det(move.matrix) < 0
    # A normal is orthogonal to the way to the points nearby, and looks away from the inside.
    step = sphere_N3 + 1e-3 * np.cross(sphere_N3, [0.3, 0.4, 0.5])
    assert np.abs(((move(step) - moved) * normals).sum(axis=1)).max() < 5e-6
    middle = move(np.zeros((1, 3)))
    assert (((moved - middle) * normals).sum(axis=1) > 0).all()
    still = Move.drawn(sphere_N3, ShapeDataRecipe(train=["x"], turned=0.0, mirror=0.0, min_scale=1.0), rng)
    assert set(np.abs(still.matrix).round(9).ravel()) == {0.0, 1.0}


def test_order_depends_on_the_position_alone(shards):
    shapes = TrainingShapes(ShapeShards((shards, shards), "train"), recipe(shards), seed=1)
    assert len(shapes.source) == 6  # named twice, seen twice as often
    later = next(shape_batches(shapes, 3, 2))
    assert all(torch.equal(one, other) for one, other in zip(shapes[6], (part[0] for part in later), strict=True))
    second = next(shape_batches(shapes, 1, 2, process=1, num_processes=2))
    assert torch.equal(second[0], later[0])


def test_validation_shapes_are_as_they_are(shards):
    (batch,) = validation_shapes(ShapeShards((shards,), "val"), recipe(shards), 64)
    assert [tuple(part.shape) for part in batch] == [(1, 128, 3), (1, 128, 3), (1, 128, 3), (1, 128)]
    radius_N = batch[0][0].norm(dim=1)
    assert float(radius_N.max()) == pytest.approx(0.95, abs=0.07)


def test_bad_shards(shards, folder, tmp_path):
    source = ShapeShards((shards,), "train")
    with pytest.raises(InvalidInput, match=r"data\.points is 600"):
        TrainingShapes(source, recipe(shards, points=600), 0)
    with pytest.raises(InvalidInput, match="shape_shards"):
        ShapeShards((tmp_path,), "train")
    with pytest.raises(InvalidInput, match="multiple of 8"):
        write_shards(folder, tmp_path / "out", queries=9)
    index = json.loads((shards / "index.json").read_text())
    for change in ({"format": 2}, {"shapes": {"a": {"shard": "../x", "split": "train"}}}, {"surface": 0}):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(InvalidInput, match="no index"):
            ShapeShards((tmp_path,), "train")
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "shapes-0000.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InvalidInput, match="cannot be read"):
        ShapeShards((tmp_path,), "train").surface(0)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert len(read_catalogue(folder)) == 4
