"""`mediatok encode`, `decode` and `reconstruct`: pictures, audio and meshes to `.mtok` files and back.

What is done with each is in cli_pictures.py, cli_audio.py and cli_shapes.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput, ModelNotFound
from . import cli_audio, cli_pictures, cli_shapes
from .cli_jobs import DECODED, TOKEN_SUFFIXES, Job, Outcome, plan_jobs
from .cli_media import AUDIO, MEDIA, MESHES, PICTURES, Files, Medium, Out, check_options, find_medium, medium_of_tokens
from .cli_models import AsJson, BatchSize, Device, DType, load_tokenizer
from .cli_settings import merged
from .cli_shapes import PointSeed, Resolution, UpToScale, shape_options

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help=f"Name, folder or hub id; default {cli_pictures.FIXED_MODEL}, or {cli_pictures.VARIABLE_MODEL} if a "
        f"length or quality is given; {cli_audio.DEFAULT_MODEL} for audio, {cli_shapes.DEFAULT_MODEL} for meshes.",
    ),
]  # fmt: skip
NumTokens = Annotated[int | None, typer.Option(min=1, help="Keep the first tokens only (variable-length models).")]
TargetPsnr = Annotated[float | None, typer.Option(help="Fewest tokens that reach this PSNR in dB, for each picture.")]
MaxBytes = Annotated[int | None, typer.Option(min=1, help="As many tokens as fit a .mtok file of this size.")]
Tile = Annotated[bool, typer.Option("--tile", help="Keep the picture's size: code it as overlapping tiles.")]
Text = Annotated[str | None, typer.Option(help="Caption for text-aware models.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Pictures: steps of decoders that draw; default their own.")]
Guidance = Annotated[float | None, typer.Option(help="Pictures: how closely such decoders follow the tokens.")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Pictures: of the noise such decoders start with. Meshes: of points on surfaces."),
]
DrawSeed = Annotated[int | None, typer.Option(min=0, help="Pictures: of the noise that such decoders start with.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="Another setting of the decoder, as norm_guidance=no; repeatable.")
]


def encode(
    inputs: Files,
    out: Out = None,
    model: Model = None,
    num_tokens: NumTokens = None,
    target_psnr: TargetPsnr = None,
    max_bytes: MaxBytes = None,
    tile: Tile = False,
    seed: PointSeed = None,
    up_to_scale: UpToScale = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Turn pictures, audio or meshes into .mtok files.

    cat.png becomes cat.mtok beside it; a folder photos becomes a folder photos-tokens; --out names another place.
    """
    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes, up_to_scale)
    medium = find_medium(inputs, model)
    check_options(
        picture_options(num_tokens, target_psnr, max_bytes, tile) | shape_options(seed, up_to_scale=up_to_scale), medium
    )
    encode_files = {
        PICTURES: partial(cli_pictures.encode_pictures, options=options, tile=tile),
        AUDIO: cli_audio.encode_audio,
        MESHES: partial(cli_shapes.encode_shapes, seed=seed, up_to_scale=up_to_scale),
    }[medium]
    name = choose_model(model, medium, options)
    encode_files(inputs, out, name, outcome, batch_size=batch_size, device=device, dtype=dtype)
    outcome.finish(as_json, _line, lambda records: _summary("encoded", records))


