"""Continuous integrate-and-fire (Dong and Xu 2020, arXiv 1905.11235): frames with rates in, one vector a token out.

Every frame adds its rate to a running mass A; token k is made of what is added between k - 1 and k:

    c_k = sum_t w_kt h_t,    w_kt = clamp(A_t, k - 1, k) - clamp(A_t-1, k - 1, k)

`reference` is this sentence. It holds for any rates >= 0, so that the same operation contracts (rates below 1, as in
recognition) and expands (rates above 1, a length regulator). Mass is summed in fp64: an fp32 sum of thousands of
rates fires frames too early or too late.

The fast paths use that mass runs one way. Cut [0, A_T] at every frame's end and at every whole number: each piece lies
in one frame and one token, and in the order of the mass the pieces are grouped by frame and by token alike. Tokens are
then sums over contiguous pieces, and so are the gradients of frames; T + K pieces do for everything.

Shape suffixes: B rows, T frames, K tokens, D channels, E = T + K pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InvalidInput

try:
    import triton
    import triton.language as tl
except ImportError:  # not built for every platform; only the CUDA path needs it
    triton = None

MAX_TOKENS = 2**24  # of a row: far beyond any use, and tells rates that ran away
_DOTS = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)  # torch's own, and private


def integrate_and_fire(
    hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor | None = None, max_count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, K, D] in the dtype of `hidden_BTD` and their counts int64 [B]; other rows are zero.

    Args:
        hidden_BTD: frames, of any floating dtype; sums are made in fp32 (in fp64 for fp64).
        rates_BT: finite, at least 0; 0 past the end of a row.
        counts_B: how many tokens to make of each row. When None, as many as are complete: floor(sum of rates); what is
            left over is dropped. When given, mass past `counts_B` is dropped, and a last token that rounding leaves
            just short of its mass is there all the same, where a comparison with 1 would toss a coin (training scales
            the rates so that they sum to the target's length).
        max_count: K, when it is known beforehand. When None it is the largest count, which waits for the device.

    Differentiable in both; where a boundary falls on a frame's end, the derivative is that of one side.
    Raises InvalidInput for shapes that do not match, and (when `counts_B` or `max_count` is None) for rates that are
    negative or not finite.
    """
    if hidden_BTD.ndim != 3 or rates_BT.shape != hidden_BTD.shape[:2]:
        shapes = f"{list(hidden_BTD.shape)} and {list(rates_BT.shape)}"
        raise InvalidInput(f"integrate_and_fire needs frames [B, T, D] and rates [B, T], not {shapes}")
    if counts_B is not None and counts_B.shape != rates_BT.shape[:1]:
        raise InvalidInput(f"{list(rates_BT.shape)} rates need counts [{len(rates_BT)}], not {list(counts_B.shape)}")
    if counts_B is None or max_count is None:
        counts_B = _checked_counts(rates_BT.detach(), counts_B)
        largest = int(counts_B.max()) if len(counts_B) else 0
        max_count = largest if max_count is None else max_count
    return _integrate_and_fire(hidden_BTD, rates_BT, counts_B.to(torch.int64), max_count), counts_B


def _checked_counts(rates_BT: Tensor, counts_B: Tensor | None) -> Tensor:
    total_B = mass(rates_BT)[:, -1] if rates_BT.shape[1] else rates_BT.new_zeros(len(rates_BT), dtype=torch.float64)
    if rates_BT.numel():
        lowest, highest = torch.stack([rates_BT.amin().double(), total_B.amax()]).tolist()
        if not (lowest >= 0 and highest < MAX_TOKENS):  # false for NaN
            raise InvalidInput(
                f"rates must be at least 0 and sum to less than {MAX_TOKENS} a row, not from {lowest:g} on and to "
                f"{highest:g}"
            )
    return total_B.floor().long() if counts_B is None else counts_B.to(torch.int64)


def mass(rates_BT: Tensor) -> Tensor:
    """A of the definition: the running sum of the rates, fp64 [B, T]."""
    return rates_BT.double().cumsum(dim=1)


