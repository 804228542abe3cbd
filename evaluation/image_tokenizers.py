"""All image tokenizers on the same pictures, at equal bytes, in one table.

    python -m mediatok.evaluation.image_tokenizers data/fluent-emoji/64/val

prints a Markdown table: of each shipped image tokenizer, or of those in `--models`, the tokens and bits of a picture,
PSNR, SSIM, FD-Lite0, and the milliseconds that encoding and decoding take. The protocol is that of `mediatok evaluate`.

A tokenizer whose length varies has a row for each budget of 12, 24, 48 ... bytes of ids: that of the longest length
within it. So each row has others of as many bytes beside it, whatever the sizes of codebooks and scales. Continuous
tokenizers have rows without tokens and bits: what their latents alone lose, which is what a decoder that draws such
latents cannot do better than. Drawing starts from the noise of seed 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from ..core.errors import InvalidInput, MediatokError
from ..core.image_tokenizer import ImageTokenizer
from ..core.images import fit_square, list_images, read_image, to_pil, to_pixels
from ..core.registry import load, models
from .evaluate import evaluate
from .report import Report
from .tables import head, number, row

FIRST_BUDGET = 12  # bytes of ids: 8 tokens of 4,096 codes
NUM_TIMED = 16  # pictures
COLUMNS = ("model", "tokens", "bits (bytes)", "PSNR", "SSIM", "FD-Lite0", "encode", "decode")


@dataclass(frozen=True)
class Row:
    """One tokenizer at one length.

    tokens, bits: of the ids of a picture; None of continuous tokenizers. fd_lite0: None without its weights or with too
    few pictures. encode_ms, decode_ms: milliseconds, median over pictures that are coded one at a time.
    """

    model: str
    tokens: int | None
    bits: int | None
    psnr: float
    ssim: float
    fd_lite0: float | None
    encode_ms: float
    decode_ms: float


def lengths_at_equal_bytes(tokenizer: ImageTokenizer) -> list[int | None]:
    """The lengths of a tokenizer's rows, longest first; [None] where the length is fixed."""
    if not tokenizer.is_variable_length:
        return [None]
    bits_per_token = (tokenizer.vocab_size - 1).bit_length()
    lengths, budget = {tokenizer.max_tokens}, FIRST_BUDGET
    while 8 * budget < tokenizer.max_tokens * bits_per_token:
        count = 8 * budget // bits_per_token
        if count >= tokenizer.lengths[0]:
            lengths.add(tokenizer.longest_within(count))
        budget *= 2
    return sorted(lengths, reverse=True)


def measure(
    tokenizer: ImageTokenizer, sources: Sequence, num_tokens: int | None, *, set_name: str = "pictures", **options
) -> tuple[Row, Report]:
    """The row of a tokenizer at one length, and the report that it is taken from; `options` are those of `evaluate`."""
    report = evaluate(tokenizer, sources, num_tokens=num_tokens, set_name=set_name, **options)
    figures = report.figures
    tokens = round(figures["tokens per picture"]) if "tokens per picture" in figures else None
    squares = [fit_square(read_image(source), tokenizer.image_size) for source in sources[:NUM_TIMED]]
    encode_ms, decode_ms = coding_times(tokenizer, squares, num_tokens)
    bits = None if tokens is None else tokens * (tokenizer.vocab_size - 1).bit_length()
    return Row(
        tokenizer.name, tokens, bits, figures["PSNR (dB)"], figures["SSIM"], figures.get("FD-Lite0"), encode_ms,
        decode_ms,
    ), report  # fmt: skip


@torch.inference_mode()
def coding_times(
    tokenizer: ImageTokenizer, squares: Sequence[Image.Image], num_tokens: int | None = None
) -> tuple[float, float]:
    """Milliseconds that encoding and decoding of a picture take: the median over `squares`, coded one at a time."""
    if tokenizer.is_continuous:

        def encode(square: Image.Image):
            return tokenizer.encode_latents(to_pixels(square)[None].to(tokenizer.device))

        def decode(latents):
            return to_pil(tokenizer.decode_latents(latents)[0])
    else:
        length = {} if num_tokens is None else {"num_tokens": num_tokens}

        def encode(square: Image.Image):
            return tokenizer.encode(square, **length)

        decode = tokenizer.decode
    decode(encode(squares[0]))  # a warm-up
    coded, encode_seconds = _timed(encode, squares)
    _, decode_seconds = _timed(decode, coded)
    return 1000 * encode_seconds, 1000 * decode_seconds


