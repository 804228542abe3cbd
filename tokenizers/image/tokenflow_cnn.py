"""The convolutional encoder and decoder of TokenFlow's pixel branch: VQGAN as LlamaGen has it (arXiv 2406.06525).

Attention works on the coarsest level only. Activations are channels-last. Parameter names are the authors', but for
`downsample` and `upsample`, which are the convolutions themselves here.

Shape suffixes: B batch, C channels, 3/H/W image, Z latent channels, h/w latent grid, L = h*w positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...kernels.attention import attention
from ...nn.conv_blocks import NUM_GROUPS, NormSiLU, UpsampleConv, as_computed
from ...nn.layers import Conv2d, GroupNorm


class ResnetBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), x through a 1x1 convolution where the channels change."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(in_channels), Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = NormSiLU(out_channels), Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))))
        return h_BCHW.add_(self.nin_shortcut(x_BCHW))


class AttnBlock(nn.Module):
    """x + attention over all positions, with one head as wide as the map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(NUM_GROUPS, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q, k, v = (rearrange(part(h_BCHW), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        h_BCHW = rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x_BCHW.shape[2])
        return x_BCHW + self.proj_out(h_BCHW)


class Downsample(Conv2d):
    """A 3x3 convolution of stride 2, padded on the right and below alone."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(F.pad(x_BCHW, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks, each before an attention block where there are any, then a change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, has_attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.res = nn.ModuleList(ResnetBlock(width, out_channels) for width in widths)
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in widths if has_attention)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for number, block in enumerate(self.res):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[number](x_BCHW)
        if hasattr(self, "downsample"):
            return self.downsample(x_BCHW)
        return self.upsample(x_BCHW) if hasattr(self, "upsample") else x_BCHW


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList((ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)))


class PixelEncoder(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] to maps [B, Z, h, w], 2^(levels - 1) times smaller."""

    def __init__(self, channels: int, multipliers: tuple[int, ...], num_res_blocks: int, z_channels: int):
        super().__init__()
        self.gradient_checkpointing = False
        widths = [channels * multiplier for multiplier in multipliers]
        last = len(widths) - 1
        self.conv_in = Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for number, (before, width) in enumerate(zip([channels, *widths[:-1]], widths, strict=True)):
            level = Level(before, width, num_res_blocks, has_attention=number == last)
            if number < last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = NormSiLU(widths[-1]), Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(as_computed(pixels_B3HW, self.conv_in.weight))
        x_BCHW = run_stages(self, (*self.conv_blocks, *self.mid), x_BCHW)
        return self.conv_out(self.norm_out(x_BCHW))


class PixelDecoder(nn.Module):
    """Maps [B, Z, h, w] to pixels [B, 3, H, W], nominally in [-1, 1], 2^(levels - 1) times larger.

    Levels run from the coarsest, `conv_blocks[0]`; each has one block more than `num_res_blocks`.
    """

    def __init__(self, channels: int, multipliers: tuple[int, ...], num_res_blocks: int, z_channels: int):
        super().__init__()
        self.gradient_checkpointing = False
        widths = [channels * multiplier for multiplier in reversed(multipliers)]
        self.conv_in = Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for number, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            level = Level(before, width, num_res_blocks + 1, has_attention=number == 0)
            if number < len(widths) - 1:
                level.upsample = UpsampleConv(width)
            self.conv_blocks.append(level)
        self.norm_out, self.conv_out = NormSiLU(widths[-1]), Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z_BZhw: Tensor) -> Tensor:
        x_BCHW = self.conv_in(as_computed(z_BZhw, self.conv_in.weight))
        x_BCHW = run_stages(self, (*self.mid, *self.conv_blocks), x_BCHW)
        return self.conv_out(self.norm_out(x_BCHW)).contiguous()


def run_stages(network: PixelEncoder | PixelDecoder, stages: tuple[nn.Module, ...], x_BCHW: Tensor) -> Tensor:
    for stage in stages:
        checkpointed = network.gradient_checkpointing and torch.is_grad_enabled()
        x_BCHW = network._gradient_checkpointing_func(stage, x_BCHW) if checkpointed else stage(x_BCHW)
    return x_BCHW
