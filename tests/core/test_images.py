"""Pictures of every kind that is read, and the ways between pictures and pixels."""

import io
import math
import struct
import zlib

import mediatok as mt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mediatok.core.images import ORIENTATIONS, WRITERS, fit_square, list_images, psnr, read_image, to_pil, to_pixels
from PIL import Image
from torchvision.transforms import v2


def gradient(width=24, height=16, channels=3) -> np.ndarray:
    """A picture without two equal rows, columns or channels; uint8 [H, W, C]."""
    y, x, c = np.mgrid[:height, :width, :channels]
    return (x * 7 + y * 5 + c * 40).astype(np.uint8)


def file_of(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG from its raw rows, for the kinds that Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), *chunks,
            png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b""),
        ]
    )  # fmt: skip


def assert_picture(image: Image.Image, expected: np.ndarray, within: int = 0):
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - expected.astype(int))
    assert difference.max() <= within, f"differs by up to {difference.max()}"


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats(format, options):
    pixels = gradient()
    assert_picture(read_image(file_of(Image.fromarray(pixels), format, **options)), pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg(options):
    data = file_of(Image.fromarray(gradient()), "JPEG", quality=95, subsampling=0, **options)
    assert_picture(read_image(data), gradient(), within=16)


def test_paths_and_names(tmp_path):
    """The content decides, not the suffix."""
    path = tmp_path / "not really.jpg"
    path.write_bytes(file_of(Image.fromarray(gradient()), "PNG"))
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes())):
        assert_picture(read_image(source), gradient())


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_pil_images_of_every_mode(mode):
    image = Image.fromarray(gradient()).convert(mode)
    assert_picture(read_image(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La"])
def test_alpha_is_laid_on_white(mode):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :3] = (60, 60, 60, 255)
    pixels[:2, 3:] = (60, 60, 60, 128)
    expected = np.full((4, 6, 3), 255, np.uint8)
    expected[:, :3], expected[:2, 3:] = 60, 157
    source = Image.fromarray(pixels)
    if mode in ("LA", "La"):
        source = source.convert("LA")
    assert_picture(read_image(source.convert(mode)), expected, within=1)
    if mode in ("RGBA", "LA"):
        assert_picture(read_image(file_of(source, "PNG")), expected, within=1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(format):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    expected = np.tile(np.uint8([0, 0, 255]), (2, 4, 1))
    expected[0, 0] = 255
    assert_picture(read_image(file_of(image, format, transparency=0)), expected)


def test_palette_with_alpha():
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 200])
    expected = np.tile(np.uint8([127, 127, 227]), (2, 4, 1))
    assert_picture(read_image(file_of(image, "PNG", transparency=b"\xff\x80")), expected, within=1)


def test_rgb_and_grey_with_a_transparent_colour():
    rgb = Image.new("RGB", (2, 1), (10, 20, 30))
    rgb.putpixel((0, 0), (1, 2, 3))
    assert_picture(read_image(file_of(rgb, "PNG", transparency=(1, 2, 3))), np.uint8([[[255] * 3, [10, 20, 30]]]))
    grey = Image.new("L", (2, 1), 10)
    grey.putpixel((0, 0), 7)
    assert_picture(read_image(file_of(grey, "PNG", transparency=7)), np.uint8([[[255] * 3, [10] * 3]]))


def test_16_bit_grey():
    values = np.uint16([[0, 256, 257, 32768, 65535]])
    expected = np.uint8([[0, 1, 1, 128, 255]])[:, :, None].repeat(3, axis=2)
    assert_picture(read_image(file_of(Image.fromarray(values), "PNG")), expected)
    assert_picture(read_image(Image.fromarray(values.astype(np.int32))), expected)
    big_endian = Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes())
    assert_picture(read_image(big_endian), expected)
    with pytest.raises(mt.InvalidInput, match="beyond 16 bits"):
        read_image(Image.fromarray(np.int32([[70000]])))


def test_large_16_bit_grey_is_converted_in_strips():
    values = np.linspace(0, 65535, 2000, dtype=np.uint16)[:, None].repeat(1100, axis=1)
    expected = np.rint(values / 257).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    assert_picture(read_image(Image.fromarray(values)), expected)


def test_large_alpha_is_converted_in_strips():
    alpha = np.linspace(0, 255, 2000, dtype=np.uint8)[:, None].repeat(1100, axis=1)
    black = np.zeros((2000, 1100, 3), np.uint8)
    expected = (255 - alpha)[:, :, None].repeat(3, axis=2)
    assert_picture(read_image(Image.fromarray(np.dstack([black, alpha]))), expected, within=1)


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_rgb_and_alpha(color, channels):
    values = np.full((2, 3, channels), 0x80FF, ">u2")
    if channels != 3:
        values[..., -1] = 0xFFFF
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    assert_picture(read_image(raw_png(3, 2, 16, color, rows)), np.full((2, 3, 3), 0x80, np.uint8), within=1)


