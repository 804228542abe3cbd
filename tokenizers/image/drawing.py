"""Drawing pictures of an image embedding: how to, and the small image decoder of small models.

`EmbeddingDecoder` is a transformer over the latents of a KL autoencoder that turns noise into a picture by following a
velocity field (rectified flow, Liu et al. 2022, arXiv 2209.03003), told by an embedding what to draw through adaptive
norms (DiT, Peebles & Xie 2023, arXiv 2212.09748). As with Stable unCLIP, many pictures have the same embedding, and the
start decides which of them is drawn.

Shape suffixes: B batch, R rows (B, or 2B when guided), E embedding channels, C latent channels, G latent grid side,
P = G*G places, D width, 3/S image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...core.base import OnStep, report
from ...core.companion import Companion, load_companion
from ...core.errors import InvalidInput, TokenizerMismatch, nearest_names
from ...core.sizes import MAX_DEPTH, check_sizes, check_whole
from ...kernels.attention import attention
from ...nn.layers import LayerNorm, Linear, to_compute

MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 1000, 100.0, 2**63 - 1
TIME_FEATURES = 128
TIME_SCALE = 1000.0


@dataclass(frozen=True)
class Drawing:
    """How to draw: seed of the start, steps, guidance (1 and less: none), and how often the network is called."""

    seed: int
    steps: int
    guidance: float
    total_steps: int


def checked_drawing(decoder: Any, steps: int | None = None, guidance: float | None = None, seed: int = 0) -> Drawing:
    """A `Drawing` with `decoder`; None takes the decoder's own.

    Raises:
        InvalidInput: a value out of its range or of another type.
    """
    steps = check_whole(decoder.steps if steps is None else steps, "steps", 1, MAX_STEPS)
    seed = check_whole(seed, "seed", 0, MAX_SEED)
    guidance = decoder.guidance if guidance is None else guidance
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 0 <= guidance <= MAX_GUIDANCE:
        raise InvalidInput(f"guidance={guidance!r} must be a number from 0 to {MAX_GUIDANCE:g}")
    return Drawing(seed, steps, float(guidance), decoder.num_calls(steps))


class Block(nn.Module):
    """Self-attention and an MLP, each behind a norm that the condition scales and shifts, and in front of its gate."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)
        self.modulation = Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_RPD: Tensor, condition_RD: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition_RD)[:, None].chunk(6, dim=-1)
        h_RPD = self.norm(x_RPD) * (1 + scale_a) + shift_a
        q, k, v = rearrange(self.qkv(h_RPD), "r p (n h k) -> n r h p k", n=3, h=self.num_heads)
        x_RPD = x_RPD + gate_a * self.proj(rearrange(attention(q, k, v), "r h p k -> r p (h k)"))
        h_RPD = self.norm(x_RPD) * (1 + scale_m) + shift_m
        return x_RPD + gate_m * self.fc2(F.gelu(self.fc1(h_RPD)))


