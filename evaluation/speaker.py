"""Whose voice it is: embeddings by the speaker encoder of Wan et al. 2018 (arXiv 1710.10467), with public weights.

The weights are the file `pretrained.pt` of the package `resemblyzer` (0.1.4, Apache-2.0), which is read as data; the
package itself is not used, nor what it depends on: `pip download --no-deps resemblyzer==0.1.4` and unzip.

Shape suffixes: T samples, L frames, M mel bands, P parts of a clip, D dimensions of an embedding.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.audio import Waveform
from ..core.errors import InvalidCheckpoint, InvalidInput
from ..core.weights import read_state_dict

RATE = 16000
WINDOW, HOP, MELS = 400, 160, 40  # samples, samples, bands
PART = 160  # frames: 1.6 s
STEP = round(RATE / 1.3 / HOP)  # frames from one part to the next
MIN_COVERAGE = 0.75  # of the last part by the clip
LOUDNESS = 10 ** (-30 / 20)  # quieter clips are made as loud as this


class SpeakerEncoder(nn.Module):
    """Three LSTM layers over mel energies; the last state, through a linear layer, is the voice."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.lstm = nn.LSTM(MELS, width, num_layers=3, batch_first=True)
        self.linear = nn.Linear(width, width)

    def forward(self, mels_PLM: Tensor) -> Tensor:
        """Unit vectors [P, D] without negative numbers."""
        _, (hidden_3PD, _) = self.lstm(mels_PLM)
        return F.normalize(F.relu(self.linear(hidden_3PD[-1])), dim=-1)

    @torch.inference_mode()
    def embed(self, clip: Waveform) -> Tensor:
        """The unit vector [D] of a clip: the mean over parts of 1.6 s.

        Raises:
            InvalidInput: a silent clip.
        """
        wave_T = clip.mono().resample(RATE).samples[0].float()
        loudness = float(wave_T.square().mean().sqrt())
        if not 0 < loudness < math.inf:
            raise InvalidInput("a silent clip has no speaker")
        wave_T = wave_T * max(1.0, LOUDNESS / loudness)
        num_frames = math.ceil((len(wave_T) + 1) / HOP)
        starts = list(range(0, max(1, num_frames - PART + STEP + 1), STEP))
        covered = (len(wave_T) - starts[-1] * HOP) / (PART * HOP)
        if covered < MIN_COVERAGE and len(starts) > 1:
            starts.pop()
        needed = (starts[-1] + PART) * HOP
        mels_LM = mel_energies(F.pad(wave_T, (0, max(0, needed - len(wave_T)))))
        parts_PD = self(torch.stack([mels_LM[start : start + PART] for start in starts]))
        return F.normalize(parts_PD.mean(dim=0), dim=0)

    def similarity(self, one: Waveform, other: Waveform) -> float:
        """Cosine of two clips' voices: 0.8 to 0.92 for one clean voice, 0.4 to 0.75 for two."""
        return float(self.embed(one) @ self.embed(other))


def mel_energies(wave_T: Tensor) -> Tensor:
    """Mel energies [L, M], not their logarithm."""
    import torchaudio

    to_mel = torchaudio.transforms.MelSpectrogram(
        RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MELS, pad_mode="constant", norm="slaney", mel_scale="slaney"
    )
    return to_mel(wave_T).T


def load_speaker_encoder(path: str | Path) -> SpeakerEncoder:
    """The encoder with the weights in `path`.

    Raises:
        InvalidCheckpoint: another file.
    """
    tensors, encoder = read_state_dict(path), SpeakerEncoder()
    names = encoder.state_dict().keys()
    if missing := sorted(names - tensors.keys()):
        raise InvalidCheckpoint(f"{path} holds no speaker encoder: {missing[0]} is missing")
    try:
        encoder.load_state_dict({name: tensors[name] for name in names})
    except RuntimeError as error:
        raise InvalidCheckpoint(f"{path} holds another speaker encoder: {error}") from error
    return encoder.eval().requires_grad_(False)
