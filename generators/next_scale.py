"""Next-scale generation of shapes: coarse tokens first, each scale as a whole from the sum of those before it.

VAR's prediction order (Tian et al. 2024, arXiv 2404.02905), with the condition as a prefix, as VAT (arXiv 2412.02202)
has it. A shape takes as many passes of the network as its tokenizer has scales.

Everything up to `generate_ids` serves any tokenizer whose quantizer works over scales (`nn/multiscale_vq.py`).

Shape suffixes: B shapes, N shapes of a call, R rows (B, or 2B when guided: the unconditional rows last), S tokens of
all scales, k tokens of one scale, L rows of a sequence, C code channels, P prefix tokens, W width, V codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..core.base import Model, OnStep, check_callback, report
from ..core.companion import Companion, check_companion, load_companion
from ..core.errors import InvalidInput, LimitExceeded, TokenizerMismatch
from ..core.generator import GeneratorOutput, check_number, check_option_names, image_seeds
from ..core.isosurface import check_resolution
from ..core.labels import MAX_LABELS, Classes, check_class_names
from ..core.memory import available_memory, is_out_of_memory
from ..core.shape_tokenizer import ShapeTokenizer
from ..core.sizes import MAX_DEPTH, MAX_SIZE, check_sizes, check_whole
from ..core.tokens import ShapeFrame, Tokens
from ..kernels.linear import pack_for_inference
from ..nn.modes import in_evaluation_mode
from .next_scale_condition import Features, ImageEncoder, features_of_encoder, read_pictures, text_features
from .next_scale_network import NextScaleTransformer
from .next_scale_sampling import MAX_TEMPERATURE, NextScaleSettings, SeededDraws, sample_scales

IN_THE_BOX = ShapeFrame(0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class ShapeGeneration:
    """What one call made: `trimesh.Trimesh`es, their tokens, and how to make each of them again."""

    meshes: list
    tokens: Tokens
    labels: list[int]
    seeds: list[int]


class NextScale(Model):
    """Generator of tokens over scales, of a class, a picture or an embedded text. Label `num_classes` is "no class".

    Args:
        scales, codebook_size, code_width: the tokenizer's.
        width, depth, num_heads: of the transformer. dropout: in training.
        num_classes: may be 0. label_drop_prob: share of the training items that are made unconditional.
        image_encoder: sizes of a DINOv2 (see `ImageEncoder`) whose features of a picture come first, or None.
        text_tokens, text_width: how many embedded tokens of a text come first, and their width, or 0.
        guidance_scale, temperature, top_k, top_p: how to sample when the call does not say; see `NextScaleSettings`.
        tokenizer, tokenizer_fingerprint: the tokenizer's name, and which one exactly.
    """

    modality = "shape"
    accepts_text = False  # prompts; texts come embedded

    @register_to_config
    def __init__(
        self,
        scales: tuple[int, ...] = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256, 576),
        codebook_size: int = 16384,
        code_width: int = 32,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        dropout: float = 0.0,
        num_classes: int = 0,
        label_names: tuple[str, ...] = (),
        label_drop_prob: float = 0.1,
        image_encoder: dict[str, int] | None = None,
        text_tokens: int = 0,
        text_width: int = 0,
        tokenizer: str | None = None,
        tokenizer_fingerprint: str | None = None,
        guidance_scale: float = 2.0,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.95,
    ):
        super().__init__()
        if not isinstance(scales, (tuple, list)) or not scales:
            raise InvalidInput(f"scales must be numbers of tokens, not {scales!r}")
        check_sizes(
            codebook_size=codebook_size, code_width=code_width, width=width, num_heads=num_heads,
            **{f"scales[{k}]": tokens for k, tokens in enumerate(scales)},
        )  # fmt: skip
        check_sizes(MAX_DEPTH, depth=depth)
        if num_classes != 0 or isinstance(num_classes, bool):
            check_sizes(num_classes=num_classes)
        check_class_names(label_names, num_classes)
        if width % num_heads:
            raise InvalidInput(f"width {width} is not divisible by {num_heads} heads")
        num_features, feature_width = text_tokens, text_width
        if (text_tokens, text_width) != (0, 0):
            check_sizes(text_tokens=text_tokens, text_width=text_width)
            if image_encoder is not None:
                raise InvalidInput("a model reads pictures (image_encoder) or texts (text_tokens), not both")
        self.vision = None
        if image_encoder is not None:
            self.vision = ImageEncoder(image_encoder)
            num_features, feature_width = features_of_encoder(image_encoder)
        self.transformer = NextScaleTransformer(
            tuple(scales), codebook_size, code_width, width, depth, num_heads, dropout, num_classes, num_features,
            feature_width,
        )  # fmt: skip
        # Derived from the scales, so not part of a checkpoint.
        self.register_buffer("visible", self.transformer.visible(), persistent=False)
        self._tokenizer_box = Companion()

    @property
    def scales(self) -> tuple[int, ...]:
        """Tokens of each scale, coarse to fine."""
        return tuple(self.config.scales)

    def class_rows(self) -> tuple[str, slice]:
        """Where the classes are embedded: a parameter's name, and its rows (of every class, then of "no class")."""
        return "transformer.prefix.class_emb.weight", slice(0, self.config.num_classes + 1)

    # Training.

    def forward(
        self, ids_BS: Tensor, labels_B: Tensor, rng: torch.Generator | None = None, features: Features | None = None
    ) -> GeneratorOutput:
        """Drop some conditions and predict all scales, each from the true ones before it: the training pass."""
        is_dropped_B = (torch.rand(len(ids_BS), generator=rng) < self.config.label_drop_prob).to(ids_BS.device)
        labels_B = torch.where(is_dropped_B, self.config.num_classes, labels_B)
        if features is not None:
            features = Features(features.values_BFD, features.counts_B.masked_fill(is_dropped_B, 0))
        logits_BSV = self.logits(ids_BS, labels_B, features)
        loss_BS = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS.flatten(), reduction="none").view_as(ids_BS)
        last = self.transformer.slices[-1]
        is_right_BS = logits_BSV.detach().argmax(dim=-1) == ids_BS
        metrics = {"last_scale_loss": loss_BS[:, last].detach().mean(), "accuracy": is_right_BS.float().mean()}
        return GeneratorOutput(loss_BS.mean(), metrics)

    def logits(self, ids_BS: Tensor, labels_B: Tensor, features: Features | None = None) -> Tensor:
        """Logits fp32 [B, S, V] of every token, given all tokens of coarser scales (teacher forcing)."""
        x_BLW = self._first_rows(labels_B, features)
        views = [self.transformer.scale_rows(view_BkC, scale + 1) for scale, view_BkC in enumerate(self.views(ids_BS))]
        hidden_BLW = self.transformer(torch.cat([x_BLW, *views], dim=1), self.visible)
        return self.transformer.logits(hidden_BLW[:, self.transformer.prefix.length :])

    @torch.no_grad()
    def views(self, ids_BS: Tensor) -> list[Tensor]:
        """What the scales from the second on read, fp32 [B, k, C] each: the sum of the coarser codes, resampled."""
        codes, views = self.tokenizer.quantize, []
        sum_BLC = torch.zeros(len(ids_BS), self.scales[-1], self.config.code_width, device=ids_BS.device)
        with torch.autocast(ids_BS.device.type, enabled=False):
            for scale, places in enumerate(self.transformer.slices[:-1]):
                sum_BLC = codes.accumulate(sum_BLC, scale, ids_BS[:, places])
                views.append(codes.view(sum_BLC, scale + 1))
        return views

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: to matrices, but not to embeddings."""
        return parameter.ndim == 2 and not any(part in name for part in ("emb", "feature_pos"))

    def _first_rows(self, labels: Tensor, features: Features | None) -> Tensor:
        return self.transformer.first_rows(self.transformer.prefix(labels, features))

    # Sampling.

    def settings(
        self,
        guidance: float | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> NextScaleSettings:
        """Checked settings of a run; None takes the model's own. There are no steps: every scale is one.

        Args:
            guidance: 0 (none) to 100. temperature: 0 to 10. top_k: 0 (all) or more. top_p: 0 to 1 (all).
            See `NextScaleSettings`.

        Raises:
            InvalidInput: a value out of its range or of another type.
        """
        config = self.config
        return NextScaleSettings(
            num_scales=len(self.scales),
            guidance=check_number(config.guidance_scale if guidance is None else guidance, "guidance"),
            temperature=check_number(
                config.temperature if temperature is None else temperature, "temperature", 0.0, MAX_TEMPERATURE
            ),
            top_k=check_whole(config.top_k if top_k is None else top_k, "top_k", 0, MAX_SIZE),  # may exceed the codes
            top_p=check_number(config.top_p if top_p is None else top_p, "top_p", 0.0, 1.0),
        )

    @torch.inference_mode()
    @in_evaluation_mode
    def generate_ids(
        self,
        labels_B: Tensor,
        settings: NextScaleSettings,
        rngs: Sequence[torch.Generator],
        start_BL: Tensor | None = None,
        features: Features | None = None,
        on_scale: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Ids int64 [B, S] for class numbers `labels_B`; those of the first scales stay when `start_BL` gives them.

        Each shape draws from its own `rngs[b]` alone, so that its batch does not matter.
        `on_scale(k, ids)` gets the ids of the first k scales after each scale.
        """
        if settings.guidance:
            labels_B = torch.cat([labels_B, torch.full_like(labels_B, self.config.num_classes)])
            if features is not None:
                none_B = torch.zeros_like(features.counts_B)
                features = Features(features.values_BFD.repeat(2, 1, 1), torch.cat([features.counts_B, none_B]))
        cache = self.transformer.new_cache(len(labels_B))

        def hidden_of(scale: int, view_RkC: Tensor | None) -> Tensor:
            if view_RkC is None:
                x_RLW = self._first_rows(labels_B, features)
            else:
                x_RLW = self.transformer.scale_rows(view_RkC, scale)
            return self.transformer(x_RLW, cache=cache)[:, -self.scales[scale] :]

        draws = SeededDraws(rngs, sum(self.scales), self.device)
        codes = self.tokenizer.quantize
        return sample_scales(codes, hidden_of, self.transformer.logits, settings, draws, start_BL, on_scale)

    def generate(self, /, labels=None, **options) -> list:
        """Make one shape for each of `labels`; `options` are those of `sample`.

            mt.load("vat-gen-tiny").generate(["chair", "lamp"], seed=0, guidance=3.0)

        Returns `trimesh.Trimesh`es in the order of `labels`.
        """
        return self.sample(labels, **options).meshes

    @torch.inference_mode()
    def sample(
        self,
        /,
        labels=None,
        *,
        images=None,
        texts=None,
        seed: int | Sequence[int] | None = None,
        guidance: float | None = None,
        start: Tokens | ShapeGeneration | Tensor | None = None,
        resolution: int = 128,
        batch_size: int = 8,
        on_step: OnStep | None = None,
        **options,
    ) -> ShapeGeneration:
        """Make shapes and return them with their tokens, labels and seeds.

        Args:
            labels: a class name or number, None for no class, or a list of these.
            images: what the shapes look like, for models with an image encoder: one picture (see `read_image`) or more.
            texts: the same for models that read texts: one embedded text, float [T, D], or a list of these.
                Of labels, images and texts there are as many as shapes, or one for all.
            seed: of the first shape, the others take the next numbers; or one for each. Drawn when None. A shape
                depends on its own seed, not on the batch it is made in.
            guidance, options: see `settings`.
            start: coarse scales to begin with, as `tokens.up_to_scale(k)` has them; one, or one a shape. The finer ones
                are made anew. Shapes stay where the frames of `start` say.
            resolution: cells a side of the grid that meshes are made on; see `ShapeTokenizer.decode`.
            batch_size: shapes made at a time.
            on_step: called as on_step(step, total, preview=...) after every scale and every mesh. After a scale the
                preview is the `Tokens` of the current batch so far, which the tokenizer can decode:
                `generator.tokenizer.decode(preview, resolution=32)`. Raise `mt.Cancelled` in it to stop.

        Raises:
            InvalidInput: unknown labels and values out of range.
            LimitExceeded: a batch that does not fit in memory.
            TokenizerMismatch: the tokenizer is not the one that this model was trained with, or made other tokens.
        """
        labels_N, images, texts = self._conditions(labels, images, texts)
        seeds = image_seeds(seed, len(labels_N))
        settings = self.checked_settings(guidance, **options)
        batch_size = min(check_whole(batch_size, "batch_size", 1), len(labels_N))
        check_resolution(resolution)
        check_callback(on_step)
        tokenizer = self.tokenizer  # a missing or wrong one is found before the work, not after it
        start_NL, frames = self._start(start, len(labels_N))
        batches = torch.arange(len(labels_N)).split(batch_size)
        self._check_memory(len(batches[0]), settings)
        total = settings.total_steps * len(batches) + len(labels_N)
        ids = []
        for number, rows in enumerate(batches):
            frames_B = [frames[row] for row in rows]

            def show(scale: int, ids_BL: Tensor, done=number * settings.total_steps, frames_B=frames_B) -> None:
                if on_step is not None:
                    report(on_step, done + scale, total, tokenizer.tokens_of(ids_BL.cpu(), frames_B))

            with self._memory_errors(len(rows)):
                features = self._features([images[row] for row in rows], [texts[row] for row in rows])
                ids_BS = self.generate_ids(
                    labels_N[rows].to(self.device), settings,
                    [torch.Generator().manual_seed(seeds[row]) for row in rows],
                    None if start_NL is None else start_NL[rows].to(self.device), features, show,
                )  # fmt: skip
            ids.append(ids_BS.cpu())
        tokens = tokenizer.tokens_of(torch.cat(ids), frames)
        meshes = []
        for one in tokens:
            meshes.append(tokenizer.decode(one, resolution=resolution))
            report(on_step, total - len(labels_N) + len(meshes), total)
        return ShapeGeneration(meshes, tokens, labels_N.tolist(), seeds)

    def checked_settings(self, /, guidance: float | None = None, **options) -> NextScaleSettings:
        """`settings`, where an option that there is not is an InvalidInput naming the nearest."""
        check_option_names(self, options)
        return self.settings(guidance, **options)

    def options_of(self, settings: NextScaleSettings) -> dict[str, Any]:
        """The options of a run with `settings`, to give them to `sample` again."""
        return {name: getattr(settings, name) for name in inspect.signature(self.settings).parameters}

    def pack_network(self) -> None:
        """Lay the network's weights out for this processor: the same shapes, sooner; see `ImageGenerator`."""
        pack_for_inference(self, self.transformer)

    # The tokenizer.

    @property
    def tokenizer(self) -> ShapeTokenizer:
        """The tokenizer that decodes what this model makes, loaded on first use; it follows this model's device."""
        if self._tokenizer_box.tokenizer is None:
            way_out = "give it one with use_tokenizer(mt.load(...))"
            self.use_tokenizer(load_companion(self, self.config.tokenizer, way_out))
        return self._tokenizer_box.on(self.device)

    def use_tokenizer(self, tokenizer: ShapeTokenizer) -> None:
        """Decode with `tokenizer` from now on.

        Raises:
            InvalidInput: it is no tokenizer of shapes.
            TokenizerMismatch: it does not understand what this model makes.
        """
        if not isinstance(tokenizer, ShapeTokenizer):
            raise InvalidInput(f"{self.name} needs a shape tokenizer, not {type(tokenizer).__name__}")
        check_companion(self, tokenizer, self.config.tokenizer, self.config.tokenizer_fingerprint)
        ours = (self.scales, self.config.codebook_size, self.config.code_width)
        theirs = (tokenizer.scales, tokenizer.vocab_size, tokenizer.quantize.code_width)
        if ours != theirs:
            raise TokenizerMismatch(
                f"{self.name} makes scales of {ours[0]} tokens of {ours[1]} codes with {ours[2]} channels, "
                f"{tokenizer.name} has {theirs[0]}, {theirs[1]}, {theirs[2]}"
            )
        self._tokenizer_box.tokenizer = tokenizer

    # What a user gives.

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class; empty when there are only numbers."""
        return tuple(self.config.label_names)

    def requests(self, labels) -> list[int | None]:
        """What is asked for, one a shape: class numbers; None for no class. Raises as `label_ids` does."""
        return Classes(self.name, self.config.num_classes, self.label_names).requests(labels)

    def label_ids(self, labels) -> Tensor:
        """Class numbers int64 [N] of names, numbers and None (no class); one of these, or a list.

        Raises:
            InvalidInput: no or too many labels, unknown names (the nearest are offered), numbers out of range.
        """
        return torch.tensor(Classes(self.name, self.config.num_classes, self.label_names).find_all(labels))

    def _conditions(self, labels, images, texts) -> tuple[Tensor, list, list]:
        """Labels int64 [N], and as many pictures and texts; None where there are none."""
        if images is not None and self.vision is None:
            raise InvalidInput(f"{self.name} has no image encoder; it makes shapes of {self._reads()}")
        if texts is not None and not self.config.text_tokens:
            raise InvalidInput(f"{self.name} reads no texts; it makes shapes of {self._reads()}")
        given = {
            "labels": self.label_ids(labels).tolist(),
            "images": list(images) if isinstance(images, (list, tuple)) else [images],
            "texts": list(texts) if isinstance(texts, (list, tuple)) else [texts],
        }
        number = max(map(len, given.values()))
        for name, values in given.items():
            if len(values) not in (1, number) or number > MAX_LABELS:
                raise InvalidInput(f"{len(values)} {name} for {number} shapes; give one, or one a shape")
        labels, images, texts = (values * (number // len(values)) for values in given.values())
        return torch.tensor(labels), images, texts

    def _reads(self) -> str:
        pictures = ["pictures"] if self.vision is not None else []
        return " and ".join(["labels", *pictures, *(["embedded texts"] if self.config.text_tokens else [])])

    def _features(self, images: list, texts: list) -> Features | None:
        """What goes into the prefix beside the labels."""
        if images[0] is not None:
            return self.vision(read_pictures(images).to(self.device))
        if texts[0] is not None:
            features = text_features(texts, self.config.text_tokens, self.config.text_width)
            return Features(*(part.to(self.device) for part in features))
        return None

    def _start(self, start, num_shapes: int) -> tuple[Tensor | None, list[ShapeFrame]]:
        """Ids [N, L] of the first scales on the CPU, or None, and where each shape stands."""
        if start is None:
            return None, [IN_THE_BOX] * num_shapes
        start = start.tokens if isinstance(start, ShapeGeneration) else start
        if isinstance(start, Tokens):
            start.check(self.tokenizer.name, self.tokenizer.fingerprint)
            if bool((start.lengths < start.ids.shape[1]).any()):
                raise InvalidInput("start holds shapes of different numbers of scales; use tokens.up_to_scale(k)")
            ids_NL, frames = start.ids, list(start.frames)
        elif isinstance(start, Tensor):
            ids_NL = (start[None] if start.ndim == 1 else start).cpu()
            self.tokenizer.check_ids(ids_NL)
            frames = [IN_THE_BOX] * len(ids_NL)
        else:
            raise InvalidInput(f"start must be Tokens, their ids or a ShapeGeneration, not {type(start).__name__}")
        if len(ids_NL) not in (1, num_shapes):
            raise InvalidInput(f"start holds {len(ids_NL)} shapes for {num_shapes}; give one, or one a shape")
        return ids_NL.expand(num_shapes, -1), frames * (num_shapes // len(frames))

    # Memory.

    def bytes_per_shape(self, settings: NextScaleSettings) -> int:
        """Estimated memory of one more shape in a batch: cache and activations of both branches, and the draws."""
        config, longest = self.config, max(self.scales)
        branches = 2 if settings.guidance else 1
        cache = 2 * config.depth * self.transformer.length * config.width
        activations = (self.transformer.prefix.length + longest) * 12 * config.width
        return 4 * branches * (cache + activations) + 24 * longest * config.codebook_size

    def _check_memory(self, batch_size: int, settings: NextScaleSettings) -> None:
        """Refuse a batch that would not fit in what is free on this model's device."""
        fitting = available_memory(self.device) // self.bytes_per_shape(settings)
        if batch_size > fitting:
            way_out = f"use batch_size={fitting}" if fitting else "not even one shape fits"
            raise LimitExceeded(f"a batch of {batch_size} shapes needs more memory than {self.device} has; {way_out}")

    @contextmanager
    def _memory_errors(self, batch_size: int) -> Iterator[None]:
        """Turn running out of memory after all (the estimate is one) into LimitExceeded with a size to try."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            way_out = f"use batch_size={batch_size // 2}" if batch_size > 1 else "not even one shape fits"
            raise LimitExceeded(f"a batch of {batch_size} shapes does not fit in {self.device}; {way_out}") from None
