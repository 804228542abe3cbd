"""Weights rounded as they will be stored, for the last steps of a run, so that the rest of the network makes up for it.

Gradients are those of the rounded weights and move the exact ones ("straight-through"; Bengio et al. 2013, arXiv
1308.3432, section 4), as in quantization-aware training (Jacob et al. 2018, arXiv 1712.05877, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..core.compact import is_large, rounded
from .export import fingerprinted, tokenizer_parts


@contextmanager
def rounded_weights(model: nn.Module, bits: int) -> Iterator[None]:
    """The weights that an export rounds to `bits`, rounded in place while the block runs."""
    kept = (*fingerprinted(model), *(f"{part}." for part in tokenizer_parts(model)))
    with torch.no_grad():
        pairs = [
            (parameter, parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if is_large(parameter) and not name.startswith(kept)
        ]
        for parameter, value in pairs:
            parameter.copy_(rounded(value, bits))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in pairs:
                parameter.copy_(value)
