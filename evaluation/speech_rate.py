"""Rate against quality of speech: this codec beside Opus and Vorbis.

All are measured on the same clips, mono at the codec's sample rate. Bytes are those of whole files: the `.mtok` with
its header, the Ogg with its own. libsndfile's Opus begins at 7 kbit/s and its Vorbis at 20 or more, so the neighbours
of a codec of 1 kbit/s are what costs several times as much.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..core.audio import Waveform, read_audio
from ..core.errors import InvalidInput
from ..core.tokens import Tokens
from .plot import Curve, plot_curves
from .speech import average, measure, read_clip, to_16_bit

# libsndfile's compression levels, 1 for the smallest files.
LEVELS = {"Opus": (1.0, 0.99, 0.98, 0.95, 0.9), "Vorbis": (1.0, 0.8, 0.5, 0.0)}
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
PLOTTED = ("PESQ (wide band)", "STOI")  # the first that there is


@dataclass(frozen=True)
class SpeechRatePoint:
    """One way to store some clips: their bytes, bits a second, and how near to the originals they come.

    codec: name of the tokenizer, "Opus" or "Vorbis". setting: how it was used, in words. bytes: of the mean file.
    figures: as of `mediatok evaluate`, means over clips.
    """

    codec: str
    setting: str
    bytes: int
    bits_per_second: float
    figures: dict[str, float]

    def as_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def rate_speech(
    tokenizer,
    clips: Sequence,
    *,
    batch_size: int = 8,
    on_step: Callable[..., None] | None = None,
    on_error: Callable[[object, Exception], None] | None = None,
) -> list[SpeechRatePoint]:
    """Measure a speech tokenizer, and Opus and Vorbis at several settings, on the same clips; fewest bits first.

    A tokenizer with residual layers is measured with one layer, two and so on.

    Args:
        clips: whatever `read_audio` takes, at most 10 minutes each.
        on_error: called with (clip, error) for each unreadable clip, which is left out; without it the first raises.

    Raises:
        InvalidInput: no readable clip.
    """
    sizes: dict[tuple[str, str], int] = {}
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    seconds, count = 0.0, 0
    for number, source in enumerate(clips):
        try:
            original = read_clip(source, tokenizer.sample_rate)
        except InvalidInput as error:
            if on_error is None:
                raise
            on_error(source, error)
            continue
        seconds, count = seconds + original.seconds, count + 1
        for way, num_bytes, decoded in _ways(tokenizer, original, batch_size):
            sizes[way] = sizes.get(way, 0) + num_bytes
            for name, value in measure(original, to_16_bit(decoded)).items():
                values.setdefault(way, {}).setdefault(name, []).append(value)
        if on_step is not None:
            on_step(number + 1, len(clips), preview=None)
    if not count:
        raise InvalidInput(f"none of the {len(clips)} clips could be read")
    points = [
        SpeechRatePoint(*way, round(size / count), 8 * size / seconds, average(values[way], count)[0])
        for way, size in sizes.items()
    ]
    return sorted(points, key=lambda point: point.bits_per_second)


def _ways(tokenizer, original: Waveform, batch_size: int) -> Iterator[tuple[tuple[str, str], int, Waveform]]:
    """(codec, setting), bytes and sound of every way to store a clip."""
    tokens = tokenizer.encode(original, batch_size=batch_size)
    for part in _layers(tokenizer, tokens):
        codebooks = part.ids.shape[2] if part.ids.ndim == 3 else 1
        setting = f"{codebooks} codebook{'s' if codebooks > 1 else ''}"
        yield (tokenizer.name, setting), part.num_bytes, tokenizer.decode(part, batch_size=batch_size)
    for codec, levels in LEVELS.items():
        for level in levels:
            data = write_ogg(original, codec, level)
            yield (codec, f"compression {level:g}"), len(data), fit(read_audio(data), original)


def _layers(tokenizer, tokens: Tokens) -> Iterator[Tokens]:
    """The tokens with one residual layer, two, ... all of them."""
    step = getattr(tokenizer.config, "n_code_groups", tokenizer.num_codebooks)
    for codebooks in range(step, tokenizer.num_codebooks, step):
        yield replace(tokens, ids=tokens.ids[..., :codebooks])
    yield tokens


def write_ogg(clip: Waveform, codec: str, level: float) -> bytes:
    """An Ogg file of "Opus" or "Vorbis" at libsndfile's compression level, 0 to 1."""
    import soundfile

    if codec == "Opus" and clip.sample_rate not in OPUS_RATES:
        clip = clip.resample(OPUS_RATES[-1])
    file = io.BytesIO()
    soundfile.write(
        file, clip.samples.T.numpy(), clip.sample_rate, format="OGG", subtype=codec.upper(), compression_level=level
    )
    return file.getvalue()


def fit(sound: Waveform, original: Waveform) -> Waveform:
    """`sound` at the rate and the length of `original`, mono."""
    samples = sound.mono().resample(original.sample_rate).samples
    length = original.samples.shape[1]
    samples = torch.nn.functional.pad(samples, (0, max(0, length - samples.shape[1])))
    return Waveform(samples[:, :length], original.sample_rate)


def format_points(points: Sequence[SpeechRatePoint]) -> str:
    """A table, one line a point."""
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    widths = [max(len(name), 8) for name in names]
    head = "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
    lines = [f"{'codec':<20}{'setting':<20}{'bytes':>9}{'kbit/s':>9}  {head}"]
    for point in points:
        cells = "  ".join(
            (f"{point.figures[name]:.3f}" if name in point.figures else "-").rjust(width)
            for name, width in zip(names, widths, strict=True)
        )
        lines.append(
            f"{point.codec:<20}{point.setting:<20}{point.bytes:>9}{point.bits_per_second / 1000:>9.2f}  {cells}"
        )
    return "\n".join(lines)


def plot_speech_rate(points: Sequence[SpeechRatePoint], path: str | Path, title: str = "") -> None:
    """Write a PNG: PESQ (or STOI, without it) over kbit/s, a line for each codec."""
    figure = next((name for name in PLOTTED if any(name in point.figures for point in points)), "log-mel distance")
    by_codec: dict[str, list[SpeechRatePoint]] = {}
    for point in points:
        if figure in point.figures:
            by_codec.setdefault(point.codec, []).append(point)
    curves: Mapping[str, Curve] = {
        codec: Curve(
            [point.bits_per_second / 1000 for point in group],
            [point.figures[figure] for point in group],
            () if codec in LEVELS else [point.setting for point in group],
        )
        for codec, group in by_codec.items()
    }
    plot_curves(curves, path, "kbit/s of whole files", figure, title)
