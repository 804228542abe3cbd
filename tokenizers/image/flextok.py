"""FlexTok: a picture as an ordered sequence of 1 to 256 tokens, any prefix of which decodes (Bachmann et al. 2025,
arXiv 2502.13967).

A KL autoencoder turns the picture into latents. A transformer with causal registers reads them, and finite scalar
quantization makes the registers tokens. A second transformer turns noise into latents again, by a rectified flow that
the first k tokens guide: a few give the gist, more add detail.

What is exact and fast about it here: registers that are not kept stand once for all of them (`flextok_network`), the
modulations of the known times are computed once for a run, pictures with and without condition go through as one batch
where that wastes little, the last blocks compute only what is read of them, and k tokens are encoded with k registers.

Shape suffixes: B pictures, 3/H/W image, C latent channels, G latent rows, W latent columns, K tokens, S numbers of a
code, R rows (B, or 2B when guided: the unconditional rows last).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...core.base import OnStep, report
from ...core.errors import InvalidInput
from ...core.generator import MAX_SEED, check_flag, check_number, check_steps
from ...core.image_tokenizer import ImageTokenizer
from ...core.sizes import MAX_DEPTH, check_sizes, check_whole
from ...nn.fsq import FSQ
from .flextok_flow import (
    TIMES_AT_ONCE,
    FlowSettings,
    ProjectedGuidance,
    draw_times,
    initial_noise,
    plain_guidance,
)
from .flextok_network import FlexTokDecoder, FlexTokEncoder, init_flextok_weights
from .kl_vae import KLAutoencoder

LEVELS = (8, 8, 8, 5, 5, 5)  # 64,000 codes
PADDED_SHARE = 1 / 4  # of its tokens that an unconditional row may gain to be in one batch with the others


@dataclass
class FlowOutput:
    """A training pass: `loss` (0-d) is the mean of `losses_B`; ids int64 [B, K]; the patches [B, P, D] behind the block
    that was asked for, or None.
    """

    loss: Tensor
    losses_B: Tensor
    velocity_BCGW: Tensor
    ids_BK: Tensor
    features_BPD: Tensor | None


class FlexTok(ImageTokenizer):
    """Variable-length image tokenizer with a flow decoder. Defaults are flextok-d12-d12-in1k's.

    Encoding is deterministic: it takes the mean of the VAE's posterior. The authors draw from it unless told otherwise;
    `encode_pixels(..., sample=True)` does.

    Args:
        num_tokens: registers; the longest sequence.
        levels: of the quantizer's channels.
        grid: patches of a whole picture, (rows, columns); they are as many as the shorter side of pictures.
        patch_size: latents a side of a patch.
        encoder_*, decoder_*: width, blocks and width of a head of the two transformers.
        max_timestep: the unit of time that the decoder's time features were trained with.
        latent_channels, vae_*, scaling_factor: the VAE; see `KLAutoencoder`.
        num_steps, guidance_scale, norm_guidance: how to decode when the call does not say.
    """

    is_variable_length = True
    fingerprint_weights = ("encoder.head", "encoder.registers", "vae.vae.quant_conv")  # the decoder may be fine-tuned
    _keep_in_fp32_modules = ["quantize", "vae"]  # noqa: RUF012  as the authors run it
    decoding_option_names = ("steps", "guidance", "norm_guidance", "seed")
    shows_steps = True

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 256,
        levels: tuple[int, ...] = LEVELS,
        grid: tuple[int, int] = (16, 16),
        patch_size: int = 2,
        encoder_width: int = 768,
        encoder_depth: int = 12,
        encoder_head_width: int = 64,
        decoder_width: int = 768,
        decoder_depth: int = 12,
        decoder_head_width: int = 64,
        max_timestep: float = 1000.0,
        latent_channels: int = 16,
        vae_channels: tuple[int, ...] = (128, 256, 512, 512),
        vae_layers: int = 2,
        vae_norm_groups: int = 32,
        vae_encoder_attention: bool = False,
        scaling_factor: float = 1.0,
        num_steps: int = 25,
        guidance_scale: float = 7.5,
        norm_guidance: bool = True,
    ):
        super().__init__()
        widths = {"encoder_width": encoder_width, "decoder_width": decoder_width}
        heads = {"encoder_head_width": encoder_head_width, "decoder_head_width": decoder_head_width}
        check_sizes(num_tokens=num_tokens, patch_size=patch_size, latent_channels=latent_channels, **widths, **heads)
        check_sizes(MAX_DEPTH, encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise InvalidInput(f"grid={grid!r} must be two whole numbers: rows and columns")
        check_sizes(1024, grid_rows=grid[0], grid_columns=grid[1])
        for width, head_width in zip(widths.values(), heads.values(), strict=True):
            if width % head_width or width % 4:
                raise InvalidInput(f"width {width} must be a multiple of 4 and of the head width {head_width}")
        check_number(max_timestep, "max_timestep", 1e-3, 1e6)
        self.quantize = FSQ(levels)
        factor = 2 ** (len(vae_channels) - 1)
        self.vae = KLAutoencoder(
            min(grid) * patch_size * factor, latent_channels, tuple(vae_channels), vae_layers, vae_norm_groups,
            vae_encoder_attention, scaling_factor,
        )  # fmt: skip
        shared = {"patch_size": patch_size, "grid": tuple(grid), "num_registers": num_tokens, "code_size": len(levels)}
        self.encoder = FlexTokEncoder(latent_channels, encoder_width, encoder_depth, encoder_head_width, **shared)
        self.decoder = FlexTokDecoder(
            latent_channels, decoder_width, decoder_depth, decoder_head_width, **shared, max_timestep=max_timestep
        )
        init_flextok_weights(self.encoder)
        init_flextok_weights(self.decoder)

    @property
    def image_size(self) -> int:
        return self.vae.image_size

    @property
    def vocab_size(self) -> int:
        return self.quantize.vocab_size

    @property
    def max_tokens(self) -> int:
        return self.config.num_tokens

    # Encoding.

    def encode_pixels(
        self,
        pixels_B3HW: Tensor,
        num_tokens: int | None = None,
        generator: torch.Generator | None = None,
        sample: bool = False,
    ) -> Tensor:
        """Ids int64 [B, K] of `pixels_B3HW` (fp32, [0, 1], side `image_size`), of all tokens or the first `num_tokens`.

        With `sample`, of a draw from the VAE's posterior by `generator`, in the place of its mean.
        """
        self.check_num_tokens(num_tokens)
        latents_BCGW = self.vae.encode_latents(self.check_pixels(pixels_B3HW), generator, sample)
        return self.quantize(self.registers_of(latents_BCGW, num_tokens))[1]

    def registers_of(self, latents_BCGW: Tensor, num_tokens: int | None = None) -> Tensor:
        """What is quantized: fp32 [B, K, S] of scaled latents, of all tokens or of the first `num_tokens`."""
        self.check_num_tokens(num_tokens)
        patch, (rows, columns) = self.config.patch_size, self.config.grid
        height, width = latents_BCGW.shape[-2:]
        fits = latents_BCGW.ndim == 4 and latents_BCGW.shape[1] == self.config.latent_channels
        if not fits or height % patch or width % patch or height > rows * patch or width > columns * patch:
            raise InvalidInput(
                f"{self.name} reads latents [B, {self.config.latent_channels}, G, W] of at most {rows * patch} x "
                f"{columns * patch}, in multiples of {patch}, not {list(latents_BCGW.shape)}"
            )
        return self.encoder(latents_BCGW, num_tokens)

    # Decoding.

    def decoding_settings(
        self,
        *,
        steps: int | None = None,
        guidance: float | Callable[[float], float] | None = None,
        norm_guidance: bool | None = None,
        seed: int = 0,
    ) -> FlowSettings:
        """Checked settings of `decode`; None takes the model's own.

        Args:
            steps: 1 to 1000.
            guidance: 0 to 100; 1 is none. In Python also a function of the time, which falls from 1 to 0.
            norm_guidance: by adaptive projected guidance, else plainly.
            seed: of the noise.

        Raises:
            InvalidInput: a value out of its range or of another type.
        """
        config = self.config
        if not callable(guidance):
            guidance = check_number(config.guidance_scale if guidance is None else guidance, "guidance")
        return FlowSettings(
            steps=check_steps(config.num_steps if steps is None else steps),
            guidance=guidance,
            norm_guidance=check_flag(config.norm_guidance if norm_guidance is None else norm_guidance, "norm_guidance"),
            seed=check_whole(seed, "seed", 0, MAX_SEED),
        )

    def decoding_arguments(self, **options) -> dict:
        return {"settings": self.decoding_settings(**options)}

    def decode_ids(
        self,
        ids_BK: Tensor,
        lengths_B: Tensor | None = None,
        settings: FlowSettings | None = None,
        noise_BCGW: Tensor | None = None,
        on_step: OnStep | None = None,
        previews: bool = False,
    ) -> Tensor:
        """Pixels fp32 [B, 3, H, W], nominally in [0, 1] but not clamped, of int64 `ids_BK`.

        `lengths_B` gives each row's own length; what lies behind it is ignored. See `decode_to_latents`. `on_step` is
        called as on_step(step, total, preview=...); with `previews`, [3, H, W] in [0, 1] of what the last one comes to.
        """
        settings = self.decoding_settings() if settings is None else settings

        def show(step: int, latents_BCGW: Tensor) -> None:
            preview = None
            if previews and step < settings.steps:
                preview = self.vae.decode_latents(latents_BCGW[-1:])[0].clamp(0, 1).cpu()
            report(on_step, step, settings.steps, preview)

        watched = None if on_step is None else show
        return self.vae.decode_latents(self.decode_to_latents(ids_BK, lengths_B, settings, noise_BCGW, watched))

    def decode_to_latents(
        self,
        ids_BK: Tensor,
        lengths_B: Tensor | None = None,
        settings: FlowSettings | None = None,
        noise_BCGW: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Scaled latents fp32 [B, C, G, W] of int64 `ids_BK`.

        settings: default `decoding_settings()`. noise_BCGW: where to start, of one row for all or one for each; default
        that of the settings' seed. on_step: called after each step with its number and the latents that the flow would
        come to if it went straight on.
        """
        self.check_ids(ids_BK, lengths_B)
        settings = self.decoding_settings() if settings is None else settings
        if noise_BCGW is None:
            noise_BCGW = initial_noise(settings.seed, self.vae.latent_shape)
        noise_BCGW = noise_BCGW.to(ids_BK.device, torch.float32).expand(len(ids_BK), -1, -1, -1)
        return self.flow(self.quantize.lookup(ids_BK), lengths_B, settings, noise_BCGW, on_step)

    @torch.no_grad()
    def flow(
        self,
        codes_BKS: Tensor,
        lengths_B: Tensor | None,
        settings: FlowSettings,
        noise_BCGW: Tensor,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Latents fp32 [B, C, G, W] of codes, by Euler's steps from `noise_BCGW`; see `decode_to_latents`."""
        branches = _Branches(self.decoder, codes_BKS, lengths_B, noise_BCGW.shape[-2:])
        guide = ProjectedGuidance() if settings.norm_guidance else plain_guidance
        x_BCGW, times, done = noise_BCGW, settings.times(), 0
        for start in range(0, len(times), TIMES_AT_ONCE):
            chunk = times[start : start + TIMES_AT_ONCE]
            modulations = self.decoder.modulations(torch.tensor(chunk, device=x_BCGW.device))
            for index, time in enumerate(chunk):
                of_time, scale = [part[index, None] for part in modulations], settings.guidance_at(time)
                if scale == 1:
                    velocity_BCGW = branches.conditional(x_BCGW, of_time)
                else:
                    velocity_BCGW = guide(*branches.both(x_BCGW, of_time), scale)
                x_BCGW = x_BCGW - velocity_BCGW / settings.steps
                done += 1
                if on_step is not None:
                    on_step(done, x_BCGW - (1 - done / settings.steps) * velocity_BCGW)
        return x_BCGW

    # Training (section 3.2 of the paper; what it leaves open is as public trainings have it).

    def forward(
        self,
        latents_BCGW: Tensor,
        rng: torch.Generator | None = None,
        null_share: float = 0.1,
        times: str = "mode",
        features_of: int | None = None,
    ) -> FlowOutput:
        """Draw times, noise, lengths (1, 2, 4, ... tokens) and pictures without condition: the training pass."""
        batch, device = len(latents_BCGW), latents_BCGW.device
        choices = power_lengths(self.max_tokens)
        lengths_B = choices[torch.randint(len(choices), (batch,), generator=rng)]
        is_null_B = torch.rand(batch, generator=rng) < null_share
        times_B = draw_times(times, batch, rng)
        noise_BCGW = torch.randn(latents_BCGW.shape, generator=rng)
        drawn = (part.to(device) for part in (noise_BCGW, times_B, lengths_B, is_null_B))
        return self.velocity_loss(latents_BCGW, *drawn, features_of)

    def velocity_loss(
        self,
        latents_BCGW: Tensor,
        noise_BCGW: Tensor,
        times_B: Tensor,
        lengths_B: Tensor,
        is_null_B: Tensor,
        features_of: int | None = None,
    ) -> FlowOutput:
        """Mean square error of the velocities noise - latents at `times_B`, with `lengths_B` tokens or, where
        `is_null_B`, without condition.
        """
        codes_BKS, ids_BK = self.quantize(self.encoder(latents_BCGW))
        longest = int(lengths_B.max())
        condition = self.decoder.condition(codes_BKS[:, :longest], lengths_B, is_null_B)
        time_B111 = times_B[:, None, None, None]
        noisy_BCGW = time_B111 * noise_BCGW + (1 - time_B111) * latents_BCGW
        modulations = self.decoder.modulations(times_B)
        velocity_BCGW, features_BPD = self.decoder(noisy_BCGW, *condition, modulations, features_of)
        losses_B = (velocity_BCGW - (noise_BCGW - latents_BCGW)).square().mean(dim=(1, 2, 3))
        return FlowOutput(losses_B.mean(), losses_B, velocity_BCGW, ids_BK, features_BPD)

    def freeze_vae(self) -> None:
        """Train the resampler alone; the VAE has a training of its own."""
        self.vae.requires_grad_(False).eval()


class _Branches:
    """Velocities with and without condition, for one run."""

    def __init__(self, decoder: FlexTokDecoder, codes_BKS: Tensor, lengths_B: Tensor | None, size: tuple[int, int]):
        batch, num_codes, _ = codes_BKS.shape
        self.decoder, self.batch = decoder, batch
        if lengths_B is not None:
            codes_BKS = codes_BKS[:, : int(lengths_B.max())]
            num_codes = codes_BKS.shape[1]
            if int(lengths_B.min()) == num_codes:
                lengths_B = None
        self.with_condition = decoder.condition(codes_BKS, lengths_B)
        is_null_B = torch.ones(batch, dtype=torch.bool, device=codes_BKS.device)
        num_patches = size[0] * size[1] // decoder.patch_size**2
        self.is_one_batch = num_codes <= PADDED_SHARE * num_patches
        if self.is_one_batch:
            lengths_B = torch.full((batch,), num_codes, device=codes_BKS.device) if lengths_B is None else lengths_B
            is_null_R = torch.cat([~is_null_B, is_null_B])
            self.of_both = decoder.condition(codes_BKS.repeat(2, 1, 1), lengths_B.repeat(2), is_null_R)
        else:
            self.without_condition = decoder.condition(codes_BKS[:, :0], None, is_null_B)

    def conditional(self, x_BCGW: Tensor, modulations: list[Tensor]) -> Tensor:
        return self.decoder(x_BCGW, *self.with_condition, modulations)[0]

    def both(self, x_BCGW: Tensor, modulations: list[Tensor]) -> tuple[Tensor, Tensor]:
        """With condition, and without."""
        if self.is_one_batch:
            v_BCGW, u_BCGW = self.decoder(x_BCGW.repeat(2, 1, 1, 1), *self.of_both, modulations)[0].chunk(2)
            return v_BCGW, u_BCGW
        return self.conditional(x_BCGW, modulations), self.decoder(x_BCGW, *self.without_condition, modulations)[0]


def power_lengths(num_tokens: int) -> Tensor:
    """1, 2, 4, ... and `num_tokens` itself: the lengths of nested dropout, int64."""
    lengths = [2**power for power in range(num_tokens.bit_length()) if 2**power < num_tokens]
    return torch.tensor([*lengths, num_tokens])


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released models, by our name; their files say the scale of latents and of time."""
    sizes = {"d12-d12-in1k": (12, 12), "d18-d18-in1k": (18, 18), "d18-d28-in1k": (18, 28), "d18-d28-dfn": (18, 28)}
    return {
        f"flextok-{name}": {
            "encoder_width": 64 * encoder, "encoder_depth": encoder,
            "decoder_width": 64 * decoder, "decoder_depth": decoder,
        }
        for name, (encoder, decoder) in sizes.items()
    }  # fmt: skip
