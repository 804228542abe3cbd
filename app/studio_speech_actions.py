"""What the studio does with speech: encode and decode, add noise, enhance, transcribe, speak.

Plain Python on the public API, as studio_actions.py is for pictures. Hold the device around everything with a model.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import Tokens, Waveform, read_audio
from ..core.errors import InvalidInput, LimitExceeded
from ..core.transcript import Transcript
from ..evaluation.speech_metrics import METRICS_RATE, MIN_SECONDS, dnsmos, is_available, stoi
from ..training.noise import add_noise, make_noise
from .studio_speech_reader import Clip
from .studio_worker import Job, device_name

NOISES = ("none", "white", "pink", "brown", "hum")
NOISE_SEED = 0
NOISE_RATE = METRICS_RATE  # noise is added at this rate, which the enhancers hear
QUIETEST, LOUDEST = 30, -5  # of the noise: dB of speech over it
MAX_ENHANCED_SECONDS = 60  # a minute of sound is some thousand steps of two language models
STOI_SECONDS, DNSMOS_SECONDS = 60, 10  # of longer clips the beginning is measured
MAX_TEXT = 500  # characters to speak
MAX_HOTWORDS = 200
TEMPERATURES = (0.01, 10.0)


@dataclass(frozen=True)
class Progress:
    """Work under way: the share that is done, of so many seconds of sound (None: not known before the end)."""

    what: str
    share: float
    seconds: float | None


Emit = Callable[[Progress], None]


@dataclass(frozen=True)
class Coded:
    """A clip, its tokens and what they sound like.

    source: what `mt.load` takes. name: of the clip's file or of the .mtok file. clip, before: the clip, and as the
    codec hears it; None if only a .mtok was given. seconds: encode plus decode. bit_rate: of the tokens alone, bit/s.
    stoi: None without a clip, or of too short a one.
    """

    source: str
    model_name: str
    name: str
    clip: Clip | None
    before: Waveform | None
    after: Waveform
    tokens: Tokens
    seconds: float
    device: str
    frame_rate: float
    bit_rate: float
    stoi: float | None

    @property
    def num_frames(self) -> int:
        return int(self.tokens.lengths[0])

    @property
    def num_codebooks(self) -> int:
        return self.tokens.ids.shape[2] if self.tokens.ids.ndim == 3 else 1

    @property
    def file_bit_rate(self) -> float:
        """bit/s of the whole .mtok file."""
        return 8 * self.tokens.num_bytes / self.after.seconds


@dataclass(frozen=True)
class Mixed:
    """A clip with noise. clean, noisy: at NOISE_RATE, the noisy one as a 16-bit file holds it."""

    clip: Clip
    noise: str
    snr: float
    clean: Waveform
    noisy: Waveform

    @property
    def key(self) -> tuple:
        """What it was made of."""
        return self.clip, self.noise, self.snr


@dataclass(frozen=True)
class Enhanced:
    """What an enhancer made of a noisy clip.

    stoi: before and after; None without a clean original. dnsmos: the same, once `with_dnsmos` has measured it.
    """

    source: str
    model_name: str
    mixed: Mixed
    after: Waveform
    seed: int
    greedy: bool
    temperature: float
    seconds: float
    device: str
    stoi: tuple[float, float] | None
    dnsmos: tuple[float, float] | None = None


@dataclass(frozen=True)
class Transcribed:
    """What was heard in a clip."""

    source: str
    model_name: str
    clip: Clip
    transcript: Transcript
    hotwords: tuple[str, ...]
    seconds: float
    device: str


@dataclass(frozen=True)
class Spoken:
    """A text, spoken."""

    source: str
    model_name: str
    text: str
    after: Waveform
    seed: int
    seconds: float
    device: str


def code_clip(codec, source: str, clip: Clip, job: Job, emit: Emit | None = None) -> Coded:
    """Encode and decode a clip."""
    started = time.perf_counter()
    tokens = codec.encode(clip.path, batch_size=1, on_step=stepper(job, emit, "encoding", clip.seconds))
    after = codec.decode(tokens, batch_size=1, on_step=stepper(job, emit, "decoding", clip.seconds))
    seconds = time.perf_counter() - started
    before = read_audio(clip.path, codec.sample_rate)
    return _coded(codec, source, clip.name, clip, tokens, before, after, seconds)


def decode_tokens(codec, source: str, tokens: Tokens, name: str, job: Job, emit: Emit | None = None) -> Coded:
    """Decode tokens whose clip is not known (a .mtok file, of which the first item counts)."""
    if tokens.modality != "speech":
        raise InvalidInput(f"{name} holds tokens of another kind ({tokens.modality}), not of speech.")
    tokens = tokens[0] if tokens.is_batch else tokens
    length = tokens.frames[0].num_samples / codec.sample_rate
    started = time.perf_counter()
    after = codec.decode(tokens, batch_size=1, on_step=stepper(job, emit, "decoding", length))
    return _coded(codec, source, name, None, tokens, None, after, time.perf_counter() - started)


def _coded(codec, source: str, name: str, clip, tokens: Tokens, before, after: Waveform, seconds: float) -> Coded:
    device, quality = device_name(str(codec.device)), None if before is None else measured_stoi(before, after)
    return Coded(
        source,
        codec.name,
        name,
        clip,
        before,
        after,
        tokens,
        seconds,
        device,
        codec.frame_rate,
        codec.bit_rate,
        quality,
    )


def mix(clip: Clip, noise: str, snr: float) -> Mixed:
    """Add noise to a clip, the same each time."""
    check_enhancable(clip)
    if noise not in NOISES:
        raise InvalidInput(f"Noise must be one of {', '.join(NOISES)}, not {noise!r}.")
    if not isinstance(snr, (int, float)) or not LOUDEST <= snr <= QUIETEST:
        raise InvalidInput(f"Speech over noise must be {LOUDEST} to {QUIETEST} dB, not {snr}.")
    clean = read_audio(clip.path, NOISE_RATE)
    if noise == "none":
        return Mixed(clip, noise, float(snr), clean, clean)
    clean_T = clean.samples[0]
    noise_T = make_noise(noise, len(clean_T), np.random.default_rng(NOISE_SEED), NOISE_RATE)
    noisy_T = add_noise(clean_T, noise_T, snr)
    noisy_T = noisy_T / noisy_T.abs().max().clamp(min=1.0)
    return Mixed(clip, noise, float(snr), clean, in_16_bits(Waveform(noisy_T, NOISE_RATE)))


def enhance_clip(
    enhancer, source: str, mixed: Mixed, seed: int, greedy: bool, temperature: float, job: Job, emit: Emit | None = None
) -> Enhanced:
    """Make a noisy clip clean."""
    noisy = mixed.noisy
    started = time.perf_counter()
    after = enhancer.enhance(
        mixed.clip.path if mixed.noise == "none" else noisy, seed=seed, greedy=greedy, temperature=temperature,
        batch_size=1, on_step=stepper(job, emit, "enhancing", noisy.seconds),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    job.check()
    known = [measured_stoi(mixed.clean, wave) for wave in (noisy, after)] if mixed.noise != "none" else [None]
    return Enhanced(
        source, enhancer.name, mixed, after, seed, greedy, temperature, seconds, device_name(str(enhancer.device)),
        None if None in known else tuple(known),
    )  # fmt: skip


def has_dnsmos(enhanced: Enhanced) -> bool:
    """Whether DNSMOS is installed, and the clip long enough for it."""
    return is_available("dnsmos") and enhanced.after.seconds >= MIN_SECONDS


def with_dnsmos(enhanced: Enhanced, job: Job) -> Enhanced:
    """The same with DNSMOS of the whole impression, which takes about a second."""
    scores = []
    for wave in (enhanced.mixed.noisy, enhanced.after):
        job.check()
        scores.append(dnsmos(_beginning(wave, DNSMOS_SECONDS))["dnsmos_ovrl"])
    return replace(enhanced, dnsmos=tuple(scores))


def transcribe_clip(
    recogniser, source: str, clip: Clip, hotwords: tuple[str, ...], job: Job, emit: Emit | None = None
) -> Transcribed:
    """Write down what is said in a clip."""
    started = time.perf_counter()
    transcript = recogniser.transcribe(
        clip.path, batch_size=1, on_step=stepper(job, emit, "transcribing", clip.seconds),
        **({"hotwords": list(hotwords)} if hotwords else {}),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    device = device_name(str(recogniser.device))
    return Transcribed(source, recogniser.name, clip, transcript, hotwords, seconds, device)


def speak_text(speaker, source: str, text: str, seed: int, job: Job, emit: Emit | None = None) -> Spoken:
    """Say a text."""
    text = checked_text(text)
    started = time.perf_counter()
    after = speaker.speak(text, seed=seed, on_step=stepper(job, emit, "speaking", None))
    seconds = time.perf_counter() - started
    return Spoken(source, speaker.name, text, after, seed, seconds, device_name(str(speaker.device)))


def stepper(job: Job, emit: Emit | None, what: str, seconds: float | None):
    """The `on_step` of a job: it ends a stopped one, and tells what share of `seconds` of sound is done."""

    def on_step(step: int, total: int, preview=None) -> None:
        job.check()
        if emit is not None:
            emit(Progress(what, min(step / max(total, 1), 1.0), seconds))

    return on_step


def check_enhancable(clip: Clip) -> None:
    """Refuse a clip that would keep the device for too long."""
    if clip.seconds > MAX_ENHANCED_SECONDS:
        raise LimitExceeded(
            f"{clip.name} lasts {clip.seconds:.0f} s; at most {MAX_ENHANCED_SECONDS} s are enhanced here. "
            "`mediatok enhance` takes any length."
        )


def checked_text(text: str | None) -> str:
    """A text to speak on one line."""
    text = " ".join((text or "").split())
    if not text:
        raise InvalidInput("Type what to say.")
    if len(text) > MAX_TEXT:
        raise InvalidInput(f"The text has {len(text)} characters; at most {MAX_TEXT} are spoken at once.")
    return text


def checked_hotwords(text: str | None) -> tuple[str, ...]:
    """Words between commas or line ends."""
    words = [word.strip() for line in (text or "").splitlines() for word in line.split(",")]
    words = list(dict.fromkeys(word for word in words if word))
    if len(words) > MAX_HOTWORDS:
        raise InvalidInput(f"{len(words)} hotwords are given; at most {MAX_HOTWORDS} are used here.")
    return tuple(words)


def takes_hotwords(recogniser) -> bool:
    """Whether a recogniser listens for given words."""
    return bool(getattr(recogniser.config, "hotword_depth", 0))


def in_16_bits(waveform: Waveform) -> Waveform:
    """The sound as a 16-bit file of it holds it."""
    import soundfile

    file = io.BytesIO()
    samples = waveform.samples.clamp(-1, 1).T.numpy()
    soundfile.write(file, samples, waveform.sample_rate, format="WAV", subtype="PCM_16")
    return read_audio(file.getvalue())


def measured_stoi(reference: Waveform, decoded: Waveform) -> float | None:
    """STOI, or None where the clip is too short or has too little speech."""
    if min(reference.seconds, decoded.seconds) < MIN_SECONDS:
        return None
    value = stoi(_beginning(reference, STOI_SECONDS), _beginning(decoded, STOI_SECONDS))
    return value if np.isfinite(value) else None


def _beginning(waveform: Waveform, seconds: int) -> Waveform:
    return Waveform(waveform.samples[:, : seconds * waveform.sample_rate], waveform.sample_rate)


def clip_of(waveform: Waveform, name: str, folder: Path) -> Clip:
    """A result as the clip to go on with: what its file holds."""
    path = folder / name
    waveform.save(path)
    return Clip(name, path, waveform.seconds, waveform.sample_rate)
