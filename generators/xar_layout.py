"""Entities, the X of next-X prediction (xAR, section 3.1): how a latent map becomes a sequence of token groups.

Shape suffixes: B batch, C channels, G grid side, T tokens of the sequence, E entities, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.sizes import check_sizes

MAX_GRID = 128
MAX_TOKENS = MAX_GRID**2  # of a sequence: what each may see is written out as [T, T]
KINDS = ("patch", "cell", "subsample", "scale", "image")
ROTARY_BASE = 10000.0


@dataclass(frozen=True, eq=False)
class Layout:
    """Token groups, coordinates and entity numbers of one X.

    grid: side of the latent map. sizes: tokens of each entity, in order. coordinates_T2: fp32 row and column of each
    token on the grid. order_T: raster index of each token; None for scales, whose tokens are of resized maps.
    sides: side of each scale's map; () for the others. entity_grid: entities as rows and columns of the picture.
    """

    grid: int
    sizes: tuple[int, ...]
    coordinates_T2: Tensor
    order_T: Tensor | None = None
    sides: tuple[int, ...] = ()
    entity_grid: tuple[int, int] | None = None

    @classmethod
    def make(cls, kind: str, grid: int, size: int | tuple[int, ...] | None = None) -> Layout:
        """The layout of `kind` on a grid of side `grid`.

            patch       every token by itself, in raster order
            cell        squares of side `size`, in raster order; tokens inside in raster order
            subsample   tokens `size` apart, one group for each offset
            scale       the map resized to each side in `size`, smallest first; the last is `grid`
            image       all tokens at once

        Raises:
            InvalidInput: unknown kind, a size that does not divide the grid, or too many tokens.
        """
        check_sizes(MAX_GRID, grid=grid)
        if not isinstance(kind, str) or kind not in KINDS:
            raise InvalidInput(f"layout must be one of {', '.join(KINDS)}, not {kind!r}")
        if kind == "scale":
            return cls._scales(grid, tuple(size) if isinstance(size, (tuple, list)) else ())
        side = {"patch": 1, "image": grid}.get(kind, size)
        if isinstance(side, bool) or not isinstance(side, int) or side < 1 or grid % side:
            raise InvalidInput(f"layout {kind!r} needs a size that divides the grid {grid}, not {size!r}")
        raster = torch.arange(grid * grid).view(grid, grid)
        if kind == "subsample":
            pattern, number = "(h a) (w b) -> (a b) (h w)", side * side
        else:
            pattern, number = "(h a) (w b) -> (h w) (a b)", (grid // side) ** 2
        order_T = rearrange(raster, pattern, a=side, b=side).flatten()
        coordinates_T2 = torch.stack([order_T // grid, order_T % grid], dim=-1).float()
        entity_grid = (grid // side, grid // side) if kind in ("patch", "cell") else None
        return cls(grid, (grid * grid // number,) * number, coordinates_T2, order_T, entity_grid=entity_grid)

    @classmethod
    def _scales(cls, grid: int, sides: tuple[int, ...]) -> Layout:
        is_whole = all(isinstance(side, int) for side in sides)
        if not is_whole or sides[-1:] != (grid,) or any(a >= b for a, b in pairwise((0, *sides))):
            raise InvalidInput(f"layout 'scale' needs growing sides that end in the grid {grid}, not {sides}")
        if sum(side * side for side in sides) > MAX_TOKENS:
            raise InvalidInput(f"layout 'scale' makes sequences of at most {MAX_TOKENS} tokens; {sides} are more")
        coordinates = [torch.cartesian_prod(torch.arange(s), torch.arange(s)) * (grid / s) for s in sides]
        return cls(grid, tuple(s * s for s in sides), torch.cat(coordinates).float(), sides=sides)

    @property
    def num_entities(self) -> int:
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    def tokens_of(self, entity: int) -> slice:
        """Where an entity lies in the sequence."""
        start = sum(self.sizes[:entity])
        return slice(start, start + self.sizes[entity])

    def to_sequence(self, latents_BCGG: Tensor) -> Tensor:
        """[B, T, C]; scales are made by averaging over areas, each from the whole map."""
        if self.order_T is not None:
            return rearrange(latents_BCGG, "b c h w -> b (h w) c")[:, self.order_T.to(latents_BCGG.device)]
        maps = [F.interpolate(latents_BCGG, size=side, mode="area") for side in self.sides]
        return torch.cat([rearrange(scale, "b c h w -> b (h w) c") for scale in maps], dim=1)

    def to_latents(self, sequence_BTC: Tensor) -> Tensor:
        """[B, C, G, G]; of scales, the last one."""
        if self.order_T is None:
            raster_BTC = sequence_BTC[:, -self.sizes[-1] :]
        else:
            raster_BTC = sequence_BTC[:, self.order_T.argsort().to(sequence_BTC.device)]
        return rearrange(raster_BTC, "b (h w) c -> b c h w", h=self.grid)

    def spread(self, values_BEX: Tensor) -> Tensor:
        """Per-entity values as per-token values [B, T, X]."""
        return values_BEX.repeat_interleave(torch.tensor(self.sizes, device=values_BEX.device), dim=1)

    def groups_or_tokens(self, values_BEX: Tensor) -> Tensor:
        """Values of G groups of T / G neighbouring tokens, [B, G, X], with as few groups as there can be.

        G is E, and the values are those given, where all entities have the same size. Scales have different ones: G is
        T then, each token has its entity's values.
        """
        return values_BEX if len(set(self.sizes)) == 1 else self.spread(values_BEX)

    def entity_of_token(self) -> Tensor:
        """Entity number int64 [T] of each token."""
        return torch.arange(self.num_entities).repeat_interleave(torch.tensor(self.sizes))

    def visible(self) -> Tensor:
        """Block-causal mask, bool [T, T]: token i sees token j when j's entity is not later than i's."""
        entity_T = self.entity_of_token()
        return entity_T[:, None] >= entity_T[None, :]

    def rotary(self, head_width: int) -> Tensor:
        """Axial rotary angles as fp32 [2, T, D/2]: cosines and sines, the row's frequencies first, then the column's.

        The pair (2i, 2i + 1) of a head's channels turns by angle i (EVA-02's rotary embedding).
        """
        if head_width % 4:
            raise InvalidInput(f"rotary positions in two dimensions need a head width divisible by 4, not {head_width}")
        half = head_width // 2
        frequencies = ROTARY_BASE ** (-torch.arange(0, half, 2).float() / half)
        angles_TD = (self.coordinates_T2[:, :, None] * frequencies).flatten(1)
        return torch.stack([angles_TD.cos(), angles_TD.sin()])
