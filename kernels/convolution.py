"""Convolutions along time for inference on a CPU: weights laid out once, and long kernels with fewer multiplications.

torch rearranges weights and signals for oneDNN at every call. `PackedConv1d` keeps rearranged weights in the place of
torch's, and signals [B, C, T] with the channels innermost in memory (strides T*C, 1, C), which is how oneDNN works.

`ToomCookConv1d` computes four outputs of a kernel of four taps with 7 multiplications instead of 16 (Toom-Cook's
algorithm, Winograd's F(4, 4); Lavin & Gray 2016, arXiv 1509.09308). Outputs and taps are taken as polynomials; their
product is known from its values at 7 points. Longer kernels add up several fours at the points, so that 7 taps take
half the multiplications and 11 taps 0.48 of them. Rounding errors are about three times those of a plain convolution.

Shape suffixes: B batch, C channels (O of the output), T samples, Q tiles of four samples, D dilation, P points,
J fours of taps.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from ..core.packed import PackedLayer

TILE = 4  # outputs, and taps, that go together
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5)  # and infinity
NUM_POINTS = len(POINTS) + 1
ONE = POINTS.index(1)
BLOCK_ELEMENTS = 2**18  # of the signal at once: with all values at the points 5 MiB, about the caches of two cores
# Below, additions and layout take more time than the multiplications that are saved.
MIN_KERNEL = 5
MIN_KERNEL_CHANNELS = 700  # kernel times channels: 11 taps of 64 channels, 7 of 128


def can_pack() -> bool:
    """Whether this torch has oneDNN's convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def pack_convolutions(network: nn.Module) -> None:
    """Replace every fp32 convolution along time below `network` by a packed one, layer by layer.

    A layer's `input_slope`, if it has one, is that of the leaky ReLU that it applies to its input.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv1d | nn.ConvTranspose1d) and child.weight.dtype == torch.float32:
                setattr(parent, name, _packed(child))


def _packed(conv: nn.Conv1d | nn.ConvTranspose1d) -> PackedLayer:
    if isinstance(conv, nn.ConvTranspose1d):
        return PackedConvTranspose1d(conv)
    kernel, channels = conv.kernel_size[0], min(conv.in_channels, conv.out_channels)
    keeps_length = conv.stride == (1,) and 2 * conv.padding[0] == conv.dilation[0] * (kernel - 1)
    is_large = kernel >= MIN_KERNEL and kernel * channels >= MIN_KERNEL_CHANNELS
    return ToomCookConv1d(conv) if keeps_length and is_large else PackedConv1d(conv)


class PackedConv1d(PackedLayer):
    """`nn.Conv1d` for inference; its output has the channels innermost."""

    def __init__(self, conv: nn.Conv1d):
        super().__init__(conv.weight.dtype)
        self.settings = [0, conv.padding[0]], [1, conv.stride[0]], [1, conv.dilation[0]]
        self.input_slope = getattr(conv, "input_slope", 1.0)
        self.bias = conv.bias.detach().clone()
        self._weight = _laid_out(conv.weight.detach(), *self.settings)

    def forward(self, x_BCT: Tensor) -> Tensor:
        x_BCT = x_BCT if self.input_slope == 1 else nn.functional.leaky_relu(x_BCT, self.input_slope)
        return _convolve(_channels_last(x_BCT), self._weight, self.bias, *self.settings).squeeze(2)


class PackedConvTranspose1d(PackedLayer):
    """`nn.ConvTranspose1d` for inference; its output has the channels innermost."""

    def __init__(self, conv: nn.ConvTranspose1d):
        super().__init__(conv.weight.dtype)
        self.stride, self.padding = (1, conv.stride[0]), (0, conv.padding[0])
        self.bias = conv.bias.detach().clone()
        self._weight = _channels_last(conv.weight.detach().clone())

    def forward(self, x_BCT: Tensor) -> Tensor:
        y_BC1T = nn.functional.conv_transpose2d(
            _channels_last(x_BCT), self._weight, self.bias, self.stride, self.padding
        )
        return y_BC1T.contiguous(memory_format=torch.channels_last).squeeze(2)


class ToomCookConv1d(PackedLayer):
    """`nn.Conv1d` that keeps the length, for inference; its output has the channels innermost.

    The weights' values at the points take 7 * ceil(k / 4) / k, about twice, the memory of a kernel of k taps.
    """

    def __init__(self, conv: nn.Conv1d):
        super().__init__(conv.weight.dtype)
        self.padding, self.dilation = conv.padding[0], conv.dilation[0]
        self.input_slope = getattr(conv, "input_slope", 1.0)
        self.num_fours = -(-conv.kernel_size[0] // TILE)
        self.bias = conv.bias.detach().clone()
        # What is added to the value at 1 comes to every output once.
        self._biases = torch.zeros(NUM_POINTS, len(self.bias)).index_fill_(0, torch.tensor(ONE), 1) * self.bias
        self.settings = [0, 0], [1, 1], [1, self.dilation]
        self._weight = _laid_out(weights_at_points(conv.weight).flatten(0, 1), *self.settings, groups=NUM_POINTS)

    def forward(self, x_BCT: Tensor) -> Tensor:
        batch, channels, length = x_BCT.shape
        num_tiles = -(-length // (TILE * self.dilation))
        # Samples t, t + D, t + 2 D and t + 3 D make a tile; D tiles interleave.
        padded_BTC = x_BCT.new_empty(batch, (num_tiles + self.num_fours) * TILE * self.dilation, channels)
        before_BTC, signal_BTC, after_BTC = padded_BTC.tensor_split([self.padding, self.padding + length], dim=1)
        before_BTC.zero_()
        after_BTC.zero_()
        torch.ops.aten.leaky_relu.out(x_BCT.transpose(1, 2), self.input_slope, out=signal_BTC)
        x_BQ4DC = padded_BTC.view(batch, -1, TILE, self.dilation, channels)
        y_BQ4DO = x_BCT.new_empty(batch, num_tiles, TILE, self.dilation, len(self.bias))
        step = max(1, BLOCK_ELEMENTS // (batch * TILE * self.dilation * channels))
        for first in range(0, num_tiles, step):
            y = y_BQ4DO[:, first : first + step]
            x = x_BQ4DC[:, first : first + y.shape[1] + self.num_fours]
            from_values(self._products(values_at_points(x)), y)
        return y_BQ4DO.view(batch, -1, len(self.bias))[:, :length].transpose(1, 2)

    def _products(self, values_BQDPC: Tensor) -> Tensor:
        """Values of the outputs [B, Q, D, P, O]: at each point the fours of taps are a convolution along the tiles."""
        batch, num_tiles = values_BQDPC.shape[:2]
        values_BC1T = values_BQDPC.view(batch, num_tiles * self.dilation, -1).transpose(1, 2).unsqueeze(2)
        y_BO1T = _convolve(values_BC1T, self._weight, self._biases.flatten(), *self.settings, groups=NUM_POINTS)
        shape = (batch, num_tiles - self.num_fours + 1, self.dilation, NUM_POINTS, len(self.bias))
        return y_BO1T.squeeze(2).transpose(1, 2).view(shape)


def weights_at_points(weight_OCK: Tensor) -> Tensor:
    """Values of each four of taps at the points, divided by what Lagrange's formula asks for, fp32 [P, O, C, J]."""
    weight_OCK = nn.functional.pad(weight_OCK.detach().double(), (0, -weight_OCK.shape[2] % TILE))
    rows = [
        [point**tap / prod(point - other for other in POINTS if other != point) for tap in range(TILE)]
        for point in POINTS
    ]
    rows.append([0.0] * (TILE - 1) + [1.0])
    return torch.einsum("pt,ocjt->pocj", weight_OCK.new_tensor(rows), weight_OCK.unflatten(2, (-1, TILE))).float()


