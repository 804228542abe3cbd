"""nearest_code against the plain expression: all N x K distances, then argmin."""

from functools import partial

import torch
from measure import alternate, arguments, peak_mib, record, report_peaks
from mediatok.kernels.nearest import nearest_code

SHAPES = {  # rows, codes, dimensions
    "TiTok, 1 picture of 128 tokens": (128, 4096, 12),
    "TiTok, 64 pictures": (8192, 4096, 12),
    "TiTok vq8k, 32 pictures": (4096, 8192, 64),
    "MaskGIT-VQGAN, 1 picture": (256, 1024, 256),
    "MaskGIT-VQGAN, 16 pictures": (4096, 1024, 256),
}


def plain(z_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    distance_NK = (
        (z_ND**2).sum(dim=1, keepdim=True)
        + (codebook_KD**2).sum(dim=1)
        - 2 * torch.einsum("nd,kd->nk", z_ND, codebook_KD)
    )
    return distance_NK.argmin(dim=1)


def inputs(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, codes, dims = shape
    return torch.randn(rows, dims, generator=generator), torch.randn(codes, dims, generator=generator)


def main() -> None:
    options = arguments(__doc__)
    ways = {"plain": plain, "nearest_code": nearest_code}
    if options.peak:
        way = ways[options.peak]
        way(*inputs((1, 2, 3)))
        report_peaks({name: partial(way, *inputs(shape)) for name, shape in SHAPES.items()})
        return
    peaks = {way: peak_mib(way, options.threads) for way in ways}
    lines = [
        "| shape (N, K, D) | plain ms (cpu) | nearest_code ms (cpu) | ratio wall (cpu) | added MiB | ids that differ |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, shape in SHAPES.items():
        z, codebook = inputs(shape)
        times = alternate({way: partial(call, z, codebook) for way, call in ways.items()}, options.repeats)
        old, new = times["plain"], times["nearest_code"]
        added = [peaks[way][name]["added"] for way in ways]
        differing = int((plain(z, codebook) != nearest_code(z, codebook)).sum())
        lines.append(
            f"| {name} {shape} | {old['wall'] * 1e3:.2f} ({old['cpu'] * 1e3:.2f}) "
            f"| {new['wall'] * 1e3:.2f} ({new['cpu'] * 1e3:.2f}) "
            f"| {old['wall'] / new['wall']:.2f}x ({old['cpu'] / new['cpu']:.2f}x) "
            f"| {added[0]:.0f} -> {added[1]:.0f} | {differing} |"
        )
    record("nearest", lines, options)


if __name__ == "__main__":
    main()
