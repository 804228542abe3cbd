"""Weights rounded to eight or fewer bits each: blocks of 64 share a half-precision scale. Eight bits keep about 44 dB,
and each bit less costs 6.

For models that ship with the package. They are widened when they are loaded; computing is as always. Four bits are for
models that were trained with their weights rounded to them (`rounded`).

    NAME.deflated          uint8 [bytes]: whole numbers, int8 [blocks, 64], as a zlib stream of Huffman codes alone
    NAME.deflated_scales   float16 [blocks]
    NAME.shape             int64

Small numbers are frequent, so that weights of b bits take about 0.93 b (0.9 of 4).

A part that is a whole shipped model, such as the VAE of a tokenizer over latents, may be left out; the file's header
then says so: `borrowed` is JSON, {part: [name of the model, its fingerprint]}.

Shape suffixes: N blocks, 64 weights.
"""

from __future__ import annotations

import json
import math
import zlib
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
DEFLATED = ".deflated"
BORROWED = "borrowed"  # in the header
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest weight: with few steps, clipping it may lose less


def compact(state_dict: Mapping[str, Tensor], fingerprinted: tuple[str, ...], bits: int = 8) -> dict[str, Tensor]:
    """The tensors as they are stored: large matrices in `bits` (8 to 4) beside their scales, the others as float16.

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
        else:
            whole_N64, scales_N = _rounded(_blocks(value), bits, CLIPPED[:1] if bits == 8 else CLIPPED)
            stored |= deflated(name, whole_N64, scales_N, value.shape)
    return stored


def deflated(name: str, whole_N64: Tensor, scales_N: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """The tensors that stand for `name`: whole numbers int8 [N, 64] times scales float16 [N], in its shape."""
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    data = stream.compress(whole_N64.to(torch.int8).numpy().tobytes()) + stream.flush()
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return {name + DEFLATED: packed, name + DEFLATED + SCALES: scales_N, name + SHAPE: torch.tensor(shape)}


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
    for key, value in stored.items():
        if key.endswith(DEFLATED):
            name = key.removesuffix(DEFLATED)
            state_dict[name] = _expanded(name, value, stored.get(key + SCALES), stored.get(name + SHAPE))
            used |= {key, key + SCALES, name + SHAPE}
        elif value.dtype not in NUMBER_DTYPES:
            raise InvalidCheckpoint(f"{key!r} is of type {value.dtype}; weights are float or integer")
        elif not key.endswith((SCALES, SHAPE)):
            state_dict[key] = value
            used.add(key)
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


def _widened(whole_N64: Tensor, scales_N: Tensor, shape: Sequence[int]) -> Tensor:
    return (whole_N64.float() * scales_N.float()[:, None]).flatten()[: math.prod(shape)].view(*shape)


def _expanded(name: str, packed: Tensor, scales_N: Tensor | None, shape: Tensor | None) -> Tensor:
    if scales_N is None or scales_N.ndim != 1 or scales_N.dtype != torch.float16:
        found = "none" if scales_N is None else f"{scales_N.dtype} {list(scales_N.shape)}"
        raise InvalidCheckpoint(f"{name!r} needs float16 scales, one for each block, not {found}")
    sides = [] if shape is None or shape.dtype != torch.int64 or shape.ndim != 1 else shape.tolist()
    if not sides or min(sides) < 1 or -(-math.prod(sides) // BLOCK) != len(scales_N):
        raise InvalidCheckpoint(f"{name!r}: {len(scales_N)} scales do not fit the shape {sides}")
    if packed.dtype != torch.uint8:
        raise InvalidCheckpoint(f"{name!r}: deflated weights are uint8, not {packed.dtype}")
    expected, stream = len(scales_N) * BLOCK, zlib.decompressobj()
    try:
        data = stream.decompress(packed.numpy().tobytes(), expected)  # no more: a small file could hold gigabytes
    except zlib.error as error:
        raise InvalidCheckpoint(f"{name!r}: deflated weights are broken ({error})") from None
    if len(data) != expected or not stream.eof or stream.unused_data:
        raise InvalidCheckpoint(f"{name!r}: deflated weights are not the {expected} that the scales are for")
    return _widened(torch.frombuffer(bytearray(data), dtype=torch.int8).view(-1, BLOCK), scales_N, sides)
