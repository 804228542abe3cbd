"""TokenFlow trains through the shared loop: losses, a teacher, exact resume, export; and text to image over it."""

import json
import shutil

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import InvalidRecipe, ModelNotFound
from mediatok.training import tokenflow
from mediatok.training.code_window import CodeWindow
from mediatok.training.export import export_run
from mediatok.training.generator import generator_trainer
from mediatok.training.generator_recipe import GeneratorRecipe
from mediatok.training.recipe import check_recipe
from mediatok.training.teachers import build_teacher
from mediatok.training.tokenflow import TokenFlowTrainer
from mediatok.training.tokenflow_recipe import TokenFlowRecipe
from torch import nn

SIZES = {
    "image_size": 16, "sides": [1, 2, 4], "codebook_size": 32, "semantic_code_width": 4, "pixel_code_width": 3,
    "tower_width": 16, "tower_depth": 1, "tower_heads": 2, "tower_hidden": 24, "tower_patch": 4, "tower_grid": 4,
    "semantic_width": 16, "semantic_depth": 1, "semantic_heads": 2, "semantic_grid": 4, "teacher_width": 3,
    "channels": 32, "multipliers": [1, 1, 1], "res_blocks": 1, "z_channels": 8, "decoder_channels": 32,
    "decoder_res_blocks": 1,
}  # fmt: skip


class Teacher(nn.Module):
    """The mean colour of each place."""

    def forward(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)


@pytest.fixture
def values(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenflow, "build_teacher", lambda name, weights, grid: Teacher())
    monkeypatch.setattr(tokenflow, "PatchGAN", lambda: tokenflow.PatchDiscriminator(32, 1))
    return {
        "name": "tiny", "output": str(tmp_path / "run"), "model": {"class_name": "TokenFlow", "config": SIZES},
        "data": {"train": str(pictures)},
        "loss": {"perceptual": "none", "discriminator_start": 2},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "run": {"steps": 6, "batch_size": 4, "log_every": 1, "validate_every": 6, "sample_every": 6,
                "checkpoint_every": 3, "num_samples": 2},
    }  # fmt: skip


def run(values):
    trainer = TokenFlowTrainer(check_recipe(values, TokenFlowRecipe))
    trainer.run()
    return trainer


def test_a_run_its_resumption_and_its_pixel_decoder(values, tmp_path):
    trainer = run(values)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {"semantic_loss", "codebook_usage", "weighted_gan_loss", "val_psnr"} <= logged
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    shutil.copytree(checkpoints[0], tmp_path / "again" / "checkpoints" / checkpoints[0].name)
    again = run(values | {"output": str(tmp_path / "again")})
    for name, value in trainer.raw_model.state_dict().items():
        assert torch.equal(value, again.raw_model.state_dict()[name]), name
    assert torch.equal(trainer.window.ids, again.window.ids)
    model = mt.load(export_run(tmp_path / "run", tmp_path / "model"))
    assert model.scales == (1, 4, 16)
    wider = {"class_name": "TokenFlow", "stage": "decoder", "init_from": str(tmp_path / "model"),
             "config": {"decoder_channels": 64}}  # fmt: skip
    second = run(values | {"output": str(tmp_path / "second"), "model": wider})
    pixels = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(second.raw_model.eval().encode_pixels(pixels), model.encode_pixels(pixels))
    assert second.raw_model.config.decoder_channels == 64

    names = {f"p{number:02d}": {"name": f"a {'red' if number % 2 else 'blue'} one"} for number in range(48)}
    (tmp_path / "labels.json").write_text(json.dumps(names))
    generator = {
        "name": "t2i", "output": str(tmp_path / "t2i"), "tokenizer": str(tmp_path / "model"),
        "model": {"class_name": "NextScaleLlama", "config": {
            "width": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 2, "hidden": 24, "prompt_length": 6,
            "negative_prompt": ""}},
        "data": values["data"] | {"labels": str(tmp_path / "labels.json"), "label_fields": ["name"]},
        "optimizer": values["optimizer"], "run": values["run"],
    }  # fmt: skip
    generator_trainer(check_recipe(generator, GeneratorRecipe)).run()
    made = mt.load(tmp_path / "t2i" / "model")
    assert made.generate("a red one", seed=0)[0].size == (16, 16)


def test_what_does_not_fit_is_said(values):
    config = values["model"] | {"config": SIZES | {"teacher_width": 9}}
    with pytest.raises(InvalidRecipe, match=r"16 places with 3 features.*16 with 9"):
        TokenFlowTrainer(check_recipe(values | {"model": config}, TokenFlowRecipe))
    with pytest.raises(InvalidRecipe, match="init_from"):
        check_recipe(values | {"model": {"class_name": "TokenFlow", "stage": "decoder"}}, TokenFlowRecipe)


def test_a_missing_tower_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match=r"model\.safetensors of huggingface\.co/openai/clip-vit-base-patch16"):
        build_teacher("clip", tmp_path, 4)
    with pytest.raises(ModelNotFound, match=r"no folder is given.*google/siglip-so400m"):
        build_teacher("siglip", None, 4)
    with pytest.raises(InvalidRecipe, match="Did you mean 'clip'"):
        build_teacher("clop", None, 4)


def test_the_window_forgets():
    window = CodeWindow(10, window=4)
    window.update(torch.tensor([[1, 2], [3, 4]]))
    assert window.share() == 0.4
    window.update(torch.tensor([9, 9, 9]))
    assert window.ids.tolist() == [4, 9, 9, 9]
    window.update(torch.arange(6))
    assert window.ids.tolist() == [2, 3, 4, 5]
