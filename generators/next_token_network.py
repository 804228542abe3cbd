"""The causal transformer of next-token generators: tokens in, what predicts the next ones out.

A sequence begins with a start vector. A class is added to it; a text is looked at by every token, through a second
attention in each block. Options of norms and biases are those in which the released FlexAR models may differ.

Shape suffixes: R rows (pictures, or pictures twice when guided: the unconditional rows last), L tokens of a call, N
tokens of a picture, M text positions, D width, H heads, K head width, E text width, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention, attention_of_one
from ..kernels.precision import compute_dtype
from ..nn.kv_cache import KeyValueCache
from ..nn.layers import LayerNorm, Linear, RMSNorm, to_compute

LAYER_EPS, RMS_EPS = 1e-6, 1e-6
HEAD_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes and kinds of layers; see `NextToken`."""

    width: int
    depth: int
    num_heads: int
    hidden: int
    norm: str
    qk_norm: bool
    qkv_bias: bool
    bias: bool
    dropout: float

    def make_norm(self, width: int) -> nn.Module:
        return RMSNorm(width, RMS_EPS) if self.norm == "rms" else LayerNorm(width, LAYER_EPS)


class SelfAttention(nn.Module):
    """Attention of each token to itself and to those before it."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.num_heads, self.attn_dropout = shape.num_heads, shape.dropout
        self.qkv = Linear(shape.width, 3 * shape.width, bias=shape.qkv_bias)
        self.proj = Linear(shape.width, shape.width, bias=shape.bias)
        head_width = shape.width // shape.num_heads
        self.q_norm, self.k_norm = (shape.make_norm(head_width) if shape.qk_norm else nn.Identity() for _ in range(2))
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_RLD: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        q_RHLK, k, v = rearrange(self.qkv(x_RLD), "r l (n h k) -> n r h l k", n=3, h=self.num_heads)
        q_RHLK, k = self.q_norm(q_RHLK).to(v.dtype), self.k_norm(k).to(v.dtype)
        seen = (k, v) if cache is None else cache.extend(layer, k, v)
        if q_RHLK.shape[2] == 1:
            y_RHLK = attention_of_one(q_RHLK, *seen)  # the newest token sees all
        else:  # a cache was empty before
            dropout = self.attn_dropout if self.training else 0.0
            y_RHLK = F.scaled_dot_product_attention(q_RHLK, k, v, dropout_p=dropout, is_causal=True)
        return self.dropout(self.proj(rearrange(y_RHLK, "r h l k -> r l (h k)")))


class TextAttention(nn.Module):
    """Attention of each token to a text, whose keys and values are computed once."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.num_heads, self.attn_dropout = shape.num_heads, shape.dropout
        self.q, self.kv = (Linear(shape.width, n * shape.width, bias=shape.qkv_bias) for n in (1, 2))
        self.proj = Linear(shape.width, shape.width, bias=shape.bias)
        head_width = shape.width // shape.num_heads
        self.q_norm, self.k_norm = (shape.make_norm(head_width) if shape.qk_norm else nn.Identity() for _ in range(2))
        self.dropout = nn.Dropout(shape.dropout)

    def keys_and_values(self, text_RMD: Tensor) -> tuple[Tensor, Tensor]:
        k_RHMK, v_RHMK = rearrange(self.kv(text_RMD), "r m (n h k) -> n r h m k", n=2, h=self.num_heads)
        return self.k_norm(k_RHMK).to(v_RHMK.dtype), v_RHMK

    def forward(self, x_RLD: Tensor, text: tuple[Tensor, Tensor], visible_R11M: Tensor | None) -> Tensor:
        q_RHLK = self.q_norm(rearrange(self.q(x_RLD), "r l (h k) -> r h l k", h=self.num_heads)).to(text[1].dtype)
        y_RHLK = attention(q_RHLK, *text, visible_R11M, self.attn_dropout if self.training else 0.0)
        return self.dropout(self.proj(rearrange(y_RHLK, "r h l k -> r l (h k)")))


class GatedMLP(nn.Module):
    """fc2(SiLU(gate) * value), gate and value from one product."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.fc1 = Linear(shape.width, 2 * shape.hidden, bias=shape.bias)
        self.fc2 = Linear(shape.hidden, shape.width, bias=shape.bias)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_RLD: Tensor) -> Tensor:
        gate, value = self.fc1(x_RLD).chunk(2, dim=-1)
        return self.dropout(self.fc2(F.silu(gate) * value))


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + text attention(norm(x)), if there is text; x = x + MLP(norm(x))."""

    def __init__(self, shape: Shape, reads_text: bool):
        super().__init__()
        self.norm_1, self.attn = shape.make_norm(shape.width), SelfAttention(shape)
        if reads_text:
            self.norm_text, self.text_attn = shape.make_norm(shape.width), TextAttention(shape)
        self.norm_2, self.mlp = shape.make_norm(shape.width), GatedMLP(shape)

    def forward(self, x_RLD, cache, layer: int, text=None, visible_R11M: Tensor | None = None) -> Tensor:
        x_RLD = x_RLD + self.attn(self.norm_1(x_RLD), cache, layer)
        if text is not None:
            x_RLD = x_RLD + self.text_attn(self.norm_text(x_RLD), text, visible_R11M)
        return x_RLD + self.mlp(self.norm_2(x_RLD))


