"""Clean speech and a noisy version of it, for training, in an order that needs no state.

Shape suffixes: B batch, T samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.audio import list_audio, read_audio
from .noise import NoiseRecipe, corrupt
from .speech_data import SpeechDataRecipe, SpeechFolder, TrainingSpeech

NOISE = 2  # what a random number at a place is for; 1 is the crop


class NoisySpeech(Dataset):
    """Item `position` is the crop at that place of `speech`, and what it becomes in noise: fp32 [T] each.

    share: of the crops that are made noisy; the others come twice as they are.
    """

    def __init__(self, speech: TrainingSpeech, noise: NoiseRecipe, share: float = 1.0):
        self.speech, self.noise, self.share = speech, noise, share
        self.recipe = speech.recipe  # for `speech_batches`
        self.recorded = [] if noise.folder is None else _recordings(noise.folder, speech.sample_rate)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        clean_T = self.speech[position]
        rng = np.random.default_rng([self.speech.seed, position, NOISE])
        if rng.random() >= self.share:
            return clean_T, clean_T
        voices = _Crops(self.speech)
        return clean_T, corrupt(clean_T, self.noise, rng, self.speech.sample_rate, voices, self.recorded)


class _Crops(Sequence):
    """A crop of each clip, made when it is asked for: the voices of babble."""

    def __init__(self, speech: TrainingSpeech):
        self.speech = speech

    def __len__(self) -> int:
        return len(self.speech.source)

    def __getitem__(self, index: int) -> Tensor:
        return self.speech[index]


def whole_frames(seconds: float, sample_rate: int, hop_length: int) -> int:
    """Samples of about `seconds`, a multiple of `hop_length`."""
    return max(1, round(seconds * sample_rate / hop_length)) * hop_length


def validation_pairs(
    source: SpeechFolder, recipe: SpeechDataRecipe, noise: NoiseRecipe, sample_rate: int, num_samples: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One crop of each of the first `max_val_clips` clips, clean and noisy, the same each time: fp32 [B, T]."""
    count = min(len(source), recipe.max_val_clips)
    fixed = recipe.model_copy(update={"min_gain": 1.0, "in_memory": False})
    pairs = NoisySpeech(TrainingSpeech(source, fixed, sample_rate, num_samples, seed=0), noise)
    clean, noisy = zip(*(pairs[position] for position in range(count)), strict=True)
    return torch.stack(clean), torch.stack(noisy)


def _recordings(folder: str, sample_rate: int) -> list[Tensor]:
    return [read_audio(path, sample_rate).samples[0] for path in list_audio(folder)]
