"""Replay of MaskGIT generators: forward passes, whole generations from recorded noise, one training pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...generators.maskgit import GumbelNoise, MaskGIT, MaskGITSettings
from .. import maskgit, titok
from .replay import GRADIENT, IMAGE, LOSS, PIXEL, TAP, Replay, Tolerance
from .titok import to_uint8

LOGITS = Tolerance(atol=1e-4, rtol=1e-4)
TINY = 1e-20


class RecordedNoise(GumbelNoise):
    """The uniform numbers [S, B, N, C] and [S, B, N] that the official code drew, at the places that are asked for."""

    def __init__(self, tokens: Tensor, confidence: Tensor):
        self.u_tokens, self.u_confidence = tokens, confidence

    def tokens(self, step: int, masked_BK: Tensor, counts: list[int], num_codes: int) -> Tensor:
        index_BK1 = masked_BK[:, :, None].expand(-1, -1, num_codes)
        return gumbel(self.u_tokens[step].gather(1, index_BK1))

    def confidence(self, step: int, masked_BK: Tensor, counts: list[int]) -> Tensor:
        return gumbel(self.u_confidence[step].gather(1, masked_BK))


def gumbel(uniform: Tensor) -> Tensor:
    """Uniform numbers as Gumbel noise, clamped as the official code does."""
    return -torch.log((-torch.log(uniform.clamp(min=TINY))).clamp(min=TINY))


def replay_network(replay: Replay) -> None:
    """Kinds vit and uvit: forward passes with inner outputs, and generations for each schedule."""
    model = maskgit.from_official(replay.case.config, replay.case.weights())
    labels, ids = replay.input("labels"), replay.input("forward.ids")
    no_class = torch.full_like(labels, model.config.num_classes)
    with torch.no_grad():
        handles, values = _tap(model)
        replay.check("forward.logits_cond", model.logits(ids, labels), LOGITS)
        for handle in handles:
            handle.remove()
        replay.check_all({f"forward.{name}": value for name, value in values.items()}, TAP)
        replay.check("forward.logits_uncond", model.logits(ids, no_class), LOGITS)
        dropped = torch.where(replay.input("forward.drop_u") < 0.5, no_class, labels)
        replay.check("forward.logits_drop50", model.logits(ids, dropped), LOGITS)
        for name, official in replay.case.setting("generate", default={}).items():
            _replay_generation(replay, model, labels, f"gen.{name}.", official)


def _replay_generation(replay: Replay, model: MaskGIT, labels: Tensor, prefix: str, official: dict) -> None:
    settings = settings_of(model, official)
    noise = RecordedNoise(replay.input(f"{prefix}u_tokens"), replay.input(f"{prefix}u_confidence"))
    calls: list[Tensor] = []
    handle = model.transformer.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    ids = model.generate_ids(labels, settings, [], noise=noise)
    handle.remove()
    entering = torch.stack([call[: len(labels), 1:] for call in calls])
    replay.check(f"{prefix}ids_in", entering)
    replay.check(f"{prefix}ids", ids)
    guided = sum(len(call) == 2 * len(labels) for call in calls)
    if settings.guidance_decay == "power-cosine":  # the official code also runs the branches that weigh nothing
        guided = settings.steps
    replay.check(f"{prefix}uncond_calls", torch.tensor(guided))
    no_class = torch.full_like(labels, model.config.num_classes)
    replay.check(f"{prefix}logits_cond_first", model.logits(entering[0], labels), LOGITS)
    replay.check(f"{prefix}logits_cond_last", model.logits(entering[-1], labels), LOGITS)
    replay.check(f"{prefix}logits_uncond_last", model.logits(entering[-1], no_class), LOGITS)


def replay_training(replay: Replay) -> None:
    """Kinds vit_train and uvit_train: masking, loss, accuracy and gradients, without dropout."""
    model = maskgit.from_official(replay.case.config, replay.case.weights())
    labels, tokens = replay.input("labels"), replay.input("tokens")
    is_masked = model.draw_mask(replay.input("mask.u_ratio"), replay.input("mask.u_perm"))
    replay.check("mask.mask", is_masked)
    replay.check("mask.tokens", torch.where(is_masked, model.mask_id, tokens))
    is_dropped = replay.input("drop_u") < model.config.class_label_dropout
    dropped = torch.where(is_dropped, model.config.num_classes, labels)
    output, logits = model.masked_token_loss(tokens, is_masked, dropped)
    replay.check("logits", logits, LOGITS)
    replay.check("loss", output.loss, LOSS)
    replay.check("accuracy", output.metrics["masked_accuracy"], LOSS)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for match in replay.matches(r"grad\.(.+)"):
        name, third = maskgit.place(match[1])
        if name == maskgit.TOKEN_TYPES:  # its first row is part of every position of ours
            ours = torch.zeros_like(replay.case.io[match[0]])
            ours[0] = gradients["transformer.pos_embed"].sum(dim=(0, 1))
        else:
            ours = gradients[name] if third is None else gradients[name].chunk(3)[third]
        replay.check(match[0], ours.reshape(replay.case.io[match[0]].shape), GRADIENT)


def replay_end_to_end(replay: Replay) -> None:
    """Kind end_to_end: labels to tokens to pictures."""
    setting = replay.case.setting
    model = maskgit.from_official({"official_config": setting("generator")}, replay.case.weights())
    model.use_tokenizer(titok.from_official(setting("tokenizer"), replay.case.weights("tokenizer.safetensors")))
    noise = RecordedNoise(replay.input("u_tokens"), replay.input("u_confidence"))
    ids = model.generate_ids(
        replay.input("labels"), settings_of(model, setting("sample_fn", default={})), [], noise=noise
    )
    replay.check("ids", ids)
    with torch.no_grad():
        image = model.decode_content(ids)
    replay.check("image", image, IMAGE)
    replay.check("image_uint8", to_uint8(image), PIXEL)


def settings_of(model: MaskGIT, official: dict) -> MaskGITSettings:
    """Our settings from the arguments of the official sampling function."""
    known = {
        "guidance_scale": "guidance", "guidance_decay": "guidance_decay", "guidance_scale_pow": "guidance_pow",
        "randomize_temperature": "temperature", "softmax_temperature_annealing": "annealing",
        "num_sample_steps": "steps",
    }  # fmt: skip
    if unknown := official.keys() - known:
        raise InvalidInput(f"unknown sampling arguments: {', '.join(sorted(unknown))}")
    defaults = {"guidance": 3.0, "guidance_decay": "constant", "guidance_pow": 3.0, "temperature": 4.5, "steps": 8}
    ours = defaults | {"annealing": False} | {known[name]: value for name, value in official.items()}
    return model.settings(**ours)


def _tap(model: MaskGIT) -> tuple[list, dict[str, Tensor]]:
    """Hooks that collect what the recorded names stand for."""
    network, values = model.transformer, {}
    if model.config.network == "vit":
        modules = {"embeddings": network.norm} | {f"layer{i}": block for i, block in enumerate(network.blocks)}
    else:
        modules = {f"in{i}": block for i, block in enumerate(network.in_blocks)}
        modules |= {f"out{i}": block for i, block in enumerate(network.out_blocks)}
        modules |= {"mid": network.mid_block, "norm": network.norm}

    def keep(name: str) -> Callable:
        return lambda module, args, output: values.__setitem__(name, output)

    return [module.register_forward_hook(keep(name)) for name, module in modules.items()], values
