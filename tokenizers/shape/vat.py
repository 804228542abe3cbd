"""VAT: a 3D shape as tokens over scales (arXiv 2412.02202: "3D representation in 512-Byte").

Points of a surface are reduced to features by one cross-attention from some that lie far apart. A transformer reads the
features and learned latent tokens, and only the latents are kept: the mean and variance of a Gaussian, which is
quantized residually over scales of growing length. A second transformer reads the codes and learned triplane tokens,
keeps the planes, and convolutions enlarge them to a field that says what is inside.

The authors have published neither code nor weights. What their figures do not show is chosen here after public code of
the same family, as the comments say.

Shape suffixes: B shapes, N points, M features, L latents, C code channels, W width, T triplane tokens, P points asked
for, S tokens of all scales.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from ...core.base import TokenizerOutput
from ...core.errors import InvalidInput
from ...core.shape_tokenizer import ShapeTokenizer
from ...core.sizes import MAX_DEPTH, check_sizes
from ...core.surfaces import farthest_points
from ...kernels.attention import attention
from ...kernels.precision import compute_dtype
from ...nn.gaussian import DiagonalGaussian
from ...nn.layers import LayerNorm, Linear
from ...nn.multiscale_vq import MultiScaleQuantizer
from ...nn.point_embedding import PointEmbedding
from ...nn.transformer import ResidualAttentionBlock
from .triplane import NUM_PLANES, OccupancyHead, PlaneDecoder, TriplaneField

MAX_PLANE_SIDE = 1024  # of enlarged planes
FIRST_LOGVAR = -6.0  # of an untrained encoder: little noise, so that training starts with what the points say


class Reduction(nn.Module):
    """N embedded points to M features: some of the points ask all of them (Perceiver, Jaegle et al. 2021)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.ln_query, self.ln_points, self.ln_mlp = (LayerNorm(width) for _ in range(3))
        self.query, self.out = Linear(width, width), Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(self, asking_BMW: Tensor, points_BNW: Tensor) -> Tensor:
        split = "b n (k h d) -> k b h n d"
        (q_BHMD,) = rearrange(self.query(self.ln_query(asking_BMW)), split, k=1, h=self.num_heads)
        k_BHND, v_BHND = rearrange(self.key_value(self.ln_points(points_BNW)), split, k=2, h=self.num_heads)
        y_BMW = rearrange(attention(q_BHMD, k_BHND, v_BHND), "b h m d -> b m (h d)")
        x_BMW = asking_BMW + self.out(y_BMW)
        return x_BMW + self.mlp(self.ln_mlp(x_BMW))


class Transformer(nn.Module):
    """Self-attention blocks, of whose last only the positions `keep` are computed, and a norm."""

    def __init__(self, width: int, depth: int, num_heads: int):
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(ResidualAttentionBlock(width, num_heads) for _ in range(depth))
        self.ln_out = LayerNorm(width)

    def forward(self, x_BLW: Tensor, keep: slice) -> Tensor:
        for index, block in enumerate(self.blocks):
            args = (x_BLW, keep if index == len(self.blocks) - 1 else None)
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x_BLW = self._gradient_checkpointing_func(block, *args) if checkpointed else block(*args)
        return self.ln_out(x_BLW)


class Encoder(nn.Module):
    """Points and normals [B, N, 3] to the parameters [B, 2C, 1, L] of a Gaussian for each latent."""

    def __init__(self, width: int, depth: int, num_heads: int, num_features: int, num_latents: int, code_width: int):
        super().__init__()
        self.num_features = num_features
        self.embed = PointEmbedding(width)
        self.reduce = Reduction(width, num_heads)
        self.latent_tokens = nn.Parameter(torch.empty(num_latents, width))
        self.transformer = Transformer(width, depth, num_heads)
        self.proj = Linear(width, 2 * code_width)

    def forward(self, points_BN3: Tensor, normals_BN3: Tensor) -> Tensor:
        points_BNW = self.embed(points_BN3, normals_BN3).to(compute_dtype_of(self.latent_tokens))
        chosen_BM = farthest_points(points_BN3, self.num_features)
        asking_BMW = points_BNW.gather(1, chosen_BM[..., None].expand(-1, -1, points_BNW.shape[2]))
        features_BMW = self.reduce(asking_BMW, points_BNW)
        latents_BLW = self.latent_tokens.to(features_BMW.dtype).expand(len(features_BMW), -1, -1)
        x_BLW = self.transformer(torch.cat([features_BMW, latents_BLW], dim=1), slice(self.num_features, None))
        return rearrange(self.proj(x_BLW).float(), "b l c -> b c 1 l")


