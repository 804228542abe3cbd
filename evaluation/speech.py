"""What is left of speech after a codec: how near it is, how well it is understood, and at how many bits a second.

Shape suffixes: T samples.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.audio import Waveform, list_audio, open_audio, read_audio
from ..core.errors import InvalidInput, LimitExceeded
from ..core.speech_tokenizer import as_list
from . import speech_metrics
from .error_rates import Listener, texts_of
from .report import Protocol, Report, set_hash, weights_hash

MAX_CLIP_SECONDS = 600  # of a clip that is measured: what STOI and PESQ say of more is one number for much
QUIETEST = 2.0**-15  # a clip below one step of 16-bit sound holds nothing to compare
# Figure -> its function of (original, decoded), and the optional package that it needs.
PAIRED = {
    "STOI": (speech_metrics.stoi, "stoi"),
    "extended STOI": (lambda original, decoded: speech_metrics.stoi(original, decoded, extended=True), "stoi"),
    "PESQ (wide band)": (speech_metrics.pesq_wb, "pesq_wb"),
    "SI-SDR (dB)": (speech_metrics.si_sdr, None),
}


class LogMelDistance:
    """Mean distance of the natural log-mel spectra (80 bands) of two sounds, which may come in pieces."""

    def __init__(self, sample_rate: int):
        from ..training.speech_losses import LogMel

        self.mel = LogMel(sample_rate)
        self._sum, self._samples = 0.0, 0

    @property
    def value(self) -> float:
        """Mean over all samples so far."""
        return self._sum / max(self._samples, 1)

    def add(self, original_T: Tensor, decoded_T: Tensor) -> None:
        """Count one pair of pieces of equal length."""
        length = len(original_T)
        pair_2T = torch.nn.functional.pad(
            torch.stack([original_T, decoded_T]), (0, max(0, self.mel.n_fft - length))
        )  # fmt: skip
        original_MN, decoded_MN = self.mel(pair_2T)
        self._sum += float((original_MN - decoded_MN).abs().mean()) * length
        self._samples += length

    def watch(self, original_T: Iterable[Tensor], decoded_1T: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pass the decoded blocks [1, T] on, and compare each with as much of the original's blocks [T]."""
        held_T, source = torch.zeros(0), iter(original_T)
        for block_1T in decoded_1T:
            while len(held_T) < block_1T.shape[1]:
                held_T = torch.cat([held_T, next(source)])
            self.add(held_T[: block_1T.shape[1]], block_1T[0])
            held_T = held_T[block_1T.shape[1] :]
            yield block_1T


@torch.inference_mode()
def evaluate_speech(
    tokenizer,
    audio,
    *,
    set_name: str | None = None,
    recogniser=None,
    transcripts: str | Path | Mapping[str, str] | None = None,
    with_dnsmos: bool = False,
    batch_size: int = 8,
    on_step: Callable[..., None] | None = None,
    on_error: Callable[[object, Exception], None] | None = None,
) -> Report:
    """Encode and decode every clip and measure how near the result is.

    Clips are mixed to mono and resampled to the tokenizer's rate; what is decoded is rounded to 16 bits. Bits a second
    are counted over all clips together: of whole `.mtok` files and, beside it, of the token ids alone. STOI, PESQ,
    SI-SDR and DNSMOS are means over the clips that they can say something of. PESQ is left out where its package is not
    installed.

    Args:
        audio: a folder, or a list of whatever `read_audio` takes; clips of at most 10 minutes.
        set_name: what the report calls the set; default the folder's name.
        recogniser: a model with `transcribe`: adds the word and character error rates of its transcripts of the
            originals and of the decoded clips. Case and punctuation do not count.
        transcripts: what is really said: a file of lines "name <tab> text", or a dict, by the clips' file names
            without suffix. Default the folder's own `transcripts.tsv`.
        with_dnsmos: adds DNSMOS of the decoded clips and of the originals, which takes seconds a clip.
        batch_size: windows of audio that go through the tokenizer together.
        on_step: called with the number of finished clips and their total.
        on_error: called with (clip, error) for each unreadable clip, which is then left out; without it the first one
            raises.

    Raises:
        InvalidInput: no readable clip, or a recogniser without transcripts.
        MissingDependency: DNSMOS is asked for and not installed.
    """
    if tokenizer.modality != "speech":
        raise InvalidInput(f"{tokenizer.name} is no speech tokenizer; pictures are measured by mediatok.evaluate")
    sources, set_name, folder = _sources(audio, set_name)
    listener = None if recogniser is None else Listener(recogniser, texts_of(transcripts, folder))
    rate = tokenizer.sample_rate
    values: dict[str, list[float]] = {}
    digests: list[str] = []
    seconds = tokens_in_all = file_bits = id_bits = compute = 0.0
    start_time = time.perf_counter()
    for number, source in enumerate(sources):
        try:
            original = read_clip(source, rate)
        except InvalidInput as error:
            if on_error is None:
                raise
            on_error(source, error)
            continue
        digests.append(_digest(source, original))
        begin = time.perf_counter()
        tokens = tokenizer.encode(original, batch_size=batch_size)
        decoded = tokenizer.decode(tokens, batch_size=batch_size)
        compute += time.perf_counter() - begin
        decoded = to_16_bit(decoded)
        seconds += original.seconds
        tokens_in_all += int(tokens.lengths[0])
        file_bits += 8 * tokens.num_bytes
        id_bits += tokens.ids.numel() * tokens.bits_per_token
        for name, value in measure(original, decoded, with_dnsmos).items():
            values.setdefault(name, []).append(value)
        if listener is not None:
            listener.hear(source, original, decoded)
        if on_step is not None:
            on_step(number + 1, len(sources), preview=None)
    if not digests:
        raise InvalidInput(f"none of the {len(sources)} clips of {set_name} could be read")

    figures, notes = average(values, len(digests))
    if listener is not None:
        error_rates, more = listener.figures(len(digests))
        figures |= error_rates
        notes += more
    figures |= {
        "bits per second (.mtok files)": file_bits / seconds,
        "bits per second (ids alone)": id_bits / seconds,
        "tokens per second": tokens_in_all / seconds,
        "seconds coded in a second": seconds / compute,
    }
    protocol = Protocol(
        modality="speech",
        set_name=set_name,
        num_items=len(digests),
        set_sha256=set_hash(digests),
        preprocessing=f"mono, {rate:,} samples a second (windowed sinc)",
        postprocessing="clamped to [-1, 1], rounded to 16 bit",
        metrics="per clip at 16,000 samples a second, log-mel distance (80 bands, natural log) at the model's rate; "
        "then averaged",
        settings={} if listener is None else {"transcripts": f"sha256 {listener.texts_sha256}"},
        feature_nets={} if listener is None else {recogniser.name: weights_hash(recogniser)},
    )
    return Report(
        model=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        dtype=str(tokenizer.dtype).removeprefix("torch."),
        device=str(tokenizer.device),
        num_tokens=figures["tokens per second"],
        protocol=protocol,
        figures=figures,
        notes=(*notes, f"{seconds:.1f} seconds of audio"),
        seconds=time.perf_counter() - start_time,
    )


