"""What is understood of texts that a model reads aloud, and how it sounds.

    python -m mediatok.evaluation.speaking speak-tiny data/festvox-ru --split test --recogniser paraformer-tiny --dnsmos

reads the texts of a folder's clips aloud and prints the character error rate of a recogniser, of the clips themselves
and of what was said, DNSMOS, and seconds of both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.audio import Waveform, read_audio
from ..core.errors import InvalidInput, MediatokError
from ..core.registry import load
from ..training.speech_data import SpeechFolder
from .error_rates import TRANSCRIPTS_FILE, plain_text, read_transcripts
from .speech_metrics import dnsmos

Figures = dict[str, float]


def measure_speaking(
    speaker, clips: Sequence[Waveform], texts: Sequence[str], recogniser, with_dnsmos: bool = False, seed: int = 0
) -> dict[str, Figures]:
    """Figures of `clips`, in which `texts` are said, and of the same texts read aloud; text i has seed `seed` + i."""
    spoken = [speaker.speak(text, seed=seed + index) for index, text in enumerate(texts)]
    return {name: _figures(sound, texts, recogniser, with_dnsmos) for name, sound in
            (("recorded", list(clips)), ("spoken", spoken))}  # fmt: skip


def _figures(clips: Sequence[Waveform], texts: Sequence[str], recogniser, with_dnsmos: bool) -> Figures:
    import jiwer

    said = [plain_text(text) for text in texts]
    heard = [plain_text(transcript.text) for transcript in recogniser.transcribe(list(clips))]
    figures = {"seconds": sum(clip.seconds for clip in clips), "cer": float(jiwer.cer(said, heard))}
    if with_dnsmos:
        scores = [dnsmos(clip) for clip in clips]
        figures |= {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.evaluation.speaking", description=__doc__)
    parser.add_argument("speaker", help="name or folder of a Speak model")
    parser.add_argument("folder", type=Path, help="clips and their transcripts.tsv")
    parser.add_argument("--split", help="train, val or test of the folder's splits.json; all clips without")
    parser.add_argument("--limit", type=int, help="how many texts at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recogniser", required=True, help="name or folder of a Paraformer")
    parser.add_argument("--dnsmos", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        speaker, recogniser = load(arguments.speaker), load(arguments.recogniser)
        if not hasattr(speaker, "speak"):
            raise InvalidInput(f"{arguments.speaker} holds a {type(speaker).__name__}, which reads nothing aloud")
        texts = read_transcripts(arguments.folder / TRANSCRIPTS_FILE)
        paths = [path for path in SpeechFolder(arguments.folder, arguments.split).paths if texts.get(path.stem)]
        if not (paths := paths[: arguments.limit]):
            raise InvalidInput(f"no clip of {arguments.folder} has a text in {TRANSCRIPTS_FILE}")
        figures = measure_speaking(
            speaker, [read_audio(path) for path in paths], [texts[path.stem] for path in paths], recogniser,
            arguments.dnsmos, arguments.seed,
        )  # fmt: skip
    except MediatokError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    rounded = {name: {key: round(value, 4) for key, value in values.items()} for name, values in figures.items()}
    print(json.dumps({"texts": len(paths)} | rounded, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
