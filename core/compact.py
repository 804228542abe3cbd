"""Weights in eight, six, five or four bits each: blocks of 64 share a half-precision scale. About 44, 32, 26 or 20 dB.

For models that ship with the package. They are widened when they are loaded; computing is as always. Four bits are for
models that were trained with their weights rounded to them (`rounded`).

    NAME, NAME.int8_scales                     int8 in the weight's shape, float16 [number of blocks]
    NAME.int6, NAME.int6_scales, NAME.shape    uint8 [number of blocks, 48], float16 [number of blocks], int64
    NAME.int5, NAME.int4                       likewise, of 40 and 32 bytes

A part that is a whole shipped model, such as the VAE of a tokenizer over latents, may be left out; the file's header
then says so: `borrowed` is JSON, {part: [name of the model, its fingerprint]}.

Shape suffixes: N blocks, 64 weights, W bytes of a block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InvalidCheckpoint
from .weights import NUMBER_DTYPES

COMPACT_WEIGHTS = "weights_compact.safetensors"  # not diffusers' name: it would load the bytes as they are
BLOCK = 64
SMALLEST = 4096  # elements; smaller tensors, such as biases and norms, keep float16
SCALES, SHAPE = "_scales", ".shape"  # behind the name of the weights, or of the packed weights
PACKED = {6: ".int6", 5: ".int5", 4: ".int4"}
BYTE_SCALES = ".int8" + SCALES
BORROWED = "borrowed"  # in the header
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest weight: with few steps, clipping it may lose less


def compact(state_dict: Mapping[str, Tensor], fingerprinted: tuple[str, ...], bits: int = 8) -> dict[str, Tensor]:
    """The tensors as they are stored: large matrices in `bits` (8, 6, 5, 4) beside their scales, the others as float16.

    Integers stay as they are. Tensors whose names start with one of `fingerprinted` are kept as bfloat16, which is what
    the fingerprint of a tokenizer is made of.
    """
    stored: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if not value.is_floating_point():
            stored[name] = value.contiguous()
        elif name.startswith(fingerprinted):
            stored[name] = value.to(torch.bfloat16).contiguous()
        elif not is_large(value):
            stored[name] = value.to(torch.float16).contiguous()
        elif bits == 8:
            whole_N64, scales_N = _rounded(_blocks(value), 8, CLIPPED[:1])
            stored[name] = whole_N64.flatten()[: value.numel()].view(value.shape).contiguous()
            stored[name + BYTE_SCALES] = scales_N
        else:
            whole_N64, scales_N = _rounded(_blocks(value), bits, CLIPPED)
            packed = name + PACKED[bits]
            stored[packed], stored[packed + SCALES] = _packed(whole_N64, bits), scales_N
            stored[name + SHAPE] = torch.tensor(value.shape)
    return stored


def is_large(value: Tensor) -> bool:
    """Whether `compact` rounds a tensor of floats like this."""
    return value.ndim >= 2 and value.numel() >= SMALLEST


def rounded(value: Tensor, bits: int) -> Tensor:
    """`value` (large) as it comes back from `bits` bits, fp32: for training that shall get used to it.

    Blocks are not clipped, which is quicker, and never nearer to `value` than what `compact` stores.
    """
    whole_N64, scales_N = _rounded(_blocks(value), bits, CLIPPED[:1])
    return _widened(whole_N64, scales_N, value.shape)


def expand(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `compact`, in fp32 where there were scales.

    Raises:
        InvalidCheckpoint: packed weights without scales that fit, or scales without weights.
    """
    state_dict, used = {}, set()
    for name, value in stored.items():
        bits = next((bits for bits, ending in PACKED.items() if name.endswith(ending)), None)
        if bits is not None:
            packed, name = name, name.removesuffix(PACKED[bits])
            shape = stored.get(name + SHAPE)
            state_dict[name] = _expand_packed(name, value, bits, stored.get(packed + SCALES), shape)
            used |= {packed, packed + SCALES, name + SHAPE}
        elif value.dtype == torch.int8:
            state_dict[name] = _expand_bytes(name, value, stored.get(name + BYTE_SCALES))
            used |= {name, name + BYTE_SCALES}
        elif value.dtype in NUMBER_DTYPES and not name.endswith((SCALES, SHAPE)):
            state_dict[name] = value
            used.add(name)
        elif value.dtype not in NUMBER_DTYPES:
            raise InvalidCheckpoint(f"{name!r} is of type {value.dtype}; weights are float or integer")
    if left := sorted(stored.keys() - used):
        raise InvalidCheckpoint(f"{left[0]!r}: weights and their scales must come together")
    return state_dict


