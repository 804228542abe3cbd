"""TiTok: an image as 32 to 256 tokens in one dimension (Yu et al. 2024, arXiv 2406.07550), and TA-TiTok, whose decoder
also reads a caption (Kim et al. 2025, arXiv 2501.07730).

A transformer reads image patches and N learned latent tokens, and returns the latents only; they are quantized (or
become a Gaussian). A second transformer reads one mask token per patch and the N codes, and fills in the patches.
Three generations share this file:

- two-stage (`is_legacy`): the decoder predicts, per patch, a distribution over the 1,024 codes of MaskGIT-VQGAN ("proxy
  codes"); stage 2 adds a pixel decoder, a fine-tuned copy of the VQGAN's, that reads the expected code;
- single-stage: the decoder predicts RGB patches directly, from VQ codes or from a Gaussian;
- text-aware (TA-TiTok): single-stage with 77 CLIP text vectors appended to the decoder's sequence.

Parameter names are those of the released checkpoints.

Shape suffixes: B batch, 3/H/W image, G patch grid side, P = G*G patches, N latent tokens, L positions, C token size,
D transformer width, K proxy codes, T text positions, E text width.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from ...core.base import TokenizerOutput
from ...core.errors import InvalidInput
from ...core.image_tokenizer import ImageTokenizer
from ...kernels.precision import compute_dtype
from ...nn.gaussian import DiagonalGaussian
from ...nn.layers import Conv2d, LayerNorm, Linear, widened
from ...nn.transformer import ResidualAttentionBlock
from ...nn.vq import VectorQuantizer
from .clip_text import ClipTextFeatures
from .maskgit_vqgan import MaskGitVQGAN, VQGANDecoder

SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads (table 1)
NUM_PROXY_CODES = 1024  # the codebook of MaskGIT-VQGAN


class TiTokEncoder(nn.Module):
    """Image [B, 3, H, W] in [0, 1] -> latents [B, C, 1, N] before quantization."""

    def __init__(
        self, grid: int, patch_size: int, num_latent_tokens: int, size: tuple, out_channels: int, is_legacy: bool
    ):
        super().__init__()
        width, depth, heads = size
        self.is_legacy = is_legacy
        self.gradient_checkpointing = False
        self.patch_embed = Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(grid * grid + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(num_latent_tokens, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(depth))
        self.ln_post = LayerNorm(width)
        self.conv_out = Conv2d(width, out_channels, kernel_size=1)

    def forward(self, pixels_B3HW: Tensor, latent_tokens_ND: Tensor) -> Tensor:
        batch, num_latents = pixels_B3HW.shape[0], latent_tokens_ND.shape[0]
        pixels_B3HW = to_compute(pixels_B3HW, self.latent_token_positional_embedding)
        patches_BPD = rearrange(self.patch_embed(pixels_B3HW), "b d h w -> b (h w) d") + self.positional_embedding[1:]
        class_1D = self.class_embedding + self.positional_embedding[:1]
        latents_ND = latent_tokens_ND + self.latent_token_positional_embedding
        x_BLD = torch.cat([class_1D.expand(batch, 1, -1), patches_BPD, latents_ND.expand(batch, -1, -1)], dim=1)
        x_BND = run_blocks(self, self.ln_pre(x_BLD), keep=slice(-num_latents, None))
        return self._project(self.ln_post(x_BND))

    def _project(self, h_BND: Tensor) -> Tensor:
        weight_CD, bias_C = widened(self.conv_out.weight, h_BND).flatten(1), widened(self.conv_out.bias, h_BND)
        if not self.is_legacy:
            return rearrange(F.linear(h_BND, weight_CD, bias_C), "b n c -> b c 1 n")
        # The released two-stage models read the (N, D) buffer as (D, N) without transposing, so that a code mixes
        # channels of several latents (1d-tokenizer#16). Their weights depend on it.
        batch, num_latents, width = h_BND.shape
        h_BDN = h_BND.reshape(batch, width, num_latents)
        return rearrange(weight_CD @ h_BDN + bias_C[:, None], "b c n -> b c 1 n")


class TiTokDecoder(nn.Module):
    """Codes [B, C, 1, N] -> proxy logits [B, K, G, G] (legacy) or RGB [B, 3, H, W], not clamped."""

    def __init__(
        self, grid: int, patch_size: int, num_latent_tokens: int, size: tuple, token_size: int, is_legacy: bool,
        text_context_length: int | None = None, text_embed_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        width, depth, heads = size
        self.grid, self.patch_size, self.is_legacy = grid, patch_size, is_legacy
        self.gradient_checkpointing = False
        self.decoder_embed = Linear(token_size, width)
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(grid * grid + 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(num_latent_tokens, width))
        if text_embed_dim is not None:
            self.text_guidance_proj = Linear(text_embed_dim, width)
            self.text_guidance_positional_embedding = nn.Parameter(torch.empty(text_context_length, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(depth))
        self.ln_post = LayerNorm(width)
        if is_legacy:
            self.ffn = nn.Sequential(Conv2d(width, 2 * width, 1), nn.Tanh(), Conv2d(2 * width, NUM_PROXY_CODES, 1))
        else:
            self.ffn = nn.Sequential(Conv2d(width, 3 * patch_size**2, 1))
            self.conv_out = Conv2d(3, 3, 3, padding=1)

    def forward(self, z_BC1N: Tensor, text_BTE: Tensor | None = None, num_tokens_B: Tensor | None = None) -> Tensor:
        """`num_tokens_B` hides each row's codes from that count on: rows of unequal length in one batch, exactly."""
        batch, num_patches, num_codes = z_BC1N.shape[0], self.grid**2, z_BC1N.shape[-1]
        z_BC1N = to_compute(z_BC1N, self.mask_token)
        codes_BND = self.decoder_embed(rearrange(z_BC1N, "b c 1 n -> b n c"))
        codes_BND = codes_BND + self.latent_token_positional_embedding[:num_codes]
        masks_PD = self.mask_token[0].expand(num_patches, -1)
        queries_LD = torch.cat([self.class_embedding, masks_PD]) + self.positional_embedding
        parts = [queries_LD.expand(batch, -1, -1), codes_BND]
        if text_BTE is not None:
            parts.append(
                self.text_guidance_proj(to_compute(text_BTE, self.mask_token)) + self.text_guidance_positional_embedding
            )
        x_BLD = self.ln_pre(torch.cat(parts, dim=1))
        visible_BL = None
        if num_tokens_B is not None:
            position_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
            visible_BL = position_L < 1 + num_patches + num_tokens_B[:, None]
        x_BPD = self.ln_post(run_blocks(self, x_BLD, keep=slice(1, 1 + num_patches), visible_BL=visible_BL))
        out = self.ffn(rearrange(x_BPD, "b (h w) d -> b d h w", h=self.grid))
        if self.is_legacy:
            return out
        patch = self.patch_size
        return self.conv_out(rearrange(out, "b (y x c) h w -> b c (h y) (w x)", y=patch, x=patch))


