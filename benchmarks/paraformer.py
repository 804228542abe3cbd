"""Paraformer-large with time stamps, from the waveform: `mediatok` in fp32 and bfloat16 against the plain way."""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
from measure import alternate, arguments, peak_mib, record, report_peaks, with_torchs_kernels
from mediatok.generators.paraformer import Paraformer
from plain_paraformer import PlainParaformer
from torch import Tensor

NAME, RATE = "paraformer-long", 16000
WAYS = {  # dtype, and whether the weights are packed
    "plain": ("float32", False),
    "fp32": ("float32", False),
    "fp32, packed": ("float32", True),
    "bfloat16, packed": ("bfloat16", True),
}
CLIPS = {"1 x 30 s": (1, 30), "4 x 10 s": (4, 10)}


def build(way: str) -> Paraformer:
    dtype, is_packed = WAYS[way]
    model = mt.create(NAME, seed=0)
    # Random weights hear nothing: rates around 1/6 give three tokens a second, as speech has.
    torch.nn.init.constant_(model.predictor.out.bias, -1.6)
    model.cast(getattr(torch, dtype))
    if is_packed:
        model.pack_network()
    return model


def log_probs(model: Paraformer, wave_BN: Tensor) -> Tensor:
    features_BTF, lengths_B = model.frontend(wave_BN)
    frames_BTW, inside_BT = model.encode(features_BTF, lengths_B)
    return model.name_tokens(model.hear(frames_BTW, lengths_B), frames_BTW, inside_BT)


def calls(way: str, model: Paraformer) -> dict[str, Callable[[], object]]:
    def recognize(wave_BN: Tensor) -> object:
        if way == "plain":
            return with_torchs_kernels(PlainParaformer(model).recognize)(wave_BN)
        return model.recognize(*model.frontend(wave_BN))

    return {name: partial(recognize, wave(*sizes)) for name, sizes in CLIPS.items()}


def wave(clips: int, seconds: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    loudness = 1.2 + torch.sin(torch.arange(seconds * RATE) / RATE * 9)
    return torch.randn(clips, seconds * RATE, generator=rng) * 0.05 * loudness


def differences(models: dict[str, Paraformer], clips: Tensor) -> dict[str, str]:
    """Of each way's log-probabilities from the plain ones; "-" where it hears another number of tokens."""
    expected, _, _ = with_torchs_kernels(PlainParaformer(models["plain"]).recognize)(clips)
    found = {}
    for way, model in models.items():
        ours = log_probs(model, clips)
        found[way] = f"{(ours - expected).abs().max():.0e}" if ours.shape == expected.shape else "-"
    return found


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(options.peak, build(options.peak)))
        return
    peaks = {way: peak_mib(way, options.threads) for way in WAYS}
    models = {way: build(way) for way in WAYS}
    of_way = {way: calls(way, model) for way, model in models.items()}
    lines = [
        "| clips | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | max difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for clips, sizes in CLIPS.items():
        times = alternate({way: of_way[way][clips] for way in WAYS}, options.repeats)
        with torch.inference_mode():
            errors = differences(models, wave(*sizes))
        for way, taken in times.items():
            ratio, peak = {clock: times["plain"][clock] / taken[clock] for clock in taken}, peaks[way][clips]
            lines.append(
                f"| {clips} | {way} | {taken['wall']:.2f} | {taken['cpu']:.2f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) "
                f"| {errors[way]} |"
            )
    record("paraformer", lines, options)


if __name__ == "__main__":
    main()
