"""The evaluation report: figures, protocol, comparison."""

import dataclasses
import math

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.core.images import fit_square, to_pixels
from mediatok.evaluation import metrics
from mediatok.evaluation import report as reports
from PIL import Image

SIZES = {
    "image_size": 32, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 8, "token_size": 4,
    "codebook_size": 64, "is_legacy": False, "has_pixel_decoder": False, "encoder_width": 64, "encoder_depth": 1,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return mt.OneDPiece(**SIZES).eval()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path / f"{index}.png")
    return path


def test_figures_equal_a_plain_computation(tokenizer, folder):
    report = mt.evaluate(tokenizer, folder, batch_size=2)
    psnrs, sizes = [], []
    for path in sorted(folder.iterdir()):
        tokens = tokenizer.encode(path)
        square = fit_square(mt.read_image(path), 32)
        psnrs.append(mt.psnr(to_pixels(tokenizer.decode(tokens)), to_pixels(square)))
        sizes.append(len(tokens.to_bytes()))
    assert report.figures["PSNR (dB)"] == pytest.approx(np.mean(psnrs), abs=1e-4)
    assert report.figures["bits per pixel (.mtok file)"] == pytest.approx(8 * np.mean(sizes) / 32**2)
    assert report.figures["bits per pixel (ids alone)"] == pytest.approx(8 * 6 / 32**2)
    assert report.num_tokens == 8
    assert report.protocol.num_items == 5
    assert report.protocol.set_name == "set"
    assert -1 <= report.figures["SSIM"] <= 1


def test_fewer_tokens_are_counted(tokenizer, folder):
    report = mt.evaluate(tokenizer, folder, num_tokens=2)
    assert report.figures["tokens per picture"] == 2
    assert report.figures["bits per pixel (ids alone)"] == pytest.approx(2 * 6 / 32**2)


def grey_of_side(side):
    """A `decode_ids` that draws grey pictures of `side` pixels."""
    return lambda ids_BL, lengths_B=None: torch.full((len(ids_BL), 3, side, side), 0.5)


def test_larger_drawings_are_compared_at_the_size_that_is_read(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode_ids", grey_of_side(32))
    expected = mt.evaluate(tokenizer, folder)
    monkeypatch.setattr(tokenizer, "decode_ids", grey_of_side(96))
    report = mt.evaluate(tokenizer, folder)
    assert report.figures == expected.figures
    assert report.protocol.preprocessing == expected.protocol.preprocessing
    assert report.protocol.postprocessing.endswith("resized from 96 to 32 px (PIL bicubic)")
    assert "resized" not in expected.protocol.postprocessing


def test_set_hash_depends_on_content_alone(tokenizer, folder, tmp_path):
    first = mt.evaluate(tokenizer, folder).protocol.set_sha256
    other = tmp_path / "renamed"
    other.mkdir()
    for index, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        (other / f"x{index}.png").write_bytes(path.read_bytes())
    assert mt.evaluate(tokenizer, other).protocol.set_sha256 == first
    Image.new("RGB", (40, 40)).save(other / "x0.png")
    assert mt.evaluate(tokenizer, other).protocol.set_sha256 != first


def test_report_survives_its_file(tokenizer, folder, tmp_path):
    report = mt.evaluate(tokenizer, folder)
    report.save(tmp_path / "report.json")
    assert reports.Report.load(tmp_path / "report.json") == report
    for text in ("{}", "[]", "no json", '{"protocol": {"x": 1}, "figures": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(mt.InvalidInput, match=r"bad\.json"):
            reports.Report.load(tmp_path / "bad.json")


def test_compare_refuses_other_protocols(tokenizer, folder):
    report = mt.evaluate(tokenizer, folder)
    assert "+0.0000" in reports.compare(report, report)
    renamed = dataclasses.replace(report.protocol, set_name="other name")
    assert reports.compare(report, dataclasses.replace(report, protocol=renamed))
    for change in (
        {"set_sha256": "0"},
        {"num_items": 4},
        {"preprocessing": "none"},
        {"settings": {"caption": "x"}},
        {"feature_nets": {"rFID": "0"}},
    ):
        other = dataclasses.replace(report, protocol=dataclasses.replace(report.protocol, **change))
        with pytest.raises(mt.InvalidInput, match=next(iter(change))):
            reports.compare(report, other)


def test_text_names_everything(tokenizer, folder):
    text = str(mt.evaluate(tokenizer, folder))
    for words in ("set: 5 pictures", "sha256", "shorter side to 32 px", "float32 on cpu", "PSNR (dB)", "FD-Lite0"):
        assert words in text


def test_bad_pictures_raise_or_are_left_out(tokenizer, folder):
    (folder / "bad.png").write_text("no picture")
    with pytest.raises(mt.InvalidInput, match=r"bad\.png"):
        mt.evaluate(tokenizer, folder)
    failed = []
    report = mt.evaluate(tokenizer, folder, on_error=lambda source, error: failed.append(source.name))
    assert failed == ["bad.png"]
    assert report.protocol.num_items == 5
    with pytest.raises(mt.InvalidInput, match="none of the 1"):
        mt.evaluate(tokenizer, [folder / "bad.png"], on_error=lambda *args: None)


def test_pictures_from_memory_and_progress(tokenizer):
    steps = []
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    mt.evaluate(
        tokenizer, pictures, batch_size=2, on_step=lambda step, total, preview=None: steps.append((step, total))
    )
    assert steps == [(2, 3), (3, 3)]


def test_cancel_stops(tokenizer, folder):
    def cancel(step, total, preview=None):
        raise mt.Cancelled("stop")

    with pytest.raises(mt.Cancelled):
        mt.evaluate(tokenizer, folder, on_step=cancel)


def test_continuous_tokenizers_have_no_bits(folder):
    torch.manual_seed(0)
    report = mt.evaluate(mt.TiTok(**SIZES | {"quantizer": "vae"}).eval(), folder)
    assert not any("bits" in name for name in report.figures)
    assert math.isfinite(report.figures["PSNR (dB)"])


def test_feature_networks_enter_figures_and_protocol(tokenizer, folder, monkeypatch):
    def fake(name):
        return lambda weights, device: metrics.FeatureNet(name, "ab" * 32, lambda pixels: pixels.mean(dim=(2, 3)))

    monkeypatch.setattr(metrics, "load_inception", fake("FID-Inception-2048"))
    monkeypatch.setattr(metrics, "load_lite0", fake("FD-Lite0"))
    report = mt.evaluate(tokenizer, folder, inception_weights="x", lite0_weights="y")
    assert report.figures["rFID"] > 0
    assert report.protocol.feature_nets == {"FID-Inception-2048": "ab" * 32, "FD-Lite0": "ab" * 32}
    assert any("at least 130 pictures" in note for note in report.notes)
    assert "FD-Lite0" not in report.figures
