"""How FlexTok's decoder is run: the times of training, guidance, and Euler's steps from noise to latents.

A rectified flow leads from data (time 0) to noise (time 1): x_t = t noise + (1 - t) data, velocity noise - data.

Shape suffixes: B pictures, C latent channels, G latent rows, W latent columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MODE_SCALE = 0.25  # of the density of training times, as a public training of FlexTok has it
TIMES_AT_ONCE = 32  # whose modulations are in memory


@dataclass(frozen=True)
class FlowSettings:
    """How latents are decoded; `FlexTok.decoding_settings` checks and makes it.

    steps: of Euler's method. guidance: how far to go from the unconditional velocity u to the conditional one v; 1 is
    v itself. norm_guidance: by adaptive projected guidance, else plainly. seed: of the noise that decoding starts from,
    the same for every picture, so that a picture depends on its tokens alone.
    """

    steps: int
    guidance: float | Callable[[float], float]
    norm_guidance: bool
    seed: int

    @property
    def total_steps(self) -> int:
        return self.steps

    def guidance_at(self, time: float) -> float:
        """The scale at a time; it may be a function of the time (in Python only)."""
        return float(self.guidance(time)) if callable(self.guidance) else self.guidance

    def times(self) -> list[float]:
        """1, (T - 1) / T, ..., 1 / T."""
        return [step / self.steps for step in range(self.steps, 0, -1)]


def plain_guidance(v_BCGW: Tensor, u_BCGW: Tensor, scale: float) -> Tensor:
    """u + scale (v - u)."""
    return u_BCGW + scale * (v_BCGW - u_BCGW)


class ProjectedGuidance:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1), for the steps of one run.

    The difference d = v - u is averaged over steps with a negative momentum, shortened to `threshold`, and rid of its
    part along v, which does little but saturate colours.
    """

    def __init__(self, momentum: float = -0.5, threshold: float = 2.5, eta: float = 0.0):
        self.momentum, self.threshold, self.eta = momentum, threshold, eta
        self.running: Tensor | None = None

    def __call__(self, v_BCGW: Tensor, u_BCGW: Tensor, scale: float) -> Tensor:
        difference = v_BCGW - u_BCGW
        if self.running is not None:
            difference = difference + self.momentum * self.running
        self.running = difference
        if self.threshold > 0:
            length = torch.linalg.vector_norm(difference, dim=(1, 2, 3), keepdim=True)
            difference = difference * (self.threshold / length).clamp(max=1)
        direction = v_BCGW.double()
        length = torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True)
        direction = direction / length.clamp(min=1e-12)
        along = (difference.double() * direction).sum(dim=(1, 2, 3), keepdim=True) * direction
        across = (difference.double() - along).to(difference.dtype)
        return v_BCGW + (scale - 1) * (across + self.eta * along.to(difference.dtype))


def mode_times(uniform_B: Tensor, mode_scale: float = MODE_SCALE) -> Tensor:
    """Training times of uniform numbers, whose density has a mode (Esser et al. 2024, arXiv 2403.03206, 3.1)."""
    return 1 - uniform_B - mode_scale * ((math.pi / 2 * uniform_B).cos().square() - 1 + uniform_B)


def logit_normal_times(normal_B: Tensor) -> Tensor:
    """Training times of normal numbers: most of them in the middle."""
    return normal_B.sigmoid()


def stratified_times(uniform_B: Tensor) -> Tensor:
    """`logit_normal_times` of uniform numbers, one from each of B equally likely intervals."""
    batch = len(uniform_B)
    share_B = (torch.arange(batch, device=uniform_B.device) + uniform_B) / batch
    return logit_normal_times(torch.special.ndtri(share_B))


def draw_times(density: str, batch: int, rng: torch.Generator | None = None) -> Tensor:
    """Training times fp32 [B] of a density: "mode", "uniform", "logit_normal" or "stratified"."""
    if density == "logit_normal":
        return logit_normal_times(torch.randn(batch, generator=rng))
    uniform_B = torch.rand(batch, generator=rng)
    return {"mode": mode_times, "stratified": stratified_times, "uniform": torch.clone}[density](uniform_B)


def initial_noise(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """fp32 [1, C, G, W] on the CPU: a seed gives the same noise on every device."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
