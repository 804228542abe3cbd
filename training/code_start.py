"""Codes of a tokenizer as a start for the tokens of a generator: what is alike as a code begins alike as a token.

Shape suffixes: V codes, C code channels, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projected_codes(codes_VC: Tensor, width: int, size: float) -> Tensor:
    """Codes about their mean, turned at random into `width` channels of deviation `size`: fp32 [V, W].

    Distances keep their proportions where `width` is not below C.
    """
    codes_VC = codes_VC.detach().float().cpu()
    codes_VC = codes_VC - codes_VC.mean(dim=0)
    side = max(codes_VC.shape[1], width)
    rotation = torch.linalg.qr(torch.randn(side, side))[0][: codes_VC.shape[1], :width]
    tokens_VW = codes_VC @ rotation
    return tokens_VW * (size / tokens_VW.square().mean().sqrt().clamp_min(1e-12))
