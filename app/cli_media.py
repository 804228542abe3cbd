"""Pictures, audio or meshes: which of them a call is about, by the model that it names or by its files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..core.errors import InvalidInput
from .cli_jobs import Outcome, collect_files

Item = TypeVar("Item")


@dataclass(frozen=True)
class Medium:
    """One kind of media.

    modality: what models of this kind call it. suffixes: of files that are looked for in folders. foreign: of files
    that are of this kind, too, and are refused with a reason when they are named. outputs: what is written, the first
    unless another is asked for. options: of the commands, those that not all media have.
    """

    modality: str
    one: str
    many: str
    suffixes: tuple[str, ...]
    foreign: tuple[str, ...]
    outputs: tuple[str, ...]
    options: tuple[str, ...]

    def includes(self, path: Path) -> bool:
        """Whether a file's name says that it is of this kind."""
        return path.suffix.lower() in self.suffixes + self.foreign


PICTURES = Medium(
    modality="image",
    one="a picture",
    many="pictures",
    suffixes=(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    foreign=(".tif", ".tiff", ".heic", ".avif", ".svg"),
    outputs=(".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    options=(
        "--num-tokens", "--target-psnr", "--max-bytes", "--tile", "--text", "--lengths", "--lpips-weights",
        "--inception-weights", "--lite0-weights", "--steps", "--guidance", "--set", "--up-to-scale", "--grid", "--edit",
        "--keep", "--prompt", "--decoding",
    ),
)  # fmt: skip
AUDIO = Medium(
    modality="speech",
    one="audio",
    many="audio files",
    suffixes=(".wav", ".flac", ".ogg", ".oga", ".opus"),
    foreign=(".mp3", ".m4a", ".aac", ".aif", ".aiff", ".wma", ".au"),
    outputs=(".wav", ".flac", ".ogg"),
    options=("--recogniser", "--transcripts", "--dnsmos", "--split"),
)
MESHES = Medium(
    modality="shape",
    one="a mesh",
    many="meshes",
    suffixes=(".obj", ".stl", ".ply", ".off", ".glb"),
    foreign=(".gltf", ".fbx", ".dae", ".3ds", ".3mf", ".blend", ".usd", ".usdz", ".step", ".drc"),
    outputs=(".glb", ".obj", ".stl", ".ply"),
    options=("--seed", "--resolution", "--up-to-scale"),
)
MEDIA = (PICTURES, AUDIO, MESHES)
COUNTS = {2: "two", 3: "three"}

Files = Annotated[
    list[Path],
    typer.Argument(
        help="Pictures (PNG, JPEG, WebP, BMP, GIF), audio (WAV, FLAC, Ogg), meshes (OBJ, STL, PLY, OFF, GLB), or "
        "folders of one kind."
    ),
]
AudioFiles = Annotated[list[Path], typer.Argument(help="Audio (WAV, FLAC, Ogg) or folders of it.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Result file for one input, or folder for several.")]


def find_medium(inputs: Sequence[Path], model: str | None) -> Medium:
    """What the model reads, or without one what the inputs are; pictures where nothing tells.

    Raises:
        InvalidInput: files of several kinds in one call, and no model that would choose.
    """
    from .cli_models import find_class

    model_class = find_class(model) if model is not None else None
    if model_class is not None:
        return next((medium for medium in MEDIA if medium.modality == model_class.modality), PICTURES)
    # What is wrong with the inputs is told later, when they are collected for the work.
    suffixes = tuple(suffix for medium in MEDIA for suffix in medium.suffixes)
    files = [path for path, _ in collect_files(inputs, suffixes, Outcome())]
    found = [medium for medium in MEDIA if any(map(medium.includes, files))]
    if len(found) > 1:
        *others, last = (medium.many for medium in found)
        raise InvalidInput(
            f"these are {', '.join(others)} and {last}; give them in {COUNTS[len(found)]} calls, or say with --model "
            "which of them are meant"
        )
    return found[0] if found else PICTURES


def medium_of_tokens(path: Path) -> Medium:
    """What a .mtok file says that it holds; no more of it is read here. Pictures where it says nothing."""
    from ..core.mtok import HAS_SCALES, MAGIC, MODALITIES

    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + 2)
    except OSError:
        return PICTURES
    number = head[-1] & ~HAS_SCALES if len(head) == len(MAGIC) + 2 and head.startswith(MAGIC) else None
    return next((medium for medium in MEDIA if MODALITIES[medium.modality] == number), PICTURES)


def only(medium: Medium, model: str, items: Iterable[tuple[Path, Item]], outcome: Outcome) -> list[Item]:
    """The second of each pair whose path is not of another kind than `model` reads; the others fail in `outcome`."""
    kept = []
    for path, item in items:
        other = next((other for other in MEDIA if other is not medium and other.includes(path)), None)
        if other is None:
            kept.append(item)
        else:
            outcome.fail(path, f"this is {other.one}, and {model} reads {medium.many}; choose another --model")
    return kept


def check_options(options: dict[str, object], medium: Medium) -> None:
    """Raise InvalidInput when one of `options` (name -> value) is given that this medium does not have."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    refused = [name for name in given if name not in medium.options]
    if refused:
        raise InvalidInput(f"{', '.join(refused)} cannot be used with {medium.many}")