def decode(
    inputs: Annotated[list[Path], typer.Argument(help=".mtok files or folders of them.")],
    out: Out = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name, folder or hub id; default: the one named in the file.")
    ] = None,
    num_tokens: NumTokens = None,
    text: Text = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: DrawSeed = None,
    setting: Setting = None,
    resolution: Resolution = None,
    up_to_scale: UpToScale = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Turn .mtok files back into pictures, sound and meshes.

    cat.mtok becomes cat.decoded.png beside it, or cat.decoded.wav or .glb; a folder photos becomes a folder
    photos-decoded; --out names another place or format.
    """
    outcome, decoding = Outcome(), decoding_options(steps, guidance, seed, setting)
    if num_tokens is not None and up_to_scale is not None:
        raise InvalidInput("--num-tokens and --up-to-scale both say how many tokens are decoded; give one of them")
    jobs = plan_jobs(
        inputs, out, outcome,
        suffixes=TOKEN_SUFFIXES, output_suffixes=PICTURES.outputs + AUDIO.outputs + MESHES.outputs,
        tag=DECODED, folder_tag="-decoded", default_suffix=lambda path: medium_of_tokens(path).outputs[0],
    )  # fmt: skip
    jobs_of: dict[Medium, list[Job]] = {medium: [] for medium in MEDIA}
    for job in jobs:
        medium = medium_of_tokens(job.source)
        of_pictures = {"--num-tokens": num_tokens, "--text": text} | drawing_options(steps, guidance, setting)
        check_options(of_pictures | shape_options(None, resolution, up_to_scale), medium)
        if seed is not None and medium is not PICTURES:
            raise InvalidInput(f"--seed: {medium.many} are decoded without chance")
        jobs_of[medium].append(job)
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
            raise InvalidInput(f"this holds {tokens.modality} tokens, and {name} is a tokenizer of another kind")
        return tokenizers[name]

    cli_pictures.decode_pictures(
        jobs_of[PICTURES], outcome, tokenizer_of, text, decoding, batch_size, num_tokens=num_tokens,
        up_to_scale=up_to_scale,
    )  # fmt: skip
    cli_audio.decode_audio(jobs_of[AUDIO], outcome, tokenizer_of)
    cli_shapes.decode_shapes(jobs_of[MESHES], outcome, tokenizer_of, resolution, up_to_scale)
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
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    setting: Setting = None,
    resolution: Resolution = None,
    up_to_scale: UpToScale = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Encode, decode and tell how much is lost: PSNR of pictures, log-mel distance of audio, F-score of meshes.

    cat.png becomes cat.reconstructed.png beside it; a folder photos becomes a folder photos-reconstructed.
    """
    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes, up_to_scale)
    medium = find_medium(inputs, model)
    of_pictures = picture_options(num_tokens, target_psnr, max_bytes, tile, text)
    of_pictures |= drawing_options(steps, guidance, setting)
    is_pictures = medium is PICTURES
    check_options(of_pictures | shape_options(None if is_pictures else seed, resolution, up_to_scale), medium)
    decoding = decoding_options(steps, guidance, seed if is_pictures else None, setting)
    reconstruct_files = {
        PICTURES: partial(cli_pictures.reconstruct_pictures, options=options, tile=tile, text=text, decoding=decoding),
        AUDIO: cli_audio.reconstruct_audio,
        MESHES: partial(cli_shapes.reconstruct_shapes, seed=seed, resolution=resolution, up_to_scale=up_to_scale),
    }[medium]
    name = choose_model(model, medium, options)
    reconstruct_files(inputs, out, name, outcome, batch_size=batch_size, device=device, dtype=dtype)
    outcome.finish(as_json, _line, lambda records: _summary("reconstructed", records))


def choose_model(model: str | None, medium: Medium, options: dict) -> str:
    """The model that is asked for, or the default one; for pictures it depends on `options` of the length."""
    defaults = {
        PICTURES: cli_pictures.default_model(options),
        AUDIO: cli_audio.DEFAULT_MODEL,
        MESHES: cli_shapes.DEFAULT_MODEL,
    }
    return model or defaults[medium]


def length_options(
    num_tokens: int | None, target_psnr: float | None, max_bytes: int | None, up_to_scale: int | None = None
) -> dict:
    """The options given, as `encode` takes them, and "up_to_scale", which the tokenizer turns into tokens."""
    for flag, value in (("--num-tokens", num_tokens), ("--up-to-scale", up_to_scale)):
        others = {"--num-tokens": num_tokens, "--up-to-scale": up_to_scale, "--target-psnr": target_psnr}
        others["--max-bytes"] = max_bytes
        if value is not None and any(other is not None for name, other in others.items() if name != flag):
            raise InvalidInput(f"{flag} fixes the length; give it alone, or --target-psnr and/or --max-bytes")
    options = {"num_tokens": num_tokens, "target_psnr": target_psnr, "max_bytes": max_bytes, "up_to_scale": up_to_scale}
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


def drawing_options(steps: int | None, guidance: float | None, setting: list[str] | None) -> dict[str, object]:
    """What decoders of pictures alone have, by the names of the options; `--seed` others have, too."""
    return {"--steps": steps, "--guidance": guidance, "--set": setting or None}


def decoding_options(
    steps: int | None, guidance: float | None, seed: int | None, setting: list[str] | None
) -> dict[str, object]:
    """The options given, as `decode` takes them."""
    given = {"steps": steps, "guidance": guidance, "seed": seed}
    return merged({name: value for name, value in given.items() if value is not None}, setting or [])


# What the records of each kind have, and who puts them into words.
WORDS = {"width": cli_pictures, "seconds": cli_audio, "faces": cli_shapes}


def _line(record: dict) -> str:
    return next(words.line(record) for key, words in WORDS.items() if key in record)


def _summary(verb: str, records: list[dict]) -> str:
    groups = [(words, [record for record in records if key in record]) for key, words in WORDS.items()]
    return "\n".join(words.summary(verb, group) for words, group in groups if group)
