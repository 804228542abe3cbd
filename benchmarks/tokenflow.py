"""TokenFlow-B, one picture: `mediatok` in fp32 and with bfloat16 weights against the plain formulation in fp32.

Plain: the quantizer with both distance matrices and codebooks normed anew for each scale, torch's own products and
attention, maps in the order of their dimensions, and upsampling before its convolution.
"""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import mediatok as mt
import torch
import torch.nn.functional as F
from measure import alternate, arguments, peak_mib, record, report_peaks, with_torchs_kernels
from mediatok.nn import conv_blocks
from mediatok.nn.shared_mapping_vq import SharedMappingQuantizer, resize_bicubic
from mediatok.tokenizers.image import tokenflow_cnn
from torch import Tensor

NAME = "tokenflow-b"
DTYPES = {"plain": "float32", "fp32": "float32", "bfloat16": "bfloat16"}


def plain_quantize(quantizer: SharedMappingQuantizer, h_BCGG: Tensor) -> Tensor:
    """Ids of all scales, as the formulas say it."""
    residual, ids = h_BCGG.float(), []
    for side in quantizer.sides:
        z = F.adaptive_avg_pool2d(residual, side).permute(0, 2, 3, 1).flatten(0, 2)
        distance = torch.zeros(())
        codes = []
        for part, table in zip(
            z.split(quantizer.widths, dim=1), (quantizer.embedding_vqkd, quantizer.embedding_vqgan), strict=True
        ):
            rows, unit = F.normalize(part, dim=-1), F.normalize(table.weight, dim=-1)
            distance = distance + rows.square().sum(1, keepdim=True) + unit.square().sum(1) - 2 * rows @ unit.T
            codes.append(unit)
        index = distance.argmin(dim=1)
        # The authors' code makes this table on every call, and does not read it.
        F.one_hot(index, len(quantizer.embedding_vqkd.weight)).float()
        square = torch.cat([unit[index] for unit in codes], dim=1).view(len(h_BCGG), side, side, -1)
        residual = residual - resize_bicubic(square.permute(0, 3, 1, 2), quantizer.sides[-1])
        ids.append(index.view(len(h_BCGG), -1))
    return torch.cat(ids, dim=1)


def plainly(call: Callable) -> Callable:
    """`call` without what the layers of this tokenizer do for speed."""

    @with_torchs_kernels
    def plain(*args):
        with patch.object(conv_blocks, "MIN_POSITIONS_TO_FOLD", 2**60), \
             patch.object(tokenflow_cnn, "as_computed", lambda x, weight: x.contiguous()):  # fmt: skip
            return call(*args)

    return plain


def calls(way: str) -> dict[str, Callable[[], Tensor]]:
    model = mt.create(NAME, seed=0, dtype=DTYPES[way])
    rng = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 256, 256, generator=rng)
    h = torch.randn(1, model.quantize.code_width, 16, 16, generator=rng)
    ids = torch.randint(model.vocab_size, (1, model.max_tokens), generator=rng)
    if way != "plain":
        return {
            "quantizer": lambda: model.quantize.encode(h)[0], "encode": partial(model.encode_pixels, pixels),
            "decode": partial(model.decode_ids, ids),
        }  # fmt: skip

    def encode() -> Tensor:
        return plain_quantize(model.quantize, model.encode_map(pixels))

    def decode() -> Tensor:
        total = model.quantize.sum_of(ids)
        model.decode_semantic(total)  # the authors' code runs it with every picture
        return model.decode_map(total)

    return {
        "quantizer": plainly(lambda: plain_quantize(model.quantize, h)), "encode": plainly(encode),
        "decode": plainly(decode),
    }  # fmt: skip


def agreement(result: Tensor, plain: Tensor) -> str:
    if not plain.is_floating_point():
        return f"{int((result == plain).sum())} of {plain.numel()} ids"
    return f"max error {(result - plain).abs().max():.1e} of {(plain.max() - plain.min()):.1f}"


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(options.peak))
        return
    peaks = {way: peak_mib(way, options.threads) for way in DTYPES}
    calls_of = {way: calls(way) for way in DTYPES}
    lines = [
        "| operation | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | equal to plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation in ("quantizer", "encode", "decode"):
        ways = {way: of_way[operation] for way, of_way in calls_of.items()}
        with torch.inference_mode():
            results = {way: call() for way, call in ways.items()}
        times = alternate(ways, options.repeats)
        for way, taken in times.items():
            ratio, peak = {clock: times["plain"][clock] / taken[clock] for clock in taken}, peaks[way][operation]
            lines.append(
                f"| {operation} | {way} | {taken['wall']:.3f} | {taken['cpu']:.3f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) "
                f"| {agreement(results[way], results['plain'])} |"
            )
    record("tokenflow", lines, options)


if __name__ == "__main__":
    main()