def reference(hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of `integrate_and_fire`, in plain PyTorch; keeps [B, K, T] weights."""
    mass_BT = mass(rates_BT)
    if counts_B is None:
        counts_B = mass_BT[:, -1].floor().long()
    token_K1 = torch.arange(int(counts_B.max()), dtype=torch.float64, device=rates_BT.device)[:, None]
    until_BKT = mass_BT[:, None].clamp(token_K1, token_K1 + 1)
    before_BKT = torch.cat([token_K1.expand(len(rates_BT), -1, 1), until_BKT[..., :-1]], dim=2)
    weight_BKT = (until_BKT - before_BKT) * (token_K1 < counts_B[:, None, None])
    return (weight_BKT @ hidden_BTD.double()).to(hidden_BTD.dtype), counts_B


class _Pieces(NamedTuple):
    """The pieces of every row in the order of the mass.

    frame_BE, token_BE: where each lies; token K collects what belongs to no token. weight_BE: its mass, fp64, 0 there.
    token_first_BK1: the first piece of each token, token K included. frame_last_BT: the last piece of each frame;
    what comes after the last frame's is empty. fire_BK: the frame that completes a token, T where none does.
    """

    frame_BE: Tensor
    token_BE: Tensor
    weight_BE: Tensor
    token_first_BK1: Tensor
    frame_last_BT: Tensor
    fire_BK: Tensor


def _cut(rates_BT: Tensor, counts_B: Tensor, tokens: int) -> _Pieces:
    """Cut the mass at frame ends and at the whole numbers 1 .. K; at equal mass the whole number comes first.

    Whole numbers beyond a row's count are put right behind it, so that what follows belongs to token K.
    """
    (batch, frames), device = rates_BT.shape, rates_BT.device
    mass_BT = mass(rates_BT.nan_to_num(0.0).clamp(min=0))  # places must exist whatever the rates are
    counts_B1 = counts_B[:, None].double()
    number_K = torch.arange(1, tokens + 1, device=device)
    passed_BT = mass_BT.floor()
    passed_BT = torch.where(passed_BT >= counts_B1, float(tokens), passed_BT).clamp(max=tokens).long()
    frame_last_BT = passed_BT + torch.arange(frames, device=device)
    fire_BK = torch.searchsorted(mass_BT, number_K.double().minimum(counts_B1))
    token_first_BK1 = F.pad(fire_BK + number_K, (1, 0))

    ends_frame_BE = counts_B.new_zeros(batch, frames + tokens).scatter_(1, frame_last_BT, 1)
    frame_BE = ends_frame_BE.cumsum(dim=1) - ends_frame_BE
    token_BE = torch.arange(frames + tokens, device=device) - frame_BE
    frame_BE = frame_BE.clamp(max=frames - 1)
    number_BE = (token_BE + 1.0).double().minimum(counts_B1).minimum(mass_BT[:, -1:])
    until_BE = torch.where(ends_frame_BE.bool(), mass_BT.gather(1, frame_BE), number_BE)
    weight_BE = until_BE - F.pad(until_BE, (1, 0))[:, :-1]
    return _Pieces(
        frame_BE, token_BE, weight_BE.masked_fill(token_BE >= tokens, 0), token_first_BK1, frame_last_BT, fire_BK
    )


def _flat(places_BN: Tensor, size: int) -> Tensor:
    """Places within rows as places in all rows one after the other."""
    return (places_BN + size * torch.arange(len(places_BN), device=places_BN.device)[:, None]).flatten()


def _sum_dtype(hidden_BTD: Tensor) -> torch.dtype:
    return torch.float64 if hidden_BTD.dtype == torch.float64 else torch.float32


@torch.library.custom_op("mediatok::integrate_and_fire", mutates_args=())
def _integrate_and_fire(hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor, tokens: int) -> Tensor:
    """The CPU path, by torch's sums over bags; other devices without a path of their own take it, too."""
    batch, frames, channels = hidden_BTD.shape
    if not (batch and frames and tokens and channels):
        return hidden_BTD.new_zeros(batch, tokens, channels)
    pieces, dtype = _cut(rates_BT, counts_B, tokens), _sum_dtype(hidden_BTD)
    summed = F.embedding_bag(
        _flat(pieces.frame_BE, frames), hidden_BTD.reshape(-1, channels).to(dtype),
        _flat(pieces.token_first_BK1, frames + tokens), mode="sum",
        per_sample_weights=pieces.weight_BE.flatten().to(dtype),
    )  # fmt: skip
    return summed.unflatten(0, (batch, tokens + 1))[:, :tokens].to(hidden_BTD.dtype).contiguous()


@_integrate_and_fire.register_fake
def _(hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor, tokens: int) -> Tensor:
    return hidden_BTD.new_empty(hidden_BTD.shape[0], tokens, hidden_BTD.shape[2])


@torch.library.custom_op("mediatok::integrate_and_fire_backward", mutates_args=())
def _backward(grad_BKD: Tensor, hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of frames and rates; see `_rates_gradient`."""
    (batch, frames, channels), tokens = hidden_BTD.shape, grad_BKD.shape[1]
    if not (batch and frames and tokens and channels):
        return torch.zeros_like(hidden_BTD, memory_format=torch.contiguous_format), torch.zeros_like(rates_BT)
    pieces, dtype = _cut(rates_BT, counts_B, tokens), _sum_dtype(hidden_BTD)
    grad, hidden = (x.reshape(-1, channels).to(dtype).contiguous() for x in (grad_BKD, hidden_BTD))
    token = _flat(pieces.token_BE.clamp(max=tokens - 1), tokens)  # of no token: weight 0
    frame_first_BT = F.pad(pieces.frame_last_BT + 1, (1, 0))[:, :-1]
    grad_hidden = F.embedding_bag(
        token, grad, _flat(frame_first_BT, frames + tokens), mode="sum",
        per_sample_weights=pieces.weight_BE.flatten().to(dtype),
    )  # fmt: skip
    dots_BE = _dots(grad, hidden, token, _flat(pieces.frame_BE, frames)).view(batch, -1)
    grad_rates_BT = _rates_gradient(pieces, counts_B, dots_BE)
    return grad_hidden.view_as(hidden_BTD).to(hidden_BTD.dtype), grad_rates_BT.to(rates_BT.dtype)


@_backward.register_fake
def _(grad_BKD: Tensor, hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_BTD, memory_format=torch.contiguous_format), torch.empty_like(rates_BT)


def _dots(grad_ND: Tensor, hidden_MD: Tensor, token_E: Tensor, frame_E: Tensor) -> Tensor:
    """<g_token, h_frame> of every piece [E]; torch's kernel gathers no vectors for it."""
    if _DOTS is None:
        return (grad_ND[token_E] * hidden_MD[frame_E]).sum(dim=1)
    return _DOTS(grad_ND, hidden_MD, frame_E, token_E[:1], token_E, 0)


def _rates_gradient(pieces: _Pieces, counts_B: Tensor, dots_BE: Tensor) -> Tensor:
    """The gradient of the rates, fp64 [B, T], from the products <g_token, h_frame> of all pieces.

    More mass in frame s gives its token, the first one that is complete in s or later, more of h_s and less of the
    frame that completes it, and moves every later boundary: each later token gains in its first frame what it loses in
    its last. All of these products are those of a frame's first piece, or of a token's first and last.
    """
    frames, tokens = pieces.frame_last_BT.shape[1], pieces.fire_BK.shape[1]
    dots_BE = dots_BE.double()
    first_BK = dots_BE.gather(1, pieces.token_first_BK1[:, :-1])
    last_BK = dots_BE.gather(1, pieces.token_first_BK1[:, 1:] - 1)
    is_complete_BK = pieces.fire_BK < frames  # there is no boundary to move where a token is never completed
    last_BK = last_BK * is_complete_BK
    first_BK = first_BK * F.pad(is_complete_BK, (1, 0), value=True)[:, :-1]
    is_token_BK = torch.arange(tokens, device=counts_B.device) < counts_B[:, None]
    change_BK = (first_BK - last_BK) * is_token_BK
    later_BK = change_BK.flip(1).cumsum(dim=1).flip(1) - change_BK

    frame_first_BT = F.pad(pieces.frame_last_BT + 1, (1, 0))[:, :-1]
    token_BT = pieces.token_BE.gather(1, frame_first_BT)
    own_BT = token_BT.clamp(max=tokens - 1)
    gradient_BT = dots_BE.gather(1, frame_first_BT) + (later_BK - last_BK).gather(1, own_BT)
    return gradient_BT.masked_fill(token_BT >= tokens, 0)


def _setup_context(ctx, inputs, output) -> None:
    hidden_BTD, rates_BT, counts_B, _ = inputs
    ctx.save_for_backward(hidden_BTD, rates_BT, counts_B)


def _differentiate(ctx, grad_BKD: Tensor):
    return *_backward(grad_BKD, *ctx.saved_tensors), None, None


_integrate_and_fire.register_autograd(_differentiate, setup_context=_setup_context)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        hidden_ptr, frame_ptr, weight_ptr, first_ptr, out_ptr, frames, tokens,
        channels: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr,
    ):  # fmt: skip
        """One program: a block of channels of one token."""
        row, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        first = tl.load(first_ptr + row * (tokens + 1) + token)
        end = tl.load(first_ptr + row * (tokens + 1) + token + 1)
        total = tl.zeros((CHANNELS,), SUM)
        piece = first  # `while`: Triton's interpreter takes no loaded bounds for `range`
        while piece < end:
            at = row * (frames + tokens) + piece
            frame = row * frames + tl.load(frame_ptr + at)
            hidden = tl.load(hidden_ptr + frame * channels + channel, mask=channel < channels, other=0.0)
            total += tl.load(weight_ptr + at) * hidden.to(SUM)
            piece += 1
        out = out_ptr + (row * tokens + token) * channels + channel
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=channel < channels)

    @triton.jit
    def _backward_kernel(
        grad_ptr, hidden_ptr, token_ptr, weight_ptr, last_ptr, grad_hidden_ptr, dots_ptr, frames, tokens,
        channels: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr,
    ):  # fmt: skip
        """One program: one frame, the products of its pieces and its gradient."""
        row, frame = tl.program_id(0).to(tl.int64), tl.program_id(1)
        end = tl.load(last_ptr + row * frames + frame) + 1
        first = tl.load(last_ptr + row * frames + frame - 1, mask=frame > 0, other=-1) + 1
        hidden_at = (row * frames + frame) * channels
        piece = first
        while piece < end:
            token = tl.load(token_ptr + row * (frames + tokens) + piece)
            dots = tl.zeros((CHANNELS,), SUM)
            for start in range(0, channels, CHANNELS):
                channel = start + tl.arange(0, CHANNELS)
                inside = (channel < channels) & (token < tokens)
                grad = tl.load(grad_ptr + (row * tokens + token) * channels + channel, mask=inside, other=0.0)
                hidden = tl.load(hidden_ptr + hidden_at + channel, mask=inside, other=0.0)
                dots += grad.to(SUM) * hidden.to(SUM)
            tl.store(dots_ptr + row * (frames + tokens) + piece, tl.sum(dots, axis=0))
            piece += 1
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            total = tl.zeros((CHANNELS,), SUM)
            piece = first
            while piece < end:
                token = tl.load(token_ptr + row * (frames + tokens) + piece)
                inside = (channel < channels) & (token < tokens)
                grad = tl.load(grad_ptr + (row * tokens + token) * channels + channel, mask=inside, other=0.0)
                total += tl.load(weight_ptr + row * (frames + tokens) + piece) * grad.to(SUM)
                piece += 1
            out = grad_hidden_ptr + hidden_at + channel
            tl.store(out, total.to(grad_hidden_ptr.dtype.element_ty), mask=channel < channels)


