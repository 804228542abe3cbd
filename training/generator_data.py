"""What a generator is trained on: the tokens or latents of labelled pictures, in an order that needs no state.

Shape suffixes: B batch, N pictures, V views of a picture (as it is, mirrored), F label fields.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import InvalidRecipe, nearest_names
from ..core.files import read_limited
from ..nn.gaussian import DiagonalGaussian
from .data import (
    ImageFolder,
    SampleOrder,
    TrainingPictures,
    batch_positions,
    centre_crops,
    to_float,
    training_batches,
    validation_pictures,
)
from .generator_recipe import GeneratorDataRecipe

logger = logging.getLogger(__name__)
MAX_LABELS_BYTES = 256 * 2**20
ENCODED_AT_ONCE = 64
LABEL, MIRROR = 2, 1  # what a random number at a place is for


class Labels:
    """The classes of a training set, and those of each picture.

    names: of all classes, the first field's first, sorted within a field. Label len(names) is "no class".
    """

    def __init__(self, recipe: GeneratorDataRecipe, folder: ImageFolder):
        self.recipe = recipe
        self._table = _read_table(recipe.labels) if recipe.labels else None
        self.fields = recipe.label_fields if self._table is not None else ("folder",)
        seen: dict[str, None] = {}
        for field in self.fields:
            seen |= dict.fromkeys(sorted({self._value(path, field) for path in folder.paths} - {""}))
        self.names = list(seen)
        if not self.names:
            raise InvalidRecipe(f"no picture in data.train has a label ({', '.join(self.fields)})")
        self._number = {name: number for number, name in enumerate(self.names)}
        for name in recipe.label_weights:
            if name.lower() not in self._number:
                raise InvalidRecipe(f"data.label_weights: unknown class {name!r}.{nearest_names(name, self.names)}")

    def of(self, path: Path) -> list[int]:
        """The class numbers [F] of a picture, one a field; "no class" where it has none."""
        return [self._number.get(self._value(path, field), len(self.names)) for field in self.fields]

    def wider(self, paths: Sequence[Path]) -> dict[str, list[str]]:
        """For each class the classes that its pictures mostly bear in the fields before its own, the nearest first."""
        numbers_NF = np.array([self.of(path) for path in paths])
        wider: dict[str, list[str]] = {}
        for field in range(1, len(self.fields)):
            for number in np.unique(numbers_NF[:, field]):
                rows_NF = numbers_NF[numbers_NF[:, field] == number, :field]
                usual = [np.bincount(column).argmax() for column in rows_NF.T[::-1]]
                if number < len(self.names):
                    wider.setdefault(self.names[number], [self.names[n] for n in usual if n < len(self.names)])
        return wider

    def weight(self, path: Path) -> float:
        weights = {name.lower(): weight for name, weight in self.recipe.label_weights.items()}
        return weights.get(self._value(path, self.fields[0]), 1.0)

    def _value(self, path: Path, field: str) -> str:
        if self._table is None:
            return path.parent.name.lower()
        return str(self._table.get(path.stem, {}).get(field, "")).lower()


class LabelledFolder(ImageFolder):
    """An image folder whose pictures come up by the weight of their class."""

    def __init__(self, folder: str, split: str | None, recipe: GeneratorDataRecipe, labels: Labels | None = None):
        if folder.endswith(".tar"):
            raise InvalidRecipe(f"generators train on image folders with labels, not on shards ({folder})")
        super().__init__(folder, split)
        self.labels = Labels(recipe, self) if labels is None else labels
        self.labels_NF = np.array([self.labels.of(path) for path in self.paths])
        weights_N = np.array([self.labels.weight(path) for path in self.paths])
        if not weights_N.sum():
            raise InvalidRecipe("data.label_weights leaves no picture to train on")
        self.shares_N = None if (weights_N == weights_N[0]).all() else weights_N / weights_N.sum()

    def order(self, rng: np.random.Generator) -> np.ndarray:
        if self.shares_N is None:
            return super().order(rng)
        return rng.choice(len(self), len(self), p=self.shares_N)

    def label_at(self, index: int, position: int, seed: int) -> int:
        """The label of picture `index` at `position` of the sample order: one of its fields'."""
        labels_F = self.labels_NF[index]
        if len(labels_F) == 1:
            return int(labels_F[0])
        return int(np.random.default_rng([seed, position, LABEL]).choice(labels_F))


