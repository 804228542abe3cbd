"""The measurement of generators: a perfect copier is called one, noise is far, and too few pictures are refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mediatok.core.errors import InvalidInput
from mediatok.core.generator import ImageGenerator
from mediatok.core.images import read_image
from mediatok.evaluation import generation
from mediatok.evaluation.generation import evaluate_generator
from PIL import Image

SIDE, TRAIN, VAL = 8, 150, 30


class Fake:
    """What `evaluate_generator` uses of a generator."""

    name = "fake"
    tokenizer = SimpleNamespace(image_size=SIDE)

    def __init__(self, make):
        self.make, self.labels = make, None

    def checked_settings(self, **options):
        return ImageGenerator.checked_settings(self, **options)

    def settings(self, steps=None, guidance=None):
        return {"steps": steps, "guidance": guidance}

    def generate(self, labels, seed, batch_size, on_step, **options):
        self.labels = labels
        return [self.make(i) for i in range(len(labels))]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            folder = tmp_path / split / ["cat", "dog"][i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{split}{i}.png")
    projection = torch.randn(3 * SIDE * SIDE, 70, generator=torch.Generator().manual_seed(0))
    network = SimpleNamespace(run=lambda pixels: pixels.flatten(1) @ projection, sha256="0" * 64)
    monkeypatch.setattr(generation, "load_lite0", lambda weights: network)
    return tmp_path


def report(folders, make, **options):
    fake = Fake(make)
    options = {"num_images": 66, "lite0_weights": "w"} | options
    return evaluate_generator(fake, folders / "train", folders / "val", **options), fake


def test_a_copier_is_told(folders):
    paths = sorted((folders / "train").rglob("*.png"))
    result, fake = report(folders, lambda i: read_image(paths[i]))
    assert result.copied_share == 1
    assert result.nearest_pixel == pytest.approx(0, abs=1e-3)
    assert result.heldout_nearest_pixel > 0.1
    assert set(fake.labels) == {"cat", "dog"}
    assert result.fd_lite0 < 3 * result.floor


def test_grey_pictures_are_far(folders):
    result, _ = report(folders, lambda i: Image.new("RGB", (SIDE, SIDE), (i + 1, 2, 3)))
    assert result.fd_lite0 > 3 * result.floor
    assert "FD-Lite0" in str(result)
    assert '"copied_share"' in result.to_json()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"stpes": 3}, "Did you mean 'steps'"), ({"start": 1}, "no option"), ({"seed": -1}, "seeds are")],
)
def test_wrong_options_are_told_before_the_work(folders, options, words):
    with pytest.raises(InvalidInput, match=words):
        report(folders, None, **options)


@pytest.mark.parametrize("num_images", [10, 76, 66.5])
def test_too_few_pictures(folders, num_images):
    with pytest.raises(InvalidInput, match="num_images"):
        report(folders, None, num_images=num_images)
