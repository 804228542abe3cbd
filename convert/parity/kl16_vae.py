"""Replay of the KL autoencoder: moments, posterior, decodings and inner outputs, for pictures of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import InvalidCheckpoint, InvalidInput
from ...nn.gaussian import DiagonalGaussian
from .. import kl16_vae
from .recipe_weights import recipe_tensor
from .replay import Replay, Tolerance

MOMENTS = Tolerance(atol=2e-5)
IMAGE = Tolerance(atol=5e-5)
KL = Tolerance(rtol=1e-5)
INNER = Tolerance(atol=5e-5, rtol=1e-4)


def replay_autoencoder(replay: Replay) -> None:
    """Kinds autoencoder and autoencoder_full_size (whose weights are drawn by recipe)."""
    config = replay.case.config
    levels = len(kl16_vae.official_architecture(config).integers("ch_mult"))
    if (replay.case.folder / "weights.safetensors").is_file():
        weights = replay.case.weights()
    else:
        seed = int(replay.case.setting("weights_recipe_seed"))
        weights = {name: recipe_tensor(name, shape, seed) for name, shape in official_shapes(config).items()}
    vae = kl16_vae.from_official(config, weights)
    try:
        tokenizer = kl16_vae.tokenizer_from_official(config, weights)
    except InvalidCheckpoint as error:
        tokenizer = None
        replay.echo(f"  the interface of our tokenizers is not compared: {error}")
    for match in replay.matches(r"in\.(\d+)\.image"):
        number = match[1]
        image, noise = replay.input(match[0]), replay.input(f"in.{number}.noise")
        with torch.no_grad(), Taps(replay, vae, f"mid.{number}.", levels):
            moments = vae.quant_conv(vae.encoder(image))
            posterior = DiagonalGaussian(moments)
            sample = posterior.mean + posterior.std * noise
            decoded = vae.decode(sample).sample
        with torch.no_grad():
            latent = sample * vae.config.scaling_factor
            again = vae.decode(latent / vae.config.scaling_factor).sample
        out = f"out.{number}."
        values = {"moments": moments, "mean": posterior.mean, "logvar": posterior.logvar, "sample": sample}
        replay.check_all({out + name: value for name, value in (values | {"latent": latent}).items()}, MOMENTS)
        replay.check(f"{out}kl", posterior.kl().sum(dim=1), KL)
        replay.check(f"{out}decoded", decoded, IMAGE)
        replay.check(f"{out}decoded_from_latent", again, IMAGE)
        if tokenizer is not None:
            with torch.no_grad():
                again, ours = tokenizer.encode_moments((image + 1) / 2), tokenizer.decode_latents(latent) * 2 - 1
            replay.check(f"{out}moments", again, MOMENTS, note="tokenizer")
            replay.check(f"{out}decoded_from_latent", ours, IMAGE, note="tokenizer")


class Taps:
    """Compares the outputs of the modules whose official names were recorded, while it is open."""

    def __init__(self, replay: Replay, vae: nn.Module, prefix: str, levels: int):
        self.replay, self.handles = replay, []
        for match in replay.matches(rf"{prefix.replace('.', '[.]')}(.+)"):
            name = kl16_vae.our_module(match[1], levels)
            try:
                module = vae.get_submodule(name)
            except AttributeError:
                raise InvalidInput(f"{replay.case.folder}: {match[0]} names no module of ours ({name})") from None
            self.handles.append(module.register_forward_hook(self._check(match[0])))

    def _check(self, name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            recorded = self.replay.case.io[name]
            if isinstance(module, nn.Linear):  # attention's projections: 1x1 convolutions in the official code
                output = output.transpose(1, 2)
            self.replay.check(name, output.reshape(recorded.shape), INNER)

        return hook

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()


def official_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Official parameter names and shapes of an architecture (latent-diffusion's layout)."""
    architecture = kl16_vae.official_architecture(config)
    multipliers, width = architecture.integers("ch_mult"), architecture.integer("ch")
    blocks, embed = architecture.integer("blocks"), architecture.integer("embed")
    widths = [width * multiplier for multiplier in multipliers]
    attends = kl16_vae.has_attention(architecture)
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inner: int, outer: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner, size, size), (outer,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def resnet(name: str, inner: int, outer: int) -> None:
        norm(f"{name}.norm1", inner)
        conv(f"{name}.conv1", inner, outer, 3)
        norm(f"{name}.norm2", outer)
        conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            conv(f"{name}.nin_shortcut", inner, outer, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name: str) -> None:
        resnet(f"{name}.mid.block_1", widths[-1], widths[-1])
        attention(f"{name}.mid.attn_1", widths[-1])
        resnet(f"{name}.mid.block_2", widths[-1], widths[-1])

    conv("encoder.conv_in", 3, widths[0], 3)
    inner = widths[0]
    for level, outer in enumerate(widths):
        for block in range(blocks):
            resnet(f"encoder.down.{level}.block.{block}", inner, outer)
            inner = outer
            if attends[level]:
                attention(f"encoder.down.{level}.attn.{block}", outer)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", outer, outer, 3)
    middle("encoder")
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], 2 * embed, 3)
    conv("decoder.conv_in", embed, widths[-1], 3)
    middle("decoder")
    inner = widths[-1]
    for level, outer in reversed(list(enumerate(widths))):
        for block in range(blocks + 1):
            resnet(f"decoder.up.{level}.block.{block}", inner, outer)
            inner = outer
        if level:
            conv(f"decoder.up.{level}.upsample.conv", outer, outer, 3)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], 3, 3)
    conv("quant_conv", 2 * embed, 2 * embed, 1)
    conv("post_quant_conv", embed, embed, 1)
    return shapes
