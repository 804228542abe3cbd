"""GPT-2 (Radford et al. 2019): the plain causal transformer with which next-token generators write.

Positions are given, not counted: within a sequence they may restart or jump, as GenSE's do. Sizes, activations and
initialisation are those of the released GPT-2.

Shape suffixes: B rows, L tokens of a call, N new tokens, W width, H heads, D head width, V ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention_of_one
from ..kernels.linear import linear
from ..kernels.precision import compute_dtype
from .kv_cache import KeyValueCache
from .layers import LayerNorm, Linear, widened


class CausalAttention(nn.Module):
    """Attention of each token to itself and to those before it."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.attn_dropout = num_heads, dropout
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLW: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        q_BHLD, k, v = rearrange(self.qkv(x_BLW), "b l (n h d) -> n b h l d", n=3, h=self.num_heads)
        seen = (k, v) if cache is None else cache.extend(layer, k, v)
        if q_BHLD.shape[2] == 1:
            y_BHLD = attention_of_one(q_BHLD, *seen)  # the newest token sees all
        else:  # a cache was empty before
            dropout = self.attn_dropout if self.training else 0.0
            y_BHLD = F.scaled_dot_product_attention(q_BHLD, k, v, dropout_p=dropout, is_causal=True)
        return self.dropout(self.proj(rearrange(y_BHLD, "b h l d -> b l (h d)")))


class MLP(nn.Module):
    """Two products, four times the width between them."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.fc, self.proj = Linear(width, 4 * width), Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLW: Tensor) -> Tensor:
        return self.dropout(self.proj(F.gelu(self.fc(x_BLW), approximate="tanh")))


class Block(nn.Module):
    """x = x + attention(LN(x)); x = x + MLP(LN(x))."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(width), CausalAttention(width, num_heads, dropout)
        self.ln_2, self.mlp = LayerNorm(width), MLP(width, dropout)

    def forward(self, x_BLW: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        x_BLW = x_BLW + self.attn(self.ln_1(x_BLW), cache, layer)
        return x_BLW + self.mlp(self.ln_2(x_BLW))


class GPT2(nn.Module):
    """Ids in, hidden states out; `logits` makes logits of them with the embedding's own weights.

    Args:
        vocab_size, num_positions: rows of the two embeddings.
        width, depth, num_heads: of the blocks. dropout: in training, everywhere.
    """

    def __init__(
        self, vocab_size: int, num_positions: int, width: int, depth: int, num_heads: int, dropout: float = 0.1
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(num_positions, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(depth))
        self.ln_f = LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # the blocks' outputs are scaled by their number (section 2.3 of the paper)
                std = 0.02 / (2 * depth) ** 0.5 if name.endswith("proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def num_positions(self) -> int:
        return self.wpe.num_embeddings

    def new_cache(self, rows: int, tokens: int) -> KeyValueCache:
        """An empty cache for `tokens` tokens in each of `rows` rows, of the dtype that is computed in."""
        weight = self.wpe.weight
        like = torch.empty(0, dtype=compute_dtype(weight.dtype, weight.device), device=weight.device)
        head_width = weight.shape[1] // self.num_heads
        return KeyValueCache(
            len(self.blocks),
            rows,
            self.num_heads,
            tokens,
            head_width,
            like,
            values_by_channel=like.device.type == "cpu",
        )

    def forward(self, ids_BL: Tensor, positions: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states [B, L, W] behind the last norm.

        ids_BL: int64. positions: int64 [L], or [B, L]; rows of the position table.
        cache: holds what came before these tokens, and gets them, too. More than one token only into an empty one.

        Raises:
            ValueError: several tokens at once behind others.
        """
        if cache is not None and cache.length and ids_BL.shape[1] > 1:
            raise ValueError(f"{ids_BL.shape[1]} tokens at once behind {cache.length} others; give them one by one")
        dtype = compute_dtype(self.wte.weight.dtype, self.wte.weight.device)
        x_BLW = self.dropout(self.wte(ids_BL).to(dtype) + self.wpe(positions).to(dtype))
        for layer, block in enumerate(self.blocks):
            x_BLW = block(x_BLW, cache, layer)
        if cache is not None:
            cache.length += ids_BL.shape[1]
        return self.ln_f(x_BLW)

    def logits(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """Logits fp32 [..., V] over the ids in `ids`, of hidden states [..., W]."""
        return linear(hidden, widened(self.wte.weight[ids], hidden)).float()

    def continuation_loss(
        self, prompt_BL: Tensor, prompt_positions_L: Tensor, written_BN: Tensor, new_positions_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy (0-d) of `written_BN` behind a prompt, which does not count, and the detached share of those
        tokens that are the likeliest; arguments as in `generate`.
        """
        ids_BL = torch.cat([prompt_BL, written_BN[:, :-1]], dim=1)
        positions_L = torch.cat([prompt_positions_L, new_positions_N[:-1]])
        logits_BNV = self.logits(self(ids_BL, positions_L)[:, prompt_BL.shape[1] - 1 :])
        loss = F.cross_entropy(logits_BNV.flatten(0, 1), written_BN.flatten())
        return loss, (logits_BNV.detach().argmax(dim=-1) == written_BN).float().mean()

    @torch.inference_mode()
    def generate(
        self,
        prompt_BL: Tensor,
        prompt_positions_L: Tensor,
        new_positions_N: Tensor,
        choose: Callable[[int, Tensor], Tensor],
        ids: slice = slice(None),
        on_token: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Continue each prompt by N tokens, one after the other; returns them as int64 [B, N].

        Args:
            prompt_BL, prompt_positions_L: ids and where they stand, int64.
            new_positions_N: where the new tokens stand.
            choose: choose(step, logits [B, V]) gives the next token of each row as places in `ids`, int64 [B].
            ids: the ids that may be written; the head computes no others.
            on_token: called with the number of tokens there are after each.
        """
        batch, length = prompt_BL.shape
        cache = self.new_cache(batch, length + len(new_positions_N) - 1)
        written_BN = prompt_BL.new_empty(batch, len(new_positions_N))
        hidden_BLW = self(prompt_BL, prompt_positions_L, cache)
        for step in range(len(new_positions_N)):
            if step:
                last = slice(step - 1, step)
                hidden_BLW = self(written_BN[:, last], new_positions_N[last], cache)
            written_BN[:, step] = (ids.start or 0) + choose(step, self.logits(hidden_BLW[:, -1], ids))
            if on_token is not None:
                on_token(step + 1)
        return written_BN
