"""Discriminators of waveforms: multi-period and multi-scale (HiFi-GAN, arXiv 2010.05646, section 2.3) and multi-scale
STFT (EnCodec, arXiv 2210.13438, section 3.4), as SimCodec's parent HiFi-Codec combines them.

Each gives, for a waveform, its feature maps, the last of which are the logits (high means real). One number, `width`,
scales all channels; 32 is the published size.

Shape suffixes: B batch, T samples, C channels, N frames, P period, K frequencies.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

PERIODS = (2, 3, 5, 7, 11)
NUM_SCALES = 3
STFT_SIZES = (1024, 2048, 512, 256, 128)
SLOPE = 0.1
STFT_SLOPE = 0.2
# Taps, stride, groups and channels (in widths) of each layer.
PERIOD_LAYERS = ((5, 3, 1), (5, 3, 4), (5, 3, 16), (5, 3, 32), (5, 1, 32))
SCALE_LAYERS = (
    (15, 1, 1, 4), (41, 2, 4, 4), (41, 2, 16, 8), (41, 4, 16, 16), (41, 4, 16, 32), (41, 1, 16, 32), (5, 1, 1, 32)
)  # fmt: skip
MIN_WIDTH = 4  # 16 groups of the scale discriminators' narrowest layer
Kind = Literal["period", "scale", "stft"]
KINDS: tuple[Kind, ...] = ("period", "scale", "stft")
FeatureMaps = list[Tensor]


class PeriodDiscriminator(nn.Module):
    """Looks at every P-th sample: the waveform is folded into columns of P, and convolved along time alone."""

    def __init__(self, period: int, width: int):
        super().__init__()
        self.period = period
        layers, channels = [], 1
        for taps, stride, widths in PERIOD_LAYERS:
            padding = (taps // 2, 0)
            layers.append(weight_norm(nn.Conv2d(channels, widths * width, (taps, 1), (stride, 1), padding)))
            channels = widths * width
        self.layers = nn.ModuleList(layers)
        self.to_logits = weight_norm(nn.Conv2d(channels, 1, (3, 1), padding=(1, 0)))

    def forward(self, wave_BT: Tensor) -> FeatureMaps:
        missing = -wave_BT.shape[1] % self.period
        padded_BT = F.pad(wave_BT[:, None], (0, missing), mode="reflect")[:, 0]
        x_BCNP = rearrange(padded_BT, "b (n p) -> b 1 n p", p=self.period)
        return _feature_maps(x_BCNP, self.layers, self.to_logits, SLOPE)


class ScaleDiscriminator(nn.Module):
    """Looks at the waveform itself, through grouped convolutions with long kernels."""

    def __init__(self, width: int, norm=weight_norm):
        super().__init__()
        layers, channels = [], 1
        for taps, stride, groups, widths in SCALE_LAYERS:
            conv = nn.Conv1d(channels, widths * width, taps, stride, padding=taps // 2, groups=groups)
            layers.append(norm(conv))
            channels = widths * width
        self.layers = nn.ModuleList(layers)
        self.to_logits = norm(nn.Conv1d(channels, 1, 3, padding=1))

    def forward(self, wave_BT: Tensor) -> FeatureMaps:
        return _feature_maps(wave_BT[:, None], self.layers, self.to_logits, SLOPE)


class STFTDiscriminator(nn.Module):
    """Looks at the complex spectrogram: real and imaginary part are two channels of a picture [N, K]."""

    def __init__(self, n_fft: int, width: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        layers = [weight_norm(nn.Conv2d(2, width, (3, 9), padding=(1, 4)))]
        for dilation in (1, 2, 4):
            conv = nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            layers.append(weight_norm(conv))
        layers.append(weight_norm(nn.Conv2d(width, width, (3, 3), padding=1)))
        self.layers = nn.ModuleList(layers)
        self.to_logits = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=1))

    def forward(self, wave_BT: Tensor) -> FeatureMaps:
        spectrum_BKN = torch.stft(
            wave_BT.float(), self.n_fft, self.n_fft // 4, window=self.window, normalized=True, return_complex=True
        )
        x_BCNK = rearrange(torch.view_as_real(spectrum_BKN), "b k n c -> b c n k")
        return _feature_maps(x_BCNK, self.layers, self.to_logits, STFT_SLOPE)


class SpeechDiscriminator(nn.Module):
    """All discriminators of the wanted kinds: waveforms fp32 [B, T] in [-1, 1] -> the feature maps of each.

    T must be at least half of the largest STFT.
    """

    def __init__(self, width: int = 32, kinds: tuple[Kind, ...] = KINDS):
        super().__init__()
        if width < MIN_WIDTH or width % 4:
            raise ValueError(f"the discriminators' width must be a multiple of 4 from {MIN_WIDTH} on, not {width}")
        if not kinds or set(kinds) - set(KINDS):
            raise ValueError(f"discriminators are some of {', '.join(KINDS)}, not {kinds!r}")
        self.period = nn.ModuleList(PeriodDiscriminator(p, width) for p in PERIODS if "period" in kinds)
        scales = range(NUM_SCALES) if "scale" in kinds else ()
        norms = (spectral_norm if scale == 0 else weight_norm for scale in scales)
        self.scale = nn.ModuleList(ScaleDiscriminator(width, norm) for norm in norms)
        self.stft = nn.ModuleList(STFTDiscriminator(n_fft, width) for n_fft in STFT_SIZES if "stft" in kinds)

    def forward(self, wave_BT: Tensor) -> list[FeatureMaps]:
        found = [discriminator(wave_BT) for discriminator in self.period]
        scaled_BT = wave_BT
        for number, discriminator in enumerate(self.scale):
            if number:
                scaled_BT = F.avg_pool1d(scaled_BT[:, None], 4, 2, padding=2)[:, 0]
            found.append(discriminator(scaled_BT))
        return found + [discriminator(wave_BT) for discriminator in self.stft]


def _feature_maps(x: Tensor, layers: nn.ModuleList, to_logits: nn.Module, slope: float) -> FeatureMaps:
    maps = []
    for layer in layers:
        x = F.leaky_relu(layer(x), slope)
        maps.append(x)
    return [*maps, to_logits(x)]
