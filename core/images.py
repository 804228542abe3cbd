"""Pictures in and out: safe reading, the preprocessing of the image tokenizers, writing, PSNR.

Shape suffixes: 3 colours, H rows, W columns.
"""

from __future__ import annotations

import io
import math
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .errors import InvalidInput, LimitExceeded, MediatokError
from .files import atomic_write, read_limited, shown
from .tokens import MAX_SIDE

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 60 * 2**20
MAX_DECODE_BYTES = 8 * MAX_IMAGE_PIXELS  # 480 MiB: the memory that decoding one picture may take
MAX_ASPECT_RATIO = 100
STRIP_PIXELS = 2**20  # converted at a time, so that a large picture is never there three times

# EXIF orientation -> how to turn the picture upright.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_TAG = 0x0112

WRITERS = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
    ".bmp": {"format": "BMP"},
}

_warnings_lock = threading.Lock()


def read_image(source: str | Path | bytes | Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Return any picture as an upright, opaque PIL image of mode RGB with 8 bits a channel.

    Args:
        source: a path or the bytes of a PNG, JPEG, WebP, BMP or GIF file (the first frame of an animation); a PIL
            image; an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; a tensor [1, H, W] or [3, H, W]. Arrays and
            tensors are uint8 or float in [0, 1].

    EXIF rotation is applied, transparency is laid on white, 16-bit values are scaled to 8 bits, CMYK and palettes are
    converted; colour profiles are not applied.

    Raises:
        InvalidInput: missing, empty, damaged or truncated files, other formats, wrong shapes or values.
        LimitExceeded: more than `MAX_IMAGE_BYTES`, `MAX_IMAGE_PIXELS` or `MAX_DECODE_BYTES`; refused before the pixels
            are decoded.
    """
    if isinstance(source, (str, Path)):
        return _decode(read_limited(source, MAX_IMAGE_BYTES), shown(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) > MAX_IMAGE_BYTES:
            raise LimitExceeded(f"the picture has {len(source):,} bytes; the limit is {MAX_IMAGE_BYTES:,}")
        return _decode(bytes(source), "the picture")
    if isinstance(source, Image.Image):
        return _load(source, "the picture")
    if isinstance(source, Tensor):
        if source.ndim != 3 or source.shape[0] not in (1, 3):
            raise InvalidInput(f"a picture as a tensor has shape [3, H, W], got {list(source.shape)}")
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
        return _from_array(source.permute(1, 2, 0).numpy())
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise InvalidInput(f"a picture is a path, bytes, a PIL image, an array or a tensor, not {type(source).__name__}")


def to_pixels(image: Image.Image) -> Tensor:
    """Pixels float32 [3, H, W] in [0, 1] of a PIL image."""
    pixels_HW3 = torch.from_numpy(np.array(image if image.mode == "RGB" else _to_rgb(image)))
    return pixels_HW3.permute(2, 0, 1).float().div_(255).contiguous()


def to_pil(pixels_3HW: Tensor) -> Image.Image:
    """The PIL image of float pixels [3, H, W]; values are clamped to [0, 1] and rounded to 8 bits."""
    if pixels_3HW.ndim != 3 or pixels_3HW.shape[0] != 3 or not pixels_3HW.is_floating_point():
        raise InvalidInput(f"pixels must be float [3, H, W], got {pixels_3HW.dtype} {list(pixels_3HW.shape)}")
    if bool(pixels_3HW.isnan().any()):
        raise InvalidInput("the pixels hold NaN")
    pixels_3HW = pixels_3HW.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().numpy())


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter edge to `size` (bicubic) and cut out the centre: the evaluation preprocessing of TiTok.

    Raises:
        LimitExceeded: more than `MAX_ASPECT_RATIO` times as long as wide; the resized form would be huge.
    """
    short, long = sorted(image.size)
    if long > MAX_ASPECT_RATIO * short:
        raise LimitExceeded(
            f"a picture of {image.width}x{image.height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide; "
            "crop it first"
        )
    # The same roundings as torchvision's Resize and CenterCrop, which the evaluation of the authors uses.
    scaled = size * long // short
    width, height = (size, scaled) if image.width <= image.height else (scaled, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def crop_square(
    image: Image.Image, size: int, short_side: int | None = None, corner: tuple[int, int] | None = None
) -> Image.Image:
    """Halve by averages while that keeps twice `short_side`, resize the shorter edge to it (bicubic) and cut out a
    square: the preprocessing of ADM (Dhariwal & Nichol 2021), which many generators train and evaluate with.

    short_side: `size` unless given. corner: (top, left) of the square; the centre unless given.

    Raises:
        LimitExceeded: more than `MAX_ASPECT_RATIO` times as long as wide; the resized form would be huge.
    """
    short_side = size if short_side is None else short_side
    short, long = sorted(image.size)
    if long > MAX_ASPECT_RATIO * short:
        raise LimitExceeded(
            f"a picture of {image.width}x{image.height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide; "
            "crop it first"
        )
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = ((image.height - size) // 2, (image.width - size) // 2) if corner is None else corner
    return image.crop((left, top, left + size, top + size))


def pad_square(image: Image.Image, size: int) -> Image.Image:
    """The whole picture in the middle of a grey square, resized to `size` (bicubic): the preprocessing of LLaVA.

    Raises:
        LimitExceeded: more than `MAX_ASPECT_RATIO` times as long as wide; the square would be huge.
    """
    short, long = sorted(image.size)
    if long > MAX_ASPECT_RATIO * short or long**2 > MAX_IMAGE_PIXELS * 4:
        raise LimitExceeded(f"a picture of {image.width}x{image.height} pixels is too long to be padded; crop it first")
    square = Image.new("RGB", (long, long), (127, 127, 127))
    square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def write_image(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> None:
    """Write a picture, whole or not at all, in the format of its suffix: PNG, lossless WebP, BMP, JPEG quality 95.

    `text` goes into the text fields of a PNG; the other formats have none.
    """
    options = WRITERS.get(Path(path).suffix.lower())
    if options is None:
        raise InvalidInput(f"{shown(path)}: pictures are written as {', '.join(WRITERS)}; choose one of these suffixes")
    if text and options["format"] == "PNG":
        fields = PngInfo()
        for name, value in text.items():
            fields.add_itxt(name, value) if not value.isascii() else fields.add_text(name, value)
        options = options | {"pnginfo": fields}
    with atomic_write(path) as temporary:
        try:
            image.save(temporary, **options)
        except ValueError as error:  # a side beyond what the format holds
            raise InvalidInput(
                f"{shown(path)}: {image.width}x{image.height} pixels cannot be written: {error}"
            ) from error


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two tensors [..., H, W] with values in [0, 1]; infinite when equal."""
    if a.shape != b.shape or a.numel() == 0:
        raise InvalidInput(f"PSNR needs two pictures of one shape, got {list(a.shape)} and {list(b.shape)}")
    mse = float((a.double() - b.double()).square().mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


def resized_to(image: Image.Image, reference: Image.Image) -> Image.Image:
    """`image` at the size of `reference` (bicubic), to compare the two: some tokenizers draw larger than they read."""
    return image if image.size == reference.size else image.resize(reference.size, Image.Resampling.BICUBIC)


def list_images(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Sorted paths of the pictures in a folder and its subfolders, or in a list of files and folders.

    Folders give the files with one of `IMAGE_SUFFIXES`, hidden ones left out; named files are taken as they are.
    """
    named = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found: set[Path] = set()
    for path in map(Path, named):
        if path.is_dir():
            found |= {file for file in path.rglob("*") if _is_listed(file.relative_to(path)) and file.is_file()}
        else:
            found.add(path)
    if not found:
        where = ", ".join(map(shown, named)) or "the empty list"
        raise InvalidInput(f"{where} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(found)


def _is_listed(relative: Path) -> bool:
    return relative.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in relative.parts)


def _decode(data: bytes, where: str) -> Image.Image:
    image = _load(
        _open(data, where), where
    )  # nothing here holds the opened image: its memory goes when it is converted
    image.info = {}  # EXIF data and comments stay behind
    return image


def _open(data: bytes, where: str) -> Image.Image:
    """Read the header of a picture of an allowed format."""
    if not data:
        raise InvalidInput(f"{where} is empty (0 bytes)")
    try:
        with _without_warnings():  # Pillow warns above its own pixel limit; ours is lower, `_load` refuses
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(f"{int(pixels[0]):,} pixels" if pixels else "too many pixels", where) from error
    except Image.UnidentifiedImageError as error:
        raise InvalidInput(f"{where} is not a sound {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture") from error
    except Exception as error:  # decoders raise many kinds for broken headers
        raise InvalidInput(f"{where} cannot be opened: {error}") from error


def _load(image: Image.Image, where: str) -> Image.Image:
    """Decode the pixels of an opened image and make them upright RGB."""
    _check_size(image.width, image.height, where)
    needed = image.width * image.height * _decode_bytes_per_pixel(image)
    if needed > MAX_DECODE_BYTES:
        raise LimitExceeded(
            f"{where} has {image.width}x{image.height} pixels, which take {needed / 2**20:,.0f} MiB to decode as "
            f"{image.format}; the limit is {MAX_DECODE_BYTES / 2**20:,.0f} MiB: make it smaller first"
        )
    try:
        image.load()
        turn = _turn(image)
        image = _to_rgb(image)
        if turn is not None:
            image = image.transpose(turn)
            image.info = {}  # without the EXIF data that would turn it again
        return image
    except MediatokError:
        raise
    except Exception as error:  # decoders raise many kinds for broken data
        raise InvalidInput(f"{where} is damaged or truncated: {error}") from error


def _decode_bytes_per_pixel(image: Image.Image) -> int:
    """Peak memory of `_load`: Pillow takes 4 bytes for a pixel of any colour picture, and we make one copy at most."""
    if image.format == "WEBP":  # its decoder keeps two canvases beside the frame (measured)
        return 17
    if image.format in ("JPEG", "MPO"):  # a progressive file is kept whole, as 16-bit coefficients
        return max(4 + 2 * getattr(image, "layers", 3), 8)
    return 8


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, by its EXIF data."""
    try:
        with _without_warnings():
            return ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG))
    except Exception:  # a picture with broken EXIF data is still a picture
        return None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Pillow's warnings to ourselves. One thread at a time: Python's filters belong to the whole process."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InvalidInput("a PIL image of mode F has no known range; pass an array of floats in [0, 1]")
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    is_grey16 = image.mode.startswith("I")  # "I;16" and its byte orders; "I" where other programs keep 16 bits in 32
    if not is_grey16 and not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image
    canvas = Image.new("RGB", image.size, "white")
    rows = max(STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if is_grey16:
            canvas.paste(_grey16_to_8(strip), (0, top))
        else:
            strip = strip.convert("RGBA")
            canvas.paste(strip, (0, top), mask=strip)
    return canvas


def _grey16_to_8(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise InvalidInput(f"grey values of {values.min()} to {values.max()} are beyond 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _from_array(pixels: np.ndarray) -> Image.Image:
    """A picture of an array [H, W] or [H, W, C]."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise InvalidInput(f"a picture as an array has shape [H, W] or [H, W, 1, 3 or 4], got {list(pixels.shape)}")
    height, width, channels = pixels.shape
    _check_size(width, height, "the picture")
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            raise InvalidInput("the picture holds NaN or infinite values")
        low, high = float(pixels.min()), float(pixels.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise InvalidInput(f"a picture of floats lies in [0, 1], got {low:g} to {high:g}; scale or clip it first")
        pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise InvalidInput(f"a picture as an array or tensor is uint8 or float in [0, 1], not {pixels.dtype}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels if channels > 1 else pixels[:, :, 0])))


def _check_size(width: int, height: int, where: str) -> None:
    if width < 1 or height < 1:
        raise InvalidInput(f"{where} has no pixels: {width}x{height}")
    if width > MAX_SIDE or height > MAX_SIDE:
        raise LimitExceeded(f"{where} has {width}x{height} pixels; the limit is {MAX_SIDE:,} a side")
    if width * height > MAX_IMAGE_PIXELS:
        raise _too_large(f"{width}x{height} pixels", where)


def _too_large(size: str, where: str) -> LimitExceeded:
    return LimitExceeded(f"{where} has {size}; the limit is {MAX_IMAGE_PIXELS:,} in all: make it smaller first")
