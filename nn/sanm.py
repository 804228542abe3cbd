"""SAN-M layers (Gao et al. 2020, arXiv 2006.01713): self-attention beside a memory, a depthwise filter over time.

The memory carries what is near, the attention what is far. Layers of the encoder have both. Layers of the parallel
decoder have the memory alone between their tokens, and attend to what the encoder read.

Every LayerNorm has eps 1e-12 but where it says otherwise. Sums are made in place, in what a product or a convolution
has just returned: nothing else needs that, not even a gradient.

Shape suffixes: B batch, L positions, T positions of the encoder's output, W width, H heads, D head width, F features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.precision import compute_dtype
from .layers import LayerNorm, Linear, widened

EPS = 1e-12


def is_inside(lengths_B: Tensor, length: int) -> Tensor:
    """bool [B, length]: True before the end of each row."""
    return torch.arange(length, device=lengths_B.device) < lengths_B[:, None]


class Memory(nn.Module):
    """x plus a depthwise convolution of x over time; positions past the end are read and written as zeros.

    taps: positions that the filter sees, (taps - 1) // 2 + shift of them before the present one.
    """

    def __init__(self, width: int, taps: int, shift: int = 0, dropout: float = 0.0):
        super().__init__()
        before = (taps - 1) // 2 + shift
        self.reach = (before, taps - 1 - before)
        self.weight = nn.Parameter(torch.empty(width, 1, taps))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch's convolutions start

    def forward(self, x_BLW: Tensor, inside_BL: Tensor | None = None) -> Tensor:
        """[B, L, W] to [B, L, W]; `inside_BL` None where no row is padded."""
        if inside_BL is not None:
            x_BLW = x_BLW * inside_BL[..., None]
        # As an image of height L and width 1 whose channels lie together in memory: the layout is already the one that
        # the convolution wants, where conv1d would transpose to and fro.
        before, after = self.reach
        pad = before if before == after else 0
        image_BWL1 = (x_BLW if pad else F.pad(x_BLW, (0, 0, before, after))).transpose(1, 2)[..., None]
        weight = widened(self.weight, x_BLW)[..., None]
        y_BWL1 = F.conv2d(image_BWL1, weight, padding=(pad, 0), groups=x_BLW.shape[2])
        y_BLW = self.dropout(y_BWL1[..., 0].transpose(1, 2).add_(x_BLW))
        return y_BLW if inside_BL is None else y_BLW * inside_BL[..., None]


class SelfAttention(nn.Module):
    """Attention plus the memory of its values, which passes by the output projection."""

    def __init__(self, in_width: int, width: int, num_heads: int, taps: int, shift: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv, self.out = Linear(in_width, 3 * width), Linear(width, width)
        self.memory = Memory(width, taps, shift, dropout)

    def forward(self, x_BLF: Tensor, inside_BL: Tensor | None) -> Tensor:
        q_BLW, k_BLW, v_BLW = self.qkv(x_BLF).chunk(3, dim=-1)
        remembered_BLW = self.memory(v_BLW, inside_BL)
        y_BLW = _attend(q_BLW, k_BLW, v_BLW, self.num_heads, inside_BL, self.dropout if self.training else 0.0)
        return self.out(y_BLW).add_(remembered_BLW)


class CrossAttention(nn.Module):
    """Attention from tokens to frames."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.kv, self.out = Linear(width, width), Linear(width, 2 * width), Linear(width, width)

    def forward(self, x_BLW: Tensor, frames_BTW: Tensor, inside_BT: Tensor | None) -> Tensor:
        k_BTW, v_BTW = self.kv(frames_BTW).chunk(2, dim=-1)
        dropout = self.dropout if self.training else 0.0
        return self.out(_attend(self.q(x_BLW), k_BTW, v_BTW, self.num_heads, inside_BT, dropout))

    def weights(self, x_BLW: Tensor, frames_BTW: Tensor) -> Tensor:
        """How much each token attends to each frame: [B, H, L, T], sums to 1 over the frames."""
        k_BTW, _ = self.kv(frames_BTW).chunk(2, dim=-1)
        q_BHLD, k_BHTD = (rearrange(x, "b l (h d) -> b h l d", h=self.num_heads) for x in (self.q(x_BLW), k_BTW))
        return (q_BHLD * q_BHLD.shape[-1] ** -0.5 @ k_BHTD.mT).softmax(dim=-1)


