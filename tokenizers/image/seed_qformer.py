"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1), with SEED's causal queries.

A BERT encoder whose input are learned queries. They attend to each other, and in every second layer to a picture's
features. With `causal`, query i sees the queries up to i only, so that what comes out reads like a text, from left to
right (SEED-LLaMA, arXiv 2310.01218, section 3.1).

Two things are computed once that do not depend on what is asked: keys and values of a picture's features for all
layers, by one product; and what happens to the queries before they first look at a picture, for the whole batch.

Shape suffixes: B batch, Q queries, L positions, T features of a picture, D width, F feature width, H heads, K head
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...core.errors import InvalidInput
from ...core.sizes import MAX_DEPTH, check_sizes
from ...kernels.attention import attention
from ...nn.layers import LayerNorm, Linear, to_compute

EPS = 1e-12  # of BERT's norms


class SelfAttention(nn.Module):
    """LN(x + attention(x)): BERT normalises behind the sum."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.attn_dropout = num_heads, dropout
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.dropout, self.norm = nn.Dropout(dropout), LayerNorm(width, eps=EPS)

    def forward(self, x_BLD: Tensor, visible: Tensor | None) -> Tensor:
        """`visible`: bool, broadcast against [B, H, L, L]; None where all see all."""
        q_BHLK, k_BHLK, v_BHLK = rearrange(self.qkv(x_BLD), "b l (n h k) -> n b h l k", n=3, h=self.num_heads)
        dropout = self.attn_dropout if self.training else 0.0
        y_BHLK = attention(q_BHLK, k_BHLK, v_BHLK, visible, dropout)
        return self.norm(x_BLD + self.dropout(self.proj(rearrange(y_BHLK, "b h l k -> b l (h k)"))))


class CrossAttention(nn.Module):
    """LN(x + attention of x to given keys and values)."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.attn_dropout = num_heads, dropout
        self.q, self.proj = Linear(width, width), Linear(width, width)
        self.dropout, self.norm = nn.Dropout(dropout), LayerNorm(width, eps=EPS)

    def forward(self, x_BQD: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
        """`x_BQD` may have one row for all of the batch."""
        batch = k_BHTK.shape[0]
        q_BHQK = rearrange(self.q(x_BQD), "b q (h k) -> b h q k", h=self.num_heads).expand(batch, -1, -1, -1)
        y_BHQK = attention(q_BHQK, k_BHTK, v_BHTK, None, self.attn_dropout if self.training else 0.0)
        return self.norm(x_BQD + self.dropout(self.proj(rearrange(y_BHQK, "b h q k -> b q (h k)"))))


class FeedForward(nn.Module):
    """LN(x + MLP(x)) with exact GELU."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.dropout, self.norm = nn.Dropout(dropout), LayerNorm(width, eps=EPS)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.norm(x_BLD + self.dropout(self.fc2(F.gelu(self.fc1(x_BLD)))))


class Layer(nn.Module):
    """Self-attention, cross-attention where `has_cross`, and a feed-forward network."""

    def __init__(self, width: int, num_heads: int, hidden: int, has_cross: bool, dropout: float):
        super().__init__()
        self.attn = SelfAttention(width, num_heads, dropout)
        self.cross = CrossAttention(width, num_heads, dropout) if has_cross else None
        self.mlp = FeedForward(width, hidden, dropout)


class QFormer(nn.Module):
    """Queries [Q, D] and features of pictures [B, T, F] to [B, Q, D].

    Args:
        width, depth, num_heads, hidden: of the encoder and its feed-forward networks.
        feature_width: F. cross_every: layers 0, cross_every, 2 cross_every, ... look at the features.
        causal: query i sees queries 0 to i.
        dropout: in training, of BERT.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        feature_width: int,
        cross_every: int = 2,
        causal: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        check_sizes(width=width, num_heads=num_heads, hidden=hidden, feature_width=feature_width)
        check_sizes(MAX_DEPTH, depth=depth, cross_every=cross_every)
        if width % num_heads:
            raise InvalidInput(f"the Q-Former's width {width} is not divisible by {num_heads} heads")
        self.num_heads, self.causal = num_heads, causal
        self.norm, self.dropout = LayerNorm(width, eps=EPS), nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(width, num_heads, hidden, number % cross_every == 0, dropout) for number in range(depth)
        )
        self.num_cross = len(range(0, depth, cross_every))
        self.cross_kv = Linear(feature_width, 2 * self.num_cross * width)
        self.apply(init_bert)

    def forward(self, queries_QD: Tensor, features_BTF: Tensor) -> Tensor:
        """[B, Q, D] of a picture's features, the last layer's output."""
        batch, (num_queries, _) = len(features_BTF), queries_QD.shape
        features_BTF = to_compute(features_BTF, queries_QD)
        kv = rearrange(self.cross_kv(features_BTF), "b t (n h k) -> n b h t k", n=2 * self.num_cross, h=self.num_heads)
        visible = None
        if self.causal:
            visible = torch.ones(num_queries, num_queries, dtype=torch.bool, device=features_BTF.device).tril()
        x_BQD = self.norm(to_compute(queries_QD, queries_QD))[None]
        if self.training:  # dropout differs from row to row
            x_BQD = self.dropout(x_BQD.expand(batch, -1, -1))
        cross = 0
        for layer in self.layers:
            x_BQD = layer.attn(x_BQD, visible)
            if layer.cross is not None:
                x_BQD = layer.cross(x_BQD, kv[2 * cross], kv[2 * cross + 1])
                cross += 1
            x_BQD = layer.mlp(x_BQD)
        return x_BQD


def init_bert(module: nn.Module) -> None:
    """BERT's initialisation: N(0, 0.02) for products and tables, zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
