"""What every generator of pictures is: labels in, tokens or latents between, pictures out.

A generator writes the *content* that its tokenizer decodes: ids int64 [B, L] or latents fp32 [B, C, G, G]. Content
consists of *units*, the smallest pieces that can be kept while the rest is generated anew: tokens, or entities of xAR.

Shape suffixes: B batch, N pictures of a call, U units, 3/H/W image.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .base import Model, OnStep, check_callback, report
from .companion import Companion, check_companion, load_companion
from .errors import InvalidInput, LimitExceeded, TokenizerMismatch, nearest_names
from .image_tokenizer import ImageTokenizer, as_list
from .images import read_image, to_pil, to_pixels
from .labels import MAX_LABELS, Classes, imagenet_names
from .memory import available_memory, is_out_of_memory
from .prompts import read_prompts
from .sizes import check_whole
from .tokens import ImageFrame, Tokens

MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_IMAGES = MAX_LABELS  # one for each label
MAX_SEED = 2**63 - 1
SEED_ERROR = f"seeds are whole numbers from 0 to {MAX_SEED}"


@dataclass(frozen=True)
class Generation:
    """What one call made: pictures, what they were decoded from (on the CPU), and how to make each of them again."""

    images: list[Image.Image]
    content: Tensor
    labels: list[int]
    seeds: list[int]


@dataclass
class GeneratorOutput:
    """Result of a generator's training pass: `loss` (0-d, with gradient) and detached 0-d `metrics`."""

    loss: Tensor
    metrics: dict[str, Tensor]


