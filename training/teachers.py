"""Frozen networks whose features a tokenizer learns to give back (TokenFlow's distillation; section 4 of its
specification).

Shape suffixes: B batch, 3/H/W image, P places of the code map in raster order, T features.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..convert.vision_towers import load_tower
from ..core.errors import InvalidCheckpoint, InvalidRecipe, nearest_names
from ..nn.efficientnet_lite import EfficientNetLite0
from ..tokenizers.image.tokenflow_towers import VisionTower
from .perceptual import DEFAULT_EFFICIENTNET

TEACHERS = ("clip", "siglip", "efficientnet_lite0")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EFFICIENTNET_STAGES, EFFICIENTNET_STRIDE = 5, 16  # the last stage that is read, and how much smaller its map is


class ClipTeacher(nn.Module):
    """CLIP's patch features in the space that it shares with texts, of pictures normalised as it was trained.

    The tower that is taught sees its pictures without that; so the two differ from the start.
    """

    def __init__(self, tower: VisionTower, projection_TD: Tensor):
        super().__init__()
        self.tower = tower
        self.register_buffer("projection_TD", projection_TD.float())
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None])

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return self.tower((pixels_B3HW - self.mean) / self.std) @ self.projection_TD.T


class SiglipTeacher(nn.Module):
    """SigLIP's patch features before its last block."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return self.tower(pixels_B3HW * 2 - 1)


class ConvolutionalTeacher(nn.Module):
    """EfficientNet-Lite0's features at the places of a code map: pictures are enlarged so that the two maps agree.

    Trained on ImageNet's classes, and small enough to be here always.
    """

    def __init__(self, network: EfficientNetLite0, grid: int):
        super().__init__()
        self.network, self.grid = network, grid

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        side = self.grid * EFFICIENTNET_STRIDE
        enlarged = F.interpolate(pixels_B3HW, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        features_BTGG = self.network.stage_outputs(enlarged, EFFICIENTNET_STAGES)[-1]
        return rearrange(features_BTGG, "b t h w -> b (h w) t")


def build_teacher(name: str, weights: Path | None, grid: int) -> nn.Module:
    """The frozen teacher called `name`; it gives features [B, P, T] of pixels fp32 [B, 3, H, W] in [0, 1].

    weights: the folder of CLIP or SigLIP, or EfficientNet-Lite0's file. grid: side of the code map.

    Raises:
        InvalidRecipe: an unknown name. ModelNotFound: weights that are not there; the message says where they are.
    """
    if name == "efficientnet_lite0":
        network = EfficientNetLite0.from_file(DEFAULT_EFFICIENTNET if weights is None else weights)
        teacher: nn.Module = ConvolutionalTeacher(network, grid)
    elif name in TEACHERS:
        tower, projection_TD = load_tower(name, weights)
        if name == "clip" and projection_TD is None:
            raise InvalidCheckpoint(f"{weights} lacks CLIP's visual_projection.weight; take the whole model")
        teacher = SiglipTeacher(tower) if name == "siglip" else ClipTeacher(tower, projection_TD)
    else:
        raise InvalidRecipe(f"unknown teacher {name!r}.{nearest_names(name, TEACHERS)} Known: {', '.join(TEACHERS)}.")
    return teacher.requires_grad_(False).eval()


def semantic_loss(features_BPT: Tensor, target_BPT: Tensor) -> Tensor:
    """One less the cosine between features and the teacher's, the mean over all places: 0-d."""
    return (1 - F.cosine_similarity(features_BPT.float(), target_BPT.float(), dim=-1)).mean()
