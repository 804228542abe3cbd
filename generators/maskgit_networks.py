"""The two bidirectional transformers of MaskGIT over TiTok tokens: the ViT of BERT's design, and the U-ViT.

Both read a class token and N image tokens and return one hidden vector for each image token that is asked for.

Shape suffixes: B batch, L = N + 1 positions (class, tokens), K asked-for tokens, W width, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.linear import PackedLinear, linear
from ..kernels.precision import compute_dtype
from ..nn.layers import LayerNorm, Linear, widened


class Attention(nn.Module):
    """Self-attention with packed q, k, v."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(self, x_BLW: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Attend from all positions, or only from `positions_BK`, to all positions."""
        split = "b l (n h d) -> n b h l d"
        if positions_BK is None or isinstance(self.qkv, PackedLinear):
            q_BHLD, k_BHLD, v_BHLD = rearrange(self.qkv(x_BLW), split, n=3, h=self.num_heads)
            if positions_BK is not None:  # packed weights cannot be cut
                places = positions_BK[:, None, :, None].expand(-1, self.num_heads, -1, q_BHLD.shape[-1])
                q_BHLD = q_BHLD.gather(2, places)
        else:
            weight, bias = widened(self.qkv.weight, x_BLW), widened(self.qkv.bias, x_BLW)
            width = x_BLW.shape[-1]
            q_bias, kv_bias = (None, None) if bias is None else bias.split([width, 2 * width])
            q_BKW = linear(take(x_BLW, positions_BK), weight[:width], q_bias)
            (q_BHLD,) = rearrange(q_BKW, split, n=1, h=self.num_heads)
            k_BHLD, v_BHLD = rearrange(linear(x_BLW, weight[width:], kv_bias), split, n=2, h=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        y_BHLD = attention(q_BHLD, k_BHLD, v_BHLD, dropout=dropout)
        return self.proj(rearrange(y_BHLD, "b h l d -> b l (h d)"))


class PostNormBlock(nn.Module):
    """BERT's layer: x = LN(x + attention(x)); x = LN(x + MLP(x)), with exact GELU."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, dropout: float, attn_drop: float):
        super().__init__()
        self.attn = Attention(width, num_heads, qkv_bias=True, dropout=attn_drop)
        self.norm1 = LayerNorm(width, eps=1e-12)
        self.fc1, self.fc2 = Linear(width, mlp_width), Linear(mlp_width, width)
        self.norm2 = LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLW: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        residual_BKW = x_BLW if positions_BK is None else take(x_BLW, positions_BK)
        x_BKW = self.norm1(residual_BKW + self.dropout(self.attn(x_BLW, positions_BK)))
        return self.norm2(x_BKW + self.dropout(self.fc2(F.gelu(self.fc1(x_BKW)))))


class ViT(nn.Module):
    """ "ImageBert" of TiTok: embeddings, LayerNorm, post-norm layers; there is no final norm."""

    def __init__(
        self, num_ids: int, length: int, width: int, depth: int, num_heads: int, mlp_width: int,
        dropout: float, attn_drop: float,
    ):  # fmt: skip
        super().__init__()
        self.embeddings = nn.Embedding(num_ids, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, width))
        self.norm = LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(width, num_heads, mlp_width, dropout, attn_drop) for _ in range(depth)
        )
        nn.init.normal_(self.pos_embed, std=0.02)
        init_weights(self, nn.init.normal_)

    def forward(self, ids_BL: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Hidden vectors [B, K, W] at `positions_BK` (0 is the class token), or [B, L, W] at all positions."""
        x_BLW = self.dropout(self.norm(embed(self.embeddings, self.pos_embed, ids_BL)))
        for block in self.blocks[:-1]:
            x_BLW = block(x_BLW)
        return self.blocks[-1](x_BLW, positions_BK)


class UViTBlock(nn.Module):
    """Pre-norm block; those of the second half first mix in what the first half's block of the same level gave."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, has_skip: bool = False):
        super().__init__()
        self.skip_linear = Linear(2 * width, width) if has_skip else None
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, num_heads, qkv_bias=False)
        self.norm2 = LayerNorm(width)
        self.fc1, self.fc2 = Linear(width, mlp_width), Linear(mlp_width, width)

    def forward(self, x_BLW: Tensor, skip_BLW: Tensor | None = None, positions_BK: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x_BLW = self.skip_linear(torch.cat([x_BLW, skip_BLW], dim=-1))
        residual_BKW = x_BLW if positions_BK is None else take(x_BLW, positions_BK)
        x_BKW = residual_BKW + self.attn(self.norm1(x_BLW), positions_BK)
        return x_BKW + self.fc2(F.gelu(self.fc1(self.norm2(x_BKW))))


class UViT(nn.Module):
    """U-ViT (Bao et al. 2023) without patches: `depth` // 2 blocks in, one in the middle, as many out, with skips."""

    def __init__(self, num_ids: int, length: int, width: int, depth: int, num_heads: int, mlp_width: int):
        super().__init__()
        sizes = (width, num_heads, mlp_width)
        self.embeddings = nn.Embedding(num_ids, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, width))
        self.in_blocks = nn.ModuleList(UViTBlock(*sizes) for _ in range(depth // 2))
        self.mid_block = UViTBlock(*sizes)
        self.out_blocks = nn.ModuleList(UViTBlock(*sizes, has_skip=True) for _ in range(depth // 2))
        self.norm = LayerNorm(width)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_weights(self, nn.init.trunc_normal_)

    def forward(self, ids_BL: Tensor, positions_BK: Tensor | None = None) -> Tensor:
        """Hidden vectors [B, K, W] at `positions_BK` (0 is the class token), or [B, L, W] at all positions."""
        x_BLW = embed(self.embeddings, self.pos_embed, ids_BL)
        skips = []
        for block in self.in_blocks:
            x_BLW = block(x_BLW)
            skips.append(x_BLW)
        last = len(self.out_blocks) - 1
        x_BLW = self.mid_block(x_BLW, None, positions_BK if last < 0 else None)
        for level, block in enumerate(self.out_blocks):
            x_BLW = block(x_BLW, skips.pop(), positions_BK if level == last else None)
        return self.norm(x_BLW)


def take(x_BLW: Tensor, positions_BK: Tensor) -> Tensor:
    """The vectors [B, K, W] at `positions_BK`."""
    return x_BLW.gather(1, positions_BK[:, :, None].expand(-1, -1, x_BLW.shape[-1]))


def embed(embeddings: nn.Embedding, pos_embed: Tensor, ids_BL: Tensor) -> Tensor:
    """Sum of id and position embeddings, in the precision to compute in."""
    dtype = compute_dtype(pos_embed.dtype, pos_embed.device)
    return embeddings(ids_BL).to(dtype) + pos_embed[:, : ids_BL.shape[1]].to(dtype)


def init_weights(network: nn.Module, draw) -> None:
    """Linear and embedding weights of std 0.02 by `draw` (a torch.nn.init function), biases 0."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            draw(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
