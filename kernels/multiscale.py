"""Residual quantization over scales of one sequence: coarse tokens first, each scale codes what is left of the latents.

For k = 1 .. K, with r = z at the start and D_k, U_k between L latents and the L_k tokens of scale k:

    q_k = nearest code to D_k r,    h_k = phi_k(U_k q_k),    r <- r - h_k

D_k averages (torch's "area" interpolation), U_k is linear, phi_k(x) = (x + conv_k(x)) / 2 with three taps along the
tokens (VAR, Tian et al. 2024, arXiv 2404.02905, algorithm 1, in one dimension). A scale as long as the latents is not
resampled. `reference` is this, in plain PyTorch.

Ids follow one another: an id that rounding flips changes all that come after it. So residuals are kept in fp64 and
rounded to fp32 where codes are searched, and the search itself is exact (`nearest`). Ids then depend on the order of
sums, on the device and on the batch only where an fp32 rounding hangs on the last bits of fp64.

A scale is one pass: averages as a product with a small matrix, one search over all rows of the batch, linear
interpolation of neighbours and the taps of phi side by side as one more product.

Shape suffixes: B items, L latents, C channels, S tokens of all scales, K codes, N scales, T taps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InvalidInput
from . import nearest

TAPS = 3


def multiscale_quantize(
    z_BLC: Tensor, codes: Tensor, phi_weight_NCCT: Tensor, phi_bias_NC: Tensor, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the ids int64 [B, S], coarse scales first, and the rows fp32 [B, S, C] that the codes were searched for.

    Args:
        z_BLC: latents, read as fp32.
        codes: a codebook [K, C]; or [N], for lookup-free codes: the signs of a row times this size for each scale. The
            id then has bit c set where channel c is positive.
        phi_weight_NCCT, phi_bias_NC: the convolution of each scale, as `torch.nn.Conv1d` has them.
        scales: tokens of each scale.

    There is no gradient. Raises InvalidInput for shapes that do not fit.
    """
    _check(z_BLC, codes, phi_weight_NCCT, phi_bias_NC, scales)
    tensors = (x.detach().float().contiguous() for x in (z_BLC, codes, phi_weight_NCCT, phi_bias_NC))
    return _multiscale_quantize(*tensors, list(scales))


