"""xAR: next-X prediction with flow matching (Ren et al. 2025, arXiv 2502.20388).

A picture's latent map is cut into entities, the X: cells in the released models. They are generated one after the
other, each by integrating a velocity field from noise to data with the finished ones as context. In training every
entity is noised with its own time and sees the noisy earlier ones (noisy context learning), so that one forward pass
trains all of them.

Shape suffixes: B pictures, R rows (B, or 2B when guided: the unconditional rows last), E entities, T tokens of the
sequence, L tokens of one entity, C latent channels, G latent grid side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..core.errors import InvalidInput, TokenizerMismatch
from ..core.generator import GeneratorOutput, ImageGenerator, check_number, check_steps
from ..core.labels import check_class_names
from ..core.sizes import MAX_DEPTH, check_sizes
from ..kernels.linear import pack_for_inference
from ..nn.kv_cache import KeyValueCache
from ..nn.modes import in_evaluation_mode
from .xar_layout import Layout
from .xar_network import NUM_MODULATIONS, XARTransformer

SAMPLERS = ("sde", "ode")
LAST_SDE_TIME = 0.04  # the stochastic steps end here; one deterministic step leads to 0


@dataclass(frozen=True)
class XARSettings:
    """How to sample; `settings` of the model checks and makes it.

    steps: network calls of each entity. guidance: of the last entity; it grows linearly from 1 at the first.
    sampler: "sde" (Euler-Maruyama) or "ode" (Euler).
    """

    steps: tuple[int, ...]
    guidance: float
    sampler: str

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    def guidance_of(self, entity: int) -> float:
        """w in v = u + w (c - u), constant during an entity; 1 needs no unconditional rows."""
        last = len(self.steps) - 1
        share = entity / last if last else 1.0
        return max(1.0, 1 + (self.guidance - 1) * share)

    def times(self, entity: int) -> list[float]:
        """The entity's times from 1 (noise) down to 0 (data): one more than steps."""
        steps = self.steps[entity]
        if self.sampler == "ode":
            return np.linspace(1.0, 0.0, steps + 1).tolist()
        return [*np.linspace(1.0, LAST_SDE_TIME, steps).tolist(), 0.0]


