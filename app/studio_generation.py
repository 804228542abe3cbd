"""What the studio does with generators: make pictures, and keep parts of one while the rest is made anew.

Plain Python on the public API, as studio_actions.py is for tokenizers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from ..core.errors import Cancelled, InvalidInput
from ..core.generator import image_seeds
from .studio_actions import changed_options
from .studio_models import GENERATOR, Catalogue
from .studio_worker import Job, device_name

MAX_PICTURES = 32  # in one run
AT_ONCE = 4  # pictures in a batch: a stopped run keeps its finished batches
FIRST_LABELS = ("smileys & emotion", "flags")  # what the page shows first, where the model knows them
FIRST_PROMPT = "red apple"
FIRST_SEED = 7


@dataclass(frozen=True)
class Recipe:
    """How one picture was made: class number or prompt, seed, settings, and what of an earlier one was kept.

    label: None for no class and no prompt. decoding: options of the tokenizer, where they are not its own values.
    """

    label: int | str | None
    seed: int
    steps: int | None
    guidance: float | None
    start: Recipe | None = None
    keep: tuple[int, ...] = ()
    decoding: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A finished picture. content: [1, ...] on the CPU, what its tokenizer decodes. seconds: its share of the batch."""

    image: Image.Image
    content: torch.Tensor
    recipe: Recipe
    seconds: float


@dataclass(frozen=True)
class Gallery:
    """Pictures of one run of a generator.

    source: what `mt.load` takes. steps: as people write them. unit_grid: rows and columns of the pieces that can be
    kept, None where they have no place in the picture; unit_word is what a piece is called; there may be none. asked:
    pictures that the run was to make. origin: the picture that an edit started from; it is not among `pictures`.
    """

    source: str
    model_name: str
    label_names: tuple[str, ...]
    steps: str
    guidance: float
    device: str
    num_units: int
    unit_grid: tuple[int, int] | None
    asked: int
    origin: Made | None = None
    pictures: tuple[Made, ...] = ()
    seconds: float = 0.0
    unit_word: str = "token"
    reads_text: bool = False
    method: str = "sample"  # of the generator, that makes pictures

    @property
    def shown(self) -> tuple[Made, ...]:
        """All pictures that the page shows and lets choose: the origin of an edit first."""
        return self.pictures if self.origin is None else (self.origin, *self.pictures)

    def units_of(self, picture: Made) -> int:
        """Pieces of a picture that can be kept: fewer than `num_units` where it has fewer tokens."""
        return min(self.num_units, picture.content.shape[1]) if self.unit_word == "token" else self.num_units

    def label(self, picture: Made) -> str:
        """What a picture was to be."""
        number = picture.recipe.label
        if number is None:
            return "no prompt" if self.reads_text else "no class"
        if isinstance(number, str):
            return number
        return self.label_names[number] if self.label_names else f"class {number}"


@dataclass(frozen=True)
class Progress:
    """A run under way: the finished pictures, and previews fp32 [B, 3, H, W] in [0, 1] of those in the making."""

    gallery: Gallery
    share: float
    previews: torch.Tensor | None = None


def make_pictures(
    generator, source: str, labels: list, seed: int, steps: int | None, guidance: float | None,
    job: Job, emit: Callable[[Progress], None] | None = None, origin: Made | None = None, keep: tuple[int, ...] = (),
    decoding: dict[str, Any] | None = None,
) -> Gallery:  # fmt: skip
    """Make one picture for each label, `AT_ONCE` at a time. Hold the device around it.

    Of a stopped job what is finished comes back, which may be nothing. Of `decoding` what the tokenizer lacks, and what
    is None, says nothing.

    Raises:
        InvalidInput: too many pictures, or settings that make no sense.
    """
    if not 1 <= len(labels) <= MAX_PICTURES:
        raise InvalidInput(f"{len(labels)} pictures are asked for; a run makes 1 to {MAX_PICTURES}")
    labels = generator.requests(labels)
    settings = generator.options_of(generator.checked_settings(steps, guidance))
    decoding = changed_options(generator, decoding)
    seeds = image_seeds(seed, len(labels))
    editing = {} if origin is None else {"start": origin.content, "keep": list(keep)}
    gallery = Gallery(
        source, generator.name, tuple(generator.label_names), _words(settings["steps"]), settings["guidance"],
        device_name(str(generator.device)), generator.num_units, generator.unit_grid, len(labels), origin,
        unit_word=generator.unit_word, reads_text=generator.accepts_text, method=generator.method,
    )  # fmt: skip
    begun = time.perf_counter()
    for first in range(0, len(labels), AT_ONCE):
        rows, batch_begun, latest = slice(first, first + AT_ONCE), time.perf_counter(), None

        def on_step(step: int, total: int, preview=None, done: Gallery = gallery, first: int = first) -> None:
            nonlocal latest
            job.check()
            latest = latest if preview is None else preview
            if emit is not None:
                batch = min(AT_ONCE, len(labels) - first)
                emit(Progress(done, (first + batch * step / total) / len(labels), latest))

        try:
            made = generator.sample(
                labels[rows], seed=seeds[rows], steps=steps, guidance=guidance, decoding=decoding,
                batch_size=AT_ONCE, previews=emit is not None, on_step=on_step, **editing,
            )  # fmt: skip
        except Cancelled:
            break
        seconds = (time.perf_counter() - batch_begun) / len(made.images)
        done = [
            Made(
                image, made.content[row : row + 1].clone(),
                Recipe(label, number, steps, guidance, None if origin is None else origin.recipe, keep, decoding),
                seconds,
            )
            for row, (image, label, number) in enumerate(zip(made.images, labels[rows], made.seeds, strict=True))
        ]  # fmt: skip
        gallery = replace(gallery, pictures=(*gallery.pictures, *done), seconds=time.perf_counter() - begun)
    return gallery


def first_gallery(catalogue: Catalogue) -> Gallery | None:
    """What the tab shows before anybody asked for anything; None without a generator."""
    if not catalogue.choices(GENERATOR):
        return None
    source = catalogue.default_source(GENERATOR)
    generator = catalogue.get(source, GENERATOR)
    labels = [FIRST_PROMPT] if generator.accepts_text else [0]
    labels = [label for label in FIRST_LABELS if label in generator.label_names] or labels
    labels = [label for label in labels for _ in range(4 // len(labels))]
    return make_pictures(generator, source, labels, FIRST_SEED, *own_settings(generator), Job())


def own_settings(generator) -> tuple[int, float]:
    """Steps and guidance that a generator has when nobody says; of steps that change within a run, the most."""
    options = generator.options_of(generator.checked_settings())
    steps = options["steps"]
    return max(steps) if isinstance(steps, (tuple, list)) else steps, options["guidance"]


def _words(steps) -> str:
    """Steps, which xAR has for every cell."""
    counts = list(dict.fromkeys(steps)) if isinstance(steps, (tuple, list)) else [steps]
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
