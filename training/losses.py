"""Losses of tokenizer training (TiTok section 3.3, MaskBit section 3.2; the specification's section 4).

A training step minimises `GeneratorLoss` over the tokenizer and then, once the adversarial phase has begun,
`DiscriminatorLoss` over the discriminator on the same, detached reconstructions.

Shape suffixes: B batch, 3/H/W image, K proxy codes, G patch grid side.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.base import TokenizerOutput
from .recipe import LossRecipe

Metrics = dict[str, Tensor]


class GeneratorLoss(nn.Module):
    """Reconstruction + perceptual + quantizer (or KL) + adversarial term. Metrics: weighted terms, detached, 0-d."""

    def __init__(self, recipe: LossRecipe, perceptual: nn.Module | None):
        super().__init__()
        self.recipe, self.perceptual = recipe, perceptual

    def forward(
        self, output: TokenizerOutput, real_B3HW: Tensor, discriminator: nn.Module | None = None
    ) -> tuple[Tensor, Metrics]:
        """Give `discriminator` (its parameters frozen) only from `discriminator_start` on."""
        recipe, fake_B3HW = self.recipe, output.decoded.float()
        distance = F.l1_loss if recipe.reconstruction == "l1" else F.mse_loss
        terms = {"reconstruction_loss": recipe.reconstruction_weight * distance(fake_B3HW, real_B3HW)}
        if output.posterior is not None:
            terms["reconstruction_loss"] = terms["reconstruction_loss"] / math.exp(recipe.logvar_init)
            terms["kl_loss"] = recipe.kl_weight * output.posterior.kl().sum() / len(real_B3HW)
        if self.perceptual is not None and recipe.perceptual_weight:
            terms["perceptual_loss"] = recipe.perceptual_weight * self.perceptual(fake_B3HW, real_B3HW).mean()
        if output.vq is not None and recipe.quantizer_weight:
            terms["quantizer_loss"] = recipe.quantizer_weight * output.vq.quantizer_loss
        if discriminator is not None:
            gan_weight = recipe.discriminator_weight * recipe.discriminator_factor
            terms["weighted_gan_loss"] = gan_weight * -discriminator(fake_B3HW).mean()
        total = sum(terms.values())
        return total, {name: term.detach() for name, term in terms.items()} | {"total_loss": total.detach()}


class DiscriminatorLoss(nn.Module):
    """Hinge loss with LeCAM regularisation (Tseng et al. 2021), whose running means of the logits are buffers here.

    With several processes the means are taken over all of them, so that P processes equal one with P times the batch.
    """

    def __init__(self, recipe: LossRecipe):
        super().__init__()
        self.recipe = recipe
        self.register_buffer("ema_real_logits_mean", torch.zeros(1))
        self.register_buffer("ema_fake_logits_mean", torch.zeros(1))

    def forward(
        self, discriminator: nn.Module, real_B3HW: Tensor, fake_B3HW: Tensor, factor: float | None = None
    ) -> tuple[Tensor, Metrics]:
        """`factor` scales the hinge part (the recipe's `discriminator_factor` when None; 0 leaves LeCAM alone)."""
        recipe = self.recipe
        factor = recipe.discriminator_factor if factor is None else factor
        if any(isinstance(module, nn.BatchNorm2d) for module in discriminator.modules()):  # it sees them apart
            real_logits, fake_logits = discriminator(real_B3HW), discriminator(fake_B3HW.detach())
        else:
            real_logits, fake_logits = discriminator(torch.cat([real_B3HW, fake_B3HW.detach()])).chunk(2)
        hinge = hinge_loss(real_logits, fake_logits)
        real_mean, fake_mean = _mean_over_processes(real_logits.mean()), _mean_over_processes(fake_logits.mean())
        total, lecam = factor * hinge, torch.zeros_like(hinge)
        if recipe.lecam_weight:
            lecam = recipe.lecam_weight * (
                F.relu(real_mean - self.ema_fake_logits_mean).square()
                + F.relu(self.ema_real_logits_mean - fake_mean).square()
            )
            lecam = lecam.squeeze()
            total = total + lecam
            for average, mean in ((self.ema_real_logits_mean, real_mean), (self.ema_fake_logits_mean, fake_mean)):
                # A new tensor, not in place: the backward pass of this step still reads the old value.
                average.data = average * recipe.lecam_decay + mean.detach() * (1 - recipe.lecam_decay)
        metrics = {
            "discriminator_loss": total,
            "lecam_loss": lecam,
            "logits_real": real_mean,
            "logits_fake": fake_mean,
        }
        return total, {name: value.detach() for name, value in metrics.items()}


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What a discriminator minimises (Lim & Ye 2017): 0-d."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def proxy_code_loss(output: TokenizerOutput, codes_BP: Tensor, quantizer_weight: float = 1.0) -> tuple[Tensor, Metrics]:
    """Stage 1: cross entropy of the logits [B, K, G, G] with the VQGAN codes int64 [B, G*G], and the quantizer loss."""
    cross_entropy = F.cross_entropy(output.decoded.float().flatten(2), codes_BP)
    quantizer_loss = quantizer_weight * output.vq.quantizer_loss
    accuracy = (output.decoded.detach().flatten(2).argmax(dim=1) == codes_BP).float().mean()
    total = cross_entropy + quantizer_loss
    return total, {
        "reconstruction_loss": cross_entropy.detach(),
        "quantizer_loss": quantizer_loss.detach(),
        "proxy_accuracy": accuracy,
        "total_loss": total.detach(),
    }


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a 0-d `value` over all processes; its gradient is the local one, which DDP averages."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size() + value - value.detach()
