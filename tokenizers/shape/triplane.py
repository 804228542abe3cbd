"""Three planes of features as a shape: convolutions that enlarge them, and the field that they make.

A point of the box falls on the planes (x, y), (x, z) and (z, y). What lies there, interpolated between four pixels,
goes side by side through a small network that gives the logit of being inside.

Interpolation is linear and so is the network's first layer, so that layer is applied to the pixels once instead of to
every point, and a point's first hidden vector is a weighted sum of twelve rows of one table: no features of points are
kept, and one operation reads them all.

Shape suffixes: B shapes, P points, F features, H side of a plane, W width, R rows of the table, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...core.shape_tokenizer import ShapeField
from ...nn.layers import Conv2d, GroupNorm, Linear

PLANES = ((0, 1), (0, 2), (2, 1))  # the coordinates that run along a plane's rows and columns: x, y, z are 0, 1, 2
NUM_PLANES = len(PLANES)
CHANNELS_PER_NORM = 16
NORM_EPS = 1e-6
HIDDEN_LAYERS = 4  # of the network, the first included


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(channels)
        self.conv1, self.conv2 = (Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x_BFHH: Tensor) -> Tensor:
        h_BFHH = self.conv1(F.silu(self.norm1(x_BFHH)))
        return x_BFHH + self.conv2(F.silu(self.norm2(h_BFHH)))


class PlaneDecoder(nn.Module):
    """Triplane tokens [B, 3 * h * h, W] to planes [B, 3, F, H, H].

    channels: at the sides h, 2h, 4h ... H; the last is F.

    The planes go through apart, as a batch: laid side by side, convolutions would mix the edges of planes that do not
    touch in space.
    """

    def __init__(self, width: int, channels: Sequence[int]):
        super().__init__()
        self.gradient_checkpointing = False
        self.conv_in = Conv2d(width, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(count) for count in channels)
        self.ups = nn.ModuleList(Conv2d(low, high, 3, padding=1) for low, high in pairwise(channels))
        self.norm_out = _norm(channels[-1])
        self.conv_out = Conv2d(channels[-1], channels[-1], 3, padding=1)

    def forward(self, tokens_BLW: Tensor) -> Tensor:
        side = round((tokens_BLW.shape[1] / NUM_PLANES) ** 0.5)
        x_BFHH = rearrange(tokens_BLW, "b (n y x) w -> (b n) w y x", n=NUM_PLANES, y=side, x=side)
        x_BFHH = self._run(self.blocks[0], self.conv_in(x_BFHH))
        for up, block in zip(self.ups, self.blocks[1:], strict=True):
            x_BFHH = self._run(block, up(F.interpolate(x_BFHH, scale_factor=2.0, mode="nearest")))
        x_BFHH = self.conv_out(F.silu(self.norm_out(x_BFHH)))
        return rearrange(x_BFHH, "(b n) f y x -> b n f y x", n=NUM_PLANES)

    def _run(self, block: ResBlock, x_BFHH: Tensor) -> Tensor:
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(block, x_BFHH) if checkpointed else block(x_BFHH)


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(gcd(max(1, channels // CHANNELS_PER_NORM), channels), channels, NORM_EPS)


class OccupancyHead(nn.Module):
    """The features of a point on the three planes, side by side, to a logit: linear layers with ReLU between them."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.first = Linear(NUM_PLANES * features, width)
        self.layers = nn.ModuleList(Linear(width, width) for _ in range(HIDDEN_LAYERS - 1))
        self.last = Linear(width, 1)

    def table(self, planes_BNFHH: Tensor) -> Tensor:
        """The first layer of every pixel, without its bias: fp32 rows [B * 3 * H * H, D]."""
        weight_NDF = rearrange(self.first.weight.float(), "d (n f) -> n d f", n=NUM_PLANES)
        pixels_BNRF = rearrange(planes_BNFHH.float(), "b n f y x -> b n (y x) f")
        return (pixels_BNRF @ weight_NDF.transpose(1, 2)).flatten(0, 2)

    def forward(self, sums_PD: Tensor) -> Tensor:
        """Logits [P] of the sums of a point's pixels in the table."""
        hidden_PD = F.relu(sums_PD + self.first.bias)
        for layer in self.layers:
            hidden_PD = F.relu(layer(hidden_PD))
        return self.last(hidden_PD)[..., 0]


class TriplaneField(ShapeField):
    """The shapes of planes [B, 3, F, H, H]. Points outside the box get what lies at its nearest face."""

    def __init__(self, planes_BNFHH: Tensor, head: OccupancyHead):
        self.head, self.side = head, planes_BNFHH.shape[-1]
        with torch.autocast(planes_BNFHH.device.type, enabled=False):
            self.table_RD = head.table(planes_BNFHH)

    @property
    def device(self) -> torch.device:
        return self.table_RD.device

    @property
    def _rows(self) -> int:
        """Rows of the table that are one shape's."""
        return NUM_PLANES * self.side**2

    def __len__(self) -> int:
        return self.table_RD.shape[0] // self._rows

    def __getitem__(self, index: int) -> TriplaneField:
        index = range(len(self))[index]
        one = object.__new__(TriplaneField)
        one.head, one.side = self.head, self.side
        one.table_RD = self.table_RD[index * self._rows : (index + 1) * self._rows]
        return one

    def occupancy(self, xyz_BP3: Tensor) -> Tensor:
        """Logits fp32 [B, P] of points fp32 [B, P, 3]: positive inside. Everything is computed in fp32."""
        with torch.autocast(xyz_BP3.device.type, enabled=False):
            rows_BPR, shares_BPR = pixels_of(xyz_BP3.float(), self.side)
            rows_BPR = rows_BPR + self._rows * torch.arange(len(rows_BPR), device=self.device)[:, None, None]
            sums_QD = F.embedding_bag(
                rows_BPR.flatten(0, 1), self.table_RD, mode="sum", per_sample_weights=shares_BPR.flatten(0, 1)
            )
            return self.head(sums_QD).view(xyz_BP3.shape[:2])


def pixels_of(xyz_BP3: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The twelve pixels between which points lie: rows of a shape's table, int64 [B, P, 12], and their shares.

    Pixel i of a row has its centre at -1 + (2 i + 1) / H.
    """
    place_BP3 = ((xyz_BP3 + 1) * (side / 2) - 0.5).clamp(0, side - 1)
    low_BP3 = place_BP3.long().clamp(max=max(side - 2, 0))
    share_BP3 = place_BP3 - low_BP3
    step = min(1, side - 1)
    rows, shares = [], []
    for plane, (across, down) in enumerate(PLANES):
        for dy in (0, 1):
            for dx in (0, 1):
                rows.append((plane * side + low_BP3[..., down] + dy * step) * side + low_BP3[..., across] + dx * step)
                share_x, share_y = share_BP3[..., across], share_BP3[..., down]
                shares.append((share_x if dx else 1 - share_x) * (share_y if dy else 1 - share_y))
    return torch.stack(rows, dim=-1), torch.stack(shares, dim=-1)
