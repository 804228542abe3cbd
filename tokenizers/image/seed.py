"""SEED-2: a picture as 32 words that a language model reads and writes (Ge et al. 2023, arXiv 2310.01218).

A frozen vision tower sees the picture. Queries of a Q-Former look at it one after the other (causally), so that the 32
ids have an order like that of a sentence; each is the nearest of 8,192 codes. The ids carry what the picture shows, not
its pixels: decoding gives one image embedding of CLIP, and an image decoder draws *a* picture that has it. That is
Stable unCLIP for the released model; small models have one of their own (`drawing_sizes`). Encoding needs neither.

The head that makes the embedding is a small MLP in the released model, and a second Q-Former, with a single query, in
what the authors' training makes (`head`).

Shape suffixes: B batch, 3/H/W image, T positions of the vision tower, F its width, Q queries (tokens), D width of the
Q-Former, C code channels, E embedding channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ...core.base import OnStep
from ...core.errors import InvalidInput
from ...core.image_tokenizer import ImageTokenizer
from ...core.sizes import MAX_DEPTH, check_sizes
from ...core.tokens import Tokens
from ...nn.layers import Linear, to_compute
from ...nn.modes import in_evaluation_mode
from ...nn.transformer import ResidualAttentionBlock
from ...nn.vq import VectorQuantizer, VQOutput
from .blip2_vision import VisionTower
from .drawing import Drawing, EmbeddingDecoder, checked_drawing
from .seed_qformer import QFormer
from .stable_unclip import RELEASED_DECODER, StableUnCLIP

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
DECODER_EPS = 1e-6
HEADS = ("mlp", "qformer")


@dataclass
class SeedOutput:
    """Result of the training pass of the codebook and the decoder (stage 2).

    embedding_BE: predicted image embedding. semantic_BQD: the Q-Former's output `target_BQD`, predicted from the codes.
    """

    embedding_BE: Tensor
    semantic_BQD: Tensor
    target_BQD: Tensor
    ids_BQ: Tensor
    vq: VQOutput


class MLPHead(nn.Module):
    """All codes' vectors made narrow, side by side, to one embedding: the released head."""

    def __init__(self, width: int, num_queries: int, widths: tuple[int, int, int], embedding_size: int):
        super().__init__()
        first, second, last = widths
        self.down = nn.Sequential(
            Linear(width, first, bias=False), nn.ReLU(),
            Linear(first, second, bias=False), nn.ReLU(),
            Linear(second, last, bias=False),
        )  # fmt: skip
        self.proj = Linear(num_queries * last, embedding_size)

    def forward(self, x_BQD: Tensor) -> Tensor:
        return self.proj(self.down(x_BQD).flatten(1))


class QFormerHead(nn.Module):
    """A Q-Former's single query looks at all codes' vectors: the head of the authors' training code."""

    def __init__(self, qformer: QFormer, width: int, embedding_size: int):
        super().__init__()
        self.query, self.qformer = nn.Parameter(torch.empty(1, width)), qformer
        self.proj = Linear(width, embedding_size)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, x_BQD: Tensor) -> Tensor:
        return self.proj(self.qformer(self.query, x_BQD)[:, 0])


class VectorDecoder(nn.Module):
    """Places and pre-norm blocks over all codes' vectors; every one sees all."""

    def __init__(self, width: int, num_queries: int, depth: int, num_heads: int):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(num_queries, width))
        self.blocks = nn.ModuleList(ResidualAttentionBlock(width, num_heads, DECODER_EPS) for _ in range(depth))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x_BQD: Tensor) -> Tensor:
        x_BQD = x_BQD + self.positions.to(x_BQD.dtype)
        for block in self.blocks:
            x_BQD = block(x_BQD)
        return x_BQD


