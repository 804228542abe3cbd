"""Two-stage TiTok written the plain way: what the fast path is measured against.

Sequence-first `nn.MultiheadAttention`, every position through every block, a padding copy before each convolution,
contiguous NCHW maps, and all distances to the codebook at once. Parameter names are those of `mediatok`'s TiTok, so
that both run with the same weights. The architecture is explained in `tokenizers/image/titok.py`.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x_LBD: Tensor) -> Tensor:
        h_LBD = self.ln_1(x_LBD)
        x_LBD = x_LBD + self.attn(h_LBD, h_LBD, h_LBD, need_weights=False)[0]
        return x_LBD + self.mlp(self.ln_2(x_LBD))


class Transformer(nn.Module):
    """What encoder and decoder have in common."""

    def __init__(self, num_patches: int, num_latents: int, width: int, depth: int, heads: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(num_patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(num_latents, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def run(self, patches_BPD: Tensor, latents_BND: Tensor) -> Tensor:
        class_B1D = self.class_embedding.expand(patches_BPD.shape[0], 1, -1)
        x_BLD = torch.cat([class_B1D, patches_BPD], dim=1) + self.positional_embedding
        x_BLD = torch.cat([x_BLD, latents_BND + self.latent_token_positional_embedding], dim=1)
        x_LBD = self.ln_pre(x_BLD).permute(1, 0, 2)
        for block in self.transformer:
            x_LBD = block(x_LBD)
        return x_LBD.permute(1, 0, 2)


class Encoder(Transformer):
    def __init__(self, patch_size: int, token_size: int, *sizes: int):
        super().__init__(*sizes)
        self.num_latents, width = sizes[1], sizes[2]
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(width, token_size, 1)

    def forward(self, pixels_B3HW: Tensor, latent_tokens_ND: Tensor) -> Tensor:
        patches_BPD = self.patch_embed(pixels_B3HW).flatten(2).permute(0, 2, 1)
        latents_BND = latent_tokens_ND.expand(pixels_B3HW.shape[0], -1, -1)
        h_BND = self.ln_post(self.run(patches_BPD, latents_BND)[:, -self.num_latents :])
        h_BDN1 = h_BND.reshape(h_BND.shape[0], h_BND.shape[2], self.num_latents, 1)
        return self.conv_out(h_BDN1).reshape(h_BND.shape[0], -1, 1, self.num_latents)


class Decoder(Transformer):
    def __init__(self, grid: int, token_size: int, num_proxy_codes: int, *sizes: int):
        super().__init__(*sizes)
        self.grid, width = grid, sizes[2]
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_embed = nn.Linear(token_size, width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, num_proxy_codes, 1))

    def forward(self, z_BC1N: Tensor) -> Tensor:
        codes_BND = self.decoder_embed(z_BC1N.flatten(2).permute(0, 2, 1))
        masks_BPD = self.mask_token.repeat(z_BC1N.shape[0], self.grid**2, 1)
        x_BPD = self.ln_post(self.run(masks_BPD, codes_BND)[:, 1 : 1 + self.grid**2])
        return self.ffn(x_BPD.permute(0, 2, 1).reshape(x_BPD.shape[0], -1, self.grid, self.grid))


class SameConv2d(nn.Conv2d):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        pad = (self.kernel_size[0] - 1) // 2
        return super().forward(F.pad(x_BCHW, [pad, pad, pad, pad]) if pad else x_BCHW)


class ResBlock(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, before, eps=1e-6), nn.GroupNorm(32, width, eps=1e-6)
        self.conv1, self.conv2 = SameConv2d(before, width, 3, bias=False), SameConv2d(width, width, 3, bias=False)
        self.nin_shortcut = SameConv2d(width, width, 1, bias=False) if before != width else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return h_BCHW + (x_BCHW if self.nin_shortcut is None else self.nin_shortcut(h_BCHW))


class UpLevel(nn.Module):
    def __init__(self, before: int, width: int, num_res_blocks: int, upsample: bool):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(before if i == 0 else width, width) for i in range(num_res_blocks))
        self.upsample_conv = SameConv2d(width, width, 3) if upsample else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return x_BCHW if self.upsample_conv is None else self.upsample_conv(F.interpolate(x_BCHW, scale_factor=2.0))


class PixelDecoder(nn.Module):
    def __init__(self, channels: int, multipliers: tuple[int, ...], num_res_blocks: int, z_channels: int):
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.conv_in = SameConv2d(z_channels, widths[-1], 3)
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(num_res_blocks))
        self.up = nn.ModuleList(
            UpLevel(before, width, num_res_blocks, upsample=level > 0)
            for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = SameConv2d(widths[0], 3, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for stage in (*self.mid, *reversed(self.up)):
            x_BCHW = stage(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class PlainTiTok(nn.Module):
    """`config`: that of a two-stage `mediatok` TiTok with a pixel decoder."""

    def __init__(self, config):
        super().__init__()
        grid, latents = config.image_size // config.encoder_patch_size, config.num_latent_tokens
        encoder = (grid**2, latents, config.encoder_width, config.encoder_depth, config.encoder_heads)
        decoder = (grid**2, latents, config.decoder_width, config.decoder_depth, config.decoder_heads)
        pixel = (config.pixel_channels, config.pixel_multipliers, config.pixel_res_blocks, config.pixel_embed_dim)
        self.latent_tokens = nn.Parameter(torch.empty(latents, config.encoder_width))
        self.encoder = Encoder(config.encoder_patch_size, config.token_size, *encoder)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.token_size)})
        self.decoder = Decoder(grid, config.token_size, 1024, *decoder)
        self.pixel_quantize = nn.ModuleDict({"embedding": nn.Embedding(1024, config.pixel_embed_dim)})
        self.pixel_decoder = PixelDecoder(*pixel)

    def codebook(self) -> Tensor:
        return F.normalize(self.quantize["embedding"].weight.float(), dim=-1)

    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        z_BC1N = self.encoder(pixels_B3HW, self.latent_tokens).float()
        z_NC = F.normalize(z_BC1N.permute(0, 2, 3, 1).reshape(-1, z_BC1N.shape[1]), dim=-1)
        codebook_KC = self.codebook()
        distance_NK = (z_NC**2).sum(dim=1, keepdim=True) + (codebook_KC**2).sum(dim=1)
        distance_NK = distance_NK - 2 * torch.einsum("nc,kc->nk", z_NC, codebook_KC)
        return distance_NK.argmin(dim=1).view(pixels_B3HW.shape[0], -1)

    def decode_ids(self, ids_BN: Tensor) -> Tensor:
        z_BC1N = self.codebook()[ids_BN].permute(0, 2, 1)[:, :, None].to(self.latent_tokens.dtype)
        weights_BKGG = self.decoder(z_BC1N).softmax(dim=1)
        codes_BEGG = torch.einsum("bkhw,ke->behw", weights_BKGG, self.pixel_quantize["embedding"].weight)
        return self.pixel_decoder(codes_BEGG.contiguous()).float()