class EncodedPictures:
    """Every picture of a folder, and its mirror image, encoded once; in memory, and in a file for the next start."""

    def __init__(self, folder: LabelledFolder, tokenizer, recipe: GeneratorDataRecipe, seed: int, cache: Path):
        self.folder, self.seed = folder, seed
        self.flip = recipe.flip
        self.order = SampleOrder(folder, seed)
        self.stored_VN = _encode_all(folder, tokenizer, 2 if recipe.flip else 1, cache)

    def batches(
        self, first_batch: int, batch_size: int, process: int, num_processes: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (stored content [B, ...], labels [B]) of one process."""
        for positions in batch_positions(first_batch, batch_size, process, num_processes):
            indices = [self.order.index(position) for position in positions]
            pairs = list(zip(indices, positions, strict=True))
            views = [self._is_mirrored(position) for position in positions]
            labels = [self.folder.label_at(index, position, self.seed) for index, position in pairs]
            yield self.stored_VN[torch.tensor(views).long(), torch.tensor(indices)], torch.tensor(labels)

    def _is_mirrored(self, position: int) -> bool:
        return bool(self.flip) and np.random.default_rng([self.seed, position, MIRROR]).random() < self.flip


class PicturesOnTheFly:
    """Augmented pictures, encoded at each visit."""

    def __init__(self, folder: LabelledFolder, tokenizer, recipe: GeneratorDataRecipe, seed: int):
        self.folder, self.tokenizer, self.seed = folder, tokenizer, seed
        self.pictures = _WithLabels(folder, recipe, tokenizer.image_size, seed)

    def batches(
        self, first_batch: int, batch_size: int, process: int, num_processes: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (stored content [B, ...], labels [B]) of one process."""
        for pixels, labels in training_batches(self.pictures, first_batch, batch_size, process, num_processes):
            yield stored_content(self.tokenizer, to_float(pixels)), torch.tensor(labels)


class _WithLabels(TrainingPictures):
    """Training pictures whose caption is their class number."""

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        pixels, _ = super().__getitem__(position)
        return pixels, self.source.label_at(self.order.index(position), position, self.seed)


@torch.no_grad()
def stored_content(tokenizer, pixels_B3HW: Tensor) -> Tensor:
    """What a tokenizer makes of pixels before anything is drawn: ids int64 [B, L], or moments fp32 [B, 2C, G, G]."""
    pixels_B3HW = pixels_B3HW.to(tokenizer.device)
    return tokenizer.encode_moments(pixels_B3HW) if tokenizer.is_continuous else tokenizer.encode_pixels(pixels_B3HW)


def to_content(stored: Tensor, tokenizer, rng: torch.Generator | None) -> Tensor:
    """Ids, or one draw of the scaled latents."""
    if not stored.is_floating_point():
        return stored.long()
    return DiagonalGaussian(stored.float()).sample(rng) * tokenizer.config.scaling_factor


def validation_content(folder: LabelledFolder, tokenizer, limit: int) -> tuple[Tensor, Tensor]:
    """Stored content of the first `limit` pictures, and the label of their first field."""
    pixels, _ = validation_pictures(folder, tokenizer.image_size, limit)
    stored = [stored_content(tokenizer, to_float(batch)).cpu() for batch in pixels.split(ENCODED_AT_ONCE)]
    return torch.cat(stored), torch.from_numpy(folder.labels_NF[: len(pixels), 0])


def _encode_all(folder: LabelledFolder, tokenizer, num_views: int, cache: Path) -> Tensor:
    """Stored content [V, N, ...], read from `cache` when that is of the same pictures and tokenizer."""
    listing = "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in folder.paths)
    key = hashlib.sha256(f"{tokenizer.fingerprint} {num_views}\n{listing}".encode()).hexdigest()
    try:
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("content")
    except (SafetensorError, OSError):
        pass  # not there yet, or cut short
    views: list[list[Tensor]] = [[] for _ in range(num_views)]
    for start in range(0, len(folder), ENCODED_AT_ONCE):
        batch, _ = centre_crops(folder, tokenizer.image_size, range(len(folder))[start : start + ENCODED_AT_ONCE])
        for view in range(num_views):
            stored = stored_content(tokenizer, to_float(batch.flip(-1) if view else batch)).cpu()
            views[view].append(stored.half() if stored.is_floating_point() else stored.int())
        if start // ENCODED_AT_ONCE % 20 == 0:
            logger.info("encoded %d of %d pictures", start + len(batch), len(folder))
    content = torch.stack([torch.cat(view) for view in views]).contiguous()
    cache.parent.mkdir(parents=True, exist_ok=True)
    staged = cache.with_suffix(".writing")
    save_file({"content": content}, staged, {"key": key})
    staged.replace(cache)
    return content


def _read_table(path: Path) -> dict[str, dict]:
    try:
        table = json.loads(read_limited(path, MAX_LABELS_BYTES))
    except ValueError as error:
        raise InvalidRecipe(f"data.labels {path} cannot be read: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise InvalidRecipe(f"data.labels {path} must map file stems to fields: {{stem: {{field: value}}}}")
    return table
