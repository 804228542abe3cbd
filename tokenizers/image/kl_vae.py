"""KL-16 and its relatives: the convolutional VAE whose latents xAR generates (specification: MAR's VAE).

The network is diffusers' `AutoencoderKL`; this file gives it the interface of our tokenizers. Latents are those a
generator sees: multiplied by `scaling_factor`, so that they have about unit variance.

Shape suffixes: B batch, 3/H/W image, C latent channels, G latent grid side.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...core.base import TokenizerOutput
from ...core.errors import InvalidInput
from ...core.image_tokenizer import ImageTokenizer
from ...nn.gaussian import DiagonalGaussian


class KLAutoencoder(ImageTokenizer):
    """A KL autoencoder (Rombach et al. 2022) with attention only at the coarsest level of the encoder and the middles.

    The defaults are KL-16 of MAR (Li et al. 2024): 256 x 256 pixels become 16 x 16 latents of 16 channels.

    Args:
        image_size: side of the pictures that `encode` makes, in pixels; the tensor level takes any size.
        block_out_channels: width of each level, finest first; each level but the last halves the side.
        layers_per_block: residual blocks of an encoder level (a decoder level has one more).
        scaling_factor: one over the standard deviation of the posterior samples on the training data.
    """

    is_continuous = True
    fingerprint_weights = ("vae.quant_conv",)  # what latents mean is the encoder's: the decoder may be fine-tuned

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        encoder_attention: bool = True,
        scaling_factor: float = 0.2325,
    ):
        super().__init__()
        levels = len(block_out_channels)
        self.downsampling = 2 ** (levels - 1)
        if image_size % self.downsampling:
            raise InvalidInput(f"image_size {image_size} is not a multiple of {self.downsampling}")
        last = "AttnDownEncoderBlock2D" if encoder_attention else "DownEncoderBlock2D"
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + (last,),
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=image_size,
            scaling_factor=scaling_factor,
        )

    @property
    def vocab_size(self) -> int:
        raise InvalidInput(f"{self.name} has continuous latents and no vocabulary")

    @property
    def max_tokens(self) -> int:
        """Latent vectors of a picture of side `image_size`."""
        return (self.image_size // self.downsampling) ** 2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, G, G) of a picture of side `image_size`."""
        side = self.image_size // self.downsampling
        return self.config.latent_channels, side, side

    def forward(self, pixels_B3HW: Tensor, generator: torch.Generator | None = None) -> TokenizerOutput:
        """Encode, sample and decode `pixels_B3HW` (fp32, [0, 1]): the training pass."""
        posterior = DiagonalGaussian(self.encode_moments(pixels_B3HW))
        return TokenizerOutput(self._decode(posterior.sample(generator)), posterior=posterior)

    def encode_pixels(self, pixels_B3HW: Tensor, num_tokens: int | None = None) -> Tensor:
        """There are no ids: raises InvalidInput."""
        raise InvalidInput(f"{self.name} has continuous latents and no ids; use encode_latents or reconstruct")

    def encode_moments(self, pixels_B3HW: Tensor) -> Tensor:
        """Mean and log-variance [B, 2C, G, G] of the unscaled latents; each side becomes floor(side / downsampling)."""
        return self.vae.quant_conv(self.vae.encoder((pixels_B3HW * 2 - 1).to(self.vae.dtype)))

    def encode_latents(
        self, pixels_B3HW: Tensor, generator: torch.Generator | None = None, sample: bool = False
    ) -> Tensor:
        """Latents fp32 [B, C, G, G], scaled: the posterior's mean, or one draw of it with `sample`."""
        posterior = DiagonalGaussian(self.encode_moments(pixels_B3HW).float())
        return (posterior.sample(generator) if sample else posterior.mode()) * self.config.scaling_factor

    def decode_latents(self, latents_BCGG: Tensor) -> Tensor:
        """Pixels fp32 [B, 3, H, W], nominally in [0, 1] but not clamped, of scaled latents."""
        return self._decode(latents_BCGG / self.config.scaling_factor).float()

    def freeze_encoder(self) -> None:
        """Train the decoder alone from now on: latents keep their meaning, so a generator of them stays right."""
        for frozen in (self.vae.encoder, self.vae.quant_conv):
            frozen.requires_grad_(False).eval()

    @torch.no_grad()
    def calibrate(self, pixels_B3HW: Tensor, batch_size: int = 64) -> None:
        """Set `scaling_factor` so that posterior samples of `pixels_B3HW` (fp32, [0, 1]) have standard deviation 1."""
        rng = torch.Generator().manual_seed(0)
        samples = [
            DiagonalGaussian(self.encode_moments(batch.to(self.device)).float()).sample(rng)
            for batch in pixels_B3HW.split(batch_size)
        ]
        factor = round(1 / float(torch.cat(samples).std()), 6)
        self.register_to_config(scaling_factor=factor)
        self.vae.register_to_config(scaling_factor=factor)

    def _decode(self, z_BCGG: Tensor) -> Tensor:
        return (self.vae.decoder(self.vae.post_quant_conv(z_BCGG.to(self.vae.dtype))) + 1) / 2


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released models, by our name."""
    return {"kl16": {}}
