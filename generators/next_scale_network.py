"""The decoder-only transformer of next-scale generators (VAR, Tian et al. 2024; VAT, section 3 of its specification).

It reads a prefix that says what to make, rows of a learned start, which predict the first scale, and for each later
scale the sum of the codes so far, resampled to its length. Each row predicts the code at its own place: a scale is
read and predicted as a whole. Rows see the prefix, all coarser scales and their own one.

Shape suffixes: R rows, L rows of a sequence in a call, P prefix tokens, S tokens of all scales, k tokens of one scale,
C code channels, W width, H heads, D head width, V codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.multiscale import split_scales
from ..kernels.precision import compute_dtype
from ..nn.kv_cache import KeyValueCache
from ..nn.layers import LayerNorm, Linear
from .next_scale_condition import Prefix

EPS = 1e-6
FIRST_SHARPNESS, MAX_SHARPNESS = 4.0, 100.0  # of a head, times the cosine between query and key


class Attention(nn.Module):
    """Self-attention by cosines, each head with a learned sharpness; also over what is in the cache."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.log_sharpness = nn.Parameter(torch.full((num_heads, 1, 1), math.log(FIRST_SHARPNESS)))

    def forward(self, x_RLW: Tensor, mask_LL: Tensor | None, cache: KeyValueCache | None, layer: int) -> Tensor:
        """[R, L, W] to [R, L, W]; see `NextScaleTransformer.forward`."""
        q_RHLD, k_RHLD, v_RHLD = rearrange(self.qkv(x_RLW), "r l (n h d) -> n r h l d", n=3, h=self.num_heads)
        sharpness_H11 = self.log_sharpness.float().clamp(max=math.log(MAX_SHARPNESS)).exp()
        # `attention` divides by the root of the head width.
        q_RHLD = F.normalize(q_RHLD.float(), dim=-1) * sharpness_H11 * q_RHLD.shape[-1] ** 0.5
        k_RHLD = F.normalize(k_RHLD.float(), dim=-1)
        q_RHLD, k_RHLD = q_RHLD.to(v_RHLD.dtype), k_RHLD.to(v_RHLD.dtype)
        if cache is not None:
            k_RHLD, v_RHLD = cache.extend(layer, k_RHLD, v_RHLD)
        y_RHLD = attention(q_RHLD, k_RHLD, v_RHLD, mask_LL)
        return self.proj(rearrange(y_RHLD, "r h l d -> r l (h d)"))


class Block(nn.Module):
    """x = x + attention(LN(x)); x = x + MLP(LN(x))."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, eps=EPS), LayerNorm(width, eps=EPS)
        self.attn = Attention(width, num_heads)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_RLW: Tensor, mask_LL: Tensor | None = None, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        x_RLW = x_RLW + self.dropout(self.attn(self.norm1(x_RLW), mask_LL, cache, layer))
        return x_RLW + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x_RLW)), approximate="tanh")))


class NextScaleTransformer(nn.Module):
    """Prefix and views in, hidden states out; `head` makes logits of them.

    Args:
        scales: tokens of each scale. vocab_size, code_width: V, C.
        width, depth, num_heads: of the blocks. dropout: in training, of what they add.
        num_classes, num_features, feature_width: of the prefix.
    """

    def __init__(
        self, scales: tuple[int, ...], vocab_size: int, code_width: int, width: int, depth: int, num_heads: int,
        dropout: float, num_classes: int, num_features: int, feature_width: int,
    ):  # fmt: skip
        super().__init__()
        self.gradient_checkpointing = False
        self.slices, self.num_heads = tuple(split_scales(scales)), num_heads
        self.prefix = Prefix(num_classes, width, num_features, feature_width)
        self.view_in = Linear(code_width, width)
        self.start = nn.Parameter(torch.empty(width))
        self.pos_emb = nn.Parameter(torch.empty(sum(scales), width))
        self.scale_emb = nn.Parameter(torch.empty(len(scales), width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(depth))
        self.norm = LayerNorm(width, eps=EPS)
        self.head = Linear(width, vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 / 2)
                nn.init.zeros_(module.bias)
        for block in self.blocks:  # so that the sum of all that is added is as large as what one block would add
            block.attn.proj.weight.data.div_(math.sqrt(2 * depth))
            block.fc2.weight.data.div_(math.sqrt(2 * depth))
        nn.init.normal_(self.view_in.weight, std=(code_width * width) ** -0.5)  # as large as the embeddings
        nn.init.normal_(self.head.weight, std=0.1 * width**-0.5)
        for embedding in (self.start, self.pos_emb, self.scale_emb):
            nn.init.normal_(embedding, std=width**-0.5)

    @property
    def length(self) -> int:
        """P + S, the rows of a whole sequence."""
        return self.prefix.length + len(self.pos_emb)

    def visible(self) -> Tensor:
        """Bool [P + S, P + S] on the CPU: True where a row of a whole sequence sees another.

        The prefix sees the first scale's rows, too: they hold nothing but the learned start. So both go through in one
        pass when sampling.
        """
        numbers = [0] * self.prefix.length
        for scale, places in enumerate(self.slices):
            numbers += [scale] * (places.stop - places.start)
        number_L = torch.tensor(numbers, device="cpu")
        return number_L[:, None] >= number_L

    def first_rows(self, prefix_RPW: Tensor) -> Tensor:
        """The rows [R, P + k, W] of the prefix and the first scale."""
        places = self.slices[0]
        start_kW = (self.start + self.pos_emb[places] + self.scale_emb[0]).to(prefix_RPW.dtype)
        return torch.cat([prefix_RPW, start_kW.expand(len(prefix_RPW), -1, -1)], dim=1)

    def scale_rows(self, view_RkC: Tensor, scale: int) -> Tensor:
        """The rows [R, k, W] of a later scale, of what it reads, fp32 [R, k, C]."""
        dtype = compute_dtype(self.start.dtype, self.start.device)
        place_kW = self.pos_emb[self.slices[scale]] + self.scale_emb[scale]
        return self.view_in(view_RkC.to(dtype)) + place_kW.to(dtype)

    def new_cache(self, rows: int) -> KeyValueCache:
        """An empty cache for the whole sequence, of the dtype that is computed in."""
        dtype = compute_dtype(self.start.dtype, self.start.device)
        like = torch.empty(0, dtype=dtype, device=self.start.device)
        head_width = len(self.start) // self.num_heads
        return KeyValueCache(len(self.blocks), rows, self.num_heads, self.length, head_width, like)

    def forward(self, x_RLW: Tensor, mask_LL: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states [R, L, W] behind the last norm.

        mask_LL: bool, True where a row sees another; None where all see all.
        cache: what came before, which all rows see; not together with a mask. These rows come behind it.
        """
        x_RLW = self.dropout(x_RLW)
        for layer, block in enumerate(self.blocks):
            args = (x_RLW, mask_LL, cache, layer)
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
            x_RLW = self._gradient_checkpointing_func(block, *args) if checkpointed else block(*args)
        if cache is not None:
            cache.length += x_RLW.shape[1]
        return self.norm(x_RLW)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [..., V] of hidden states [..., W]."""
        return self.head(hidden).float()
