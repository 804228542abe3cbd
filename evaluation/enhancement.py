"""What enhancement does to noisy speech, before and after, beside the clean clips and what the codec makes of them.

    python -m mediatok.evaluation.enhancement gense-tiny data/festvox-ru --split test --recogniser paraformer-tiny \\
        --dnsmos --speaker pretrained.pt

makes each clip noisy in one way that a seed decides (`training/noise.py`), and prints means: STOI and PESQ against the
clean clip, DNSMOS, the character error rate of a recogniser, and how like the clean clip's the voice is.

Shape suffixes: T samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..core.audio import Waveform, read_audio
from ..core.errors import InvalidInput, MediatokError
from ..core.registry import load
from ..training.noise import NoiseRecipe, corrupt
from ..training.speech_data import SpeechFolder
from .error_rates import TRANSCRIPTS_FILE, plain_text, read_transcripts
from .speaker import SpeakerEncoder, load_speaker_encoder
from .speech_metrics import measure_pairs

STATES = ("clean", "noisy", "enhanced", "codec")  # codec: the clean clip through the enhancer's codec, its ceiling
Figures = dict[str, float]


def noisy_clips(clean: Sequence[Waveform], noise: NoiseRecipe, seed: int = 0) -> list[Waveform]:
    """Every clip made noisy; the others are the voices of babble. The same clips and seed give the same noise."""
    voices = [clip.samples[0] for clip in clean]
    return [
        Waveform(
            corrupt(clip.samples[0], noise, np.random.default_rng([seed, index]), clip.sample_rate, voices),
            clip.sample_rate,
        )
        for index, clip in enumerate(clean)
    ]


def measure_enhancement(
    enhancer,
    clean: Sequence[Waveform],
    noise: NoiseRecipe,
    *,
    seed: int = 0,
    texts: Sequence[str] | None = None,
    recogniser=None,
    speaker: SpeakerEncoder | None = None,
    with_dnsmos: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Figures]:
    """Means over `clean` in each of `STATES`; mono clips at the sample rate of the enhancer's codec.

    texts: what is said in each clip, for the character error rate of `recogniser`.
    """
    states = {"clean": list(clean), "noisy": noisy_clips(clean, noise, seed), "enhanced": []}
    for index, clip in enumerate(states["noisy"]):
        states["enhanced"].append(enhancer.enhance(clip, seed=seed + index))
        if on_step is not None:
            on_step(index + 1, len(clean))
    states["codec"] = enhancer.codec.reconstruct(states["clean"])
    figures = {}
    for state, clips in states.items():
        values = measure_pairs(clean, clips, with_dnsmos)
        if recogniser is not None and texts is not None:
            values["cer"] = _error_rate(texts, recogniser.transcribe(clips))
        if speaker is not None:
            values["speaker_similarity"] = _mean(map(speaker.similarity, clean, clips))
        figures[state] = values
    return figures


def _error_rate(texts: Sequence[str], transcripts: Sequence) -> float:
    import jiwer

    return float(jiwer.cer([plain_text(text) for text in texts], [plain_text(said.text) for said in transcripts]))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.evaluation.enhancement", description=__doc__)
    parser.add_argument("enhancer", help="name or folder of a GenSE model")
    parser.add_argument("folder", type=Path, help="clean speech")
    parser.add_argument("--split", help="train, val or test of the folder's splits.json; all clips without")
    parser.add_argument("--limit", type=int, help="how many clips at most")
    parser.add_argument("--snr", type=float, nargs=2, default=(0.0, 15.0), metavar=("LOW", "HIGH"), help="in dB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recogniser", help="name or folder of a Paraformer; needs the folder's transcripts.tsv")
    parser.add_argument("--speaker", type=Path, help="weights of the speaker encoder: pretrained.pt of resemblyzer")
    parser.add_argument("--dnsmos", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(_measure(arguments), indent=1))
    except MediatokError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _measure(arguments: argparse.Namespace) -> dict:
    enhancer = load(arguments.enhancer)
    if not hasattr(enhancer, "enhance"):
        raise InvalidInput(f"{arguments.enhancer} holds a {type(enhancer).__name__}, which enhances nothing")
    paths = SpeechFolder(arguments.folder, arguments.split).paths[: arguments.limit]
    clean = [read_audio(path, enhancer.codec.sample_rate).mono() for path in paths]
    texts = None
    if arguments.recogniser:
        known = read_transcripts(arguments.folder / TRANSCRIPTS_FILE)
        texts = [known.get(path.stem, "") for path in paths]
    low, high = arguments.snr
    if low > high:
        raise InvalidInput(f"--snr {low:g} {high:g}: the lowest comes first")
    figures = measure_enhancement(
        enhancer, clean, NoiseRecipe(snr=(low, high)), seed=arguments.seed, texts=texts,
        recogniser=load(arguments.recogniser) if arguments.recogniser else None,
        speaker=load_speaker_encoder(arguments.speaker) if arguments.speaker else None, with_dnsmos=arguments.dnsmos,
        on_step=lambda step, total: print(f"{step} of {total} clips enhanced", file=sys.stderr),
    )  # fmt: skip
    return {
        "clips": len(clean),
        "snr": [low, high],
        **{state: {name: round(value, 4) for name, value in values.items()} for state, values in figures.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
