"""A shape tokenizer's run: exact resume through all of its phases, codes that stay in use, bad recipes."""

import copy
import json
import math
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from mediatok.core.base import TokenizerOutput
from mediatok.core.meshes import write_mesh
from mediatok.nn.gaussian import DiagonalGaussian
from mediatok.nn.multiscale_vq import MultiScaleQuantizer
from mediatok.tokenizers.shape.vat import VAT
from mediatok.training.checkpoint import load_checkpoint, whole_checkpoints
from mediatok.training.recipe import check_recipe
from mediatok.training.schedule import WeightAverage
from mediatok.training.shape import ShapeTrainer, shape_loss
from mediatok.training.shape_codes import CodebookRevival, place_codes
from mediatok.training.shape_data import ShapeShards
from mediatok.training.shape_recipe import ShapeLossRecipe, ShapeRecipe, is_shape_recipe, load_shape_recipe
from mediatok.training.shape_shards import write_shards
from mediatok.training.shape_threshold import fit_threshold
from mediatok.training.tracker import read_log

SIZES = {
    "num_points": 64, "num_features": 16, "width": 32, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1,
    "scales": [1, 2, 4], "codebook_size": 16, "code_width": 4, "plane_size": 2, "plane_channels": [32, 32],
    "head_width": 8,
}  # fmt: skip
RECIPES = Path(mt.__file__).parent / "recipes"


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Boxes of several proportions: six to train on, two to validate."""
    path = tmp_path_factory.mktemp("boxes")
    entries = {}
    for number in range(8):
        split = "val" if number in (2, 5) else "train"
        (path / "set" / split).mkdir(parents=True, exist_ok=True)
        write_mesh(trimesh.creation.box((1, 1 + number / 4, 2)), path / "set" / split / f"b{number}.ply")
        entries[f"b{number}"] = {"name": "Box", "category": "Boxes", "object": "box", "split": split}
    (path / "set" / "catalogue.json").write_text(json.dumps(entries))
    write_shards(path / "set", path / "shards", 128, 256, say=lambda text: None)
    return path / "shards"


@pytest.fixture
def values(shards, tmp_path):
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "model": {"config": SIZES, "continuous_steps": 3, "partial_share": 0.5, "revive_codes": True},
        "data": {"train": [str(shards)], "points": 64, "uniform_queries": 32, "near_queries": 32},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "muon": True},
        "run": {"steps": 8, "batch_size": 4, "log_every": 1, "validate_every": 2, "sample_every": 8,
                "checkpoint_every": 1, "num_samples": 2, "keep_checkpoints": 20, "val_queries": 64,
                "sample_resolution": 8},
    }  # fmt: skip


def run(values, output, stop_at=None):
    values = copy.deepcopy(values) | {"output": str(output)}
    trainer = ShapeTrainer(check_recipe(values, ShapeRecipe))
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


@pytest.mark.parametrize("stop_at", [2, 3, 6])  # without quantization; just before the codes are placed; with codes
def test_resumed_runs_end_bit_for_bit_alike(values, tmp_path, stop_at):
    tensors, _ = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at)
    again, _ = run(values, tmp_path / "parts")
    assert tensors.keys() == again.keys() >= {"model", "ema", "optimizer", "code_revival"}
    for part, named in tensors.items():
        for name, value in named.items():
            assert torch.equal(value, again[part][name]), f"{part}: {name}"
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert all(math.isfinite(line[key]) for line in log for key in line)
    assert "quantizer_loss" not in log[0]
    measured = [line for line in log if "val_iou" in line]
    assert "val_codebook_usage" not in measured[0]
    assert {"val_near_iou", "val_near_accuracy", "val_codebook_usage"} <= measured[-1].keys()
    assert (tmp_path / "whole" / "samples" / "step_00000008.png").is_file()
    model = mt.load(tmp_path / "whole" / "model")
    assert torch.equal(model.quantize.codebook, tensors["ema"]["quantize.codebook"])
    assert len(model.encode(trimesh.creation.box()).ids[0]) == 7


def test_workers_change_nothing(values, tmp_path):
    plain, _ = run(values, tmp_path / "plain")
    values["data"]["num_workers"] = 1
    again, _ = run(values, tmp_path / "workers")
    assert all(torch.equal(value, again["model"][name]) for name, value in plain["model"].items())


def test_lookup_free_codes_need_no_placing(values, tmp_path):
    values["model"]["config"] = SIZES | {"lookup_free": True, "resample": "query"}
    tensors, _ = run(values, tmp_path / "run")
    assert "code_revival" not in tensors


def test_it_learns(values, tmp_path):
    """Boxes of one family are told apart from air within a few steps."""
    sizes = SIZES | {"plane_size": 4, "head_width": 16}
    values["model"] |= {"config": sizes, "continuous_steps": 120, "partial_share": 0.0}
    values["loss"] = {"kl_weight": 1e-6}  # four latents alone would rather say nothing
    values["data"] |= {"mirror": 0.0, "turned": 0.0, "min_scale": 1.0, "uniform_queries": 128}
    values["run"] |= {"steps": 180, "batch_size": 6, "validate_every": 180, "sample_every": 0, "checkpoint_every": 0}
    values["optimizer"] |= {"lr": 5e-3, "ema_decay": 0.9}
    trainer = ShapeTrainer(check_recipe(values | {"output": str(tmp_path / "run")}, ShapeRecipe))
    trainer.run()
    log = read_log(tmp_path / "run" / "log.jsonl")
    losses = [line["uniform_loss"] for line in log if "uniform_loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert next(line["val_iou"] for line in log if "val_iou" in line) > 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"like": "vat-681"}}, "vat-681"),
        ({"model": {"config": SIZES | {"scale": [1]}}}, "scales"),
        ({"model": {"config": SIZES | {"scales": [4, 1]}}}, "growing"),
        ({"model": {"init_from": "somewhere", "config": SIZES}}, "its own sizes"),
        ({"data": {"points": 8}}, "num_features"),
        ({"data": {"near_queries": 257}}, "near_queries"),
        ({"data": {"train": ["nowhere"]}}, "shape_shards"),
        ({"data": {"train": []}}, "train"),
        ({"loss": {"kl_weigth": 1}}, "kl_weight"),
        ({"optimizer": {"warmup_steps": 8}}, "below run.steps"),
    ],
)
def test_bad_recipes(values, change, words):
    for section, settings in change.items():
        values[section] = (values.get(section, {}) if section != "model" else {}) | settings
    with pytest.raises(mt.MediatokError, match=words):
        ShapeTrainer(check_recipe(values, ShapeRecipe))


@pytest.mark.parametrize("name", ["vat-tiny", "vat-680"])
def test_shipped_recipes(name):
    recipe = load_shape_recipe(RECIPES / f"{name}.yaml")
    assert recipe.name == name
    assert is_shape_recipe(RECIPES / f"{name}.yaml")
    assert not is_shape_recipe(RECIPES / "titok-tiny.yaml")


def test_losses_are_as_written():
    torch.manual_seed(0)
    parameters, logits, inside = torch.randn(2, 8, 1, 3), torch.randn(2, 10), torch.rand(2, 10) < 0.5
    gaussian = DiagonalGaussian(parameters)
    loss, metrics = shape_loss(
        TokenizerOutput(logits, posterior=gaussian), inside, 6, ShapeLossRecipe(near_weight=0.3, kl_weight=0.2)
    )  # fmt: skip
    uniform = F.binary_cross_entropy_with_logits(logits[:, :6], inside[:, :6].float())
    near = F.binary_cross_entropy_with_logits(logits[:, 6:], inside[:, 6:].float())
    mean, logvar = parameters.chunk(2, dim=1)
    kl = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).mean()
    assert torch.allclose(loss, uniform + 0.3 * near + 0.2 * kl)
    assert metrics.keys() == {"total_loss", "uniform_loss", "near_loss", "kl", "accuracy"}
    assert float(metrics["accuracy"]) == pytest.approx(float(((logits >= 0) == inside).float().mean()))


# Codes.


def test_placed_codes_are_all_used_and_fit_better():
    torch.manual_seed(0)
    quantize = MultiScaleQuantizer(16, 4, (1, 2, 8))
    z_BLC = 0.3 * torch.randn(40, 8, 4) + 1
    before = quantize(z_BLC)[1].codebook_loss
    place_codes(quantize, z_BLC, torch.Generator().manual_seed(0))
    output = quantize(z_BLC)[1]
    assert float(output.codebook_loss.detach()) < float(before.detach())
    assert len(output.ids_BS.unique()) == 16


def test_idle_codes_are_revived():
    torch.manual_seed(0)
    quantize = MultiScaleQuantizer(32, 4, (1, 2, 8)).train()
    quantize.codebook.data[8:] += 100  # never nearest
    revival = CodebookRevival(quantize)
    z_BLC = torch.randn(16, 8, 4)
    moved = 0
    for _ in range(8):
        quantize(z_BLC)
        now = int(revival.step())
        assert len(revival.moved["codebook"]) == now
        moved += now
    assert moved >= 24
    assert float(quantize.codebook.detach().abs().max()) < 50
    assert len(quantize(z_BLC)[0].unique()) > 8
    other = CodebookRevival(quantize)
    other.load_state_dict(revival.state_dict())
    assert torch.equal(other.idle_K, revival.idle_K)
    quantize.eval()
    quantize(z_BLC)
    assert int(other.step()) == 0  # evaluation does not count
    assert not other.moved


def test_the_average_follows_revived_codes():
    torch.manual_seed(0)
    quantize = MultiScaleQuantizer(32, 4, (1, 2, 8))
    average = WeightAverage(quantize, 0.999)
    for _ in range(3):
        average.step(quantize)
    before = average.state_dict()["codebook"].clone()
    quantize.codebook.data[[3, 5]] += 10
    average.restart_rows(quantize, {"codebook": torch.tensor([3])})
    after = average.state_dict()["codebook"]
    assert torch.equal(after[3], quantize.codebook[3].detach())
    assert torch.equal(after[[*range(3), *range(4, 32)]], before[[*range(3), *range(4, 32)]])


def test_the_threshold_is_moved_to_where_iou_is_best(shards):
    """A field that says -0.65 inside and -3 outside: all from -0.7 to -2 are as good, and the highest is taken."""
    source = ShapeShards((shards,), "train")

    class Field:
        def __init__(self, model):
            self.model = model

        def occupancy(self, places_BQ3):
            inside_BQ = (places_BQ3.abs() < torch.tensor([0.95, 0.4, 0.2])).all(dim=2)
            return torch.where(inside_BQ, -0.65, -3.0) + self.model.head.last.bias

    model = VAT(**SIZES)
    model.head.last.bias.data.zero_()
    model.decode_ids = lambda ids_BS: Field(model)
    assert fit_threshold(model, source, 64) == pytest.approx(-0.7)
    assert model.head.last.bias.item() == pytest.approx(0.7)
    assert fit_threshold(model, source, 64) == 0
