"""Softmax attention: torch's fused kernel, and two plain products where those are faster.

torch's fused CPU kernel walks over blocks of keys. It saves memory, and with the few tokens of token sequences it takes
up to twice as long as writing the scores out, in bfloat16 always (`benchmarks/attention.py` times inference).

Shape suffixes: B batch, H heads, L queries, T keys, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_KEYS = 64  # up to here fp32 gains, whatever the batch
MAX_SCORE_BYTES = 32 * 2**20  # of bfloat16 scores that are written out; more belongs to the fused kernel


def attention(
    q_BHLD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v as [B, H, L, D], in the dtype of q.

    mask: bool, broadcast against [B, H, L, T]; True where a query may look. dropout: of the probabilities.
    """
    if not _products_are_faster(q_BHLD, k_BHTD):
        return F.scaled_dot_product_attention(q_BHLD, k_BHTD, v_BHTD, attn_mask=mask, dropout_p=dropout)
    scores_BHLT = (q_BHLD * q_BHLD.shape[-1] ** -0.5) @ k_BHTD.transpose(-1, -2)
    if mask is not None:
        scores_BHLT = scores_BHLT.masked_fill(~mask, float("-inf"))
    return F.dropout(scores_BHLT.softmax(dim=-1), dropout) @ v_BHTD


def _products_are_faster(q_BHLD: Tensor, k_BHTD: Tensor) -> bool:
    if q_BHLD.device.type != "cpu":
        return False
    batch, heads, queries, _ = q_BHLD.shape
    keys = k_BHTD.shape[2]
    if q_BHLD.dtype == torch.bfloat16:
        return batch * heads * queries * keys * q_BHLD.element_size() <= MAX_SCORE_BYTES
    return keys <= FEW_KEYS and not q_BHLD.requires_grad