def run_blocks(
    stack: TiTokEncoder | TiTokDecoder, x_BLD: Tensor, keep: slice, visible_BL: Tensor | None = None
) -> Tensor:
    """Run `stack.transformer`; the last block computes only the positions `keep`, which are all that is read of it."""
    for index, block in enumerate(stack.transformer):
        args = (x_BLD, keep if index == len(stack.transformer) - 1 else None, visible_BL)
        checkpointed = stack.gradient_checkpointing and torch.is_grad_enabled()
        x_BLD = stack._gradient_checkpointing_func(block, *args) if checkpointed else block(*args)
    return x_BLD


def to_compute(x: Tensor, weight: Tensor) -> Tensor:
    """`x` in the dtype to compute with weights stored as `weight` is."""
    return x.to(compute_dtype(weight.dtype, weight.device))


class TiTok(ImageTokenizer):
    """TiTok and TA-TiTok. Defaults are titok_l32's; `released_configs()` has every published variant.

    Args:
        quantizer: "vq" (ids) or "vae" (continuous latents, `encode_latents`).
        is_legacy: two-stage model with proxy codes; requires "vq".
        has_pixel_decoder: stage 2 of a two-stage model. Without it a legacy model ends in proxy logits.
        text_context_length, text_embed_dim: positions and width of the caption features of TA-TiTok; None without text.
        clustering: re-seed rarely used codes in training (TA-TiTok's recipe).
        pixel_*: sizes of the pixel decoder; `pixel_embed_dim` is the width of a proxy code.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        num_latent_tokens: int = 32,
        token_size: int = 12,
        codebook_size: int = 4096,
        use_l2_norm: bool = True,
        commitment_cost: float = 0.25,
        quantizer: str = "vq",
        is_legacy: bool = True,
        has_pixel_decoder: bool = True,
        encoder_width: int = 1024,
        encoder_depth: int = 24,
        encoder_heads: int = 16,
        decoder_width: int = 1024,
        decoder_depth: int = 24,
        decoder_heads: int = 16,
        text_context_length: int | None = None,
        text_embed_dim: int | None = None,
        clustering: bool = False,
        pixel_channels: int = 128,
        pixel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        pixel_res_blocks: int = 2,
        pixel_embed_dim: int = 256,
    ):
        super().__init__()
        if quantizer not in ("vq", "vae"):
            raise InvalidInput(f"quantizer must be 'vq' or 'vae', not {quantizer!r}")
        if (is_legacy and quantizer == "vae") or (has_pixel_decoder and not is_legacy):
            raise InvalidInput(
                f"quantizer={quantizer!r}, is_legacy={is_legacy}, has_pixel_decoder={has_pixel_decoder}: only a "
                "two-stage (is_legacy) model has a pixel decoder, and it is always 'vq'"
            )
        for patch_size in (encoder_patch_size, decoder_patch_size):
            if image_size % patch_size:
                raise InvalidInput(f"image_size {image_size} is not a multiple of the patch size {patch_size}")
        encoder_size = (encoder_width, encoder_depth, encoder_heads)
        decoder_size = (decoder_width, decoder_depth, decoder_heads)
        self.latent_tokens = nn.Parameter(torch.empty(num_latent_tokens, encoder_width))
        self.encoder = TiTokEncoder(
            image_size // encoder_patch_size, encoder_patch_size, num_latent_tokens, encoder_size,
            out_channels=token_size if quantizer == "vq" else 2 * token_size, is_legacy=is_legacy,
        )  # fmt: skip
        self.decoder = TiTokDecoder(
            image_size // decoder_patch_size, decoder_patch_size, num_latent_tokens, decoder_size, token_size,
            is_legacy, text_context_length, text_embed_dim,
        )  # fmt: skip
        init_titok_weights(self)
        if quantizer == "vq":
            self.quantize = VectorQuantizer(codebook_size, token_size, commitment_cost, use_l2_norm, clustering)
        if has_pixel_decoder:
            self.pixel_quantize = VectorQuantizer(NUM_PROXY_CODES, pixel_embed_dim)
            self.pixel_decoder = VQGANDecoder(
                pixel_channels, tuple(pixel_multipliers), pixel_res_blocks, pixel_embed_dim
            )

    @property
    def is_continuous(self) -> bool:
        return self.config.quantizer == "vae"

    @property
    def accepts_text(self) -> bool:
        return self.config.text_embed_dim is not None

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def max_tokens(self) -> int:
        return self.config.num_latent_tokens

    def forward(
        self, pixels_B3HW: Tensor, text_BTE: Tensor | None = None, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """Encode, quantize (or sample) and decode `pixels_B3HW` (fp32, [0, 1]): the training pass."""
        z_BC1N = self.encoder(pixels_B3HW, self.latent_tokens)
        if self.is_continuous:
            posterior = DiagonalGaussian(z_BC1N)
            return TokenizerOutput(self._decode(posterior.sample(generator), text_BTE), posterior=posterior)
        z_BC1N, vq = self.quantize(z_BC1N)
        return TokenizerOutput(self._decode(z_BC1N, text_BTE), ids_BL=vq.ids_BHW[:, 0], vq=vq)

    def encode_pixels(self, pixels_B3HW: Tensor, num_tokens: int | None = None) -> Tensor:
        """Ids int64 [B, N] of `pixels_B3HW` (fp32, [0, 1], side `image_size`); the first `num_tokens` if they vary."""
        self.check_num_tokens(num_tokens)
        if self.is_continuous:
            raise InvalidInput(f"{self.name} has continuous latents and no ids; use encode_latents or reconstruct")
        return self.quantize.nearest(self.encoder(self.check_pixels(pixels_B3HW), self.latent_tokens))[
            :, 0, :num_tokens
        ]

    def encode_latents(
        self, pixels_B3HW: Tensor, generator: torch.Generator | None = None, sample: bool = False
    ) -> Tensor:
        """Latents fp32 [B, C, 1, N] of a "vae" model: the posterior's mean, or one draw of it with `sample`."""
        if not self.is_continuous:
            raise InvalidInput(f"{self.name} has discrete tokens; use encode_pixels")
        posterior = DiagonalGaussian(self.encoder(self.check_pixels(pixels_B3HW), self.latent_tokens).float())
        return posterior.sample(generator) if sample else posterior.mode()

    def decode_ids(self, ids_BN: Tensor, lengths_B: Tensor | None = None, text_BTE: Tensor | None = None) -> Tensor:
        """Pixels fp32 [B, 3, H, W], nominally in [0, 1] but not clamped, of int64 `ids_BN`.

        `lengths_B` (variable-length models) gives each row's own length; what lies behind it is ignored, exactly as if
        it were not there. `text_BTE`: caption features of `encode_text`, for text-aware models.
        """
        self.check_ids(ids_BN, lengths_B)
        return self.decode_latents(rearrange(self.quantize.lookup(ids_BN), "b n c -> b c 1 n"), text_BTE, lengths_B)

    def decode_latents(self, z_BC1N: Tensor, text_BTE: Tensor | None = None, lengths_B: Tensor | None = None) -> Tensor:
        """Pixels fp32 [B, 3, H, W], not clamped, of codes or continuous latents [B, C, 1, N]."""
        if self.config.is_legacy and not self.config.has_pixel_decoder:
            raise InvalidInput(
                f"{self.name} is a stage-1 model and ends in proxy codes; use decode_proxy, or add_pixel_decoder(vqgan)"
            )
        return self._decode(z_BC1N, text_BTE, lengths_B).float()

    def decode_proxy(self, ids_BN: Tensor, vqgan: MaskGitVQGAN) -> Tensor:
        """Stage 1: pixels of the most likely proxy codes, fp32 [B, 3, H, W], through the frozen VQGAN."""
        self.check_ids(ids_BN)
        logits_BKGG = self.decoder(rearrange(self.quantize.lookup(ids_BN), "b n c -> b c 1 n"))
        return vqgan.decode_ids(logits_BKGG.argmax(dim=1).flatten(1))

    def add_pixel_decoder(self, vqgan: MaskGitVQGAN) -> None:
        """Make a stage-1 model a stage-2 model, whose pixel decoder starts as a copy of `vqgan`'s (section 3.3)."""
        if not self.config.is_legacy or self.config.has_pixel_decoder:
            raise InvalidInput(f"{self.name} is not a stage-1 model: only those gain a pixel decoder")
        self.pixel_quantize, self.pixel_decoder = deepcopy(vqgan.quantize), deepcopy(vqgan.decoder)
        self.register_to_config(
            has_pixel_decoder=True,
            pixel_channels=vqgan.config.hidden_channels,
            pixel_multipliers=tuple(vqgan.config.channel_multipliers),
            pixel_res_blocks=vqgan.config.num_res_blocks,
            pixel_embed_dim=vqgan.config.z_channels,
        )

    def freeze_encoder(self) -> None:
        """Stage 2 trains the decoders alone: the encoder, the latent tokens and the codebook keep their values."""
        for frozen in (self.encoder, self.quantize):
            frozen.requires_grad_(False).eval()
        self.latent_tokens.requires_grad_(False)

    def _decode(self, z_BC1N: Tensor, text_BTE: Tensor | None, lengths_B: Tensor | None = None) -> Tensor:
        if self.accepts_text and text_BTE is None:
            raise InvalidInput(f"{self.name} decodes with a caption; pass text= (for example 'A photo of a cat.')")
        if text_BTE is not None and not self.accepts_text:
            raise InvalidInput(f"{self.name} takes no text; only TA-TiTok models do")
        out = self.decoder(z_BC1N, text_BTE, lengths_B)
        if not self.config.has_pixel_decoder:
            return out
        # Stage 2: the expected proxy code of each patch, then the pixel decoder. No argmax, so it can be fine-tuned.
        weights_BGGK = rearrange(out, "b k h w -> b h w k").softmax(dim=-1)
        codes_BGGE = weights_BGGK @ self.pixel_quantize.embedding.weight.to(weights_BGGK.dtype)
        return self.pixel_decoder(rearrange(codes_BGGE, "b h w e -> b e h w"))

    def encode_text(self, texts: list[str]) -> Tensor:
        """Caption features fp32 [B, T, E] from CLIP's text tower (`text_encoder`: a hub id or local folder)."""
        if not hasattr(self, "_text_features"):
            self._text_features = ClipTextFeatures(self.text_encoder, self.config.text_context_length)
        return self._text_features(texts).to(self.device)


