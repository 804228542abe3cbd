"""Attention over the few tokens of token sequences: `kernels/attention.py` against torch's fused kernel."""

from functools import partial

import torch
import torch.nn.functional as F
from measure import alternate, arguments, record
from mediatok.kernels.attention import attention

SHAPES = {  # batch, heads, queries, keys, head width
    "xAR-B, first cell, guided": (2, 12, 64, 64, 64),
    "xAR-B, last cell, guided": (2, 12, 64, 256, 64),
    "xAR-B, last cell, four pictures": (8, 12, 64, 256, 64),
    "MaskGIT over TiTok-L-32": (2, 16, 33, 33, 48),
    "TiTok-L-32": (1, 16, 289, 289, 64),
    "TiTok-S-128": (1, 8, 385, 385, 64),
}


def many(call, *tensors: torch.Tensor) -> None:
    for _ in range(20):
        call(*tensors)


def main() -> None:
    options = arguments(__doc__)
    lines = [
        "| tokens of | dtype | fused ms | ours ms | faster | max difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (batch, heads, queries, keys, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(batch, heads, length, width).to(dtype) for length in (queries, keys, keys))
            fused = F.scaled_dot_product_attention
            times = alternate(
                {"fused": partial(many, fused, q, k, v), "ours": partial(many, attention, q, k, v)}, options.repeats
            )
            difference = (fused(q, k, v) - attention(q, k, v)).abs().max()
            fused_ms, ours_ms = (times[way]["wall"] * 50 for way in ("fused", "ours"))
            lines.append(
                f"| {name} | {str(dtype).removeprefix('torch.')} | {fused_ms:.2f} | {ours_ms:.2f} "
                f"| {fused_ms / ours_ms:.2f}x | {difference:.0e} |"
            )
    record("attention", lines, options)


if __name__ == "__main__":
    main()
