"""Sound in and out: safe reading at any rate, reading of hours in flat memory, resampling, writing.

Shape suffixes: C channels, T samples.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .audio_header import AudioHeader, check_rate_and_channels, read_header
from .errors import InvalidInput, LimitExceeded, MediatokError
from .files import atomic_write, shown

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus")
MAX_SAMPLES = 2**27  # of a clip held in memory, channels counted: 512 MiB, 2.3 hours of 16 kHz mono
MAX_SECONDS = 24 * 3600  # of a file that is read block by block
BLOCK_FRAMES = 2**16  # decoded at a time
MAX_FILTER = 2**22  # taps of a resampling filter, about
MAX_DENOMINATOR = 2000
WRITERS = {
    ".wav": {"format": "WAV", "subtype": "PCM_16"},
    ".flac": {"format": "FLAC", "subtype": "PCM_16"},
    ".ogg": {"format": "OGG", "subtype": "VORBIS"},
}


@dataclass(frozen=True)
class Waveform:
    """Sound: `samples` fp32 [C, T], nominally in [-1, 1], at `sample_rate` samples a second.

    Raises:
        InvalidInput: samples of another shape, none at all, NaN or infinite ones, or an impossible rate.
    """

    samples: Tensor
    sample_rate: int

    def __post_init__(self):
        samples, rate = self.samples, self.sample_rate
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise InvalidInput(f"sample_rate must be a whole number of samples a second, not {rate!r}")
        samples = torch.as_tensor(samples)
        if not samples.is_floating_point():
            raise InvalidInput(f"samples must be floating-point numbers in [-1, 1], not {samples.dtype}")
        samples = samples.detach().to("cpu", torch.float32)
        samples = samples[None] if samples.ndim == 1 else samples
        if samples.ndim != 2:
            raise InvalidInput(f"samples must be [channels, time], got {list(samples.shape)}")
        check_rate_and_channels(rate, samples.shape[0], "the waveform")
        _check_samples(samples, "the waveform")
        object.__setattr__(self, "samples", samples)

    @property
    def seconds(self) -> float:
        return self.samples.shape[1] / self.sample_rate

    def mono(self) -> Waveform:
        """The mean of the channels."""
        return Waveform(self.samples.mean(dim=0, keepdim=True), self.sample_rate)

    def resample(self, sample_rate: int) -> Waveform:
        """The same sound at another rate (windowed sinc, as torchaudio's)."""
        check_rate_and_channels(sample_rate, 1, "the wanted waveform")
        return Waveform(_resample(self.samples, self.sample_rate, sample_rate), sample_rate)

    def save(self, path: str | Path) -> None:
        """Write a file; see `write_audio`."""
        write_audio(self, path)


def read_audio(source: str | Path | bytes | Waveform, sample_rate: int | None = None, mono: bool = True) -> Waveform:
    """Read a whole clip.

    Args:
        source: a path, the bytes of a file, or a waveform. PCM or float WAV, FLAC or Ogg of 1 to 8 channels.
        sample_rate: the rate to resample to; the file's own without it.
        mono: mix the channels to their mean.

    Raises:
        InvalidInput: unreadable, damaged, empty, or with samples that are no numbers.
        LimitExceeded: longer than fits into memory; `open_audio` reads such files block by block.
    """
    if isinstance(source, Waveform):
        clip = source.mono() if mono else source
        return clip if sample_rate is None else clip.resample(sample_rate)
    stream = open_audio(source)
    rate = sample_rate or stream.sample_rate
    kept = 1 if mono else stream.channels
    if stream.num_frames is not None:  # an Ogg file says only while it is read
        _check_length(stream.num_frames / stream.sample_rate * rate * kept, stream.where)
    parts, total = [], 0
    for block in stream.resampled(rate, mono=mono):
        total += block.numel()
        _check_length(total, stream.where)
        parts.append(block)
    return Waveform(torch.cat(parts, dim=1), rate)


def open_audio(source: str | Path | bytes | Waveform) -> AudioStream:
    """Open a clip for reading it block by block; raises as `read_audio` does, whatever the length."""
    if isinstance(source, Waveform):
        return AudioStream(source, "the waveform", None)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return AudioStream(data, "the audio", read_header(io.BytesIO(data), len(data), "the audio"))
    if not isinstance(source, (str, Path)):
        raise InvalidInput(f"audio is a path, the bytes of a file or a mediatok.Waveform, not {type(source).__name__}")
    where = shown(source)
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"{where} is not a regular file; a file is needed")
        with open(source, "rb") as file:
            return AudioStream(Path(source), where, read_header(file, status.st_size, where))
    except FileNotFoundError as error:
        raise InvalidInput(f"{where} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class AudioStream:
    """A clip that is decoded as it is read; made by `open_audio`. Every reading starts from the beginning."""

    def __init__(self, source: Path | bytes | Waveform, where: str, header: AudioHeader | None):
        self.where = where
        self._source = source
        if isinstance(source, Waveform):
            self.sample_rate, self.channels = source.sample_rate, source.samples.shape[0]
            self.num_frames: int | None = source.samples.shape[1]
        else:
            with self._open() as file:
                self.sample_rate, self.channels = file.samplerate, file.channels
                self.num_frames = file.frames if header.kind == "Ogg" else header.num_frames
            check_rate_and_channels(self.sample_rate, self.channels, where)
        if self.num_frames is not None and self.num_frames > MAX_SECONDS * self.sample_rate:
            hours = self.num_frames / self.sample_rate / 3600
            raise LimitExceeded(f"{where} lasts {hours:,.1f} hours; at most {MAX_SECONDS // 3600} are read")

    @property
    def seconds(self) -> float | None:
        """Length as announced; None where the file does not say."""
        return None if self.num_frames is None else self.num_frames / self.sample_rate

    def blocks(self, seconds: float, sample_rate: int) -> Iterator[Tensor]:
        """Mono fp32 [T] blocks of `seconds` at `sample_rate`, the last one shorter.

        Joined they are exactly the samples that `read_audio` gives.
        """
        size = max(1, round(seconds * sample_rate))
        waiting: list[Tensor] = []
        held = 0
        for block in self.resampled(sample_rate):
            waiting.append(block[0])
            held += block.shape[1]
            while held >= size:
                joined = torch.cat(waiting)
                yield joined[:size]
                waiting, held = [joined[size:]], held - size
        if held:
            yield torch.cat(waiting)

    def resampled(self, sample_rate: int, mono: bool = True) -> Iterator[Tensor]:
        """fp32 [C, T] blocks at `sample_rate`, of about BLOCK_FRAMES samples of the file each."""
        check_rate_and_channels(sample_rate, 1, "the wanted waveform")
        blocks = (block.mean(dim=0, keepdim=True) if mono else block for block in self._decoded())
        return blocks if sample_rate == self.sample_rate else _resample_blocks(blocks, self.sample_rate, sample_rate)

    def _decoded(self) -> Iterator[Tensor]:
        """fp32 [C, T] blocks at the file's own rate, checked for NaN, and their total length for truncation."""
        if isinstance(self._source, Waveform):
            yield from self._source.samples.split(BLOCK_FRAMES, dim=1)
            return
        import soundfile

        total = 0
        with self._open() as file:
            while True:
                try:
                    frames = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
                except soundfile.LibsndfileError as error:
                    raise InvalidInput(f"{self.where} is damaged after {total:,} samples: {error}") from error
                if not len(frames):
                    break
                total += len(frames)
                if total > MAX_SECONDS * self.sample_rate:
                    raise LimitExceeded(f"{self.where} lasts more than {MAX_SECONDS // 3600} hours")
                block_CT = torch.from_numpy(frames.T.copy())
                _check_samples(block_CT, self.where)
                yield block_CT
        if total == 0:
            raise InvalidInput(f"{self.where} holds no samples")
        if self.num_frames is not None and total < self.num_frames:
            raise InvalidInput(f"{self.where} is truncated: {total:,} of {self.num_frames:,} samples are there")

    def _open(self):
        import soundfile

        try:
            return soundfile.SoundFile(io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source)
        except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError) as error:
            raise InvalidInput(f"{self.where} cannot be decoded: {error}") from error


