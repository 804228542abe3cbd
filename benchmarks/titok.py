"""TiTok-S-128, one picture: `mediatok` in fp32 and with bfloat16 weights against the plain formulation in fp32."""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
from measure import alternate, arguments, peak_mib, record, report_peaks
from plain_titok import PlainTiTok

NAME = "titok-s128"
DTYPES = {"plain": "float32", "fp32": "float32", "bfloat16": "bfloat16"}


def build(way: str) -> torch.nn.Module:
    """The model of one way; all have the same random weights."""
    model = mt.create(NAME, seed=0, dtype=DTYPES[way])
    if way != "plain":
        return model
    with torch.device("meta"):
        plain = PlainTiTok(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain.eval()


def inputs(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 256, 256, generator=generator).to(model.latent_tokens.dtype)
    return pixels, torch.randint(4096, (1, 128), generator=generator)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """PSNR in dB, with the range of `b` as the peak: random weights do not decode to [0, 1]."""
    return float(10 * torch.log10((b.max() - b.min()) ** 2 / (a - b).square().mean()))


def calls(model: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    pixels, ids = inputs(model)
    return {"encode": partial(model.encode_pixels, pixels), "decode": partial(model.decode_ids, ids)}


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(build(options.peak)))
        return
    peaks = {way: peak_mib(way, options.threads) for way in DTYPES}
    calls_of = {way: calls(build(way)) for way in DTYPES}
    lines = [
        "| operation | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | equal to plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation in ("encode", "decode"):
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
    record("titok", lines, options)


def agreement(result: torch.Tensor, plain: torch.Tensor) -> str:
    if not plain.is_floating_point():
        return f"{int((result == plain).sum())} of {plain.numel()} ids"
    if torch.equal(result, plain):
        return "yes"
    return f"max error {(result - plain).abs().max():.1e}, {psnr(result, plain):.1f} dB"


if __name__ == "__main__":
    main()