class Seed(ImageTokenizer):
    """SEED-2. Defaults are the released model's.

    Args:
        image_size, patch_size: of what the vision tower sees, in pixels.
        vision_*: sizes of the vision tower.
        num_queries: Q, tokens of a picture. causal: query i sees queries 0 to i.
        qformer_*, cross_every: sizes of the Q-Former; of its layers every `cross_every`-th looks at the picture.
        codebook_size, token_size: codes and their channels.
        decoder_depth, decoder_heads: blocks behind the codes.
        head: "mlp" or "qformer", see the module's docstring; `head_widths` are the MLP's.
        embedding_size: E.
        clustering: re-seed rarely used codes in training, which small data sets need (the authors do not).
        drawing_sizes: arguments of an `EmbeddingDecoder`, of models that draw for themselves.
    """

    fingerprint_weights = ("quantize.embedding", "queries")
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize", "to_code"]
    keeps_pixels = False
    decoding_option_names = ("steps", "guidance", "seed")
    interpolation = "bilinear"  # of `encode`; the authors' offline processing has "bicubic"
    image_decoder: Any = RELEASED_DECODER  # hub id or folder of Stable unCLIP, or an object with its `draw`

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        vision_width: int = 1408,
        vision_depth: int = 39,
        vision_heads: int = 16,
        vision_hidden: int = 6144,
        num_queries: int = 32,
        causal: bool = True,
        qformer_width: int = 768,
        qformer_depth: int = 12,
        qformer_heads: int = 12,
        qformer_hidden: int = 3072,
        cross_every: int = 2,
        codebook_size: int = 8192,
        token_size: int = 32,
        decoder_depth: int = 4,
        decoder_heads: int = 12,
        head: str = "mlp",
        head_widths: tuple[int, int, int] = (256, 128, 32),
        embedding_size: int = 1024,
        clustering: bool = False,
        drawing_sizes: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_sizes(num_queries=num_queries, codebook_size=codebook_size, token_size=token_size)
        check_sizes(embedding_size=embedding_size, decoder_heads=decoder_heads, qformer_width=qformer_width)
        check_sizes(MAX_DEPTH, decoder_depth=decoder_depth)
        if head not in HEADS:
            raise InvalidInput(f"head must be one of {', '.join(HEADS)}, not {head!r}")
        if qformer_width % decoder_heads:
            raise InvalidInput(f"qformer_width {qformer_width} is not divisible by {decoder_heads} decoder_heads")
        if not isinstance(head_widths, (tuple, list)) or len(head_widths) != 3:
            raise InvalidInput(f"head_widths must be three numbers, not {head_widths!r}")
        check_sizes(**{f"head_widths[{number}]": width for number, width in enumerate(head_widths)})
        sizes = (qformer_width, qformer_depth, qformer_heads, qformer_hidden)
        self.vision = VisionTower(image_size, patch_size, vision_width, vision_depth, vision_heads, vision_hidden)
        self.queries = nn.Parameter(torch.empty(num_queries, qformer_width))
        nn.init.normal_(self.queries, std=0.02)
        self.qformer = QFormer(*sizes, feature_width=vision_width, cross_every=cross_every, causal=causal)
        self.to_code = nn.Sequential(Linear(qformer_width, qformer_width), nn.Tanh(), Linear(qformer_width, token_size))
        self.quantize = VectorQuantizer(codebook_size, token_size, commitment_cost=1.0, clustering=clustering)
        self.from_code = nn.Sequential(Linear(token_size, token_size), nn.Tanh(), Linear(token_size, qformer_width))
        decoder = (qformer_width, num_queries, decoder_depth, decoder_heads)
        self.semantic_decoder, self.image_blocks = VectorDecoder(*decoder), VectorDecoder(*decoder)
        if head == "mlp":
            self.to_embedding = MLPHead(qformer_width, num_queries, tuple(head_widths), embedding_size)
        else:
            reverse = QFormer(*sizes, feature_width=qformer_width, cross_every=cross_every)
            self.to_embedding = QFormerHead(reverse, qformer_width, embedding_size)
        self.drawing = None
        if drawing_sizes is not None:
            self.drawing = EmbeddingDecoder.from_sizes(embedding_size, drawing_sizes)
        # On the CPU, also while loading builds models on the meta device: they come from no file.
        self.register_buffer("mean", torch.tensor(CLIP_MEAN, device="cpu")[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD, device="cpu")[:, None, None], persistent=False)

    @property
    def shows_steps(self) -> bool:
        """The small image decoder does; to look into Stable unCLIP's latents takes as long as a step."""
        return self.drawing is not None

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def max_tokens(self) -> int:
        return self.config.num_queries

    # The tensor level.

    def normalized(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [0, 1] as the vision tower wants them: CLIP's mean and deviation."""
        return (pixels_B3HW - self.mean) / self.std

    def query_features(self, normal_B3HW: Tensor) -> Tensor:
        """What the Q-Former finds in `normalized` pictures: [B, Q, D], before any code."""
        return self.qformer(self.queries, self.vision(normal_B3HW)[1])

    def encode_pixels(self, pixels_B3HW: Tensor, num_tokens: int | None = None) -> Tensor:
        """Ids int64 [B, Q] of `pixels_B3HW` (fp32, [0, 1], side `image_size`)."""
        self.check_num_tokens(num_tokens)
        return self.ids_of_normalized(self.normalized(self.check_pixels(pixels_B3HW)))

    def ids_of_normalized(self, normal_B3HW: Tensor) -> Tensor:
        """`encode_pixels` of `normalized` pictures."""
        return self.quantize.nearest(as_map(self.to_code(self.query_features(normal_B3HW).float())))[:, 0]

    def decode_embedding(self, ids_BQ: Tensor) -> Tensor:
        """Image embeddings fp32 [B, E] of int64 ids: projected, not normalised, as CLIP's `image_embeds`."""
        self.check_ids(ids_BQ)
        return self.embedding_of_codes(self.quantize.lookup(ids_BQ)).float()

    def embedding_of_codes(self, codes_BQC: Tensor) -> Tensor:
        """Image embeddings [B, E] of codes, with gradient."""
        return self.to_embedding(self.image_blocks(self.from_code(to_compute(codes_BQC, self.image_blocks.positions))))

    @in_evaluation_mode
    def decode_ids(
        self,
        ids_BQ: Tensor,
        lengths_B: Tensor | None = None,
        drawing: Drawing | None = None,
        negative_ids: Tensor | None = None,
        on_step: OnStep | None = None,
        previews: bool = False,
    ) -> Tensor:
        """Pixels fp32 [B, 3, S, S] in [0, 1] that the image decoder draws, of its own side S.

        drawing: how, see `decoding_arguments`. negative_ids: int64 [1, Q] or [B, Q], of what pictures shall not be
        like: their embedding stands in the place of none in the guidance. previews: see `EmbeddingDecoder.draw`.
        """
        self.check_ids(ids_BQ, lengths_B)
        negative_BE = None
        if negative_ids is not None:
            negative_BE = self.decode_embedding(negative_ids.to(ids_BQ.device))
            if len(negative_BE) not in (1, len(ids_BQ)):
                raise InvalidInput(f"{len(negative_BE)} rows of negative_ids for {len(ids_BQ)} pictures")
            negative_BE = negative_BE.expand(len(ids_BQ), -1)
        decoder = self.picture_decoder()
        drawing = checked_drawing(decoder) if drawing is None else drawing
        shown = {"previews": True} if previews and self.shows_steps else {}
        return decoder.draw(self.decode_embedding(ids_BQ), drawing, negative_BE, on_step, **shown)

    def picture_decoder(self) -> Any:
        """What draws pictures of embeddings: the model's own small one, or Stable unCLIP, loaded on first use.

        Raises:
            ModelNotFound: Stable unCLIP is not here; the message tells which path to set.
            InvalidInput: it draws embeddings of another size.
        """
        if self.drawing is not None:
            return self.drawing
        decoder = self.image_decoder
        if not hasattr(decoder, "draw"):
            decoder = self.image_decoder = StableUnCLIP.load(decoder, self.dtype)
        if decoder.embedding_size != self.config.embedding_size:
            raise InvalidInput(
                f"{self.name} makes embeddings of {self.config.embedding_size} channels, and its image_decoder draws "
                f"those of {decoder.embedding_size}"
            )
        return decoder.to(self.device)

    # Training (stage 2).

    def forward(self, pixels_B3HW: Tensor) -> SeedOutput:
        """Codes of pictures (fp32, [0, 1]) and what is predicted from them; tower and Q-Former get no gradient."""
        return self.training_pass(self.normalized(pixels_B3HW))

    def training_pass(self, normal_B3HW: Tensor) -> SeedOutput:
        """`forward` of `normalized` pictures."""
        with torch.no_grad():
            target_BQD = self.frozen_features(normal_B3HW)
        z_BC1Q, vq = self.quantize(as_map(self.to_code(target_BQD)))
        vectors_BQD = self.from_code(rearrange(z_BC1Q, "b c 1 q -> b q c"))
        embedding_BE = self.to_embedding(self.image_blocks(vectors_BQD))
        return SeedOutput(embedding_BE, self.semantic_decoder(vectors_BQD), target_BQD, vq.ids_BHW[:, 0], vq)

    @in_evaluation_mode
    def frozen_features(self, normal_B3HW: Tensor) -> Tensor:
        """`query_features` without dropout."""
        return self.query_features(normal_B3HW)

    def freeze_encoder(self) -> None:
        """Train codebook and decoder alone from now on: the tower, the Q-Former and its queries keep their values."""
        for frozen in (self.vision, self.qformer):
            frozen.requires_grad_(False).eval()
        self.queries.requires_grad_(False)
        if self.drawing is not None:
            self.drawing.requires_grad_(False).eval()

    # Pictures.

    def encode(self, images, *, tile: bool = False, **options) -> Tokens:
        """Turn one picture or a list of them into `Tokens`; `options` are those of `ImageTokenizer.encode`."""
        if tile:
            raise InvalidInput(f"the tokens of {self.name} tell what a whole picture shows; encode it without tile")
        return super().encode(images, **options)

    def decoding_arguments(
        self, steps: int | None = None, guidance: float | None = None, seed: int = 0
    ) -> dict[str, Drawing]:
        """How `decode` draws; None takes the image decoder's own.

        seed: of the noise that drawing starts with, the same for each picture: its tokens alone make a difference.

        Raises:
            InvalidInput: a value out of its range.
            ModelNotFound: Stable unCLIP is not here; set `image_decoder` to its folder.
        """
        return {"drawing": checked_drawing(self.picture_decoder(), steps, guidance, seed)}

    def fit(self, image: Image.Image) -> Image.Image:
        """A picture of any size, stretched to a square as the authors do, with `self.interpolation`."""
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise InvalidInput(f"interpolation must be one of {known}, not {self.interpolation!r}")
        side = (self.image_size, self.image_size)
        return image if image.size == side else image.resize(side, INTERPOLATIONS[self.interpolation])


def as_map(z_BQC: Tensor) -> Tensor:
    """Vectors [B, Q, C] as the quantizer wants them, [B, C, 1, Q]."""
    return rearrange(z_BQC, "b q c -> b c 1 q")


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released model, by our name."""
    return {"seed-2": {}}