def write_audio(waveform: Waveform, path: str | Path) -> None:
    """Write `.wav` or `.flac` (16-bit PCM) or `.ogg` (Vorbis); samples beyond [-1, 1] are clipped.

    Raises:
        InvalidInput: another suffix.
        MediatokError: the file cannot be written; `path` keeps what it had.
    """
    write_blocks(iter([waveform.samples]), waveform.sample_rate, path)


def write_blocks(blocks_CT: Iterable[Tensor], sample_rate: int, path: str | Path) -> None:
    """Write a file from blocks [C, T] of sound as they come, so that its length does not matter."""
    import soundfile

    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise InvalidInput(f"{shown(path)}: audio is written as {', '.join(WRITERS)}")
    blocks_CT = iter(blocks_CT)
    first = next(blocks_CT)
    try:
        with (
            atomic_write(path) as temporary,
            soundfile.SoundFile(temporary, "w", sample_rate, first.shape[0], **WRITERS[suffix]) as file,
        ):
            for block_CT in itertools.chain([first], blocks_CT):
                file.write(block_CT.clamp(-1, 1).T.contiguous().numpy())
    except soundfile.LibsndfileError as error:  # a full disk, a folder that nobody may write to
        reason = f"{error.error_string.rstrip('.')} (is the disk full, or the folder protected?)"
        raise MediatokError(f"{shown(path)} could not be written: {reason}") from error


