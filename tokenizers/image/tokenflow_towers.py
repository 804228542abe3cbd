"""The two transformers of TokenFlow's semantic branch: the tower that looks at the picture, CLIP's or SigLIP's, and the
decoder that gives back what a teacher sees, of BEiT's kind.

Both have learned positions of a square grid, and resample them when the picture's grid is another.

Shape suffixes: B batch, 3/H/W image, P patches in raster order, T positions (the class token, where there is one, then
the patches), D width, C code channels, G grid side.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.linear import linear
from ...nn.layers import Conv2d, LayerNorm, Linear, to_compute, widened
from ...nn.transformer import QuickGELU, ResidualAttentionBlock

TOWERS = ("clip", "siglip")
DECODER_EPS = 1e-6


def resampled(positions_TD: Tensor, grid: int) -> Tensor:
    """Positions of a square grid for one of `grid` x `grid`; a class token's row stays in front.

    The authors hand the factor (grid + 0.1) / side to the kernel, as DINO does, instead of the size. The result differs
    by as much as the positions themselves vary, and the released weights were trained with it.
    """
    side = isqrt(len(positions_TD))
    if side == grid:
        return positions_TD
    extra = len(positions_TD) - side**2
    square_1DGG = rearrange(positions_TD[extra:].float(), "(h w) d -> 1 d h w", h=side)
    factor = (grid + 0.1) / side
    square_1DGG = F.interpolate(square_1DGG, scale_factor=(factor, factor), mode="bicubic")
    patches_PD = rearrange(square_1DGG, "1 d h w -> (h w) d").to(positions_TD.dtype)
    return torch.cat([positions_TD[:extra], patches_PD])


class VisionTower(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] to patch features [B, P, D].

    kind "clip": OpenAI's ViT (Radford et al. 2021): class token, norms before and behind the blocks, quick GELU. The
    features are those behind the last norm.
    kind "siglip": Google's (Zhai et al. 2023): no class token, tanh GELU. The features come from within the network,
    as vision language models take them: `depth` counts the blocks that lead there, and no norm follows.

    Args:
        width, depth, num_heads, hidden: of the blocks. patch_size: in pixels. grid: side of the learned positions.
    """

    def __init__(self, kind: str, width: int, depth: int, num_heads: int, hidden: int, patch_size: int, grid: int):
        super().__init__()
        self.is_clip = kind == "clip"
        self.gradient_checkpointing = False
        self.patch_embed = Conv2d(3, width, patch_size, stride=patch_size, bias=not self.is_clip)
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + self.is_clip, width))
        eps, gelu = (1e-5, QuickGELU) if self.is_clip else (1e-6, lambda: nn.GELU(approximate="tanh"))
        if self.is_clip:
            self.class_embedding = nn.Parameter(torch.empty(width))
            self.ln_pre, self.ln_post = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(ResidualAttentionBlock(width, num_heads, eps, hidden, gelu()) for _ in range(depth))
        for name, parameter in self.named_parameters():
            if name.endswith("embedding"):
                nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        patches_BDGG = self.patch_embed(to_compute(pixels_B3HW, self.positional_embedding))
        x_BTD, grid = patches_BDGG.flatten(2).transpose(1, 2), patches_BDGG.shape[2]
        if self.is_clip:
            class_B1D = self.class_embedding.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
            x_BTD = torch.cat([class_B1D, x_BTD], dim=1)
        x_BTD = x_BTD + resampled(self.positional_embedding, grid).to(x_BTD.dtype)
        x_BTD = self.ln_pre(x_BTD) if self.is_clip else x_BTD
        for number, block in enumerate(self.blocks):
            # Nobody reads the class token behind the last block.
            keep = slice(1, None) if self.is_clip and number == len(self.blocks) - 1 else None
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x_BTD = self._gradient_checkpointing_func(block, x_BTD, keep) if checkpointed else block(x_BTD, keep)
        return self.ln_post(x_BTD) if self.is_clip else x_BTD


class BEiTAttention(nn.Module):
    """Self-attention whose keys have no bias."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = Linear(width, 3 * width, bias=False), Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        bias_3D = widened(torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]), x_BTD)
        qkv = linear(x_BTD, widened(self.qkv.weight, x_BTD), bias_3D)
        q, k, v = rearrange(qkv, "b t (n h d) -> n b h t d", n=3, h=self.num_heads)
        return self.proj(rearrange(attention(q, k, v), "b h t d -> b t (h d)"))


class BEiTBlock(nn.Module):
    """x = x + attention(LN(x)); x = x + MLP(LN(x)), with exact GELU."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, eps=DECODER_EPS), LayerNorm(width, eps=DECODER_EPS)
        self.attn = BEiTAttention(width, num_heads)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.fc2(F.gelu(self.fc1(self.norm2(x_BTD))))


class SemanticDecoder(nn.Module):
    """Codes [B, C, G, G] to features [B, P, D]: BEiT (Bao et al. 2021) on the code map, without its class token.

    Args:
        code_width: C. width, depth, num_heads: of the blocks. grid: side of the learned positions.
    """

    def __init__(self, code_width: int, width: int, depth: int, num_heads: int, grid: int):
        super().__init__()
        self.patch_embed = Conv2d(code_width, width, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(grid**2 + 1, width))
        self.blocks = nn.ModuleList(BEiTBlock(width, num_heads) for _ in range(depth))
        self.fc_norm = LayerNorm(width, eps=DECODER_EPS)
        init_linears(self)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                block.attn.proj.weight.div_((2 * number) ** 0.5)
                block.fc2.weight.div_((2 * number) ** 0.5)

    def forward(self, codes_BCGG: Tensor) -> Tensor:
        patches_BDGG = self.patch_embed(to_compute(codes_BCGG, self.pos_embed))
        x_BPD, grid = patches_BDGG.flatten(2).transpose(1, 2), patches_BDGG.shape[2]
        x_BTD = torch.cat([self.cls_token.to(x_BPD.dtype).expand(len(x_BPD), -1, -1), x_BPD], dim=1)
        x_BTD = x_BTD + resampled(self.pos_embed, grid).to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.fc_norm(x_BTD[:, 1:])


class TaskLayer(nn.Sequential):
    """Linear, tanh, linear."""

    def __init__(self, width: int, out_width: int):
        super().__init__(Linear(width, width), nn.Tanh(), Linear(width, out_width))
        init_linears(self)


def init_linears(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for the weights of linear layers, zero for their biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
