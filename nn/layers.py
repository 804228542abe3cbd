"""torch's layers for weights that are stored in bfloat16 and computed with in fp32.

Where the processor multiplies fp32 faster (`kernels.precision.compute_dtype`), activations stay fp32 and weights are
widened when they are used. Otherwise these are torch's own layers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import linear


def widened(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """`weight` in the dtype of `x` if that is the wider one."""
    return weight if weight is None or weight.dtype.itemsize >= x.dtype.itemsize else weight.to(x.dtype)


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