def integrate_triton(hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor, tokens: int) -> Tensor:
    """The Triton path of `integrate_and_fire`; nothing waits for the device."""
    batch, frames, channels = hidden_BTD.shape
    out_BKD = hidden_BTD.new_zeros(batch, tokens, channels)
    if out_BKD.numel() and frames:
        pieces, sizes = _cut(rates_BT, counts_B, tokens), _sizes(hidden_BTD)
        weight_BE = pieces.weight_BE.to(_sum_dtype(hidden_BTD))
        _forward_kernel[(batch, tokens, triton.cdiv(channels, sizes["CHANNELS"]))](
            hidden_BTD.contiguous(), pieces.frame_BE, weight_BE, pieces.token_first_BK1, out_BKD, frames, tokens,
            **sizes,
        )  # fmt: skip
    return out_BKD


def backward_triton(grad_BKD: Tensor, hidden_BTD: Tensor, rates_BT: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton path of the gradients; the same on every run."""
    (batch, frames, _), tokens = hidden_BTD.shape, grad_BKD.shape[1]
    grad_hidden_BTD = torch.zeros_like(hidden_BTD, memory_format=torch.contiguous_format)
    if not (grad_hidden_BTD.numel() and tokens):
        return grad_hidden_BTD, torch.zeros_like(rates_BT)
    pieces, dtype = _cut(rates_BT, counts_B, tokens), _sum_dtype(hidden_BTD)
    dots_BE = hidden_BTD.new_zeros(batch, frames + tokens, dtype=dtype)
    _backward_kernel[(batch, frames)](
        grad_BKD.contiguous(), hidden_BTD.contiguous(), pieces.token_BE, pieces.weight_BE.to(dtype),
        pieces.frame_last_BT, grad_hidden_BTD, dots_BE, frames, tokens, **_sizes(hidden_BTD),
    )  # fmt: skip
    return grad_hidden_BTD, _rates_gradient(pieces, counts_B, dots_BE).to(rates_BT.dtype)


def _sizes(hidden_BTD: Tensor) -> dict:
    channels = hidden_BTD.shape[2]
    block = min(1024, triton.next_power_of_2(channels))
    sum_dtype = tl.float64 if _sum_dtype(hidden_BTD) == torch.float64 else tl.float32
    return {"channels": channels, "CHANNELS": block, "SUM": sum_dtype}


if triton is not None:
    _integrate_and_fire.register_kernel("cuda")(integrate_triton)
    _backward.register_kernel("cuda")(backward_triton)
