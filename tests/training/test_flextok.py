"""FlexTok's resampler trains through the shared loop: losses, exact resume, a teacher, export; and FlexAR over it."""

import json

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import InvalidRecipe
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from mediatok.training import flextok
from mediatok.training.export import export_run
from mediatok.training.flextok import FlexTokTrainer
from mediatok.training.flextok_recipe import FlexTokRecipe
from mediatok.training.generator import GeneratorTrainer
from mediatok.training.generator_recipe import GeneratorRecipe
from mediatok.training.recipe import check_recipe
from torch import nn

SIZES = {
    "num_tokens": 4, "levels": [4, 3], "patch_size": 1, "encoder_width": 16, "encoder_depth": 1,
    "encoder_head_width": 8, "decoder_width": 16, "decoder_depth": 2, "decoder_head_width": 8, "num_steps": 2,
    "guidance_scale": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "kl"
    KLAutoencoder(
        image_size=16, latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        scaling_factor=0.7,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def values(pictures, vae, tmp_path):
    return {
        "name": "tiny", "output": str(tmp_path / "run"),
        "model": {"class_name": "FlexTok", "vae": str(vae), "config": SIZES | {"grid": [8, 8]}},
        "data": {"train": str(pictures)},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "run": {"steps": 6, "batch_size": 4, "log_every": 1, "validate_every": 6, "sample_every": 6,
                "checkpoint_every": 3, "num_samples": 2},
    }  # fmt: skip


def run(values):
    trainer = FlexTokTrainer(check_recipe(values, FlexTokRecipe))
    trainer.run()
    return trainer


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_and_its_resumption(values, tmp_path):
    trainer = run(values)
    lines = log_of(tmp_path / "run")
    assert {"flow_loss", "total_loss", "batch_codebook_usage"} <= lines[0].keys()
    assert {"val_flow_loss", "val_psnr", "val_psnr_1_tokens", "val_codebook_usage"} <= lines[-1].keys()
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    exported = mt.load(tmp_path / "run" / "model")
    assert exported.config.scaling_factor == 0.7
    frozen = trainer.raw_model.tokenizer.vae.state_dict()
    assert all(torch.equal(value, exported.vae.state_dict()[key]) for key, value in frozen.items())
    export_run(tmp_path / "run", tmp_path / "again")
    assert mt.load(tmp_path / "again").fingerprint == exported.fingerprint
    # In two halves.
    half = values | {"output": str(tmp_path / "half")}
    first = FlexTokTrainer(check_recipe(half, FlexTokRecipe))
    batches = first.open_batches(0)
    for _ in range(3):
        torch.manual_seed(0)
        first._step(batches)
        first.step += 1
    first.save()
    second = run(half)
    for name, value in trainer.raw_model.state_dict().items():
        torch.testing.assert_close(second.raw_model.state_dict()[name], value)


def test_a_teacher_adds_a_loss(values, monkeypatch, tmp_path):
    class Teacher(nn.Module):
        def forward(self, pixels):
            return torch.ones(len(pixels), 64, 5)

    monkeypatch.setattr(flextok, "build_teacher", lambda name, weights, grid: Teacher())
    values["loss"] = {"teacher": "clip", "features_of": 0}
    run(values)
    lines = log_of(tmp_path / "run")
    assert lines[0]["total_loss"] == pytest.approx(lines[0]["flow_loss"] + lines[0]["teacher_loss"])
    assert "to_teacher" not in " ".join(mt.load(tmp_path / "run" / "model").state_dict())
    values["loss"]["features_of"] = 2
    with pytest.raises(InvalidRecipe, match="features_of"):
        FlexTokTrainer(check_recipe(values | {"output": str(tmp_path / "other")}, FlexTokRecipe))


def test_recipes_that_cannot_be(values):
    for change, reason in (
        ({"vae": None}, "give vae="),
        ({"config": SIZES | {"latent_channels": 3}}, "follows from the VAE"),
        ({"config": SIZES | {"encoder_widht": 3}}, "encoder_width"),
        ({"vae": "titok-tiny"}, "not a KLAutoencoder"),
        ({"init_from": "x"}, "give vae="),
    ):
        with pytest.raises(InvalidRecipe, match=reason):
            FlexTokTrainer(check_recipe(values | {"model": values["model"] | change}, FlexTokRecipe))


def test_next_token_generators_train_over_it(values, pictures, tmp_path):
    values["run"] |= {"steps": 3, "validate_every": 0, "sample_every": 0}
    run(values)
    table = {path.stem: {"category": ["food", "animals"][i % 2]} for i, path in enumerate(sorted(pictures.iterdir()))}
    (tmp_path / "labels.json").write_text(json.dumps(table))
    recipe = {
        "name": "tiny", "output": str(tmp_path / "ar"), "tokenizer": str(tmp_path / "run" / "model"),
        "model": {"class_name": "NextToken",
                  "config": {"width": 16, "depth": 1, "num_heads": 2, "hidden": 16, "guidance_scale": 2.0}},
        "data": {"train": str(pictures), "labels": str(tmp_path / "labels.json")},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "muon": True},
        "run": values["run"] | {"steps": 6, "validate_every": 6, "sample_every": 6, "checkpoint_every": 6},
    }  # fmt: skip
    GeneratorTrainer(check_recipe(recipe, GeneratorRecipe)).run()
    lines = log_of(tmp_path / "ar")
    assert {"accuracy", "total_loss"} <= lines[0].keys()
    generator = mt.load(tmp_path / "ar" / "model")
    assert generator.sample(["food", "animals"], steps=2, seed=0).content.shape == (2, 2)
