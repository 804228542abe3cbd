"""All tokens in one pass (Paraformer, Gao et al. 2022, arXiv 2206.08317): rates, tokens' vectors, glancing, decoder.

    rates = RatePredictor(frames)                  how much of a token each frame is; their sum is the number of tokens
    vectors = integrate_and_fire(frames, rates)    one vector a token (kernels/cif.py)
    vectors = GlancingSampler(vectors, ...)        in training: some of them replaced by embeddings of the true tokens
    logits = ParallelDecoder(vectors, frames)      every token at once

The same chain reads speech (frames contract to characters) and makes it (characters expand to codec tokens).

Shape suffixes: B batch, T frames, K tokens, W width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import compute_dtype
from .layers import Linear
from .sanm import DecoderStack

SMALLEST_SUM = 1e-6  # of the rates of a row that are to be scaled; less is no evidence of anything


class RatePredictor(nn.Module):
    """Rates fp32 [B, T] >= 0 of frames, by a convolution over neighbours and a linear layer.

    before, after: neighbours that the convolution sees. is_depthwise: channels apart, added to the frames (the first
    version). expands: softplus, so that a frame may be several tokens, in the place of the sigmoid.
    factor, threshold: of rates = ReLU(factor * sigmoid - threshold).
    """

    def __init__(
        self, width: int, before: int = 1, after: int = 1, is_depthwise: bool = False, expands: bool = False,
        factor: float = 1.0, threshold: float = 0.0, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.reach, self.is_depthwise, self.expands = (before, after), is_depthwise, expands
        self.factor, self.threshold = factor, threshold
        groups = width if is_depthwise else 1
        self.conv = nn.Conv1d(width, width, before + after + 1, groups=groups)
        self.out = nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout if is_depthwise else 0.0)

    def forward(self, frames_BTW: Tensor, inside_BT: Tensor | None = None) -> Tensor:
        """Rates of frames, zero past the end of each row. Frames past it should be zero: the last one sees them."""
        # Sums of rates decide how many tokens there are: no autocast.
        with torch.autocast(frames_BTW.device.type, enabled=False):
            logits_BT = self.out(self.features(frames_BTW.float()))[..., 0]
            rates_BT = F.softplus(logits_BT) if self.expands else logits_BT.sigmoid()
            rates_BT = F.relu(rates_BT * self.factor - self.threshold)
            return rates_BT if inside_BT is None else rates_BT * inside_BT

    def features(self, frames_BTW: Tensor) -> Tensor:
        """What the linear layer reads, [B, T, W]."""
        frames_BWT = frames_BTW.transpose(1, 2)
        seen_BWT = self.conv(F.pad(frames_BWT, self.reach))
        if self.is_depthwise:
            seen_BWT = self.dropout(seen_BWT + frames_BWT)
        return F.relu(seen_BWT).transpose(1, 2)


def scaled_to(rates_BT: Tensor, counts_B: Tensor) -> Tensor:
    """The rates scaled so that each row sums to its count, as in training, where the number of tokens is known."""
    return rates_BT * (counts_B / rates_BT.sum(dim=1).clamp(min=SMALLEST_SUM))[:, None]


class GlancingSampler(nn.Module):
    """Shows the decoder some of the true tokens, the more the worse its draft is (GLAT, Qian et al. 2021).

    Of a row of L tokens with R right ones in the draft, floor((L - R) * ratio) random ones are replaced.
    """

    def __init__(self, ratio: float):
        super().__init__()
        self.ratio = ratio

    def forward(
        self, vectors_BKW: Tensor, true_BKW: Tensor, draft_BK: Tensor, target_BK: Tensor, inside_BK: Tensor,
        rng: torch.Generator | None = None, order_BK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The mixed vectors [B, K, W], zero past the end of each row, and bool [B, K], True where a token is shown.

        vectors_BKW: from the frames. true_BKW: embeddings of the true tokens. draft_BK, target_BK: the decoder's ids
        and the true ones. order_BK: each row's places in random order, which is drawn from `rng` when None (on the
        CPU, so that a seed gives the same draw on every device).
        """
        if order_BK is None:
            drawn_BK = torch.rand(inside_BK.shape, generator=rng).to(inside_BK.device)
            order_BK = drawn_BK.masked_fill(~inside_BK, 2.0).argsort(dim=1)
        wrong_B = ((draft_BK != target_BK) & inside_BK).sum(dim=1)
        shown_B = (wrong_B.float() * self.ratio).long()
        is_first_BK = torch.arange(inside_BK.shape[1], device=inside_BK.device) < shown_B[:, None]
        is_shown_BK = torch.zeros_like(inside_BK).scatter(1, order_BK, is_first_BK)
        mixed_BKW = torch.where(is_shown_BK[..., None], true_BKW, vectors_BKW.to(true_BKW.dtype))
        return mixed_BKW.masked_fill(~inside_BK[..., None], 0), is_shown_BK


class ParallelDecoder(nn.Module):
    """Logits over the vocabulary of every token, from the tokens' vectors and the frames; no token waits for another.

    `embedding` turns tokens into vectors: for glancing, and to read what is already known.
    """

    def __init__(self, vocab_size: int, width: int, depth: int, num_heads: int, hidden: int, **options):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.stack = DecoderStack(width, depth, num_heads, hidden, **options)
        self.head = Linear(width, vocab_size)

    def forward(
        self, vectors_BKW: Tensor, inside_BK: Tensor | None, frames_BTW: Tensor, inside_BT: Tensor | None
    ) -> Tensor:
        """Logits fp32 [B, K, V]; see `DecoderStack.forward`."""
        return self.head(self.stack(vectors_BKW, inside_BK, frames_BTW, inside_BT)).float()

    def embed(self, ids_BK: Tensor) -> Tensor:
        """Vectors [B, K, W] of tokens, in the dtype of computing."""
        weight = self.embedding.weight
        return self.embedding(ids_BK).to(compute_dtype(weight.dtype, weight.device))


# Losses (section 2.4). Targets hold IGNORED past the end of a row.

IGNORED = -1


def token_loss(logits_BKV: Tensor, target_BK: Tensor, smoothing: float = 0.1, per_token: bool = True) -> Tensor:
    """Cross-entropy with label smoothing, as the divergence from the smoothed target: it can reach zero.

    The true token gets 1 - smoothing, every other one smoothing / (V - 1). Divided by the number of target tokens, or
    by the number of rows.
    """
    vocab_size = logits_BKV.shape[-1]
    inside_BK = target_BK != IGNORED
    log_probs_NV = logits_BKV[inside_BK].float().log_softmax(dim=-1)
    true_N = log_probs_NV.gather(1, target_BK[inside_BK][:, None])[:, 0]
    low = smoothing / max(vocab_size - 1, 1)
    expected_N = (1 - smoothing - low) * true_N + low * log_probs_NV.sum(dim=1)
    of_target = sum(p * math.log(p) * times for p, times in ((1 - smoothing, 1), (low, vocab_size - 1)) if p > 0)
    return (of_target - expected_N).sum() / (len(true_N) if per_token else len(target_BK))


def count_loss(sums_B: Tensor, counts_B: Tensor, per_token: bool = True) -> Tensor:
    """How far the sums of the rates are from the numbers of tokens, divided by all tokens, or by the rows."""
    difference = (counts_B - sums_B).abs().sum()
    return difference / (counts_B.sum() if per_token else len(counts_B))
