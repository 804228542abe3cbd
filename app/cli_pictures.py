"""What `mediatok encode`, `decode` and `reconstruct` do with pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..core.errors import InvalidInput
from .cli_jobs import (
    RECONSTRUCTED,
    TOKEN_SUFFIXES,
    Job,
    Outcome,
    make_folder,
    numbered,
    plan_jobs,
    run_batches,
    steps_bar,
)
from .cli_media import PICTURES, only
from .cli_models import load_tokenizer

MAX_PSNR = 100.0  # dB, stands for pictures that are equal
FIXED_MODEL, VARIABLE_MODEL = "titok-tiny", "one-d-piece-tiny"


def default_model(options: dict) -> str:
    """The shipped image tokenizer that can do what is asked."""
    return VARIABLE_MODEL if options else FIXED_MODEL


def first_tokens(tokens, num_tokens: int | None, up_to_scale: int | None):
    """The first tokens or scales of items from a file; all of an item that has fewer tokens."""
    if up_to_scale is not None:
        return tokens.up_to_scale(up_to_scale)
    return tokens if num_tokens is None else tokens[:, :num_tokens]


def encode_pictures(
    inputs: Sequence[Path], out: Path | None, name: str, outcome: Outcome, options: dict, tile: bool,
    *, batch_size: int, **where: str,
) -> None:  # fmt: skip
    """Write a .mtok file for every picture. `options`: of the length; `where`: device and dtype."""
    from ..core.images import read_image

    jobs = plan_jobs(
        inputs, out, outcome, suffixes=PICTURES.suffixes, output_suffixes=TOKEN_SUFFIXES, folder_tag="-tokens"
    )
    jobs, tokenizer = _prepare(jobs, name, outcome, options, where)

    def work(batch: list[Job], pictures: list) -> list[dict]:
        tokens = tokenizer.encode(pictures, tile=tile, batch_size=batch_size, **options)
        records = []
        for index, (job, picture) in enumerate(zip(batch, pictures, strict=True)):
            make_folder(job.output)
            tokens[index].save(job.output)
            records.append(_record(job, tokenizer, tokens[index], picture if tile else None))
        return records

    run_batches(jobs, outcome, read=read_image, work=work, weigh=_num_pixels, batch_size=batch_size, label="encode")


def decode_pictures(
    jobs: Sequence[Job], outcome: Outcome, tokenizer_of: Callable, text: str | None, decoding: dict, batch_size: int,
    *, num_tokens: int | None = None, up_to_scale: int | None = None,
) -> None:  # fmt: skip
    """Write a picture for every item of the jobs' .mtok files; `tokenizer_of` finds the tokenizer of tokens.

    decoding: options of `decode`. num_tokens, up_to_scale: decode the first tokens or scales alone.
    """
    from ..core.images import write_image
    from ..core.tokens import Tokens

    def read(path: Path) -> Tokens:
        if outputs[path].suffix.lower() not in PICTURES.outputs:
            raise InvalidInput(f"this holds pictures, and {outputs[path]} must end in {', '.join(PICTURES.outputs)}")
        return first_tokens(Tokens.load(path), num_tokens, up_to_scale)

    outputs = {job.source: job.output for job in jobs}

    def work(batch: list[Job], items: list) -> list[dict]:
        tokenizers = [tokenizer_of(tokens) for tokens in items]
        records = []
        for tokenizer in dict.fromkeys(tokenizers):
            chosen = [index for index, other in enumerate(tokenizers) if other is tokenizer]
            joined = Tokens.cat([items[index] for index in chosen])
            with _steps_bar(tokenizer, jobs) as on_step:
                pictures = tokenizer.decode(
                    joined, batch_size=batch_size, on_step=on_step, **_captions(text), **decoding
                )
            for index in chosen:
                job, tokens = batch[index], items[index]
                make_folder(job.output)
                for number, path in enumerate(numbered(job.output, len(tokens))):
                    picture = pictures.pop(0)
                    write_image(picture, path)
                    records.append(_record(Job(job.source, path), tokenizer, tokens[number], picture))
        return records

    run_batches(jobs, outcome, read=read, work=work, weigh=_tiled_pixels, batch_size=batch_size, label="decode")


def reconstruct_pictures(
    inputs: Sequence[Path], out: Path | None, name: str, outcome: Outcome, options: dict, tile: bool, text: str | None,
    decoding: dict, *, batch_size: int, **where: str,
) -> None:  # fmt: skip
    """Write what is left of every picture after encoding and decoding, and tell the PSNR."""
    from ..core.images import psnr, read_image, resized_to, to_pixels, write_image

    jobs = plan_jobs(
        inputs, out, outcome, suffixes=PICTURES.suffixes, output_suffixes=PICTURES.outputs,
        tag=RECONSTRUCTED, folder_tag="-reconstructed",
    )  # fmt: skip
    jobs, tokenizer = _prepare(jobs, name, outcome, options, where)
    if tokenizer is not None:
        tokenizer.checked_decoding(**decoding)  # a wrong value is found before the work

    def work(batch: list[Job], pictures: list) -> list[dict]:
        if tokenizer.is_continuous:
            tiling = {"tile": True} if tile else {}
            tokens, results = None, tokenizer.reconstruct(pictures, **_captions(text), **options, **tiling)
        else:
            tokens = tokenizer.encode(pictures, tile=tile, batch_size=batch_size, **options)
            with _steps_bar(tokenizer, jobs) as on_step:
                results = tokenizer.decode(
                    tokens, batch_size=batch_size, on_step=on_step, **_captions(text), **decoding
                )
        records = []
        for index, (job, picture, result) in enumerate(zip(batch, pictures, results, strict=True)):
            make_folder(job.output)
            write_image(result, job.output)
            reference = picture if tile else tokenizer.fit(picture)
            record = _record(job, tokenizer, tokens[index] if tokens else None, reference)
            value = psnr(to_pixels(resized_to(result, reference)), to_pixels(reference))
            records.append(record | {"psnr": round(min(value, MAX_PSNR), 3)})
        return records

    run_batches(
        jobs, outcome, read=read_image, work=work, weigh=_num_pixels, batch_size=batch_size, label="reconstruct"
    )


def _prepare(jobs: list[Job], name: str, outcome: Outcome, options: dict, where: dict[str, str]):
    """The jobs whose sources may be pictures, and the tokenizer for them, which is not loaded for none.

    "up_to_scale" among the options becomes the number of tokens that it stands for.
    """
    jobs = only(PICTURES, name, ((job.source, job) for job in jobs), outcome)
    tokenizer = load_tokenizer(name, modality=PICTURES.modality, **where) if jobs else None
    if tokenizer is not None:
        if "up_to_scale" in options:
            options["num_tokens"] = tokenizer.tokens_of_scales(options.pop("up_to_scale"))
        tokenizer.check_num_tokens(options.get("num_tokens"))
    return jobs, tokenizer


def _steps_bar(tokenizer, jobs: Sequence[Job]):
    """A progress bar over the steps of a decoder where there is none over files; gives its `on_step`."""
    is_slow = len(jobs) == 1 and "steps" in tokenizer.decoding_option_names
    return steps_bar(2 if is_slow else 0, "decode", unit="step")


def _captions(text: str | None) -> dict:
    return {} if text is None else {"text": text}


def _num_pixels(picture) -> int:
    return picture.width * picture.height


def _tiled_pixels(tokens) -> int:
    return sum(frame.width * frame.height for frame in tokens.frames if frame.is_tiled)


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


def line(record: dict) -> str:
    """One picture in words."""
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


def summary(verb: str, records: Sequence[dict]) -> str:
    """Several pictures in words."""
    parts = [f"{verb} {len(records)} pictures with {', '.join(sorted({record['model'] for record in records}))}"]
    counted = [record for record in records if "tokens" in record]
    if counted:
        pixels = sum(record["width"] * record["height"] for record in counted)
        total = sum(record["bytes"] for record in counted)
        parts.append(f"{sum(r['tokens'] for r in counted)} tokens, {total} bytes, {8 * total / pixels:.3f} bits/pixel")
    if "psnr" in records[0]:
        parts.append(f"mean {sum(record['psnr'] for record in records) / len(records):.2f} dB")
    return ": ".join(parts[:1]) + "".join(f", {part}" for part in parts[1:])
