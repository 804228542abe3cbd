"""SimCodec at 50 tokens a second, one clip of 1 s and of 10 s: `mediatok` as loaded and packed, against the plain
formulation, all in fp32.
"""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
from measure import alternate, arguments, peak_mib, record, report_peaks
from mediatok.tokenizers.speech.simcodec import SimCodec
from plain_simcodec import PlainSimCodec

NAME = "simcodec-50hz"
WAYS = ("plain", "loaded", "packed")
SECONDS = (1, 10)


def build(way: str) -> torch.nn.Module:
    """The model of one way; all have the same random weights, and codes that lie among the latents."""
    model = mt.create(NAME, seed=0).requires_grad_(False)
    spread_codes(model)
    if way == "plain":
        return PlainSimCodec(model.config).copy_from(model).eval().requires_grad_(False)
    if way == "packed":
        model.pack_network()
    return model


@torch.no_grad()
def spread_codes(model: SimCodec) -> None:
    """Without this, random latents would all choose the same few codes."""
    generator = torch.Generator().manual_seed(2)
    latent_NC = model.encode_latent(clip(4))[0].T
    codes_KC = model.quantize.codebooks[0]
    noise_KC = torch.randn(codes_KC.shape, generator=generator) * latent_NC.std()
    codes_KC.copy_(latent_NC[torch.randint(len(latent_NC), (len(codes_KC),), generator=generator)] + noise_KC / 4)


def clip(seconds: int) -> torch.Tensor:
    return torch.rand(1, 16_000 * seconds, generator=torch.Generator().manual_seed(seconds)) * 2 - 1


def calls(model: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    operations = {}
    for seconds in SECONDS:
        ids_BL = torch.randint(8192, (1, 50 * seconds), generator=torch.Generator().manual_seed(seconds))
        operations[f"encode {seconds} s"] = partial(model.encode_waveform, clip(seconds))
        operations[f"decode {seconds} s"] = partial(model.decode_ids, ids_BL)
    return operations


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(build(options.peak)))
        return
    peaks = {way: peak_mib(way, options.threads) for way in WAYS}
    calls_of = {way: calls(build(way)) for way in WAYS}
    lines = [
        "| operation | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | equal to plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation in calls_of["plain"]:
        ways = {way: of_way[operation] for way, of_way in calls_of.items()}
        with torch.inference_mode():
            results = {way: call() for way, call in ways.items()}
        times = alternate(ways, options.repeats)
        for way, taken in times.items():
            peak = peaks[way][operation]
            ratio = {clock: times["plain"][clock] / taken[clock] for clock in taken}
            lines.append(
                f"| {operation} | {way} | {taken['wall']:.3f} | {taken['cpu']:.3f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) "
                f"| {agreement(results[way], results['plain'])} |"
            )
    record("simcodec", lines, options)


def agreement(result: torch.Tensor, plain: torch.Tensor) -> str:
    if not plain.is_floating_point():
        return f"{int((result == plain).sum())} of {plain.numel()} ids, {plain.unique().numel()} different ones"
    return f"max error {(result - plain).abs().max():.1e} of {plain.abs().max():.2f}"


if __name__ == "__main__":
    main()