class ImageGenerator(Model):
    """Base of class-conditional picture generators.

    Configs of subclasses hold `num_classes`, `label_names`, `tokenizer` (its name) and `tokenizer_fingerprint`.
    Label `num_classes` stands for "no class".
    """

    modality = "image"
    accepts_text = False  # prompts in the place of labels
    method = "sample"  # that makes pictures
    scales: tuple[int, ...] = ()  # tokens of each scale, where content has scales
    lengths: Sequence[int] = ()  # how many ids of a picture can be edited; the last is a whole picture; () for latents
    vocab_size = 0  # of the ids

    def __init__(self):
        super().__init__()
        self._tokenizer_box = Companion()
        self._compiled: Callable[..., Tensor] | None = None  # of `compile_network`

    # What a subclass implements.

    @property
    @abstractmethod
    def num_units(self) -> int:
        """Units of one picture."""

    @property
    @abstractmethod
    def unit_grid(self) -> tuple[int, int] | None:
        """(rows, columns) when unit i covers cell i of the picture in raster order; None when units have no place."""

    @abstractmethod
    def class_rows(self) -> tuple[str, slice]:
        """Where the classes are embedded: a parameter's name, and its rows (of every class, then of "no class")."""

    @abstractmethod
    def settings(self, steps=None, guidance: float | None = None, **options) -> Any:
        """Checked settings of a run, a frozen dataclass with `guidance`, `total_steps` and the options.

        It has `steps`, too, unless they are `total_steps`. None means the model's own default.

        Raises:
            InvalidInput: a value that makes no sense.
        """

    @abstractmethod
    def generate_content(
        self,
        labels_B: Tensor,
        settings: Any,
        rngs: Sequence[torch.Generator],
        start: Tensor | None = None,
        keep_BU: Tensor | None = None,
        on_step: Callable[[int, Tensor | None], None] | None = None,
    ) -> Tensor:
        """Content of B pictures. Each draws from its own `rngs[b]` alone, so that its batch does not matter.

        `on_step(step, content)` is called after every step with a whole content to show (undecided pieces guessed), or
        None where nothing new can be seen. Step numbers rise to `settings.total_steps`; the steps of units that all
        pictures keep are jumped over.
        """

    @abstractmethod
    def bytes_per_image(self, settings: Any) -> int:
        """Estimated memory of generating one more picture in a batch with `settings`, decoding included."""

    @abstractmethod
    def pack_network(self) -> None:
        """Lay the network's weights out for this processor, in their place: the same pictures, sooner.

        From then on the model can only generate: to train, save or move it, load it again. Does nothing where the
        model is not on the CPU, or torch lacks oneDNN.
        """

    # Content. A subclass that makes latents has methods of its own.

    def encode_content(self, pixels_B3HW: Tensor) -> Tensor:
        """Content of given pictures, through the tokenizer."""
        return self.tokenizer.encode_pixels(pixels_B3HW)

    def decode_content(self, content: Tensor, **arguments) -> Tensor:
        """Pixels fp32 [B, 3, H, W] of content on this model's device, through the tokenizer; not clamped.

        `arguments` are what `checked_decoding` gives.
        """
        return self.tokenizer.decode_ids(content, **arguments)

    def check_content(self, content: Tensor) -> Tensor:
        """Return `content` [B, ...], or raise InvalidInput when its shape, dtype or values are not this model's."""
        ids_BL, size, codes = content[None] if content.ndim == 1 else content, self.lengths[-1], self.vocab_size
        if ids_BL.ndim != 2 or ids_BL.shape[1] not in self.lengths or ids_BL.dtype != torch.int64:
            raise InvalidInput(f"{self.name} edits ids int64 [B, {size}], got {content.dtype} {list(content.shape)}")
        if ids_BL.numel() and not 0 <= int(ids_BL.min()) <= int(ids_BL.max()) < codes:
            raise InvalidInput(f"ids must lie in [0, {codes}), got {int(ids_BL.min())} to {int(ids_BL.max())}")
        return ids_BL

    def check_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Raise TokenizerMismatch when the shape of this model's content is not the tokenizer's."""
        ours = (self.lengths[-1], self.vocab_size)
        if tokenizer.is_continuous or (tokenizer.max_tokens, tokenizer.vocab_size) != ours:
            its = "continuous latents"
            if not tokenizer.is_continuous:
                its = f"{tokenizer.max_tokens} tokens of {tokenizer.vocab_size} codes"
            raise TokenizerMismatch(
                f"{self.name} makes {ours[0]} tokens of {ours[1]} codes, {tokenizer.name} has {its}"
            )

    # Generating.

    def generate(self, /, labels, **options) -> list[Image.Image]:
        """Make one picture for each of `labels`; `options` are those of `sample`.

            mt.load("xar-tiny").generate(["animals & nature", 3], seed=0, guidance=3.0)

        Returns PIL images in the order of `labels`.
        """
        return self.sample(labels, **options).images

    @torch.inference_mode()
    def sample(
        self,
        /,
        labels,
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | tuple[int, int] | None = None,
        guidance: float | None = None,
        start=None,
        keep=None,
        decoding: Mapping[str, Any] | None = None,
        batch_size: int = 8,
        previews: bool = False,
        on_step: OnStep | None = None,
        **options,
    ) -> Generation:
        """Make one picture for each of `labels` and return it with its content, label and seed.

        Args:
            labels: a class name or number, None for no class, or a list of these.
            seed: of the first picture, the others take the next numbers; or one for each; numbers, a list or an
                integer tensor. Drawn when None. A picture depends on its own seed, not on the batch it is made in.
            steps, guidance, options: see `settings` of the model.
            start: what to edit: an earlier `Generation`, its content, `Tokens`, or pictures; one, or one a label.
            keep: units of `start` that stay: their numbers for all pictures, or a bool tensor [U] or [N, U].
            decoding: options of the tokenizer's `decode` by name, as {"steps": 10}, for pictures and previews; see
                `decoding_defaults`. A "seed" there is of the decoder's noise, the same for every picture, so that none
                depends on its batch: their contents alone make a difference.
            batch_size: pictures made at a time.
            previews: decode what can be seen for `on_step`: fp32 pixels [B, 3, H, W] in [0, 1] of the current batch.
            on_step: called as on_step(step, total, preview=...) after every step, and with the numbers of the last one
                after each step of a decoder that has steps; raise `mt.Cancelled` in it to stop.

        Raises:
            InvalidInput: unknown labels, options that there are not, and values out of range.
            LimitExceeded: a batch that does not fit in memory.
            TokenizerMismatch: the tokenizer is not the one that this model was trained with.
        """
        labels_N = self.label_ids(labels)
        seeds = image_seeds(seed, len(labels_N))
        settings = self.checked_settings(steps, guidance, **options)
        batch_size = min(check_whole(batch_size, "batch_size", 1), len(labels_N))
        check_callback(on_step)
        self.ensure_tokenizer()  # a missing or wrong one is found before the work, not after it
        arguments = self.checked_decoding(**check_names(decoding, "decoding"))
        start_N, keep_NU = self._start(start, keep, len(labels_N))
        self.check_memory(batch_size, settings)
        batches = torch.arange(len(labels_N)).split(batch_size)
        total = settings.total_steps * len(batches)
        contents, images = [], []
        for number, rows in enumerate(batches):

            def show(step: int, content: Tensor | None, done: int = number * settings.total_steps) -> None:
                tell, preview = partial(report, on_step, done + step, total), None
                if previews and content is not None and on_step is not None:
                    preview = self._decoded(content, arguments, tell)
                tell(preview)

            rngs = [torch.Generator(self.noise_device).manual_seed(seeds[row]) for row in rows]
            with self.memory_errors(len(rows)):
                content = self.generate_content(
                    labels_N[rows].to(self.device),
                    settings,
                    rngs,
                    None if start_N is None else start_N[rows].to(self.device),
                    None if keep_NU is None else keep_NU[rows].to(self.device),
                    show,
                )
                tell = partial(report, on_step, (number + 1) * settings.total_steps, total)
                pixels = self._decoded(content, arguments, tell)
            contents.append(content.cpu())
            images += [to_pil(picture) for picture in pixels]
        # Outside of inference mode, so that the content can be used for training or edited in place.
        with torch.inference_mode(False):
            return Generation(images, torch.cat(contents), labels_N.tolist(), seeds)

    def _decoded(self, content: Tensor, arguments: dict[str, Any], tell: Callable[[], None]) -> Tensor:
        """Pixels fp32 [B, 3, H, W] in [0, 1] on the CPU. A decoder that works in steps calls `tell` after each: it may
        take longer than what it decodes did, and has to stop as soon.
        """
        has_steps = any(hasattr(value, "total_steps") for value in arguments.values())
        watched = {"on_step": lambda *step, **preview: tell()} if has_steps else {}
        return self.decode_content(content, **arguments, **watched).clamp(0, 1).cpu()

    def checked_settings(self, /, steps=None, guidance: float | None = None, **options) -> Any:
        """`settings`, where an option that this model does not have is an InvalidInput naming the nearest.

        That holds for any name, "self" too.
        """
        check_option_names(self, options)
        return self.settings(steps, guidance, **options)

    def options_of(self, settings: Any) -> dict[str, Any]:
        """The options of a run with `settings`, to give them to `sample` again; those that say nothing are left out."""
        options = {name: getattr(settings, name, None) for name in inspect.signature(self.settings).parameters}
        options["steps"] = settings.total_steps if options["steps"] is None else options["steps"]
        return {name: value for name, value in options.items() if value not in (None, "")}

    def compile_network(self, **options) -> None:
        """Run `self.transformer` through `torch.compile` from now on: on a GPU each call is one CUDA graph.

        `options` go to `torch.compile`. The first picture takes a minute, or minutes where the length of the context
        changes: there is one graph for each.
        """
        options = {"mode": "reduce-overhead", "dynamic": False} | options
        # The call alone: the compiled module itself would become a part of this model and of its `state_dict`.
        self._compiled = torch.compile(self.transformer, **options).__call__

    @property
    def noise_device(self) -> torch.device:
        """Where noise is drawn: on the CPU a seed gives the same picture on every device."""
        return torch.device("cpu")

    # The tokenizer.

    @property
    def tokenizer(self) -> ImageTokenizer:
        """The tokenizer that decodes what this model makes, loaded on first use; it follows this model's device."""
        self.ensure_tokenizer()
        return self._tokenizer_box.on(self.device)

    def ensure_tokenizer(self) -> None:
        """Load the tokenizer unless there is one.

        Raises:
            InvalidInput: the config names none, or one that is not here.
            TokenizerMismatch: it is not the one that this model was trained with.
        """
        if self._tokenizer_box.tokenizer is None:
            way_out = "give it one with use_tokenizer(mt.load(...))"
            self.use_tokenizer(load_companion(self, self.config.tokenizer, way_out))

    def use_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Decode with `tokenizer` from now on.

        Raises:
            TokenizerMismatch: it does not understand what this model makes.
        """
        if not isinstance(tokenizer, ImageTokenizer):
            raise InvalidInput(f"{self.name} needs an image tokenizer, not {type(tokenizer).__name__}")
        check_companion(self, tokenizer, self.config.tokenizer, self.config.tokenizer_fingerprint)
        self.check_tokenizer(tokenizer)
        self._tokenizer_box.tokenizer = tokenizer

    @property
    def decoding_option_names(self) -> tuple[str, ...]:
        """What `decoding` of `sample` can hold: the tokenizer's options of decoding."""
        return self.tokenizer.decoding_option_names

    def decoding_defaults(self) -> dict[str, Any]:
        """Each option of decoding with the value that it has when `decoding` does not say."""
        return self.tokenizer.decoding_defaults()

    def checked_decoding(self, /, **options) -> dict[str, Any]:
        """What `decode_content` takes for options of decoding.

        Raises:
            InvalidInput: an option that the tokenizer does not have, or a value out of its range.
        """
        return self.tokenizer.checked_decoding(**options)

    def tokens(self, content: Tensor) -> Tokens:
        """`content` of a `Generation` as `Tokens`, to save or to decode with the tokenizer.

        Raises:
            InvalidInput: the tokenizer has no tokens.
        """
        tokenizer, ids_BL = self.tokenizer, self.check_content(content)
        if tokenizer.is_continuous:
            raise InvalidInput(f"{self.name} makes continuous latents, which are no tokens")
        side = tokenizer.image_size
        return Tokens(
            ids=ids_BL, lengths=torch.full((len(ids_BL),), ids_BL.shape[1]), tokenizer=tokenizer.name,
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, modality=self.modality,
            frames=(ImageFrame(side, side),) * len(ids_BL), scales=tokenizer.scales,
        )  # fmt: skip

    # Checking what a user gives.

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class; ImageNet's for a model of 1000 classes that brings none; empty when there are none."""
        if self.config.label_names:
            return tuple(self.config.label_names)
        return imagenet_names() if self.config.num_classes == 1000 else ()

    @property
    def unit_word(self) -> str:
        """What people call a unit."""
        return "cell" if self.unit_grid is not None else "scale" if self.scales else "token"

    def requests(self, labels) -> list[int | str | None]:
        """What is asked for, one a picture: class numbers, or prompts where the model takes them; None for no such.

        Raises:
            InvalidInput: labels or prompts that cannot be read.
        """
        if self.accepts_text:
            return [prompt or None for prompt in read_prompts(labels)]
        return Classes(self.name, self.config.num_classes, self.label_names).requests(labels)

    def label_ids(self, labels) -> Tensor:
        """Class numbers int64 [N] of names, numbers and None (no class); one of these, or a list.

        Raises:
            InvalidInput: no or too many labels, unknown names (the nearest are offered), numbers out of range.
        """
        return torch.tensor(Classes(self.name, self.config.num_classes, self.label_names).find_all(labels))

    def _start(self, start, keep, num_images: int) -> tuple[Tensor | None, Tensor | None]:
        """`start` as content [N, ...] and `keep` as bool [N, U], both on the CPU; None, None to start from nothing."""
        if (start is None) != (keep is None):
            raise InvalidInput("start and keep go together: what to edit, and which of its units stay")
        if start is None:
            return None, None
        content = self.start_content(start)
        if len(content) not in (1, num_images):
            raise InvalidInput(f"start holds {len(content)} pictures for {num_images} labels; give one, or one a label")
        keep_NU = self._keep_mask(keep)
        if len(keep_NU) not in (1, num_images):
            raise InvalidInput(f"keep has {len(keep_NU)} rows for {num_images} labels; give one, or one a label")
        return content.expand(num_images, *content.shape[1:]), keep_NU.expand(num_images, -1)

    @torch.inference_mode()
    def start_content(self, start) -> Tensor:
        """Content [N, ...] on the CPU of what `sample` takes as `start`."""
        if isinstance(start, Generation):
            start = start.content
        if isinstance(start, Tokens):
            start.check(self.tokenizer.name, self.tokenizer.fingerprint)
            if bool((start.lengths < start.ids.shape[1]).any()):
                raise InvalidInput("start holds tokens of different lengths; only whole pictures can be edited")
            return self.check_content(start.ids)
        if isinstance(start, Tensor):
            return self.check_content(start.cpu())
        sources, _ = as_list(start)
        pixels = torch.stack([to_pixels(self.tokenizer.fit(read_image(source))) for source in sources])
        return self.encode_content(pixels.to(self.device)).cpu()

    def _keep_mask(self, keep) -> Tensor:
        """Bool [1, U] or [N, U] on the CPU."""
        num_units = self.num_units
        if isinstance(keep, Tensor) and keep.dtype == torch.bool:
            mask = keep[None] if keep.ndim == 1 else keep
            if mask.ndim != 2 or mask.shape[1] != num_units:
                raise InvalidInput(f"keep must be bool [{num_units}] or [N, {num_units}], got {list(keep.shape)}")
            return mask.cpu()
        if hasattr(keep, "tolist"):
            keep = keep.tolist()
        units = list(keep) if isinstance(keep, (list, tuple, set, range)) else [keep]
        for unit in units:
            if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < num_units:
                raise InvalidInput(f"keep names unit {unit!r}; {self.name} has units 0 to {num_units - 1}")
        mask = torch.zeros(1, num_units, dtype=torch.bool)
        mask[0, units] = True
        return mask

    def check_memory(self, batch_size: int, settings: Any, way_out: str = "use batch_size={}") -> None:
        """Refuse a batch that would not fit in what is free on this model's device.

        `way_out` tells what the caller can do, with {} for the number of pictures that would fit.
        """
        per_image = max(self.bytes_per_image(settings), 1)
        fitting = available_memory(self.device) // per_image
        if batch_size > fitting:
            need = batch_size * per_image / 2**30
            raise LimitExceeded(
                f"a batch of {batch_size} pictures needs about {need:.1f} GiB on {self.device}, more than is free; "
                + (way_out.format(fitting) if fitting else "not even one picture fits")
            )

    @contextmanager
    def memory_errors(self, batch_size: int, way_out: str = "use batch_size={}") -> Iterator[None]:
        """Turn running out of memory after all (the estimate is one) into LimitExceeded with a size to try."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise LimitExceeded(
                f"a batch of {batch_size} pictures does not fit in the memory of {self.device}; "
                + (way_out.format(batch_size // 2) if batch_size > 1 else "not even one picture fits")
            ) from None


def check_option_names(model: Any, names: Iterable[str], known: Iterable[str] | None = None) -> None:
    """Raise InvalidInput for a name that is none of `known`, or no parameter of `model.settings`; the nearest ones are
    offered.
    """
    known = list(inspect.signature(model.settings).parameters if known is None else known)
    for name in names:
        if name not in known:
            raise InvalidInput(
                f"{model.name} has no option {name!r}.{nearest_names(name, known)} It has {', '.join(known)}."
            )


def image_seeds(seed: int | Sequence[int] | Tensor | None, num_images: int) -> list[int]:
    """One seed for each picture: consecutive from one number, as given, or fresh when None.

    Raises:
        InvalidInput: seeds that are no whole numbers in [0, 2^63), or not as many as pictures.
    """
    if seed is None:
        return torch.randint(2**31, (num_images,), generator=_fresh_generator()).tolist()
    if hasattr(seed, "tolist"):  # tensors and arrays; one number where they have no dimension
        seed = seed.tolist()
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = [seed + i for i in range(num_images)]
    else:
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
            raise InvalidInput(f"{SEED_ERROR}, not {value!r}")
    if len(seeds) != num_images:
        raise InvalidInput(f"{len(seeds)} seeds for {num_images} pictures; give one number, or one for each")
    return seeds


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def check_steps(steps: Any, smallest: int = 1, what: str = "steps") -> int:
    """`steps`, or InvalidInput when it is no whole number in its range."""
    return check_whole(steps, what, smallest, MAX_STEPS)


def check_number(value: Any, what: str, smallest: float = 0.0, largest: float = MAX_GUIDANCE) -> float:
    """`value` as a float, or InvalidInput when it is no finite number in its range."""
    # The comparisons refuse what is not finite, too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not smallest <= value <= largest:
        raise InvalidInput(f"{what}={value!r} must be a number from {smallest:g} to {largest:g}")
    return float(value)


def check_names(value: Any, what: str) -> dict[str, Any]:
    """`value` as a dict, empty for None, or InvalidInput when it is not a mapping of names to values."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidInput(f'{what} must be names with values, as {{"steps": 10}}, not {value!r}')
    return dict(value)


def check_flag(value: Any, what: str) -> bool:
    """`value`, or InvalidInput when it is not a bool: text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise InvalidInput(f"{what}={value!r} must be True or False")
    return value
