"""Overlapping tiles: how a picture of any size becomes squares of one size, and how the squares blend back.

Tiles are spread evenly over each axis with an overlap of at least an eighth of their side; in the overlaps they are
mixed with weights that fall off linearly towards a tile's edge, so that no seam shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InvalidTokens, LimitExceeded
from .tokens import ImageFrame

MAX_TILED_SIDE = 4096


@dataclass(frozen=True)
class TileGrid:
    """`rows` x `cols` tiles of side `size` over a picture of `width` x `height` pixels, in row-major order."""

    width: int
    height: int
    size: int
    rows: int
    cols: int

    @classmethod
    def cover(cls, width: int, height: int, size: int) -> TileGrid:
        """The grid with the fewest tiles that covers the picture; LimitExceeded above 4096 pixels a side."""
        if max(width, height) > MAX_TILED_SIDE:
            raise LimitExceeded(f"{width}x{height} pixels are too large to tile; the limit is {MAX_TILED_SIDE} a side")
        return cls(width, height, size, _count(height, size), _count(width, size))

    @classmethod
    def of_frame(cls, frame: ImageFrame, size: int) -> TileGrid:
        """The grid that a tiled item of `Tokens` was made with; InvalidTokens if its tile counts are not ours."""
        grid = cls(frame.width, frame.height, size, frame.rows, frame.cols)
        if (frame.rows, frame.cols) != (_count(frame.height, size), _count(frame.width, size)):
            raise InvalidTokens(
                f"{frame.rows}x{frame.cols} tiles do not fit a picture of {frame.width}x{frame.height} pixels"
            )
        return grid

    @property
    def num_tiles(self) -> int:
        return self.rows * self.cols

    def corners(self) -> list[tuple[int, int]]:
        """(top, left) of every tile."""
        tops, lefts = _starts(self.height, self.size, self.rows), _starts(self.width, self.size, self.cols)
        return [(top, left) for top in tops for left in lefts]

    def split(self, pixels_3HW: Tensor) -> Tensor:
        """Tiles [rows*cols, 3, size, size]; a picture smaller than a tile is extended by its edge pixels."""
        missing = (0, max(self.size - self.width, 0), 0, max(self.size - self.height, 0))
        if any(missing):
            pixels_3HW = F.pad(pixels_3HW[None], missing, mode="replicate")[0]
        return torch.stack([pixels_3HW[:, y : y + self.size, x : x + self.size] for y, x in self.corners()])

    def canvas(self) -> Canvas:
        """An empty picture to paste decoded tiles on."""
        return Canvas(self)


class Canvas:
    """Accumulates weighted tiles; `picture()` is their blend."""

    def __init__(self, grid: TileGrid):
        self.grid, self.corners = grid, grid.corners()
        height, width = max(grid.height, grid.size), max(grid.width, grid.size)
        self.sum_3HW, self.weight_HW = torch.zeros(3, height, width), torch.zeros(height, width)
        ramp = torch.minimum(torch.arange(grid.size) + 1, grid.size - torch.arange(grid.size)).float()
        ramp = ramp.clamp(max=max(grid.size // 8, 1))
        self.window = ramp[:, None] * ramp[None, :]

    def paste(self, indices: list[int], tiles_R3SS: Tensor) -> None:
        """Add the decoded tiles with the given positions in the grid."""
        size = self.grid.size
        for index, tile in zip(indices, tiles_R3SS, strict=True):
            y, x = self.corners[index]
            self.sum_3HW[:, y : y + size, x : x + size] += tile * self.window
            self.weight_HW[y : y + size, x : x + size] += self.window

    def picture(self) -> Tensor:
        """Pixels fp32 [3, height, width] once every tile is pasted."""
        blended = self.sum_3HW.div_(self.weight_HW)
        return blended[:, : self.grid.height, : self.grid.width]


def _count(length: int, size: int) -> int:
    overlap = size // 8
    return 1 if length <= size else math.ceil((length - overlap) / (size - overlap))


def _starts(length: int, size: int, count: int) -> list[int]:
    return [0] if count == 1 else [round(i * (length - size) / (count - 1)) for i in range(count)]
