"""The language model of TokenFlow's text-to-image generator: a LLaMA that reads and predicts whole scales of a picture.

Differences from LLaMA (Touvron et al. 2023): norms stand on what a branch adds, not before it; queries and keys are
normed before they are turned by their places; a scale's rows are made of the codes so far, not of embedded ids, and see
each other.

A sequence is a prefix of P text tokens, padded on the left, then the rows of the second scale and of all later ones,
and in training what closes the picture. The last row of the prefix predicts the first scale, and a row of a later scale
the token at its own place.

Shape suffixes: R rows of a batch, P prefix tokens, L rows of a sequence in a call, T rows of a sequence so far, S
tokens of all scales, k tokens of one scale, C code channels, W width, H heads, D head width, V ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.linear import linear
from ..kernels.multiscale import split_scales
from ..kernels.precision import compute_dtype
from ..nn.kv_cache import KeyValueCache
from ..nn.layers import Linear, RMSNorm, widened

QK_EPS = 1e-6


def turned(x_RHLD: Tensor, turn_2LD: Tensor) -> Tensor:
    """Channels i and i + D/2 as a pair, turned by the angle whose cosine and sine are given, [2, L, D/2]."""
    cos, sin = turn_2LD.to(x_RHLD.dtype)
    first, second = x_RHLD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention, but where a mask says otherwise; also over what is in the cache.

    Several heads may share their keys and values, `num_kv_heads` below `num_heads`.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.head_width = width // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.qkv = Linear(width, (num_heads + 2 * num_kv_heads) * self.head_width, bias=False)
        self.o_proj = Linear(width, width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_width, QK_EPS), RMSNorm(self.head_width, QK_EPS)

    def forward(self, x_RLW, turn_2LD, visible: Tensor | None, blind: Tensor | None, cache, layer: int) -> Tensor:
        """See `LlamaOfScales.forward`; `blind` is [R, 1, L, 1]."""
        heads = rearrange(self.qkv(x_RLW), "r l (h d) -> r h l d", d=self.head_width)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = turned(self.q_norm(q), turn_2LD), turned(self.k_norm(k), turn_2LD)
        if blind is not None:
            q = q.masked_fill(blind, 0.0)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if self.num_kv_heads < self.num_heads:
            k, v = (part.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for part in (k, v))
        return self.o_proj(rearrange(attention(q, k, v, visible), "r h l d -> r l (h d)"))


class Block(nn.Module):
    """x = x + RMS(attention(x)); x = x + RMS(MLP(x)), with a gated MLP."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, hidden: int, eps: float):
        super().__init__()
        self.attn = Attention(width, num_heads, num_kv_heads)
        self.attn_norm, self.mlp_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.gate_up, self.down_proj = Linear(width, 2 * hidden, bias=False), Linear(hidden, width, bias=False)

    def forward(self, x_RLW, turn_2LD, visible=None, blind=None, cache=None, layer: int = 0) -> Tensor:
        x_RLW = x_RLW + self.attn_norm(self.attn(x_RLW, turn_2LD, visible, blind, cache, layer))
        gate, up = self.gate_up(x_RLW).chunk(2, dim=-1)
        return x_RLW + self.mlp_norm(self.down_proj(F.silu(gate) * up))


