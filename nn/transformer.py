"""The pre-norm transformer block that TiTok took over from CLIP.

Shape suffixes: B batch, L positions, K kept positions, W width, H heads, D head width.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.linear import linear
from .layers import LayerNorm, Linear, widened


class Attention(nn.Module):
    """Multi-head self-attention, batch first, with the packed q, k, v parameters of `torch.nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x_BLW: Tensor, keep: slice | None = None, visible_BL: Tensor | None = None) -> Tensor:
        """Attend from the positions `keep` to the positions where `visible_BL` is True (all, when None)."""
        split = "b l (n h d) -> n b h l d"
        weight, bias = widened(self.in_proj_weight, x_BLW), widened(self.in_proj_bias, x_BLW)
        if keep is None:
            qkv = linear(x_BLW, weight, bias)
            q_BHLD, k_BHLD, v_BHLD = rearrange(qkv, split, n=3, h=self.num_heads)
        else:
            width = x_BLW.shape[-1]
            q_weight, kv_weight = weight.split([width, 2 * width])
            q_bias, kv_bias = bias.split([width, 2 * width])
            (q_BHLD,) = rearrange(linear(x_BLW[:, keep], q_weight, q_bias), split, n=1, h=self.num_heads)
            k_BHLD, v_BHLD = rearrange(linear(x_BLW, kv_weight, kv_bias), split, n=2, h=self.num_heads)
        mask = None if visible_BL is None else visible_BL[:, None, None, :]
        y_BHLD = attention(q_BHLD, k_BHLD, v_BHLD, mask)
        return self.out_proj(rearrange(y_BHLD, "b h l d -> b l (h d)"))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """x = x + MHA(LN(x)); x = x + MLP(LN(x)).

    eps: of the norms. hidden: of the MLP, four times the width unless given. gelu: its activation, exact GELU unless
    given.
    """

    def __init__(
        self, width: int, num_heads: int, eps: float = 1e-5, hidden: int | None = None, gelu: nn.Module | None = None
    ):
        super().__init__()
        hidden, gelu = hidden or 4 * width, gelu or nn.GELU()
        self.ln_1 = LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads)
        self.ln_2 = LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(OrderedDict(c_fc=Linear(width, hidden), gelu=gelu, c_proj=Linear(hidden, width)))

    def forward(self, x_BLW: Tensor, keep: slice | None = None, visible_BL: Tensor | None = None) -> Tensor:
        """Return all positions, or only those in `keep`: the last block need not compute what nobody reads."""
        residual_BKW = x_BLW if keep is None else x_BLW[:, keep]
        x_BKW = residual_BKW + self.attn(self.ln_1(x_BLW), keep, visible_BL)
        return x_BKW + self.mlp(self.ln_2(x_BKW))
