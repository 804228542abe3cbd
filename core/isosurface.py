"""The surface of a field as a mesh: marching cubes over a grid that is evaluated coarse to fine, only near the surface.

A grid of R cells a side has (R + 1)^3 samples, nearly all of them far from the surface. Here R is halved down to a grid
that is evaluated whole. From level to level those cells are divided whose corners differ in sign; while cells are
large, so are their neighbours, and cells whose values come so near to the level, measured by how much values change
around them, that they may pass it inside. At every level the surface is then followed: whenever a cell with samples on
both sides lacks some of its corners, they are evaluated too, until there is no such cell.

So each connected piece of the dense grid's surface is found whole, or not at all, and its vertices are those of the
dense grid. What can be missed is a separate piece, a bubble or a splinter, that reaches no sample of a coarser level,
lies more than a coarse cell away from all others, and does not show in the values around it.

Shape suffixes: N points, P points with their places in the grid (int64, [P, 3]), C cells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import OnStep, report
from .errors import InvalidInput

COARSEST = 32  # cells a side of the first level, or up to twice as many
MAX_RESOLUTION = 512  # a grid of 0.7 GB with what is kept beside it
CHUNK = 2**14  # points evaluated at a time: the hidden layers of small networks then stay in the caches
REACH = 0.25  # values may go on by this share of their range in the cells around; 1/8 is right for a paraboloid
UNKNOWN, OUTSIDE, INSIDE = 1, 2, 4  # bits, so that the states of a cell's corners can be joined
CROSSED = OUTSIDE | INSIDE
CORNERS = torch.cartesian_prod(*(torch.arange(2),) * 3)  # of a cell, [8, 3]

ValuesOf = Callable[[Tensor], Tensor]


def extract_surface(
    values_of: ValuesOf, resolution: int, *, level: float = 0.0, on_step: OnStep | None = None
):  # -> trimesh.Trimesh
    """Return the surface where a field over [-1, 1]^3 passes `level`, as a `trimesh.Trimesh`.

    Args:
        values_of: fp32 values [N], on the CPU, of fp32 points [N, 3]; larger than `level` inside. NaN is outside.
        resolution: cells a side, 2 to 512; samples lie at -1 + 2 i / resolution, the box's faces included.
            An odd number cannot be halved: then every sample is evaluated.
        on_step: called as the levels, and at last the mesh, are finished; at every few points so that it can cancel.

    Vertices are in the box's coordinates, exact in scale; faces look outward. Where the inside reaches a face of the
    box the mesh is open. It is empty when nothing crosses.

    Raises:
        InvalidInput: a resolution out of range.
    """
    check_resolution(resolution)
    levels = _levels(resolution)
    grid = None
    for index, cells in enumerate(levels):
        coarser, beat = grid, partial(report, on_step, index, len(levels) + 1)
        grid = _Grid(values_of, cells, level, beat)
        if coarser is None:
            grid.evaluate_all()
        else:
            grid.take(coarser, is_last=index == len(levels) - 1)
    mesh = _march(grid)
    report(on_step, len(levels) + 1, len(levels) + 1)
    return mesh


def check_resolution(resolution: int) -> None:
    """Raise InvalidInput for a number of cells a side that is out of range."""
    if isinstance(resolution, bool) or not isinstance(resolution, int) or not 2 <= resolution <= MAX_RESOLUTION:
        raise InvalidInput(
            f"the resolution of a surface must be 2 to {MAX_RESOLUTION} cells a side, not {resolution!r}"
        )


def _levels(resolution: int) -> list[int]:
    """Cells a side of every level, coarse to fine."""
    levels = [resolution]
    while levels[0] % 2 == 0 and levels[0] // 2 >= COARSEST:
        levels.insert(0, levels[0] // 2)
    return levels


class _Grid:
    """Samples of one level: values fp32 and states uint8, both [R + 1] * 3."""

    def __init__(self, values_of: ValuesOf, cells: int, level: float, beat: Callable[[], None]):
        self.values_of, self.cells, self.level, self.beat = values_of, cells, level, beat
        self.values = torch.full((cells + 1,) * 3, level - 1.0)
        self.states = torch.full((cells + 1,) * 3, UNKNOWN, dtype=torch.uint8)

    def evaluate_all(self) -> None:
        total = self.values.numel()
        for start in range(0, total, CHUNK):
            self._evaluate(torch.arange(start, min(start + CHUNK, total)))

    def take(self, coarser: _Grid, is_last: bool) -> None:
        """Take over the samples of a grid of half as many cells, divide its cells near the surface, and follow it."""
        self.values[::2, ::2, ::2], self.states[::2, ::2, ::2] = coarser.values, coarser.states
        divided = coarser.crossed_cells() if is_last else coarser.suspected_cells()
        for axis in range(3):
            divided = divided.repeat_interleave(2, dim=axis)
        near = _joined(F.pad(divided.to(torch.uint8), (1, 1, 1, 1, 1, 1))) > 0  # corners of divided cells
        self._evaluate((near & (self.states == UNKNOWN)).flatten().nonzero()[:, 0])
        cells_C3 = (_joined(self.states) == CROSSED | UNKNOWN).nonzero()
        while len(cells_C3):
            corners = self._corners(cells_C3).flatten().unique()
            new = corners[self.states.view(-1)[corners] == UNKNOWN]
            self._evaluate(new)
            cells_C3 = self._unfinished(new)

    def crossed_cells(self) -> Tensor:
        """Bool [R] * 3: cells with corners on both sides. After `take` all their corners are known."""
        return (_joined(self.states) & CROSSED) == CROSSED

    def suspected_cells(self) -> Tensor:
        """Bool [R] * 3: crossed cells, their neighbours, and cells that may be passed between their samples."""
        unknown = self.states == UNKNOWN
        highest = _highest((self.values - self.level).masked_fill(unknown, -torch.inf))
        deepest = _highest((self.level - self.values).masked_fill(unknown, -torch.inf))
        reach = REACH * (_around(highest) + _around(deepest))  # infinite values give NaN, which suspects nothing
        is_near = (highest + reach > 0) & (deepest + reach >= 0)
        is_whole = (_joined(self.states) & UNKNOWN) == 0
        return (is_near & is_whole) | (_around(self.crossed_cells().float()) > 0)

    def _evaluate(self, places_P: Tensor) -> None:
        """Fill in the values at flat `places_P`."""
        for chunk in places_P.split(CHUNK):
            self.beat()
            values_N = self.values_of(self._xyz(chunk).float() * (2 / self.cells) - 1)
            # Any finite value outside will do for NaN: the cell's surface then lies somewhere within the cell.
            values_N = values_N.detach().float().nan_to_num(nan=self.level - 1.0).to("cpu")
            self.values.view(-1)[chunk] = values_N
            self.states.view(-1)[chunk] = torch.where(values_N > self.level, INSIDE, OUTSIDE).to(torch.uint8)

    def _unfinished(self, places_P: Tensor) -> Tensor:
        """Cells [C, 3], by their lowest corner, that have a corner in `places_P`, both sides, and an unknown corner."""
        cells_PC3 = self._xyz(places_P)[:, None] - CORNERS
        cells_C3 = cells_PC3.clamp(0, self.cells - 1).flatten(0, 1).unique(dim=0)  # those outside fall on neighbours
        states_C8 = self.states.view(-1)[self._corners(cells_C3)]
        has = [(states_C8 == state).any(dim=1) for state in (UNKNOWN, OUTSIDE, INSIDE)]
        return cells_C3[has[0] & has[1] & has[2]]

    def _corners(self, cells_C3: Tensor) -> Tensor:
        """Flat places [C, 8] of the corners of cells."""
        side = self.cells + 1
        return (cells_C3[:, None] + CORNERS) @ torch.tensor([side * side, side, 1])

    def _xyz(self, places_P: Tensor) -> Tensor:
        side = self.cells + 1
        return torch.stack([places_P // side**2, places_P // side % side, places_P % side], dim=1)


def _joined(states: Tensor) -> Tensor:
    """The states of the eight corners of every cell, or'ed: one smaller along each axis."""
    states = states[1:] | states[:-1]
    states = states[:, 1:] | states[:, :-1]
    return states[:, :, 1:] | states[:, :, :-1]


