"""Rate curves of tokenizers and codecs."""

import io
from itertools import pairwise

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.core.images import fit_square, to_pixels
from mediatok.evaluation import rate
from PIL import Image

SIZES = {
    "image_size": 32, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 12, "token_size": 4,
    "codebook_size": 64, "is_legacy": False, "has_pixel_decoder": False, "encoder_width": 64, "encoder_depth": 1,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return mt.OneDPiece(**SIZES).eval()


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[0:70, 0:90]
    waves = [128 + 100 * np.sin(x / 9 + phase) * np.cos(y / 7) for phase in (0, 1, 2)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def test_curve_of_a_variable_length_tokenizer(tokenizer, picture):
    points = mt.rate_curve(tokenizer, picture)
    assert [point.num_tokens for point in points] == [1, 2, 4, 8, 12]
    for point in points:
        tokens = tokenizer.encode(picture, num_tokens=point.num_tokens)
        assert point.bytes == len(tokens.to_bytes())
        assert point.bits_per_pixel == pytest.approx(8 * point.bytes / 32**2)
        expected = mt.psnr(to_pixels(tokenizer.decode(tokens)), to_pixels(fit_square(picture, 32)))
        assert point.psnr == pytest.approx(expected, abs=1e-3)


def test_curve_of_a_fixed_length_tokenizer(picture):
    torch.manual_seed(0)
    titok = mt.TiTok(**SIZES).eval()
    assert [point.num_tokens for point in mt.rate_curve(titok, picture)] == [12]
    with pytest.raises(mt.InvalidInput):
        mt.rate_curve(titok, picture, [4])


def test_chosen_lengths_and_progress(tokenizer, picture):
    steps = []
    points = mt.rate_curve(tokenizer, picture, [5, 3, 5], on_step=lambda *step, preview=None: steps.append(step))
    assert [point.num_tokens for point in points] == [3, 5]
    assert steps == [(1, 2), (2, 2)]
    for lengths in ([], [0], [13]):
        with pytest.raises(mt.InvalidInput):
            mt.rate_curve(tokenizer, picture, lengths)


def test_tiles_are_measured_on_the_whole_picture(tokenizer, picture):
    (point,) = mt.rate_curve(tokenizer, picture, [4], tile=True)
    tokens = tokenizer.encode(picture, num_tokens=4, tile=True)
    assert point.num_tokens == 4
    assert point.bytes == tokens.num_bytes
    assert point.bits_per_pixel == pytest.approx(8 * point.bytes / (70 * 90))
    assert "tiles" in point.setting


def test_larger_drawings_are_compared_at_the_size_that_is_read(tokenizer, picture, monkeypatch):
    for side in (32, 96):
        grey = torch.full((1, 3, side, side), 0.5)
        monkeypatch.setattr(tokenizer, "decode_ids", lambda ids_BL, lengths_B=None, grey=grey: grey)
        (point,) = mt.rate_curve(tokenizer, picture, [12])
        expected = mt.psnr(torch.full((3, 32, 32), 128 / 255), to_pixels(fit_square(picture, 32)))
        assert point.psnr == pytest.approx(expected, abs=1e-4)
        assert point.bits_per_pixel == pytest.approx(8 * point.bytes / 32**2)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_codec_curve_keeps_the_best_settings(picture, codec):
    points = mt.codec_curve(picture, codec)
    assert len(points) > 4
    assert all(a.bytes < b.bytes and a.psnr < b.psnr for a, b in pairwise(points))
    assert all(point.num_tokens is None and point.setting.startswith("quality") for point in points)
    buffer = io.BytesIO()
    picture.save(buffer, codec.upper(), quality=95, **({"optimize": True} if codec == "jpeg" else {"method": 4}))
    assert points[-1].bytes == len(buffer.getvalue())


def test_codec_curve_on_the_tokenizers_square(picture):
    points = mt.codec_curve(picture, "webp", size=32)
    assert points[0].bits_per_pixel == pytest.approx(8 * points[0].bytes / 32**2)
    assert "at" in points[0].setting  # the smallest file is of a reduced picture
    with pytest.raises(mt.InvalidInput, match="jpeg, webp"):
        mt.codec_curve(picture, "png")


def test_queries_of_a_curve(picture):
    points = mt.codec_curve(picture, "jpeg", reductions=(1,))
    middle = points[len(points) // 2]
    assert rate.best_within(points, middle.bytes) == middle
    assert rate.best_within(points, points[0].bytes - 1) is None
    assert rate.smallest_reaching(points, middle.psnr) == middle
    assert rate.smallest_reaching(points, points[-1].psnr + 1) is None


def test_means_over_pictures(picture):
    curves = [mt.codec_curve(image, "webp") for image in (picture, picture.rotate(90, expand=True))]
    budget = max(curve[0].bytes for curve in curves)
    (mean,) = rate.mean_within(curves, [10, budget])  # nothing fits 10 bytes
    best = [rate.best_within(curve, budget) for curve in curves]
    assert mean.psnr == pytest.approx(sum(point.psnr for point in best) / 2)
    assert rate.mean_points([curves[0], curves[0]])[0].psnr == pytest.approx(curves[0][0].psnr)


def test_plot_is_a_picture(tokenizer, picture, tmp_path):
    curves = {"model": mt.rate_curve(tokenizer, picture), "JPEG": mt.codec_curve(picture, "jpeg")}
    rate.plot_rate(curves, tmp_path / "plot.png", "title")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"
        assert len(set(plot.convert("RGB").getdata())) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
