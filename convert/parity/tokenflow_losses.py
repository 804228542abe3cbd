"""Replay of TokenFlow's training losses: generator and discriminator before and after its start, and the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...training.losses import hinge_loss
from ...training.patchgan import PatchGAN
from ...training.teachers import ClipTeacher, semantic_loss
from .. import tokenflow
from .replay import LOSS, TAP, Replay, Tolerance

GRADIENT = Tolerance(atol=1e-6, rtol=1e-3)


def replay_losses(replay: Replay) -> None:
    """Kind losses."""
    case, weights = replay.case, replay.case.weights()
    inputs, reconstructions = replay.input("inputs"), replay.input("reconstructions")
    semantic_recon, codebook_losses = replay.input("semantic_recon"), replay.input("codebook_losses")
    target = _teacher_target(replay, weights, inputs)
    start, weight = int(case.setting("disc_start", default=10)), float(case.setting("disc_weight", default=0.5))
    for match in replay.matches(r"gen\.step(\d+)\.loss"):
        step = int(match[1])
        discriminator = discriminator_of(replay, weights)
        gan_weight = weight if step >= start else 0.0
        fake, features = (x.clone().requires_grad_() for x in (reconstructions, semantic_recon))
        rec_loss, p_loss = F.mse_loss(fake, inputs), (fake - inputs).abs().mean()
        adv_loss, vqkd_loss = -discriminator((fake + 1) / 2).mean(), semantic_loss(features, target)
        # The first three of the codebook's losses count: codebook, commitment and entropy.
        total = rec_loss + p_loss + gan_weight * adv_loss + codebook_losses[:3].sum() + vqkd_loss
        total.backward()
        prefix = f"gen.step{step}"
        values = {
            "loss": total, "rec_loss": rec_loss, "p_loss": p_loss, "generator_adv_loss": adv_loss,
            "vqkd_loss": vqkd_loss, "disc_weight": torch.tensor(gan_weight),
        }  # fmt: skip
        replay.check_all({f"{prefix}.{name}": value for name, value in values.items()}, LOSS)
        replay.check(f"{prefix}.grad.reconstructions", fake.grad, GRADIENT)
        replay.check(f"{prefix}.grad.semantic_recon", features.grad, GRADIENT)
        _replay_discriminator(replay, discriminator, f"disc.step{step}", inputs, reconstructions, gan_weight)


def _replay_discriminator(
    replay: Replay, discriminator: PatchGAN, prefix: str, real: Tensor, fake: Tensor, weight: float
) -> None:
    discriminator.zero_grad()
    real_logits, fake_logits = discriminator((real + 1) / 2), discriminator((fake + 1) / 2)
    loss = weight * hinge_loss(real_logits, fake_logits)
    loss.backward()
    replay.check(f"{prefix}.logits_real", real_logits, TAP)
    replay.check(f"{prefix}.logits_fake", fake_logits, TAP)
    replay.check(f"{prefix}.loss", loss, LOSS)
    for match in replay.matches(rf"{prefix}\.grad\.(.+)"):
        replay.check(match[0], discriminator.get_parameter(match[1]).grad, GRADIENT)


def discriminator_of(replay: Replay, weights: dict[str, Tensor]) -> PatchGAN:
    """The case's discriminator in training mode; its running means are those of a new one."""
    prefix = "discriminator."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    network = PatchGAN(int(replay.case.setting("ndf")), int(replay.case.setting("n_layers")))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(own[name])
    return network.train()


def _teacher_target(replay: Replay, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    prefix = "teacher.visual."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    tower = tokenflow.clip_tower_from_openai(own, int(replay.case.setting("heads")))
    with torch.no_grad():
        target = ClipTeacher(tower, own["proj"].T)((inputs + 1) / 2)
    replay.check("teacher_target", target, TAP)
    return target
