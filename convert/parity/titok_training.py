"""Replay of the training losses (adversarial, perceptual, quantizer, KL), the weight average and the learning rate."""

from __future__ import annotations

import re
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ...core.base import TokenizerOutput
from ...core.errors import InvalidInput
from ...core.images import fit_square, read_image, to_pixels
from ...nn.gaussian import DiagonalGaussian
from ...training.discriminator import PatchDiscriminator
from ...training.losses import DiscriminatorLoss, GeneratorLoss
from ...training.perceptual import LPIPS, VGG_SLICES, ConvNeXtLogits, WeightedMean
from ...training.recipe import LossRecipe
from ...training.schedule import WeightAverage, cosine_lr, ema_decay
from .replay import GRADIENT, IMAGE, LOSS, TAP, Replay, Tolerance

SCHEDULE = Tolerance(atol=1e-12, rtol=1e-6)
AVERAGE = Tolerance(atol=1e-7, rtol=1e-6)  # fp32 weights near zero
SAME_NAMES = (
    "reconstruction_loss", "reconstruction_weight", "quantizer_weight", "perceptual_loss", "perceptual_weight",
    "discriminator_weight", "discriminator_factor", "discriminator_start", "kl_weight", "logvar_init",
)  # fmt: skip
OUR_NAMES = {"reconstruction_loss": "reconstruction", "perceptual_loss": "perceptual"}


def replay_losses(replay: Replay) -> None:
    """Kinds losses_stage2 and losses_single_stage_*: the generator around the discriminator's start, then that."""
    weights, official = replay.case.weights(), replay.case.setting("official_config", "losses")
    recipe = _loss_recipe(official)
    real, fake = replay.input("real"), replay.input("fake")
    perceptual = perceptual_from_official(recipe.perceptual, _below(weights, "perceptual_loss."))
    discriminator = _discriminator(replay, _below(weights, "discriminator."))
    output = _tokenizer_output(replay, fake)
    _replay_perceptual(replay, perceptual, fake, real)

    generator_loss = GeneratorLoss(recipe, perceptual)
    for match in replay.matches(r"gen\.(\w+)\.total"):
        phase = match[1]
        is_adversarial = int(replay.case.setting("steps", phase)) >= recipe.discriminator_start
        leaf = fake.clone().requires_grad_()
        output.decoded = leaf
        total, metrics = generator_loss(output, real, discriminator if is_adversarial else None)
        total.backward()
        zero = torch.zeros(())
        gan_loss = -discriminator(fake).mean().detach() if is_adversarial else zero
        vq = output.vq or SimpleNamespace(commitment_loss=zero, codebook_loss=zero)
        expected = {
            "total": total,
            "gan_loss": gan_loss,
            "d_weight": torch.tensor(recipe.discriminator_weight),
            "discriminator_factor": torch.tensor(recipe.discriminator_factor if is_adversarial else 0.0),
            "weighted_gan_loss": metrics.pop("weighted_gan_loss", zero),
            "quantizer_loss": metrics.pop("quantizer_loss", zero),
            "commitment_loss": vq.commitment_loss,
            "codebook_loss": vq.codebook_loss,
            **metrics,
        }
        replay.check_all({f"gen.{phase}.{name}": value for name, value in expected.items()}, LOSS)
        replay.check(f"gen.{phase}.grad_fake", leaf.grad, GRADIENT)
    _replay_discriminator(replay, discriminator, recipe, weights, real, fake)


def _replay_perceptual(replay: Replay, perceptual: nn.Module, fake: Tensor, real: Tensor) -> None:
    with torch.no_grad():
        replay.check("perceptual", perceptual(fake, real), LOSS)
        for part in (perceptual, getattr(perceptual, "first", None), getattr(perceptual, "second", None)):
            name = {LPIPS: "perceptual.lpips", ConvNeXtLogits: "perceptual.convnext"}.get(type(part))
            if name is not None and replay.has(name):
                replay.check(name, part(fake, real), LOSS)


def _replay_discriminator(replay, discriminator, recipe: LossRecipe, weights: dict[str, Tensor], real, fake) -> None:
    loss = DiscriminatorLoss(recipe)
    for name, buffer in loss.named_buffers():
        buffer.copy_(weights.get(name, buffer))
    with torch.no_grad():
        replay.check("disc.logits_real", discriminator(real), TAP)
        replay.check("disc.logits_fake", discriminator(fake), TAP)
    for match in replay.matches(r"disc\.(\d+)\.total"):
        prefix = f"disc.{match[1]}"
        discriminator.zero_grad()
        total, metrics = loss(discriminator, real, fake)
        total.backward()
        replay.check(f"{prefix}.total", total, LOSS)
        replay.check_all({f"{prefix}.{name}": value for name, value in metrics.items()}, LOSS)
        replay.check(f"{prefix}.ema_real_after", loss.ema_real_logits_mean, LOSS)
        replay.check(f"{prefix}.ema_fake_after", loss.ema_fake_logits_mean, LOSS)
        replay.check(f"{prefix}.grad_block_in", discriminator.block_in[0].weight.grad, GRADIENT)
    with torch.no_grad():  # recorded after the passes, as if the discriminator had not started
        total, _ = loss(discriminator, real, fake, factor=0.0)
        replay.check("disc.before_start.total", total, LOSS)


