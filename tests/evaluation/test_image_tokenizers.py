"""The table of image tokenizers: its rows at equal bytes, its figures, and the command."""

import json

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.evaluation import image_tokenizers, metrics
from mediatok.tokenizers.image.tokenflow import TokenFlow
from PIL import Image

SIZES = {
    "image_size": 32, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 8, "token_size": 4,
    "codebook_size": 64, "is_legacy": False, "has_pixel_decoder": False, "encoder_width": 64, "encoder_depth": 1,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures, and models: "short" and "long" in `models`."""
    root = tmp_path_factory.mktemp("comparison")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for index in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / "pictures" / f"{index}.png")
    torch.manual_seed(0)
    mt.TiTok(**SIZES).save_pretrained(root / "short")
    mt.OneDPiece(**SIZES | {"num_latent_tokens": 40}).save_pretrained(root / "long")
    mt.TiTok(**SIZES | {"quantizer": "vae"}).save_pretrained(root / "latents")
    mt.TiTok(**SIZES | {"image_size": 64}).save_pretrained(root / "large")
    return root


@pytest.fixture(autouse=True)
def lite0(monkeypatch):
    """A small network in the place of EfficientNet-Lite0, in two components, so that eight pictures are enough."""
    mix = torch.randn(3 * 16, 6, generator=torch.Generator().manual_seed(0))
    network = metrics.FeatureNet("FD-Lite0", "ab" * 32, lambda pixels: pixels[:, :, ::8, ::8].flatten(1) @ mix)
    monkeypatch.setattr(metrics, "load_lite0", lambda weights, device: network)
    monkeypatch.setattr(metrics, "find_lite0_weights", lambda: "x")
    monkeypatch.setattr(metrics, "LITE0_COMPONENTS", 2)


def command(folder, models, *options):
    paths = [str(folder / name) if (folder / name).exists() else name for name in models]
    return image_tokenizers.main([str(folder / "pictures"), "--models", *paths, *options])


def test_table(folder, capsys):
    assert command(folder, ("short", "long", "latents")) == 0
    about, floor, note, blank, head, line, *rows = capsys.readouterr().out.splitlines()
    assert about.startswith("8 pictures of ")
    assert f"threads: {torch.get_num_threads()}" in about
    assert "between two halves" in floor
    assert "over 8 pictures" in note
    assert blank == ""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, line, *rows)]
    assert {len(row) for row in cells} == {len(image_tokenizers.COLUMNS)}
    assert [row[:3] for row in cells[2:]] == [
        ["`short`", "8", "48 (6)"],
        ["`long`", "40", "240 (30)"], ["", "32", "192 (24)"], ["", "16", "96 (12)"],
        ["`latents`", "", ""],
    ]  # fmt: skip
    for row in cells[2:]:
        assert row[3].endswith(" dB")
        assert float(row[5]) > 0
        assert row[6].endswith(" ms")
        assert row[7].endswith(" ms")


def test_too_few_pictures_have_no_distance(folder, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "LITE0_COMPONENTS", 64)
    assert command(folder, ("short",)) == 0
    output = capsys.readouterr().out.splitlines()
    assert "at least 130 pictures" in output[1]
    assert output[-1].split("|")[6] == " "


def test_figures_are_those_of_evaluate(folder, capsys):
    assert command(folder, ("long",), "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = mt.load(folder / "long")
    for row in rows:
        figures = mt.evaluate(tokenizer, folder / "pictures", num_tokens=row["tokens"]).figures
        assert row["psnr"] == pytest.approx(figures["PSNR (dB)"], abs=1e-6)
        assert row["fd_lite0"] == pytest.approx(figures["FD-Lite0"])
        assert row["ssim"] == pytest.approx(figures["SSIM"], abs=1e-6)
        assert row["bits"] == pytest.approx(32**2 * figures["bits per pixel (ids alone)"])
        assert row["encode_ms"] > 0
        assert row["decode_ms"] > 0


def test_lengths_fit_their_bytes(folder):
    torch.manual_seed(0)
    scales = TokenFlow(
        image_size=32, sides=(1, 2, 4), codebook_size=300, semantic_code_width=6, pixel_code_width=3, tower_width=24,
        tower_depth=1, tower_heads=2, tower_hidden=32, tower_patch=8, tower_grid=4, semantic_width=24,
        semantic_depth=1, semantic_heads=2, semantic_grid=4, teacher_width=10, channels=32, multipliers=(1, 1, 1, 1),
        res_blocks=1, z_channels=32, decoder_channels=32, decoder_res_blocks=1,
    )  # fmt: skip
    assert image_tokenizers.lengths_at_equal_bytes(scales) == [21, 5]  # 9 bits: 24 bytes, and 6 within 12
    assert image_tokenizers.lengths_at_equal_bytes(mt.load(folder / "long")) == [40, 32, 16]
    assert image_tokenizers.lengths_at_equal_bytes(mt.load(folder / "short")) == [None]


def test_every_shipped_image_tokenizer_is_compared():
    names = image_tokenizers.shipped_names()
    assert {"titok-tiny", "one-d-piece-tiny", "kl-tiny"} <= set(names)
    assert not {"simcodec-tiny", "vat-tiny", "maskgit-tiny"} & set(names)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("short", "large"), "short (32 px), "),
        (("simcodec-tiny",), "no image tokenizer"),
        (("titok-tinny",), "titok-tiny"),
    ],
)
def test_bad_models_exit_2(folder, capsys, models, message):
    assert command(folder, models) == 2
    output = capsys.readouterr()
    assert message in output.err.replace(f"{folder}/", "")
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_bad_pictures_exit_2(folder, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no picture")
    for path in (tmp_path, tmp_path / "gone"):
        assert image_tokenizers.main([str(path), "--models", str(folder / "short")]) == 2
        assert capsys.readouterr().err.startswith("error: ")
