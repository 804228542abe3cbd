"""Damaged, hostile and oversized pictures are refused with the reason, without warnings, in bounded memory."""

import io
import os
import random
import resource
import struct
import warnings
import zlib

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.core import images
from mediatok.core.images import fit_square, read_image
from PIL import Image


def file_of(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def black_png(width: int, height: int) -> bytes:
    """A whole PNG with one bit a pixel: 20,000 x 20,000 pixels in 49 kB."""
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes((width + 7) // 8 + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refusal(source) -> str:
    with pytest.raises(mt.InvalidInput) as caught:
        read_image(source)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    assert "does not exist" in refusal(tmp_path / "missing.png")
    assert "does not exist" in refusal("https://example.org/photo.jpg")
    assert "empty (0 bytes)" in refusal(tmp_path / "empty.png")
    assert "empty (0 bytes)" in refusal(b"")
    assert "a folder" in refusal(tmp_path)
    assert "text.png is not a sound PNG, JPEG, WEBP, BMP or GIF picture" in refusal(tmp_path / "text.png")


@pytest.mark.parametrize("format", ["EPS", "TIFF", "ICO", "PPM", "TGA", "PDF", "JPEG2000", "SGI", "PCX", "DIB"])
def test_other_formats_are_refused_whatever_their_suffix(tmp_path, format):
    path = tmp_path / "a.png"
    path.write_bytes(file_of(picture(), format))
    assert "is not a sound" in refusal(path)


@pytest.mark.parametrize(
    "start", [b"8BPS\0\1" + bytes(40), b"SIMPLE  =                    T" + bytes(2850), b"%!PS-Adobe-3.0"]
)
def test_formats_that_only_look_like_pictures(start):
    assert "is not a sound" in refusal(start)


KINDS = {
    "PNG": {},
    "JPEG": {},
    "progressive JPEG": {"progressive": True},
    "WEBP": {},
    "lossless WEBP": {"lossless": True},
    "BMP": {},
    "GIF": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_at_fifty_places(kind):
    """Refused, or read as the whole picture where only the end mark is missing."""
    data = file_of(picture(), kind.split()[-1], **KINDS[kind])
    whole = np.asarray(read_image(data))
    refused = 0
    for length in np.linspace(0, len(data) - 1, 50).astype(int):
        try:
            assert np.array_equal(np.asarray(read_image(data[:length])), whole), length
        except mt.InvalidInput:
            refused += 1
    assert refused >= 48


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_pictures(kind):
    """Broken bytes anywhere give a picture or an InvalidInput, nothing else."""
    data, rng = file_of(picture(), kind.split()[-1], **KINDS[kind]), random.Random(0)
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(min(len(data), rng.choice([40, 400, len(data)])))] = rng.randrange(256)
        try:
            assert read_image(bytes(changed)).mode == "RGB"
        except mt.InvalidInput as error:
            message = str(error)
            assert message.isprintable(), message


def test_pictures_without_pixels():
    header = struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)
    refusal(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""))
    assert "0x5" in refusal(np.zeros((5, 0, 3), np.uint8))
    assert "0x0" in refusal(torch.zeros(3, 0, 0))
    assert "0x3" in refusal(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize(
    ("width", "height", "numbers"),
    [
        (20_000, 20_000, "400,000,000 pixels; the limit is 62,914,560"),
        (9_900, 9_900, "9900x9900 pixels; the limit is 62,914,560"),  # where Pillow itself only warns
        (8_000, 7_865, "8000x7865 pixels; the limit is 62,914,560"),  # just above
        (65_536, 10, "65536x10 pixels; the limit is 65,535 a side"),
    ],
)
def test_too_many_pixels(width, height, numbers):
    data = black_png(width, height)
    before = peak_mib()
    with pytest.raises(mt.LimitExceeded, match=numbers):
        read_image(data)
    assert peak_mib() - before < 64  # refused before decoding


def test_too_many_bytes(tmp_path, monkeypatch):
    data = file_of(picture(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", len(data))
    read_image(data)
    read_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", len(data) - 1)
    with pytest.raises(mt.LimitExceeded, match="bytes"):
        read_image(data)
    with pytest.raises(mt.LimitExceeded, match="bytes"):
        read_image(tmp_path / "a.png")


def test_formats_that_take_more_memory_have_lower_limits(monkeypatch):
    """An animated or progressive picture is kept several times while it is decoded."""
    monkeypatch.setattr(images, "MAX_DECODE_BYTES", 8 * 60 * 40)
    for kind in ("PNG", "BMP", "GIF"):
        read_image(file_of(picture(), kind))
    for kind in ("JPEG", "WEBP"):
        with pytest.raises(mt.LimitExceeded, match=f"60x40 pixels, which take 0 MiB to decode as {kind}"):
            read_image(file_of(picture(), kind))


def test_memory_of_a_large_picture():
    """Nine million pixels with alpha: the decoded picture, its RGB copy, a strip; nothing else."""
    data = file_of(Image.new("RGBA", (3000, 3000), (9, 9, 9, 100)), "PNG")
    read_image(file_of(picture(), "PNG"))
    before = peak_mib()
    assert read_image(data).size == (3000, 3000)
    assert peak_mib() - before < 3000 * 3000 * 8 / 2**20 + 32


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1), (10, 1_001)])
def test_strips_are_read_but_not_made_square(size):
    image = read_image(black_png(*size))
    assert image.size == size
    with pytest.raises(mt.LimitExceeded, match=f"{size[0]}x{size[1]} pixels is more than 100 times"):
        fit_square(image, 256)


def test_a_hundred_times_as_long_as_wide_is_still_made_square():
    assert fit_square(Image.new("RGB", (10, 1000)), 64).size == (64, 64)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.full((4, 4, 3), np.nan), "NaN or infinite"),
        (np.full((4, 4, 3), np.inf), "NaN or infinite"),
        (torch.full((3, 4, 4), torch.nan), "NaN or infinite"),
        (np.full((4, 4, 3), 128.0), r"\[0, 1\], got 128"),
        (np.full((4, 4, 3), -0.5), r"\[0, 1\], got -0.5"),
        (np.zeros((4, 4, 3), np.int64), "not int64"),
        (np.zeros((4, 4, 3), np.uint16), "not uint16"),
        (np.zeros((4, 4, 3), bool), "not bool"),
        (np.zeros((4, 4, 3), complex), "not complex"),
        (np.array([["a", "b"]]), "not <U1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "not int64"),
        (np.zeros((3, 4, 4, 3), np.uint8), r"\[3, 4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"\[4\]"),
        (torch.zeros(4, 4, 3), r"\[3, H, W\], got \[4, 4, 3\]"),
        (torch.zeros(1, 3, 4, 4), r"\[1, 3, 4, 4\]"),
        (Image.new("F", (4, 4)), "mode F"),
        (None, "not NoneType"),
        ({"path": "a.png"}, "not dict"),
        (7, "not int"),
    ],
)
def test_values_that_are_no_pictures(value, reason):
    with pytest.raises(mt.InvalidInput, match=reason):
        read_image(value)


def test_a_pil_image_that_cannot_be_loaded(tmp_path):
    data = file_of(picture(), "PNG")
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "a.png") as image:
        assert "damaged or truncated" in refusal(image)


def test_reading_writes_nothing(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    refusal(path)
    assert os.listdir(tmp_path) == ["a.png"]
