"""Sound as a picture: waveforms, spectrograms and tokens one below the other, on one time axis.

Lanes stretch to any width, so letters are HTML beside them. Spectrograms have one hue, whose lightness the style turns
round in the dark.
"""

from __future__ import annotations

import base64
import io
import math
from functools import lru_cache
from html import escape

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from .. import Waveform
from .studio_views import hue

COLUMNS = 800  # of a waveform and of a spectrogram
ROWS = 96  # of a spectrogram
WINDOW_SECONDS = 0.032
RANGE_DB = 70.0  # from the loudest spot of all lanes to white
RAMP = ("#ffffff", "#79b7c8", "#1f7a93", "#08222b")  # quiet to loud
QUIETEST_PEAK = 0.02  # silence is not blown up
TOKEN_COLUMNS = 1200  # more cannot be told apart
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)  # seconds between ticks
MAX_TICKS = 8


def sound_figure(lanes: list[tuple[str, Waveform | None]], ids: Tensor | None = None, hint: str = "") -> str:
    """The figure as HTML; `--at` of its element, 0 to 1, is where the mark of the player stands.

    Args:
        lanes: (name, sound) from top to bottom; None for a sound that is not there. In place of the first such one
            stands `hint`.
        ids: int64 [L] or [L, Q], drawn above the last lane.
    """
    sounds = [sound for _, sound in lanes if sound is not None]
    seconds = max((sound.seconds for sound in sounds), default=0.0)
    peak = max((float(sound.samples.abs().max()) for sound in sounds), default=1.0)
    powers = [None if sound is None else _spectrogram(sound, seconds) for _, sound in lanes]
    loudest = max((float(power_RC.max()) for power_RC in powers if power_RC is not None), default=1.0)
    parts = []
    for number, ((name, sound), power_RC) in enumerate(zip(lanes, powers, strict=True)):
        if ids is not None and number == len(lanes) - 1:
            parts.append(_lane("tokens", "Tokens", "", f'<img class="codes" alt="" src="{_token_strip(ids)}">'))
        if sound is None:
            parts.append(_lane("sound", name, "", f'<p class="mt-hint">{escape(hint)}</p>'))
            hint = ""
            continue
        wave, heat = _wave(sound, seconds, max(peak, QUIETEST_PEAK)), _heat(power_RC, loudest)
        drawn = f'{wave}<img class="spectrum" alt="" src="{heat}">'
        parts.append(_lane("sound", name, f"{sound.sample_rate / 2000:g} kHz", drawn))
    names = ", ".join(name for name, sound in lanes if sound is not None)
    label = f"Waveform and spectrogram: {names}. Arrow keys move the player." if sounds else "No sound yet"
    return (
        f'<div class="mt-sound" role="slider" tabindex="0" aria-label="{escape(label)}" aria-valuemin="0" '
        f'aria-valuemax="{seconds:.2f}" aria-valuenow="0" aria-valuetext="0 s" data-seconds="{seconds:.4f}">'
        f'{"".join(parts)}<div class="mt-axis">{_ticks(seconds)}</div><div class="mt-head"></div></div>'
    )


def _lane(kind: str, name: str, top: str, content: str) -> str:
    return (
        f'<div class="mt-lane {kind}"><span class="mt-side"><b>{escape(name)}</b><small>{top}</small></span>'
        f'<div class="mt-drawn">{content}</div></div>'
    )


def _ticks(seconds: float) -> str:
    """Times below the lanes, and the end of the axis only where it is one of them."""
    step = next((step for step in STEPS if seconds / step <= MAX_TICKS), STEPS[-1])
    count = int(seconds / step + 1e-6) + 1 if seconds else 0
    spots = [(round(number * step, 1), number * step / seconds) for number in range(count)]
    return "".join(
        f'<span style="left:{100 * share:.2f}%"{" class=last" if share > 0.95 else ""}>{time:g}'
        f"{' s' if not time else ''}</span>"
        for time, share in spots
    )


def _wave(sound: Waveform, seconds: float, peak: float) -> str:
    """Smallest and largest sample of each column, as one outline; `peak` reaches the edge."""
    samples_T = sound.samples.mean(dim=0)
    total = max(round(seconds * sound.sample_rate), 1)
    columns = max(1, round(COLUMNS * len(samples_T) / total))
    size = math.ceil(len(samples_T) / columns)
    cut = F.pad(samples_T, (0, size * columns - len(samples_T))).view(columns, size)
    high, low = (50 - 50 * (edge / peak).clamp(-1, 1) for edge in (cut.amax(dim=1), cut.amin(dim=1)))
    outline = [f"{x},{y:.1f}" for x, y in enumerate(high.tolist())]
    outline += [f"{x},{y + 0.6:.1f}" for x, y in reversed(list(enumerate(low.tolist())))]
    return (
        f'<svg class="wave" viewBox="0 0 {COLUMNS} 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<polygon points="{" ".join(outline)}"/></svg>'
    )


def _spectrogram(sound: Waveform, seconds: float) -> Tensor:
    """Power [ROWS, COLUMNS] from the highest frequency down; columns past the end of the sound are silent."""
    samples_T = sound.samples.mean(dim=0)
    window = max(64, round(WINDOW_SECONDS * sound.sample_rate))
    centres = ((torch.arange(COLUMNS) + 0.5) * seconds / COLUMNS * sound.sample_rate).long()
    padded_T = F.pad(samples_T, (window // 2, max(0, int(centres[-1]) + window - len(samples_T))))
    frames_CW = padded_T[centres[:, None] + torch.arange(window)] * torch.hann_window(window)
    power_CF = torch.fft.rfft(frames_CW).abs().square()
    return F.adaptive_avg_pool1d(power_CF, ROWS).T.flip(0)


def _heat(power_RC: Tensor, loudest: float) -> str:
    decibels = 10 * (power_RC / max(loudest, 1e-12)).clamp(min=1e-12).log10()
    levels = ((1 + decibels / RANGE_DB).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return _source(Image.fromarray(_ramp()[levels]), "WEBP", quality=82, method=2)


@lru_cache(maxsize=1)
def _ramp() -> np.ndarray:
    """256 colours [256, 3] between those of RAMP."""
    stops = np.array([ImageColor.getrgb(colour) for colour in RAMP], dtype=float)
    at = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(at, np.arange(len(stops)), stops[:, k]) for k in range(3)], axis=1).round().astype("u1")


def _token_strip(ids: Tensor) -> str:
    """One column a token, one row a codebook; the colour belongs to the code."""
    ids_LQ = ids if ids.ndim == 2 else ids[:, None]
    count = min(len(ids_LQ), TOKEN_COLUMNS)
    chosen = ids_LQ[(torch.arange(count) * len(ids_LQ)) // max(count, 1)]
    colours = {code: ImageColor.getrgb(f"hsl({hue(code)}, 50%, 66%)") for code in set(chosen.flatten().tolist())}
    pixels = np.array([[colours[code] for code in row] for row in chosen.T.tolist()], dtype=np.uint8)
    return _source(Image.fromarray(pixels), "PNG")


def _source(image: Image.Image, kind: str, **options) -> str:
    """A picture as a data address: it comes with the page, so that nothing flickers."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
