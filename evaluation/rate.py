"""Rate against distortion of one picture: this tokenizer at several lengths, beside JPEG and WebP.

All curves are measured on the same reference: the square that the tokenizer reads (its `fit`), or, with `tile`, the
picture at its own size. A tokenizer that draws at another size is compared after resizing (bicubic). Bytes are those of
whole files: the `.mtok` with its header, the JPEG or WebP with theirs.
JPEG and WebP cannot go below a few hundred bytes at full size, so they are also tried on a reduced picture that is
scaled back up, which is what one would do at such rates; of all settings only the best at each size is kept.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ..core.errors import InvalidInput
from ..core.images import fit_square, psnr, read_image, resized_to, to_pixels
from .plot import Curve, plot_curves

CODECS = ("jpeg", "webp")
QUALITIES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
LARGE_QUALITIES = (1, 10, 30, 60, 90)  # above LARGE_PIXELS, where each encoding takes a good part of a second
LARGE_PIXELS = 2**20
REDUCTIONS = (1, 2, 4, 8)
MIN_SIDE = 8  # no reduction below this


@dataclass(frozen=True)
class RatePoint:
    """One file that stands for the picture: its size, and how near to the picture it comes.

    bytes: size of the whole file. bits_per_pixel: 8 * bytes / pixels of the reference. psnr: dB, on 8-bit pixels.
    num_tokens: tokens in the file (per tile), None for JPEG and WebP. setting: how it was made, in words.
    """

    bytes: int
    bits_per_pixel: float
    psnr: float
    num_tokens: int | None = None
    setting: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def default_lengths(tokenizer) -> list[int]:
    """The lengths that a curve shows by default: powers of two and the full length, or every whole number of scales;
    one where the length is fixed."""
    if tokenizer.scales or not tokenizer.is_variable_length:
        return list(tokenizer.lengths)
    powers = [2**k for k in range(tokenizer.max_tokens.bit_length()) if 2**k < tokenizer.max_tokens]
    return [*powers, tokenizer.max_tokens]


def reference_image(tokenizer, image, *, tile: bool = False) -> Image.Image:
    """The picture that every curve is measured on: the tokenizer's square input, or the whole picture with `tile`."""
    picture = read_image(image)
    return picture if tile else tokenizer.fit(picture)


def rate_curve(
    tokenizer, image, lengths: Iterable[int] | None = None, *, tile: bool = False, batch_size: int = 8, on_step=None
) -> list[RatePoint]:
    """Measure `tokenizer` on one picture at each of `lengths` tokens (per tile), shortest first.

    Args:
        tokenizer: an image tokenizer with discrete tokens.
        image: whatever `read_image` takes.
        lengths: token counts; default `default_lengths(tokenizer)`. A fixed-length tokenizer has a single one.
        tile: code the whole picture at its own size as tiles, instead of the resized and cropped square.

    Raises:
        InvalidInput: an unreadable picture, a length that the tokenizer cannot give, or a continuous tokenizer.
    """
    reference = reference_image(tokenizer, image, tile=tile)
    chosen = sorted(set(default_lengths(tokenizer) if lengths is None else lengths))
    if not chosen:
        raise InvalidInput("lengths is empty; give at least one token count")
    for length in chosen:
        tokenizer.check_num_tokens(length)
    # One encoding serves all lengths: a shorter code of a variable-length tokenizer is a prefix of the longest. Tiled
    # tokens have no prefixes (their tiles lie one behind the other), so they are encoded for each length.
    full = None if tile else tokenizer.encode(reference, num_tokens=chosen[-1])
    points = []
    for length in chosen:
        if tile:
            tokens = tokenizer.encode(reference, num_tokens=length, tile=True, batch_size=batch_size)
        else:
            tokens = full if length == chosen[-1] else full[:, :length]
        points.append(_tokenizer_point(tokenizer, reference, tokens, batch_size))
        if on_step is not None:
            on_step(len(points), len(chosen), preview=None)
    return points


def _tokenizer_point(tokenizer, reference: Image.Image, tokens, batch_size: int) -> RatePoint:
    decoded = tokenizer.decode(tokens, batch_size=batch_size)
    frame, total = tokens.frames[0], int(tokens.lengths[0])
    per_tile = total // frame.num_tiles
    tiles = "" if frame.num_tiles == 1 else f" x {frame.num_tiles} tiles"
    return _point(tokens.num_bytes, reference, decoded, per_tile, f"{per_tile} tokens{tiles}")


