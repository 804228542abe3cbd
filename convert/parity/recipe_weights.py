"""Weights that a case does not store, but draws by a recipe from the parameters' names and shapes."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

EMBEDDINGS = ("class_emb.weight", "encoder_pos_embed_learned", "decoder_pos_embed_learned")


def recipe_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The parameter `name` (official) of `shape`, fp32."""
    rng = np.random.Generator(np.random.PCG64((seed << 32) + zlib.crc32(name.encode())))
    draw = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    if len(shape) == 1:
        return 1 + 0.2 * draw if name.endswith("weight") else 0.1 * draw
    if name in EMBEDDINGS:
        return 0.5 * draw
    return draw / math.sqrt(math.prod(shape[1:]))
