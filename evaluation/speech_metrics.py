"""Quality of decoded speech against its original: STOI, PESQ, SI-SDR, and DNSMOS, which needs no original.

    python -m mediatok.evaluation.speech_metrics MODEL data/festvox-ru --split val [--dnsmos]

prints the means over a folder's clips, encoded and decoded by MODEL. Nothing is downloaded: DNSMOS's networks come with
the package `speechmos`.

Shape suffixes: T samples.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.audio import Waveform, list_audio, read_audio
from ..core.errors import InvalidInput, MediatokError, MissingDependency
from ..core.registry import load

METRICS_RATE = 16000  # wide-band PESQ and DNSMOS are defined at this rate alone
MIN_SECONDS = 0.5  # below it STOI and PESQ have too few frames to say anything
PACKAGES = {"stoi": "pystoi", "pesq_wb": "pesq", "dnsmos": "speechmos"}
Figures = dict[str, float]


def stoi(reference: Waveform, decoded: Waveform, extended: bool = False) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), at most 1; NaN for clips with hardly any speech.

    extended: the measure of Jensen & Taal 2016, which hears what changes quickly, too.
    """
    real_T, fake_T = _pair(reference, decoded)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = float(_package("stoi").stoi(real_T.numpy(), fake_T.numpy(), METRICS_RATE, extended=extended))
    too_short = any("Not enough STFT frames" in str(warning.message) for warning in caught)
    return float("nan") if too_short else value  # the package gives 1e-5 then


def pesq_wb(reference: Waveform, decoded: Waveform) -> float:
    """Wide-band PESQ (ITU-T P.862.2), 1 to 4.64; NaN where it finds no speech."""
    package = _package("pesq_wb")
    real_T, fake_T = _pair(reference, decoded)
    try:
        return float(package.pesq(METRICS_RATE, real_T.numpy(), fake_T.numpy(), "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return float("nan")


def si_sdr(reference: Waveform, decoded: Waveform) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019). Low for codecs that make up the phase."""
    real_T, fake_T = (wave_T.double() - wave_T.double().mean() for wave_T in _pair(reference, decoded))
    target_T = (fake_T @ real_T) / real_T.square().sum().clamp(min=1e-12) * real_T
    noise = (fake_T - target_T).square().sum().clamp(min=1e-12)
    return float(10 * (target_T.square().sum().clamp(min=1e-12) / noise).log10())


def dnsmos(decoded: Waveform) -> Figures:
    """DNSMOS P.835 (Reddy et al. 2022): predicted opinion scores, 1 to 5, of speech, background and the whole."""
    wave = decoded.mono().resample(METRICS_RATE).samples[0].clamp(-1, 1)
    scores = _package("dnsmos").dnsmos.run(wave.numpy(), sr=METRICS_RATE)
    return {f"dnsmos_{part}": float(scores[f"{part}_mos"]) for part in ("sig", "bak", "ovrl")}


def is_available(metric: str) -> bool:
    """Whether the package that computes `metric` is installed."""
    return importlib.util.find_spec(PACKAGES[metric]) is not None


def measure_pairs(references: Sequence[Waveform], decoded: Sequence[Waveform], with_dnsmos: bool = False) -> Figures:
    """Means over pairs of clips, of what is installed: stoi, pesq_wb, si_sdr, and on demand DNSMOS of the decoded ones.

    A clip in which a metric finds no speech, and a clip too short to be measured, does not count; NaN where none does.
    """
    metrics: dict[str, Callable] = {"stoi": stoi, "pesq_wb": pesq_wb, "si_sdr": si_sdr}
    values: dict[str, list[float]] = {}
    for real, fake in zip(references, decoded, strict=True):
        if min(real.seconds, fake.seconds) < MIN_SECONDS:
            continue
        for name, metric in metrics.items():
            if name not in PACKAGES or is_available(name):
                values.setdefault(name, []).append(metric(real, fake))
        if with_dnsmos:
            for name, value in dnsmos(fake).items():
                values.setdefault(name, []).append(value)
    return {name: float(torch.tensor(numbers).nanmean()) for name, numbers in values.items()}


def _pair(reference: Waveform, decoded: Waveform) -> tuple[Tensor, Tensor]:
    """Both clips fp32 [T] at 16 kHz, cut to the shorter one."""
    real_T, fake_T = (wave.mono().resample(METRICS_RATE).samples[0] for wave in (reference, decoded))
    length = min(len(real_T), len(fake_T))
    if length < MIN_SECONDS * METRICS_RATE:
        raise InvalidInput(f"quality is measured on clips of at least {MIN_SECONDS} s, not {length / METRICS_RATE:.2f}")
    return real_T[:length], fake_T[:length]


def _package(metric: str):
    name = PACKAGES[metric]
    try:
        module = importlib.import_module(name)
        if metric == "dnsmos":
            importlib.import_module(f"{name}.dnsmos")
    except ImportError as error:
        raise MissingDependency(f"{metric} needs the package {name}: pip install {name} ({error})") from error
    return module


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.evaluation.speech_metrics", description=__doc__)
    parser.add_argument("model", help="name or folder of a speech tokenizer")
    parser.add_argument("folder", type=Path, help="audio to encode and decode")
    parser.add_argument("--split", help="train, val or test of the folder's splits.json; all clips without")
    parser.add_argument("--limit", type=int, default=None, help="how many clips at most")
    parser.add_argument("--dnsmos", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(_measure(arguments), indent=1))
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(arguments: argparse.Namespace) -> Figures:
    model = load(arguments.model)
    if model.modality != "speech":
        raise InvalidInput(f"{arguments.model} is a model of {model.modality}; a speech tokenizer is needed")
    paths = list_audio(arguments.folder)
    if arguments.split is not None:
        from ..training.speech_data import SpeechFolder

        paths = SpeechFolder(arguments.folder, arguments.split).paths
    clips = [read_audio(path, model.sample_rate) for path in paths[: arguments.limit]]
    figures = measure_pairs(clips, model.reconstruct(clips), arguments.dnsmos)
    return {"clips": len(clips), "bits_per_second": model.bit_rate} | {n: round(v, 4) for n, v in figures.items()}


if __name__ == "__main__":
    sys.exit(main())
