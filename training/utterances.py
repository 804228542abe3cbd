"""Whole clips and their texts for training, in batches of about one length, in an order that needs no state.

Shape suffixes: B batch, T samples or tokens, N clips.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torchaudio.functional as AF
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.audio import open_audio, read_audio
from ..core.errors import InvalidInput, InvalidRecipe, MediatokError
from .data import MAX_BROKEN_IN_A_ROW, SampleOrder, _Positions
from .recipe import Count, Positive, Section
from .text import SpokenFolder

logger = logging.getLogger(__name__)
SORTED_AT_ONCE = 16  # batches whose clips are sorted by length together
SHORTEST_SECONDS = 0.1


class UtteranceDataRecipe(Section):
    """Speech and its texts.

    train, val: folders of audio, divided as `SpeechDataRecipe` says. transcripts: of all clips; see `text.py`.
    max_seconds: longer clips are left out. speeds: a clip is played at one of these at each visit.
    in_memory: keep all clips decoded (None: when they fit `memory_mib`).
    """

    train: str
    val: str | None = None
    transcripts: Path | None = None
    max_seconds: Annotated[float, Field(gt=0, le=60)] = 20.0
    speeds: tuple[Annotated[float, Field(ge=0.5, le=2)], ...] = (0.9, 1.0, 1.1)
    in_memory: bool | None = None
    memory_mib: Positive = 1024
    num_workers: Count = 0
    max_val_clips: Positive = 256


class ByLength:
    """Numbers of clips in an order whose every `batch` neighbours are of about one length.

    The clips are shuffled, sorted within a few batches, and the batches are shuffled. What is left over of the last
    batch takes its turn in another epoch.
    """

    def __init__(self, lengths_N: Sequence[float], batch: int):
        self.lengths_N, self.batch = np.asarray(lengths_N), batch
        if len(self) == 0:
            raise InvalidRecipe(f"a batch of {batch} clips is more than there are ({len(lengths_N)})")

    def __len__(self) -> int:
        return len(self.lengths_N) // self.batch * self.batch

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """`len(self)` numbers, each at most once."""
        shuffled = rng.permutation(len(self.lengths_N))[: len(self)]
        size = SORTED_AT_ONCE * self.batch
        groups = (shuffled[first : first + size] for first in range(0, len(shuffled), size))
        batches = np.concatenate([group[np.argsort(self.lengths_N[group], kind="stable")] for group in groups])
        return rng.permutation(batches.reshape(-1, self.batch), axis=0).ravel()


class TrainingUtterances(Dataset):
    """Item `position` is the clip at that place of the endless order of `seed`, fp32 [T], and its text.

    batch: how many clips of about one length come one after the other, of all processes together.
    """

    def __init__(self, source: SpokenFolder, recipe: UtteranceDataRecipe, sample_rate: int, batch: int, seed: int):
        self.recipe, self.sample_rate, self.seed = recipe, sample_rate, seed
        seconds = [clip_seconds(path) for path in source.paths]
        kept = [i for i, length in enumerate(seconds) if SHORTEST_SECONDS <= length <= recipe.max_seconds]
        if not kept:
            raise InvalidInput(f"no clip in {recipe.train} lasts {SHORTEST_SECONDS} to {recipe.max_seconds:g} s")
        if len(kept) < len(seconds):
            logger.warning("left out %d clips that are broken, too short or too long", len(seconds) - len(kept))
        self.paths, self.texts = [source.paths[i] for i in kept], [source.texts[i] for i in kept]
        self.seconds_N = [seconds[i] for i in kept]
        self.order = SampleOrder(ByLength(self.seconds_N, batch), seed)
        keep = recipe.in_memory
        if keep is None:
            keep = sum(self.seconds_N) * sample_rate * 2 <= recipe.memory_mib * 2**20
        self._clips = [self._read(index) for index in range(len(self.paths))] if keep else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[Tensor, str]:
        clip_T, text = self.clip(self.order.index(position))
        rng = np.random.default_rng([self.seed, position, 1])
        speed = self.recipe.speeds[int(rng.integers(len(self.recipe.speeds)))] if self.recipe.speeds else 1.0
        if speed != 1:
            clip_T = AF.resample(clip_T, round(self.sample_rate * speed), self.sample_rate)
        return clip_T, text

    def clip(self, index: int) -> tuple[Tensor, str]:
        """Clip `index`, fp32 [T], and its text; in the place of a broken one, the next whole one."""
        for attempt in range(MAX_BROKEN_IN_A_ROW):
            number = (index + attempt) % len(self)
            clip_T = self._read(number) if self._clips is None else self._clips[number]
            if clip_T is not None:
                return clip_T.float() / 2**15, self.texts[number]
        raise InvalidInput(f"{MAX_BROKEN_IN_A_ROW} broken clips in a row, from {self.paths[index]} on")

    def _read(self, index: int) -> Tensor | None:
        """Clip `index` as int16, which is what nearly all files hold; None when it is broken."""
        try:
            clip_T = read_audio(self.paths[index], self.sample_rate).samples[0]
        except MediatokError as error:
            logger.warning("skipped a broken clip: %s", error)
            return None
        return (clip_T * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)


def utterance_batches(
    utterances: Dataset, collate: Callable[[list], Any], first_batch: int, batch_size: int, process: int = 0,
    num_processes: int = 1, workers: int = 0,
) -> Iterator:  # fmt: skip
    """Endless batches of one process, each what `collate` makes of `batch_size` items."""
    loader = DataLoader(
        utterances,
        batch_sampler=_Positions(first_batch, batch_size, process, num_processes),
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # keeps the loader's hands off the global generator
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def padded_batch(items: Sequence[tuple[Tensor, str]]) -> tuple[Tensor, tuple[Tensor, list[str]]]:
    """Rows [B, T] padded with zeros, their lengths and their texts."""
    rows, texts = zip(*items, strict=True)
    lengths_B = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), (lengths_B, list(texts))


def clip_seconds(path: Path) -> float:
    """How long a clip is by its header; 0 when that cannot be read."""
    try:
        return open_audio(path).seconds or 0.0
    except MediatokError:
        return 0.0
