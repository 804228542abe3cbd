"""The self-check behind `make studio` and `make demo`."""

import sys

import mediatok as mt
import pytest
import torch
from mediatok.app import demo, demo_speech
from mediatok.core import registry
from mediatok.core.images import read_image
from mediatok.evaluation import retrieval
from PIL import Image, ImageEnhance, ImageOps


@pytest.fixture
def random_models(shipped, monkeypatch):
    """Random models in the place of the shipped ones; what they give back is poor, and need not be better."""
    load, speech = registry.load, {name: registry.load(name) for name in (demo.CODEC, demo.RECOGNISER)}
    monkeypatch.setattr(registry, "PRETRAINED", shipped)
    here = [entry for entry in registry.models() if entry.is_shipped and entry.folder.is_dir()]
    monkeypatch.setattr(registry, "models", lambda: here)
    monkeypatch.setattr(demo, "MIN_PSNR", 0.0)
    monkeypatch.setattr(registry, "load", lambda name: speech.get(name) or load(name))


def test_table_and_results(random_models, tmp_path, capsys):
    rows = demo.run(tmp_path / "demo")
    samples = len(list(demo.SAMPLES.glob("*.png")))
    # titok: every sample and one as tiles; one-d-piece: every sample at two lengths, and one as tiles
    assert len(rows) == (samples + 1) + (2 * samples + 1)
    table = capsys.readouterr().out
    for words in (
        "STOI",
        "heard after",
        "tokens",
        "bytes",
        "PSNR",
        "seconds",
        "titok-tiny",
        "one-d-piece-tiny",
        "sunflower",
        "mean",
    ):
        assert words in table
    files = {path.name for path in (tmp_path / "demo").iterdir()}
    clips = len(demo_speech.sample_clips())
    assert clips == 2
    assert len(files) == 2 * len(rows) + 2 * clips + 1
    with Image.open(tmp_path / "demo/overview.png") as sheet:
        assert sheet.width > 1000
    tokens = mt.Tokens.load(tmp_path / "demo/landscape.titok-tiny.tiled.mtok")
    assert (tokens.frames[0].width, tokens.frames[0].height) == (640, 400)


def test_broken_models_fail_the_check(random_models, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MIN_PSNR", 50.0)
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2
    assert "self-check failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "least"), [("titok-tiny", 20), ("one-d-piece-tiny", 20), ("tokenflow-tiny", 20), ("flextok-tiny", 16)]
)
def test_shipped_models_give_the_samples_back(name, least):
    tokenizer = registry.load(name)
    emoji = [path for path in sorted(demo.SAMPLES.glob("*.png")) if path.stem != demo.TILED_SAMPLE]
    rows = demo.check_tokenizer(tokenizer, emoji)
    by_length = {}
    for row in rows:
        by_length.setdefault(int(row.tokens.lengths[0]), []).append(row.psnr)
    means = [sum(values) / len(values) for _, values in sorted(by_length.items())]
    assert means[-1] >= least
    assert means == sorted(means)
    assert len(means) == (2 if tokenizer.is_variable_length else 1)


def test_ids_of_seed_tiny_tell_what_a_picture_shows():
    tokenizer = registry.load("seed-tiny")
    emoji = [read_image(path) for path in sorted(demo.SAMPLES.glob("*.png")) if path.stem != demo.TILED_SAMPLE]
    paler = [ImageEnhance.Color(ImageOps.expand(ImageOps.mirror(image), 40, "white")).enhance(0.6) for image in emoji]
    similarity = retrieval.similarities(tokenizer, paler, emoji)["embedding"]
    found = similarity.argmax(dim=1)
    assert (found == torch.arange(len(emoji))).float().mean() >= 0.8  # smaller, mirrored, and paler
    assert len(demo.check_tokenizer(tokenizer, [demo.SAMPLES / "tiger.png", demo.SAMPLES / "landscape.png"])) == 2
    assert tokenizer.encode(emoji[0]).num_bytes < 100


def test_samples_are_small_and_attributed():
    files = list(demo.SAMPLES.iterdir())
    assert sum(path.stat().st_size for path in files) < 2**20
    text = (demo.SAMPLES / "README.md").read_text()
    assert "MIT" in text
    assert all(path.stem in text for path in files if path.suffix == ".png")


def test_the_codec_gives_the_clips_back_and_both_are_understood():
    import jiwer

    said = "электричество было потушено и бледный свет проникал сквозь стёкла глазков"
    codec, recogniser = registry.load(demo.CODEC), registry.load(demo.RECOGNISER)
    (row,) = demo_speech.check_codec(codec, recogniser, [demo_speech.CLIPS / "light.flac"])
    assert jiwer.cer(said, row.heard[0]) < 0.3
    assert jiwer.cer(said, row.heard[1]) < 0.5
    assert row.tokens.num_bytes < 600
    assert row.sound.samples.shape == (1, 100_000)


def test_a_broken_codec_fails_the_check(monkeypatch):
    monkeypatch.setattr(demo_speech, "MIN_STOI", 0.99)
    codec, recogniser = registry.load(demo.CODEC), registry.load(demo.RECOGNISER)
    with pytest.raises(mt.MediatokError, match="self-check failed"):
        demo_speech.check_codec(codec, recogniser, demo_speech.sample_clips())
