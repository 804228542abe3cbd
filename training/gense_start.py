"""A start for small data sets: both language models of GenSE begin by looking at the moment that they write.

From the published initialisation a small S2S learns how speech sounds, but hardly which clean semantic token belongs to
the acoustic token that it writes: after 300 steps its validation loss stood at 5.07 nats, and with this start at 4.1
after 200 (recipes/gense-tiny.yaml, one trial each). Neither half is enough alone (4.9 and 5.1).

- Tokens start as the codes that they stand for, projected at random: what sounds alike begins alike, and so do its
  chances, which the same vectors give.
- Positions start as sines of the moment in the clip, the same for all chains of the prompt, beside a mark for each
  chain; heads of the first two blocks start as "look at this moment of that chain" (as `aligned_start.py` does it for
  pictures).

Nothing of it is fixed: training moves all of it.

Shape suffixes: V ids, C code channels, W width, D head width, P positions, F = D - 4 sines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import InvalidRecipe
from ..generators.gense import NEW_POSITION, GenSE
from ..nn.gpt2 import GPT2
from .code_start import projected_codes

MARKS = 4  # channels behind the sines, one a chain
ACOUSTIC, CLEAN_SEMANTIC, WRITTEN = 0, 1, 2  # the marks; the first one is of acoustic tokens, noisy and written
TOKEN_SIZE, PLACE_SIZE = 0.05, 0.075  # deviation of a token's channels; size of a sine and of a mark
FREQUENCIES = (2.5, 0.03)  # radians a token
SAME_MOMENT = 1.5  # gain of queries and of keys: the moment itself gets most of a head's attention
MARK_GAIN, MARK_BIAS = 3.0, 8.0
VALUE_GAIN = 0.8
OUTPUT_GAIN = 0.08
ALIGNED_BLOCKS = 2
# Of each head: how far ahead of the newest token it looks, and in which chain (None: in any).
N2S_LOOKS = ((1, None), (0, None), (2, None), (-1, None))
S2S_LOOKS = ((0, CLEAN_SEMANTIC), (0, ACOUSTIC), (0, None), (-1, WRITTEN))


@torch.no_grad()
def align_chains(model: GenSE, num_tokens: int, semantic_VC: Tensor, acoustic_VC: Tensor) -> None:
    """Initialise a fresh `GenSE` in place, to be trained on crops of `num_tokens` semantic and acoustic tokens each.

    semantic_VC, acoustic_VC: the codes of the two tokenizers.

    Raises:
        InvalidRecipe: heads too few or too narrow.
    """
    config = model.config
    head_width = config.hidden_size // config.num_attention_heads
    if head_width < 2 * MARKS or config.num_attention_heads < len(S2S_LOOKS):
        raise InvalidRecipe(
            f"model.aligned_start needs {len(S2S_LOOKS)} heads of {2 * MARKS} channels or more, and there are "
            f"{config.num_attention_heads} of {head_width}"
        )
    moment_P = torch.arange(num_tokens)
    _spread(model.n2s, model.semantic_ids, semantic_VC)
    _place(model.n2s, moment_P, moment_P)
    _place(model.n2s, torch.tensor([num_tokens]), torch.tensor([-1]))  # <begin>, behind which the first one is written
    _look(model.n2s, N2S_LOOKS)

    s2s = model.s2s
    _spread(s2s, model.semantic_ids, semantic_VC)
    _spread(s2s, model.acoustic_ids, acoustic_VC, ACOUSTIC)
    _place(s2s, moment_P, moment_P)  # of the noisy semantic tokens, and of the noisy acoustic ones
    _place(s2s, num_tokens + moment_P, moment_P, CLEAN_SEMANTIC)
    _place(s2s, NEW_POSITION + moment_P, moment_P + 1, WRITTEN)  # token j is read there, and j + 1 is written
    _look(s2s, S2S_LOOKS)


def _sines(gpt: GPT2) -> int:
    """How many channels, the first ones, hold sines and cosines of the moment; the marks follow them."""
    return (gpt.wte.weight.shape[1] // gpt.num_heads - MARKS) // 2 * 2


def _frequencies(gpt: GPT2) -> Tensor:
    return torch.logspace(*(math.log10(f) for f in FREQUENCIES), _sines(gpt) // 2)


def _spread(gpt: GPT2, ids: slice, codes_VC: Tensor, mark: int | None = None) -> None:
    """Tokens as codes behind the channels of places, each kind of token with an offset of its own."""
    rows_VW, first = gpt.wte.weight[ids], _sines(gpt) + MARKS
    tokens_VW = projected_codes(codes_VC, rows_VW.shape[1] - first, TOKEN_SIZE).to(rows_VW)
    rows_VW[:, :first] = 0
    rows_VW[:, first:] = tokens_VW + torch.randn(tokens_VW.shape[1]).to(rows_VW) * (TOKEN_SIZE / 2)
    if mark is not None:
        rows_VW[:, _sines(gpt) + mark] = PLACE_SIZE


def _place(gpt: GPT2, position_P: Tensor, moment_P: Tensor, mark: int | None = None) -> None:
    """Rows of the position table as sines of `moment_P`, in tokens."""
    angle_PF = moment_P[:, None] * _frequencies(gpt)
    row_PW = torch.zeros(len(position_P), gpt.wpe.weight.shape[1])
    row_PW[:, : _sines(gpt)] = PLACE_SIZE * torch.cat([angle_PF.sin(), angle_PF.cos()], dim=1)
    if mark is not None:
        row_PW[:, _sines(gpt) + mark] = PLACE_SIZE
    gpt.wpe.weight[position_P] = row_PW.to(gpt.wpe.weight)


def _look(gpt: GPT2, looks: Sequence[tuple[int, int | None]]) -> None:
    """Queries, keys and values of the first heads: to the moment `ahead` of the query's own, in one chain."""
    frequency_F, sines = _frequencies(gpt), _sines(gpt)
    width, first = gpt.wte.weight.shape[1], sines + MARKS
    head_width = width // gpt.num_heads
    for block in gpt.blocks[:ALIGNED_BLOCKS]:
        weight, bias, out = block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj.weight
        for head, (ahead, mark) in enumerate(looks):
            query, key, value = (part * width + head * head_width for part in range(3))
            # sin(a + d) = cos d sin a + sin d cos a, and cos(a + d) = cos d cos a - sin d sin a.
            cos, sin = (torch.diag(wave(frequency_F * ahead)) for wave in (torch.cos, torch.sin))
            turn = torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])
            for start, matrix in ((query, turn), (key, torch.eye(sines))):
                weight[start : start + sines] = 0
                weight[start : start + sines, :sines] = SAME_MOMENT * matrix.to(weight)
            if mark is not None:
                weight[query + sines], weight[key + sines] = 0, 0
                weight[key + sines, sines + mark] = MARK_GAIN
                bias[query + sines] = MARK_BIAS
            own = slice(head * head_width, (head + 1) * head_width)
            mixing = [torch.linalg.qr(torch.randn(width - first, width - first))[0][:head_width] for _ in range(2)]
            weight[value : value + head_width] = 0
            weight[value : value + head_width, first:] = VALUE_GAIN * mixing[0].to(weight)
            out[:, own] = 0
            out[first:, own] = OUTPUT_GAIN * mixing[1].T.to(weight)
