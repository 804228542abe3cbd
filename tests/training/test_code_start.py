"""Tokens of a generator begin as the codes that they stand for."""

import mediatok as mt
import torch
import torch.nn.functional as F
from mediatok.nn.fsq import FSQ
from mediatok.training.code_start import projected_codes, start_from_codes


def test_distances_keep_their_proportions():
    codes = torch.randn(32, 6)
    tokens = projected_codes(codes, 24, 0.5)
    assert torch.allclose(tokens.square().mean().sqrt(), torch.tensor(0.5))
    ratio = torch.cdist(tokens, tokens) / torch.cdist(codes, codes).clamp_min(1e-9)
    apart = ~torch.eye(32, dtype=torch.bool)
    assert torch.allclose(ratio[apart], ratio[0, 1].expand(apart.sum()), rtol=1e-3)


def test_alike_codes_begin_with_alike_chances():
    quantize = FSQ((8, 5))
    model = mt.NextToken(
        width=32, depth=1, num_heads=2, hidden=32, vocab_size=40, num_tokens=4, num_classes=2, label_names=("a", "b")
    )
    start_from_codes(model, quantize)
    codes = quantize.lookup(torch.arange(40))
    logits = F.linear(torch.randn(256, 32), model.transformer.head.weight)
    like = torch.corrcoef(logits.T)
    near = torch.cdist(codes, codes) < 0.6
    assert like[near].mean() > like[~near].mean() + 0.5
    assert torch.allclose(model.transformer.embedding.weight.std(), torch.tensor(0.02), rtol=0.2)
