"""xAR-B, 5 steps a cell: `mediatok` in fp32 and bfloat16 against the plain formulation."""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
from measure import alternate, arguments, peak_mib, record, report_peaks, with_torchs_kernels
from mediatok.generators.xar import SeededNoise
from plain_xar import PlainXAR

NAME, STEPS = "xar-b", 5
WAYS = {  # dtype, and whether the weights are packed
    "plain": ("float32", False),
    "fp32": ("float32", False),
    "fp32, packed": ("float32", True),
    "bfloat16, packed": ("bfloat16", True),
}
BATCHES = (1, 4)


def build(way: str) -> torch.nn.Module:
    dtype, is_packed = WAYS[way]
    model = mt.create(NAME, seed=0, dtype=dtype)
    if is_packed:
        model.pack_network()
    return model


def calls(way: str, model: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    settings = model.settings(STEPS)

    def generate(labels: torch.Tensor) -> torch.Tensor:
        rngs = [torch.Generator().manual_seed(i) for i in range(len(labels))]
        if way == "plain":
            return with_torchs_kernels(PlainXAR(model).generate)(labels, settings, SeededNoise(rngs))
        return model.generate_latents(labels, settings, rngs)

    return {f"batch {size}": partial(generate, torch.arange(size)) for size in BATCHES}


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(options.peak, build(options.peak)))
        return
    peaks = {way: peak_mib(way, options.threads) for way in WAYS}
    of_way = {way: calls(way, build(way)) for way in WAYS}
    lines = [
        "| operation | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | max difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation in of_way["plain"]:
        ways = {way: of_way[way][operation] for way in WAYS}
        with torch.inference_mode():
            results = {way: call() for way, call in ways.items()}
        times = alternate(ways, options.repeats)
        for way, taken in times.items():
            ratio, peak = {clock: times["plain"][clock] / taken[clock] for clock in taken}, peaks[way][operation]
            difference = (results[way] - results["plain"]).abs().max()
            lines.append(
                f"| {operation} | {way} | {taken['wall']:.2f} | {taken['cpu']:.2f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) "
                f"| {difference:.1e} |"
            )
    record("xar", lines, options)


if __name__ == "__main__":
    main()