def codec_curve(
    image,
    codec: str,
    *,
    size: int | None = None,
    qualities: Sequence[int] | None = None,
    reductions: Sequence[int] = REDUCTIONS,
) -> list[RatePoint]:
    """Measure JPEG or WebP on one picture; only settings that no smaller file beats, smallest first.

    Args:
        image: whatever `read_image` takes.
        codec: "jpeg" or "webp" (lossy).
        size: side of the square that the picture is resized and cropped to; None keeps the picture as it is.
        qualities: encoder qualities, 1 to 95.
        reductions: factors by which the picture is shrunk before and enlarged after, 1 for none.
    """
    if codec not in CODECS:
        raise InvalidInput(f"codec must be one of {', '.join(CODECS)}, not {codec!r}")
    picture = read_image(image)
    reference = picture if size is None else fit_square(picture, size)
    if qualities is None:
        qualities = LARGE_QUALITIES if reference.width * reference.height > LARGE_PIXELS else QUALITIES
    points = []
    for factor in reductions:
        small = (round(reference.width / factor), round(reference.height / factor))
        if factor > 1 and min(small) < MIN_SIDE:
            continue
        source = reference if factor == 1 else reference.resize(small, Image.Resampling.LANCZOS)
        for quality in qualities:
            data = _encode(source, codec, quality)
            with Image.open(io.BytesIO(data)) as opened:
                decoded = opened.convert("RGB")
            if factor > 1:
                decoded = decoded.resize(reference.size, Image.Resampling.BICUBIC)
            setting = f"quality {quality}" + ("" if factor == 1 else f" at {small[0]}x{small[1]}")
            points.append(_point(len(data), reference, decoded, None, setting))
    return _best_points(points)


def _encode(image: Image.Image, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    if codec == "jpeg":
        image.save(buffer, "JPEG", quality=quality, optimize=True)
    else:
        image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _point(
    num_bytes: int, reference: Image.Image, decoded: Image.Image, num_tokens: int | None, setting: str
) -> RatePoint:
    value = psnr(to_pixels(resized_to(decoded, reference)), to_pixels(reference))
    return RatePoint(num_bytes, 8 * num_bytes / (reference.width * reference.height), value, num_tokens, setting)


def _best_points(points: list[RatePoint]) -> list[RatePoint]:
    best: list[RatePoint] = []
    for point in sorted(points, key=lambda p: (p.bytes, -p.psnr)):
        if not best or point.psnr > best[-1].psnr:
            best.append(point)
    return best


def best_within(points: Sequence[RatePoint], max_bytes: float) -> RatePoint | None:
    """The point of highest PSNR that needs at most `max_bytes`; None if even the smallest needs more."""
    fitting = [point for point in points if point.bytes <= max_bytes]
    return max(fitting, key=lambda point: point.psnr) if fitting else None


def smallest_reaching(points: Sequence[RatePoint], psnr_db: float) -> RatePoint | None:
    """The smallest file of at least `psnr_db`; None if no point is that good."""
    return min((point for point in points if point.psnr >= psnr_db), key=lambda point: point.bytes, default=None)


def mean_points(curves: Sequence[Sequence[RatePoint]]) -> list[RatePoint]:
    """The mean over pictures of a tokenizer's curves that were measured at the same lengths."""
    return [_mean(points, points[0].num_tokens, points[0].setting) for points in zip(*curves, strict=True)]


def mean_within(curves: Sequence[Sequence[RatePoint]], budgets: Iterable[float]) -> list[RatePoint]:
    """The mean over pictures of the best that a codec does within each of `budgets` bytes a picture.

    Budgets that some picture cannot be squeezed into are left out.
    """
    means = []
    for budget in budgets:
        points = [best_within(points, budget) for points in curves]
        if all(points):
            means.append(_mean(points, None, f"within {budget:.0f} bytes"))
    return means


def _mean(points: Sequence[RatePoint], num_tokens: int | None, setting: str) -> RatePoint:
    count = len(points)
    return RatePoint(
        bytes=round(sum(point.bytes for point in points) / count),
        bits_per_pixel=sum(point.bits_per_pixel for point in points) / count,
        psnr=sum(min(point.psnr, 100.0) for point in points) / count,
        num_tokens=num_tokens,
        setting=setting,
    )


def plot_rate(curves: dict[str, Sequence[RatePoint]], path: str | Path, title: str = "") -> None:
    """Write a PNG with one line a curve: PSNR in dB over bytes (logarithmic)."""
    drawn = {
        name: Curve(
            [point.bytes for point in points],
            [min(point.psnr, 60) for point in points],
            [str(point.num_tokens) for point in points if point.num_tokens],
        )
        for name, points in curves.items()
    }
    plot_curves(drawn, path, "bytes of the whole file", "PSNR (dB)", title)
