"""Residual quantization of latents over scales of growing length: the code of next-scale generators (VAR, VAT).

The latents are approached by a sum f = h_1 + h_2 + ...: scale k codes what is left of them, resampled to L_k tokens,
and adds those codes, resampled back to all L latents. Any whole number of scales gives a sum that can be decoded.

Resampling is either interpolation along the tokens and a learned convolution (VAR, Tian et al. 2024, arXiv 2404.02905;
`kernels/multiscale`), or cross-attention from learned queries both ways (G3PT, Zhang et al. 2024, arXiv 2409.06322).
Codes come from one codebook for all scales, or are lookup-free: the signs of the channels (Yu et al. 2023, arXiv
2310.05737).

Shape suffixes: B items, L latents, C channels, S tokens of all scales, k tokens of one scale, K codes, N scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.tokens import MAX_SCALES
from ..kernels.multiscale import (
    TAPS,
    area_down,
    bits_of,
    linear_up,
    multiscale_quantize,
    signs_of,
    smooth,
    split_scales,
)  # fmt: skip
from ..kernels.nearest import nearest_code, straight_through

COMMITMENT_WEIGHT = 0.25
ENTROPY_WEIGHT = 0.1  # lookup-free codes alone
ENTROPY_SHARPNESS = 4.0  # of the sigmoid that turns a channel into the probability of its bit
SIGN_SIZE = 0.8  # the mean size of a unit Gaussian: the best code of one bit
QUERY_SHARPNESS = 4.0  # of random weights: a query looks at about its own place


@dataclass
class MultiScaleOutput:
    """What training needs of a quantizer's pass.

    ids_BS: int64. quantizer_loss: 0-d, the sum of all below. codebook_loss, commitment_loss, entropy_loss: 0-d.
    rows_BSC: what each token's code was searched for, without gradient: where codes would best lie.
    """

    ids_BS: Tensor
    quantizer_loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    entropy_loss: Tensor
    rows_BSC: Tensor


class Interpolation(nn.Module):
    """Averages down, linear interpolation and phi_k(x) = (x + conv_k(x)) / 2 up."""

    def __init__(self, scales: Sequence[int], channels: int):
        super().__init__()
        self.scales = tuple(scales)
        self.weight = nn.Parameter(torch.empty(len(scales), channels, channels, TAPS))
        self.bias = nn.Parameter(torch.zeros(len(scales), channels))
        # Near the identity: sums of codes then lie near the latents from the first step on.
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(TAPS * channels))
        with torch.no_grad():
            self.weight[..., TAPS // 2] += torch.eye(channels)

    def down(self, x_BLC: Tensor, k: int) -> Tensor:
        return area_down(x_BLC, self.scales[k])

    def up(self, codes_BkC: Tensor, k: int) -> Tensor:
        return smooth(linear_up(codes_BkC, self.scales[-1]), self.weight[k].float(), self.bias[k].float())


class Querying(nn.Module):
    """Cross-attention with one head: tokens of a scale from the latents, and latents from its tokens.

    Queries are made of learned places, keys of places and contents. Places start as waves along the tokens and
    contents weigh little, so that attention starts as a soft interpolation. The last scale is as long as the latents
    and is not resampled.
    """

    def __init__(self, scales: Sequence[int], channels: int):
        super().__init__()
        self.places = nn.ParameterList(nn.Parameter(waves(tokens, channels)) for tokens in scales)
        self.down_key, self.up_key = (nn.Linear(channels, channels, bias=False) for _ in range(2))
        self.down_value, self.up_value = (nn.Linear(channels, channels, bias=False) for _ in range(2))
        for key, value in ((self.down_key, self.down_value), (self.up_key, self.up_value)):
            nn.init.normal_(key.weight, std=0.02 / math.sqrt(channels))
            nn.init.eye_(value.weight)

    def down(self, x_BLC: Tensor, k: int) -> Tensor:
        if k == len(self.places) - 1:
            return x_BLC
        return _attend(self.places[k], self.places[-1] + self.down_key(x_BLC), self.down_value(x_BLC))

    def up(self, codes_BkC: Tensor, k: int) -> Tensor:
        if k == len(self.places) - 1:
            return codes_BkC
        return _attend(self.places[-1], self.places[k] + self.up_key(codes_BkC), self.up_value(codes_BkC))


def _attend(query_QC: Tensor, key_BTC: Tensor, value_BTC: Tensor) -> Tensor:
    scores_BQT = query_QC.float() @ key_BTC.float().transpose(1, 2)
    return (QUERY_SHARPNESS * scores_BQT).softmax(dim=-1) @ value_BTC


def waves(tokens: int, channels: int) -> Tensor:
    """Cosines and sines [tokens, channels] of 1, 2, ... half turns along the tokens; rows have unit length."""
    place_k1 = (torch.arange(tokens) + 0.5)[:, None] / tokens
    turn_C = torch.arange(channels) // 2 + 1
    phase_C = torch.arange(channels) % 2 * math.pi / 2
    return F.normalize(torch.cos(math.pi * turn_C * place_k1 - phase_C), dim=1)


class MultiScaleQuantizer(nn.Module):
    """Quantize latents [B, L, C] over `scales`, L being the last of them. Always computes in fp32.

    Args:
        codebook_size: codes of the one codebook; 2 ** code_width where `lookup_free`.
        code_width: C.
        scales: tokens of each scale, growing.
        resample: "interp" or "query".
        lookup_free: signs of the channels, times a learned size for each scale, in the place of a codebook.

    Raises:
        InvalidInput: sizes that do not go together.
    """

    def __init__(
        self, codebook_size: int, code_width: int, scales: Sequence[int], resample: str = "interp",
        lookup_free: bool = False,
    ):  # fmt: skip
        super().__init__()
        _check_sizes(codebook_size, code_width, scales, resample, lookup_free)
        self.scales, self.code_width, self.lookup_free = tuple(scales), code_width, lookup_free
        self.slices = tuple(split_scales(self.scales))
        self.resampler = (Interpolation if resample == "interp" else Querying)(self.scales, code_width)
        if lookup_free:
            # The mean of n unit Gaussians has the deviation n ** -0.5.
            sizes_N = SIGN_SIZE * (torch.tensor(self.scales) / self.scales[-1]).sqrt()
            self.sign_sizes = nn.Parameter(sizes_N)
        else:
            self.codebook = nn.Parameter(torch.randn(codebook_size, code_width) / 2)

    @torch.no_grad()
    def encode(self, z_BLC: Tensor) -> Tensor:
        """Ids int64 [B, S] of all scales, without losses: the inference path."""
        return self._search(z_BLC)[0]

    def forward(self, z_BLC: Tensor, num_scales: int | None = None) -> tuple[Tensor, MultiScaleOutput]:
        """Return the sum of the codes [B, L, C], its gradient straight through to z, and a `MultiScaleOutput`.

        num_scales: how many scales the sum takes, from the first on; all have their part in the losses.
        """
        with torch.autocast(z_BLC.device.type, enabled=False):
            z_BLC = z_BLC.float()
            ids_BS, rows_BSC = self._search(z_BLC.detach())
            residual_BLC, sum_BLC = z_BLC.detach(), torch.zeros_like(z_BLC)
            kept_BLC, codebook_losses, commitment_losses = sum_BLC, [], []
            for k, places in enumerate(self.slices):
                added_BLC = self.resampler.up(self._trained_codes(ids_BS[:, places], residual_BLC, k), k)
                sum_BLC = sum_BLC + added_BLC
                residual_BLC = residual_BLC - added_BLC.detach()
                codebook_losses.append(F.mse_loss(sum_BLC, z_BLC.detach()))
                commitment_losses.append(F.mse_loss(z_BLC, sum_BLC.detach()))
                kept_BLC = sum_BLC if k < (num_scales or len(self.scales)) else kept_BLC
            codebook_loss = torch.stack(codebook_losses).mean()
            commitment_loss = COMMITMENT_WEIGHT * torch.stack(commitment_losses).mean()
            entropy_loss = self._entropy_loss(z_BLC)
            loss = codebook_loss + commitment_loss + entropy_loss
            output = MultiScaleOutput(ids_BS, loss, codebook_loss, commitment_loss, entropy_loss, rows_BSC)
            return straight_through(z_BLC, kept_BLC), output

    # What a next-scale generator and the decoder ask for.

    def codes(self, ids_BSk: Tensor, k: int) -> Tensor:
        """Codes fp32 [B, k, C] of the ids of scale `k`, counted from 0."""
        if self.lookup_free:
            return signs_of(ids_BSk, self.code_width) * self.sign_sizes[k].float()
        return F.embedding(ids_BSk, self.codebook.float())

    def accumulate(self, sum_BLC: Tensor, k: int, ids_BSk: Tensor) -> Tensor:
        """Add scale `k`, counted from 0, to the sum fp32 [B, L, C] of the scales before it."""
        return sum_BLC + self.resampler.up(self.codes(ids_BSk, k), k)

    def view(self, sum_BLC: Tensor, k: int) -> Tensor:
        """The sum so far as scale `k`, counted from 0, would see it: averaged to fp32 [B, L_k, C]."""
        return area_down(sum_BLC, self.scales[k])

    def sum_of(self, ids_BS: Tensor) -> Tensor:
        """The sum fp32 [B, L, C] of the first scales; S ends with any of them."""
        sum_BLC = torch.zeros(len(ids_BS), self.scales[-1], self.code_width, device=ids_BS.device)
        for k, places in enumerate(self.slices[: scales_in(ids_BS.shape[1], self.scales)]):
            sum_BLC = self.accumulate(sum_BLC, k, ids_BS[:, places])
        return sum_BLC

    # Searching.

    def _search(self, z_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, S] and the rows [B, S, C] that they were searched for."""
        if isinstance(self.resampler, Interpolation):
            codes = self.sign_sizes if self.lookup_free else self.codebook
            return multiscale_quantize(z_BLC, codes, self.resampler.weight, self.resampler.bias, self.scales)
        with torch.no_grad():
            residual_BLC, ids, rows = z_BLC.float(), [], []
            for k in range(len(self.scales)):
                rows.append(self.resampler.down(residual_BLC, k))
                ids.append(self._nearest(rows[-1]))
                residual_BLC = residual_BLC - self.resampler.up(self.codes(ids[-1], k), k)
            return torch.cat(ids, dim=1), torch.cat(rows, dim=1)

    def _nearest(self, rows_BkC: Tensor) -> Tensor:
        if self.lookup_free:
            return bits_of(rows_BkC)
        return nearest_code(rows_BkC.flatten(0, 1), self.codebook).view(rows_BkC.shape[:2])

    def _trained_codes(self, ids_BSk: Tensor, residual_BLC: Tensor, k: int) -> Tensor:
        """The codes of scale `k`; a learned resampler that led to them gets their gradient, too."""
        codes_BkC = self.codes(ids_BSk, k)
        if isinstance(self.resampler, Interpolation):
            return codes_BkC
        rows_BkC = self.resampler.down(residual_BLC, k)
        return codes_BkC + (rows_BkC - rows_BkC.detach())

    def _entropy_loss(self, z_BLC: Tensor) -> Tensor:
        """Lookup-free codes: each bit should be sure for a row, and even over all rows (BSQ, Zhao et al. 2024)."""
        if not self.lookup_free:
            return z_BLC.new_zeros(())
        p_NC = torch.sigmoid(ENTROPY_SHARPNESS * z_BLC.flatten(0, 1))
        return ENTROPY_WEIGHT * (_bit_entropy(p_NC).mean() - _bit_entropy(p_NC.mean(dim=0)).mean())


def _bit_entropy(p: Tensor) -> Tensor:
    """Nats of bits that are set with probability `p`."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def scales_in(num_tokens: int, scales: Sequence[int]) -> int:
    """How many whole scales `num_tokens` are, from the first on; InvalidInput if they end within one."""
    ends = [places.stop for places in split_scales(scales)]
    if num_tokens not in ends:
        raise InvalidInput(f"{num_tokens} tokens end within a scale; whole scales end at {', '.join(map(str, ends))}")
    return ends.index(num_tokens) + 1


def _check_sizes(codebook_size: int, code_width: int, scales: Sequence[int], resample: str, lookup_free: bool) -> None:
    if resample not in ("interp", "query"):
        raise InvalidInput(f"resample must be 'interp' or 'query', not {resample!r}")
    grows = all(a < b for a, b in pairwise(scales))
    if not scales or not 1 <= len(scales) <= MAX_SCALES or not grows:
        raise InvalidInput(f"scales must be 1 to {MAX_SCALES} growing numbers of tokens, not {tuple(scales)}")
    if lookup_free and codebook_size != 2**code_width:
        raise InvalidInput(
            f"lookup-free codes of {code_width} channels are {2**code_width}, not codebook_size={codebook_size}"
        )