@dataclass(frozen=True)
class Text:
    """A text as the blocks read it: keys and values [R, H, M, K] of each, and where there is text, [R, 1, 1, M]."""

    keys_and_values: list[tuple[Tensor, Tensor]]
    visible_R11M: Tensor | None


class NextTokenTransformer(nn.Module):
    """Embeddings, blocks and head. `num_classes` or `text_width` is 0."""

    def __init__(
        self, shape: Shape, vocab_size: int, num_tokens: int, num_classes: int, text_width: int, has_last_norm: bool,
        has_head_norm: bool,
    ):  # fmt: skip
        super().__init__()
        width = shape.width
        self.num_heads, self.gradient_checkpointing = shape.num_heads, False
        self.embedding = nn.Embedding(vocab_size, width)
        self.start = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(num_tokens, width))
        if num_classes:
            self.class_embed = nn.Embedding(num_classes + 1, width)  # the last row: no class
        if text_width:
            self.text_proj = nn.Sequential(
                Linear(text_width, text_width, bias=shape.bias), nn.GELU(approximate="tanh"),
                Linear(text_width, width, bias=shape.bias),
            )  # fmt: skip
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, text_width > 0) for _ in range(shape.depth))
        self.last_norm = shape.make_norm(width) if has_last_norm else nn.Identity()
        self.head_norm = LayerNorm(width, HEAD_EPS) if has_head_norm else nn.Identity()
        self.head = Linear(width, vocab_size, bias=shape.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1 or name == "start":  # the blocks' outputs are scaled by their number, as GPT-2's
                is_output = name.endswith(("proj.weight", "fc2.weight")) and "block" in name
                nn.init.normal_(parameter, std=0.02 / (2 * shape.depth) ** 0.5 if is_output else 0.02)

    def new_cache(self, rows: int, tokens: int) -> KeyValueCache:
        """An empty cache for `tokens` tokens in each of `rows` rows, of the dtype that is computed in."""
        weight = self.positions
        like = torch.empty(0, dtype=compute_dtype(weight.dtype, weight.device), device=weight.device)
        head_width = weight.shape[1] // self.num_heads
        return KeyValueCache(
            len(self.blocks), rows, self.num_heads, tokens, head_width, like,
            values_by_channel=like.device.type == "cpu",
        )  # fmt: skip

    def begin(self, rows: int, labels_R: Tensor | None = None) -> Tensor:
        """The start vector [R, 1, D] of each row, with its class."""
        x_D = self.start + self.positions[0]
        x_R1D = to_compute(x_D, self.start).expand(rows, 1, -1)
        return x_R1D if labels_R is None else x_R1D + self.class_embed(labels_R)[:, None].to(x_R1D.dtype)

    def embed(self, ids_RL: Tensor, first: int) -> Tensor:
        """What stands for the tokens [R, L] with the numbers `first`, `first` + 1, ... of their pictures: [R, L, D]."""
        places = slice(first + 1, first + 1 + ids_RL.shape[1])
        return to_compute(self.embedding(ids_RL) + self.positions[places], self.start)

    def read(self, states_RME: Tensor, is_text_RM: Tensor) -> Text:
        """What the blocks look at of encoded texts; `is_text_RM` is False where a text has ended."""
        longest = int(is_text_RM.sum(dim=1).max())
        ends_right = bool((is_text_RM[:, :longest].sum(dim=1) == is_text_RM.sum(dim=1)).all())
        if ends_right:  # what lies behind the longest text is seen by none
            states_RME, is_text_RM = states_RME[:, :longest], is_text_RM[:, :longest]
        text_RMD = self.text_proj(to_compute(states_RME, self.start))
        visible = None if bool(is_text_RM.all()) else is_text_RM[:, None, None]
        return Text([block.text_attn.keys_and_values(text_RMD) for block in self.blocks], visible)

    def forward(self, x_RLD: Tensor, text: Text | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Features [R, L, D] of tokens [R, L, D].

        cache: holds what came before them, and gets them, too. More than one token only into an empty one.

        Raises:
            ValueError: several tokens at once behind others.
        """
        if cache is not None and cache.length and x_RLD.shape[1] > 1:
            raise ValueError(f"{x_RLD.shape[1]} tokens at once behind {cache.length} others; give them one by one")
        x_RLD = self.dropout(x_RLD)
        for layer, block in enumerate(self.blocks):
            pair = (None, None) if text is None else (text.keys_and_values[layer], text.visible_R11M)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_RLD = self._gradient_checkpointing_func(block, x_RLD, cache, layer, *pair)
            else:
                x_RLD = block(x_RLD, cache, layer, *pair)
        if cache is not None:
            cache.length += x_RLD.shape[1]
        return self.last_norm(x_RLD)

    def logits(self, features: Tensor) -> Tensor:
        """Logits fp32 [..., V] of features [..., D]."""
        return self.head(self.head_norm(features)).float()
