"""Paraformer's recognition written the plain way: what the fast path is measured against.

Features clip by clip, with filters made anew each time; convolutions over transposed frames; attention as masked
softmax in separate steps; integrate-and-fire frame by frame, once for the tokens and once on the time stamps' grid. The
weights are those of a `mediatok` model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchaudio.compliance.kaldi as kaldi
from mediatok.generators.paraformer import Paraformer
from mediatok.nn.sanm import CrossAttention, Memory, SelfAttention
from torch import Tensor

THRESHOLD = 1 - 1e-4


class PlainParaformer:
    """A run's functions over the parameters of `model`."""

    def __init__(self, model: Paraformer):
        self.model = model

    def recognize(self, wave_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [B, K, V], ids [B, K] and the time stamps' levels [B, 3 T], of clips of one length."""
        model = self.model
        features = torch.stack([self.features(wave_N) for wave_N in wave_BN])
        mask = torch.ones(features.shape[:2])
        frames = self.encode(features, mask)
        rates = self.rates(frames) * mask
        frames_and_tail = F.pad(frames, (0, 0, 0, 1))
        rates = torch.cat([rates, torch.full((len(rates), 1), model.config.tail)], dim=1)
        counts = rates.sum(dim=1).floor().long()
        vectors, _ = fire(frames_and_tail, rates, 1.0)
        log_probs = self.decode(vectors[:, : int(counts.max())], counts, frames, mask)
        return log_probs, log_probs.argmax(dim=-1), self.levels(frames, counts)

    def features(self, wave_N: Tensor) -> Tensor:
        frontend = self.model.frontend
        energies = kaldi.fbank(
            wave_N[None] * 32768, num_mel_bins=frontend.num_mels, frame_length=25, frame_shift=10, dither=0.0,
            window_type="hamming", sample_frequency=frontend.sample_rate,
        )  # fmt: skip
        before = (frontend.stack - 1) // 2
        energies = torch.cat([energies[:1].repeat(before, 1), energies])
        rows = []
        for first in range(0, len(energies) - before, frontend.stride):
            row = energies[first : first + frontend.stack]
            rows.append(torch.cat([row, row[-1:].repeat(frontend.stack - len(row), 1)]).flatten())
        shift, scale = frontend.cmvn
        return (torch.stack(rows) + shift) * scale

    def encode(self, features: Tensor, mask: Tensor) -> Tensor:
        encoder = self.model.encoder
        x = encoder.enter(features)
        for layer in encoder.layers:
            y = self.attend_and_remember(layer.attn, layer.norm1(x), mask)
            x = x + y if layer.is_residual else y
            x = x + layer.mlp.fc2(torch.relu(layer.mlp.fc1(layer.norm2(x))))
        return encoder.norm(x)

    def attend_and_remember(self, attn: SelfAttention, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        return attn.out(attend(q, k, v, attn.num_heads, mask)) + remember(attn.memory, v, mask)

    def rates(self, frames: Tensor) -> Tensor:
        predictor = self.model.predictor
        seen = torch.relu(predictor.conv(F.pad(frames.transpose(1, 2), predictor.reach)))
        return torch.sigmoid(predictor.out(seen.transpose(1, 2)))[..., 0]

    def decode(self, x: Tensor, counts: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        decoder = self.model.decoder
        inside = (torch.arange(x.shape[1]) < counts[:, None]).float()
        for layer in decoder.stack.layers:
            y = layer.norm2(layer.mlp(layer.norm1(x)))
            x = x + remember(layer.memory, y, inside)
            x = x + self.cross(layer.cross, layer.norm3(x), frames, mask)
        x = decoder.stack.norm(decoder.stack.last_mlp(decoder.stack.last_norm(x)))
        return torch.log_softmax(decoder.head(x), dim=-1)

    def cross(self, cross: CrossAttention, x: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        k, v = cross.kv(frames).chunk(2, dim=-1)
        return cross.out(attend(cross.q(x), k, v, cross.num_heads, mask))

    def levels(self, frames: Tensor, counts: Tensor) -> Tensor:
        head = self.model.timestamps
        fine = head.lstm(head.spread(frames.transpose(1, 2)).transpose(1, 2))[0]
        rates = torch.relu(torch.sigmoid(head.out(fine))[..., 0] * head.factor - head.threshold)
        rates = rates * (counts / rates.sum(dim=1))[:, None]
        level, traced = torch.zeros(len(rates)), []
        for t in range(rates.shape[1]):
            level = level + rates[:, t]
            traced.append(level)
            level = torch.where(level >= THRESHOLD, level - THRESHOLD, level)
        return torch.stack(traced, dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    hidden = mask[:, None, None, :] == 0
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    return torch.matmul(weights, v).transpose(1, 2).flatten(2)


def remember(memory: Memory, x: Tensor, mask: Tensor) -> Tensor:
    x = x * mask[..., None]
    y = F.pad(x.transpose(1, 2), memory.reach)
    y = F.conv1d(y, memory.weight, groups=x.shape[-1]).transpose(1, 2)
    return (y + x) * mask[..., None]


def fire(frames: Tensor, rates: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Vectors of the tokens, and the level of each frame."""
    level, filled = torch.zeros(len(rates)), torch.zeros_like(frames[:, 0])
    collected, traced = [], []
    for t in range(rates.shape[1]):
        missing, rate = 1 - level, rates[:, t]
        level = level + rate
        traced.append(level)
        fires = level >= threshold
        level = torch.where(fires, level - 1, level)
        used = torch.where(fires, missing, rate)
        filled = filled + used[:, None] * frames[:, t]
        collected.append(filled)
        filled = torch.where(fires[:, None], (rate - used)[:, None] * frames[:, t], filled)
    levels, vectors = torch.stack(traced, dim=1), torch.stack(collected, dim=1)
    rows = [vectors[row, levels[row] >= threshold] for row in range(len(rates))]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), levels
