"""The command line in this process, with two small random models in the place of the shipped ones."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from mediatok.app import cli
from mediatok.core import registry
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from mediatok.tokenizers.image.one_d_piece import OneDPiece
from mediatok.tokenizers.image.titok import TiTok
from PIL import Image

SIZES = {
    "image_size": 32, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 8, "token_size": 4,
    "codebook_size": 64, "is_legacy": False, "has_pixel_decoder": False, "encoder_width": 64, "encoder_depth": 1,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """What stderr holds besides the progress bar."""
        parts = self.err.replace("\r", "\n").split("\n")
        return [part for part in parts if part.strip() and not re.search(r"\d+/\d+ \[", part)]


@pytest.fixture(scope="session")
def shipped(tmp_path_factory) -> Path:
    """A folder of models: titok-tiny, one-d-piece-tiny, another titok, and a continuous and a text-aware one."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in {
        "titok-tiny": TiTok(**SIZES),
        "one-d-piece-tiny": OneDPiece(**SIZES),
        "another": TiTok(**SIZES),
        "continuous": TiTok(**SIZES | {"quantizer": "vae"}),
        "kl-tiny": KLAutoencoder(64, 2, (8, 8), 1, 4),
    }.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(shipped, monkeypatch, capsys, tmp_path):
    """Call `mediatok` with arguments, inside `tmp_path`; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(registry, "PRETRAINED", shipped)
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    logging.set_verbosity_error()  # as the environment variable does where diffusers is not imported yet
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(stopped.value.code, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with three pictures of different sizes and formats, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a.png": (40, 60), "b.jpg": (32, 32), "more/c.webp": (90, 50)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder
