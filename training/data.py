"""Training pictures in an order that needs no state.

Every random choice - which picture comes at which place, how it is cropped and mirrored - is a pure function of the
seed and the sample's global position in the run. So a resumed run continues exactly, with any number of workers, and P
processes with a batch of B see what one process with a batch of P*B sees.

Shape suffixes: B batch, 3/H/W image, S side in pixels.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.errors import InvalidInput, MediatokError
from ..core.images import fit_square, list_images, read_image
from .recipe import DataRecipe
from .shards import MAX_CAPTION_BYTES, ShardSet, expand_shards

logger = logging.getLogger(__name__)
MAX_BROKEN_IN_A_ROW = 20


class PictureSource(Protocol):
    """A numbered collection of pictures: a folder or a set of shards."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, str]:
        """The picture (RGB) and its caption ("" if it has none)."""
        ...

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All indices once, shuffled by `rng`."""
        ...


def is_held_out(name: str) -> bool:
    """Whether a picture belongs to the validation tenth: a property of its name alone."""
    return int(hashlib.sha1(name.encode()).hexdigest(), 16) % 10 == 0


class ImageFolder:
    """All pictures below a folder, sorted by path; a caption is the text file of the same name beside the picture.

    split: "train" or "val" keeps nine tenths or one tenth by a hash of the file's stem; None keeps all.
    """

    def __init__(self, folder: str | Path, split: str | None = None):
        if not Path(folder).is_dir():
            raise InvalidInput(f"{folder} is not a folder of pictures (nor shards, which end in .tar)")
        self.paths = list_images(folder)
        if split is not None:
            self.paths = [path for path in self.paths if is_held_out(path.stem) == (split == "val")]
        if not self.paths:
            raise InvalidInput(f"{folder} holds no pictures{f' for the {split} split' if split else ''}")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Image.Image, str]:
        path = self.paths[index]
        caption = path.with_suffix(".txt")
        text = caption.read_bytes()[:MAX_CAPTION_BYTES].decode("utf-8", "replace").strip() if caption.is_file() else ""
        return read_image(path), text

    def order(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self))


def open_source(path: str, split: str | None = None) -> PictureSource:
    """Shards when `path` names `.tar` files (braces and `*` allowed), otherwise an image folder."""
    if path.endswith(".tar"):
        return ShardSet(
            expand_shards(path), None if split is None else lambda key: is_held_out(key) == (split == "val")
        )
    return ImageFolder(path, split)


class SampleOrder:
    """Which picture of `source` comes at which place of the endless sample order of `seed`."""

    def __init__(self, source: PictureSource, seed: int):
        self.source, self.seed = source, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        return int(self._epoch(epoch)[place])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return self.source.order(np.random.default_rng([self.seed, epoch, 0]))


class TrainingPictures(Dataset):
    """Item `position` is the augmented picture of that place in the endless sample order of `seed`.

    Items are (uint8 tensor [3, S, S], caption).
    """

    def __init__(self, source: PictureSource, recipe: DataRecipe, image_size: int, seed: int):
        self.source, self.recipe, self.image_size, self.seed = source, recipe, image_size, seed
        # Pictures are kept just large enough for the smallest crop to have `image_size` pixels.
        self.stored_side = math.ceil(image_size / recipe.min_scale)
        self.order = SampleOrder(source, seed)
        fits = len(source) * 3 * self.stored_side**2 <= recipe.memory_mib * 2**20
        self._pictures = None
        if fits if recipe.in_memory is None else recipe.in_memory:
            self._pictures = [self._read(index) for index in range(len(source))]

    def __getitem__(self, position: int) -> tuple[Tensor, str]:
        index = self.order.index(position)
        picture, caption = self._read(index) if self._pictures is None else self._pictures[index]
        rng = np.random.default_rng([self.seed, position, 1])
        return torch.from_numpy(self._augment(picture, rng)).permute(2, 0, 1), caption

    def _read(self, index: int) -> tuple[np.ndarray, str]:
        """Picture `index` as uint8 [H, W, 3] with its shorter edge between `image_size` and `stored_side`.

        A broken picture is replaced by the next whole one, so that one bad file does not end a long run.
        """
        for attempt in range(MAX_BROKEN_IN_A_ROW):
            try:
                image, caption = self.source.read((index + attempt) % len(self.source))
                break
            except MediatokError as error:
                logger.warning("skipped a broken picture: %s", error)
                last_error = error
        else:
            raise InvalidInput(f"{MAX_BROKEN_IN_A_ROW} broken pictures in a row; the last: {last_error}")
        shorter = min(image.size)
        side = min(max(shorter, self.image_size), self.stored_side)
        if side != shorter:
            size = [max(side, round(edge * side / shorter)) for edge in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(image), caption

    def _augment(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width, _ = picture.shape
        shorter, target = min(height, width), self.image_size
        side = shorter
        if self.recipe.min_scale < 1:
            side = max(target, round(shorter * rng.uniform(self.recipe.min_scale, 1)))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        picture = picture[top : top + side, left : left + side]
        if side != target:
            picture = np.array(Image.fromarray(picture).resize((target, target), Image.Resampling.BICUBIC))
        if rng.random() < self.recipe.flip:
            picture = picture[:, ::-1]
        return np.ascontiguousarray(picture)


def batch_positions(first_batch: int, batch_size: int, process: int, num_processes: int) -> Iterator[list[int]]:
    """Global positions of the batches of one process, endlessly, from batch number `first_batch` on."""
    batch = first_batch
    while True:
        start = (batch * num_processes + process) * batch_size
        yield list(range(start, start + batch_size))
        batch += 1


class _Positions:
    """`batch_positions` in the form a DataLoader wants."""

    def __init__(self, *args: int):
        self.args = args

    def __iter__(self) -> Iterator[list[int]]:
        return batch_positions(*self.args)


def training_batches(
    pictures: TrainingPictures, first_batch: int, batch_size: int, process: int = 0, num_processes: int = 1
) -> Iterator[tuple[Tensor, list[str]]]:
    """Endless batches (uint8 [B, 3, S, S], captions) of one process."""
    workers = pictures.recipe.num_workers
    loader = DataLoader(
        pictures,
        batch_sampler=_Positions(first_batch, batch_size, process, num_processes),
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # keeps the loader's hands off the global generator
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def _collate(items: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    pictures, captions = zip(*items, strict=True)
    return torch.stack(pictures), list(captions)


def validation_pictures(source: PictureSource, image_size: int, limit: int) -> tuple[Tensor, list[str]]:
    """The first `limit` pictures, resized and centre-cropped: uint8 [V, 3, S, S] and their captions."""
    return centre_crops(source, image_size, range(min(len(source), limit)))


def centre_crops(source: PictureSource, image_size: int, indices: Iterable[int]) -> tuple[Tensor, list[str]]:
    """Pictures `indices`, resized and centre-cropped: uint8 [V, 3, S, S] and their captions."""
    items = []
    for index in indices:
        image, caption = source.read(index)
        square = torch.from_numpy(np.array(fit_square(image, image_size)))
        items.append((square.permute(2, 0, 1).contiguous(), caption))
    return _collate(items)


def derived_seed(*parts: int) -> int:
    """A well-mixed seed of 63 bits that depends on nothing but `parts` (non-negative)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels as fp32 in [0, 1]."""
    return pixels.float() / 255
