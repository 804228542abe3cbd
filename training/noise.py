"""Making clean speech noisy, one way or several at a time: what enhancement is trained and tested on.

Noise is made here (white, pink and brown, mains hum, babble of other clips) or taken from a folder; rooms are Polack's
statistical model (a decaying Gaussian tail behind the direct sound); clipping is hard. Every draw comes from the
generator that is given, so that a sample of a run is a function of its place in it.

Shape suffixes: T samples, K samples of a room's response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import torchaudio.functional as AF
from pydantic import Field, model_validator
from torch import Tensor

from .recipe import Fraction, Section

KINDS = ("white", "pink", "brown", "hum", "babble", "recorded")
COLOURS = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude falls with frequency to this power
LOWEST_HZ = 20.0
BABBLE_VOICES = (4, 8)
SILENCE = 1e-8  # mean square below which a clip has no loudness to compare noise with

Seconds = Annotated[float, Field(ge=0.02, le=3)]


class NoiseRecipe(Section):
    """How clean speech is spoiled. The probabilities are those of the reproduction of GenSE (arXiv 2507.09929).

    snr: lowest and highest ratio of speech to noise in dB. second_noise: probability of another noise on top.
    reverb: probability of a room, rt60: its lowest and highest reverberation time in seconds, direct: the lowest and
    highest ratio of direct to reverberant sound in dB. clip: probability of clipping a clip at 0.2 to 0.8 of its peak.
    kinds: which noises are made. folder: of recorded noise, which the kind "recorded" needs.
    """

    snr: tuple[float, float] = (-5.0, 20.0)
    second_noise: Fraction = 0.2
    reverb: Fraction = 0.4
    rt60: tuple[Seconds, Seconds] = (0.1, 0.8)
    direct: tuple[float, float] = (0.0, 15.0)
    clip: Fraction = 0.1
    kinds: tuple[str, ...] = ("white", "pink", "brown", "hum", "babble")
    folder: str | None = None

    @model_validator(mode="after")
    def _fits(self):
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, not {', '.join(unknown) or 'none'}")
        if ("recorded" in self.kinds) != (self.folder is not None):
            raise ValueError("the kind 'recorded' and folder= (of noise recordings) go together")
        for name in ("snr", "rt60", "direct"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (lowest, highest), not ({low}, {high})")
        return self


def corrupt(
    clean_T: Tensor,
    recipe: NoiseRecipe,
    rng: np.random.Generator,
    sample_rate: int = 16000,
    others: Sequence[Tensor] = (),
    recorded: Sequence[Tensor] = (),
) -> Tensor:
    """A noisy version of `clean_T`, fp32 [T] in [-1, 1], of the same length and alignment.

    others: clips [T'] of other moments or speakers for babble; without any, pink noise takes its place.
    recorded: clips of noise for the kind "recorded".
    """
    noisy_T = clean_T
    if rng.random() < recipe.reverb:
        response_K = room_response(rng.uniform(*recipe.rt60), rng.uniform(*recipe.direct), rng, sample_rate)
        noisy_T = AF.fftconvolve(noisy_T, response_K)[: len(clean_T)]
    for _ in range(2 if rng.random() < recipe.second_noise else 1):
        kind = recipe.kinds[int(rng.integers(len(recipe.kinds)))]
        noise_T = make_noise(kind, len(clean_T), rng, sample_rate, others, recorded)
        noisy_T = add_noise(noisy_T, noise_T, rng.uniform(*recipe.snr))
    if rng.random() < recipe.clip:
        limit = float(noisy_T.abs().max()) * rng.uniform(0.2, 0.8)
        noisy_T = noisy_T.clamp(-limit, limit)
    return noisy_T / noisy_T.abs().max().clamp(min=1.0)


def add_noise(clean_T: Tensor, noise_T: Tensor, snr: float) -> Tensor:
    """`clean_T` with `noise_T` at a ratio of `snr` dB between their mean squares; silence stays silent."""
    if float(clean_T.square().mean()) < SILENCE or float(noise_T.square().mean()) == 0:
        return clean_T
    return AF.add_noise(clean_T, noise_T, torch.tensor(float(snr)))


def make_noise(
    kind: str,
    length: int,
    rng: np.random.Generator,
    sample_rate: int = 16000,
    others: Sequence[Tensor] = (),
    recorded: Sequence[Tensor] = (),
) -> Tensor:
    """Noise of one of `KINDS`, fp32 [length], of unit mean square."""
    if kind == "babble" and not others:
        kind = "pink"
    if kind in COLOURS:
        noise_T = _coloured(COLOURS[kind], length, rng, sample_rate)
    elif kind == "hum":
        noise_T = _hum(length, rng, sample_rate)
    elif kind == "babble":
        voices = rng.integers(BABBLE_VOICES[0], BABBLE_VOICES[1] + 1)
        noise_T = sum(_normalised(_excerpt(others, length, rng)) for _ in range(voices))
    else:
        noise_T = _excerpt(recorded, length, rng)
    return _normalised(noise_T)


def room_response(rt60: float, direct: float, rng: np.random.Generator, sample_rate: int = 16000) -> Tensor:
    """Response of a room, fp32 [K]: the direct sound at sample 0, then a tail that falls by 60 dB within `rt60` s.

    direct: ratio of the direct sound's energy to the tail's, in dB.
    """
    time_K = np.arange(1, max(2, round(rt60 * sample_rate))) / sample_rate
    tail_K = rng.standard_normal(len(time_K)) * np.exp(-math.log(1e3) * time_K / rt60)
    tail_K *= 10 ** (-direct / 20) / np.linalg.norm(tail_K)
    return torch.from_numpy(np.concatenate([[1.0], tail_K]).astype(np.float32))


def _coloured(power: float, length: int, rng: np.random.Generator, sample_rate: int) -> Tensor:
    spectrum = np.fft.rfft(rng.standard_normal(length))
    hz = np.maximum(np.fft.rfftfreq(length, 1 / sample_rate), LOWEST_HZ)
    return torch.from_numpy(np.fft.irfft(spectrum / hz**power, length).astype(np.float32))


def _hum(length: int, rng: np.random.Generator, sample_rate: int) -> Tensor:
    """Mains hum: 50 or 60 Hz and its harmonics, with a little hiss."""
    time_T = np.arange(length) / sample_rate
    base = 50.0 if rng.random() < 0.5 else 60.0
    wave_T = 0.02 * rng.standard_normal(length)
    for harmonic in range(1, 9):
        phase, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 1) / harmonic
        wave_T += strength * np.sin(2 * np.pi * base * harmonic * time_T + phase)
    return torch.from_numpy(wave_T.astype(np.float32))


def _excerpt(clips: Sequence[Tensor], length: int, rng: np.random.Generator) -> Tensor:
    """`length` samples of a random clip from a random place on, repeated where it is too short."""
    clip_T = clips[int(rng.integers(len(clips)))]
    clip_T = clip_T.roll(-int(rng.integers(len(clip_T))))
    return clip_T.repeat(-(-length // len(clip_T)))[:length]


def _normalised(wave_T: Tensor) -> Tensor:
    return wave_T / wave_T.square().mean().sqrt().clamp(min=1e-8)
