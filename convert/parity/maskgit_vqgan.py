"""Replay of the MaskGIT-VQGAN alone: encode, quantize, decode, and the lookup of given codes."""

from __future__ import annotations

import torch
from torch import nn

from .. import titok
from .replay import IMAGE, LOSS, TAP, Replay
from .titok import taps

SOFT_TEMPERATURE = 0.7  # of the recorded soft codes, where the config does not say


def replay_maskgit_vqgan(replay: Replay) -> None:
    """Kind maskgit_vqgan: pictures of any shape, square and rectangular code grids, soft codes."""
    vqgan = titok.vqgan_from_official(replay.case.config, replay.case.weights())
    image = replay.input("image")
    with torch.no_grad():
        with taps(inner_modules(vqgan)) as values:
            z = vqgan.encoder(image)
            quantized, vq = vqgan.quantize(z)
            recon = vqgan.decoder(quantized)
        replay.check_all(values, TAP)
        replay.check("z_quantized", quantized, TAP)
        replay.check("loss", vq.quantizer_loss, LOSS)
        replay.check("indices", vq.ids_BHW.flatten(1))
        replay.check("indices", vqgan.encode_pixels(image), note="encode_pixels")
        replay.check("recon", recon, IMAGE)
        replay.check("recon_clamped", recon.clamp(0, 1), IMAGE)
        temperature = replay.case.setting("soft_code_temperature", default=SOFT_TEMPERATURE)
        soft, ids = vqgan.encode_soft(image, temperature)
        replay.check("soft_code", soft, TAP)
        replay.check("soft_code.indices", ids)
        for match in replay.matches(r"(\w+_codes)\.image"):  # (B, H*W) of a square, or (B, H, W)
            codes = replay.input(match[1])
            replay.check(match[0], vqgan.decode_ids(codes), IMAGE)


def inner_modules(vqgan: nn.Module) -> dict[str, nn.Module]:
    """Recorded name -> module."""
    encoder, decoder = vqgan.encoder, vqgan.decoder
    modules = {"enc.conv_in": encoder.conv_in, "enc.z": encoder, "dec.conv_in": decoder.conv_in}
    for short, side, levels in (("enc", encoder, "down"), ("dec", decoder, "up")):
        modules |= {f"{short}.mid{i}": block for i, block in enumerate(side.mid)}
        modules |= {f"{short}.{levels}{i}": level for i, level in enumerate(getattr(side, levels))}
    return modules
