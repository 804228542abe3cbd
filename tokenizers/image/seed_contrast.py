"""SEED's first training stage: the last query of a picture and its caption are pulled together (contrastive loss).

Captions go through the Q-Former's own self-attention, in both directions and without a picture, each layer with a
feed-forward network for text (BLIP-2, arXiv 2301.12597, section 3.2; of its three losses SEED keeps this one).

A small model has no released vision tower. It learns one along, from the captions and from another network's features.

Shape suffixes: B batch of this process, N batch of all processes, L tokens of a caption, D width, E feature channels,
P places of the tower's map, W its width, Q queries, T features of the other network.
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
        between_pictures: pull pictures of one caption together, too, so that drawing styles do not matter.
        teacher_width: T of a network whose features the tower and the last query learn to give back; 0 for none.
    """

    def __init__(
        self, seed: Seed, vocab_size: int, max_positions: int = 512, feature_size: int = 256,
        between_pictures: bool = False, teacher_width: int = 0,
    ):  # fmt: skip
        super().__init__()
        check_sizes(vocab_size=vocab_size, max_positions=max_positions, feature_size=feature_size)
        config, dropout = seed.config, seed.qformer.dropout.p
        self.seed, self.between_pictures = seed, between_pictures
        sizes = (config.qformer_width, config.qformer_hidden, config.qformer_depth)
        self.text = CaptionReader(*sizes, vocab_size, max_positions, dropout)
        self.vision_proj = nn.Linear(config.qformer_width, feature_size)
        self.text_proj = nn.Linear(config.qformer_width, feature_size)
        if teacher_width:
            self.places_proj = nn.Linear(config.vision_width, teacher_width)
            self.picture_proj = nn.Linear(config.qformer_width, teacher_width)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        codes = (seed.to_code, seed.quantize, seed.from_code)
        for unused in (*codes, seed.semantic_decoder, seed.image_blocks, seed.to_embedding):
            unused.requires_grad_(False)

    def image_features(self, found_BQD: Tensor) -> Tensor:
        """Of the last query, which has seen the others: unit vectors [B, E] of what all queries found."""
        return F.normalize(self.vision_proj(found_BQD[:, -1]), dim=-1)

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

    def forward(
        self, normal_B3HW: Tensor, ids_BL: Tensor, is_token_BL: Tensor, taught_BPT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The contrastive loss and that of the teacher's features `taught_BPT` (0-d, with gradient; 0 without a
        teacher), and the share of pictures whose own caption is the nearest (detached).

        normal_B3HW: pictures normalised as CLIP's.
        """
        seen_BPW = self.seed.vision(normal_B3HW)[1]
        found_BQD = self.seed.qformer(self.seed.queries, seen_BPW)
        image_BE = self.image_features(found_BQD)
        text_BE = self.text_features(self.caption_states(ids_BL, is_token_BL))
        loss, accuracy = self.contrast(image_BE, text_BE, ids_BL)
        if self.between_pictures:
            loss = loss + self.contrast_of_pictures(image_BE, ids_BL)
        taught = loss.new_zeros(()) if taught_BPT is None else self.teaching(seen_BPW, found_BQD, taught_BPT)
        return loss, taught, accuracy

    def teaching(self, seen_BPW: Tensor, found_BQD: Tensor, taught_BPT: Tensor) -> Tensor:
        """How far the tower's places (behind its class token) are from the teacher's, and the last query from their
        mean: one less the cosine, the sum of both. What all pictures of the batch share is taken off the teacher's.
        """
        taught_BPT = taught_BPT - taught_BPT.mean(dim=(0, 1))
        places = F.cosine_similarity(self.places_proj(seen_BPW[:, 1:]).float(), taught_BPT.float(), dim=-1)
        picture = F.cosine_similarity(
            self.picture_proj(found_BQD[:, -1]).float(), taught_BPT.float().mean(dim=1), dim=-1
        )
        return 2 - places.mean() - picture.mean()

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

    def contrast_of_pictures(self, image_BE: Tensor, ids_BL: Tensor) -> Tensor:
        """The loss (0-d) of telling the other pictures of one's caption from all others (supervised contrastive
        learning, arXiv 2004.11362, section 3.2.2, outer sum), over the pictures that have such others."""
        image_NE, ids_NL = gathered(image_BE), gathered(ids_BL)
        first = len(image_BE) * (dist.get_rank() if len(image_NE) > len(image_BE) else 0)
        is_self_BN = torch.eye(len(image_NE), dtype=torch.bool, device=image_BE.device)[first : first + len(image_BE)]
        is_right_BN = (ids_BL[:, None] == ids_NL).all(dim=-1) & ~is_self_BN
        has_right_B = is_right_BN.any(dim=1)
        log_BN = (image_BE @ image_NE.T / self.temperature).masked_fill(is_self_BN, float("-inf")).log_softmax(dim=1)
        count_B = is_right_BN.sum(dim=1).clamp(min=1)
        loss_B = -log_BN.masked_fill(~is_right_BN, 0.0).sum(dim=1) / count_B
        return loss_B.sum() / has_right_B.sum().clamp(min=1)


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, detached."""
    x = x.detach().contiguous()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
