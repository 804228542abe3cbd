"""What the studio does with shapes: encode and decode, up to any scale, and make new ones scale by scale.

Plain Python on the public API, as studio_actions.py is for pictures. Hold the device around everything with a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from .. import Tokens
from ..core.errors import InvalidInput
from ..core.generator import MAX_GUIDANCE
from ..core.meshes import normalise
from ..evaluation.shape_distances import SurfacePoints, figures_of_nothing, surface_figures
from .studio_shapes_reader import MeshFile
from .studio_speech_actions import Progress, stepper
from .studio_worker import Job, device_name

RESOLUTIONS = (32, 64, 128)  # cells a side
FIRST_RESOLUTION = 64
PREVIEW_RESOLUTION = 32
SCORE_POINTS = 10_000  # on either surface: within 0.01 of what a hundred thousand say
SCORE_SEED = 0
ENCODE_SEED = 0


@dataclass(frozen=True)
class TokensFile:
    """A .mtok file that a page works on: its name, and the tokens of its first item."""

    name: str
    tokens: Tokens


@dataclass(frozen=True)
class Coded:
    """A shape, its tokens and the mesh that they make.

    source: what `mt.load` takes. subject: what was given. codes: of all scales that there are. num_scales: how many of
    them were decoded, to `mesh`, which has no faces where nothing is inside. seconds: of what was done, told by `done`.
    figures: of `surface_figures`; None without an original.
    """

    source: str
    model_name: str
    subject: MeshFile | TokensFile
    codes: Tokens
    num_scales: int
    resolution: int
    mesh: object
    seconds: float
    done: str
    device: str
    figures: dict[str, float] | None

    @property
    def tokens(self) -> Tokens:
        """Those that were decoded."""
        return self.codes.up_to_scale(self.num_scales)

    @property
    def max_scales(self) -> int:
        return scales_in(self.codes)


@dataclass(frozen=True)
class Made:
    """A new shape and how it was made. label: class number, None for any; label_names: of all classes, or none."""

    source: str
    model_name: str
    label: int | None
    label_names: tuple[str, ...]
    seed: int
    guidance: float
    resolution: int
    tokens: Tokens
    mesh: object
    seconds: float
    device: str

    @property
    def label_name(self) -> str:
        """What it was to be."""
        if self.label is None:
            return "any"
        return self.label_names[self.label] if self.label_names else f"class {self.label}"


@dataclass(frozen=True)
class Preview:
    """A shape in the making: the mesh of its first scales."""

    mesh: object
    num_scales: int
    total_scales: int


Emit = Callable[[object], None]


def code_shape(
    tokenizer, source: str, subject: MeshFile | TokensFile, num_scales: int | None, resolution: int, job: Job,
    emit: Emit | None = None, codes: Tokens | None = None,
) -> Coded:  # fmt: skip
    """Encode a shape, unless its `codes` are known, and decode the first scales (None: all)."""
    check_resolution(resolution)
    started = time.perf_counter()
    original, done = None, "decode"
    if isinstance(subject, TokensFile):
        codes = subject.tokens
    else:
        original = subject.mesh()
        if codes is None:
            tell = stepper(job, emit, "encoding", None)
            tell(0, 1)
            codes, done = tokenizer.encode(original, seed=ENCODE_SEED, on_step=tell), "encode + decode"
    num_scales = scales_in(codes) if num_scales is None else max(1, min(int(num_scales), scales_in(codes)))
    mesh = tokenizer.decode(
        codes.up_to_scale(num_scales), resolution=resolution, on_step=stepper(job, emit, "decoding", None)
    )
    seconds = time.perf_counter() - started
    figures = None if original is None else quick_figures(original, mesh)
    return Coded(
        source, tokenizer.name, subject, codes, num_scales, resolution, mesh, seconds, done,
        device_name(str(tokenizer.device)), figures,
    )  # fmt: skip


def tokens_file(tokens: Tokens, name: str) -> TokensFile:
    """The first shape of a .mtok file."""
    if tokens.modality != "shape":
        raise InvalidInput(f"{name} holds tokens of another kind ({tokens.modality}), not of shapes.")
    if not tokens.scales:
        raise InvalidInput(f"{name} holds tokens without scales; shape tokenizers make them over scales.")
    return TokensFile(name, tokens[0])


def quick_figures(original, decoded) -> dict[str, float]:
    """Distances of two surfaces in the box, from fewer points than `mediatok evaluate` takes."""
    if not len(decoded.faces):
        return figures_of_nothing()
    boxed, frame = normalise(original)
    moved = decoded.copy()
    moved.vertices = (moved.vertices - [frame.x, frame.y, frame.z]) / frame.scale
    pair = (SurfacePoints.of(mesh, SCORE_POINTS, SCORE_SEED + i) for i, mesh in enumerate((boxed, moved)))
    return surface_figures(*pair)


def make_shape(
    generator, source: str, label: int | None, seed: int, guidance: float, resolution: int, job: Job,
    emit: Emit | None = None,
) -> Made:  # fmt: skip
    """Make a shape of a class; `emit` gets a `Preview` after each scale. A stopped job ends at the next scale."""
    check_resolution(resolution)
    started = time.perf_counter()

    def on_step(step: int, total: int, preview: Tokens | None = None) -> None:
        job.check()
        if emit is None:
            return
        if preview is None:
            emit(Progress("decoding", step / total, None))
            return
        (mesh,) = generator.tokenizer.decode(preview, resolution=PREVIEW_RESOLUTION)
        emit(Preview(mesh, scales_in(preview), len(generator.scales)))

    made = generator.sample(label, seed=seed, guidance=guidance, resolution=resolution, on_step=on_step)
    seconds = time.perf_counter() - started
    return Made(
        source, generator.name, label, tuple(generator.label_names), seed, guidance, resolution, made.tokens[0],
        made.meshes[0], seconds, device_name(str(generator.device)),
    )  # fmt: skip


def scales_in(tokens: Tokens) -> int:
    """How many scales the (first) item of `tokens` has."""
    return list(accumulate(tokens.scales)).index(int(tokens.lengths[0])) + 1


def class_choices(generator) -> list[tuple[str, int]]:
    """(name, number) of every class, after "any"; numbers count from 0, any is -1."""
    names = generator.label_names or [f"class {number}" for number in range(generator.config.num_classes)]
    return [("any", -1), *((name, number) for number, name in enumerate(names))]


def checked_label(generator, value) -> int | None:
    """A class number of the page, None for any."""
    if value not in (number for _, number in class_choices(generator)):
        raise InvalidInput(f"{generator.name} has no class {value!r}; choose one from the list.")
    return None if value == -1 else int(value)


def checked_guidance(value) -> float:
    """A typed guidance."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= MAX_GUIDANCE:
        raise InvalidInput(f"Guidance must be a number from 0 to {MAX_GUIDANCE:g}.")
    return float(value)


def check_resolution(value) -> None:
    """Refuse a resolution that the page does not offer."""
    if value not in RESOLUTIONS:
        raise InvalidInput(f"The resolution must be one of {', '.join(map(str, RESOLUTIONS))}, not {value!r}.")