def reference(
    z_BLC: Tensor, codes: Tensor, phi_weight_NCCT: Tensor, phi_bias_NC: Tensor, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The definition of `multiscale_quantize`, in plain PyTorch."""
    _check(z_BLC, codes, phi_weight_NCCT, phi_bias_NC, scales)
    residual_BCL = z_BLC.detach().float().double().transpose(1, 2)
    length, ids, rows = residual_BCL.shape[2], [], []
    for scale, tokens in enumerate(scales):
        small_BCk = residual_BCL if tokens == length else F.interpolate(residual_BCL, tokens, mode="area")
        rows_BkC = small_BCk.float().transpose(1, 2)
        if codes.ndim == 1:
            ids_Bk, codes_BkC = bits_of(rows_BkC), codes[scale].double() * signs(rows_BkC).double()
        else:
            ids_Bk = nearest.reference(rows_BkC.flatten(0, 1), codes).view(rows_BkC.shape[:2])
            codes_BkC = codes.double()[ids_Bk]
        up_BCL = codes_BkC.transpose(1, 2)
        up_BCL = up_BCL if tokens == length else F.interpolate(up_BCL, length, mode="linear")
        conv_BCL = F.conv1d(up_BCL, phi_weight_NCCT[scale].double(), phi_bias_NC[scale].double(), padding="same")
        residual_BCL = residual_BCL - (up_BCL + conv_BCL) / 2
        ids.append(ids_Bk)
        rows.append(rows_BkC)
    return torch.cat(ids, dim=1), torch.cat(rows, dim=1)


def signs(x: Tensor) -> Tensor:
    """1 where `x` is positive, -1 elsewhere."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def bits_of(x_C: Tensor) -> Tensor:
    """Ids int64 [...] of rows [..., C]: bit c says whether channel c is positive."""
    return ((x_C > 0).long() << torch.arange(x_C.shape[-1], device=x_C.device)).sum(dim=-1)


def signs_of(ids: Tensor, channels: int) -> Tensor:
    """Inverse of `bits_of`: fp32 [..., C] of 1 and -1."""
    return ((ids[..., None] >> torch.arange(channels, device=ids.device)) & 1).float() * 2 - 1


def _check(z_BLC: Tensor, codes: Tensor, phi_weight_NCCT: Tensor, phi_bias_NC: Tensor, scales: Sequence[int]) -> None:
    fits = z_BLC.ndim == 3 and len(scales) > 0 and all(1 <= tokens <= z_BLC.shape[1] for tokens in scales)
    if fits:
        channels, number = z_BLC.shape[2], len(scales)
        fits = phi_weight_NCCT.shape == (number, channels, channels, TAPS) and phi_bias_NC.shape == (number, channels)
        fits &= codes.shape == (number,) if codes.ndim == 1 else codes.ndim == 2 and codes.shape[1] == channels
        fits &= codes.shape[0] > 0
    if not fits:
        shapes = ", ".join(str(list(x.shape)) for x in (z_BLC, codes, phi_weight_NCCT, phi_bias_NC))
        raise InvalidInput(
            f"multiscale_quantize needs latents [B, L, C], codes [K, C] or [N], convolutions [N, C, C, {TAPS}] and "
            f"[N, C], and scales of 1 to L tokens, not {shapes} and {tuple(scales)}"
        )


# Resampling between L latents and the tokens of a scale, also for layers that train.


# What is kept must not be an inference tensor, which no gradient can use later.


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _area(length: int, tokens: int) -> Tensor:
    """D as a matrix [tokens, L], fp64: token i is the mean of the latents floor(i L / k) .. ceil((i + 1) L / k)."""
    first = torch.arange(tokens) * length // tokens
    last = -(-(torch.arange(tokens) + 1) * length // tokens)
    latent = torch.arange(length)
    is_in = (latent >= first[:, None]) & (latent < last[:, None])
    return is_in.double() / (last - first)[:, None]


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _linear(tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """U as the lower neighbour [L] of every latent among the tokens, int64, and the share [L, 1] of the next one."""
    place = ((torch.arange(length, dtype=torch.float64) + 0.5) * tokens / length - 0.5).clamp(min=0)
    lower = place.long().clamp(max=max(tokens - 2, 0))
    return lower, (place - lower).clamp(max=1)[:, None]


def area_down(x_BLC: Tensor, tokens: int) -> Tensor:
    """D: means [B, tokens, C] over the latents of each token."""
    length = x_BLC.shape[1]
    return x_BLC if tokens == length else _area(length, tokens).to(x_BLC) @ x_BLC


def linear_up(x_BkC: Tensor, length: int) -> Tensor:
    """U: [B, length, C], interpolated between the tokens as they lie evenly along the latents."""
    tokens = x_BkC.shape[1]
    if tokens == length:
        return x_BkC
    if tokens == 1:
        return x_BkC.expand(-1, length, -1)
    lower_L, share_L1 = _linear(tokens, length)
    lower_L = lower_L.to(x_BkC.device)
    return torch.lerp(x_BkC[:, lower_L], x_BkC[:, lower_L + 1], share_L1.to(x_BkC))


def smooth(x_BLC: Tensor, weight_CCT: Tensor, bias_C: Tensor) -> Tensor:
    """phi: (x + conv(x)) / 2, as one product: the neighbours of a token lie beside it."""
    taps_BLD = F.pad(x_BLC, (0, 0, 1, 1)).unfold(1, TAPS, 1).flatten(2)
    return (x_BLC + F.linear(taps_BLD, weight_CCT.flatten(1), bias_C)) / 2


def split_scales(scales: Sequence[int]) -> Iterator[slice]:
    """The places of each scale among all tokens."""
    start = 0
    for tokens in scales:
        yield slice(start, start + tokens)
        start += tokens


# The operation.


@torch.library.custom_op("mediatok::multiscale_quantize", mutates_args=())
def _multiscale_quantize(
    z_BLC: Tensor, codes: Tensor, phi_weight_NCCT: Tensor, phi_bias_NC: Tensor, scales: list[int]
) -> tuple[Tensor, Tensor]:
    """For the CPU and CUDA, where the search runs in Triton; devices without fp64 borrow the CPU."""
    device = z_BLC.device
    here = device if device.type == "cuda" else torch.device("cpu")
    codes, residual_BLC = codes.to(here), z_BLC.to(here).double()
    weight_NCCT, bias_NC = phi_weight_NCCT.to(here).double(), phi_bias_NC.to(here).double()
    ids_BS = torch.empty(z_BLC.shape[0], sum(scales), dtype=torch.int64, device=here)
    rows_BSC = torch.empty(*ids_BS.shape, z_BLC.shape[2], device=here)
    for scale, places in enumerate(split_scales(scales)):
        rows_BkC = area_down(residual_BLC, scales[scale]).float()
        if codes.ndim == 1:
            ids_Bk, codes_BkC = bits_of(rows_BkC), codes[scale].double() * signs(rows_BkC).double()
        else:
            ids_Bk = nearest.nearest_code(rows_BkC.flatten(0, 1), codes).view(rows_BkC.shape[:2])
            codes_BkC = codes[ids_Bk].double()
        ids_BS[:, places], rows_BSC[:, places] = ids_Bk, rows_BkC
        if places.stop < ids_BS.shape[1]:
            up_BLC = linear_up(codes_BkC, z_BLC.shape[1])
            residual_BLC = residual_BLC - smooth(up_BLC, weight_NCCT[scale], bias_NC[scale])
    return ids_BS.to(device), rows_BSC.to(device)


@_multiscale_quantize.register_fake
def _(
    z_BLC: Tensor, codes: Tensor, phi_weight_NCCT: Tensor, phi_bias_NC: Tensor, scales: list[int]
) -> tuple[Tensor, Tensor]:
    batch, _, channels = z_BLC.shape
    total = sum(scales)
    return z_BLC.new_empty(batch, total, dtype=torch.int64), z_BLC.new_empty(batch, total, channels)
