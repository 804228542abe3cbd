"""A codec trained by two processes is the one trained by one, and one with weight norm resumes and loads like any."""

import copy
import json
import os
import subprocess
import sys

import mediatok as mt
import numpy as np
import pytest
import torch
import yaml
from mediatok.core.audio import Waveform, write_audio
from mediatok.training.codec import CodecTrainer
from mediatok.training.codec_recipe import CodecRecipe
from mediatok.training.export import export_run
from mediatok.training.recipe import check_recipe, load_recipe
from mediatok.training.tracker import read_log

SIZES = {
    "en_filters": 2, "de_filters": 2, "vq_dim": 4, "upsample_rates": [4, 8], "upsample_kernel_sizes": [8, 16],
    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 2, 3]], "n_codes": 32,
}  # fmt: skip


@pytest.fixture
def values(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"c{number}" for number in range(9)]
    for name in names:
        wave_T = 0.3 * torch.from_numpy(rng.standard_normal(9600).cumsum() % 2 - 1).float()
        write_audio(Waveform(wave_T, 16000), folder / f"{name}.wav")
    (folder / "splits.json").write_text(json.dumps({"train": names[:8], "val": names[8:]}))
    every = {"log_every": 1, "validate_every": 0, "sample_every": 0, "checkpoint_every": 8}
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "model": {"config": dict(SIZES), "continuous_steps": 3},
        "data": {"train": str(folder), "seconds": 0.1},
        "loss": {
            "mel_weights": {256: 10.0}, "discriminators": ["period"], "discriminator_width": 4,
            "discriminator_start": 4,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 1, "muon": True},
        "run": {"steps": 8, "batch_size": 2, **every},
    }  # fmt: skip


def test_two_processes_equal_one(values, tmp_path):
    """Also while the codebook takes no part, whose gradient DDP would wait for."""
    one = copy.deepcopy(values)
    one["run"]["batch_size"] = 4
    CodecTrainer(check_recipe(one | {"output": str(tmp_path / "one")}, CodecRecipe)).run()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values | {"output": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "mediatok.training.codec", str(recipe)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 8
    for one_line, two_line in zip(*logs, strict=True):
        assert two_line["total_loss"] == pytest.approx(one_line["total_loss"], rel=2e-3), one_line["step"]


def test_weight_norm_is_folded_in_what_a_run_leaves(values, tmp_path):
    values["model"]["weight_norm"] = True
    values["run"]["checkpoint_every"] = 4
    stopped = copy.deepcopy(values) | {"output": str(tmp_path / "parts")}
    trainer = CodecTrainer(check_recipe(stopped, CodecRecipe))
    assert any("parametrizations" in name for name, _ in trainer.raw_model.named_parameters())
    save = trainer.save

    def save_and_stop():
        save()
        raise KeyboardInterrupt

    trainer.save = save_and_stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    CodecTrainer(check_recipe(stopped, CodecRecipe)).run()
    CodecTrainer(check_recipe(values, CodecRecipe)).run()
    models = [mt.load(tmp_path / name / "model") for name in ("parts", "run")]
    models.append(mt.load(export_run(tmp_path / "run", tmp_path / "exported")))
    for model in models[1:]:
        for name, value in models[0].state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_our_recipes_build():
    from pathlib import Path

    from mediatok.training.codec import build_codec

    paths = sorted((Path(mt.__file__).parent / "recipes").glob("simcodec*.yaml"))
    assert paths
    for path in paths:
        recipe = load_recipe(path, (), CodecRecipe)
        assert recipe.name == path.stem
        if recipe.model.init_from is None:
            with torch.device("meta"):
                build_codec(recipe.model, None)