class LlamaOfScales(nn.Module):
    """Rows in, hidden states out; `logits` makes logits of them.

    Args:
        scales: tokens of each scale, the first of which is 1. vocab_size: V, of texts and pictures together.
        first_code: the id of code 0; those of the other codes follow. code_width: C.
        width, depth, num_heads, num_kv_heads, hidden: of the blocks. eps: of their norms.
        rope_theta: of the turns of queries and keys.
    """

    def __init__(
        self, scales: tuple[int, ...], vocab_size: int, first_code: int, num_codes: int, code_width: int, width: int,
        depth: int, num_heads: int, num_kv_heads: int, hidden: int, eps: float, rope_theta: float,
    ):  # fmt: skip
        super().__init__()
        self.gradient_checkpointing = False
        self.slices, self.rope_theta = tuple(split_scales(scales)), rope_theta
        self.codes = slice(first_code, first_code + num_codes)
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.projector = nn.Sequential(Linear(code_width, width), nn.GELU(), Linear(width, width))
        self.level_embed = nn.Embedding(len(scales) + 1, width)
        self.place_embed = nn.Parameter(torch.empty(sum(scales), width))
        self.blocks = nn.ModuleList(Block(width, num_heads, num_kv_heads, hidden, eps) for _ in range(depth))
        self.norm = RMSNorm(width, eps)
        self.lm_head = Linear(width, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    # Rows. Level 0 is that of texts, and level i + 1 that of scale i; level 1 stays unused, as the first scale has no
    # rows of its own.

    def text_rows(self, ids_RL: Tensor) -> Tensor:
        """Rows [R, L, W] of text ids int64."""
        return (self.embed_tokens(ids_RL) + self.level_embed.weight[0]).to(self.dtype)

    def prefix_rows(self, ids_RP: Tensor) -> Tensor:
        """Rows [R, P, W] of a prefix: its last one predicts the first scale."""
        rows_RPW = self.text_rows(ids_RP)
        place_W = self.place_embed[:1].to(rows_RPW.dtype)
        return torch.cat([rows_RPW[:, :-1], rows_RPW[:, -1:] + place_W], dim=1)

    def scale_rows(self, view_RkC: Tensor, scale: int) -> Tensor:
        """Rows [R, k, W] of a later scale, of what it reads, fp32 [R, k, C]."""
        place_kW = self.place_embed[self.slices[scale]] + self.level_embed.weight[scale + 1]
        return self.projector(view_RkC.to(self.dtype)) + place_kW.to(self.dtype)

    def closing_rows(self, ids_RL: Tensor) -> Tensor:
        """Rows [R, L + 1, W] behind a picture: one of nothing, which predicts the first of the ids, and theirs."""
        nothing_R1W = self.level_embed.weight[0].to(self.dtype).expand(len(ids_RL), 1, -1)
        return torch.cat([nothing_R1W, self.text_rows(ids_RL)], dim=1)

    def visible(self, is_text_RP: Tensor, num_after: int = 0) -> Tensor:
        """Bool [R, L, L] on the device of `is_text_RP`: True where a row of a whole sequence sees another.

        is_text_RP: False where the prefix is padded. num_after: rows behind the picture.
        """
        prefix = is_text_RP.shape[1]
        numbers = [-1] * (prefix - 1)
        for scale, places in enumerate(self.slices):
            numbers += [scale] * (places.stop - places.start)
        number_L = torch.tensor(numbers + [-1] * num_after, device=is_text_RP.device)
        is_image_L = number_L >= 0
        sees_LL = torch.ones(len(number_L), len(number_L), dtype=torch.bool, device=number_L.device).tril()
        sees_LL |= is_image_L[:, None] & is_image_L & (number_L[:, None] >= number_L)
        is_there_RL = F.pad(is_text_RP, (0, len(number_L) - prefix), value=True)
        return sees_LL & is_there_RL[:, None]

    # Running.

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.place_embed.dtype, self.place_embed.device)

    def new_cache(self, rows: int, prefix: int) -> KeyValueCache:
        """An empty cache for `prefix` tokens and all scales."""
        attn = self.blocks[0].attn
        like = torch.empty(0, dtype=self.dtype, device=self.place_embed.device)
        tokens = prefix - 1 + len(self.place_embed)
        return KeyValueCache(len(self.blocks), rows, attn.num_kv_heads, tokens, attn.head_width, like)

    def forward(
        self, x_RLW: Tensor, first: int, visible_RLT: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Hidden states [R, L, W] behind the last norm.

        first: place of the first row; the others follow.
        visible_RLT: bool, True where a row sees another; None where all see all. A row that sees nothing (padding)
            looks at all with the same weight, as in the authors' code.
        cache: what came before, and gets these rows, too.
        """
        place_L = torch.arange(first, first + x_RLW.shape[1], device=x_RLW.device)
        turn_2LD = self._turns(place_L)
        visible = blind = None
        if visible_RLT is not None:
            blind = ~visible_RLT.any(dim=-1, keepdim=True)
            visible, blind = (visible_RLT | blind)[:, None], blind[:, None]
        for layer, block in enumerate(self.blocks):
            args = (x_RLW, turn_2LD, visible, blind, cache, layer)
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
            x_RLW = self._gradient_checkpointing_func(block, *args) if checkpointed else block(*args)
        if cache is not None:
            cache.length += x_RLW.shape[1]
        return self.norm(x_RLW)

    def logits(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """Logits fp32 [..., V] of hidden states [..., W], over the ids in `ids`."""
        return linear(hidden, widened(self.lm_head.weight[ids], hidden)).float()

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 over the codes alone."""
        return self.logits(hidden, self.codes)

    def _turns(self, place_L: Tensor) -> Tensor:
        """Cosines and sines fp32 [2, L, D/2]."""
        half = self.blocks[0].attn.head_width // 2
        exponent_D = torch.arange(half, device=place_L.device, dtype=torch.float32) / half
        angle_LD = place_L[:, None].float() * self.rope_theta**-exponent_D
        return torch.stack([angle_LD.cos(), angle_LD.sin()])