def read_clip(source, sample_rate: int) -> Waveform:
    """A clip to be measured, mono; LimitExceeded for more than 10 minutes, which are not read at all."""
    stream = open_audio(source)
    if stream.seconds is not None and stream.seconds > MAX_CLIP_SECONDS:
        raise LimitExceeded(
            f"{stream.where} lasts {stream.seconds / 60:.0f} minutes; clips of at most {MAX_CLIP_SECONDS // 60} "
            "minutes are measured: split it"
        )
    return read_audio(source, sample_rate)


def to_16_bit(sound: Waveform) -> Waveform:
    """What a listener gets from a 16-bit file."""
    return Waveform((sound.samples.clamp(-1, 1) * 32767).round() / 32767, sound.sample_rate)


def measure(original: Waveform, decoded: Waveform, with_dnsmos: bool = False) -> dict[str, float]:
    """All figures of one pair of clips; NaN for those that cannot say anything of it, as of silence."""
    distance = LogMelDistance(original.sample_rate)
    distance.add(original.samples[0], decoded.samples[0])
    values = {"log-mel distance": distance.value}
    is_heard = float(original.samples.abs().max()) >= QUIETEST
    is_compared = is_heard and original.seconds >= speech_metrics.MIN_SECONDS
    for name, (metric, package) in PAIRED.items():
        if package is None or speech_metrics.is_available(package):
            values[name] = metric(original, decoded) if is_compared else math.nan
    if with_dnsmos:
        for name, clip in (("DNSMOS", decoded), ("DNSMOS of the originals", original)):
            values[name] = speech_metrics.dnsmos(clip)["dnsmos_ovrl"] if is_heard else math.nan
    return values


def average(values: Mapping[str, list[float]], num_clips: int) -> tuple[dict[str, float], list[str]]:
    """Means of what is not NaN, and notes on how many clips are missing."""
    figures, notes, counts = {}, [], {}
    for name, numbers in values.items():
        known = [number for number in numbers if math.isfinite(number)]
        if known:
            figures[name] = sum(known) / len(known)
        if len(known) < num_clips:
            counts.setdefault(num_clips - len(known), []).append(name)
    for missing, names in counts.items():
        notes.append(
            f"{', '.join(names)}: without {missing} of {num_clips} clips, which are silent, without speech or shorter "
            f"than {speech_metrics.MIN_SECONDS} s"
        )
    if not speech_metrics.is_available("pesq_wb"):
        notes.append("no PESQ: pip install 'mediatok[pesq]'")
    return figures, notes


def _sources(audio, set_name: str | None) -> tuple[list, str, Path | None]:
    if isinstance(audio, (str, Path)) and Path(audio).is_dir():
        return list(list_audio(audio)), set_name or Path(audio).resolve().name, Path(audio)
    return as_list(audio)[0], set_name or "clips", None


def _digest(source, clip: Waveform) -> str:
    """SHA-256 of a file, or of the samples of what is none."""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(bytes(source) if isinstance(source, bytes) else clip.samples.numpy().tobytes()).hexdigest()
