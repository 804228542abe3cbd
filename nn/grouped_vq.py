"""Grouped and residual vector quantization (HiFi-Codec, Yang et al. 2023, arXiv 2305.02765, section 3.2).

A vector is cut into G equal groups, each of which takes its nearest code; further layers quantize what is left. One
layer and one group is SimCodec's single quantizer.

Shape suffixes: B batch, L frames, C channels, Q codebooks (layer by layer, in each group by group), K codes, N = B*L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.nearest import nearest_code, straight_through

SPREAD_SHARPNESS = 3.0
SPREAD_ROWS = 1024  # of the Gram matrix that are there at once


@dataclass
class GroupedVQOutput:
    """Codes `quantized_BCL` (gradient straight through), ids int64 [B, L, Q] and the loss, 0-d."""

    quantized_BCL: Tensor
    ids_BLQ: Tensor
    quantizer_loss: Tensor


class GroupedResidualVQ(nn.Module):
    """`num_layers` x `num_groups` codebooks of `num_codes` codes. Always computes in fp32.

    spread_weight: of a loss of the first layer that wants each code to be more like itself than like any other.
    """

    def __init__(
        self, num_layers: int, num_groups: int, num_codes: int, width: int,
        codebook_weight: float = 1.0, commitment_weight: float = 0.25, spread_weight: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        if width % num_groups:
            raise ValueError(f"{width} channels are not divisible into {num_groups} groups")
        self.num_layers, self.num_groups = num_layers, num_groups
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight
        self.spread_weight = spread_weight
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.empty(num_codes, width // num_groups).uniform_(-1 / num_codes, 1 / num_codes))
            for _ in range(num_layers * num_groups)
        )

    def layer(self, index: int) -> list[Tensor]:
        """The codebooks [K, C / G] of the groups of one layer, fp32."""
        first = index * self.num_groups
        return [self.codebooks[first + group].float() for group in range(self.num_groups)]

    def nearest(self, latent_BCL: Tensor) -> Tensor:
        """Ids int64 [B, L, Q], without losses: the inference path."""
        residual_NC, ids = rearrange(latent_BCL.float(), "b c l -> (b l) c"), []
        for index in range(self.num_layers):
            codebooks = self.layer(index)
            found = self._search(residual_NC, codebooks)
            ids += found
            if index + 1 < self.num_layers:
                residual_NC = residual_NC - self._codes(found, codebooks)
        return torch.stack(ids, dim=1).view(latent_BCL.shape[0], latent_BCL.shape[2], len(ids))

    def lookup(self, ids_BLQ: Tensor) -> Tensor:
        """Sum of the layers' codes, fp32 [B, C, L]; ids of the first layers alone will do."""
        layers = ids_BLQ.flatten(0, 1).unbind(1)
        total_NC = sum(
            self._codes(layers[first : first + self.num_groups], self.layer(first // self.num_groups))
            for first in range(0, len(layers), self.num_groups)
        )
        return rearrange(total_NC, "(b l) c -> b c l", b=ids_BLQ.shape[0])

    def forward(
        self, latent_BCL: Tensor, num_layers: int | None = None, last_layer_BL: Tensor | None = None
    ) -> GroupedVQOutput:
        """Quantize `latent_BCL`, for training.

        num_layers: how many layers are used, from the first on. last_layer_BL: the last layer used, by frame, int64:
        later ones add nothing to its codes and losses.
        """
        with torch.autocast(latent_BCL.device.type, enabled=False):
            residual_NC = rearrange(latent_BCL.float(), "b c l -> (b l) c")
            total_NC, ids, losses = torch.zeros_like(residual_NC), [], []
            for index in range(num_layers or self.num_layers):
                codebooks = self.layer(index)
                found = self._search(residual_NC.detach(), codebooks)
                codes_NC = self._codes(found, codebooks)
                through_NC = straight_through(residual_NC, codes_NC)
                weight_N1 = 1.0 if last_layer_BL is None else (last_layer_BL.flatten()[:, None] >= index).float()
                commitment = ((codes_NC.detach() - residual_NC).square() * weight_N1).mean()
                codebook = ((codes_NC - residual_NC.detach()).square() * weight_N1).mean()
                loss = self.codebook_weight * codebook + self.commitment_weight * commitment
                if self.spread_weight and index == 0:
                    loss = loss + self.spread_weight * sum(map(spread_loss, codebooks)) / self.num_groups
                total_NC = total_NC + through_NC * weight_N1
                residual_NC = residual_NC - through_NC
                ids += found
                losses.append(loss)
        batch = latent_BCL.shape[0]
        quantized_BCL = rearrange(total_NC, "(b l) c -> b c l", b=batch)
        ids_BLQ = rearrange(torch.stack(ids, dim=1), "(b l) q -> b l q", b=batch)
        return GroupedVQOutput(quantized_BCL, ids_BLQ, torch.stack(losses).mean())

    def _search(self, residual_NC: Tensor, codebooks: list[Tensor]) -> list[Tensor]:
        groups = residual_NC.chunk(self.num_groups, dim=1)
        return [nearest_code(x.contiguous(), codes.detach()) for x, codes in zip(groups, codebooks, strict=True)]

    @staticmethod
    def _codes(ids: list[Tensor] | tuple[Tensor, ...], codebooks: list[Tensor]) -> Tensor:
        return torch.cat([F.embedding(i, codes) for i, codes in zip(ids, codebooks, strict=True)], dim=1)


def spread_loss(codes_KC: Tensor) -> Tensor:
    """Cross-entropy of each code's similarities to all codes against itself, 0-d.

    Some rows of the K x K similarities at a time, recomputed in the backward pass: the whole would take 256 MiB for
    8,192 codes.
    """
    if len(codes_KC) <= SPREAD_ROWS:
        return _spread_rows(codes_KC, codes_KC, 0) / len(codes_KC)
    total = sum(
        checkpoint(_spread_rows, rows, codes_KC, index * SPREAD_ROWS, use_reentrant=False)
        for index, rows in enumerate(codes_KC.split(SPREAD_ROWS))
    )
    return total / len(codes_KC)


def _spread_rows(rows_RC: Tensor, codes_KC: Tensor, first: int) -> Tensor:
    target_R = torch.arange(first, first + len(rows_RC), device=codes_KC.device)
    return F.cross_entropy(SPREAD_SHARPNESS * rows_RC @ codes_KC.T, target_R, reduction="sum")