def values_at_points(x_BQ4DC: Tensor) -> Tensor:
    """What is multiplied with `weights_at_points`, [B, Q, D, P, C], for the tiles 0 to Q - 1 of Q + 1.

    For point p these are sums of seven samples, weighted by the coefficients of the product of (z - q) over all other
    points q; for infinity, over all points. The products share their factors z^4 - 5 z^2 + 4 and z - 1/2.
    """
    now, after = x_BQ4DC[:, :-1], x_BQ4DC[:, 1:]
    x = [*now.unbind(2), *after[:, :, : TILE - 1].unbind(2)]
    values_BQDPC = x[0].new_empty(*x[0].shape[:3], NUM_POINTS, x[0].shape[3])
    zero, one, minus_one, two, minus_two, half, infinity = values_BQDPC.unbind(3)
    quartic_0 = torch.add(x[4], x[2], alpha=-5).add_(x[0], alpha=4)
    quartic_1 = torch.add(x[5], x[3], alpha=-5, out=half).add_(x[1], alpha=4)
    quartic_2 = torch.add(x[6], x[4], alpha=-5).add_(x[2], alpha=4)
    torch.add(quartic_1, quartic_0, alpha=-0.5, out=zero)
    torch.add(quartic_2, quartic_1, alpha=-0.5, out=infinity)
    linear = [torch.add(x[i + 1], x[i], alpha=-0.5) for i in range(1, 5)]
    even, odd = torch.add(linear[3], linear[1], alpha=-4), torch.add(linear[2], linear[0], alpha=-4)
    torch.add(even, odd, out=one)
    torch.sub(even, odd, out=minus_one)
    even, odd = linear[3].sub_(linear[1]), linear[2].sub_(linear[0])
    torch.add(even, odd, alpha=2, out=two)
    torch.sub(even, odd, alpha=2, out=minus_two)
    return values_BQDPC