class EmbeddingDecoder(nn.Module):
    """A rectified flow over the latents of `autoencoder`.

    Args:
        embedding_size: E.
        latent_channels, grid: C, G. width, depth, num_heads: of the transformer.
        autoencoder: name or folder of the `KLAutoencoder` of the latents, and its fingerprint.
        drop_prob: share of the training pictures whose embedding is dropped, for guidance.
    """

    steps, guidance = 20, 2.0
    name = "the small image decoder"

    def __init__(
        self,
        embedding_size: int,
        latent_channels: int = 8,
        grid: int = 8,
        width: int = 192,
        depth: int = 6,
        num_heads: int = 6,
        autoencoder: str | None = None,
        autoencoder_fingerprint: str | None = None,
        drop_prob: float = 0.1,
    ):
        super().__init__()
        check_sizes(embedding_size=embedding_size, latent_channels=latent_channels, grid=grid, width=width)
        check_sizes(num_heads=num_heads)
        check_sizes(MAX_DEPTH, depth=depth)
        if width % num_heads:
            raise InvalidInput(f"the image decoder's width {width} is not divisible by {num_heads} heads")
        self.embedding_size, self.latent_shape = embedding_size, (latent_channels, grid, grid)
        self.drop_prob = drop_prob
        self.autoencoder_name, self.fingerprint = autoencoder, autoencoder_fingerprint
        self.positions = nn.Parameter(torch.empty(grid * grid, width))
        self.nothing = nn.Parameter(torch.empty(width))
        self.embed, self.look = Linear(latent_channels, width), Linear(embedding_size, width)
        self.time = nn.Sequential(Linear(TIME_FEATURES, width), nn.SiLU(), Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-6)
        self.out = Linear(width, latent_channels)
        for parameter in (self.positions, self.nothing):
            nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self._box = Companion()

    @classmethod
    def from_sizes(cls, embedding_size: int, sizes: dict[str, Any]) -> Self:
        """With the arguments of a config; InvalidInput names one that there is not."""
        known = ("latent_channels", "grid", "width", "depth", "num_heads", "autoencoder", "autoencoder_fingerprint",
                 "drop_prob")  # fmt: skip
        if not isinstance(sizes, dict):
            raise InvalidInput(f"drawing_sizes must be a mapping of sizes, not {sizes!r}")
        for key in sizes:
            if key not in known:
                raise InvalidInput(f"drawing_sizes has no {key!r}.{nearest_names(str(key), known)}")
        return cls(embedding_size, **sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.dtype

    def num_calls(self, steps: int) -> int:
        return steps

    @property
    def autoencoder(self) -> Any:
        """The `KLAutoencoder`, loaded on first use.

        Raises:
            InvalidInput: the config names none, or one that is not here.
            TokenizerMismatch: it is not the one that this decoder was trained with.
        """
        if self._box.tokenizer is None:
            way_out = "give it one with use_autoencoder(mt.load(...))"
            self.use_autoencoder(load_companion(self, self.autoencoder_name, way_out, "autoencoder"))
        return self._box.on(self.positions.device)

    def use_autoencoder(self, autoencoder: Any) -> None:
        """Draw in the latents of `autoencoder` from now on."""
        if self.fingerprint is not None and autoencoder.fingerprint != self.fingerprint:
            raise TokenizerMismatch(
                f"the image decoder was trained with {self.autoencoder_name} (fingerprint {self.fingerprint}), and "
                f"{autoencoder.name} ({autoencoder.fingerprint}) is another one"
            )
        theirs = getattr(autoencoder, "latent_shape", None)
        if theirs != self.latent_shape:
            raise TokenizerMismatch(
                f"the image decoder draws latents {self.latent_shape}, and those of {autoencoder.name} are {theirs}"
            )
        self._box.tokenizer = autoencoder

    def velocities(self, x_RCGG: Tensor, time_R: Tensor, embedding_RE: Tensor, is_dropped_R: Tensor) -> Tensor:
        """Velocities (noise - data) fp32 [R, C, G, G] of noisy latents at times in [0, 1], 1 for noise.

        Of embeddings the direction counts: the network sees them with mean 0 and deviation 1. `is_dropped_R` (bool):
        rows that are told nothing.
        """
        told_RD = self.look(to_compute(F.layer_norm(embedding_RE.float(), embedding_RE.shape[1:]), self.positions))
        told_RD = torch.where(is_dropped_R[:, None], self.nothing.to(told_RD.dtype), told_RD)
        condition_RD = F.silu(told_RD + self.time(time_features(time_R).to(told_RD.dtype)))
        x_RPD = self.embed(rearrange(x_RCGG, "r c y x -> r (y x) c").to(told_RD.dtype))
        x_RPD = x_RPD + self.positions.to(x_RPD.dtype)
        for block in self.blocks:
            x_RPD = block(x_RPD, condition_RD)
        side = self.latent_shape[1]
        return rearrange(self.out(self.norm(x_RPD)).float(), "r (y x) c -> r c y x", y=side)

    def forward(self, latents_BCGG: Tensor, embedding_BE: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Mean square error of the velocities at random times, 0-d; latents as the autoencoder's `encode_latents`."""
        batch, device = len(latents_BCGG), latents_BCGG.device
        time_B = torch.randn(batch, generator=rng).sigmoid().to(device)
        noise = torch.randn(latents_BCGG.shape, generator=rng).to(device)
        is_dropped_B = (torch.rand(batch, generator=rng) < self.drop_prob).to(device)
        share = time_B[:, None, None, None]
        noisy = (1 - share) * latents_BCGG + share * noise
        return F.mse_loss(self.velocities(noisy, time_B, embedding_BE, is_dropped_B), noise - latents_BCGG)

    @torch.no_grad()
    def draw(
        self,
        embedding_BE: Tensor,
        drawing: Drawing,
        negative_BE: Tensor | None = None,
        on_step: OnStep | None = None,
        previews: bool = False,
    ) -> Tensor:
        """Pixels fp32 [B, 3, S, S] in [0, 1] of embeddings fp32 [B, E], by Euler's method.

        negative_BE: what to guide away from in the place of nothing. on_step: called as on_step(step, total,
        preview=...); with `previews`, fp32 [3, S, S] in [0, 1] of what the last picture comes to by this velocity.
        """
        batch, device = len(embedding_BE), embedding_BE.device
        start = torch.randn((1, *self.latent_shape), generator=torch.Generator().manual_seed(drawing.seed))
        x_BCGG = start.to(device).expand(batch, -1, -1, -1)
        is_guided = drawing.guidance > 1
        rows_RE = embedding_BE
        if is_guided:
            rows_RE = torch.cat([embedding_BE, embedding_BE if negative_BE is None else negative_BE])
        is_dropped_R = torch.arange(len(rows_RE), device=device) >= batch
        if negative_BE is not None:
            is_dropped_R = torch.zeros_like(is_dropped_R)
        times = torch.linspace(1, 0, drawing.steps + 1).tolist()
        for step, (now, then) in enumerate(pairwise(times)):
            x_RCGG = x_BCGG.repeat(len(rows_RE) // batch, 1, 1, 1)
            time_R = torch.full((len(rows_RE),), now, device=device)
            v_BCGG = self.velocities(x_RCGG, time_R, rows_RE, is_dropped_R)
            if is_guided:
                v_BCGG, without = v_BCGG.chunk(2)
                v_BCGG = without + drawing.guidance * (v_BCGG - without)
            x_BCGG = x_BCGG + (then - now) * v_BCGG
            preview = None
            if previews and step + 1 < drawing.steps:
                preview = self.autoencoder.decode_latents((x_BCGG - then * v_BCGG)[-1:])[0].clamp(0, 1).cpu()
            report(on_step, step + 1, drawing.total_steps, preview)
        return self.autoencoder.decode_latents(x_BCGG).clamp(0, 1)


def time_features(time_R: Tensor) -> Tensor:
    """Sines and cosines [R, TIME_FEATURES] of times in [0, 1]."""
    half = TIME_FEATURES // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=time_R.device) / half)
    angles = TIME_SCALE * time_R[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
