"""Nearest codebook entry by L2 or cosine distance: the lookup at the heart of every vector quantizer.

`reference` is the definition: squared distances of the fp32 vectors, summed in fp64 in the order of the dimensions;
the lowest id wins among equals. It is free of the accidents of a matrix product, whose rounding depends on how the
product is blocked, so that equality with it can be demanded on every device.

The fast paths compute ||e||^2 - 2 z.e in fp32 (||z||^2 does not change the winner), a few rows at a time. Rounding
moves the gap between two scores by at most `_tolerance`: codes within it of a row's best are candidates, and only where
a row has several are they compared by the reference's own arithmetic. The ids always equal the reference's.

NaN: a distance that is NaN counts as infinite, so a code with NaN is never chosen and a row with NaN gets id 0.

Shape suffixes: N rows, K codes, D dimensions, P (row, code) pairs, R rows in a block, G groups of codes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InvalidInput

try:
    import triton
    import triton.language as tl
except ImportError:  # not built for every platform; only the CUDA path needs it
    triton = None

BLOCK_SCORES = 2**20  # scores held at once on CPU: 4 MiB, about the second-level caches of two cores
CODES_PER_GROUP = 32
PAIRS_PER_CHUNK = 2**15


def nearest_code(z_ND: Tensor, codebook_KD: Tensor, cosine: bool = False) -> Tensor:
    """Return the id of the code nearest to each row, int64 [N]; among equally near codes the lowest id.

    Args:
        z_ND: rows of any floating dtype, read as fp32.
        codebook_KD: at least one code, on the same device; read as fp32.
        cosine: compare directions; rows and codes are scaled to unit length first (zero vectors stay zero).

    No N x K tensor is kept. There is no gradient; see `straight_through`.
    Raises InvalidInput for shapes that do not match or an empty codebook.
    """
    _check(z_ND, codebook_KD)
    return _nearest_code(*_prepare(z_ND.detach(), codebook_KD.detach(), cosine))


def straight_through(z: Tensor, zq: Tensor) -> Tensor:
    """Return `zq`, bit for bit, with its gradient passed on to `z` (Bengio et al. 2013); `zq` itself gets none."""
    return zq.detach() + (z - z.detach())


def reference(z_ND: Tensor, codebook_KD: Tensor, cosine: bool = False) -> Tensor:
    """The definition of `nearest_code`, in plain PyTorch; keeps [N, K] distances."""
    _check(z_ND, codebook_KD)
    z_ND, codebook_KD = (x.double() for x in _prepare(z_ND.detach(), codebook_KD.detach(), cosine))
    squares = ((z_ND[:, d, None] - codebook_KD[:, d]).square() for d in range(z_ND.shape[1]))
    return _sum_in_order(squares, (z_ND.shape[0], codebook_KD.shape[0]), z_ND.device).argmin(dim=1)


def _check(z_ND: Tensor, codebook_KD: Tensor) -> None:
    if z_ND.ndim != 2 or codebook_KD.ndim != 2 or z_ND.shape[1] != codebook_KD.shape[1] or codebook_KD.shape[0] == 0:
        shapes = f"{list(z_ND.shape)} and {list(codebook_KD.shape)}"
        raise InvalidInput(f"nearest_code needs rows [N, D] and a codebook [K >= 1, D], not {shapes}")


def _prepare(z_ND: Tensor, codebook_KD: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    z_ND, codebook_KD = z_ND.float().contiguous(), codebook_KD.float().contiguous()
    return (F.normalize(z_ND, dim=1), F.normalize(codebook_KD, dim=1)) if cosine else (z_ND, codebook_KD)


def _sum_in_order(squares: Iterable[Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """fp64 sum of fp64 `squares`, infinite where NaN. The order, and operations that nothing can fuse into a
    multiply-add, make a distance the same number wherever it is computed."""
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    for square in squares:
        total += square
    return total.masked_fill_(total.isnan(), torch.inf)


def _tolerance(z_ND: Tensor, code_norm_K: Tensor, unit_roundoff: float) -> Tensor:
    """How far above a row's best fp32 score the true winner's may lie, fp64 [N]; infinite where fp32 may overflow.

    A sum of D products in any order is off by at most (D + 1) * u * sum|z_d e_d| <= (D + 1) * u * |z| |e| (Higham 2002,
    section 3.1), plus what underflows; a few more u cover ||e||^2 and the comparison itself. Two scores are compared,
    hence twice that. The last term is the reference's own rounding, which counts when |z| is far larger than |e|.
    """
    dims = z_ND.shape[1]
    norm_N = torch.linalg.vector_norm(z_ND, dim=1, dtype=torch.float64)
    largest = code_norm_K.amax()
    magnitude_N = 2 * norm_N * largest + largest**2
    score_error_N = (dims + 8) * (unit_roundoff * magnitude_N + 2.0**-125)
    reference_error_N = (dims + 8) * 2.0**-52 * (norm_N + largest) ** 2
    return torch.where(magnitude_N < 1e38, 2 * score_error_N + reference_error_N, torch.inf)


class Codebook:
    """Codes [K >= 1, D] that several searches share: what depends on them alone is computed once. No gradient.

    For inference: unlike `nearest_code`, it is no operation of torch's own.
    """

    def __init__(self, codebook_KD: Tensor):
        _check(codebook_KD[:0], codebook_KD)
        self.codes_KD = codebook_KD.detach().float().contiguous()
        self._prepared = _augmented(self.codes_KD) if self.codes_KD.device.type == "cpu" else None

    def nearest(self, z_ND: Tensor) -> Tensor:
        """`nearest_code` among these codes."""
        if self._prepared is None:
            return nearest_code(z_ND, self.codes_KD)
        _check(z_ND, self.codes_KD)
        return _search(z_ND.detach().float().contiguous(), self.codes_KD, *self._prepared)


@torch.library.custom_op("mediatok::nearest_code", mutates_args=())
def _nearest_code(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """The CPU path; any other device without a path of its own borrows it."""
    device = z_ND.device
    z_ND, codebook_KD = z_ND.cpu(), codebook_KD.cpu()
    return _search(z_ND, codebook_KD, *_augmented(codebook_KD)).to(device)


def _augmented(codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [D + 1, K] by which one matrix product gives the whole score, [z, 1] . [-2 e, ||e||^2], and ||e|| fp64."""
    code_norm_K = torch.linalg.vector_norm(codebook_KD, dim=1, dtype=torch.float64)
    return torch.cat([-2 * codebook_KD, code_norm_K.square().float()[:, None]], dim=1).T, code_norm_K


