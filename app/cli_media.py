"""Pictures or audio: which of them a call is about, by the model that it names or by its files."""

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
    unless another is asked for.
    """

    modality: str
    one: str
    many: str
    suffixes: tuple[str, ...]
    foreign: tuple[str, ...]
    outputs: tuple[str, ...]

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
)
AUDIO = Medium(
    modality="speech",
    one="audio",
    many="audio files",
    suffixes=(".wav", ".flac", ".ogg", ".oga", ".opus"),
    foreign=(".mp3", ".m4a", ".aac", ".aif", ".aiff", ".wma", ".au"),
    outputs=(".wav", ".flac", ".ogg"),
)
MEDIA = (PICTURES, AUDIO)

Files = Annotated[
    list[Path],
    typer.Argument(help="Pictures (PNG, JPEG, WebP, BMP, GIF), audio (WAV, FLAC, Ogg), or folders of either."),
]
AudioFiles = Annotated[list[Path], typer.Argument(help="Audio (WAV, FLAC, Ogg) or folders of it.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Result file for one input, or folder for several.")]


def find_medium(inputs: Sequence[Path], model: str | None) -> Medium:
    """What the model reads, or without one what the inputs are; pictures where nothing tells.

    Raises:
        InvalidInput: pictures and audio in one call, and no model that would choose.
    """
    from .cli_models import find_class

    model_class = find_class(model) if model is not None else None
    if model_class is not None:
        return next((medium for medium in MEDIA if medium.modality == model_class.modality), PICTURES)
    # What is wrong with the inputs is told later, when they are collected for the work.
    files = [path for path, _ in collect_files(inputs, PICTURES.suffixes + AUDIO.suffixes, Outcome())]
    found = [medium for medium in MEDIA if any(map(medium.includes, files))]
    if len(found) > 1:
        raise InvalidInput(
            "these are pictures and audio files; give them in two calls, or say with --model which of them are meant"
        )
    return found[0] if found else PICTURES


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


def refuse_options(options: dict[str, object], medium: Medium) -> None:
    """Raise InvalidInput when one of `options` (name -> value) is given, which only another medium has."""
    given = [name for name, value in options.items() if value not in (None, False)]
    if given:
        raise InvalidInput(f"{', '.join(given)} cannot be used with {medium.many}")
