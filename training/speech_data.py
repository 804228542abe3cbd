"""Training speech in an order that needs no state.

As with pictures (`data.py`), which clip comes at which place and where it is cut is a pure function of the seed and the
sample's global position in the run; so a resumed run continues exactly, with any number of workers and processes.

Shape suffixes: B batch, T samples.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.audio import Waveform, list_audio, open_audio, read_audio
from ..core.errors import InvalidInput, MediatokError
from ..core.files import read_limited
from .data import MAX_BROKEN_IN_A_ROW, SampleOrder, _Positions, is_held_out
from .recipe import Count, Fraction, Positive, Section

logger = logging.getLogger(__name__)
SPLITS_FILE = "splits.json"
SPLITS = ("train", "val", "test")
MAX_SPLITS_BYTES = 64 * 2**20


class SpeechDataRecipe(Section):
    """Speech to train on, mono at the model's `sample_rate`.

    train, val: folders of audio, searched recursively. Without `val`, the clips of `train` are divided by a
    `splits.json` ({"train": [file stems], "val": [...], "test": [...]}) in it or in a folder within for the clips
    there; others by a hash of their names, a tenth for validation.
    seconds: length of the random crop of a clip, rounded to whole frames; shorter clips are padded with zeros.
    min_gain: a crop is scaled by a random factor between this and 1; 1 leaves the loudness alone.
    in_memory: keep all clips decoded (None: when they fit `memory_mib`); otherwise only the crop's file is read.
    """

    train: str
    val: str | None = None
    seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    min_gain: Fraction = 1.0
    in_memory: bool | None = None
    memory_mib: Positive = 1024
    num_workers: Count = 0
    max_val_clips: Positive = 256


class SpeechFolder:
    """A numbered collection: all clips below a folder, sorted by path.

    split: "train", "val" or "test" by the nearest `splits.json`, in a clip's folder or above, up to `folder`; without
    one "val" (and "test") is a tenth of the clips by a hash of the file's stem, "train" the rest. None keeps all.
    """

    def __init__(self, folder: str | Path, split: str | None = None):
        if not Path(folder).is_dir():
            raise InvalidInput(f"{folder} is not a folder of audio; `make data` fetches the recipes' speech")
        self.paths = list_audio(folder)
        if split is not None:
            nearest: dict[Path, dict[str, set[str]] | None] = {Path(folder).parent: None}
            self.paths = [path for path in self.paths if _is_in(path, split, _splits_of(path.parent, nearest))]
        if not self.paths:
            raise InvalidInput(f"{folder} holds no audio{f' for the {split} split' if split else ''}")

    def __len__(self) -> int:
        return len(self.paths)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All indices once, shuffled by `rng`."""
        return rng.permutation(len(self))

    def total_samples(self, sample_rate: int) -> float:
        """How many samples all clips have, by their headers; unreadable clips and lengths count as none."""
        total = 0.0
        for path in self.paths:
            try:
                total += (open_audio(path).seconds or 0.0) * sample_rate
            except MediatokError:
                continue
        return total


def _splits_of(folder: Path, known: dict[Path, dict[str, set[str]] | None]) -> dict[str, set[str]] | None:
    """The nearest splits at `folder` or above; `known` has those of the folder where the search ends."""
    if folder not in known:
        own = read_splits(folder)
        known[folder] = _splits_of(folder.parent, known) if own is None else own
    return known[folder]


def _is_in(path: Path, split: str, splits: dict[str, set[str]] | None) -> bool:
    return is_held_out(path.stem) == (split != "train") if splits is None else path.stem in splits[split]


def read_splits(folder: str | Path) -> dict[str, set[str]] | None:
    """The stems of each split by `folder`'s `splits.json`; None without one.

    Raises:
        InvalidInput: the file is something else.
    """
    path = Path(folder) / SPLITS_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(read_limited(path, MAX_SPLITS_BYTES))
        splits = {split: values.get(split, []) for split in SPLITS}
        if not all(isinstance(name, str) for names in splits.values() for name in names):
            raise TypeError
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidInput(f'{path} must look like {{"train": ["name", ...], "val": [...], "test": [...]}}') from error
    return {split: set(names) for split, names in splits.items()}


class TrainingSpeech(Dataset):
    """Item `position` is the crop at that place of the endless sample order of `seed`: fp32 [num_samples]."""

    def __init__(self, source: SpeechFolder, recipe: SpeechDataRecipe, sample_rate: int, num_samples: int, seed: int):
        self.source, self.recipe, self.seed = source, recipe, seed
        self.sample_rate, self.num_samples = sample_rate, num_samples
        self.order = SampleOrder(source, seed)
        keep = recipe.in_memory
        if keep is None:
            keep = source.total_samples(sample_rate) * 2 <= recipe.memory_mib * 2**20
        # Kept as int16, which is what nearly all files hold: half the memory.
        self._clips = [_to_int16(self._read(index)) for index in range(len(source))] if keep else None

    def __getitem__(self, position: int) -> Tensor:
        index = self.order.index(position)
        clip_T = _to_float(_to_int16(self._read(index)) if self._clips is None else self._clips[index])
        rng = np.random.default_rng([self.seed, position, 1])
        start = int(rng.integers(max(clip_T.shape[0] - self.num_samples, 0) + 1))
        crop_T = clip_T[start : start + self.num_samples]
        crop_T = F.pad(crop_T, (0, self.num_samples - crop_T.shape[0]))
        if self.recipe.min_gain < 1:
            crop_T = crop_T * float(rng.uniform(self.recipe.min_gain, 1))
        return crop_T

    def _read(self, index: int) -> Tensor:
        """Clip `index`, fp32 [T]. A broken one is replaced by the next whole one: it does not end a long run."""
        for attempt in range(MAX_BROKEN_IN_A_ROW):
            try:
                path = self.source.paths[(index + attempt) % len(self.source)]
                return read_audio(path, self.sample_rate).samples[0]
            except MediatokError as error:
                logger.warning("skipped a broken clip: %s", error)
                last_error = error
        raise InvalidInput(f"{MAX_BROKEN_IN_A_ROW} broken clips in a row; the last: {last_error}")


def speech_batches(
    speech: TrainingSpeech, first_batch: int, batch_size: int, process: int = 0, num_processes: int = 1
) -> Iterator[Tensor]:
    """Endless batches fp32 [B, T] of one process, from batch number `first_batch` on."""
    workers = speech.recipe.num_workers
    loader = DataLoader(
        speech,
        batch_sampler=_Positions(first_batch, batch_size, process, num_processes),
        num_workers=workers,
        generator=torch.Generator(),  # keeps the loader's hands off the global generator
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def validation_clips(source: SpeechFolder, sample_rate: int, limit: int) -> list[Waveform]:
    """The first `limit` clips, whole, mono at `sample_rate`."""
    return [read_audio(path, sample_rate) for path in source.paths[:limit]]


def _to_int16(clip_T: Tensor) -> Tensor:
    return (clip_T * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)


def _to_float(clip_T: Tensor) -> Tensor:
    return clip_T.float() / 2**15
