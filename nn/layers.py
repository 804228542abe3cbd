"""torch's layers for weights that are stored in bfloat16 and computed with in fp32.

Where the processor multiplies fp32 faster (`kernels.precision.compute_dtype`), activations stay fp32 and weights are
widened when they are used. Otherwise these are torch's own layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import linear
from ..kernels.precision import compute_dtype


def widened(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """`weight` in the dtype of `x` if that is the wider one."""
    return weight if weight is None or weight.dtype.itemsize >= x.dtype.itemsize else weight.to(x.dtype)


def to_compute(x: Tensor, weight: Tensor) -> Tensor:
    """`x` in the dtype to compute with weights stored as `weight` is."""
    return x.to(compute_dtype(weight.dtype, weight.device))


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, widened(self.weight, x), widened(self.bias, x))


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, widened(self.weight, x), widened(self.bias, x))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, widened(self.weight, x), widened(self.bias, x), self.eps)


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, widened(self.weight, x), widened(self.bias, x), self.eps)


class Conv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, widened(self.weight, x), widened(self.bias, x))


class ConvTranspose1d(nn.ConvTranspose1d):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = widened(self.weight, x), widened(self.bias, x)
        return F.conv_transpose1d(x, weight, bias, self.stride, self.padding, self.output_padding)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / rms(x), with the mean taken in fp32 (fp64 for fp64), times `weight` if there is one."""
    if x.device.type == "cpu":  # one pass over x, where F.rms_norm makes five
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        normed = x * torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
    else:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
    return normed if weight is None else normed * widened(weight, x)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
