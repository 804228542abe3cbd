"""Hotwords: names and terms that a user expects (SeACo-Paraformer, Shi et al. 2023, arXiv 2308.03266).

Each hotword becomes one vector. A decoder reads the tokens' vectors with the hotwords as memory and says, place by
place, which token a hotword has there, or that none has: there the recogniser's own word stands.

Shape suffixes: B clips, K tokens, W width, V vocabulary, N hotwords, M pieces of the longest hotword.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..nn.layers import Linear
from ..nn.parallel import ParallelDecoder
from ..nn.sanm import DecoderStack
from .paraformer_text import BLANK, SOS

MAX_ATTENDED = 50  # hotwords that the decoder reads; of more, those that the clip attends to most
FILTER_LAYER = 5  # whose attention tells


class HotwordHead(nn.Module):
    """Log-probabilities with hotwords.

    no_hotword_id: the token by which the head says that no hotword has its place there.
    """

    def __init__(
        self, vocab_size: int, width: int, depth: int, num_heads: int, hidden: int, taps: int, no_hotword_id: int,
        dropout: float, attention_dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.no_hotword_id = no_hotword_id
        self.encoder = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=dropout)
        self.stack = DecoderStack(
            width, depth, num_heads, hidden, taps, dropout=dropout, attention_dropout=attention_dropout
        )
        self.head = Linear(width, vocab_size)

    def embed(self, decoder: ParallelDecoder, hotwords: Sequence[Sequence[int]]) -> Tensor:
        """A vector [N, W] of each hotword: the LSTM's state after its last piece, which padding cannot change."""
        device = decoder.embedding.weight.device
        lengths_N = torch.tensor([len(ids) for ids in hotwords], device=device)
        ids_NM = pad_sequence([torch.tensor(ids, device=device) for ids in hotwords], True, padding_value=BLANK)
        states_NMW, _ = self.encoder(decoder.embed(ids_NM).to(self.encoder.weight_ih_l0.dtype))
        return states_NMW[torch.arange(len(hotwords), device=device), lengths_N - 1]

    def forward(
        self, log_probs_BKV: Tensor, vectors_BKW: Tensor, hidden_BKW: Tensor, inside_BK: Tensor | None,
        hotwords_NW: Tensor, weight: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Log-probabilities [B, K, V] that the hotwords have had their say in.

        log_probs_BKV: the recogniser's. vectors_BKW, hidden_BKW: what its decoder read, and its last hidden vectors.
        hotwords_NW: of `embed`, the last one being that of "no hotword". weight: 1 lets the hotwords decide; less
        leaves some of the say to the recogniser.
        """
        if len(hotwords_NW) - 1 > MAX_ATTENDED and len(log_probs_BKV) > 1:
            # Which hotwords are read depends on the clip: one after the other, so that no clip decides for others.
            rows = zip(log_probs_BKV.split(1), vectors_BKW.split(1), hidden_BKW.split(1), strict=True)
            masks = [None] * len(log_probs_BKV) if inside_BK is None else inside_BK.split(1)
            return torch.cat([self(*row, mask, hotwords_NW, weight) for row, mask in zip(rows, masks, strict=True)])
        hotwords_BNW = hotwords_NW.expand(len(vectors_BKW), -1, -1)
        if len(hotwords_NW) - 1 > MAX_ATTENDED:
            hotwords_BNW = hotwords_BNW[:, self.most_attended(vectors_BKW, inside_BK, hotwords_BNW)]
        read_BKW = self.stack(vectors_BKW, inside_BK, hotwords_BNW, None)
        read_BKW = read_BKW + self.stack(hidden_BKW, inside_BK, hotwords_BNW, None)
        hotword_BKV = self.head(read_BKW).float().log_softmax(dim=-1)
        is_none_BK1 = (hotword_BKV.argmax(dim=-1) == self.no_hotword_id)[..., None]
        share_BK1 = torch.where(is_none_BK1, 1.0, 1 - weight)  # of the recogniser
        return share_BK1 * log_probs_BKV + (1 - share_BK1) * hotword_BKV

    def most_attended(self, vectors_BKW: Tensor, inside_BK: Tensor | None, hotwords_BNW: Tensor) -> Tensor:
        """Numbers of the hotwords that one clip (B = 1) attends to most, and of the last one."""
        x_BKW = vectors_BKW.to(hotwords_BNW.dtype)
        layers = self.stack.layers
        chosen = layers[min(FILTER_LAYER, len(layers) - 1)]
        for layer in layers[: min(FILTER_LAYER, len(layers) - 1)]:
            x_BKW = layer(x_BKW, inside_BK, hotwords_BNW, None)
        attention_BHKN = chosen.cross.weights(chosen.norm3(chosen.remember(x_BKW, inside_BK)), hotwords_BNW)
        if inside_BK is not None:
            attention_BHKN = attention_BHKN * inside_BK[:, None, :, None]
        none = hotwords_BNW.shape[1] - 1
        best_N = attention_BHKN[..., :none].sum(dim=(0, 1, 2)).topk(MAX_ATTENDED).indices
        return torch.cat([best_N, best_N.new_tensor([none])])


def with_no_hotword(hotwords: Sequence[Sequence[int]]) -> list[list[int]]:
    """The hotwords and, last, the one that stands for none of them."""
    return [*(list(ids) for ids in hotwords), [SOS]]
