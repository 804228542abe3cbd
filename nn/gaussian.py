"""The diagonal Gaussian posterior of continuous tokenizers."""

from __future__ import annotations

import torch
from torch import Tensor


class DiagonalGaussian:
    """A Gaussian per latent channel, from `parameters` [B, 2C, H, W] = mean and log-variance stacked on dim 1.

    The log-variance is clamped to [-30, 20] so that neither the deviation nor its inverse overflows.
    """

    def __init__(self, parameters: Tensor):
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one sample [B, C, H, W]. Noise comes from the CPU: a seed gives the same draw on every device."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """Return the most likely latents: the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to the unit Gaussian in nats, summed over channels and height: shape [B, W]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2))
