"""Vector quantization with a learned codebook (van den Oord et al. 2017), as TiTok and One-D-Piece use it.

Shape suffixes: B batch, C code channels, H height, W width, N = B*H*W vectors, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.nearest import nearest_code, straight_through

USAGE_DECAY = 0.99  # of the running code usage behind dead-code revival
REVIVAL_SHARPNESS = 10.0  # how fast revival fades with usage (CVQ-VAE, Zheng & Vedaldi 2023, eq. 5)


@dataclass
class VQOutput:
    """Ids int64 [B, H, W] and the losses, 0-d: `quantizer_loss` is the sum of the other two."""

    ids_BHW: Tensor
    quantizer_loss: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class VectorQuantizer(nn.Module):
    """Replace each vector by its nearest code (L2; on the unit sphere when `use_l2_norm`). Always computes in fp32.

    With `clustering`, codes that are hardly used are re-seeded in training from the vector nearest to them (CVQ-VAE).
    """

    def __init__(
        self,
        codebook_size: int,
        token_size: int,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = False,
        clustering: bool = False,
    ):
        super().__init__()
        self.commitment_cost = commitment_cost
        self.use_l2_norm = use_l2_norm
        self.clustering = clustering
        self.embedding = nn.Embedding(codebook_size, token_size)
        self.embedding.weight.data.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
        if clustering:
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def codebook(self) -> Tensor:
        """Codes as they are compared and returned, fp32 [K, C]; unit rows when `use_l2_norm`."""
        weight = self.embedding.weight.float()
        if not self.use_l2_norm:
            return weight
        # Revival writes to the codebook between forward and backward; the gradient of the norm needs the old values.
        return F.normalize(weight.clone() if self.clustering and self.training else weight, dim=-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes of integer `ids` of any shape [...], fp32 [..., C]."""
        return F.embedding(ids, self.codebook())

    def lookup_soft(self, weights_NK: Tensor) -> Tensor:
        """Codes mixed by `weights_NK` (rows sum to one), fp32 [N, C]; unit rows when `use_l2_norm`."""
        mixed_NC = weights_NK.float() @ self.embedding.weight.float()
        return F.normalize(mixed_NC, dim=-1) if self.use_l2_norm else mixed_NC

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        """Ids int64 [B, H, W] of the codes nearest to `z_BCHW`, without losses: the inference path."""
        z_NC = rearrange(z_BCHW.float(), "b c h w -> (b h w) c")
        z_NC = F.normalize(z_NC, dim=-1) if self.use_l2_norm else z_NC
        batch, _, height, width = z_BCHW.shape
        return nearest_code(z_NC, self.codebook()).view(batch, height, width)

    def forward(self, z_BCHW: Tensor) -> tuple[Tensor, VQOutput]:
        """Quantize `z_BCHW`; return the codes [B, C, H, W] (gradient straight through to z) and a `VQOutput`."""
        with torch.autocast(z_BCHW.device.type, enabled=False):
            raw_NC = rearrange(z_BCHW.float(), "b c h w -> (b h w) c")
            z_NC = F.normalize(raw_NC, dim=-1) if self.use_l2_norm else raw_NC
            codebook_KC = self.codebook()
            ids_N = nearest_code(z_NC.detach(), codebook_KC.detach())
            codes_NC = F.embedding(ids_N, codebook_KC)
            commitment_loss = self.commitment_cost * F.mse_loss(z_NC, codes_NC.detach())
            codebook_loss = F.mse_loss(codes_NC, z_NC.detach())
            quantized_NC = straight_through(z_NC, codes_NC)
            if self.clustering and self.training:
                self._revive_dead_codes(ids_N, raw_NC.detach(), z_NC.detach(), codebook_KC.detach())
        batch, _, height, width = z_BCHW.shape
        quantized_BCHW = rearrange(quantized_NC, "(b h w) c -> b c h w", b=batch, h=height)
        loss = commitment_loss + codebook_loss
        return quantized_BCHW, VQOutput(ids_N.view(batch, height, width), loss, commitment_loss, codebook_loss)

    @torch.no_grad()
    def _revive_dead_codes(self, ids_N: Tensor, raw_NC: Tensor, z_NC: Tensor, codebook_KC: Tensor) -> None:
        ids_N, raw_NC, z_NC = _gather(ids_N), _gather(raw_NC), _gather(z_NC)
        num_codes = codebook_KC.shape[0]
        usage_K = torch.bincount(ids_N, minlength=num_codes).float() / ids_N.numel()
        self.embed_prob.mul_(USAGE_DECAY).add_(usage_K, alpha=1 - USAGE_DECAY)
        nearest_K = nearest_code(codebook_KC, z_NC)
        pull_K = torch.exp(-self.embed_prob * num_codes * REVIVAL_SHARPNESS / (1 - USAGE_DECAY) - 1e-3)
        weight = self.embedding.weight
        weight.copy_(torch.lerp(weight.float(), raw_NC[nearest_K], pull_K[:, None]))


def _gather(x: Tensor) -> Tensor:
    """Concatenate `x` over all processes along dim 0; every process must hold the same number of rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
