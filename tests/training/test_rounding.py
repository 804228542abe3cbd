"""Training with weights rounded as they will be stored."""

import copy
from contextlib import nullcontext

import mediatok as mt
import pytest
import torch
from mediatok.core.compact import is_large, rounded
from mediatok.core.errors import InvalidRecipe
from mediatok.training.codec_recipe import CodecRecipe
from mediatok.training.recipe import check_recipe
from mediatok.training.rounding import rounded_weights
from mediatok.training.tokenizer import TokenizerTrainer
from torch import nn


def test_only_what_an_export_rounds_is_rounded_and_comes_back():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(80, 64), "quantize": nn.Linear(80, 64), "vae": mt.load("kl-tiny")})
    before = copy.deepcopy(model.state_dict())
    with rounded_weights(model, 4):
        inside = copy.deepcopy(model.state_dict())
    assert torch.equal(inside.pop("layer.weight"), rounded(before["layer.weight"], 4))
    assert all(torch.equal(value, before[name]) for name, value in inside.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_makes_up_for_the_rounding():
    torch.manual_seed(0)
    x = torch.randn(512, 16) @ torch.randn(16, 64)  # correlated, so that errors of some weights can offset others
    y = x @ torch.randn(64, 64)
    start = nn.Linear(64, 64, bias=False)
    nn.init.normal_(start.weight, std=1.0)
    errors = {}
    for is_rounded in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(300):
            if step == 200:
                optimizer.param_groups[0]["lr"] = 0.004
            with rounded_weights(model, 4) if is_rounded and step >= 200 else nullcontext():
                (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with rounded_weights(model, 4), torch.no_grad():
            errors[is_rounded] = float((model(x) - y).square().mean())
    assert errors[True] < 0.9 * errors[False]


def test_a_run_validates_and_stores_the_rounded_weights(recipe_values, tmp_path, monkeypatch):
    seen = {}
    recipe_values["run"] |= {"export_dtype": "int4", "rounded_steps": 2, "validate_every": 1, "steps": 5}
    trainer = TokenizerTrainer(check_recipe(recipe_values))
    steps = trainer.recipe.run.steps

    def validate(model):
        value = next(p for n, p in model.named_parameters() if is_large(p) and "quantize" not in n)
        seen[trainer.step] = len(value.flatten()[:64].unique()) <= 15
        return {}

    monkeypatch.setattr(trainer, "validate", validate)
    trainer.run()
    assert seen == {step: step >= steps - 2 for step in range(1, steps + 1)}
    assert (tmp_path / "run" / "model" / "weights_compact.safetensors").is_file()


def test_weights_that_are_stored_otherwise_cannot_be_rounded():
    run = {"rounded_steps": 2, "export_dtype": "int4", "steps": 20_000}
    values = {"name": "x", "output": "x", "data": {"train": "x"}, "run": run}
    values["model"] = {"class_name": "SimCodec", "weight_norm": True}
    with pytest.raises(InvalidRecipe, match="weight_norm trains others"):
        check_recipe(values, CodecRecipe)


def test_rounding_needs_bits_to_round_to(recipe_values):
    recipe_values["run"] |= {"rounded_steps": 2}
    with pytest.raises(InvalidRecipe, match="export_dtype"):
        check_recipe(recipe_values)