def list_audio(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Sorted paths of the clips in a folder and its subfolders (hidden ones left out), or in a list of files and
    folders; named files are taken as they are.
    """
    named = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found: set[Path] = set()
    for path in map(Path, named):
        if path.is_dir():
            found |= {
                file
                for file in path.rglob("*")
                if file.suffix.lower() in AUDIO_SUFFIXES
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            }
        else:
            found.add(path)
    if not found:
        where = ", ".join(map(shown, named)) or "the empty list"
        raise InvalidInput(f"{where} holds no audio ({', '.join(AUDIO_SUFFIXES)})")
    return sorted(found)


def _check_samples(samples_CT: Tensor, where: str) -> None:
    if samples_CT.shape[1] == 0:
        raise InvalidInput(f"{where} holds no samples")
    if not bool(torch.isfinite(samples_CT).all()):
        raise InvalidInput(f"{where} holds samples that are NaN or infinite")


def _check_length(num_samples: float, where: str) -> None:
    if num_samples > MAX_SAMPLES:
        raise LimitExceeded(
            f"{where} has {int(num_samples):,} samples; {MAX_SAMPLES:,} fit into memory: read it block by block, or as "
            "mono at a lower rate"
        )


# Resampling. Output sample n of a ratio new/orig (in lowest terms) depends on the input near n * orig / new alone, and
# every `new` outputs the filter repeats: blocks that start at multiples of `orig`, with context, give the whole.


@lru_cache(maxsize=16)
def _resampler(from_rate: int, to_rate: int):
    """(torchaudio's resampler, orig, new, context in input samples, a multiple of orig)."""
    from torchaudio.transforms import Resample

    ratio = Fraction(to_rate, from_rate)
    if ratio.numerator * ratio.denominator > MAX_FILTER:
        # Rates without a common measure: the nearest simple ratio is off by less than a thousandth of a semitone.
        ratio = ratio.limit_denominator(MAX_DENOMINATOR)
    orig, new = ratio.denominator, ratio.numerator
    resampler = Resample(orig, new)
    context = math.ceil((resampler.width + orig) / orig) * orig if orig != new else 0
    return resampler, orig, new, context


def _resample(samples_CT: Tensor, from_rate: int, to_rate: int) -> Tensor:
    if from_rate == to_rate:
        return samples_CT
    return torch.cat(list(_resample_blocks(iter(samples_CT.split(BLOCK_FRAMES, dim=1)), from_rate, to_rate)), dim=1)


def _resample_blocks(blocks_CT: Iterator[Tensor], from_rate: int, to_rate: int) -> Iterator[Tensor]:
    """Resample a signal that comes in blocks; joined, the results are those of the whole signal."""
    resampler, orig, new, context = _resampler(from_rate, to_rate)
    held_CT, done = None, 0  # `done` samples at the front of `held_CT` are context: their outputs are out already
    for block_CT in blocks_CT:
        held_CT = block_CT if held_CT is None else torch.cat([held_CT, block_CT], dim=1)
        ready = (held_CT.shape[1] - done - context) // orig * orig
        if ready >= BLOCK_FRAMES // 2:
            yield resampler(held_CT[:, : done + ready + context])[:, done // orig * new : (done + ready) // orig * new]
            drop = max(done + ready - context, 0)
            held_CT, done = held_CT[:, drop:], done + ready - drop
    if held_CT is not None and held_CT.shape[1] > done:
        yield resampler(held_CT)[:, done // orig * new :]
