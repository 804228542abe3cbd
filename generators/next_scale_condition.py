"""What a next-scale generator is told to make: the first tokens of its sequence, made of a class, a picture or a text.

Shape suffixes: B items, R rows, F features of a prefix, T features of an item, D feature width, W width, P prefix
tokens (the class, then F features), 3/H/W image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import InvalidCheckpoint, InvalidInput, nearest_names
from ..core.images import fit_square, read_image, to_pixels
from ..core.sizes import MAX_DEPTH, check_sizes
from ..core.strict import shown
from ..kernels.precision import compute_dtype
from ..nn.layers import LayerNorm, Linear

IMAGE_SIDE = 224  # pixels, of what the image encoder looks at
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODER_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


class Features(NamedTuple):
    """Of each item, `counts_B` feature vectors (int64) in [B, F, D]; the others mean nothing. 0: there are none."""

    values_BFD: Tensor
    counts_B: Tensor


class Prefix(nn.Module):
    """The first tokens: a learned vector of the class, and projected features with learned places.

    num_features, feature_width: F, D; 0, 0 where classes are all. A learned vector stands where features are missing,
    so that all prefixes are of one length; that of class `num_classes`, "no class", and no feature is unconditional.
    """

    def __init__(self, num_classes: int, width: int, num_features: int, feature_width: int):
        super().__init__()
        self.class_emb = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.class_emb.weight, std=width**-0.5)
        self.num_features = num_features
        if num_features:
            self.proj, self.norm = Linear(feature_width, width), LayerNorm(width, eps=1e-6)
            self.feature_pos = nn.Parameter(torch.empty(num_features, width))
            self.no_feature = nn.Parameter(torch.empty(width))
            for embedding in (self.feature_pos, self.no_feature):
                nn.init.normal_(embedding, std=width**-0.5)

    @property
    def length(self) -> int:
        """P."""
        return 1 + self.num_features

    def forward(self, labels_R: Tensor, features: Features | None = None) -> Tensor:
        """[R, P, W] of class numbers and features; without any, no row has one."""
        dtype = compute_dtype(self.class_emb.weight.dtype, self.class_emb.weight.device)
        class_R1W = self.class_emb(labels_R)[:, None].to(dtype)
        if not self.num_features:
            return class_R1W
        features_RFW = self.no_feature.to(dtype).expand(len(labels_R), self.num_features, -1)
        if features is not None:
            is_there_RF = torch.arange(self.num_features, device=labels_R.device) < features.counts_B[:, None]
            projected_RFW = self.norm(self.proj(features.values_BFD.to(dtype)))
            features_RFW = torch.where(is_there_RF[..., None], projected_RFW, features_RFW)
        return torch.cat([class_R1W, features_RFW + self.feature_pos.to(dtype)], dim=1)


class ImageEncoder(nn.Module):
    """DINOv2 (Oquab et al. 2023) of transformers, which stays as it is: a picture to 257 features at 224 pixels.

    sizes: those of `ENCODER_SIZES`, as `Dinov2Config` names them; released models have image_size 518.
    """

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        self.network = Dinov2Model(Dinov2Config(**check_encoder(sizes))).requires_grad_(False)
        # On the CPU, also while loading builds models on the meta device: they come from no file.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN, device="cpu")[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD, device="cpu")[:, None, None], persistent=False)

    def load_released(self, folder: str | Path) -> None:
        """Take the weights of a released model: a local folder of "facebook/dinov2-large" or a smaller one.

        Raises:
            InvalidCheckpoint: they are not there, or not of these sizes.
        """
        from transformers import Dinov2Model

        try:
            released = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.network.load_state_dict(released.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidCheckpoint(f"{folder} does not fit this image encoder: {shown(str(error))}") from None

    @torch.no_grad()
    def forward(self, pixels_B3HW: Tensor) -> Features:
        """Features of pictures fp32 in [0, 1], [B, 3, 224, 224]: the class token's and those of all patches."""
        dtype = next(self.network.parameters()).dtype
        normal_B3HW = ((pixels_B3HW - self.mean) / self.std).to(dtype)
        values_BFD = self.network(normal_B3HW).last_hidden_state
        return Features(values_BFD, torch.full((len(values_BFD),), values_BFD.shape[1], device=values_BFD.device))


def check_encoder(sizes: dict[str, int]) -> dict[str, int]:
    """`sizes` of an image encoder, or InvalidInput when they are not those that one has."""
    if not isinstance(sizes, dict):
        raise InvalidInput(f"image_encoder must give {', '.join(ENCODER_SIZES)}, not {sizes!r}")
    for name in sizes:
        if name not in ENCODER_SIZES:
            raise InvalidInput(f"image_encoder has no size {name!r}.{nearest_names(str(name), ENCODER_SIZES)}")
    if missing := [name for name in ENCODER_SIZES if name not in sizes]:
        raise InvalidInput(f"image_encoder lacks {', '.join(missing)}")
    check_sizes(**{name: size for name, size in sizes.items() if name != "num_hidden_layers"})
    check_sizes(MAX_DEPTH, num_hidden_layers=sizes["num_hidden_layers"])
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise InvalidInput(f"image_encoder: hidden_size {width} is not divisible by {heads} heads")
    if sizes["patch_size"] > min(sizes["image_size"], IMAGE_SIDE):
        raise InvalidInput(f"image_encoder: patches of {sizes['patch_size']} pixels are larger than its pictures")
    return dict(sizes)


def features_of_encoder(sizes: dict[str, int]) -> tuple[int, int]:
    """How many features it makes of a picture, and their width."""
    return (IMAGE_SIDE // sizes["patch_size"]) ** 2 + 1, sizes["hidden_size"]


def read_pictures(images: Sequence) -> Tensor:
    """Pictures, as `read_image` takes them, as fp32 pixels [B, 3, 224, 224] in [0, 1]."""
    return torch.stack([to_pixels(fit_square(read_image(image), IMAGE_SIDE)) for image in images])


def text_features(texts: Sequence[Tensor], num_features: int, width: int) -> Features:
    """Embedded texts, float [T, D] each with T from 1 to `num_features`, as a batch.

    Raises:
        InvalidInput: another shape, or numbers that are not finite.
    """
    values_BFD = torch.zeros(len(texts), num_features, width)
    for row_FD, text_TD in zip(values_BFD, texts, strict=True):
        fits = isinstance(text_TD, Tensor) and text_TD.ndim == 2 and text_TD.is_floating_point()
        if not fits or not 1 <= len(text_TD) <= num_features or text_TD.shape[1] != width:
            given = f"{text_TD.dtype} {list(text_TD.shape)}" if isinstance(text_TD, Tensor) else type(text_TD).__name__
            raise InvalidInput(f"an embedded text must be float [1 to {num_features}, {width}], got {given}")
        row_FD[: len(text_TD)] = text_TD.float()
    if not bool(values_BFD.isfinite().all()):
        raise InvalidInput("embedded texts must be finite in fp32")
    return Features(values_BFD, torch.tensor([len(text_TD) for text_TD in texts]))
