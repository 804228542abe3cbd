"""Losses, perceptual networks and whole runs of every stage; tests/convert compares with the authors' numbers."""

import json
import math

import pytest
import torch
from mediatok.core.errors import InvalidCheckpoint, InvalidRecipe, ModelNotFound
from mediatok.core.registry import load
from mediatok.nn.efficientnet_lite import EfficientNetLite0
from mediatok.tokenizers.image.maskgit_vqgan import MaskGitVQGAN
from mediatok.training.curves import main as curves_main
from mediatok.training.discriminator import PatchDiscriminator
from mediatok.training.export import export_run
from mediatok.training.export import main as export_main
from mediatok.training.perceptual import FeatureDistance, build_perceptual
from mediatok.training.recipe import check_recipe
from mediatok.training.schedule import NO_DECAY, NO_DECAY_TITOK, cosine_lr, make_optimizer
from mediatok.training.tokenizer import TokenizerTrainer
from mediatok.training.tracker import read_log
from mediatok.training.validate import code_usage
from safetensors.torch import save_file


def test_feature_distance_grows_with_damage():
    torch.manual_seed(0)
    network = EfficientNetLite0()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    distance = FeatureDistance(network)
    real = torch.rand(2, 3, 32, 32)
    noise = torch.randn_like(real)
    values = [distance(real + level * noise, real) for level in (0, 0.02, 0.2)]
    assert values[0].abs().max() == 0
    assert bool((values[1] < values[2]).all())
    fake = (real + 0.1 * noise).requires_grad_()
    distance(fake, real).mean().backward()
    assert fake.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_efficientnet_file_round_trip(tmp_path):
    network = EfficientNetLite0()
    network.save_file(tmp_path / "e.safetensors")
    pixels = torch.rand(1, 3, 40, 56)
    assert torch.equal(EfficientNetLite0.from_file(tmp_path / "e.safetensors")(pixels), network(pixels))


@pytest.mark.parametrize("suffix", [".pth", ".whl", ".safetensors"])
def test_files_that_are_no_weights(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(InvalidCheckpoint):
        EfficientNetLite0.from_file(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(InvalidCheckpoint):
        EfficientNetLite0.from_file(tmp_path / "y.safetensors")


@pytest.mark.parametrize("name", ["lpips", "convnext_s", "lpips-convnext_s-1.0-0.1", "efficientnet_lite0"])
def test_missing_perceptual_weights_say_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="make data"):
        build_perceptual(name, {})


def test_unknown_perceptual_loss():
    with pytest.raises(InvalidRecipe, match="efficientnet_lite0"):
        build_perceptual("efficientnet_lite", {})
    assert build_perceptual("none", {}) is None


def test_discriminator_has_the_published_size():
    assert sum(value.numel() for value in PatchDiscriminator().state_dict().values()) == 1_909_937
    assert PatchDiscriminator(32, 2)(torch.rand(1, 3, 40, 24)).shape == (1, 1, 16, 16)


def test_cosine_lr():
    rates = [cosine_lr(step, 1e-4, 1e-5, 10, 100) for step in range(101)]
    assert rates[0] == 0
    assert rates[10] == 1e-4
    assert rates[100] == pytest.approx(1e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_weight_decay_lists():
    module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("patch_embed", "ln_pre", "proj")})
    decayed = {}
    for kind, names in (("titok", NO_DECAY_TITOK), ("one-d-piece", NO_DECAY)):
        optimizer = make_optimizer(module.named_parameters(), 1e-3, (0.9, 0.99), 0.1, names)
        groups = {group["weight_decay"]: set(map(id, group["params"])) for group in optimizer.param_groups}
        decayed[kind] = {name for name, value in module.named_parameters() if id(value) in groups[0.1]}
    assert decayed == {"titok": {"proj.weight"}, "one-d-piece": {"proj.weight", "patch_embed.weight"}}


