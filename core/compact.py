"""Weights in one byte each: blocks of 64 share a half-precision scale. Half the size of float16 at about 44 dB.

For models that ship with the package. They are widened when they are loaded; computing is as always.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InvalidCheckpoint
from .weights import NUMBER_DTYPES

COMPACT_WEIGHTS = "weights_int8.safetensors"  # not diffusers' name: it would load the bytes as they are
BLOCK = 64
SMALLEST = 4096  # elements; smaller tensors, such as biases and norms, keep float16
SCALES = ".int8_scales"


def compact(state_dict: Mapping[str, Tensor], exact: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors as they are stored: large matrices as int8 beside their scales, the others as float16.

    Tensors whose names start with one of `exact`, and integers, stay as they are.
    """
    stored: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(exact) or not value.is_floating_point():
            stored[name] = value.contiguous()
        elif value.ndim < 2 or value.numel() < SMALLEST:
            stored[name] = value.to(torch.float16).contiguous()
        else:
            blocks = F.pad(value.detach().float().flatten(), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
            scales = (blocks.abs().amax(dim=1) / 127).clamp(min=2.0**-24).to(torch.float16)
            whole = (blocks / scales[:, None].float()).round().clamp(-127, 127).to(torch.int8)
            stored[name] = whole.flatten()[: value.numel()].view(value.shape).contiguous()
            stored[name + SCALES] = scales
    return stored


def expand(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `compact`, in fp32 where there were scales.

    Raises:
        InvalidCheckpoint: int8 without scales that fit, or scales without int8.
    """
    state_dict = {}
    for name, value in stored.items():
        if value.dtype not in (torch.int8, *NUMBER_DTYPES):
            raise InvalidCheckpoint(f"{name!r} is of type {value.dtype}; weights are float or integer")
        scales = stored.get(name + SCALES)
        if name.endswith(SCALES) and stored.get(name.removesuffix(SCALES), value).dtype == torch.int8:
            continue
        if (value.dtype == torch.int8) != (scales is not None) or name.endswith(SCALES):
            raise InvalidCheckpoint(f"{name!r}: weights of one byte and their scales must come together")
        if scales is None:
            state_dict[name] = value
            continue
        num_blocks = -(-value.numel() // BLOCK)
        if scales.shape != (num_blocks,) or scales.dtype != torch.float16:
            raise InvalidCheckpoint(
                f"{name!r} needs {num_blocks} float16 scales, not {scales.dtype} {list(scales.shape)}"
            )
        wide = scales.float().repeat_interleave(BLOCK)[: value.numel()]
        state_dict[name] = value.float() * wide.view(value.shape)
    return state_dict
