"""SEED's first training stage: the last query of a picture and its caption are pulled together (contrastive loss).

Captions go through the Q-Former's own self-attention, in both directions and without a picture, each layer with a
feed-forward network for text (BLIP-2, arXiv 2301.12597, section 3.2; of its three losses SEED keeps this one).

Shape suffixes: B batch of this process, N batch of all processes, L tokens of a caption, D width, E feature channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.sizes import check_sizes
from .seed import Seed
from .seed_qformer import FeedForward, init_bert

LABEL_SMOOTHING = 0.1
TEMPERATURE = 0.07


class CaptionReader(nn.Module):
    """What a Q-Former lacks to read captions: tables of words and places, and feed-forward networks."""

    def __init__(self, width: int, hidden: int, depth: int, vocab_size: int, max_positions: int, dropout: float):
        super().__init__()
        self.words, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(max_positions, width)
        self.mlps = nn.ModuleList(FeedForward(width, hidden, dropout) for _ in range(depth))
        self.apply(init_bert)


class SeedContrast(nn.Module):
    """A `Seed` that learns what pictures show; its codebook and decoder play no part.

    Args:
        seed: its vision tower gets a gradient only where its parameters ask for one.
        vocab_size, max_positions: of captions. feature_size: E.
    """

    def __init__(self, seed: Seed, vocab_size: int, max_positions: int = 512, feature_size: int = 256):
        super().__init__()
        check_sizes(vocab_size=vocab_size, max_positions=max_positions, feature_size=feature_size)
        config, dropout = seed.config, seed.qformer.dropout.p
        self.seed = seed
        sizes = (config.qformer_width, config.qformer_hidden, config.qformer_depth)
        self.text = CaptionReader(*sizes, vocab_size, max_positions, dropout)
        self.vision_proj = nn.Linear(config.qformer_width, feature_size)
        self.text_proj = nn.Linear(config.qformer_width, feature_size)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        codes = (seed.to_code, seed.quantize, seed.from_code)
        for unused in (*codes, seed.semantic_decoder, seed.image_blocks, seed.to_embedding):
            unused.requires_grad_(False)

    def image_features(self, normal_B3HW: Tensor) -> Tensor:
        """Of the last query, which has seen the others: unit vectors [B, E] of pictures normalised as CLIP's."""
        return F.normalize(self.vision_proj(self.seed.query_features(normal_B3HW)[:, -1]), dim=-1)

    def caption_states(self, ids_BL: Tensor, is_token_BL: Tensor) -> Tensor:
        """[B, L, D] of captions int64 [B, L]; where `is_token_BL` (bool) is False they are padded, and nobody looks."""
        qformer, text = self.seed.qformer, self.text
        position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        x_BLD = qformer.dropout(qformer.norm(text.words(ids_BL) + text.positions(position_L)))
        for layer, mlp in zip(qformer.layers, text.mlps, strict=True):
            x_BLD = mlp(layer.attn(x_BLD, is_token_BL[:, None, None, :]))
        return x_BLD

    def text_features(self, states_BLD: Tensor) -> Tensor:
        """Of the first token: unit vectors [B, E]."""
        return F.normalize(self.text_proj(states_BLD[:, 0]), dim=-1)

    def forward(self, normal_B3HW: Tensor, ids_BL: Tensor, is_token_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (0-d, with gradient), and the share of pictures whose own caption is the nearest (detached)."""
        image_BE = self.image_features(normal_B3HW)
        text_BE = self.text_features(self.caption_states(ids_BL, is_token_BL))
        return self.contrast(image_BE, text_BE, ids_BL)

    def contrast(self, image_BE: Tensor, text_BE: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` of features. Those of other processes are what ours are told apart from, without a gradient.

        Pictures of one caption (`ids_BL`) are all right for it. The authors tell them apart; among their captions
        hardly any are equal.
        """
        image_NE, text_NE, ids_NL = gathered(image_BE), gathered(text_BE), gathered(ids_BL)
        is_right_BN = (ids_BL[:, None] == ids_NL).all(dim=-1)
        share_BN = is_right_BN / is_right_BN.sum(dim=1, keepdim=True)
        to_texts_BN = image_BE @ text_NE.T / self.temperature
        to_images_BN = text_BE @ image_NE.T / self.temperature
        losses = [F.cross_entropy(s, share_BN, label_smoothing=LABEL_SMOOTHING) for s in (to_texts_BN, to_images_BN)]
        found_B1 = to_texts_BN.detach().argmax(dim=1, keepdim=True)
        return sum(losses) / 2, is_right_BN.gather(1, found_B1).float().mean()


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, detached."""
    x = x.detach().contiguous()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
