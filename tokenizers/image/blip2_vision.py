"""EVA-CLIP's ViT-g/14 less its last block (Fang et al. 2023, arXiv 2211.07636), as BLIP-2 and SEED look at pictures.

The network is transformers' `Blip2VisionModel`. Its norm behind the last block is SEED's `ln_vision`.

Shape suffixes: B batch, 3/H/W image, T positions (the class token, then patches in raster order), F width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import InvalidInput
from ...core.sizes import MAX_DEPTH, check_sizes
from ...kernels.attention import attention
from ...nn.layers import Conv2d, LayerNorm, Linear, to_compute

OURS = {nn.Linear: Linear, nn.LayerNorm: LayerNorm, nn.Conv2d: Conv2d}
FINAL_EPS = 1e-5
ATTENTION = "mediatok"  # transformers' name for ours


class VisionTower(nn.Module):
    """Pictures to features of all positions.

    Args:
        image_size, patch_size: in pixels. width, depth, num_heads, hidden: of the blocks.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, num_heads: int, hidden: int):
        super().__init__()
        check_sizes(image_size=image_size, patch_size=patch_size, width=width, num_heads=num_heads, hidden=hidden)
        check_sizes(MAX_DEPTH, depth=depth)
        if width % num_heads:
            raise InvalidInput(f"the vision tower's width {width} is not divisible by {num_heads} heads")
        if image_size % patch_size:
            raise InvalidInput(f"image_size {image_size} is not a multiple of the patch size {patch_size}")
        from transformers import AttentionInterface, Blip2VisionConfig, Blip2VisionModel

        AttentionInterface.register(ATTENTION, _attention)
        config = Blip2VisionConfig(
            hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=num_heads,
            image_size=image_size, patch_size=patch_size, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True,
            attn_implementation=ATTENTION,
        )  # fmt: skip
        self.network = Blip2VisionModel(config)
        self.network.post_layernorm.eps = FINAL_EPS
        for module in self.network.modules():  # the same layers, for weights that are stored in bfloat16
            module.__class__ = OURS.get(type(module), type(module))

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures normalised as CLIP's: what the last block gives, and the same behind the norm; [B, T, F]."""
        network = self.network
        embeddings = network.embeddings
        patches_BFHW = embeddings.patch_embedding(to_compute(pixels_B3HW, embeddings.class_embedding))
        class_B1F = embeddings.class_embedding.expand(len(pixels_B3HW), -1, -1)
        x_BTF = torch.cat([class_B1F.to(patches_BFHW.dtype), patches_BFHW.flatten(2).transpose(1, 2)], dim=1)
        x_BTF = x_BTF + embeddings.position_embedding.to(x_BTF.dtype)
        for layer in network.encoder.layers:
            x_BTF = layer(x_BTF)
        return x_BTF, network.post_layernorm(x_BTF.float()).to(x_BTF.dtype)


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args, dropout: float = 0.0, **options) -> tuple:
    """Our kernel as transformers calls one: [B, H, T, D] to [B, T, H, D], and no probabilities."""
    return attention(q, k, v, None, dropout).transpose(1, 2), None
