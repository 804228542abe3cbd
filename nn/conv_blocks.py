"""What the convolutional networks of several image tokenizers consist of (the VQGAN family, Esser et al. 2021).

Shape suffixes: B batch, C channels, H, W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import Conv2d, to_compute, widened

NUM_GROUPS = 32  # of every group norm
MIN_POSITIONS_TO_FOLD = 1024  # below, folding the weights costs more than it saves

# Rows and columns of a 3x3 kernel, summed by which of the 2x upsampled positions share a source: K = fold @ w @ fold.T.
FOLD_3_TO_4 = [[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]


def as_computed(x_BCHW: Tensor, weight: Tensor) -> Tensor:
    """`x_BCHW` in the dtype and the memory format in which convolutions with `weight` and group norms are fastest.

    Channels-last, except for training on a CPU: there torch's gradient of a group norm takes over ten times as long
    with it, more than all convolutions.
    """
    plain = x_BCHW.device.type == "cpu" and torch.is_grad_enabled()
    memory_format = torch.contiguous_format if plain else torch.channels_last
    return to_compute(x_BCHW, weight).contiguous(memory_format=memory_format)


class NormSiLU(nn.GroupNorm):
    """Group norm, then SiLU in place."""

    def __init__(self, channels: int):
        super().__init__(NUM_GROUPS, channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight, bias = widened(self.weight, x_BCHW), widened(self.bias, x_BCHW)
        return F.silu(F.group_norm(x_BCHW, NUM_GROUPS, weight, bias, self.eps), inplace=True)


class UpsampleConv(Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution.

    Each output reads only 2x2 different inputs, so the two steps equal one transposed convolution of stride 2 whose
    4x4 kernel sums the taps that meet the same input: 4/9 of the products, and the upsampled map is never made.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[2:]
        if x_BCHW.device.type != "cpu" or height * width < MIN_POSITIONS_TO_FOLD:
            return super().forward(F.interpolate(x_BCHW, scale_factor=2))
        fold = torch.tensor(FOLD_3_TO_4, dtype=torch.float32)
        kernel_16 = rearrange(self.weight.float(), "o i u v -> (o i) (u v)") @ torch.kron(fold, fold).T
        kernel = rearrange(kernel_16, "(o i) (y x) -> i o y x", o=self.out_channels, y=4).to(x_BCHW.dtype)
        return F.conv_transpose2d(x_BCHW, kernel, self.bias.to(x_BCHW.dtype), stride=2, padding=1)
