"""Losses of SEED's second training stage: the codebook, and the decoder from codes to an image embedding.

Shape suffixes: B batch, E embedding channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..tokenizers.image.seed import SeedOutput

CODEBOOK_WEIGHT = 0.25  # beside 1 for the commitment: the official quantizer has VQGAN's "legacy" weights


def seed_loss(
    output: SeedOutput,
    target_BE: Tensor,
    quantizer_weight: float = 5.0,
    semantic_weight: float = 2.0,
    embedding_weight: float = 0.5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (0-d, with gradient) and its detached, weighted terms; `target_BE` are the teacher's embeddings.

    quantizer: mean((sg(q) - z)^2) + 0.25 mean((q - sg(z))^2). semantic: one minus the cosine of what is predicted of
    the Q-Former's output to it, mean over tokens. embedding: mean square error.
    """
    vq = output.vq
    cosine = F.cosine_similarity(output.semantic_BQD.float(), output.target_BQD.float(), dim=-1)
    terms = {
        "quantizer_loss": quantizer_weight * (vq.commitment_loss + CODEBOOK_WEIGHT * vq.codebook_loss),
        "semantic_loss": semantic_weight * (1 - cosine).mean(),
        "embedding_loss": embedding_weight * F.mse_loss(output.embedding_BE.float(), target_BE.float()),
    }
    total = sum(terms.values())
    return total, {name: term.detach() for name, term in terms.items()} | {"total_loss": total.detach()}
