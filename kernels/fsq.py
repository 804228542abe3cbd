"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): each channel is rounded to one of a few levels.

For a channel with L levels, in fp32:

    h = (L - 1) * (1 + 1e-3) / 2,    o = 1/2 for even L, else 0,    s = atanh(o / h)
    q = round(tanh(z + s) * h - o),  halves to even                 in {-(L // 2), ..., (L - 1) // 2}
    code = q / (L // 2)
    id = sum over channels of (q + L // 2) * (product of the levels before)

The operation is opaque to autocast and to compilers on purpose: other arithmetic moves values across a half, and the
id with them. It is a few passes over some hundred rows, so there is one path for every device.

Shape suffixes: D channels; all others are written "...".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import InvalidInput

SHRINK = 1e-3  # keeps tanh away from the outermost halves
MAX_LEVELS = 2**12  # of a channel
MAX_CODES = 2**40  # of all channels: ids stay far below the end of int64


def fsq(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the codes fp32 [..., D], each in [-1, 1], and their ids int64 [...].

    Args:
        z: [..., D] of any floating dtype, read as fp32.
        levels: of each channel, at least 2.

    The gradient of the codes is that of their values before rounding ("straight through").
    Raises InvalidInput for levels that cannot be, or that do not fit `z`.
    """
    check_levels(levels)
    if z.ndim < 1 or z.shape[-1] != len(levels):
        raise InvalidInput(f"fsq needs [..., {len(levels)}] for the levels {tuple(levels)}, not {list(z.shape)}")
    return _fsq(z.float().contiguous(), list(levels))


def bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """What is rounded: fp32 [..., D] of `z`."""
    half_D, offset_D, shift_D, _ = _constants(levels, z)
    return torch.tanh(z.float() + shift_D) * half_D - offset_D


def reference(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The definition of `fsq`, in plain PyTorch, without a gradient."""
    quotients = bound(z.detach(), levels).round()
    _, _, _, center_D = _constants(levels, z)
    digits = quotients.long() + center_D
    basis_D = torch.tensor(_basis(levels), device=z.device)
    return quotients / center_D, (digits * basis_D).sum(dim=-1)


def codes_of(ids: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes fp32 [..., D] of ids int64 [...]: the inverse of `fsq`'s second result."""
    levels_D = torch.tensor(list(levels), device=ids.device)
    basis_D = torch.tensor(_basis(levels), device=ids.device)
    digits = torch.div(ids[..., None], basis_D, rounding_mode="floor") % levels_D
    center_D = levels_D // 2
    return (digits - center_D).float() / center_D


def check_levels(levels: Sequence[int]) -> None:
    """Raise InvalidInput unless `levels` are 1 to 32 whole numbers from 2 to 4096 with a vocabulary below 2^40."""
    whole = all(type(level) is int and 2 <= level <= MAX_LEVELS for level in levels)
    if not whole or not 1 <= len(levels) <= 32 or math.prod(levels) > MAX_CODES:
        raise InvalidInput(f"levels must be 1 to 32 whole numbers from 2 to {MAX_LEVELS}, not {tuple(levels)!r:.200}")


def _basis(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:channel]) for channel in range(len(levels))]


def _constants(levels: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, o, s as fp32 [D], and L // 2 as int64 [D]."""
    levels_D = torch.tensor(list(levels), device=like.device)
    half_D = (levels_D - 1).float() * (1 + SHRINK) / 2
    offset_D = torch.where(levels_D % 2 == 0, 0.5, 0.0)
    return half_D, offset_D, torch.atanh(offset_D / half_D), levels_D // 2


@torch.library.custom_op("mediatok::fsq", mutates_args=())
def _fsq(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    return reference(z, levels)


@_fsq.register_fake
def _(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[:-1], dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    z, ctx.levels = inputs
    ctx.save_for_backward(z)


def _backward(ctx, grad_codes: Tensor, grad_ids: Tensor | None) -> tuple[Tensor, None]:
    (z,) = ctx.saved_tensors
    half_D, _, shift_D, center_D = _constants(ctx.levels, z)
    slope = 1 - torch.tanh(z + shift_D).square()
    return grad_codes * slope * half_D / center_D, None


_fsq.register_autograd(_backward, setup_context=_setup_context)
