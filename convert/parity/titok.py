"""Replay of whole TiTok and TA-TiTok models: reconstruction with all inner outputs, and one stage-1 training pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.gaussian import DiagonalGaussian
from ...nn.vq import VectorQuantizer
from ...training.losses import proxy_code_loss
from .. import titok
from .replay import EXACT, GRADIENT, IMAGE, LOSS, PIXEL, TAP, Replay


def replay_reconstruction(replay: Replay) -> None:
    """Kinds two_stage_vq, single_stage_vq, single_stage_vae, tatitok_vq, tatitok_vae: image to tokens and back."""
    model = titok.from_official(replay.case.config, replay.case.weights())
    image = replay.input("image")
    text = replay.input("text_guidance") if model.accepts_text else None
    with torch.no_grad():
        z = check_encoder(replay, model, image)
        if model.is_continuous:
            latents = check_posterior(replay, model, z)
            replay.check("recon_of_mode", model.decode_latents(model.encode_latents(image), text), IMAGE)
        else:
            latents = check_vq(replay, model, z, image)
        with taps(decoder_modules(model)) as values:
            recon = model.decode_latents(latents, text)
        replay.check_all(values, TAP)
        replay.check("recon", recon, IMAGE)
        replay.check("recon_uint8", to_uint8(recon), PIXEL)
        if replay.has("decode_tokens.in"):
            ids = replay.input("decode_tokens.in").flatten(1)
            replay.check("decode_tokens.out", model.decode_ids(ids, text_BTE=text), IMAGE)


def replay_stage1_train(replay: Replay) -> None:
    """Kind stage1_train: proxy codes, losses and gradients in training mode, and decoding through the VQGAN."""
    model = titok.from_official(replay.case.config, replay.case.weights())
    vqgan = titok.vqgan_from_official(replay.case.config, replay.case.weights("maskgit_vqgan.safetensors"))
    image = replay.input("image")
    with torch.no_grad():
        codes = vqgan.encode_pixels(image)
        replay.check("proxy.codes", codes)
        replay.check("proxy.image_of_target", vqgan.decode_ids(codes).clamp(0, 1), IMAGE)
        ids = model.encode_pixels(image)
        replay.check("proxy.image", model.decode_proxy(ids, vqgan).clamp(0, 1), IMAGE)
    model.train()
    with taps(encoder_modules(model) | decoder_modules(model)) as values:
        output = model(image)
    replay.check_all(values, TAP)
    replay.check("vq.indices", output.ids_BL[:, None])
    replay.check("proxy.argmax_codes", output.decoded.argmax(dim=1))
    check_stage1_losses(replay, model, output, codes)


def check_stage1_losses(replay: Replay, model: nn.Module, output, codes: Tensor, prefix: str = "") -> None:
    """Stage 1's objective and its gradients: cross entropy to the proxy codes [B, P] plus the quantizer's losses."""
    weight = replay.case.setting("official_config", "losses", "quantizer_weight", default=1.0)
    total, metrics = proxy_code_loss(output, codes, weight)
    for name in ("total", "reconstruction_loss", "quantizer_loss"):
        replay.check(f"{prefix}loss.{name}", total if name == "total" else metrics[name], LOSS)
    for name in ("commitment_loss", "codebook_loss"):
        replay.check(f"{prefix}loss.{name}", getattr(output.vq, name), LOSS)
    model.zero_grad()
    total.backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        replay.check(f"{prefix}grad.{name}", gradient, GRADIENT)


def check_encoder(replay: Replay, model: nn.Module, image: Tensor) -> Tensor:
    """Run the encoder, compare its inner outputs, and return z [B, C or 2C, 1, N]."""
    with taps(encoder_modules(model)) as values:
        z = model.encoder(image, model.latent_tokens)
    replay.check_all(values, TAP)
    return z


def check_vq(replay: Replay, model: nn.Module, z: Tensor, image: Tensor) -> Tensor:
    """Quantize z by the training path and, for the ids, by the inference path as well; return the codes."""
    quantized, vq = model.quantize(z)
    replay.check("vq.indices", vq.ids_BHW)
    replay.check("vq.indices", model.encode_pixels(image)[:, None], EXACT, note="encode_pixels")
    replay.check("vq.z_quantized", quantized, TAP)
    replay.check("vq.margin", margin(model.quantize, z), TAP)
    counted = 0.0 if model.config.has_pixel_decoder else 1.0  # stage 2 freezes the quantizer and voids its losses
    for name in ("quantizer_loss", "commitment_loss", "codebook_loss"):
        replay.check(f"vq.{name}", counted * getattr(vq, name), LOSS)
    return quantized


def check_posterior(replay: Replay, model: nn.Module, parameters: Tensor) -> Tensor:
    """Compare the Gaussian of a VAE and return the sample that the recorded noise gives."""
    posterior = DiagonalGaussian(parameters)
    sample = posterior.mean + posterior.std * replay.input("vae.noise")
    values = {"mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "sample": sample}
    replay.check_all({f"vae.{name}": value for name, value in values.items()}, TAP)
    replay.check("vae.kl", posterior.kl(), TAP)
    if replay.has("vae.clamped_logvar_in"):
        raw = replay.input("vae.clamped_logvar_in")
        clamped = DiagonalGaussian(torch.cat([torch.zeros_like(raw), raw], dim=1)).logvar
        replay.check("vae.clamped_logvar", clamped, TAP)
    return sample


def margin(quantizer: VectorQuantizer, z_BCHW: Tensor) -> Tensor:
    """Gap between the smallest and the second smallest squared distance to a code, for each of the B*H*W vectors."""
    z_NC = z_BCHW.movedim(1, -1).flatten(0, -2)
    z_NC = F.normalize(z_NC, dim=-1) if quantizer.use_l2_norm else z_NC
    nearest_two = torch.cdist(z_NC.double(), quantizer.codebook().double()).square().topk(2, largest=False).values
    return (nearest_two[:, 1] - nearest_two[:, 0]).float()


def to_uint8(pixels_B3HW: Tensor) -> Tensor:
    """Pictures as the official demo writes them: uint8 [B, H, W, 3], clamped and truncated."""
    return (pixels_B3HW.clamp(0, 1) * 255).movedim(1, -1).to(torch.uint8)


def encoder_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Recorded name -> module, for what a case may have recorded of the encoder."""
    encoder = model.encoder
    modules = {"enc.patch_embed": encoder.patch_embed, "enc.ln_pre": encoder.ln_pre, "enc.ln_post": encoder.ln_post}
    modules |= {f"enc.block{i}": block for i, block in enumerate(encoder.transformer)}
    return modules | {"enc.z": encoder}


