"""VAT on a CPU, in fp32: the surface of a field of the paper's size at 256 cells a side (`near` against all points by
the same network, `dense`, and by the plain formulation); quantization of the paper's smallest size; and a mesh of
10,000 faces to tokens and back to a mesh of 128 cells a side with vat-tiny.
"""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
import torch.nn.functional as F
import trimesh
from measure import alternate, arguments, peak_mib, record, report_peaks
from mediatok.core.isosurface import extract_surface
from mediatok.nn.multiscale_vq import MultiScaleQuantizer
from mediatok.tokenizers.shape.triplane import OccupancyHead, TriplaneField
from mediatok.tokenizers.shape.vat import released_configs
from plain_vat import dense_surface, plain_encode, plain_occupancy

WAYS = ("plain", "dense", "near")
SURFACE, QUANTIZE, ROUND_TRIP = "surface at 256", "quantize 2 x 680", "10,000 faces to tokens to 128"
CELLS = 256


def smooth_field() -> tuple[torch.Tensor, OccupancyHead]:
    """Planes [3, 32, 256, 256] that change slowly, as trained ones do, with a sixth of the box inside."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        planes = F.interpolate(torch.randn(3, 32, 6, 6), (256, 256), mode="bicubic")
        head = OccupancyHead(32, 64).requires_grad_(False)
        points = torch.rand(1, 20_000, 3) * 2 - 1
    head.last.bias -= TriplaneField(planes[None], head).occupancy(points).quantile(5 / 6)
    return planes, head


def quantizer() -> tuple[MultiScaleQuantizer, torch.Tensor]:
    """Random weights, and latents that use many codes."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantize = MultiScaleQuantizer(16384, 32, released_configs()["vat-680"]["scales"]).requires_grad_(False)
    return quantize, torch.randn(2, 256, 32, generator=generator)


def scan() -> trimesh.Trimesh:
    """A mesh of 10,000 faces."""
    return trimesh.creation.torus(0.7, 0.25, major_sections=100, minor_sections=50)


def calls(way: str) -> dict[str, Callable[[], object]]:
    planes, head = smooth_field()
    quantize, latents = quantizer()
    field = TriplaneField(planes[None], head)

    def values_of(points_N3: torch.Tensor) -> torch.Tensor:
        return field.occupancy(points_N3[None])[0]

    if way == "plain":
        return {
            SURFACE: partial(dense_surface, partial(plain_occupancy, planes, head), CELLS),
            QUANTIZE: partial(plain_encode, quantize, latents),
        }
    if way == "dense":
        return {SURFACE: partial(dense_surface, values_of, CELLS)}
    model, mesh = mt.load("vat-tiny"), scan()
    return {
        SURFACE: partial(extract_surface, values_of, CELLS),
        QUANTIZE: partial(quantize.encode, latents),
        ROUND_TRIP: lambda: model.decode(model.encode(mesh), resolution=128),
    }


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(options.peak))
        return
    peaks = {way: peak_mib(way, options.threads) for way in WAYS}
    calls_of = {way: calls(way) for way in WAYS}
    lines = [
        "| operation | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | result |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation in (SURFACE, QUANTIZE, ROUND_TRIP):
        ways = {way: of_way[operation] for way, of_way in calls_of.items() if operation in of_way}
        with torch.inference_mode():
            results = {way: call() for way, call in ways.items()}
        times = alternate(ways, options.repeats)
        for way, taken in times.items():
            slowest = times.get("plain", taken)
            ratio = {clock: slowest[clock] / taken[clock] for clock in taken}
            peak = peaks[way][operation]
            lines.append(
                f"| {operation} | {way} | {taken['wall']:.2f} | {taken['cpu']:.2f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) "
                f"| {described(results[way], results.get('dense', results.get('plain')))} |"
            )
    record("vat", lines, options)


def described(result, expected) -> str:
    if isinstance(result, torch.Tensor):
        return (
            f"{int((result == expected).sum())} of {expected.numel()} ids as plain, {expected.unique().numel()} codes"
        )
    text = f"{len(result.vertices):,} vertices"
    if expected is None or len(result.vertices) != len(expected.vertices):
        return text
    return f"{text}, at most {abs(result.vertices - expected.vertices).max():.1e} from dense"


if __name__ == "__main__":
    main()
