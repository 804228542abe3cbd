"""MaskGIT's sampling written the plain way: what the fast path is measured against.

The two branches one after the other, every position through the head, noise for every code at every position, and mask
counts read back from the ids. The network is that of `mediatok`.
"""

from __future__ import annotations

import math

import torch
from mediatok.generators.maskgit import MaskGIT, MaskGITSettings
from torch import Tensor


def gumbel(uniform: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def generate(model: MaskGIT, labels_B: Tensor, settings: MaskGITSettings, uniform=torch.rand) -> Tensor:
    """Ids [B, N]. `uniform(*shape)` gives the numbers in (0, 1): [B, N, C] and [B, N] for each step."""
    batch, num_tokens, num_codes = len(labels_B), model.config.num_tokens, model.config.codebook_size
    ids_BN = torch.full((batch, num_tokens), model.mask_id)
    no_class = torch.full_like(labels_B, model.config.num_classes)
    for step in range(settings.steps):
        is_masked_BN = ids_BN == model.mask_id
        logits_BNC = model.logits(ids_BN, labels_B).float()
        weight, heat = settings.guidance_weight(step), settings.noise_temperature(step)
        if weight or settings.guidance_decay == "power-cosine":
            logits_BNC = logits_BNC + weight * (logits_BNC - model.logits(ids_BN, no_class).float())
        logits_BNC = logits_BNC / settings.logit_divisor(step)
        drawn_BN = (logits_BNC + heat * gumbel(uniform(batch, num_tokens, num_codes))).argmax(dim=-1)
        sure_BN = logits_BNC.gather(2, drawn_BN[:, :, None])[:, :, 0]
        drawn_BN = torch.where(is_masked_BN, drawn_BN, ids_BN)
        sure_BN = torch.where(is_masked_BN, sure_BN, math.inf) + heat * gumbel(uniform(batch, num_tokens))
        ratio = math.acos((step + 1) / settings.steps) / (math.pi / 2)
        count = max(1, min(int(is_masked_BN[0].sum()) - 1, math.floor(num_tokens * ratio)))
        threshold_B1 = sure_BN.sort(dim=1).values[:, count - 1 : count]
        is_last = step + 1 == settings.steps
        ids_BN = drawn_BN if is_last else torch.where(sure_BN <= threshold_B1, model.mask_id, drawn_BN)
    return ids_BN
