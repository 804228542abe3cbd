"""Codes of a tokenizer as a start for the tokens of a generator: what is alike as a code begins alike as a token.

Shape suffixes: V codes, C code channels, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..generators.next_scale_llama import NextScaleLlama
from ..generators.next_token import NextToken
from ..nn.fsq import FSQ
from ..nn.multiscale_vq import MultiScaleQuantizer

HEAD_SIZE = 0.6  # deviation of the first logits


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


@torch.no_grad()
def start_from_codes(model: nn.Module, quantize: nn.Module) -> None:
    """Let alike codes begin with alike chances, and alike where they are read: the rows of the head of a fresh
    `NextToken`, `NextScale` or `NextScaleLlama`, and of its embedding of codes, become the codes, turned at random.
    """
    transformer = model.transformer
    if isinstance(quantize, FSQ):
        codes_VC = quantize.lookup(torch.arange(quantize.vocab_size))
    elif isinstance(quantize, MultiScaleQuantizer):
        codes_VC = quantize.codebook
    else:
        codes_VC = quantize.codebook()
    if isinstance(model, NextScaleLlama):
        head_VW = transformer.lm_head.weight[transformer.codes]
    else:
        head_VW = transformer.head.weight
    head_VW.copy_(projected_codes(codes_VC, head_VW.shape[1], HEAD_SIZE * head_VW.shape[1] ** -0.5))
    if isinstance(model, NextToken):
        size = float(transformer.embedding.weight.std())
        transformer.embedding.weight.copy_(projected_codes(codes_VC, head_VW.shape[1], size))