def from_values(values_BQDPO: Tensor, y_BQ4DO: Tensor) -> None:
    """Write the outputs whose values at the points these are: output i is the sum of p^i v_p."""
    zero, one, minus_one, two, minus_two, half, infinity = values_BQDPO.unbind(3)
    sum_1, difference_1 = one + minus_one, one - minus_one
    sum_2, difference_2 = two + minus_two, two - minus_two
    y = y_BQ4DO.unbind(2)
    torch.add(sum_1, sum_2, out=y[0]).add_(zero).add_(half)
    torch.add(difference_1, difference_2, alpha=2, out=y[1]).add_(half, alpha=1 / 2)
    torch.add(sum_1, sum_2, alpha=4, out=y[2]).add_(half, alpha=1 / 4)
    torch.add(difference_1, difference_2, alpha=8, out=y[3]).add_(half, alpha=1 / 8).add_(infinity)


def _channels_last(x_BCT: Tensor) -> Tensor:
    """[B, C, 1, T] with the channels innermost."""
    return x_BCT.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _laid_out(
    weight_OCK: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int = 1
) -> Tensor:
    weight_OC1K = _channels_last(weight_OCK)
    shape = [1, groups * weight_OCK.shape[1], 1, 4096]  # of a typical input, which decides the layout
    return torch.ops.mkldnn._reorder_convolution_weight(weight_OC1K, padding, stride, dilation, groups, shape)


def _convolve(
    x_BC1T: Tensor, weight: Tensor, bias: Tensor, padding: list[int], stride: list[int], dilation: list[int],
    groups: int = 1,
) -> Tensor:  # fmt: skip
    y_BO1T = torch.ops.mkldnn._convolution_pointwise(
        x_BC1T, weight, bias, padding, stride, dilation, groups, "none", [], ""
    )
    return y_BO1T.contiguous(memory_format=torch.channels_last)
