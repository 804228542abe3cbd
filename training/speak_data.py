"""Clips for Speak: the tokens that a codec makes of each, and where a recogniser hears its letters begin.

All are made once, at the start of a run, and kept in a file for the next start.

Shape suffixes: K tokens, N letters, T samples, L frames, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.audio import read_audio
from ..core.errors import InvalidInput, MediatokError
from ..core.speech_tokenizer import SpeechTokenizer
from ..generators.paraformer import Paraformer
from ..generators.paraformer_text import GOES_ON, SPECIAL
from .alignment import token_ends
from .text import SpokenFolder
from .utterances import SHORTEST_SECONDS, clip_seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpokenClip:
    """A clip's file, its text as written and as spoken (see `text.spoken`), and its tokens, int64 [K].

    starts_N: the second in which each letter or digit begins, fp32; [0] where that is not known.
    """

    path: Path
    text: str
    spoken: str
    ids_K: Tensor
    starts_N: Tensor


def encode_clips(
    source: SpokenFolder, codec: SpeechTokenizer, recogniser: Paraformer | None, max_seconds: float, cache: Path
) -> list[SpokenClip]:
    """The clips of `source` of up to `max_seconds`, read from `cache` when that is of the same ones.

    Raises:
        InvalidInput: there is none.
    """
    rows = list(zip(source.paths, source.written, source.texts, strict=True))
    rows = [row for row in rows if SHORTEST_SECONDS <= clip_seconds(row[0]) <= max_seconds]
    head = None if recogniser is None else recogniser.ctc_head
    key = _key(rows, codec, head)
    parts = _read(cache, key)
    if parts is None:
        parts = {}
        for number, (path, _, spoken) in enumerate(rows):
            try:
                parts[f"{number}.ids"] = codec.encode(path).ids[0].int()
                clip = read_audio(path, codec.sample_rate if head is None else recogniser.config.sample_rate)
                starts_N = torch.zeros(0) if head is None else letter_starts(recogniser, clip.samples[0], spoken)
                parts[f"{number}.starts"] = starts_N
            except MediatokError as error:
                logger.warning("skipped a broken clip: %s", error)
                parts.pop(f"{number}.ids", None)
            if number % 200 == 0:
                logger.info("encoded %d of %d clips", number, len(rows))
        cache.parent.mkdir(parents=True, exist_ok=True)
        staged = cache.with_suffix(".writing")
        save_file(parts, staged, {"key": key})
        staged.replace(cache)
    whole = [(number, row) for number, row in enumerate(rows) if f"{number}.ids" in parts]
    if not whole:
        raise InvalidInput(f"no clip with a text lasts up to {max_seconds:g} s")
    return [SpokenClip(*row, parts[f"{number}.ids"].long(), parts[f"{number}.starts"]) for number, row in whole]


@torch.inference_mode()
def letter_starts(recogniser: Paraformer, wave_T: Tensor, text: str) -> Tensor:
    """The second in which each letter or digit of a spoken text begins, fp32 [N]; [0] where that cannot be told.

    A token of several letters is divided evenly.
    """
    vocabulary, device = recogniser.vocabulary, recogniser.device
    ids = vocabulary.encode(text, unknown=True)
    pieces = [vocabulary.tokens[number] for number in ids]
    letters = [sum(c.isalnum() for c in piece.removesuffix(GOES_ON)) for piece in pieces]
    if any(piece in SPECIAL for piece in pieces):
        return torch.zeros(0)
    features_1LF, lengths_1 = recogniser.frontend(wave_T[None].to(device))
    frames_1LW, _ = recogniser.encode(features_1LF, lengths_1)
    log_probs_1LV = recogniser.ctc_head(frames_1LW).float().log_softmax(dim=-1)
    counts_1 = torch.tensor([len(ids)], device=device)
    begins_1L, sure_1 = token_ends(log_probs_1LV, lengths_1, torch.tensor([ids], device=device), counts_1, False)
    if not float(sure_1):
        return torch.zeros(0)
    seconds = (begins_1L[0].nonzero()[:, 0] * recogniser.frontend.seconds_per_frame).tolist()
    seconds.append(wave_T.shape[0] / recogniser.config.sample_rate)
    return torch.tensor(
        [
            seconds[token] + (seconds[token + 1] - seconds[token]) * letter / count
            for token, count in enumerate(letters)
            for letter in range(count)
        ]
    )


def _key(rows: list[tuple[Path, str, str]], codec: SpeechTokenizer, head: torch.nn.Module | None) -> str:
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns, text] for path, text, _ in rows]
    digest = hashlib.sha256(json.dumps([codec.fingerprint, files]).encode())
    if head is not None:
        digest.update(head.weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(cache: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError):
        pass  # not there yet, or cut short
    return None
