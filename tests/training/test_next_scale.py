"""Next-scale generators train through the common loop: exact resume, labels, views that are encoded once, export."""

import copy
import json
import math
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import torch
import trimesh
import yaml
from mediatok.core.meshes import BOX_FILL, write_mesh
from mediatok.tokenizers.shape.vat import VAT
from mediatok.training import generator, next_scale_training
from mediatok.training.checkpoint import load_checkpoint, whole_checkpoints
from mediatok.training.export import export_run
from mediatok.training.generator_recipe import is_generator_recipe
from mediatok.training.next_scale_recipe import NextScaleDataRecipe, NextScaleRecipe, load_next_scale_recipe
from mediatok.training.next_scale_training import (
    LabelledShapes,
    NextScaleTrainer,
    class_names,
    encode_views,
    shape_labels,
    view_of,
)
from mediatok.training.recipe import check_recipe
from mediatok.training.shape_data import ShapeShards
from mediatok.training.shape_shards import write_shards
from mediatok.training.tracker import read_log

FIELDS = ("category", "object")


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of boxes and cylinders (four to train on, one to validate, of each), and a small VAT."""
    path = tmp_path_factory.mktemp("solids")
    entries = {}
    for number in range(10):
        split = "train" if number < 8 else "val"
        (path / "set" / split).mkdir(parents=True, exist_ok=True)
        box, size = number % 2 == 0, 1 + number / 8
        mesh = trimesh.creation.box((1, size, 2)) if box else trimesh.creation.cylinder(1, size, sections=12)
        write_mesh(mesh, path / "set" / split / f"s{number}.ply")
        entries[f"s{number}"] = {
            "name": "Solid", "category": "Solids", "object": "Box" if box else "cylinder", "split": split
        }  # fmt: skip
    del entries["s1"]["object"]
    (path / "set" / "catalogue.json").write_text(json.dumps(entries))
    write_shards(path / "set", path / "shards", 128, 8, say=lambda text: None)
    torch.manual_seed(0)
    VAT(
        num_points=64, num_features=16, width=32, num_heads=2, encoder_depth=1, decoder_depth=1, scales=(1, 2, 4),
        codebook_size=16, code_width=4, plane_size=2, plane_channels=(32, 32), head_width=8,
    ).save_pretrained(path / "vat")  # fmt: skip
    return path


@pytest.fixture
def source(folder):
    return ShapeShards((folder / "shards",), "train")


@pytest.fixture
def values(folder, tmp_path):
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "tokenizer": str(folder / "vat"),
        "model": {"class_name": "NextScale", "config": {"width": 32, "depth": 1, "num_heads": 2, "dropout": 0.1}},
        "data": {"train": [str(folder / "shards")], "views": 3},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2, "muon": True},
        "run": {"steps": 8, "batch_size": 4, "log_every": 1, "validate_every": 4, "sample_every": 8,
                "checkpoint_every": 1, "num_samples": 2, "keep_checkpoints": 20, "sample_resolution": 8},
    }  # fmt: skip


def run(values, output, stop_at=None):
    values = copy.deepcopy(values) | {"output": str(output)}
    trainer = NextScaleTrainer(check_recipe(values, NextScaleRecipe))
    save = trainer.save

    def save_and_stop():
        save()
        if trainer.step == stop_at:
            raise Interrupted

    trainer.save = save_and_stop
    if stop_at is None:
        trainer.run()
    else:
        with pytest.raises(Interrupted):
            trainer.run()
    return load_checkpoint(whole_checkpoints(Path(output) / "checkpoints")[-1])


def test_resumed_runs_end_bit_for_bit_alike_and_make_shapes(values, folder, tmp_path):
    tensors, _ = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at=3)
    again, _ = run(values, tmp_path / "parts")
    for part, named in tensors.items():
        for name, value in named.items():
            assert torch.equal(value, again[part][name]), f"{part}: {name}"
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert all(math.isfinite(line[key]) for line in log for key in line)
    assert {"val_loss", "val_accuracy", "val_last_scale_loss"} <= {key for line in log for key in line}
    assert (tmp_path / "whole" / "samples" / "step_00000008.png").is_file()
    model = mt.load(tmp_path / "whole" / "model")
    assert model.label_names == ("solids", "box", "cylinder")
    assert model.config.tokenizer_fingerprint == model.tokenizer.fingerprint == mt.load(folder / "vat").fingerprint
    assert len(model.generate(["box", "cyl"], seed=0, resolution=8)) == 2
    exported = mt.load(export_run(tmp_path / "whole", tmp_path / "out", "int6"))
    assert exported.label_names == model.label_names


def test_the_command_for_generators_trains_it(values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert is_generator_recipe(path)
    assert generator.main([str(path), "run.steps=3", f"output={tmp_path / 'run'}"]) == 0
    assert type(mt.load(tmp_path / "run" / "model")).__name__ == "NextScale"


def test_it_learns(values, tmp_path):
    values["run"] |= {"steps": 120, "log_every": 20, "checkpoint_every": 0, "sample_every": 0, "validate_every": 0}
    values["model"]["config"]["dropout"] = 0.0
    values["data"]["views"] = 1
    run_of = NextScaleTrainer(check_recipe(values | {"output": str(tmp_path / "run")}, NextScaleRecipe))
    run_of.run()
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["total_loss"] < 0.1 * math.log(16)


def test_a_later_run_starts_from_a_model_and_keeps_what_classes_learned(values, tmp_path):
    run(values, tmp_path / "first")
    values["model"] = {"class_name": "NextScale", "init_from": str(tmp_path / "first" / "model")}
    values["data"]["label_fields"] = ["object"]
    trainer = NextScaleTrainer(check_recipe(values, NextScaleRecipe))
    before = mt.load(tmp_path / "first" / "model")
    table, _ = before.class_rows()
    assert trainer.raw_model.label_names == ("box", "cylinder")
    assert torch.equal(trainer.raw_model.get_parameter(table), before.get_parameter(table)[[1, 2, 3]])


def test_alike_codes_begin_with_alike_chances(values, folder):
    """Distances between rows of the head are those of the codes, but for one factor."""
    trainer = NextScaleTrainer(check_recipe(copy.deepcopy(values), NextScaleRecipe))
    rows = trainer.raw_model.transformer.head.weight.detach()
    wanted, found = (torch.pdist(part) for part in (mt.load(folder / "vat").quantize.codebook.detach(), rows))
    torch.testing.assert_close(found / found.mean(), wanted / wanted.mean(), rtol=1e-3, atol=1e-3)


def test_labels_are_those_of_all_fields(source):
    names = class_names(source, FIELDS)
    assert names == ("solids", "box", "cylinder")
    labels = shape_labels(source, names, FIELDS)
    assert labels.tolist() == [[0, 1], [0, 3], [0, 1], [0, 2], [0, 1], [0, 2], [0, 1], [0, 2]]
    assert shape_labels(source, ("box",), ("object",))[:4, 0].tolist() == [0, 1, 0, 1]
    with pytest.raises(mt.InvalidRecipe, match="no shape to train on has colour"):
        class_names(source, ("colour",))


def test_views_are_stretched_mirrored_and_in_the_box(source):
    recipe = NextScaleDataRecipe(train=(Path(),), mirror=1.0, min_scale=0.5)
    plain, normals = view_of(source, 0, 0, recipe, 64)
    assert np.allclose(plain, source.surface(0)[0][:64])
    assert np.allclose(normals, source.surface(0)[1][:64])
    moved, turned = view_of(source, 0, 1, recipe, 128)
    assert moved.dtype == turned.dtype == torch.float32
    assert float(moved.abs().max()) == pytest.approx(BOX_FILL, abs=0.02)
    torch.testing.assert_close(turned.norm(dim=1), torch.ones(128))
    assert torch.equal(view_of(source, 0, 1, recipe, 128)[0], moved)
    assert not torch.equal(view_of(source, 0, 2, recipe, 128)[0], moved)
    # A normal of a box's side still looks away from its middle.
    assert bool(((moved * turned).sum(dim=1) > 0).all())


def test_views_are_encoded_once(source, folder, tmp_path, monkeypatch):
    vat, recipe = mt.load(folder / "vat"), NextScaleDataRecipe(train=(Path(),), views=3)
    ids = encode_views(source, vat, recipe, tmp_path / "ids.safetensors")
    assert ids.shape == (8, 3, 7)
    assert torch.equal(ids[2, 1], vat.encode_points(*(part[None] for part in view_of(source, 2, 1, recipe, 64)))[0])
    monkeypatch.setattr(next_scale_training, "view_of", lambda *args: pytest.fail("encoded again"))
    assert torch.equal(encode_views(source, vat, recipe, tmp_path / "ids.safetensors"), ids)
    monkeypatch.undo()
    fewer = encode_views(source, vat, recipe.model_copy(update={"views": 2}), tmp_path / "ids.safetensors")
    assert torch.equal(fewer, ids[:, :2])
    (tmp_path / "ids.safetensors").write_bytes(b"cut short")
    assert torch.equal(encode_views(source, vat, recipe, tmp_path / "ids.safetensors"), ids)


def test_the_order_needs_no_state_and_is_split_among_processes(source):
    ids = torch.arange(8)[:, None, None] * 10 + torch.arange(2)[:, None]
    shapes = LabelledShapes(source, ids, np.arange(16).reshape(8, 2), seed=0)
    one = shapes.batches(0, 4, 0, 1)
    rows = [next(one) for _ in range(8)]
    halves = [next(shapes.batches(0, 2, process, 2)) for process in (0, 1)]
    assert torch.equal(torch.cat([half[0] for half in halves]), rows[0][0])
    assert torch.equal(next(shapes.batches(5, 4, 0, 1))[1], rows[5][1])
    seen, labels = torch.cat([row[0] for row in rows])[:, 0], torch.cat([row[1] for row in rows])
    assert sorted((seen[:8] // 10).tolist()) == list(range(8))  # every shape once an epoch
    assert torch.equal(labels // 2, seen // 10)
    assert set((seen % 10).tolist()) == set((labels % 2).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("model", {"config": {"scales": [1, 2]}}, "but the data say"),
        ("model", {"config": {"widht": 8}}, "Did you mean 'width'"),
        ("model", {"config": {"width": 33}}, "not divisible"),
        ("data", {"label_fields": ["colour"]}, "no shape to train on has colour"),
    ],
)
def test_what_does_not_fit_is_told(values, section, change, words):
    values[section] |= change
    with pytest.raises(mt.InvalidRecipe, match=words):
        NextScaleTrainer(check_recipe(values, NextScaleRecipe))


def test_other_tokenizers_are_refused(values):
    with pytest.raises(mt.InvalidRecipe, match="titok-tiny is a TiTok, none of shapes"):
        NextScaleTrainer(check_recipe(values | {"tokenizer": "titok-tiny"}, NextScaleRecipe))


def test_the_shipped_recipe():
    path = Path(mt.__file__).parent / "recipes" / "vat-gen-tiny.yaml"
    recipe = load_next_scale_recipe(path, ["run.steps=200"])
    assert (recipe.run.steps, recipe.tokenizer) == (200, "vat-tiny")
    with pytest.raises(mt.InvalidRecipe, match="Did you mean 'views'"):
        load_next_scale_recipe(path, ["data.vews=2"])
