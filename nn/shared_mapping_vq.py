"""TokenFlow's quantizer (Qu et al. 2024, arXiv 2412.03069, section 3.2): two codebooks that share one id.

Id k stands for the pair (semantic code k, pixel code k). Rows and codes are scaled to unit length, each part by itself,
and a row gets the pair for which the two squared distances add up to the least. As all parts are of unit length, that
is the nearest of the concatenated codes: one search (`kernels/nearest`).

A map is quantized residually over square scales of growing side, as VAR does it (Tian et al. 2024, arXiv 2404.02905),
without a convolution behind the upsampling. Since rows are scaled to unit length, only the direction of what is left
to code matters.

Shape suffixes: B items, C = semantic + pixel channels, G side of the map, k tokens of one scale, S tokens of all
scales, L tokens of some, K codes, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.multiscale import split_scales
from ..kernels.nearest import Codebook, nearest_code, straight_through

ENTROPY_TEMPERATURE = 0.01
ENTROPY_EPS = 1e-5


@dataclass
class SharedMappingOutput:
    """Ids int64 [B, L] of the scales that were used, and the losses, 0-d; `quantizer_loss` is the sum of the others."""

    ids_BL: Tensor
    quantizer_loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    entropy_loss: Tensor


class SharedMappingQuantizer(nn.Module):
    """Quantize maps [B, C, G, G] over square scales of the sides `sides`, G being the last. Always computes in fp32.

    Args:
        codebook_size: pairs of codes. semantic_width, pixel_width: channels of the two parts.
        commitment_cost: weight of the commitment loss.
        entropy_ratio: weight of the entropy loss; 0 in all released models.
    """

    def __init__(
        self, codebook_size: int, semantic_width: int, pixel_width: int, sides: Sequence[int],
        commitment_cost: float = 0.25, entropy_ratio: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.sides, self.widths = tuple(sides), (semantic_width, pixel_width)
        self.scales = tuple(side**2 for side in self.sides)
        self.slices = tuple(split_scales(self.scales))
        self.commitment_cost, self.entropy_ratio = commitment_cost, entropy_ratio
        self.embedding_vqkd = nn.Embedding(codebook_size, semantic_width)
        self.embedding_vqgan = nn.Embedding(codebook_size, pixel_width)
        with torch.no_grad():
            for embedding in (self.embedding_vqkd, self.embedding_vqgan):
                embedding.weight.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
                embedding.weight.copy_(F.normalize(embedding.weight, dim=-1))

    @property
    def code_width(self) -> int:
        return sum(self.widths)

    def codebook(self) -> Tensor:
        """The pairs as they are compared and returned, fp32 [K, C]; each part of unit length."""
        parts = (self.embedding_vqkd.weight, self.embedding_vqgan.weight)
        return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=1)

    def normalized(self, rows_NC: Tensor) -> Tensor:
        """Rows fp32 [N, C] with each part scaled to unit length."""
        return torch.cat([F.normalize(part, dim=-1) for part in rows_NC.float().split(self.widths, dim=-1)], dim=-1)

    def codes(self, ids_BL: Tensor) -> Tensor:
        """Pairs fp32 [B, L, C] of ids, each part of unit length."""
        tables = (self.embedding_vqkd.weight, self.embedding_vqgan.weight)
        return torch.cat([F.normalize(F.embedding(ids_BL, table).float(), dim=-1) for table in tables], dim=-1)

    @torch.no_grad()
    def encode(self, h_BCGG: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, S] of all scales, and the sum of their codes fp32 [B, C, G, G], without losses."""
        codebook = Codebook(self.codebook())
        residual_BCGG, sum_BCGG, ids = h_BCGG.float(), torch.zeros_like(h_BCGG, dtype=torch.float32), []
        for side in self.sides:
            rows_NC = self.normalized(_rows(self.reduced(residual_BCGG, side)))
            ids.append(codebook.nearest(rows_NC).view(len(h_BCGG), -1))
            added_BCGG = self._enlarged(F.embedding(ids[-1], codebook.codes_KD), side)
            sum_BCGG, residual_BCGG = sum_BCGG + added_BCGG, residual_BCGG - added_BCGG
        return torch.cat(ids, dim=1), sum_BCGG

    def forward(self, h_BCGG: Tensor, left_out: int | None = None) -> tuple[Tensor, SharedMappingOutput]:
        """The sum of the codes fp32 [B, C, G, G], its gradient straight through, and a `SharedMappingOutput`.

        left_out: the number of a scale that is skipped, the first one being 0.
        """
        with torch.autocast(h_BCGG.device.type, enabled=False):
            codebook_KC = self.codebook()
            residual_BCGG, sum_BCGG = h_BCGG.float(), torch.zeros_like(h_BCGG, dtype=torch.float32)
            ids, losses = [], []
            for number, side in enumerate(self.sides):
                if number == left_out:
                    continue
                small_BCkk = self.reduced(residual_BCGG, side)
                rows_NC, ids_N, terms = self.quantize_rows(_rows(small_BCkk), codebook_KC)
                added_BCGG = self._enlarged(rows_NC.view(len(h_BCGG), -1, self.code_width), side)
                sum_BCGG, residual_BCGG = sum_BCGG + added_BCGG, residual_BCGG - added_BCGG.detach()
                ids.append(ids_N.view(len(h_BCGG), -1))
                losses.append(terms)
            terms = torch.stack(losses).mean(dim=0)
            return sum_BCGG, SharedMappingOutput(torch.cat(ids, dim=1), terms.sum(), *terms)

    def quantize_rows(self, rows_NC: Tensor, codebook_KC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows [N, C]: their codes with the gradient passed on, ids [N], and the codebook, commitment and entropy
        losses [3]."""
        rows_NC = self.normalized(rows_NC)
        ids_N = nearest_code(rows_NC, codebook_KC)
        codes_NC = F.embedding(ids_N, codebook_KC)
        codebook_loss = F.mse_loss(codes_NC, rows_NC.detach())
        commitment_loss = self.commitment_cost * F.mse_loss(rows_NC, codes_NC.detach())
        entropy_loss = codebook_loss.new_zeros(())
        if self.entropy_ratio:
            entropy_loss = self.entropy_ratio * entropy_of(2 * rows_NC @ codebook_KC.T)  # -d, but for a constant
        return straight_through(rows_NC, codes_NC), ids_N, torch.stack([codebook_loss, commitment_loss, entropy_loss])

    def sum_of(self, ids_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """The sum fp32 [B, C, G, G] of the first scales; L ends with any of them.

        lengths_B: tokens of each item, each a whole number of scales; those behind are as if they were not there.
        """
        side = self.sides[-1]
        sum_BCGG = torch.zeros(len(ids_BL), self.code_width, side, side, device=ids_BL.device)
        for number, places in enumerate(self.slices):
            if places.stop > ids_BL.shape[1]:
                break
            codes_BkC = self.codes(ids_BL[:, places])
            if lengths_B is not None:
                codes_BkC = codes_BkC * (lengths_B >= places.stop)[:, None, None]
            sum_BCGG = sum_BCGG + self._enlarged(codes_BkC, self.sides[number])
        return sum_BCGG

    def reduced(self, x_BCGG: Tensor, side: int) -> Tensor:
        """A map as a scale sees it: averages [B, C, side, side]."""
        return F.adaptive_avg_pool2d(x_BCGG, side)

    def _enlarged(self, codes_BkC: Tensor, side: int) -> Tensor:
        """Codes of a scale as a whole map [B, C, G, G]."""
        return resize_bicubic(rearrange(codes_BkC, "b (h w) c -> b c h w", h=side), self.sides[-1])


def resize_bicubic(x_BCHW: Tensor, side: int) -> Tensor:
    """Maps [B, C, side, side], by cubic interpolation without antialiasing."""
    if x_BCHW.shape[-2:] == (side, side):
        return x_BCHW
    return F.interpolate(x_BCHW, size=(side, side), mode="bicubic", align_corners=False)


def entropy_of(affinity_NK: Tensor) -> Tensor:
    """How unsure single rows are of their code, less how evenly all rows together use the codes: 0-d, in nats."""
    shares_NK = (affinity_NK / ENTROPY_TEMPERATURE).softmax(dim=-1)
    log_shares_NK = (affinity_NK / ENTROPY_TEMPERATURE).log_softmax(dim=-1)
    mean_K = shares_NK.mean(dim=0)
    sample_entropy = -(shares_NK * log_shares_NK).sum(dim=-1).mean()
    return sample_entropy + (mean_K * (mean_K + ENTROPY_EPS).log()).sum()


def _rows(x_BCHW: Tensor) -> Tensor:
    return rearrange(x_BCHW, "b c h w -> (b h w) c")
