"""`mediatok encode`, `decode` and `reconstruct`: pictures to `.mtok` files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput, ModelNotFound
from .cli_jobs import DECODED, RECONSTRUCTED, TOKEN_SUFFIXES, Job, Outcome, make_folder, plan_jobs, run_batches
from .cli_models import AsJson, BatchSize, Device, DType, load_tokenizer

MAX_PSNR = 100.0  # dB, stands for pictures that are equal
FIXED_MODEL, VARIABLE_MODEL = "titok-tiny", "one-d-piece-tiny"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Pictures = Annotated[list[Path], typer.Argument(help="Pictures (PNG, JPEG, WebP, BMP, GIF) or folders of them.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Result file for one input, or folder for several.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help=f"Name, folder or hub id; default {FIXED_MODEL}, or {VARIABLE_MODEL} if a length or quality is given.",
    ),
]  # fmt: skip
NumTokens = Annotated[int | None, typer.Option(min=1, help="Keep the first tokens only (variable-length models).")]
TargetPsnr = Annotated[float | None, typer.Option(help="Fewest tokens that reach this PSNR in dB, for each picture.")]
MaxBytes = Annotated[int | None, typer.Option(min=1, help="As many tokens as fit a .mtok file of this size.")]
Tile = Annotated[bool, typer.Option("--tile", help="Keep the picture's size: code it as overlapping tiles.")]
Text = Annotated[str | None, typer.Option(help="Caption for text-aware models.")]


def encode(
    inputs: Pictures,
    out: Out = None,
    model: Model = None,
    num_tokens: NumTokens = None,
    target_psnr: TargetPsnr = None,
    max_bytes: MaxBytes = None,
    tile: Tile = False,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Turn pictures into .mtok files.

    cat.png becomes cat.mtok beside it; a folder photos becomes a folder photos-tokens; --out names another place.
    """
    from ..core.images import read_image

    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes)
    jobs = plan_jobs(
        inputs, out, outcome, suffixes=PICTURE_SUFFIXES, output_suffixes=TOKEN_SUFFIXES, folder_tag="-tokens"
    )
    if jobs:
        tokenizer = load_tokenizer(model or default_model(options), device, dtype)
        tokenizer.check_num_tokens(num_tokens)

        def work(batch: list[Job], pictures: list) -> list[dict]:
            tokens = tokenizer.encode(pictures, tile=tile, batch_size=batch_size, **options)
            records = []
            for index, (job, picture) in enumerate(zip(batch, pictures, strict=True)):
                make_folder(job.output)
                tokens[index].save(job.output)
                records.append(_record(job, tokenizer, tokens[index], picture if tile else None))
            return records

        run_batches(jobs, outcome, read=read_image, work=work, weigh=_num_pixels, batch_size=batch_size, label="encode")
    outcome.finish(as_json, _line, lambda records: _summary("encoded", records))