def _highest(values: Tensor) -> Tensor:
    """The largest value at the eight corners of every cell."""
    values = torch.maximum(values[1:], values[:-1])
    values = torch.maximum(values[:, 1:], values[:, :-1])
    return torch.maximum(values[:, :, 1:], values[:, :, :-1])


def _around(cells: Tensor) -> Tensor:
    """The largest value of every cell and its 26 neighbours."""
    return F.max_pool3d(cells[None], 3, stride=1, padding=1)[0]


def _march(grid: _Grid):
    """Marching cubes over the crossed cells; see `extract_surface`."""
    import trimesh
    from skimage.measure import marching_cubes

    crossed = grid.crossed_cells()
    cells_C3 = crossed.nonzero()
    if not len(cells_C3):
        return trimesh.Trimesh()
    # Only the part of the grid that holds the surface. skimage asks the mask at a cell's highest corner.
    first, last = cells_C3.amin(dim=0), cells_C3.amax(dim=0) + 1
    values = grid.values[tuple(slice(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True))]
    mask = F.pad(crossed[tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))], (1, 0) * 3)
    vertices, faces, _, _ = marching_cubes(values.numpy(), grid.level, gradient_direction="ascent", mask=mask.numpy())
    vertices = (vertices.astype(np.float64) + first.numpy()) * (2 / grid.cells) - 1
    return trimesh.Trimesh(vertices, faces, process=False)
