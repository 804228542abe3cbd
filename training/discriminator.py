"""The PatchGAN-like discriminator of MaskBit and single-stage TiTok (arXiv 2409.16211, section 3.2).

Shape suffixes: B batch, C channels, H, W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.efficientnet_lite import SameConv2d

LOGIT_GRID = 16  # logits are pooled to 16 x 16, whatever the picture's size
NEGATIVE_SLOPE = 0.1


class BlurDownsample(nn.Module):
    """Anti-aliased halving: the fixed binomial kernel [1, 3, 3, 1] in both directions, stride 2, SAME padding."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / taps.sum() ** 2)[None, None])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        pads = []
        for size in x_BCHW.shape[:1:-1]:
            total = max((-(-size // 2) - 1) * 2 + 4 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x_BCHW, pads), self.kernel.expand(channels, -1, -1, -1), stride=2, groups=channels)


class PatchDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] -> logits [B, 1, 16, 16]: high means real."""

    def __init__(self, hidden_channels: int = 128, num_stages: int = 3):
        super().__init__()
        self.block_in = nn.Sequential(SameConv2d(3, hidden_channels, 5), nn.LeakyReLU(NEGATIVE_SLOPE))
        channels, blocks = hidden_channels, []
        for stage in range(num_stages):
            out_channels = hidden_channels * 2**stage
            blocks.append(
                nn.Sequential(
                    SameConv2d(channels, out_channels, 3),
                    BlurDownsample(),
                    nn.GroupNorm(32, out_channels),
                    nn.LeakyReLU(NEGATIVE_SLOPE),
                )
            )
            channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.AdaptiveMaxPool2d((LOGIT_GRID, LOGIT_GRID))
        self.to_logits = nn.Sequential(
            SameConv2d(channels, channels, 1), nn.LeakyReLU(NEGATIVE_SLOPE), SameConv2d(channels, 1, 5)
        )

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        x_BCHW = self.block_in(pixels_B3HW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return self.to_logits(self.pool(x_BCHW))
