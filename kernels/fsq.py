"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): each channel is rounded to one of a few levels.

For a channel with L levels, in fp32:

    h = (L - 1) * (1 + 1e-3) / 2,    o = 1/2 for even L, else 0,    s = atanh(o / h)
    q = round(tanh(z + s) * h - o),  halves to even                 in {-(L // 2), ..., (L - 1) // 2}
    code = q / (L // 2)
    id = sum over channels of (q + L // 2) * (product of the levels before)

The operation is opaque to autocast and to compilers on purpose: other arithmetic moves values across a half, and the
id with them. For the same reason the Triton path knows no tanh: what is rounded grows with z, so the level of z is the
number of `thresholds` that it reaches, and these are found once with the reference's own arithmetic on the CPU.

Shape suffixes: D channels, N rows, T thresholds; all others are written "...".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..core.errors import InvalidInput

try:
    import triton
    import triton.language as tl
except ImportError:  # not built for every platform; only the CUDA path needs it
    triton = None

SHRINK = 1e-3  # keeps tanh away from the outermost halves
MAX_LEVELS = 1000  # of a channel: with more, SHRINK would let values past the outermost level
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


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must not be an inference tensor
def thresholds(levels: tuple[int, ...]) -> Tensor:
    """fp32 [T, D] on the CPU: the smallest z of level t + 1 in each channel, infinite where it has no such level.

    Found by bisection over all fp32 numbers up to 16 in size, where tanh is 1, counted from zero outwards.
    """
    _, _, _, center_D = _constants(levels, torch.empty(0))
    wanted_TD = torch.arange(1, max(levels))[:, None] - center_D
    high_TD = torch.full_like(wanted_TD, int(torch.tensor(16.0).view(torch.int32)))
    low_TD = -high_TD
    while bool((high_TD - low_TD > 1).any()):
        middle_TD = (low_TD + high_TD).div(2, rounding_mode="floor")
        is_reached_TD = bound(_nth_float(middle_TD), levels).round() >= wanted_TD
        low_TD = torch.where(is_reached_TD, low_TD, middle_TD)
        high_TD = torch.where(is_reached_TD, middle_TD, high_TD)
    is_level_TD = torch.arange(1, max(levels))[:, None] < torch.tensor(levels)
    return torch.where(is_level_TD, _nth_float(high_TD), torch.inf)


def _nth_float(number: Tensor) -> Tensor:
    """The fp32 number that is the n-th above zero, or below it for negative n."""
    return number.abs().int().view(torch.float32) * number.sign()


def check_levels(levels: Sequence[int]) -> None:
    """Raise InvalidInput unless `levels` are 1 to 32 whole numbers from 2 to 1000 with a vocabulary below 2^40."""
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


if triton is not None:

    @triton.jit
    def _fsq_kernel(
        z_ptr, thresholds_ptr, center_ptr, basis_ptr, codes_ptr, ids_ptr, num_rows,
        num_thresholds: tl.constexpr, dims: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Count the thresholds that each value reaches. One program: ROWS rows."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        dim = tl.arange(0, DIMS)
        place, mask = row[:, None] * dims + dim[None, :], (row[:, None] < num_rows) & (dim[None, :] < dims)
        z = tl.load(z_ptr + place, mask=mask, other=0.0)
        level = tl.zeros((ROWS, DIMS), tl.int32)
        for t in range(num_thresholds):
            threshold = tl.load(thresholds_ptr + t * dims + dim, mask=dim < dims, other=float("inf"))
            level += (z >= threshold[None, :]).to(tl.int32)
        center = tl.load(center_ptr + dim, mask=dim < dims, other=1).to(tl.int32)
        basis = tl.load(basis_ptr + dim, mask=dim < dims, other=0)
        code = tl.div_rn((level - center[None, :]).to(tl.float32), center[None, :].to(tl.float32))
        tl.store(codes_ptr + place, code, mask=mask)
        tl.store(ids_ptr + row, tl.sum(level.to(tl.int64) * basis[None, :], axis=1), mask=row < num_rows)

    def fsq_triton(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
        """The Triton path of `fsq`, for contiguous fp32 tensors."""
        codes, ids = torch.empty_like(z), z.new_empty(z.shape[:-1], dtype=torch.int64)
        thresholds_TD, center_D, basis_D = _tables(tuple(levels), z.device)
        num_rows, dims = ids.numel(), len(levels)
        if num_rows:
            tile = {"ROWS": 128, "DIMS": triton.next_power_of_2(dims)}
            _fsq_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
                z, thresholds_TD, center_D, basis_D, codes, ids, num_rows, len(thresholds_TD), dims, **tile
            )
        return codes, ids

    @lru_cache(maxsize=64)
    @torch.inference_mode(False)
    def _tables(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        with torch.device("cpu"):  # whatever the user's default is
            tables = thresholds(levels), torch.tensor(levels) // 2, torch.tensor(_basis(levels))
        return tuple(table.to(device) for table in tables)

    _fsq.register_kernel("cuda")(fsq_triton)
