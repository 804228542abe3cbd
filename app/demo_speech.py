"""The speech part of the self-check (`demo.py`): the codec gives the sample clips back, the recogniser hears both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..core.audio import Waveform, list_audio, read_audio
from ..core.errors import MediatokError
from ..core.tokens import Tokens
from ..evaluation.speech_metrics import stoi

CLIPS = Path(__file__).parent.parent / "docs" / "clips"
MIN_STOI = 0.6  # below this nobody understands what comes back


@dataclass(frozen=True)
class SpeechRow:
    """One line of the table, what is heard in the original and in what comes back, and that sound."""

    model: str
    clip: str
    tokens: Tokens
    stoi: float
    seconds: float
    heard: tuple[str, str]
    sound: Waveform


def check_codec(codec, recogniser, clips: list[Path]) -> list[SpeechRow]:
    """Encode and decode every clip through the bytes of a `.mtok` file.

    Raises:
        MediatokError: a clip that came back below `MIN_STOI`, or tokens that their file does not give back.
    """
    codec.decode(codec.encode(clips[0]))  # the first call is slower and is not timed
    return [_check_clip(codec, recogniser, path) for path in clips]


def _check_clip(codec, recogniser, path: Path) -> SpeechRow:
    original = read_audio(path)
    start = time.perf_counter()
    tokens = codec.encode(original)
    data = tokens.to_bytes()
    loaded = Tokens.from_bytes(data)
    sound = codec.decode(loaded)
    seconds = time.perf_counter() - start
    if loaded != tokens or len(data) != tokens.num_bytes:
        raise MediatokError(f"self-check failed: {codec.name} tokens of {path.name} change in their .mtok file")
    value = stoi(original, sound)
    if not value >= MIN_STOI:
        raise MediatokError(f"self-check failed: {codec.name} gives {path.name} back with a STOI of {value:.2f} only")
    heard = tuple(transcript.text for transcript in recogniser.transcribe([original, sound]))
    return SpeechRow(codec.name, path.stem, tokens, value, seconds, heard, sound)


def format_speech(rows: list[SpeechRow]) -> str:
    """The rows as text, each with what the recogniser hears."""
    lines = [f"{'model':<18}{'clip':<14}{'length':>9}{'tokens':>8}{'bytes':>8}{'STOI':>10}{'seconds':>9}"]
    for row in rows:
        lines.append(
            f"{row.model:<18}{row.clip:<14}{row.sound.seconds:>7.2f} s{int(row.tokens.lengths[0]):>8}"
            f"{row.tokens.num_bytes:>8}{row.stoi:>10.3f}{row.seconds:>9.3f}"
        )
        lines += [f"  heard before: {row.heard[0]}", f"  heard after:  {row.heard[1]}"]
    return "\n".join(lines)


def save_speech(rows: list[SpeechRow], folder: Path) -> None:
    """Write each row's sound and `.mtok` file."""
    for row in rows:
        row.sound.save(folder / f"{row.clip}.{row.model}.wav")
        row.tokens.save(folder / f"{row.clip}.{row.model}.mtok")


def sample_clips() -> list[Path]:
    """The clips that ship."""
    return list_audio(CLIPS)