class Decoder(nn.Module):
    """Sums of codes [B, L, C] to planes [B, 3, F, H, H]."""

    def __init__(
        self, width: int, depth: int, num_heads: int, num_latents: int, code_width: int, plane_size: int,
        plane_channels: tuple[int, ...],
    ):  # fmt: skip
        super().__init__()
        self.embed = Linear(code_width, width)
        self.latent_places = nn.Parameter(torch.empty(num_latents, width))
        self.triplane_tokens = nn.Parameter(torch.empty(NUM_PLANES * plane_size**2, width))
        self.transformer = Transformer(width, depth, num_heads)
        self.planes = PlaneDecoder(width, plane_channels)

    def forward(self, codes_BLC: Tensor) -> Tensor:
        dtype = compute_dtype_of(self.triplane_tokens)
        codes_BLW = self.embed(codes_BLC.to(dtype)) + self.latent_places.to(dtype)
        planes_BTW = self.triplane_tokens.to(dtype).expand(len(codes_BLW), -1, -1)
        x_BTW = self.transformer(torch.cat([planes_BTW, codes_BLW], dim=1), slice(planes_BTW.shape[1]))
        return self.planes(x_BTW)


def compute_dtype_of(weight: Tensor) -> torch.dtype:
    """The dtype to compute in with weights stored as `weight` is."""
    return compute_dtype(weight.dtype, weight.device)