def _timed(call: Callable, items: Sequence) -> tuple[list, float]:
    results, seconds = [], []
    for item in items:
        start = time.perf_counter()
        results.append(call(item))
        seconds.append(time.perf_counter() - start)
    return results, statistics.median(seconds)


def shipped_names() -> list[str]:
    """The image tokenizers that come with the package."""
    return [
        entry.name for entry in models() if entry.is_shipped and (entry.kind, entry.modality) == ("tokenizer", "image")
    ]


def compare_tokenizers(names: Sequence[str], sources: Sequence, **options) -> Iterator[tuple[Row, Report]]:
    """Rows of the tokenizers `names`, one after the other, and their reports; one tokenizer is in memory at a time.

    Raises:
        InvalidInput: a name of something else than an image tokenizer, or tokenizers that read pictures of several
            sizes, whose figures cannot be compared; before anything is measured.
    """
    sides = {name: _side(name) for name in names}
    if len(set(sides.values())) > 1:
        shown = ", ".join(f"{name} ({side} px)" for name, side in sides.items())
        raise InvalidInput(f"figures at different sizes cannot be compared: {shown}; name models of one size")
    for name in names:
        tokenizer = load(name)
        for length in lengths_at_equal_bytes(tokenizer):
            yield measure(tokenizer, sources, length, **options)


def _side(name: str) -> int:
    tokenizer = load(name)
    if not isinstance(tokenizer, ImageTokenizer):
        raise InvalidInput(f"{name} holds a {type(tokenizer).__name__}, which is no image tokenizer")
    if tokenizer.accepts_text:
        raise InvalidInput(f"{name} decodes with a caption: measure it by `mediatok evaluate --text`")
    return tokenizer.image_size


def about(report: Report) -> str:
    """The protocol that all rows share, in a paragraph."""
    protocol = report.protocol
    floor = report.figures.get("FD-Lite0 split-half floor")
    lines = [
        f"{protocol.num_items} pictures of {protocol.set_name} (sha256 {protocol.set_sha256[:16]}), "
        f"{protocol.preprocessing}; {report.dtype} on {report.device}; threads: {torch.get_num_threads()}; times: "
        f"median of {min(NUM_TIMED, protocol.num_items)} pictures, one at a time.",
        f"FD-Lite0: {number(floor, 1)} between two halves of the originals." if floor is not None else "",
        *(f"Note: {note}." for note in report.notes if "FD-Lite0" in note),
    ]
    return "\n".join(filter(None, lines))


def as_markdown(figures: Row, name: str) -> str:
    """A line of the table; `name` stands in its first column."""
    bits = "" if figures.bits is None else f"{figures.bits} ({-(-figures.bits // 8)})"
    return row(
        name, "" if figures.tokens is None else str(figures.tokens), bits, number(figures.psnr, 2, " dB"),
        number(figures.ssim, 3), number(figures.fd_lite0, 1), number(figures.encode_ms, 1, " ms"),
        number(figures.decode_ms, 1, " ms"),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.evaluation.image_tokenizers", description=__doc__)
    parser.add_argument("pictures", type=Path, nargs="+", help="folders or files")
    parser.add_argument("--models", nargs="+", help="names or folders (default: all shipped image tokenizers)")
    parser.add_argument("--lite0-weights", type=Path, help="EfficientNet-Lite0 weights (default: those of `make data`)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a row")
    arguments = parser.parse_args(argv)
    last = None
    try:
        sources = list_images(arguments.pictures)
        set_name = "+".join(map(str, arguments.pictures[:3]))
        weights = {"lite0_weights": arguments.lite0_weights}
        names = arguments.models or shipped_names()
        for figures, report in compare_tokenizers(names, sources, set_name=set_name, **weights):
            if arguments.json:
                print(json.dumps(asdict(figures)), flush=True)
                continue
            if last is None:
                print(f"{about(report)}\n\n{head(*COLUMNS)}")
            name = "" if figures.model == last else f"`{figures.model}`"
            print(as_markdown(figures, name), flush=True)
            last = figures.model
    except MediatokError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
