"""How well semantic tokens tell phones apart: purity and mutual information (HuBERT, Hsu et al. 2021, section IV-F).

    python -m mediatok.evaluation.phones semantic-tiny data/festvox-ru --split test

compares each frame's token with the phone in its middle, which FOLDER/phones/NAME.tsv tells (lines of start <tab> end
<tab> phone, in seconds), as `make data` writes them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import InvalidInput, MediatokError
from ..core.files import shown
from ..core.registry import load
from ..training.speech_data import SpeechFolder

Segment = tuple[float, float, str]  # start and end in seconds, phone


def agreement(tokens: Sequence[int], phones: Sequence[str]) -> dict[str, float]:
    """Of a token and a phone for each frame.

    phone_purity: share of frames whose phone is the commonest of their token. pnmi: mutual information of both in
    shares of the phones' entropy; 1 where the token tells the phone. commonest_phone: the purity of one single token.

    Raises:
        InvalidInput: no frames, or one phone only.
    """
    pairs, of_token, of_phone = (Counter(items) for items in (zip(tokens, phones, strict=True), tokens, phones))
    if len(of_phone) < 2:
        raise InvalidInput(f"{len(of_phone)} phones in {len(phones)} frames: there is nothing to tell apart")
    best: Counter = Counter()
    for (token, _), count in pairs.items():
        best[token] = max(best[token], count)
    total = len(phones)
    information = sum(n / total * math.log(n * total / (of_token[token] * of_phone[phone]))
                      for (token, phone), n in pairs.items())  # fmt: skip
    entropy = -sum(n / total * math.log(n / total) for n in of_phone.values())
    return {
        "frames": total,
        "phones": len(of_phone),
        "tokens_used": len(of_token),
        "phone_purity": sum(best.values()) / total,
        "pnmi": information / entropy,
        "commonest_phone": max(of_phone.values()) / total,
    }


def read_segments(path: Path) -> list[Segment]:
    """The phones of one clip, in the order of time.

    Raises:
        InvalidInput: a file that is missing or malformed.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [(float(start), float(end), phone) for start, end, phone in csv.reader(file, delimiter="\t")]
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{shown(path)} does not tell the phones of a clip: {error}") from error


def measure_phones(tokenizer, folder: Path, split: str | None = None) -> dict[str, float]:
    """`agreement` over a folder's clips; silence counts as a phone, frames past the last phone do not count."""
    tokens, phones = [], []
    for path in SpeechFolder(folder, split).paths:
        segments = read_segments(folder / "phones" / f"{path.stem}.tsv")
        starts = [start for start, _, _ in segments]
        encoded = tokenizer.encode(path)
        for frame, token in enumerate(encoded.ids[0].tolist()):
            middle = (frame + 0.5) / tokenizer.frame_rate
            place = bisect_right(starts, middle) - 1
            if place >= 0 and middle < segments[place][1]:
                tokens.append(token)
                phones.append(segments[place][2])
    return agreement(tokens, phones)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.evaluation.phones", description=__doc__)
    parser.add_argument("tokenizer", help="a name from `mediatok models`, or a folder")
    parser.add_argument("folder", type=Path, help="clips, with phones/ beside them")
    parser.add_argument("--split", help="train, val or test of the folder's splits.json; all clips without")
    arguments = parser.parse_args(argv)
    try:
        tokenizer = load(arguments.tokenizer)
        if getattr(tokenizer, "num_codebooks", None) != 1:
            raise InvalidInput(f"{tokenizer.name} is no speech tokenizer with one token a frame")
        print(json.dumps(measure_phones(tokenizer, arguments.folder, arguments.split), indent=2))
    except MediatokError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