class VAT(ShapeTokenizer):
    """The variational tokenizer. The defaults are the paper's middle size, as far as its figures tell.

    Args:
        num_points: points of a surface that `encode` draws; the tensor level reads any number from `num_features` on.
        num_features: points that stay after the reduction.
        width, num_heads: of all transformers. encoder_depth, decoder_depth: their blocks.
        scales: tokens of each scale, growing; the last is the number of latents.
        codebook_size, code_width: codes, and channels of a code and of a latent.
        resample: "interp" or "query"; lookup_free: signs as codes: see `MultiScaleQuantizer`.
        plane_size: side of the planes as the decoder's transformer has them.
        plane_channels: of the convolutions at that side, and at each doubling of it.
        head_width: of the network that reads the planes.

    Raises:
        InvalidInput: sizes that do not go together.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize", "head"]  # a surface is where the head's logits are 0
    fingerprint_weights = ("quantize.",)  # the codebook, and how scales are resampled

    @register_to_config
    def __init__(
        self,
        num_points: int = 8192,
        num_features: int = 2048,
        width: int = 768,
        num_heads: int = 12,
        encoder_depth: int = 12,
        decoder_depth: int = 12,
        scales: tuple[int, ...] = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256, 576),
        codebook_size: int = 16384,
        code_width: int = 32,
        resample: str = "interp",
        lookup_free: bool = False,
        plane_size: int = 32,
        plane_channels: tuple[int, ...] = (256, 128, 64, 32),
        head_width: int = 64,
    ):
        super().__init__()
        check_sizes(
            num_points=num_points, num_features=num_features, width=width, num_heads=num_heads,
            codebook_size=codebook_size, code_width=code_width, plane_size=plane_size, head_width=head_width,
            **{f"scales[{k}]": tokens for k, tokens in enumerate(scales)},
            **{f"plane_channels[{k}]": channels for k, channels in enumerate(plane_channels)},
        )  # fmt: skip
        check_sizes(MAX_DEPTH, encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        if width % num_heads:
            raise InvalidInput(f"width {width} is not a multiple of num_heads {num_heads}")
        if num_points < num_features:
            raise InvalidInput(f"num_points {num_points} cannot be reduced to num_features {num_features}")
        if not plane_channels or plane_size * 2 ** (len(plane_channels) - 1) > MAX_PLANE_SIDE:
            raise InvalidInput(
                f"plane_channels {tuple(plane_channels)} must be one for {plane_size} pixels and one for each doubling "
                f"up to {MAX_PLANE_SIDE}"
            )
        self.quantize = MultiScaleQuantizer(codebook_size, code_width, scales, resample, lookup_free)
        self.encoder = Encoder(width, encoder_depth, num_heads, num_features, scales[-1], code_width)
        self.decoder = Decoder(
            width, decoder_depth, num_heads, scales[-1], code_width, plane_size, tuple(plane_channels)
        )
        self.head = OccupancyHead(plane_channels[-1], head_width)
        self._initialise()

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def code_width(self) -> int:
        """Channels of a code, and of what a next-scale generator reads."""
        return self.config.code_width

    def forward(
        self, points_BN3: Tensor, normals_BN3: Tensor, queries_BP3: Tensor, quantized: bool = True,
        num_scales: int | None = None, generator: torch.Generator | None = None,
    ) -> TokenizerOutput:  # fmt: skip
        """The training pass: encode, sample, quantize, decode; `decoded` is the logits fp32 [B, P] of the queries.

        points_BN3, normals_BN3: as `encode_points` reads them. queries_BP3: points of the box, fp32.
        quantized: False decodes the sampled latents themselves (stage 1a); there are no ids and losses of codes then.
        num_scales: decode the sum of the first scales alone.
        generator: of the noise.

        `posterior.kl()` is in nats [B, L], summed over a latent's channels.
        """
        posterior = self.posterior(points_BN3, normals_BN3)
        latent_BLC = rearrange(posterior.sample(generator), "b c 1 l -> b l c")
        if not quantized:
            return TokenizerOutput(self.decode_latents(latent_BLC).occupancy(queries_BP3), posterior=posterior)
        sum_BLC, vq = self.quantize(latent_BLC, num_scales)
        logits_BP = self.decode_latents(sum_BLC).occupancy(queries_BP3)
        return TokenizerOutput(logits_BP, vq.ids_BS, vq, posterior)

    def posterior(self, points_BN3: Tensor, normals_BN3: Tensor) -> DiagonalGaussian:
        """The Gaussian of the latents, its mean and variance [B, C, 1, L]."""
        self.check_points(points_BN3, normals_BN3)
        if points_BN3.shape[1] < self.config.num_features:
            raise InvalidInput(
                f"{self.name} reduces points to {self.config.num_features} features and got {points_BN3.shape[1]}"
            )
        return DiagonalGaussian(self.encoder(points_BN3, normals_BN3))

    def encode_points(self, points_BN3: Tensor, normals_BN3: Tensor) -> Tensor:
        """Ids int64 [B, S] of the means; see `ShapeTokenizer`."""
        return self.quantize.encode(self.encode_latents(points_BN3, normals_BN3))

    def encode_latents(self, points_BN3: Tensor, normals_BN3: Tensor) -> Tensor:
        """The means fp32 [B, L, C], before quantization."""
        return rearrange(self.posterior(points_BN3, normals_BN3).mode(), "b c 1 l -> b l c")

    def decode_ids(self, ids_BL: Tensor) -> TriplaneField:
        """The field of ids int64 [B, L]; L may end with any scale."""
        self.check_ids(ids_BL)
        return self.decode_latents(self.quantize.sum_of(ids_BL))

    def decode_latents(self, latent_BLC: Tensor) -> TriplaneField:
        """The field of latents or sums of codes [B, L, C]."""
        return TriplaneField(self.decoder(latent_BLC), self.head)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Linear layers and learned tokens as in the image tokenizers; convolutions and the head as torch has them."""
        for module in (*self.encoder.modules(), *self.decoder.transformer.modules(), self.decoder.embed):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for tokens in (self.encoder.latent_tokens, self.decoder.latent_places, self.decoder.triplane_tokens):
            nn.init.normal_(tokens, std=tokens.shape[1] ** -0.5)
        for layer in (self.encoder.embed.proj, self.decoder.embed, self.encoder.proj):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # what they read and give has unit size
        self.encoder.proj.bias[self.config.code_width :] = FIRST_LOGVAR


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the paper's sizes, by our name: the number of tokens of all scales."""
    scales = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256, 576, 1024)
    return {f"vat-{sum(scales[:count])}": {"scales": scales[:count]} for count in (10, 11, 12)}
