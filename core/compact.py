"""Weights in eight or six bits each: blocks of 64 share a half-precision scale. About 44 dB, or 33 dB.

For models that ship with the package. They are widened when they are loaded; computing is as always.

    NAME, NAME.int8_scales                     int8 in the weight's shape, float16 [number of blocks]
    NAME.int6, NAME.int6_scales, NAME.shape    uint8 [number of blocks, 48], float16 [number of blocks], int64

Shape suffixes: N blocks, 64 weights, 48 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InvalidCheckpoint
from .weights import NUMBER_DTYPES

COMPACT_WEIGHTS = "weights_compact.safetensors"  # not diffusers' name: it would load the bytes as they are
BLOCK = 64
SMALLEST = 4096  # elements; smaller tensors, such as biases and norms, keep float16
SCALES = ".int8_scales"
PACKED, PACKED_SCALES, SHAPE = ".int6", ".int6_scales", ".shape"
PACKED_BLOCK = BLOCK * 6 // 8  # bytes
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest weight: with few steps, clipping it may lose less


def compact(state_dict: Mapping[str, Tensor], exact: tuple[str, ...], bits: int = 8) -> dict[str, Tensor]:
    """The tensors as they are stored: large matrices in `bits` (8 or 6) beside their scales, the others as float16.

    Tensors whose names start with one of `exact`, and integers, stay as they are.
    """
    stored: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(exact) or not value.is_floating_point():
            stored[name] = value.contiguous()
        elif value.ndim < 2 or value.numel() < SMALLEST:
            stored[name] = value.to(torch.float16).contiguous()
        else:
            blocks_N64 = F.pad(value.detach().float().flatten(), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
            if bits == 8:
                whole_N64, scales_N = _rounded(blocks_N64, 127, CLIPPED[:1])
                stored[name] = whole_N64.flatten()[: value.numel()].view(value.shape).contiguous()
                stored[name + SCALES] = scales_N
            else:
                whole_N64, scales_N = _rounded(blocks_N64, 31, CLIPPED)
                stored[name + PACKED] = _packed(whole_N64)
                stored[name + PACKED_SCALES], stored[name + SHAPE] = scales_N, torch.tensor(value.shape)
    return stored


def expand(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `compact`, in fp32 where there were scales.

    Raises:
        InvalidCheckpoint: packed weights without scales that fit, or scales without weights.
    """
    state_dict, used = {}, set()
    for name, value in stored.items():
        if name.endswith(PACKED):
            name = name.removesuffix(PACKED)
            state_dict[name] = _expand_packed(name, value, stored.get(name + PACKED_SCALES), stored.get(name + SHAPE))
            used |= {name + PACKED, name + PACKED_SCALES, name + SHAPE}
        elif value.dtype == torch.int8:
            state_dict[name] = _expand_bytes(name, value, stored.get(name + SCALES))
            used |= {name, name + SCALES}
        elif value.dtype in NUMBER_DTYPES and not name.endswith((SCALES, PACKED_SCALES, SHAPE)):
            state_dict[name] = value
            used.add(name)
        elif value.dtype not in NUMBER_DTYPES:
            raise InvalidCheckpoint(f"{name!r} is of type {value.dtype}; weights are float or integer")
    if left := sorted(stored.keys() - used):
        raise InvalidCheckpoint(f"{left[0]!r}: weights and their scales must come together")
    return state_dict


def _rounded(blocks_N64: Tensor, steps: int, clipped: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """int8 [N, 64] within `steps` of 0 and float16 scales [N]; of the ways to clip a block the one that loses least."""
    largest_N, best = blocks_N64.abs().amax(dim=1), None
    for share in clipped:
        scales_N = (largest_N * (share / steps)).clamp(min=2.0**-24).to(torch.float16)
        whole_N64 = (blocks_N64 / scales_N[:, None].float()).round().clamp(-steps, steps)
        loss_N = (whole_N64 * scales_N[:, None].float() - blocks_N64).square().sum(dim=1)
        if best is None:
            best = loss_N, whole_N64, scales_N
        else:
            is_better_N = loss_N < best[0]
            best = (
                torch.where(is_better_N, loss_N, best[0]),
                torch.where(is_better_N[:, None], whole_N64, best[1]),
                torch.where(is_better_N, scales_N, best[2]),
            )
    return best[1].to(torch.int8), best[2]


def _packed(whole_N64: Tensor) -> Tensor:
    """Numbers from -32 to 31 as uint8 [N, 48]: four in three bytes, the highest bits first."""
    a, b, c, d = (whole_N64.int() + 32).view(len(whole_N64), -1, 4).unbind(2)
    three = torch.stack([a << 2 | b >> 4, (b & 15) << 4 | c >> 2, (c & 3) << 6 | d], dim=2)
    return three.to(torch.uint8).flatten(1)


def _unpacked(packed_N48: Tensor) -> Tensor:
    """Inverse of `_packed`, int32 [N, 64]."""
    x, y, z = packed_N48.int().view(len(packed_N48), -1, 3).unbind(2)
    return torch.stack([x >> 2, (x & 3) << 4 | y >> 4, (y & 15) << 2 | z >> 6, z & 63], dim=2).flatten(1) - 32


def _expand_bytes(name: str, value: Tensor, scales_N: Tensor | None) -> Tensor:
    _check_scales(name, scales_N, -(-value.numel() // BLOCK))
    wide = scales_N.float().repeat_interleave(BLOCK)[: value.numel()]
    return value.float() * wide.view(value.shape)


def _expand_packed(name: str, packed_N48: Tensor, scales_N: Tensor | None, shape: Tensor | None) -> Tensor:
    if packed_N48.dtype != torch.uint8 or packed_N48.ndim != 2 or packed_N48.shape[1] != PACKED_BLOCK:
        raise InvalidCheckpoint(f"{name!r}: weights of six bits are uint8 [blocks, {PACKED_BLOCK}], "
                                f"not {packed_N48.dtype} {list(packed_N48.shape)}")  # fmt: skip
    _check_scales(name, scales_N, len(packed_N48))
    sides = [] if shape is None or shape.dtype != torch.int64 or shape.ndim != 1 else shape.tolist()
    count = math.prod(sides)
    if not sides or min(sides) < 1 or -(-count // BLOCK) != len(packed_N48):
        raise InvalidCheckpoint(f"{name!r}: {len(packed_N48)} blocks and their scales do not fit the shape {sides}")
    wide_N64 = _unpacked(packed_N48).float() * scales_N.float()[:, None]
    return wide_N64.flatten()[:count].view(sides)


def _check_scales(name: str, scales_N: Tensor | None, num_blocks: int) -> None:
    if scales_N is None or scales_N.shape != (num_blocks,) or scales_N.dtype != torch.float16:
        found = "none" if scales_N is None else f"{scales_N.dtype} {list(scales_N.shape)}"
        raise InvalidCheckpoint(f"{name!r} needs {num_blocks} float16 scales, not {found}")