def borrowed_parts(header: str, path: Path) -> dict[str, tuple[str, str]]:
    """Name and fingerprint of the lender of each borrowed part, from the header's text.

    Raises:
        InvalidCheckpoint: it is something else.
    """
    try:
        parts = json.loads(header)
        if all(len(lender) == 2 and all(isinstance(word, str) for word in lender) for lender in parts.values()):
            return {part: tuple(lender) for part, lender in parts.items()}
    except (ValueError, RecursionError, AttributeError, TypeError):
        pass
    raise InvalidCheckpoint(
        f"{path}: {BORROWED!r} in the header maps parts to [name, fingerprint], not {header[:80]!r}"
    )


def _blocks(value: Tensor) -> Tensor:
    return F.pad(value.detach().float().flatten(), (0, -value.numel() % BLOCK)).view(-1, BLOCK)


def _rounded(blocks_N64: Tensor, bits: int, clipped: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """int8 [N, 64] and float16 scales [N]; of the ways to clip a block the one that loses least."""
    steps = 2 ** (bits - 1) - 1  # to either side of 0
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


def _layout(bits: int) -> tuple[Tensor, Tensor]:
    """Where numbers of `bits` bits, and the bytes that hold them, begin in a group of whole bytes, from the left."""
    width = math.lcm(bits, 8)
    return torch.arange(width - bits, -1, -bits), torch.arange(width - 8, -1, -8)


def _packed(whole_N64: Tensor, bits: int) -> Tensor:
    """Numbers from -2^(bits - 1) on as uint8 [N, W]."""
    numbers, places = _layout(bits)
    unsigned = (whole_N64.long() + 2 ** (bits - 1)).view(len(whole_N64), -1, len(numbers))
    groups = (unsigned << numbers).sum(dim=2, keepdim=True)
    return (groups >> places & 255).to(torch.uint8).flatten(1)


def _unpacked(packed_NW: Tensor, bits: int) -> Tensor:
    """Inverse of `_packed`, int64 [N, 64]."""
    numbers, places = _layout(bits)
    groups = (packed_NW.long().view(len(packed_NW), -1, len(places)) << places).sum(dim=2, keepdim=True)
    return (groups >> numbers & (2**bits - 1)).flatten(1) - 2 ** (bits - 1)


def _widened(whole_N64: Tensor, scales_N: Tensor, shape: Sequence[int]) -> Tensor:
    return (whole_N64.float() * scales_N.float()[:, None]).flatten()[: math.prod(shape)].view(*shape)


def _expand_bytes(name: str, value: Tensor, scales_N: Tensor | None) -> Tensor:
    _check_scales(name, scales_N, -(-value.numel() // BLOCK))
    wide = scales_N.float().repeat_interleave(BLOCK)[: value.numel()]
    return value.float() * wide.view(value.shape)


def _expand_packed(name: str, packed_NW: Tensor, bits: int, scales_N: Tensor | None, shape: Tensor | None) -> Tensor:
    width = BLOCK * bits // 8
    if packed_NW.dtype != torch.uint8 or packed_NW.ndim != 2 or packed_NW.shape[1] != width:
        raise InvalidCheckpoint(f"{name!r}: weights of {bits} bits are uint8 [blocks, {width}], "
                                f"not {packed_NW.dtype} {list(packed_NW.shape)}")  # fmt: skip
    _check_scales(name, scales_N, len(packed_NW))
    sides = [] if shape is None or shape.dtype != torch.int64 or shape.ndim != 1 else shape.tolist()
    if not sides or min(sides) < 1 or -(-math.prod(sides) // BLOCK) != len(packed_NW):
        raise InvalidCheckpoint(f"{name!r}: {len(packed_NW)} blocks and their scales do not fit the shape {sides}")
    return _widened(_unpacked(packed_NW, bits), scales_N, sides)


def _check_scales(name: str, scales_N: Tensor | None, num_blocks: int) -> None:
    if scales_N is None or scales_N.shape != (num_blocks,) or scales_N.dtype != torch.float16:
        found = "none" if scales_N is None else f"{scales_N.dtype} {list(scales_N.shape)}"
        raise InvalidCheckpoint(f"{name!r} needs {num_blocks} float16 scales, not {found}")
