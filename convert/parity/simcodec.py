"""Replay of SimCodec and HiFi-Codec: encoding, quantizing, decoding, and the gradients of a training pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ...core.errors import InvalidInput
from ...tokenizers.speech.simcodec import SimCodec
from .. import simcodec
from .replay import GRADIENT, Replay, Tolerance

FLOAT = Tolerance(atol=1e-5, rtol=1e-4)
FOLDED = Tolerance(atol=2e-5, rtol=1e-4)  # weight norm that is folded into the weights rounds once more
QUANTIZER_WEIGHT = 10.0


def replay_codec(replay: Replay) -> None:
    """Kind codec: every recorded clip, then the quantizer with fewer layers, of the first clip's latents."""
    model = simcodec.from_official(replay.case.config, replay.case.weights())
    prefixes = [match[1] for match in replay.matches(r"(.*?)wav")]
    if not prefixes:
        raise InvalidInput(f"{replay.case.folder / 'io.safetensors'} lacks the input 'wav'")
    latents = {prefix: _replay_clip(replay, model, prefix) for prefix in prefixes}
    latent_BCL = latents.get("even.", latents[prefixes[0]])
    for match in replay.matches(r"(bw(\d+)\.)quantized"):
        _replay_quantizer(replay, model, match[1], latent_BCL, num_layers=int(match[2]))
    if replay.has("mask.mask_id"):
        _replay_quantizer(replay, model, "mask.", latent_BCL, last_layer_BL=replay.input("mask.mask_id"))
    for prefix in prefixes:
        if replay.has(f"{prefix}train.q_loss") or any(replay.matches(rf"{prefix}train\..+")):
            _replay_training(replay, prefix)


@torch.no_grad()
def _replay_clip(replay: Replay, model: SimCodec, prefix: str) -> Tensor:
    """Compare all that a clip becomes on its way through the codec; return its latents."""
    wave_BT = replay.input(f"{prefix}wav").squeeze(1)

    def compare(place: str):
        return lambda name, value: replay.check(f"{prefix}{place}.{name}", value, FOLDED)

    latent_BCL = model.encode_latent(wave_BT, compare("enc"))
    for name in ("enc.latent", "latent"):
        replay.check(f"{prefix}{name}", latent_BCL, FOLDED)
    ids_BLQ = _replay_quantizer(replay, model, prefix, latent_BCL)
    if wave_BT.shape[1] % model.hop_length == 0:  # the authors drop what does not fill a frame; we pad it
        ours = model.encode_waveform(wave_BT)
        replay.check(f"{prefix}codes", ours[..., None] if model.num_codebooks == 1 else ours, note="encode_waveform")
    decoded_BT = model.decode_latent(model.quantize.lookup(ids_BLQ), compare("dec"))
    replay.check(f"{prefix}decoded", decoded_BT[:, None], FOLDED)
    ids = ids_BLQ[..., 0] if model.num_codebooks == 1 else ids_BLQ
    replay.check(f"{prefix}decoded", model.decode_ids(ids)[:, None], FOLDED, note="decode_ids")
    return latent_BCL


@torch.no_grad()
def _replay_quantizer(
    replay: Replay, model: SimCodec, prefix: str, latent_BCL: Tensor,
    num_layers: int | None = None, last_layer_BL: Tensor | None = None,
) -> Tensor:  # fmt: skip
    vq = model.quantize(latent_BCL, num_layers, last_layer_BL)
    used = vq.ids_BLQ.shape[2]
    replay.check(f"{prefix}codes", vq.ids_BLQ)
    replay.check(f"{prefix}codes", model.quantize.nearest(latent_BCL)[..., :used], note="nearest")
    replay.check(f"{prefix}quantized", vq.quantized_BCL, FLOAT)
    replay.check(f"{prefix}q_loss", vq.quantizer_loss, FLOAT)
    replay.check(f"{prefix}embed", model.quantize.lookup(vq.ids_BLQ), FLOAT)
    return vq.ids_BLQ


def _replay_training(replay: Replay, prefix: str) -> None:
    """Losses, and gradients with respect to the authors' magnitudes and directions of weight norm."""
    official = simcodec.codec_keys(replay.case.weights())
    model = simcodec.from_official(replay.case.config, official)
    parameters = with_weight_norm(model, official)
    wave_BT = replay.input(f"{prefix}wav").squeeze(1)
    vq = model.quantize(model.encode_latent(wave_BT))
    decoded_BT = model.decode_latent(vq.quantized_BCL)
    common = min(decoded_BT.shape[1], wave_BT.shape[1])
    l1 = (decoded_BT[:, :common] - wave_BT[:, :common]).abs().mean()
    replay.check(f"{prefix}train.q_loss", vq.quantizer_loss, FLOAT)
    replay.check(f"{prefix}train.l1", l1, FLOAT)
    (QUANTIZER_WEIGHT * vq.quantizer_loss + l1).backward()
    for match in replay.matches(rf"{prefix}train\.grad\.(.+)"):
        if match[1] not in parameters:
            raise InvalidInput(f"{replay.case.folder}: there is no weight for {match[0]}")
        replay.check(match[0], parameters[match[1]].grad, GRADIENT)


def with_weight_norm(model: SimCodec, official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give `model` the authors' magnitudes and directions where they have some; its parameters by official key."""
    names = simcodec.official_names(model)
    model.set_weight_norm(True)
    parameters = {}
    for key, ours in names.items():
        layer, _, kind = ours.rpartition(".")
        module = model.get_submodule(layer)
        if kind != "weight" or not parametrize.is_parametrized(module):
            parameters[key] = model.get_parameter(ours)
            continue
        pairs = [[key.removesuffix(".weight") + end for end in ends] for ends in simcodec.WEIGHT_NORMS]
        pair = next((pair for pair in pairs if pair[0] in official), None)
        if pair is None:
            parametrize.remove_parametrizations(module, "weight")
            parameters[key] = module.weight
            continue
        factors = module.parametrizations.weight
        for name, factor in zip(pair, (factors.original0, factors.original1), strict=True):
            factor.data.copy_(official[name])
            parameters[name] = factor
    return parameters
