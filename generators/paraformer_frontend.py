"""What Paraformer hears: log-mel energies as Kaldi computes them, a few neighbouring frames stacked, normalized.

All clips of a batch go through at once, with window and filters that are made once; each row depends on its own samples
alone.

Shape suffixes: B clips, N samples, T frames every 10 ms, S samples of a frame, M mel bands, L stacked frames, F = stack
* M features.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..core.errors import InvalidInput

INT16 = 32768.0  # the filters were made for 16-bit samples
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0
LOWEST_ENERGY = 1.1920929e-7  # fp32's epsilon, before the logarithm
SHORTEST = 2  # samples of a clip


class Frontend(nn.Module):
    """Waveform to features.

    Args:
        sample_rate: samples a second. num_mels: bands from 20 Hz to half the rate.
        window_ms, hop_ms: of a frame; Hamming windows that lie inside the clip. A clip shorter than a window is one
            frame of its own length.
        stack, stride: so many frames become one feature vector, every `stride` frames; beyond the clip its first and
            last frame are repeated.

    `cmvn` [2, F] is what features are shifted by and then multiplied with.
    """

    def __init__(
        self, sample_rate: int = 16000, num_mels: int = 80, window_ms: float = 25.0, hop_ms: float = 10.0,
        stack: int = 7, stride: int = 6,
    ):  # fmt: skip
        super().__init__()
        self.sample_rate, self.num_mels, self.stack, self.stride = sample_rate, num_mels, stack, stride
        self.window, self.hop = int(sample_rate * window_ms * 0.001), int(sample_rate * hop_ms * 0.001)
        if self.window < SHORTEST or self.hop < 1:
            raise ValueError(f"{sample_rate} Hz is too slow for windows of {window_ms} ms every {hop_ms} ms")
        self.register_buffer("cmvn", torch.stack([torch.zeros(stack * num_mels), torch.ones(stack * num_mels)]))

    @property
    def seconds_per_frame(self) -> float:
        """How far apart feature vectors lie."""
        return self.stride * self.hop / self.sample_rate

    def forward(self, wave_BN: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features fp32 [B, L, F], zero past the end of a row, and their lengths int64 [B].

        wave_BN: fp32 in [-1, 1] at `sample_rate`. lengths_B: samples of each clip (all of them when None).

        Raises:
            InvalidInput: other shapes, or a clip of fewer than 2 samples.
        """
        energies_BTM, lengths_B = self.energies(wave_BN, lengths_B)
        stacked_BLF, lengths_B = self.stacked(energies_BTM, lengths_B)
        inside_BL = torch.arange(stacked_BLF.shape[1], device=lengths_B.device) < lengths_B[:, None]
        return self.normalized(stacked_BLF) * inside_BL[..., None], lengths_B

    def energies(
        self, wave_BN: Tensor, lengths_B: Tensor | None = None, noise_BTS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-mel energies fp32 [B, T, M] and the frames of each row; what lies past a row's end means nothing.

        noise_BTS: added to the samples of every frame, in units of a 16-bit step (Kaldi's dither).
        """
        if wave_BN.ndim != 2 or not wave_BN.is_floating_point():
            raise InvalidInput(f"waveforms must be float [B, samples], got {wave_BN.dtype} {list(wave_BN.shape)}")
        if lengths_B is None:
            lengths_B = torch.full((len(wave_BN),), wave_BN.shape[1], device=wave_BN.device)
        shortest = int(lengths_B.min())
        if shortest < SHORTEST or int(lengths_B.max()) > wave_BN.shape[1]:
            raise InvalidInput(f"clips of {lengths_B.tolist()} samples do not fit {list(wave_BN.shape)}")
        wave_BN = wave_BN.float() * INT16
        frames_B = (1 + (lengths_B - self.window) // self.hop).clamp(min=1)
        if shortest >= self.window:
            return self._of_frames(wave_BN.unfold(1, self.window, self.hop), noise_BTS), frames_B
        energies_BTM = wave_BN.new_zeros(len(wave_BN), int(frames_B.max()), self.num_mels)
        for row, length in enumerate(lengths_B.tolist()):  # every short clip has a window of its own
            window = min(self.window, int(self.sample_rate * (length / self.sample_rate * 1000) * 0.001))
            frames = self._of_frames(wave_BN[row : row + 1, :length].unfold(1, window, self.hop))
            energies_BTM[row, : frames_B[row]] = frames[0, : frames_B[row]]
        return energies_BTM, frames_B

    def _of_frames(self, frames_BTS: Tensor, noise_BTS: Tensor | None = None) -> Tensor:
        size = frames_BTS.shape[-1]
        window_S, filters_RM = (x.to(frames_BTS.device) for x in _window_and_filters(size, self.sample_rate,
                                                                                    self.num_mels))  # fmt: skip
        if noise_BTS is not None:
            frames_BTS = frames_BTS + noise_BTS
        frames_BTS = frames_BTS - frames_BTS.mean(dim=-1, keepdim=True)
        before_BTS = torch.cat([frames_BTS[..., :1], frames_BTS[..., :-1]], dim=-1)
        frames_BTS = (frames_BTS - PREEMPHASIS * before_BTS) * window_S
        spectrum_BTR = torch.fft.rfft(frames_BTS, n=2 * filters_RM.shape[0])[..., :-1]  # the last bin is in no band
        power_BTR = spectrum_BTR.real.square() + spectrum_BTR.imag.square()
        return (power_BTR @ filters_RM).clamp(min=LOWEST_ENERGY).log()

    def stacked(self, energies_BTM: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbouring frames as one vector ("low frame rate"): [B, L, F] with L = ceil(T / stride), and lengths."""
        lengths_B = -(-frames_B // self.stride)
        first_L = torch.arange(int(lengths_B.max()), device=frames_B.device) * self.stride - (self.stack - 1) // 2
        place_BLS = (first_L[:, None] + torch.arange(self.stack, device=frames_B.device)).expand(len(frames_B), -1, -1)
        place_BLS = place_BLS.clamp(min=0).minimum(frames_B[:, None, None] - 1)
        rows_B11 = torch.arange(len(frames_B), device=frames_B.device)[:, None, None]
        return energies_BTM[rows_B11, place_BLS].flatten(2), lengths_B

    def normalized(self, stacked_BLF: Tensor) -> Tensor:
        shift_F, scale_F = self.cmvn
        return (stacked_BLF + shift_F) * scale_F


@lru_cache(maxsize=16)
def _window_and_filters(size: int, sample_rate: int, num_mels: int) -> tuple[Tensor, Tensor]:
    """A symmetric Hamming window [S], and triangles over the spectrum's bins [R, M], linear in mel, of height 1.

    All in fp32 in Kaldi's order of operations, on which the small weights at a triangle's feet depend.
    """
    bins = 2 ** math.ceil(math.log2(size)) // 2
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (LOWEST_HZ, sample_rate / 2))
    step = (high - low) / (num_mels + 1)
    with torch.device("cpu"):
        window_S = torch.hamming_window(size, periodic=False, alpha=0.54, beta=0.46)
        left_M, centre_M, right_M = (low + (torch.arange(num_mels) + float(i)) * step for i in range(3))
        mel_R1 = (1127 * (1 + torch.arange(bins) * (sample_rate / (2 * bins)) / 700).log())[:, None]
        rising_RM, falling_RM = (mel_R1 - left_M) / (centre_M - left_M), (right_M - mel_R1) / (right_M - centre_M)
    return window_S, rising_RM.minimum(falling_RM).clamp(min=0)
