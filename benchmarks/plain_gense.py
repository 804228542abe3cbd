"""GenSE's enhancement written the plain way: what the fast path is measured against.

No keys and values are kept: each token takes the whole sequence through the model again, with the logits of every id at
every position. All 24 layers of the speech encoder run, of which 6 are used. The codec's quantizer computes its losses.
The weights are those of `mediatok` models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mediatok.generators.gense import BEGIN, FIRST_ID, NEW_POSITION, ExponentialNoise, GenSE
from mediatok.nn.gpt2 import GPT2
from mediatok.tokenizers.speech.semantic import RIGHT_PAD, SemanticTokenizer
from plain_simcodec import PlainSimCodec
from torch import Tensor

MASKED = -1e5


class PlainGenSE:
    """A run's functions over the parameters of `model`; `encoder` has all layers, of which the first `layer` count."""

    def __init__(self, model: GenSE, encoder: SemanticTokenizer, layer: int, codec: PlainSimCodec):
        self.model, self.encoder, self.layer, self.codec = model, encoder, layer, codec

    def tokens(self, wave_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic tokens [B, T] and acoustic ones [B, A]."""
        transformer = self.encoder.encoder
        states = transformer(F.pad(wave_BT, (0, RIGHT_PAD)), output_hidden_states=True).hidden_states
        x_BLD, centres_KD = states[self.layer], self.encoder.quantize.embedding.weight
        distance = (x_BLD**2).sum(-1, keepdim=True) - 2 * x_BLD @ centres_KD.T + (centres_KD**2).sum(-1)
        return distance.argmin(-1), self.codec.encode_waveform(wave_BT)

    def n2s(self, noisy_BT: Tensor, noise: ExponentialNoise) -> Tensor:
        begin = torch.full_like(noisy_BT[:, :1], BEGIN)
        length = noisy_BT.shape[1]
        written = self.write(
            "n2s", torch.cat([noisy_BT + FIRST_ID, begin], 1), [*range(length + 1)], range(length), FIRST_ID, noise
        )
        return written - FIRST_ID

    def s2s(self, noisy_BT: Tensor, clean_BT: Tensor, acoustic_BA: Tensor, noise: ExponentialNoise) -> Tensor:
        begin, first = torch.full_like(noisy_BT[:, :1], BEGIN), FIRST_ID + self.model.config.num_semantic
        prompt = torch.cat([noisy_BT + FIRST_ID, clean_BT + FIRST_ID, begin, acoustic_BA + first], dim=1)
        positions = [*range(2 * noisy_BT.shape[1] + 1), *range(acoustic_BA.shape[1])]
        new = range(NEW_POSITION, NEW_POSITION + acoustic_BA.shape[1])
        return self.write("s2s", prompt, positions, new, first, noise) - first

    def write(self, name: str, ids_BL, positions: list[int], new: range, first: int, noise: ExponentialNoise) -> Tensor:
        for step, position in enumerate(new):
            logits = network_logits(getattr(self.model, name), ids_BL, torch.tensor(positions))[:, -1]
            logits[:, :first] = MASKED
            exponential = torch.ones_like(logits)
            exponential[:, first:] = noise.draw(name, step, logits.shape[1] - first)
            token_B = (logits.softmax(-1) / exponential).argmax(-1)
            ids_BL, positions = torch.cat([ids_BL, token_B[:, None]], dim=1), [*positions, position]
        return ids_BL[:, -len(new) :]


def network_logits(lm: GPT2, ids_BL: Tensor, positions_L: Tensor) -> Tensor:
    """Logits [B, L, V] of all ids at all positions."""
    x_BLW = F.embedding(ids_BL, lm.wte.weight) + F.embedding(positions_L, lm.wpe.weight)
    is_past = torch.ones(len(positions_L), len(positions_L), dtype=torch.bool).tril()
    for block in lm.blocks:
        q, k, v = (
            part.unflatten(-1, (lm.num_heads, -1)).transpose(1, 2)
            for part in F.linear(norm(block.ln_1, x_BLW), block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~is_past, torch.finfo(q.dtype).min)
        y_BLW = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BLW = x_BLW + F.linear(y_BLW, block.attn.proj.weight, block.attn.proj.bias)
        h = F.gelu(F.linear(norm(block.ln_2, x_BLW), block.mlp.fc.weight, block.mlp.fc.bias), approximate="tanh")
        x_BLW = x_BLW + F.linear(h, block.mlp.proj.weight, block.mlp.proj.bias)
    return F.linear(norm(lm.ln_f, x_BLW), lm.wte.weight)


def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
