"""`mediatok encode`, `decode` and `reconstruct`: pictures and audio to `.mtok` files and back.

What is done with either is in cli_pictures.py and cli_audio.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput, ModelNotFound
from . import cli_audio, cli_pictures
from .cli_jobs import DECODED, TOKEN_SUFFIXES, Outcome, plan_jobs
from .cli_media import AUDIO, PICTURES, Files, Out, find_medium, refuse_options
from .cli_models import AsJson, BatchSize, Device, DType, load_tokenizer

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help=f"Name, folder or hub id; default {cli_pictures.FIXED_MODEL}, or {cli_pictures.VARIABLE_MODEL} if a "
        f"length or quality is given; {cli_audio.DEFAULT_MODEL} for audio.",
    ),
]  # fmt: skip
NumTokens = Annotated[int | None, typer.Option(min=1, help="Keep the first tokens only (variable-length models).")]
TargetPsnr = Annotated[float | None, typer.Option(help="Fewest tokens that reach this PSNR in dB, for each picture.")]
MaxBytes = Annotated[int | None, typer.Option(min=1, help="As many tokens as fit a .mtok file of this size.")]
Tile = Annotated[bool, typer.Option("--tile", help="Keep the picture's size: code it as overlapping tiles.")]
Text = Annotated[str | None, typer.Option(help="Caption for text-aware models.")]


def encode(
    inputs: Files,
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
    """Turn pictures or audio into .mtok files.

    cat.png becomes cat.mtok beside it; a folder photos becomes a folder photos-tokens; --out names another place.
    """
    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes)
    where = {"device": device, "dtype": dtype}
    if find_medium(inputs, model) is AUDIO:
        refuse_options(picture_options(num_tokens, target_psnr, max_bytes, tile), AUDIO)
        cli_audio.encode_audio(inputs, out, model, outcome, batch_size=batch_size, **where)
    else:
        name = model or cli_pictures.default_model(options)
        cli_pictures.encode_pictures(inputs, out, name, outcome, options, tile, batch_size=batch_size, **where)
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
    """Turn .mtok files back into pictures and sound.

    cat.mtok becomes cat.decoded.png beside it, or cat.decoded.wav; a folder photos becomes a folder photos-decoded;
    --out names another place or format.
    """
    outcome = Outcome()
    jobs = plan_jobs(
        inputs, out, outcome,
        suffixes=TOKEN_SUFFIXES, output_suffixes=PICTURES.outputs + AUDIO.outputs, tag=DECODED, folder_tag="-decoded",
        default_suffix=lambda path: (AUDIO if cli_audio.holds_speech(path) else PICTURES).outputs[0],
    )  # fmt: skip
    speech, pictures = [], []
    for job in jobs:
        (speech if cli_audio.holds_speech(job.source) else pictures).append(job)
    if speech:
        refuse_options({"--text": text}, AUDIO)
    tokenizers: dict[str, object] = {}

    def tokenizer_of(tokens):
        from ..core.registry import find_entry

        name = model or tokens.tokenizer
        # A name in a file may be anything: only known ones are loaded for it, never a path or somebody's repository.
        if model is None and find_entry(name) is None:
            raise ModelNotFound(f"its tokenizer {name!r} is not a known model; give its folder with --model")
        if name not in tokenizers:
            tokenizers[name] = load_tokenizer(name, device, dtype, tokens.modality)
        elif tokenizers[name].modality != tokens.modality:
            raise InvalidInput(f"this holds {tokens.modality}, and {name} is a tokenizer of another kind")
        return tokenizers[name]

    cli_pictures.decode_pictures(pictures, outcome, tokenizer_of, text, batch_size)
    cli_audio.decode_audio(speech, outcome, tokenizer_of)
    outcome.finish(as_json, _line, lambda records: _summary("decoded", records))


def reconstruct(
    inputs: Files,
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
    """Encode, decode and tell how much is lost: PSNR of pictures, log-mel distance of audio.

    cat.png becomes cat.reconstructed.png beside it; a folder photos becomes a folder photos-reconstructed.
    """
    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes)
    where = {"device": device, "dtype": dtype}
    if find_medium(inputs, model) is AUDIO:
        refuse_options(picture_options(num_tokens, target_psnr, max_bytes, tile, text), AUDIO)
        cli_audio.reconstruct_audio(inputs, out, model, outcome, batch_size=batch_size, **where)
    else:
        name = model or cli_pictures.default_model(options)
        cli_pictures.reconstruct_pictures(
            inputs, out, name, outcome, options, tile, text, batch_size=batch_size, **where
        )
    outcome.finish(as_json, _line, lambda records: _summary("reconstructed", records))


def length_options(num_tokens: int | None, target_psnr: float | None, max_bytes: int | None) -> dict:
    """The options given, as `encode` takes them."""
    if num_tokens is not None and (target_psnr is not None or max_bytes is not None):
        raise InvalidInput("--num-tokens fixes the length; give it alone, or --target-psnr and/or --max-bytes")
    options = {"num_tokens": num_tokens, "target_psnr": target_psnr, "max_bytes": max_bytes}
    return {name: value for name, value in options.items() if value is not None}


def picture_options(
    num_tokens: int | None,
    target_psnr: float | None,
    max_bytes: int | None,
    tile: bool = False,
    text: str | None = None,
) -> dict[str, object]:
    """What only pictures have, by the names of the options."""
    options = {"--num-tokens": num_tokens, "--target-psnr": target_psnr, "--max-bytes": max_bytes}
    return options | {"--tile": tile, "--text": text}


def _line(record: dict) -> str:
    return cli_audio.line(record) if "seconds" in record else cli_pictures.line(record)


def _summary(verb: str, records: list[dict]) -> str:
    clips = [record for record in records if "seconds" in record]
    pictures = [record for record in records if "seconds" not in record]
    parts = [cli_pictures.summary(verb, pictures)] if pictures else []
    return "\n".join(parts + ([cli_audio.summary(verb, clips)] if clips else []))
