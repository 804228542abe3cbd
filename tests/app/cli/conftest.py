"""The command line in this process, with small random models in the place of the shipped ones."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import torch
import trimesh
from diffusers.utils import logging
from mediatok.app import cli
from mediatok.core import registry
from mediatok.generators.gense import GenSE
from mediatok.generators.next_scale import NextScale
from mediatok.generators.paraformer import Paraformer
from mediatok.generators.speak import Speak
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from mediatok.tokenizers.image.one_d_piece import OneDPiece
from mediatok.tokenizers.image.titok import TiTok
from mediatok.tokenizers.shape.triplane import TriplaneField
from mediatok.tokenizers.shape.vat import VAT
from mediatok.tokenizers.speech.semantic import SemanticTokenizer
from mediatok.tokenizers.speech.simcodec import SimCodec
from PIL import Image

SIZES = {
    "image_size": 32, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 8, "token_size": 4,
    "codebook_size": 64, "is_legacy": False, "has_pixel_decoder": False, "encoder_width": 64, "encoder_depth": 1,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip

CODEC = {
    "en_filters": 2, "de_filters": 2, "vq_dim": 8, "resblock_kernel_sizes": (3,),
    "resblock_dilation_sizes": ((1, 1, 1),), "n_codes": 64,
}  # fmt: skip
SEMANTIC = {
    "layer": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": (8,) * 7,
    "pos_conv_kernel": 8, "pos_conv_groups": 2, "num_clusters": 16,
}  # fmt: skip
GENSE = {
    "num_semantic": 16, "num_acoustic": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "n2s_positions": 600, "s2s_positions": 1600,
}  # fmt: skip
WORDS = ("<blank>", "<s>", "</s>", "the", "cat", "sat", "on", "mat", "now", "<unk>")
PARAFORMER = {
    "vocab_size": len(WORDS), "tokens": WORDS, "width": 16, "encoder_depth": 1, "encoder_heads": 2,
    "encoder_mlp_width": 32, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_width": 32,
}  # fmt: skip
SPEAK = {
    "vocab_size": 64, "width": 16, "encoder_depth": 1, "encoder_heads": 2, "encoder_mlp_width": 32, "decoder_depth": 1,
    "decoder_heads": 2, "decoder_mlp_width": 32,
}  # fmt: skip
SHAPES = {
    "num_points": 256, "num_features": 32, "width": 32, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1,
    "scales": (1, 4, 9), "codebook_size": 64, "code_width": 6, "plane_size": 4, "plane_channels": (16, 8),
    "head_width": 16,
}  # fmt: skip
OTHER_MODELS = {  # than those of pictures
    "simcodec-tiny": ("SimCodec", "tokenizer", "speech"),
    "gense-tiny": ("GenSE", "generator", "speech"),
    "paraformer-tiny": ("Paraformer", "generator", "speech"),
    "speak-tiny": ("Speak", "generator", "speech"),
    "vat-tiny": ("VAT", "tokenizer", "shape"),
    "vat-gen-tiny": ("NextScale", "generator", "shape"),
}


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """What stderr holds besides the progress bar."""
        parts = self.err.replace("\r", "\n").split("\n")
        return [part for part in parts if part.strip() and not re.search(r"\d+/\d+ (s )?\[", part)]


@pytest.fixture(scope="session")
def shipped(tmp_path_factory) -> Path:
    """A folder of models: the shipped names of every kind, another titok, and a continuous one."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in {
        "titok-tiny": TiTok(**SIZES),
        "one-d-piece-tiny": OneDPiece(**SIZES),
        "another": TiTok(**SIZES),
        "continuous": TiTok(**SIZES | {"quantizer": "vae"}),
        "kl-tiny": KLAutoencoder(64, 2, (8, 8), 1, 4),
        "simcodec-tiny": SimCodec(**CODEC),
        "semantic": SemanticTokenizer(**SEMANTIC),
        "paraformer-tiny": Paraformer(**PARAFORMER),
        "speak-tiny": Speak(**SPEAK, codec="simcodec-tiny"),
        "gense-tiny": GenSE(**GENSE, codec="simcodec-tiny", semantic_tokenizer=str(folder / "semantic")),
    }.items():
        model.save_pretrained(folder / name)
    vat = make_vat()
    vat.save_pretrained(folder / "vat-tiny")
    make_shape_generator(vat).save_pretrained(folder / "vat-gen-tiny")
    return folder


def make_vat(**changes) -> VAT:
    """Random weights whose tokens matter to their shapes, and whose surfaces cross the box."""
    model = VAT(**SHAPES | changes).eval().requires_grad_(False)
    model.head.last.weight.mul_(8)
    planes = model.decoder(torch.randn(2, SHAPES["scales"][-1], SHAPES["code_width"]))
    model.head.last.bias -= TriplaneField(planes, model.head).occupancy(torch.rand(2, 500, 3) * 2 - 1).mean()
    return model


def make_shape_generator(vat: VAT, **changes) -> NextScale:
    sizes = {
        "scales": SHAPES["scales"], "codebook_size": SHAPES["codebook_size"], "code_width": SHAPES["code_width"],
        "width": 32, "depth": 1, "num_heads": 2, "num_classes": 3, "label_names": ("armchair", "table", "lamp"),
        "tokenizer": "vat-tiny", "tokenizer_fingerprint": vat.fingerprint,
    }  # fmt: skip
    return NextScale(**sizes | changes)


@pytest.fixture
def run(shipped, monkeypatch, capsys, tmp_path):
    """Call `mediatok` with arguments, inside `tmp_path`; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(registry, "PRETRAINED", shipped)
    for name, (class_name, kind, modality) in OTHER_MODELS.items():
        entry = registry.ModelEntry(name, class_name, "Apache-2.0", 1, "small", kind=kind, modality=modality)
        monkeypatch.setitem(registry.ENTRIES, name, entry)
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


@pytest.fixture
def voice():
    """A function that makes something like speech: syllables of a gliding voice, from a seed."""
    return make_voice


def make_voice(seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> mt.Waveform:
    rng = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * rate)) / rate
    pitch = 120 + 30 * torch.sin(2 * torch.pi * 0.7 * time + seed)
    phase = 2 * torch.pi * torch.cumsum(pitch / rate, dim=0)
    tone = sum(torch.sin(k * phase) / k for k in range(1, 20))
    syllables = torch.sin(2 * torch.pi * 2 * time).clamp(min=0)
    noise = 0.01 * torch.randn(channels, len(time), generator=rng)
    return mt.Waveform(0.2 * (tone * syllables) + noise, rate)


@pytest.fixture
def sounds(tmp_path, voice) -> Path:
    """A folder with three clips of different lengths, rates, channels and formats, one of them in a subfolder."""
    folder = tmp_path / "sounds"
    (folder / "more").mkdir(parents=True)
    voice(1.3).save(folder / "a.wav")
    voice(0.8, rate=44100, channels=2, seed=1).save(folder / "b.flac")
    voice(1.0, rate=24000, seed=2).save(folder / "more/c.ogg")
    return folder


@pytest.fixture
def solids(tmp_path) -> Path:
    """A folder with three meshes of different sizes, places and formats, one of them in a subfolder."""
    folder = tmp_path / "solids"
    (folder / "more").mkdir(parents=True)
    box = trimesh.creation.box((4.0, 2.0, 1.0))
    box.apply_translation((10.0, -3.0, 7.0))
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.05)
    for name, mesh in {"a.obj": box, "b.stl": ball, "more/c.ply": trimesh.creation.cylinder(1.0, 3.0)}.items():
        mesh.export(folder / name)
    return folder