def init_titok_weights(model: nn.Module) -> None:
    """Truncated normal of std 0.02 for linear and conv weights, zero biases; tokens and positions ~ N(0, 1/D)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("class_embedding", "positional_embedding", "mask_token", "latent_tokens")):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def released_configs() -> dict[str, dict]:
    """Constructor arguments of every released TiTok and TA-TiTok, by our name (papers' model tables)."""

    def sizes(encoder: str, decoder: str, tokens: int) -> dict:
        config = {"num_latent_tokens": tokens}
        for side, size in (("encoder", encoder), ("decoder", decoder)):
            config.update(zip((f"{side}_width", f"{side}_depth", f"{side}_heads"), SIZES[size], strict=True))
        return config

    single_stage = {"is_legacy": False, "has_pixel_decoder": False, "use_l2_norm": False}
    vq = single_stage | {"codebook_size": 8192, "token_size": 64}
    vae = single_stage | {"quantizer": "vae", "token_size": 16}
    text = {"text_context_length": 77, "text_embed_dim": 768}
    return {
        "titok-l32": sizes("large", "large", 32),
        "titok-b64": sizes("base", "base", 64),
        "titok-s128": sizes("small", "small", 128),
        "titok-bl64-vq8k": sizes("base", "large", 64) | vq,
        "titok-bl128-vq8k": sizes("base", "large", 128) | vq,
        "titok-sl256-vq8k": sizes("small", "large", 256) | vq,
        "titok-ll32-vae-c16": sizes("large", "large", 32) | vae,
        "titok-bl64-vae-c16": sizes("base", "large", 64) | vae,
        "titok-bl128-vae-c16": sizes("base", "large", 128) | vae,
        "tatitok-bl32-vq": sizes("base", "large", 32) | vq | text,
        "tatitok-bl64-vq": sizes("base", "large", 64) | vq | text,
        "tatitok-bl128-vq": sizes("base", "large", 128) | vq | text,
        "tatitok-bl32-vae": sizes("base", "large", 32) | vae | text,
        "tatitok-bl64-vae": sizes("base", "large", 64) | vae | text,
        "tatitok-sl128-vae": sizes("small", "large", 128) | vae | text,
    }