def test_code_usage():
    usage = code_usage(torch.tensor([[0, 1], [2, 3]]), 8)
    assert usage["codebook_usage"] == 0.5
    assert usage["codebook_perplexity"] == pytest.approx(4)


# Whole runs


def train(values):
    TokenizerTrainer(check_recipe(values)).run()
    return read_log(json_path(values))


def json_path(values):
    from pathlib import Path

    return Path(values["output"]) / "log.jsonl"


def test_single_stage_run_learns_and_exports(recipe_values, tmp_path):
    recipe_values["run"] |= {"steps": 60, "validate_every": 30, "sample_every": 60, "export_dtype": "float16"}
    recipe_values["optimizer"] |= {"lr": 3e-3}
    log = train(recipe_values)
    losses = [line["reconstruction_loss"] for line in log if "reconstruction_loss" in line]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    values = [line for line in log if "val_psnr" in line]
    assert [line["step"] for line in values] == [30, 60]
    assert 0 < values[-1]["val_codebook_usage"] <= 1
    output = tmp_path / "run"
    assert (output / "samples" / "step_00000060.png").is_file()
    assert list((output / "tensorboard").iterdir())
    model = load(str(output / "model"))
    assert model.config.clustering is False
    ids = model.encode_pixels(torch.rand(2, 3, 16, 16))
    assert model.decode_ids(ids).shape == (2, 3, 16, 16)
    export_run(output, tmp_path / "again")
    again = load(str(tmp_path / "again"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert export_main([str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2


def test_two_stages(recipe_values, tmp_path):
    """Stage 1 to proxy codes, stage 2 from its model: the decoders move, encoder and codebook do not."""
    torch.manual_seed(0)
    vqgan = MaskGitVQGAN(hidden_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=16)
    vqgan.save_pretrained(tmp_path / "vqgan")
    first = json.loads(json.dumps(recipe_values))
    first["model"] |= {"class_name": "OneDPiece", "stage": "1", "vqgan": str(tmp_path / "vqgan")}
    first["model"]["config"] |= {"encoder_patch_size": 2, "decoder_patch_size": 2, "clustering": False}
    first["run"] |= {"steps": 10, "validate_every": 10, "sample_every": 10}
    first["output"] = str(tmp_path / "one")
    log = train(first)
    assert log[0]["reconstruction_loss"] == pytest.approx(math.log(1024), abs=0.5)
    second = json.loads(json.dumps(first))
    second["output"] = str(tmp_path / "two")
    second["model"] |= {"stage": "2", "config": {}, "init_from": str(tmp_path / "one" / "model")}
    second["model"]["gradient_checkpointing"] = True
    second["loss"] |= {"quantizer_weight": 0.0, "discriminator_weight": 0.01, "discriminator_start": 5}
    log = train(second)
    assert {"reconstruction_loss", "discriminator_loss"} <= log[-2].keys() | log[-3].keys()
    before, after = (load(str(tmp_path / name / "model")).state_dict() for name in ("one", "two"))
    for name, value in before.items():
        is_frozen = name.startswith(("encoder.", "quantize.", "latent_tokens"))
        if is_frozen or name == "decoder.mask_token":
            assert torch.equal(value, after[name]) == is_frozen, name
    assert not torch.equal(after["pixel_decoder.conv_in.weight"], vqgan.decoder.conv_in.weight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(recipe_values, precision):
    recipe_values["run"] |= {"steps": 6, "mixed_precision": precision, "gradient_accumulation": 2}
    recipe_values["model"]["gradient_checkpointing"] = True
    log = train(recipe_values)
    assert all(math.isfinite(line["total_loss"]) for line in log)


def test_curves(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reconstruction_loss": 0.1}\n{"step": 2, "val_psnr": 20.0}\n')
    assert curves_main([str(tmp_path), "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert curves_main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "none.png")]) == 2
    assert not (tmp_path / "none.png").exists()
