"""A training run small enough for tests: 48 pictures of 16 px and a model of two blocks, dead-code revival on."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from mediatok.training import tokenizer
from mediatok.training.discriminator import PatchDiscriminator
from PIL import Image


@pytest.fixture(autouse=True)
def _small_and_on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(tokenizer, "PatchDiscriminator", partial(PatchDiscriminator, 32, 1))
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the first run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(48):
        low = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(low).resize((20, 24), Image.Resampling.BICUBIC).save(folder / f"p{index:02d}.png")
    return folder


@pytest.fixture
def recipe_values(pictures, tmp_path):
    """Plain values of a tiny single-stage run with everything stateful switched on, discriminator included."""
    size = {"encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2}
    size |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "model": {
            "config": size
            | {
                "image_size": 16,
                "encoder_patch_size": 8,
                "decoder_patch_size": 8,
                "num_latent_tokens": 4,
                "token_size": 4,
                "codebook_size": 16,
                "clustering": True,
            }
        },
        "data": {"train": str(pictures), "min_scale": 0.7},
        "loss": {"perceptual": "none", "discriminator_weight": 0.0},
        "optimizer": {"lr": 1e-3, "warmup_steps": 4},
        "run": {
            "steps": 20,
            "batch_size": 4,
            "log_every": 1,
            "validate_every": 0,
            "sample_every": 0,
            "checkpoint_every": 10,
        },
    }
