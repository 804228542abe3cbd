"""Softmax attention: torch's fused kernel, and two plain products where those are faster.

torch's fused CPU kernel walks over blocks of keys. It saves memory, and with the few tokens of token sequences it takes
up to twice as long as writing the scores out, in bfloat16 always (`benchmarks/attention.py` times inference).

Shape suffixes: B batch, H heads, N = B*H, L queries, I one query, T keys, D head width.
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

    mask: broadcast against [B, H, L, T]: bool, True where a query may look; or what is added to the scores, in the
    dtype of q. dropout: of the probabilities.
    """
    if not _products_are_faster(q_BHLD, k_BHTD):
        return F.scaled_dot_product_attention(q_BHLD, k_BHTD, v_BHTD, attn_mask=mask, dropout_p=dropout)
    scores_BHLT = (q_BHLD * q_BHLD.shape[-1] ** -0.5) @ k_BHTD.transpose(-1, -2)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores_BHLT = scores_BHLT.masked_fill(~mask, float("-inf")) if is_bool else scores_BHLT + mask
    return F.dropout(scores_BHLT.softmax(dim=-1), dropout) @ v_BHTD


def attention_of_one(q_BHID: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """`attention` of a single query, as tokens that are written one after the other have it: [B, H, 1, D].

    It takes as long as reading keys and values does. A CPU reads them at full speed where they are the rows of a matrix
    that is multiplied by a vector: keys as they are, values when all that a channel holds lies side by side
    (`KeyValueCache` with `values_by_channel`).
    """
    if q_BHID.device.type != "cpu":
        return attention(q_BHID, k_BHTD, v_BHTD)
    heads = q_BHID.shape[:2]
    # Batches are views here: `@` would copy keys and values. A vector is the one row of a matrix, turned: what has one
    # column by its shape is multiplied more slowly.
    q_NID, k_NTD, v_NDT = q_BHID.flatten(0, 1), k_BHTD.flatten(0, 1), v_BHTD.flatten(0, 1).mT
    scores_NIT = torch.bmm(k_NTD, (q_NID * q_NID.shape[-1] ** -0.5).mT).mT
    shares_NIT = scores_NIT.float().softmax(dim=-1).to(v_NDT.dtype)
    return torch.bmm(v_NDT, shares_NIT.contiguous().mT).mT.unflatten(0, heads)


def _products_are_faster(q_BHLD: Tensor, k_BHTD: Tensor) -> bool:
    if q_BHLD.device.type != "cpu":
        return False
    batch, heads, queries, _ = q_BHLD.shape
    keys = k_BHTD.shape[2]
    if q_BHLD.dtype == torch.bfloat16:
        return batch * heads * queries * keys * q_BHLD.element_size() <= MAX_SCORE_BYTES
    return keys <= FEW_KEYS and not q_BHLD.requires_grad
