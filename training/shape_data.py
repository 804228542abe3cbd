"""Training shapes in an order that needs no state, from the shards of `shape_shards.py`.

As with pictures (`data.py`), which shape comes at which place and how it is turned and stretched is a pure function of
the seed and the sample's global position in the run; so a resumed run continues exactly, with any number of workers and
processes.

Shape suffixes: B batch, N surface points, Q queries (uniform ones first, then near ones), V validation shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.errors import InvalidInput, MediatokError
from ..core.files import read_limited
from ..core.meshes import BOX_FILL
from .data import SampleOrder, _Positions
from .recipe import Count, Fraction, Positive, Section
from .shape_shards import COORDINATE_STEPS, FORMAT, INDEX, KEPT_FACTS

MAX_INDEX_BYTES = 64 * 2**20
SPARE = 3  # times as many stored queries are looked at as are needed: some leave the box when the shape is turned
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # points [B, N, 3], normals, queries [B, Q, 3], inside bool [B, Q]


class ShapeDataRecipe(Section):
    """Shapes to train on, in the box [-1, 1]^3.

    train: folders of shards, of which the training split is used; name one twice to see its shapes twice as often.
    val: folders of whose shapes the validation split is used; default the first of `train`.
    points: of the surface, that the encoder reads. uniform_queries, near_queries: where the decoder is asked.
    mirror: probability of a mirror image. turned: share of the shapes turned about the up axis (y) by any angle, the
    others by whole quarters. min_scale: each axis is scaled by a factor from this to its inverse, then the shape is
    normalised again; 1 leaves proportions alone.
    """

    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    val: tuple[Path, ...] = ()
    points: Positive = 2048
    uniform_queries: Positive = 1024
    near_queries: Positive = 1024
    mirror: Fraction = 0.5
    turned: Fraction = 0.5
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.8
    num_workers: Count = 0
    max_val_shapes: Positive = 128


@dataclass(frozen=True)
class ShapeEntry:
    """A shape of a shard: its file, key and facts ("name", "category", "object", "split", ...)."""

    file: Path
    key: str
    facts: dict[str, str]


class ShapeShards:
    """A numbered collection: the shapes of one split in several folders of shards, in their order."""

    def __init__(self, folders: tuple[Path, ...], split: str):
        self.entries: list[ShapeEntry] = []
        self.num_surface = self.num_queries = 2**31
        for folder in folders:
            index = read_index(folder)
            self.num_surface = min(self.num_surface, index["surface"])
            self.num_queries = min(self.num_queries, index["queries"])
            for key, facts in sorted(index["shapes"].items()):
                if facts["split"] == split:
                    self.entries.append(ShapeEntry(Path(folder) / facts["shard"], key, facts))
        if not self.entries:
            raise InvalidInput(f"{', '.join(map(str, folders))}: no shapes for the {split} split")
        self._open = lru_cache(maxsize=None)(_open_shard)

    def __len__(self) -> int:
        return len(self.entries)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All indices once, shuffled by `rng`."""
        return rng.permutation(len(self))

    def surface(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """All stored points of the surface and their normals, fp32 [N, 3]."""
        points_N3, normals_N3 = (self._read(index, kind) for kind in ("points", "normals"))
        normals_N3 = normals_N3.astype(np.float32)
        normals_N3 /= np.linalg.norm(normals_N3, axis=1, keepdims=True).clip(1e-6)
        return points_N3.astype(np.float32) / COORDINATE_STEPS, normals_N3

    def queries(self, index: int, kind: str, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` stored places from number `start` on, around the end: fp32 [count, 3], bool [count]."""
        chosen = np.arange(start, start + count) % self.num_queries
        places = self._read(index, kind)[chosen].astype(np.float32) / COORDINATE_STEPS
        return places, np.unpackbits(self._read(index, f"{kind}_inside"))[chosen].astype(bool)

    def _read(self, index: int, kind: str) -> np.ndarray:
        entry = self.entries[index]
        return self._open(entry.file).get_tensor(f"{entry.key}.{kind}")


def read_index(folder: str | Path) -> dict:
    """The index of a folder of shards; InvalidInput if it is none."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(read_limited(path, MAX_INDEX_BYTES))
        if index["format"] != FORMAT or not all(
            set(facts) <= {*KEPT_FACTS, "shard"} and Path(facts["shard"]).name == facts["shard"] and facts["split"]
            for facts in index["shapes"].values()
        ):
            raise ValueError
        if min(index["surface"], index["queries"]) < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, MediatokError):
            raise InvalidInput(f"{error}; `python -m mediatok.training.shape_shards` makes shards") from error
        raise InvalidInput(f"{path} is no index of shape shards") from error
    return index


def _open_shard(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"shard {path} cannot be read: {error}") from error


class TrainingShapes(Dataset):
    """Item `position` is the sample at that place of the endless order of `seed`: a row of a `Batch`."""

    def __init__(self, source: ShapeShards, recipe: ShapeDataRecipe, seed: int):
        self.source, self.recipe, self.seed = source, recipe, seed
        self.order = SampleOrder(source, seed)
        check_counts(source, recipe)

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        index, recipe = self.order.index(position), self.recipe
        rng = np.random.default_rng([self.seed, position, 1])
        points_N3, normals_N3 = self.source.surface(index)
        move = Move.drawn(points_N3, recipe, rng)
        start = int(rng.integers(len(points_N3)))
        chosen = np.arange(start, start + recipe.points) % len(points_N3)
        uniform = self._uniform(index, move, recipe.uniform_queries, rng)
        near = self._near(index, move, recipe.near_queries, rng)
        places_Q3, inside_Q = (np.concatenate(parts) for parts in zip(uniform, near, strict=True))
        arrays = move(points_N3[chosen]), move.normals(normals_N3[chosen]), places_Q3, inside_Q
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)

    def _uniform(self, index: int, move: Move, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Places uniform in the box of the moved shape.

        Where the moved box does not reach, nothing is stored, and nothing is inside; elsewhere, the stored places that
        are still in the box lie uniformly.
        """
        places_Q3 = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
        inside_Q = np.zeros(count, dtype=bool)
        is_stored_Q = (np.abs(move.back(places_Q3)) <= 1).all(axis=1)
        places_Q3[is_stored_Q], inside_Q[is_stored_Q] = self._stored(
            index, "uniform", move, int(is_stored_Q.sum()), rng
        )  # fmt: skip
        return places_Q3, inside_Q

    def _near(self, index: int, move: Move, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._stored(index, "near", move, count, rng)

    def _stored(
        self, index: int, kind: str, move: Move, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """`count` stored places, moved, of those that are still in the box; some come twice where too few are."""
        looked_at = min(SPARE * count, self.source.num_queries)
        start = int(rng.integers(self.source.num_queries))
        places_M3, inside_M = self.source.queries(index, kind, start, looked_at)
        places_M3 = move(places_M3)
        kept = np.flatnonzero((np.abs(places_M3) <= 1).all(axis=1))
        kept = np.resize(kept, count) if len(kept) else np.zeros(count, dtype=np.int64)
        return places_M3[kept], inside_M[kept]


@dataclass(frozen=True)
class Move:
    """A linear map of the shape, and back into the box: p -> scale * (matrix p - centre)."""

    matrix: np.ndarray
    centre: np.ndarray
    scale: float

    @classmethod
    def drawn(cls, points_N3: np.ndarray, recipe: ShapeDataRecipe, rng: np.random.Generator) -> Move:
        """A random mirror image, stretched and turned about y as `recipe` says."""
        is_mirrored, is_turned = rng.random() < recipe.mirror, rng.random() < recipe.turned
        angle = 2 * math.pi * rng.random() if is_turned else math.pi / 2 * int(rng.integers(4))
        limit = abs(math.log(recipe.min_scale))
        stretch = np.exp(rng.uniform(-limit, limit, 3)) * np.array([-1.0 if is_mirrored else 1.0, 1.0, 1.0])
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
        matrix = turn * stretch  # stretched first
        moved_N3 = points_N3 @ matrix.T
        low, high = moved_N3.min(axis=0), moved_N3.max(axis=0)
        return cls(matrix, (low + high) / 2, 2 * BOX_FILL / max(float((high - low).max()), 1e-6))

    def __call__(self, places_N3: np.ndarray) -> np.ndarray:
        return ((places_N3 @ self.matrix.T - self.centre) * self.scale).astype(np.float32)

    def back(self, places_N3: np.ndarray) -> np.ndarray:
        """Where places of the new box were in the old one."""
        return (places_N3 / self.scale + self.centre) @ np.linalg.inv(self.matrix).T

    def normals(self, normals_N3: np.ndarray) -> np.ndarray:
        """Unit normals [N, 3] of the moved surface; they turn as gradients do."""
        moved_N3 = normals_N3 @ np.linalg.inv(self.matrix)
        return (moved_N3 / np.linalg.norm(moved_N3, axis=1, keepdims=True).clip(1e-6)).astype(np.float32)


def shape_batches(
    shapes: TrainingShapes, first_batch: int, batch_size: int, process: int = 0, num_processes: int = 1
) -> Iterator[Batch]:
    """Endless batches of one process, from batch number `first_batch` on."""
    workers = shapes.recipe.num_workers
    loader = DataLoader(
        shapes,
        batch_sampler=_Positions(first_batch, batch_size, process, num_processes),
        num_workers=workers,
        generator=torch.Generator(),  # keeps the loader's hands off the global generator
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def validation_shapes(source: ShapeShards, recipe: ShapeDataRecipe, num_queries: int) -> list[Batch]:
    """The first shapes as they are, each a batch of one, with `num_queries` places of either kind."""
    check_counts(source, recipe)
    count = min(num_queries, source.num_queries)
    batches = []
    for index in range(min(len(source), recipe.max_val_shapes)):
        points_N3, normals_N3 = (array[: recipe.points] for array in source.surface(index))
        asked = [source.queries(index, kind, 0, count) for kind in ("uniform", "near")]
        places_Q3, inside_Q = (np.concatenate(parts) for parts in zip(*asked, strict=True))
        arrays = points_N3, normals_N3, places_Q3, inside_Q
        batches.append(tuple(torch.from_numpy(array)[None] for array in arrays))
    return batches


def check_counts(source: ShapeShards, recipe: ShapeDataRecipe) -> None:
    """Raise InvalidInput when more points are asked for than the shards hold."""
    for name, wanted, stored in (
        ("points", recipe.points, source.num_surface),
        ("uniform_queries", recipe.uniform_queries, source.num_queries),
        ("near_queries", recipe.near_queries, source.num_queries),
    ):
        if wanted > stored:
            raise InvalidInput(f"data.{name} is {wanted}, but the shards hold {stored} a shape")
