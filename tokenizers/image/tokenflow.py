"""TokenFlow: one id for what a picture shows and for how it looks (Qu et al. 2024, arXiv 2412.03069).

Two encoders look at the picture: a CLIP-like tower, fine-tuned, and a convolutional one. One id a place chooses a pair
of codes, one for each (`nn/shared_mapping_vq.py`), over scales of growing side. Two decoders read the sum of the codes:
a small transformer, which gives back a frozen teacher's features and is needed in training alone, and a convolutional
one, which paints the picture. Any whole number of scales can be decoded.

The ids are what `generators/next_scale_llama.py` writes; the sum of the codes, `features`, is what a language model
reads to understand a picture.

Shape suffixes: B batch, 3/H/W image, G side of the last scale, P = G*G places, C code channels (semantic ones first),
D features, S tokens of all scales, L tokens of some, T features of the teacher.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...core.base import TokenizerOutput
from ...core.errors import InvalidInput
from ...core.image_tokenizer import ImageTokenizer, as_list
from ...core.images import crop_square, pad_square, read_image, to_pixels
from ...core.sizes import MAX_DEPTH, check_sizes
from ...core.tokens import MAX_SCALES
from ...nn.conv_blocks import NUM_GROUPS
from ...nn.layers import Conv2d, to_compute
from ...nn.shared_mapping_vq import SharedMappingQuantizer, resize_bicubic
from .tokenflow_cnn import PixelDecoder, PixelEncoder
from .tokenflow_towers import TOWERS, SemanticDecoder, TaskLayer, VisionTower

SIDES_224 = (1, 2, 4, 6, 8, 10, 12, 14)
SIDES_256 = (*SIDES_224, 16)
SIDES_384 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
SCALE_DROP = 0.1  # share of the training batches that leave out one scale


class TokenFlow(ImageTokenizer):
    """Defaults are those of the released TokenFlow-B with its enhanced decoder; see `released_configs`.

    Args:
        image_size: side of the pictures.
        sides: side of each scale, growing; the last is that of the code maps.
        codebook_size, semantic_code_width, pixel_code_width: pairs of codes, and channels of their two parts.
        tower, tower_*: the semantic encoder, see `VisionTower`. `tower_grid` is the side of its learned positions.
        semantic_*: of the semantic decoder, see `SemanticDecoder`.
        teacher_width: of the features that the semantic decoder gives back.
        channels, multipliers, res_blocks, z_channels: of the pixel encoder. decoder_channels, decoder_res_blocks: of
            the pixel decoder (the "enhanced" one is wider and deeper). The CNN reads and writes pictures of the side
            sides[-1] * 2 ** (levels - 1), to and from which others are resized.
        commitment_cost: weight of the commitment loss.
    """

    is_variable_length = True  # any whole number of scales decodes

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        sides: tuple[int, ...] = SIDES_256,
        codebook_size: int = 32768,
        semantic_code_width: int = 32,
        pixel_code_width: int = 8,
        tower: str = "clip",
        tower_width: int = 768,
        tower_depth: int = 12,
        tower_heads: int = 12,
        tower_hidden: int = 3072,
        tower_patch: int = 16,
        tower_grid: int = 14,
        semantic_width: int = 768,
        semantic_depth: int = 3,
        semantic_heads: int = 12,
        semantic_grid: int = 14,
        teacher_width: int = 512,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        z_channels: int = 256,
        decoder_channels: int = 256,
        decoder_res_blocks: int = 4,
        commitment_cost: float = 0.25,
    ):
        super().__init__()
        _check_sides(sides)
        _check_multipliers(multipliers)
        check_sizes(
            image_size=image_size, codebook_size=codebook_size, semantic_code_width=semantic_code_width,
            pixel_code_width=pixel_code_width, tower_width=tower_width, tower_heads=tower_heads,
            tower_hidden=tower_hidden, tower_patch=tower_patch, tower_grid=tower_grid, semantic_width=semantic_width,
            semantic_heads=semantic_heads, semantic_grid=semantic_grid, teacher_width=teacher_width, channels=channels,
            z_channels=z_channels, decoder_channels=decoder_channels,
        )  # fmt: skip
        check_sizes(
            MAX_DEPTH, tower_depth=tower_depth, semantic_depth=semantic_depth, res_blocks=res_blocks,
            decoder_res_blocks=decoder_res_blocks,
        )  # fmt: skip
        if tower not in TOWERS:
            raise InvalidInput(f"tower must be one of {', '.join(TOWERS)}, not {tower!r}")
        for name, width, heads in (
            ("tower", tower_width, tower_heads), ("semantic", semantic_width, semantic_heads)
        ):  # fmt: skip
            if width % heads:
                raise InvalidInput(f"{name}_width {width} is not divisible by {name}_heads={heads}")
        for name, width in (("channels", channels), ("decoder_channels", decoder_channels)):
            if width % NUM_GROUPS:
                raise InvalidInput(f"{name}={width} is no multiple of {NUM_GROUPS}")
        if image_size // tower_patch != sides[-1]:
            raise InvalidInput(
                f"the last scale is {sides[-1]} a side, but the tower sees {image_size // tower_patch} patches of "
                f"{tower_patch} pixels along {image_size}"
            )
        multipliers, code_width = tuple(multipliers), (semantic_code_width, pixel_code_width)
        self.encoder_vqkd = VisionTower(
            tower, tower_width, tower_depth, tower_heads, tower_hidden, tower_patch, tower_grid
        )
        self.encode_task_layer = TaskLayer(tower_width, semantic_code_width)
        self.encoder = PixelEncoder(channels, multipliers, res_blocks, z_channels)
        self.quant_conv = Conv2d(z_channels, pixel_code_width, 1)
        self.quantize = SharedMappingQuantizer(codebook_size, *code_width, sides, commitment_cost)
        self.decoder_vqkd = SemanticDecoder(
            semantic_code_width, semantic_width, semantic_depth, semantic_heads, semantic_grid
        )
        self.decode_task_layer = TaskLayer(semantic_width, teacher_width)
        self.post_quant_conv = Conv2d(pixel_code_width, z_channels, 1)
        self.decoder = PixelDecoder(decoder_channels, multipliers, decoder_res_blocks, z_channels)

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def scales(self) -> tuple[int, ...]:
        """Tokens of each scale, coarse to fine."""
        return tuple(side**2 for side in self.config.sides)

    @property
    def max_tokens(self) -> int:
        return sum(self.scales)

    @property
    def cnn_side(self) -> int:
        """Side of the pictures that the convolutional networks read and write."""
        return self.config.sides[-1] * 2 ** (len(self.config.multipliers) - 1)

    def fit(self, image: Image.Image) -> Image.Image:
        return crop_square(image, self.image_size)

    # The tensor level.

    def encode_map(self, pixels_B3HW: Tensor) -> Tensor:
        """What is quantized, [B, C, G, G], of pixels in [0, 1] of side `image_size`."""
        signed_B3HW = self.check_pixels(pixels_B3HW) * 2 - 1
        # CLIP's own mean and deviation are not applied: the released tower was fine-tuned without them.
        semantic_BPC = self.encode_task_layer(self.encoder_vqkd(signed_B3HW))
        semantic_BCGG = rearrange(semantic_BPC, "b (h w) c -> b c h w", h=self.config.sides[-1])
        pixel_BCGG = self.quant_conv(self.encoder(resize_bicubic(signed_B3HW, self.cnn_side)))
        return torch.cat([semantic_BCGG, pixel_BCGG], dim=1)

    def encode_pixels(self, pixels_B3HW: Tensor, num_tokens: int | None = None) -> Tensor:
        """Ids int64 [B, S], scale by scale and row by row, of pixels fp32 in [0, 1] of side `image_size`."""
        self.check_num_tokens(num_tokens)
        return self.quantize.encode(self.encode_map(pixels_B3HW))[0][:, :num_tokens]

    def encode_features(self, pixels_B3HW: Tensor) -> Tensor:
        """The sum of all codes as a sequence, fp32 [B, P, C]: what a language model reads."""
        return rearrange(self.quantize.encode(self.encode_map(pixels_B3HW))[1], "b c h w -> b (h w) c")

    def decode_ids(self, ids_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Pixels fp32 [B, 3, H, W], nominally in [0, 1] but not clamped, of ids int64 whose L ends with any scale.

        `lengths_B` gives each row's own length; what lies behind it is as if it were not there.
        """
        self.check_ids(ids_BL, lengths_B)
        return self.decode_map(self.quantize.sum_of(ids_BL, lengths_B)).float()

    def decode_map(self, sum_BCGG: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of sums of codes [B, C, G, G]."""
        pixel_BCGG = to_compute(sum_BCGG[:, self.config.semantic_code_width :], self.post_quant_conv.weight)
        signed_B3HW = self.decoder(self.post_quant_conv(pixel_BCGG))
        return (resize_bicubic(signed_B3HW, self.image_size) + 1) / 2

    def code_vectors(self, ids_BL: Tensor) -> Tensor:
        """The pairs of codes of int64 ids, fp32 [B, L, C], each part of unit length."""
        self.check_ids(ids_BL)
        return self.quantize.codes(ids_BL)

    def decode_embedding(self, ids_BL: Tensor) -> Tensor:
        """The teacher's features of the whole picture, as far as ids tell: the mean over all places, fp32 [B, T]."""
        self.check_ids(ids_BL)
        return self.decode_semantic(self.quantize.sum_of(ids_BL)).float().mean(dim=1)

    def decode_semantic(self, sum_BCGG: Tensor) -> Tensor:
        """The teacher's features [B, P, T], as far as sums of codes [B, C, G, G] tell."""
        return self.decode_task_layer(self.decoder_vqkd(sum_BCGG[:, : self.config.semantic_code_width]))

    def forward(self, pixels_B3HW: Tensor, generator: torch.Generator | None = None) -> TokenizerOutput:
        """Encode, quantize and decode `pixels_B3HW` (fp32, [0, 1]): the training pass.

        Some batches leave out a scale other than the first (the last may go, too), drawn from `generator`.
        """
        left_out = None
        num_scales = len(self.config.sides)
        if self.training and num_scales > 1 and float(torch.rand((), generator=generator)) < SCALE_DROP:
            left_out = int(torch.randint(1, num_scales, (), generator=generator))
        sum_BCGG, vq = self.quantize(self.encode_map(pixels_B3HW), left_out)
        return TokenizerOutput(
            self.decode_map(sum_BCGG), ids_BL=vq.ids_BL, vq=vq, semantic_BPT=self.decode_semantic(sum_BCGG)
        )

    def freeze_encoder(self) -> None:
        """Train the pixel decoder alone from now on, as the authors' second stage does: ids keep their meaning."""
        self.requires_grad_(False).eval()
        self.decoder.requires_grad_(True).train()

    # For understanding.

    @torch.inference_mode()
    def features(self, images, *, batch_size: int = 8) -> Tensor:
        """What a language model reads of one picture, or of each of a list: fp32 [P, C], or [B, P, C]; on the CPU.

        Nothing is cut away: pictures are padded to squares, with the mean colour, as LLaVA has it.

        Raises:
            InvalidInput: unreadable pictures.
        """
        sources, is_batch = as_list(images)
        features = []
        for start in range(0, len(sources), batch_size):
            squares = [pad_square(read_image(s), self.image_size) for s in sources[start : start + batch_size]]
            pixels_B3HW = torch.stack([to_pixels(square) for square in squares])
            features.append(self.encode_features(pixels_B3HW.to(self.device)).cpu())
        features_BPC = torch.cat(features)
        return features_BPC if is_batch else features_BPC[0]


def _check_sides(sides) -> None:
    if not isinstance(sides, (tuple, list)) or not 1 <= len(sides) <= MAX_SCALES:
        raise InvalidInput(f"sides must be 1 to {MAX_SCALES} growing numbers, not {sides!r}")
    check_sizes(4096, **{f"sides[{number}]": side for number, side in enumerate(sides)})
    if list(sides) != sorted(set(sides)):
        raise InvalidInput(f"sides must grow from scale to scale, not {tuple(sides)}")


def _check_multipliers(multipliers) -> None:
    if not isinstance(multipliers, (tuple, list)) or not 1 <= len(multipliers) <= 8:
        raise InvalidInput(f"multipliers must be 1 to 8 whole numbers, not {multipliers!r}")
    check_sizes(64, **{f"multipliers[{level}]": multiplier for level, multiplier in enumerate(multipliers)})


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released models, by our name (the paper's TokenFlow-B and TokenFlow-XL)."""
    siglip = {
        "image_size": 384, "sides": SIDES_384, "tower": "siglip", "tower_width": 1152, "tower_depth": 26,
        "tower_heads": 16, "tower_hidden": 4304, "tower_patch": 14, "tower_grid": 27, "semantic_width": 1152,
        "semantic_grid": 27, "teacher_width": 1152, "decoder_channels": 128, "decoder_res_blocks": 2,
    }  # fmt: skip
    return {"tokenflow-b": {}, "tokenflow-xl": siglip}