def decoder_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Recorded name -> module, for the transformer decoder and the pixel decoder."""
    decoder = model.decoder
    modules = {"dec.embed": decoder.decoder_embed, "dec.ln_pre": decoder.ln_pre, "dec.ln_post": decoder.ln_post}
    modules |= {f"dec.block{i}": block for i, block in enumerate(decoder.transformer)}
    modules["dec.out"] = decoder
    if model.config.has_pixel_decoder:
        pixel = model.pixel_decoder
        modules["pix.conv_in"] = pixel.conv_in
        modules |= {f"pix.mid{i}": block for i, block in enumerate(pixel.mid)}
        modules |= {f"pix.up{i}": level for i, level in enumerate(pixel.up)}
        modules["dec.soft_embedding"] = pixel  # what goes in, see `taps`
    return modules


@contextmanager
def taps(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of `modules` during the block, under their names; `dec.soft_embedding` is an input.

    Our last transformer block computes only the positions that are read on. What the official block returns for all
    positions is computed here from the same input.
    """
    values: dict[str, Tensor] = {}

    def collect(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if name == "dec.soft_embedding":
                output = args[0]
            elif ".block" in name:
                x, keep, *rest = args
                output = output if keep is None else module.forward(x, None, *rest)
            values[name] = output.detach().clone()  # later layers may work in place

        return hook

    handles = [module.register_forward_hook(collect(name)) for name, module in modules.items()]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