def _attend(q_BLW, k_BTW, v_BTW, num_heads: int, inside_BT: Tensor | None, dropout: float) -> Tensor:
    heads = (rearrange(x, "b l (h d) -> b h l d", h=num_heads) for x in (q_BLW, k_BTW, v_BTW))
    mask = None if inside_BT is None else inside_BT[:, None, None, :]
    return rearrange(attention(*heads, mask, dropout), "b h l d -> b l (h d)")


class FeedForward(nn.Module):
    """fc2(ReLU(fc1(x))); the decoder's has a norm before fc2, and no bias in it."""

    def __init__(self, width: int, hidden: int, dropout: float, is_normed: bool = False):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width, bias=not is_normed)
        self.norm = LayerNorm(hidden, eps=EPS) if is_normed else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLW: Tensor) -> Tensor:
        return self.fc2(self.norm(self.dropout(F.relu_(self.fc1(x_BLW)))))


class EncoderLayer(nn.Module):
    """x = x + attention(norm(x)); x = x + MLP(norm(x)). Where the width changes the first sum is left out."""

    def __init__(
        self, in_width: int, width: int, num_heads: int, hidden: int, taps: int, shift: int, dropout: float,
        attention_dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.is_residual = in_width == width
        self.norm1, self.norm2 = LayerNorm(in_width, eps=EPS), LayerNorm(width, eps=EPS)
        self.attn = SelfAttention(in_width, width, num_heads, taps, shift, attention_dropout)
        self.mlp = FeedForward(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLF: Tensor, inside_BL: Tensor | None) -> Tensor:
        y_BLW = self.dropout(self.attn(self.norm1(x_BLF), inside_BL))
        x_BLW = y_BLW.add_(x_BLF) if self.is_residual else y_BLW
        return self.dropout(self.mlp(self.norm2(x_BLW))).add_(x_BLW)


class Encoder(nn.Module):
    """Features [B, L, F] to [B, L, W]: positions are added to the scaled features, before the first layer.

    has_projection: project the features to the width first (with a LayerNorm of eps 1e-5, ReLU, and positions of the
        original transformer's kind).
    """

    def __init__(
        self, in_width: int, width: int, depth: int, num_heads: int, hidden: int, taps: int = 11, shift: int = 0,
        dropout: float = 0.1, attention_dropout: float = 0.1, has_projection: bool = False,
    ):  # fmt: skip
        super().__init__()
        if width % num_heads or in_width % 2:
            raise ValueError(f"{in_width} features must be even, and width {width} a multiple of {num_heads} heads")
        self.width, self.gradient_checkpointing = width, False
        self.projection = None
        if has_projection:
            self.projection = nn.Sequential(
                Linear(in_width, width), LayerNorm(width), nn.Dropout(dropout), nn.ReLU()
            )  # fmt: skip
            in_width = width
        self.layers = nn.ModuleList(
            EncoderLayer(width if i else in_width, width, num_heads, hidden, taps, shift, dropout, attention_dropout)
            for i in range(depth)
        )
        self.norm = LayerNorm(width, eps=EPS)

    def forward(self, x_BLF: Tensor, inside_BL: Tensor | None) -> Tensor:
        """Encoded rows; what lies past the end of a row depends on how far the batch is padded, and means nothing.

        inside_BL: bool, None where no row is padded; every row needs one position at least.
        """
        x_BLF = self.enter(x_BLF).to(compute_dtype(self.norm.weight.dtype, self.norm.weight.device))
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            args = (x_BLF, inside_BL)
            x_BLF = self._gradient_checkpointing_func(layer, *args) if checkpointed else layer(*args)
        return self.norm(x_BLF)

    def enter(self, x_BLF: Tensor) -> Tensor:
        """What the first layer reads: the features, scaled, and their positions; fp32."""
        x_BLF = x_BLF.float() * self.width**0.5
        if self.projection is not None:
            x_BLW = self.projection(x_BLF)
            sin_LR, cos_LR = _waves(x_BLW, 0, x_BLW.shape[-1] // 2)
            return x_BLW * self.width**0.5 + torch.stack([sin_LR, cos_LR], dim=-1).flatten(1)
        sin_LR, cos_LR = _waves(x_BLF, 1, x_BLF.shape[-1] // 2 - 1)
        return x_BLF + torch.cat([sin_LR, cos_LR], dim=-1)


def _waves(x_BLF: Tensor, first: int, last_rate: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines [L, F / 2] of positions from `first` on, at rates 10000^(-i / last_rate)."""
    positions_L = torch.arange(first, first + x_BLF.shape[1], device=x_BLF.device).float()
    step = math.log(10000) / max(last_rate, 1)
    rates_R = torch.exp(-step * torch.arange(x_BLF.shape[2] // 2, device=x_BLF.device).float())
    angles_LR = positions_L[:, None] * rates_R
    return angles_LR.sin(), angles_LR.cos()


class DecoderLayer(nn.Module):
    """MLP first, without a residual of its own; its memory is added to the layer's input; then attention to frames.

    has_attention: without it the layer only relates the tokens to each other.
    """

    def __init__(
        self, width: int, num_heads: int, hidden: int, taps: int, shift: int, dropout: float, attention_dropout: float,
        has_attention: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, eps=EPS), LayerNorm(width, eps=EPS)
        self.mlp = FeedForward(width, hidden, dropout, is_normed=True)
        self.memory = Memory(width, taps, shift, attention_dropout)
        self.norm3 = LayerNorm(width, eps=EPS) if has_attention else None
        self.cross = CrossAttention(width, num_heads, attention_dropout) if has_attention else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BLW: Tensor, inside_BL: Tensor | None, frames_BTW: Tensor, inside_BT: Tensor | None
    ) -> Tensor:  # fmt: skip
        x_BLW = self.remember(x_BLW, inside_BL)
        if self.cross is None:
            return x_BLW
        return self.dropout(self.cross(self.norm3(x_BLW), frames_BTW, inside_BT)).add_(x_BLW)

    def remember(self, x_BLW: Tensor, inside_BL: Tensor | None) -> Tensor:
        """The layer up to its attention."""
        return self.dropout(self.memory(self.norm2(self.mlp(self.norm1(x_BLW))), inside_BL)).add_(x_BLW)


class DecoderStack(nn.Module):
    """Token vectors in, token vectors out, all at once: layers, a last MLP without a residual, and a norm.

    attention_depth: the first so many layers attend to frames, the others are without (and without a shift).
    """

    def __init__(
        self, width: int, depth: int, num_heads: int, hidden: int, taps: int = 11, shift: int = 0,
        dropout: float = 0.1, attention_dropout: float = 0.1, attention_depth: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} heads")
        attention_depth = depth if attention_depth is None else attention_depth
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(
            DecoderLayer(
                width, num_heads, hidden, taps, shift if i < attention_depth else 0, dropout, attention_dropout,
                has_attention=i < attention_depth,
            )
            for i in range(depth)
        )  # fmt: skip
        self.last_norm, self.last_mlp = LayerNorm(width, eps=EPS), FeedForward(width, hidden, dropout, is_normed=True)
        self.norm = LayerNorm(width, eps=EPS)

    def forward(self, x_BLW: Tensor, inside_BL: Tensor | None, frames_BTW: Tensor, inside_BT: Tensor | None) -> Tensor:
        """[B, L, W] to [B, L, W]. Masks are bool, True inside a row; None where no row is padded."""
        dtype = compute_dtype(self.norm.weight.dtype, self.norm.weight.device)
        x_BLW, frames_BTW = x_BLW.to(dtype), frames_BTW.to(dtype)
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            args = (x_BLW, inside_BL, frames_BTW, inside_BT)
            x_BLW = self._gradient_checkpointing_func(layer, *args) if checkpointed else layer(*args)
        return self.norm(self.last_mlp(self.last_norm(x_BLW)))