def _search(z_ND: Tensor, codebook_KD: Tensor, augmented_codes: Tensor, code_norm_K: Tensor) -> Tensor:
    num_rows, num_codes = z_ND.shape[0], codebook_KD.shape[0]
    augmented_rows = F.pad(z_ND, (0, 1), value=1.0)
    is_exact_matmul = torch.backends.mkldnn.matmul.fp32_precision not in ("bf16", "tf32")  # global user settings
    tolerance_N = _tolerance(z_ND, code_norm_K, 2.0**-24 if is_exact_matmul else 2.0**-6)

    num_groups = -(-num_codes // CODES_PER_GROUP)
    block_rows = min(max(16, BLOCK_SCORES // (CODES_PER_GROUP * num_groups)), max(num_rows, 1))
    scores = z_ND.new_full((block_rows, CODES_PER_GROUP * num_groups), torch.inf)  # what pads K stays infinite
    ids_N = torch.empty(num_rows, dtype=torch.int64)
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        scores_RK = scores[: ids_N[rows].shape[0]]
        torch.mm(augmented_rows[rows], augmented_codes, out=scores_RK[:, :num_codes])
        row_P, code_P = _candidates(scores_RK.unflatten(1, (CODES_PER_GROUP, num_groups)), tolerance_N[rows], num_codes)
        only_one_each = row_P.shape[0] == scores_RK.shape[0]
        ids_N[rows] = code_P if only_one_each else _resolve(z_ND[rows], codebook_KD, row_P, code_P)
    return ids_N


def _candidates(scores_RCG: Tensor, tolerance_R: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Pairs (row, code), rows in order, of all scores within the tolerance of their row's best; at least one a row.

    A plain minimum vectorizes and an argmin does not, so codes are first dismissed by groups. Code j * G + g is in
    group g. The comparisons are negated for NaN to pass.
    """
    best_RG = scores_RCG.amin(dim=1)
    limit_R1 = best_RG.amin(dim=1, keepdim=True).double() + tolerance_R[:, None]
    row_P, group_P = (~(best_RG > limit_R1)).nonzero(as_tuple=True)
    pair_P, member_P = (~(scores_RCG[row_P, :, group_P] > limit_R1[row_P])).nonzero(as_tuple=True)
    row_P, code_P = row_P[pair_P], member_P * scores_RCG.shape[2] + group_P[pair_P]
    is_code_P = code_P < num_codes
    return row_P[is_code_P], code_P[is_code_P]


def _resolve(z_RD: Tensor, codebook_KD: Tensor, row_P: Tensor, code_P: Tensor) -> Tensor:
    """Choose among candidates by the reference's arithmetic; ids [R]."""
    distances = []
    for row, code in zip(row_P.split(PAIRS_PER_CHUNK), code_P.split(PAIRS_PER_CHUNK), strict=True):
        squares_PD = (z_RD[row].double() - codebook_KD[code].double()).square()
        distances.append(_sum_in_order(squares_PD.unbind(dim=1), row.shape, row.device))
    distance_P = torch.cat(distances)
    best_R = distance_P.new_full((z_RD.shape[0],), torch.inf).scatter_reduce(0, row_P, distance_P, "amin")
    is_best_P = distance_P == best_R[row_P]
    lowest_R = code_P.new_full((z_RD.shape[0],), codebook_KD.shape[0])
    return lowest_R.scatter_reduce(0, row_P[is_best_P], code_P[is_best_P], "amin")


@_nearest_code.register_fake
def _(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    return z_ND.new_empty(z_ND.shape[0], dtype=torch.int64)


if triton is not None:

    @triton.jit
    def _score_kernel(
        z_ptr, codes_ptr, code_norm_ptr, tolerance_ptr, ids_ptr, is_close_ptr, num_rows,
        num_codes: tl.constexpr, dims: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Id of the best fp32 score, and whether the second best is too close to be sure. One program: ROWS rows."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        best = tl.full((ROWS,), float("inf"), tl.float32)
        second = tl.full((ROWS,), float("inf"), tl.float32)
        best_id = tl.zeros((ROWS,), tl.int64)
        for first in range(0, num_codes, CODES):
            code = first + tl.arange(0, CODES)
            dot = tl.zeros((ROWS, CODES), tl.float32)
            for d in range(0, dims, DIMS):
                dim = d + tl.arange(0, DIMS)
                z_mask = (row[:, None] < num_rows) & (dim[None, :] < dims)
                code_mask = (code[None, :] < num_codes) & (dim[:, None] < dims)
                z = tl.load(z_ptr + row[:, None] * dims + dim[None, :], mask=z_mask, other=0.0)
                codes = tl.load(codes_ptr + code[None, :].to(tl.int64) * dims + dim[:, None], mask=code_mask, other=0.0)
                dot = tl.dot(z, codes, acc=dot, input_precision="ieee")
            norm = tl.load(code_norm_ptr + code, mask=code < num_codes, other=float("inf"))
            score = norm[None, :] - 2.0 * dot
            block_best = tl.min(score, axis=1)
            block_id = tl.argmin(score, axis=1)
            others = tl.where(tl.arange(0, CODES)[None, :] == block_id[:, None], float("inf"), score)
            second = tl.minimum(tl.maximum(best, block_best), tl.minimum(second, tl.min(others, axis=1)))
            best_id = tl.where(block_best < best, first + block_id, best_id)
            best = tl.minimum(best, block_best)
        tolerance = tl.load(tolerance_ptr + row, mask=row < num_rows, other=0.0)
        is_sure = second > best + tolerance  # false for NaN
        tl.store(ids_ptr + row, best_id, mask=row < num_rows)
        tl.store(is_close_ptr + row, 1 - is_sure.to(tl.int8), mask=row < num_rows)

    @triton.jit
    def _resolve_kernel(
        z_ptr, codes_ptr, is_close_ptr, ids_ptr,
        num_codes: tl.constexpr, dims: tl.constexpr, CODES: tl.constexpr,
    ):  # fmt: skip
        """The reference's arithmetic for the rows marked as close. One program: one row."""
        row = tl.program_id(0).to(tl.int64)
        if tl.load(is_close_ptr + row) != 0:
            best = tl.full((), float("inf"), tl.float64)
            best_id = tl.full((), 0, tl.int64)
            for first in range(0, num_codes, CODES):
                code = first + tl.arange(0, CODES)
                mask = code < num_codes
                distance = tl.zeros((CODES,), tl.float64)
                for d in range(dims):
                    codes = tl.load(codes_ptr + code.to(tl.int64) * dims + d, mask=mask, other=0.0).to(tl.float64)
                    difference = tl.load(z_ptr + row * dims + d).to(tl.float64) - codes
                    distance += difference * difference
                distance = tl.where(mask & (distance == distance), distance, float("inf"))
                block_best = tl.min(distance, axis=0)
                best_id = tl.where(block_best < best, first + tl.argmin(distance, axis=0), best_id)
                best = tl.minimum(best, block_best)
            tl.store(ids_ptr + row, best_id)


def nearest_triton(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """The Triton path of `nearest_code`, for contiguous fp32 tensors; nothing waits for the device."""
    num_rows, dims = z_ND.shape
    num_codes = codebook_KD.shape[0]
    ids_N = torch.empty(num_rows, dtype=torch.int64, device=z_ND.device)
    if num_rows == 0:
        return ids_N
    is_close_N = torch.empty(num_rows, dtype=torch.int8, device=z_ND.device)
    code_norm_K = torch.linalg.vector_norm(codebook_KD, dim=1, dtype=torch.float64)
    tolerance_N = _tolerance(z_ND, code_norm_K, 2.0**-24).float()
    tile = {"ROWS": 32, "CODES": 64, "DIMS": 16 if dims <= 16 else 32}
    norm_K = code_norm_K.square().float()
    _score_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        z_ND, codebook_KD, norm_K, tolerance_N, ids_N, is_close_N, num_rows, num_codes, dims, **tile
    )
    # Without fusion: a fused multiply-add would round differently from the reference.
    _resolve_kernel[(num_rows,)](
        z_ND, codebook_KD, is_close_N, ids_N, num_codes, dims, CODES=256, enable_fp_fusion=False
    )
    return ids_N


if triton is not None:
    _nearest_code.register_kernel("cuda")(nearest_triton)