def replay_training_utils(replay: Replay) -> None:
    """Kind training_utils: averaged weights over a recorded run, decay and rate tables, evaluation preprocessing."""
    if replay.has("ema.params_weight"):
        _replay_average(replay)
    if replay.has("ema.decay_at_f64"):
        table = replay.case.io["ema.decay_at_f64"]
        decay = replay.case.setting("ema", "decay")
        ours = torch.tensor([[step, ema_decay(int(step), decay)] for step in table[:, 0].tolist()], dtype=torch.float64)
        replay.check("ema.decay_at_f64", ours, SCHEDULE)
    for match in replay.matches(r"lr\.(.+)"):
        lr = replay.case.setting("lr")
        in_name = {key: int(value) for key, value in re.findall(r"(warm|total)(\d+)", match[1])}
        warmup = in_name.get("warm", lr.get("num_warmup_steps"))
        total = in_name.get("total", lr.get("num_training_steps"))
        ours = [
            cosine_lr(step, lr["base_lr"], lr["end_lr"], warmup, total) for step in range(len(replay.case.io[match[0]]))
        ]
        replay.check(match[0], torch.tensor(ours, dtype=torch.float64), SCHEDULE)
    if replay.has("preprocess.eval"):
        image = read_image(replay.input("preprocess.uint8_hwc").numpy())
        size = replay.case.setting("preprocess", "crop_size")
        replay.check("preprocess.eval", to_pixels(fit_square(image, size)), IMAGE)


def _replay_average(replay: Replay) -> None:
    module, decay = nn.Module(), replay.case.setting("ema", "decay")
    module.weight = nn.Parameter(replay.input("ema.init_weight").clone())
    module.bias = nn.Parameter(replay.input("ema.init_bias").clone(), requires_grad=False)
    average = WeightAverage(module, decay)
    weights, biases = replay.input("ema.params_weight"), replay.input("ema.params_bias")
    shadows: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    decays = []
    for weight, bias in zip(weights, biases, strict=True):
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(bias)
        average.step(module)
        decays.append(average.ema.cur_decay_value)
        for name, shadow in average.state_dict().items():
            shadows[name].append(shadow.clone())
    for name, values in shadows.items():
        replay.check(f"ema.shadow_{name}", torch.stack(values), AVERAGE)
    replay.check("ema.decay_f64", torch.tensor(decays, dtype=torch.float64), SCHEDULE)


def perceptual_from_official(name: str, weights: dict[str, Tensor]) -> nn.Module:
    """The perceptual loss of that name from the tensors of the official module."""
    parts: list[nn.Module] = []
    if "lpips" in name:
        vgg = {
            index: tuple(weights[f"lpips.net.slice{row + 1}.{index}.{part}"] for part in ("weight", "bias"))
            for row, indices in enumerate(VGG_SLICES)
            for index in indices
        }
        parts.append(LPIPS(vgg, [weights[f"lpips.lin{row}.model.1.weight"] for row in range(len(VGG_SLICES))]))
    if "convnext" in name:
        parts.append(ConvNeXtLogits(_below(weights, "convnext.")))
    if not parts:
        raise InvalidInput(f"perceptual loss {name!r} has no official counterpart")
    if len(parts) == 1:
        return parts[0]
    numbers = re.findall(r"-([\d.]+)", name)[-2:]
    first, second = (float(number) for number in numbers) if len(numbers) == 2 else (1.0, 1.0)
    return WeightedMean(*parts, first, second)


def _loss_recipe(official: dict) -> LossRecipe:
    values = {OUR_NAMES.get(name, name): official[name] for name in SAME_NAMES if name in official}
    # The official defaults where a config leaves a value out.
    lecam = {"lecam_weight": official.get("lecam_regularization_weight", 0.0)}
    return LossRecipe(**values | lecam, lecam_decay=official.get("lecam_ema_decay", 0.999))


def _discriminator(replay: Replay, weights: dict[str, Tensor]) -> PatchDiscriminator:
    sizes = replay.case.config.get("discriminator", {})
    discriminator = PatchDiscriminator(sizes.get("hidden_channels", 128), sizes.get("num_stages", 3))
    discriminator.load_state_dict(weights)
    return discriminator


def _tokenizer_output(replay: Replay, fake: Tensor) -> TokenizerOutput:
    """The tokenizer's side of the recorded pass: its quantizer losses or its posterior."""
    output = TokenizerOutput(fake)
    if replay.has("vae.parameters"):
        output.posterior = DiagonalGaussian(replay.input("vae.parameters"))
        replay.check("vae.kl", output.posterior.kl(), TAP)
    if replay.has("vq.commitment_loss"):
        commitment, codebook = replay.input("vq.commitment_loss"), replay.input("vq.codebook_loss")
        quantizer_loss = replay.input("vq.quantizer_loss") if replay.has("vq.quantizer_loss") else commitment + codebook
        output.vq = SimpleNamespace(commitment_loss=commitment, codebook_loss=codebook, quantizer_loss=quantizer_loss)
    return output


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