class SeededNoise:
    """Noise of a batch: each picture's from its own generator, in the order in which the authors draw it."""

    def __init__(self, rngs: Sequence[torch.Generator]):
        self.rngs = rngs

    def start(self, entity: int, shape: tuple[int, int]) -> Tensor:
        """Where an entity begins: fp32 [B, L, C]."""
        return self._draw(shape, torch.float32)

    def step(self, entity: int, step: int, shape: tuple[int, int]) -> Tensor:
        """Of one stochastic step: fp64 [B, L, C]."""
        return self._draw(shape, torch.float64)

    def _draw(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.stack([torch.randn(shape, generator=rng, dtype=dtype, device=rng.device) for rng in self.rngs])


class XAR(ImageGenerator):
    """Class-conditional flow-matching generator of latents, entity by entity.

    Args:
        layout, layout_size: the X; see `Layout.make`. Position tables belong to it: weights fit one layout only.
        grid, latent_channels: of the tokenizer's latents.
        embed_dim, encoder_depth, decoder_depth, num_heads: the transformer's two stacks of blocks.
        mlp_ratio: the gated MLP is int(embed_dim * mlp_ratio * 2 / 3) wide.
        num_steps, guidance_scale: how to sample when the call does not say.
    """

    @register_to_config
    def __init__(
        self,
        layout: str = "cell",
        layout_size: int | tuple[int, ...] | None = 8,
        grid: int = 16,
        latent_channels: int = 16,
        embed_dim: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        num_classes: int = 1000,
        label_names: tuple[str, ...] = (),
        label_drop_prob: float = 0.1,
        tokenizer: str | None = None,
        tokenizer_fingerprint: str | None = None,
        num_steps: int = 40,
        guidance_scale: float = 2.7,
        sampler: str = "sde",
    ):
        super().__init__()
        check_sizes(embed_dim=embed_dim, num_heads=num_heads, latent_channels=latent_channels, num_classes=num_classes)
        check_sizes(MAX_DEPTH, encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        check_class_names(label_names, num_classes)
        if embed_dim % num_heads:
            raise InvalidInput(f"embed_dim {embed_dim} is not divisible by {num_heads} heads")
        with torch.device("cpu"):  # loading builds models on the meta device, and what follows comes from no file
            self.entities = Layout.make(layout, grid, layout_size)
            rotary, visible = self.entities.rotary(embed_dim // num_heads), self.entities.visible()
        self.transformer = XARTransformer(
            latent_channels, self.entities.num_tokens, embed_dim, (encoder_depth, decoder_depth), num_heads,
            int(embed_dim * mlp_ratio * 2 / 3), num_classes, attn_dropout, proj_dropout,
        )  # fmt: skip
        # Derived from the layout, so not part of a checkpoint.
        self.register_buffer("rotary", rotary, persistent=False)
        self.register_buffer("visible", visible, persistent=False)

    @property
    def num_units(self) -> int:
        return self.entities.num_entities

    @property
    def unit_grid(self) -> tuple[int, int] | None:
        return self.entities.entity_grid

    def class_rows(self) -> tuple[str, slice]:
        return "transformer.class_emb.weight", slice(0, self.config.num_classes + 1)

    # Training (section 3.3).

    def forward(self, latents_BCGG: Tensor, labels_B: Tensor, rng: torch.Generator | None = None) -> GeneratorOutput:
        """Noise every entity of scaled latents by its own time, drop some labels, and predict: the training pass."""
        batch, device = len(latents_BCGG), latents_BCGG.device
        x_BTC = self.entities.to_sequence(latents_BCGG)
        is_dropped_B = torch.rand(batch, generator=rng) < self.config.label_drop_prob
        labels_B = torch.where(is_dropped_B.to(device), self.config.num_classes, labels_B)
        times_BE = torch.randn(self.num_units, batch, generator=rng).sigmoid().T
        noise_BTC = torch.randn(x_BTC.shape, generator=rng)
        return self.velocity_loss(x_BTC, labels_B, times_BE.to(device), noise_BTC.to(device))[0]

    def velocity_loss(
        self, x_BTC: Tensor, labels_B: Tensor, times_BE: Tensor, noise_BTC: Tensor
    ) -> tuple[GeneratorOutput, Tensor]:
        """Mean square error of the velocities noise - data over all tokens; and the predicted velocities [B, T, C]."""
        times_BT1 = self.entities.spread(times_BE[:, :, None])
        noisy_BTC = (1 - times_BT1) * x_BTC + times_BT1 * noise_BTC
        velocity_BTC = self.velocities(noisy_BTC, time_index(times_BE), labels_B)
        return GeneratorOutput(F.mse_loss(velocity_BTC, noise_BTC - x_BTC), {}), velocity_BTC

    def velocities(self, x_BTC: Tensor, time_index_BE: Tensor, labels_B: Tensor) -> Tensor:
        """Velocities fp32 [B, T, C] of a whole sequence whose entities stand at times 0 .. 1000 (int64)."""
        condition_BED = self.transformer.condition(labels_B[:, None], time_index_BE)
        modulations = [self.entities.groups_or_tokens(m_BEM) for m_BEM in self.transformer.modulations(condition_BED)]
        mask = self.visible if self.num_units > 1 else None
        return self.transformer(x_BTC, modulations, self.rotary, slice(None), mask)

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: to all but vectors (also to the position tables, as the authors have it)."""
        return parameter.ndim >= 2

    # Sampling (section 3.4).

    def settings(
        self,
        steps: int | tuple[int, int] | None = None,
        guidance: float | None = None,
        *,
        sampler: str | None = None,
    ) -> XARSettings:
        """Checked settings of a run; None takes the model's own.

        Args:
            steps: network calls an entity, 1 to 1000; or (first, last) to fall linearly from the first entity to the
                last (step annealing of DiSA, arXiv 2505.20297): faster, and lossy.
            guidance: 0 to 100: w of u + w (c - u) for the last entity, so that 1 (and less) is none; MaskGIT's constant
                and linear guidance count from 0 instead.
            sampler: "sde" or "ode".

        Raises:
            InvalidInput: a value out of its range or of another type.
        """
        sampler = self.config.sampler if sampler is None else sampler
        if not isinstance(sampler, str) or sampler not in SAMPLERS:
            raise InvalidInput(f"sampler={sampler!r} must be one of {', '.join(SAMPLERS)}")
        steps = self.config.num_steps if steps is None else steps
        first, last = steps if isinstance(steps, (tuple, list)) and len(steps) == 2 else (steps, steps)
        first, last = check_steps(first), check_steps(last)
        ramp = np.linspace(first, last, self.num_units) if self.num_units > 1 else np.array([first])
        guidance = check_number(self.config.guidance_scale if guidance is None else guidance, "guidance")
        return XARSettings(tuple(round(number) for number in ramp), guidance, sampler)

    @torch.inference_mode()
    @in_evaluation_mode
    def generate_latents(
        self,
        labels_B: Tensor,
        settings: XARSettings,
        rngs: Sequence[torch.Generator],
        start_BCGG: Tensor | None = None,
        keep_BE: Tensor | None = None,
        on_step: Callable[[int, Tensor | None], None] | None = None,
        noise: SeededNoise | None = None,
    ) -> Tensor:
        """Scaled latents fp32 [B, C, G, G] for class numbers `labels_B`.

        Entities of `start_BCGG` where `keep_BE` is True stay and are context of the later ones; earlier ones do not
        see them, since the order is that of training. `on_step(step, latents)` gets latents when an entity is
        finished (zeros where nothing is yet), and None in between. `noise` replaces the noise of `rngs`.
        """
        run = _Run(self, labels_B, settings, SeededNoise(rngs) if noise is None else noise)
        given_BTC = None if start_BCGG is None else self.entities.to_sequence(start_BCGG.float())
        steps_before = 0  # of earlier entities, skipped ones too
        for entity in range(self.num_units):
            tokens = self.entities.tokens_of(entity)
            if keep_BE is not None and bool(keep_BE[:, entity].all()):
                run.skip(entity)
            else:
                for step in run.unfinished_steps(entity):
                    if on_step is not None:
                        on_step(steps_before + step, None)
            if keep_BE is not None:
                kept_B11 = keep_BE[:, entity, None, None]
                run.x_BTC[:, tokens] = torch.where(kept_B11, given_BTC[:, tokens], run.x_BTC[:, tokens])
            steps_before += settings.steps[entity]
            if on_step is not None:
                on_step(steps_before, self.entities.to_latents(run.x_BTC))
            if entity + 1 < self.num_units:
                run.finish(entity)
        return self.entities.to_latents(run.x_BTC)

    def generate_content(self, labels_B, settings, rngs, start=None, keep_BU=None, on_step=None) -> Tensor:
        return self.generate_latents(labels_B, settings, rngs, start, keep_BU, on_step)

    def pack_network(self) -> None:
        pack_for_inference(self, self.transformer)

    # The tokenizer's side.

    def encode_content(self, pixels_B3HW: Tensor) -> Tensor:
        return self.tokenizer.encode_latents(pixels_B3HW)

    def decode_content(self, latents_BCGG: Tensor, **arguments) -> Tensor:
        return self.tokenizer.decode_latents(latents_BCGG, **arguments)

    def check_content(self, content: Tensor) -> Tensor:
        """`content` as latents [B, C, G, G], or InvalidInput."""
        latents_BCGG = content[None] if content.ndim == 3 else content
        shape = [self.config.latent_channels, self.config.grid, self.config.grid]
        if list(latents_BCGG.shape[1:]) != shape or not latents_BCGG.is_floating_point():
            raise InvalidInput(f"{self.name} edits latents [B, {shape}], got {content.dtype} {list(content.shape)}")
        if not bool(latents_BCGG.float().isfinite().all()):
            raise InvalidInput("latents to edit must be finite in fp32")
        return latents_BCGG

    def check_tokenizer(self, tokenizer) -> None:
        ours = (self.config.latent_channels, self.config.grid, self.config.grid)
        theirs = getattr(tokenizer, "latent_shape", None)
        if theirs != ours:
            its = f"latents {theirs}" if theirs else "other tokens"
            raise TokenizerMismatch(f"{self.name} makes latents {ours}, and {tokenizer.name} has {its}")

    def bytes_per_image(self, settings: XARSettings) -> int:
        """Cache, modulations and activations of both branches, and the decoded pixels with what leads to them."""
        config = self.config
        depth, tokens = config.encoder_depth + config.decoder_depth, self.entities.num_tokens
        cache = 2 * 2 * depth * tokens * config.embed_dim
        modulations = depth * NUM_MODULATIONS * config.embed_dim * (max(settings.steps) + 1)
        activations = 2 * max(self.entities.sizes) * 12 * config.embed_dim
        side = self.tokenizer.image_size
        return 4 * (cache + modulations + activations + 400 * side * side)


class _Run:
    """The state of one sampling run. `x_BTC` fp32 holds the finished entities."""

    def __init__(self, model: XAR, labels_B: Tensor, settings: XARSettings, noise: SeededNoise):
        self.model, self.settings, self.noise = model, settings, noise
        transformer, layout, batch = model.transformer, model.entities, len(labels_B)
        self.batch, self.is_guided = batch, settings.guidance_of(layout.num_entities - 1) > 1
        # Rows of the same class share their modulations, and so do all unconditional rows.
        no_class = labels_B.new_full((batch if self.is_guided else 0,), model.config.num_classes)
        self.classes, self.class_of_row_R = torch.cat([labels_B, no_class]).unique(return_inverse=True)
        self.modulations: dict[int, list[Tensor]] = {}
        self.network = transformer if model._compiled is None else model._compiled
        channels = model.config.latent_channels
        self.x_BTC = torch.zeros(batch, layout.num_tokens, channels, device=labels_B.device)
        like = transformer.condition(labels_B[:1], torch.zeros_like(labels_B[:1]))  # dtype and device of computing
        rows, heads = len(self.class_of_row_R), transformer.num_heads
        head_width = model.config.embed_dim // heads
        depth = len(transformer.blocks)
        self.cache = KeyValueCache(depth, rows, heads, layout.num_tokens, head_width, like)

    def unfinished_steps(self, entity: int) -> Iterator[int]:
        """Generate an entity; yields the number of each step, from 1 on, but the last one's, which finishes it."""
        layout, settings = self.model.entities, self.settings
        tokens, weight = layout.tokens_of(entity), settings.guidance_of(entity)
        shape = (layout.sizes[entity], self.model.config.latent_channels)
        device = self.x_BTC.device
        times = settings.times(entity)
        self._prepare_times(times)
        x_BLC = self.noise.start(entity, shape).to(device, torch.float64)
        for step, (now, then) in enumerate(pairwise(times)):
            v_BLC = self._velocity(x_BLC.float(), tokens, now, weight).double()
            if settings.sampler == "ode":
                x_BLC = x_BLC + (then - now) * v_BLC
            else:
                # Reverse SDE with diffusion 2t: the drift v - t * score, score = -((1 - t) v + x) / t.
                x_BLC = x_BLC + (then - now) * ((2 - now) * v_BLC + x_BLC)
                if then > 0:
                    spread = (2 * now * (now - then)) ** 0.5
                    x_BLC = x_BLC + spread * self.noise.step(entity, step, shape).to(device)
            if then > 0:
                yield step + 1
        self.x_BTC[:, tokens] = x_BLC.float()

    def skip(self, entity: int) -> None:
        """Draw an entity's noise for nothing: the later ones' is then the same whether others in the batch need it."""
        shape = (self.model.entities.sizes[entity], self.model.config.latent_channels)
        self.noise.start(entity, shape)
        if self.settings.sampler == "sde":
            for step in range(self.settings.steps[entity] - 1):
                self.noise.step(entity, step, shape)

    def finish(self, entity: int) -> None:
        """Run a finished entity once, clean, and keep its keys and values for the later ones."""
        tokens = self.model.entities.tokens_of(entity)
        rows = len(self.class_of_row_R)
        x_RLC = self.x_BTC[:, tokens].repeat(rows // self.batch, 1, 1)
        if 0.0 not in self.modulations:  # no entity was generated so far
            self._prepare_times([0.0])
        self._call(x_RLC, tokens, 0.0)
        self.cache.length = tokens.stop

    def _velocity(self, x_BLC: Tensor, tokens: slice, time: float, weight: float) -> Tensor:
        if weight == 1:
            return self._call(x_BLC, tokens, time)
        conditional, unconditional = self._call(x_BLC.repeat(2, 1, 1), tokens, time).chunk(2)
        return unconditional + weight * (conditional - unconditional)

    def _call(self, x_RLC: Tensor, tokens: slice, time: float) -> Tensor:
        modulations = [m_K1M[self.class_of_row_R[: len(x_RLC)]] for m_K1M in self.modulations[time]]
        return self.network(x_RLC, modulations, self.model.rotary[:, tokens], tokens, None, self.cache)

    def _prepare_times(self, times: list[float]) -> None:
        """Modulations of every class at `times`, a [K, 1, 6D] a block, in one pass over the weights that give them.

        Entities with the same times share them; those of other times are forgotten.
        """
        kept = {time: self.modulations[time] for time in times if time in self.modulations}
        missing = [time for time in times if time not in kept]
        if missing:
            # Copies, so that the entity before does not stay as a whole: these are views of its modulations.
            kept = {time: [m_K1M.clone() for m_K1M in blocks] for time, blocks in kept.items()}
            self.modulations = kept
            index_S1 = time_index(torch.tensor(missing, device=self.classes.device))[:, None]
            condition_SKD = self.model.transformer.condition(self.classes, index_S1)
            blocks = self.model.transformer.modulations(condition_SKD)
            kept |= {time: [m_SKM[s][:, None] for m_SKM in blocks] for s, time in enumerate(missing)}
        self.modulations = kept


def time_index(times: Tensor) -> Tensor:
    """Times in [0, 1] as the integers that the network knows: 1000 t in fp32, truncated."""
    return (times.float() * 1000).long()


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released models, by our name."""
    sizes = {"b": (768, 8, 12, 40, 2.7), "l": (1024, 16, 16, 50, 2.3), "h": (1280, 20, 16, 50, 2.2)}
    return {
        f"xar-{size}": {
            "embed_dim": width, "encoder_depth": depth, "decoder_depth": depth, "num_heads": heads,
            "num_steps": steps, "guidance_scale": guidance, "tokenizer": "kl16",
        }
        for size, (width, depth, heads, steps, guidance) in sizes.items()
    }  # fmt: skip
