"""How well a tokenizer does on held-out pictures while it trains.

Shape suffixes: B batch, V validation pictures, 3/H/W image, L tokens, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .data import to_float

PREFIXES = (8, 4, 2)  # variable-length models are also measured at these fractions of their tokens
SMALLEST_ERROR = 1e-10


def reconstruct(model, vqgan, pixels_B3HW: Tensor, captions: list[str], num_tokens: int | None = None) -> Tensor:
    """Encode and decode pixels fp32 [B, 3, H, W]; stage-1 models decode through `vqgan`, the others ignore it."""
    pixels_B3HW = pixels_B3HW.to(model.device)
    text = (model.encode_text(captions[: len(pixels_B3HW)]),) if model.accepts_text else ()
    if model.is_continuous:
        return model.decode_latents(model.encode_latents(pixels_B3HW), *text)
    ids_BL = model.encode_pixels(pixels_B3HW)[:, :num_tokens]
    if vqgan is not None:
        return model.decode_proxy(ids_BL, vqgan)
    return model.decode_ids(ids_BL, None, *text)


def measure(model, vqgan, pixels_V3HW: Tensor, captions: list[str], batch_size: int) -> dict[str, float]:
    """PSNR in dB (mean over uint8 pictures), at several lengths where the model has them, and its use of codes."""
    lengths: list[int | None] = [None]
    if model.is_variable_length:
        lengths = [*dict.fromkeys(model.longest_within(model.max_tokens // part) for part in PREFIXES), None]
    values, ids = {}, []
    for length in lengths:
        psnrs = []
        for start in range(0, len(pixels_V3HW), batch_size):
            rows = slice(start, start + batch_size)
            real = to_float(pixels_V3HW[rows]).to(model.device)
            fake = reconstruct(model, vqgan, real, captions[rows], length).clamp(0, 1)
            error = (fake - real).square().mean(dim=(1, 2, 3)).clamp(min=SMALLEST_ERROR)
            psnrs.append(-10 * error.log10())
            if length is None and not model.is_continuous:
                ids.append(model.encode_pixels(real))
        values["val_psnr" if length is None else f"val_psnr_{length}_tokens"] = float(torch.cat(psnrs).mean())
    if ids:
        usage = code_usage(torch.cat(ids), model.vocab_size)
        values |= {f"val_{name}": value for name, value in usage.items()}
    return values


def code_usage(ids_BL: Tensor, codebook_size: int) -> dict[str, float]:
    """Fraction of the codes that occur, and the perplexity of their distribution (`codebook_size` when uniform)."""
    counts_K = torch.bincount(ids_BL.flatten(), minlength=codebook_size).double()
    probabilities_K = counts_K / counts_K.sum()
    entropy = -(probabilities_K * probabilities_K.clamp(min=1e-12).log()).sum()
    return {
        "codebook_usage": float((counts_K > 0).double().mean()),
        "codebook_perplexity": float(entropy.exp()),
    }
