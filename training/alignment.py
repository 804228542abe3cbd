"""When tokens are said, by a recogniser's head for CTC.

Shape suffixes: B batch, L frames, K tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torchaudio.functional as AF
from torch import Tensor

from ..generators.paraformer_text import BLANK


def token_ends(
    log_probs_BLV: Tensor, lengths_B: Tensor, ids_BK: Tensor, counts_B: Tensor, ends_with_eos: bool
) -> tuple[Tensor, Tensor]:
    """bool [B, L], True where each token is to be complete, and [B], how sure CTC is of them: its mean probability.

    That is where the likeliest way of CTC through the text begins each token; </s> is complete in the last frame. A
    clip that is too short for this has no True, and 0.
    """
    ends_BL = torch.zeros(log_probs_BLV.shape[:2], dtype=torch.bool, device=log_probs_BLV.device)
    sure_B = log_probs_BLV.new_zeros(len(ends_BL))
    for row, (length, count) in enumerate(zip(lengths_B.tolist(), counts_B.tolist(), strict=True)):
        ids_K, room = ids_BK[row, :count], length - int(ends_with_eos)
        if not count or room < count + int((ids_K[1:] == ids_K[:-1]).sum()):
            continue
        path_1L, scores_1L = AF.forced_align(log_probs_BLV[row : row + 1, :room], ids_K[None], blank=BLANK)
        begins_L = path_1L[0] != BLANK
        begins_L[1:] &= path_1L[0, 1:] != path_1L[0, :-1]
        ends_BL[row, :room] = begins_L
        ends_BL[row, room:length] = True
        sure_B[row] = scores_1L[0, begins_L].exp().mean()
    return ends_BL, sure_B