def decode(
    inputs: Annotated[list[Path], typer.Argument(help=".mtok files or folders of them.")],
    out: Out = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name, folder or hub id; default: the one named in the file.")
    ] = None,
    text: Text = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Turn .mtok files back into pictures.

    cat.mtok becomes cat.decoded.png beside it; a folder photos becomes a folder photos-decoded; --out names another
    place or format.
    """
    from ..core.images import write_image
    from ..core.registry import find_entry
    from ..core.tokens import Tokens

    outcome = Outcome()
    jobs = plan_jobs(
        inputs, out, outcome,
        suffixes=TOKEN_SUFFIXES, output_suffixes=OUTPUT_SUFFIXES, tag=DECODED, folder_tag="-decoded",
    )  # fmt: skip
    tokenizers: dict[str, object] = {}

    def tokenizer_of(name: str):
        # A name in a file may be anything: only known ones are loaded for it, never a path or somebody's repository.
        if model is None and find_entry(name) is None:
            raise ModelNotFound(f"its tokenizer {name!r} is not a known model; give its folder with --model")
        if name not in tokenizers:
            tokenizers[name] = load_tokenizer(name, device, dtype)
        return tokenizers[name]

    def work(batch: list[Job], items: list) -> list[dict]:
        names = [model or tokens.tokenizer for tokens in items]
        records = []
        for name in dict.fromkeys(names):
            chosen = [index for index, other in enumerate(names) if other == name]
            pictures = tokenizer_of(name).decode(
                Tokens.cat([items[index] for index in chosen]), batch_size=batch_size, **_captions(text)
            )
            for index in chosen:
                job, tokens = batch[index], items[index]
                make_folder(job.output)
                for number, path in enumerate(_numbered(job.output, len(tokens))):
                    picture = pictures.pop(0)
                    write_image(picture, path)
                    records.append(_record(Job(job.source, path), tokenizer_of(name), tokens[number], picture))
        return records

    if jobs:
        if model is not None:
            tokenizer_of(model)
        run_batches(
            jobs, outcome, read=Tokens.load, work=work, weigh=_tiled_pixels, batch_size=batch_size, label="decode"
        )
    outcome.finish(as_json, _line, lambda records: _summary("decoded", records))


def reconstruct(
    inputs: Pictures,
    out: Out = None,
    model: Model = None,
    num_tokens: NumTokens = None,
    target_psnr: TargetPsnr = None,
    max_bytes: MaxBytes = None,
    tile: Tile = False,
    text: Text = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Encode, decode and tell the PSNR.

    cat.png becomes cat.reconstructed.png beside it; a folder photos becomes a folder photos-reconstructed.
    """
    from ..core.images import fit_square, psnr, read_image, to_pixels, write_image

    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes)
    jobs = plan_jobs(
        inputs, out, outcome, suffixes=PICTURE_SUFFIXES, output_suffixes=OUTPUT_SUFFIXES,
        tag=RECONSTRUCTED, folder_tag="-reconstructed",
    )  # fmt: skip
    if jobs:
        tokenizer = load_tokenizer(model or default_model(options), device, dtype)
        tokenizer.check_num_tokens(num_tokens)

        def work(batch: list[Job], pictures: list) -> list[dict]:
            if tokenizer.is_continuous:
                tiling = {"tile": True} if tile else {}
                tokens, results = None, tokenizer.reconstruct(pictures, **_captions(text), **options, **tiling)
            else:
                tokens = tokenizer.encode(pictures, tile=tile, batch_size=batch_size, **options)
                results = tokenizer.decode(tokens, batch_size=batch_size, **_captions(text))
            records = []
            for index, (job, picture, result) in enumerate(zip(batch, pictures, results, strict=True)):
                make_folder(job.output)
                write_image(result, job.output)
                reference = picture if tile else fit_square(picture, tokenizer.image_size)
                record = _record(job, tokenizer, tokens[index] if tokens else None, reference)
                records.append(
                    record | {"psnr": round(min(psnr(to_pixels(result), to_pixels(reference)), MAX_PSNR), 3)}
                )
            return records

        run_batches(
            jobs, outcome, read=read_image, work=work, weigh=_num_pixels, batch_size=batch_size, label="reconstruct"
        )
    outcome.finish(as_json, _line, lambda records: _summary("reconstructed", records))


def length_options(num_tokens: int | None, target_psnr: float | None, max_bytes: int | None) -> dict:
    """The options given, as `encode` takes them."""
    if num_tokens is not None and (target_psnr is not None or max_bytes is not None):
        raise InvalidInput("--num-tokens fixes the length; give it alone, or --target-psnr and/or --max-bytes")
    options = {"num_tokens": num_tokens, "target_psnr": target_psnr, "max_bytes": max_bytes}
    return {name: value for name, value in options.items() if value is not None}


def default_model(options: dict) -> str:
    """The shipped tokenizer that can do what is asked."""
    return VARIABLE_MODEL if options else FIXED_MODEL


def _captions(text: str | None) -> dict:
    return {} if text is None else {"text": text}


def _num_pixels(picture) -> int:
    return picture.width * picture.height


def _tiled_pixels(tokens) -> int:
    return sum(frame.width * frame.height for frame in tokens.frames if frame.is_tiled)


def _numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one picture; cat-1.png, cat-2.png ... for a file that holds several."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]


def _record(job: Job, tokenizer, tokens, coded_picture) -> dict:
    """What is told about one file; `coded_picture` is what the tokens stand for, None for the model's square."""
    width, height = coded_picture.size if coded_picture else (tokenizer.image_size, tokenizer.image_size)
    record = {"input": str(job.source), "output": str(job.output), "model": tokenizer.name}
    record |= {"width": width, "height": height}
    if tokens is not None:
        record["tokens"] = int(tokens.lengths[0])
        record["bytes"] = tokens.num_bytes
        record["bits_per_pixel"] = round(8 * tokens.num_bytes / (width * height), 5)
    return record


def _line(record: dict) -> str:
    parts = [f"{record['input']} -> {record['output']}", f"{record['width']}x{record['height']}"]
    if "tokens" in record:
        parts += [
            f"{record['tokens']} tokens",
            f"{record['bytes']} bytes",
            f"{record['bits_per_pixel']:.3f} bits/pixel",
        ]
    if "psnr" in record:
        parts.append(f"{record['psnr']:.2f} dB")
    return "  ".join(parts)


def _summary(verb: str, records: list[dict]) -> str:
    parts = [f"{verb} {len(records)} pictures with {', '.join(sorted({record['model'] for record in records}))}"]
    counted = [record for record in records if "tokens" in record]
    if counted:
        pixels = sum(record["width"] * record["height"] for record in counted)
        total = sum(record["bytes"] for record in counted)
        parts.append(f"{sum(r['tokens'] for r in counted)} tokens, {total} bytes, {8 * total / pixels:.3f} bits/pixel")
    if "psnr" in records[0]:
        parts.append(f"mean {sum(record['psnr'] for record in records) / len(records):.2f} dB")
    return ": ".join(parts[:1]) + "".join(f", {part}" for part in parts[1:])
