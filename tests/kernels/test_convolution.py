"""Packed convolutions give what torch's give, at every length, dilation and batch."""

import pytest
import torch
import torch.nn.functional as F
from mediatok.core.errors import InvalidInput
from mediatok.kernels import convolution
from mediatok.kernels.convolution import (
    PackedConv1d,
    PackedConvTranspose1d,
    ToomCookConv1d,
    can_pack,
    from_values,
    pack_convolutions,
    values_at_points,
    weights_at_points,
)
from torch import nn

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")


def same_conv(channels, out, kernel, dilation):
    torch.manual_seed(kernel)
    return nn.Conv1d(channels, out, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)


def exactly(conv, x_BCT):
    return F.conv1d(x_BCT.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding, conv.dilation)


def channels_are_innermost(x_BCT):
    return x_BCT.stride(1) == 1


@pytest.mark.parametrize("kernel", [1, 3, 4, 5, 7, 8, 11, 13])
def test_polynomials_at_seven_points(kernel):
    """In fp64 the algorithm is exact: tiles of four outputs from the values at the points."""
    rng = torch.Generator().manual_seed(kernel)
    weight_OCK = torch.randn(3, 2, kernel, generator=rng)
    x_BTC = torch.randn(1, 40, 2, generator=rng, dtype=torch.float64)
    fours = -(-kernel // 4)
    values_BQPC = values_at_points(x_BTC.view(1, 10, 4, 1, 2))[:, :, 0]
    points = weights_at_points(weight_OCK).double()
    products = sum(
        torch.einsum("bqpc,poc->bqpo", values_BQPC[:, j : 10 - fours + j], points[..., j]) for j in range(fours)
    )
    y_BQ4DO = torch.empty(1, 10 - fours, 4, 1, 3, dtype=torch.float64)
    from_values(products[:, :, None], y_BQ4DO)
    expected = F.conv1d(x_BTC.mT, weight_OCK.double()).mT[:, : 4 * (10 - fours)]
    torch.testing.assert_close(y_BQ4DO.view(1, -1, 3), expected, atol=1e-5, rtol=1e-5)  # the weights are fp32


@pytest.mark.parametrize("dilation", [1, 3, 5])
@pytest.mark.parametrize("kernel", [5, 7, 11])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 6), (1, 77), (3, 200)])
@torch.inference_mode()
def test_long_kernels(kernel, dilation, batch, length):
    conv = same_conv(64, 70, kernel, dilation)
    x_BCT = torch.randn(batch, 64, length)
    y_BCT = ToomCookConv1d(conv)(x_BCT)
    assert channels_are_innermost(y_BCT)
    torch.testing.assert_close(y_BCT.double(), exactly(conv, x_BCT), atol=2e-5, rtol=0)
    again = ToomCookConv1d(conv)(x_BCT.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(again, y_BCT)  # whatever the layout of the input


@pytest.mark.parametrize("elements", [1, 1000, 5000])
@torch.inference_mode()
def test_blocks_change_nothing(monkeypatch, elements):
    conv = same_conv(64, 64, 7, 3)
    x_BCT = torch.randn(2, 64, 500)
    whole = ToomCookConv1d(conv)(x_BCT)
    monkeypatch.setattr(convolution, "BLOCK_ELEMENTS", elements)
    torch.testing.assert_close(ToomCookConv1d(conv)(x_BCT), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [PackedConv1d, ToomCookConv1d])
@torch.inference_mode()
def test_the_input_may_pass_a_leaky_relu(make):
    conv = same_conv(64, 64, 5, 2)
    conv.input_slope = 0.1
    x_BCT = torch.randn(2, 64, 33)
    kept = x_BCT.clone()
    expected = exactly(conv, F.leaky_relu(x_BCT, 0.1))
    torch.testing.assert_close(make(conv)(x_BCT).double(), expected, atol=2e-5, rtol=0)
    assert torch.equal(x_BCT, kept)


@pytest.mark.parametrize(("channels", "out", "kernel", "stride"), [(1, 8, 4, 2), (32, 64, 16, 8), (6, 12, 11, 5)])
@torch.inference_mode()
def test_strided_and_transposed(channels, out, kernel, stride):
    padding = (kernel - stride) // 2
    down = nn.Conv1d(channels, out, kernel, stride, padding)
    up = nn.ConvTranspose1d(out, channels, kernel, stride, padding)
    for batch, length in ((1, 10 * stride), (3, 7 * stride)):
        x_BCT = torch.randn(batch, channels, length)
        y_BCT = PackedConv1d(down)(x_BCT)
        torch.testing.assert_close(y_BCT, down(x_BCT), atol=1e-5, rtol=0)
        torch.testing.assert_close(PackedConvTranspose1d(up)(y_BCT), up(y_BCT), atol=1e-5, rtol=0)
        assert channels_are_innermost(y_BCT)


def test_which_layers_are_packed_how():
    network = nn.Sequential(
        same_conv(128, 128, 7, 3), same_conv(64, 64, 3, 1), same_conv(32, 32, 11, 1), nn.Conv1d(64, 64, 7, 2, 3),
        nn.Conv1d(64, 64, 7), nn.ConvTranspose1d(64, 32, 4, 2, 1), nn.Linear(3, 3), same_conv(64, 64, 7, 1).bfloat16(),
    )  # fmt: skip
    pack_convolutions(network)
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == [
        "ToomCookConv1d", *["PackedConv1d"] * 4, "PackedConvTranspose1d", "Linear", "Conv1d",
    ]  # fmt: skip
    for act in (network.state_dict, network.train, network.double):
        with pytest.raises(InvalidInput, match="load the model again"):
            act()
