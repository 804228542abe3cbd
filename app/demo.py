"""Self-check and demonstration: `python -m mediatok.app.demo [--out demo]`.

Every shipped image tokenizer that gives tokens encodes and decodes the sample pictures through the bytes of a `.mtok`
file, and the codec the sample clips. Tables tell tokens, bytes, PSNR or STOI, and seconds. With `--out` the
reconstructions, the `.mtok` files and one sheet of all pictures are kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ..core import registry
from ..core.errors import MediatokError
from ..core.files import atomic_write
from ..core.images import fit_square, list_images, psnr, read_image, to_pixels, write_image
from ..core.tokens import Tokens
from .demo_speech import check_codec, format_speech, sample_clips, save_speech

CODEC, RECOGNISER = "simcodec-tiny", "paraformer-tiny"
SAMPLES = Path(__file__).parent.parent / "docs" / "samples"
TILED_SAMPLE = "landscape"  # the large one that is not square
MIN_PSNR = 7.0  # dB; below this a model is not merely imprecise but broken
SHEET_CELL = 128


@dataclass(frozen=True)
class Row:
    """One line of the table, and the picture behind it."""

    model: str
    sample: str
    tokens: Tokens
    psnr: float
    seconds: float
    picture: Image.Image

    @property
    def variant(self) -> str:
        """What tells this row's picture from the model's others of the same sample."""
        return "tiled" if self.tokens.frames[0].is_tiled else f"{int(self.tokens.lengths[0])} tokens"


def check_tokenizer(tokenizer, samples: list[Path]) -> list[Row]:
    """Encode and decode every sample: at full length, at a quarter of it where lengths vary, and one as tiles if it can
    be told by its pixels.

    Raises:
        MediatokError: a picture that came back below `MIN_PSNR`, or tokens that their file does not give back.
    """
    settings = [{}]
    if tokenizer.is_variable_length:
        settings.append({"num_tokens": tokenizer.longest_within(tokenizer.max_tokens // 4)})
    tokenizer.decode(tokenizer.encode(samples[0]))  # the first call is slower and is not timed
    return [
        _check_sample(tokenizer, path, options)
        for options in [*settings, *([{"tile": True}] if tokenizer.keeps_pixels else [])]
        for path in samples
        if "tile" not in options or path.stem == TILED_SAMPLE
    ]


def _check_sample(tokenizer, path: Path, options: dict) -> Row:
    original = read_image(path)
    start = time.perf_counter()
    tokens = tokenizer.encode(original, **options)
    data = tokens.to_bytes()
    loaded = Tokens.from_bytes(data)
    picture = tokenizer.decode(loaded)
    seconds = time.perf_counter() - start
    if loaded != tokens or len(data) != tokens.num_bytes:
        raise MediatokError(f"self-check failed: {tokenizer.name} tokens of {path.name} change in their .mtok file")
    reference = original if "tile" in options else tokenizer.fit(original)
    value = psnr(to_pixels(picture), to_pixels(reference))
    if tokenizer.keeps_pixels and "num_tokens" not in options and not value >= MIN_PSNR:
        raise MediatokError(f"self-check failed: {tokenizer.name} gives {path.name} back with {value:.1f} dB only")
    return Row(tokenizer.name, path.stem, tokens, value, seconds, picture)


def format_table(rows: list[Row]) -> str:
    """The rows as text, and the mean of each model and variant over several samples."""
    lines = [f"{'model':<18}{'sample':<14}{'size':>9}{'tokens':>8}{'bytes':>8}{'PSNR':>10}{'seconds':>9}"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.variant), []).append(row)
    for (model, _), group in groups.items():
        for row in group:
            size = f"{row.picture.width}x{row.picture.height}"
            count = int(row.tokens.lengths[0])
            lines.append(
                f"{model:<18}{row.sample:<14}{size:>9}{count:>8}{row.tokens.num_bytes:>8}"
                f"{row.psnr:>7.2f} dB{row.seconds:>9.3f}"
            )
        if len(group) > 1:
            mean_psnr = sum(row.psnr for row in group) / len(group)
            mean_seconds = sum(row.seconds for row in group) / len(group)
            lines.append(f"{model:<18}{'mean':<14}{'':>25}{mean_psnr:>7.2f} dB{mean_seconds:>9.3f}")
    return "\n".join(lines)


def save_results(rows: list[Row], samples: list[Path], folder: Path) -> None:
    """Write each row's picture and `.mtok` file, and `overview.png` with all of them beside the originals."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediatokError(f"cannot make the folder {folder}: {error.strerror}") from error
    for row in rows:
        name = f"{row.sample}.{row.model}.{row.variant.replace(' ', '-')}"
        write_image(row.picture, folder / f"{name}.png")
        row.tokens.save(folder / f"{name}.mtok")
    with atomic_write(folder / "overview.png") as temporary:
        _draw_sheet(rows, samples).save(temporary, format="PNG")


def _draw_sheet(rows: list[Row], samples: list[Path]) -> Image.Image:
    lines = list(dict.fromkeys((row.model, row.variant) for row in rows if row.variant != "tiled"))
    left = 170
    sheet = Image.new("RGB", (left + SHEET_CELL * len(samples), SHEET_CELL * (len(lines) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, path in enumerate(samples):
        sheet.paste(fit_square(read_image(path), SHEET_CELL), (left + column * SHEET_CELL, 0))
    draw.text((8, SHEET_CELL // 2), "original", fill="black")
    names = [path.stem for path in samples]
    for index, (model, variant) in enumerate(lines, start=1):
        draw.text((8, index * SHEET_CELL + SHEET_CELL // 2 - 8), f"{model}\n{variant}", fill="black")
        for row in rows:
            if (row.model, row.variant) == (model, variant):
                cell = row.picture.resize((SHEET_CELL, SHEET_CELL), Image.Resampling.BICUBIC)
                sheet.paste(cell, (left + names.index(row.sample) * SHEET_CELL, index * SHEET_CELL))
    return sheet


def run(out: Path | None = None) -> list[Row]:
    """Check the shipped tokenizers, print the tables, and write the results into `out` if it is given.

    Returns the rows of the pictures.
    """
    samples = list_images(SAMPLES)
    rows = []
    for entry in registry.models():
        if entry.is_shipped and entry.kind == "tokenizer" and entry.modality == "image":
            tokenizer = registry.load(entry.name)
            if not tokenizer.is_continuous:  # latents have no .mtok file
                rows += check_tokenizer(tokenizer, samples)
    print(format_table(rows))
    spoken = check_codec(registry.load(CODEC), registry.load(RECOGNISER), sample_clips())
    print(f"\n{format_speech(spoken)}")
    if out is not None:
        save_results(rows, samples, out)
        save_speech(spoken, out)
        print(f"reconstructions, .mtok files and overview.png are in {out}/")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mediatok.app.demo", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for reconstructions and .mtok files")
    try:
        run(parser.parse_args().out)
    except MediatokError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