def test_cmyk_jpeg():
    for ink, expected in (
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ):
        data = file_of(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
        assert_picture(read_image(data), np.tile(np.uint8(expected), (16, 16, 1)), within=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_rotation(orientation, format):
    upright = Image.fromarray(gradient())
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(ORIENTATIONS[inverse]) if inverse > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    once = read_image(data)
    assert_picture(once, gradient())
    assert_picture(read_image(once), gradient())  # not turned a second time


def test_exif_rotation_of_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(file_of(Image.fromarray(gradient()), "JPEG", exif=exif, quality=95, subsampling=0))
    assert_picture(image, np.rot90(gradient(), -1), within=16)


def test_exif_data_and_comments_stay_behind(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "secret"
    data = file_of(Image.fromarray(gradient()), "JPEG", exif=exif, comment=b"secret", icc_profile=b"secret")
    assert data.count(b"secret") == 3
    for suffix in WRITERS:
        mt.write_image(read_image(data), tmp_path / f"a{suffix}")
        assert b"secret" not in (tmp_path / f"a{suffix}").read_bytes()


def test_broken_exif_is_passed_over():
    data = file_of(Image.fromarray(gradient()), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert_picture(read_image(data), gradient())


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_first_frame_of_animations(format, options):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert_picture(read_image(data), np.tile(np.uint8([255, 0, 0]), (8, 8, 1)))


def test_first_picture_of_several_in_a_jpeg():
    """Phones write MPO: a JPEG with further pictures behind the first."""
    first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (16, 8), "blue")
    image = read_image(file_of(first, "MPO", save_all=True, append_images=[second], quality=95))
    assert_picture(image, np.tile(np.uint8([255, 0, 0]), (8, 16, 1)), within=3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays(dtype):
    pixels = gradient()
    assert_picture(read_image(pixels), pixels)
    assert_picture(read_image((pixels / 255).astype(dtype)), pixels)
    assert_picture(read_image(pixels[:, :, 0]), pixels[:, :, :1].repeat(3, axis=2))
    assert_picture(read_image(pixels[:, :, :1]), pixels[:, :, :1].repeat(3, axis=2))
    assert_picture(read_image(pixels[::-1, ::2]), pixels[::-1, ::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors(dtype):
    pixels = torch.from_numpy(gradient()).permute(2, 0, 1)
    assert_picture(read_image(pixels), gradient())
    assert_picture(read_image((pixels / 255).to(dtype).requires_grad_()), gradient())
    assert read_image(torch.rand(3, 5, 7).bfloat16()).size == (7, 5)
    assert_picture(read_image(pixels[:1]), gradient()[:, :, :1].repeat(3, axis=2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_pixels_and_back(width, height, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    pixels = to_pixels(image)
    assert pixels.shape == (3, height, width)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert_picture(to_pil(pixels), np.asarray(image))


def test_to_pil_clamps_and_rounds():
    pixels = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0, math.inf]).expand(3, 1, 6)
    assert np.asarray(to_pil(pixels))[0, :, 0].tolist() == [0, 0, 1, 255, 255, 255]
    assert to_pil(torch.rand(3, 4, 5).bfloat16()).size == (5, 4)
    for bad in (torch.full((3, 2, 2), math.nan), torch.rand(1, 2, 2), torch.zeros(3, 2, 2, dtype=torch.uint8)):
        with pytest.raises(mt.InvalidInput):
            to_pil(bad)


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (64, 67), (1, 1), (100, 1), (33, 1000), (640, 427), (31, 32)])
def test_fit_square_is_the_authors_preprocessing(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    expected = v2.Compose([v2.Resize(64, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64)])(image)
    assert_picture(fit_square(image, 64), np.asarray(expected))


@pytest.mark.parametrize("suffix", WRITERS)
def test_write_image(tmp_path, suffix):
    image = Image.fromarray(gradient())
    mt.write_image(image, tmp_path / f"a{suffix}")
    assert_picture(read_image(tmp_path / f"a{suffix}"), gradient(), within=16 if suffix in (".jpg", ".jpeg") else 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_write_image_refuses(tmp_path):
    for name in ("a.gif", "a.svg", "a"):
        with pytest.raises(mt.InvalidInput, match="choose one of these suffixes"):
            mt.write_image(Image.new("RGB", (2, 2)), tmp_path / name)
    with pytest.raises(mt.MediatokError, match=r"a\.webp"):
        mt.write_image(Image.new("RGB", (16400, 1)), tmp_path / "a.webp")
    with pytest.raises(mt.MediatokError, match="does not exist"):
        mt.write_image(Image.new("RGB", (2, 2)), tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_psnr():
    a = torch.rand(3, 8, 8)
    assert psnr(a, a) == math.inf
    assert psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20)
    assert psnr(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)) == 0
    with pytest.raises(mt.InvalidInput):
        psnr(torch.zeros(3, 4, 4), torch.zeros(3, 4, 5))


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt", ".hidden.png", ".cache/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.jpg", "b.PNG", "sub/c.webp"]
    assert list_images([tmp_path / "b.PNG", str(tmp_path / "a.jpg"), tmp_path / "a.jpg", "gone.png"]) == sorted(
        [tmp_path / "a.jpg", tmp_path / "b.PNG", mt.core.images.Path("gone.png")]
    )
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", []):
        with pytest.raises(mt.InvalidInput, match="no pictures"):
            list_images(nothing)
