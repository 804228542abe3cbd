"""The transformer of xAR (specification, "Architecture"): two stacks of adaptive-norm blocks over noisy latent tokens.

Shape suffixes: R rows (pictures, or pictures twice when guided), L tokens of a call, T tokens of the sequence,
D width, H heads, K head width, C latent channels, G groups of neighbouring tokens with the same condition.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.precision import compute_dtype
from ..nn.kv_cache import KeyValueCache
from ..nn.layers import Linear, rms_norm, widened

TIME_FEATURES = 256
NUM_MODULATIONS = 6  # gate, gate, scale, scale, shift, shift; the first of each pair is attention's


def rotate(x_RLHK: Tensor, rotary_2LK: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels by the angles whose cosines and sines are given."""
    if x_RLHK.device.type == "cpu":  # one complex product, where the plain way makes seven passes
        turn_L1K = torch.complex(*rotary_2LK.float())[:, None]
        pairs = torch.view_as_complex(x_RLHK.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn_L1K).flatten(-2).to(x_RLHK.dtype)
    cos, sin = rotary_2LK.to(x_RLHK.dtype)[:, :, None]
    even, odd = x_RLHK.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Self-attention over the tokens of a call and the finished ones in the cache, with rotary positions."""

    def __init__(self, width: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.num_heads, self.attn_dropout = num_heads, attn_dropout
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.dropout = nn.Dropout(proj_dropout)

    def forward(self, x_RLD: Tensor, rotary_2LK: Tensor, mask: Tensor | None, cache: KeyValueCache | None, layer: int):
        """[R, L, D] to [R, L, D].

        rotary_2LK: cosines and sines [2, L, K / 2] of the tokens' places. mask: bool [L, L], True where token i sees
        token j; None where all see all; not together with a cache. cache: where the keys and values of block number
        `layer` lie, which all tokens see, too; this call's are written behind them.
        """
        heads = rearrange(self.qkv(x_RLD), "r l (n h k) -> r l (n h) k", n=3, h=self.num_heads)
        turned, v = heads.tensor_split([2 * self.num_heads], dim=2)
        q, k = rotate(turned, rotary_2LK).chunk(2, dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        dropout = self.attn_dropout if self.training else 0.0
        y_RHLK = attention(q, k, v, mask, dropout)
        return self.dropout(self.proj(rearrange(y_RHLK, "r h l k -> r l (h k)")))


class GatedMLP(nn.Module):
    """fc2(GELU(gate) * value), gate and value from one product."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, 2 * hidden), Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_RLD: Tensor) -> Tensor:
        gate, value = self.fc1(x_RLD).chunk(2, dim=-1)
        return self.dropout(self.fc2(self.dropout(F.gelu(gate) * value)))


class Block(nn.Module):
    """Attention and MLP behind norms without weights; a condition scales, shifts and gates both."""

    def __init__(self, width: int, num_heads: int, hidden: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.ada_lin = Linear(width, NUM_MODULATIONS * width)
        self.attn = Attention(width, num_heads, attn_dropout, proj_dropout)
        self.mlp = GatedMLP(width, hidden, proj_dropout)

    def forward(self, x_RLD, modulation_RGM: Tensor, rotary_2LK, mask=None, cache=None, layer: int = 0) -> Tensor:
        """[R, L, D] to [R, L, D].

        modulation_RGM: what `ada_lin` gave for each of G groups of L / G neighbouring tokens, [R, G, 6D].
        rotary_2LK, mask, cache, layer: see `Attention.forward`.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_RGM[:, :, None].chunk(NUM_MODULATIONS, dim=-1)
        grouped = x_RLD.unflatten(1, (modulation_RGM.shape[1], -1)).shape
        entering_RLD = torch.addcmul(shift1, rms_norm(x_RLD).view(grouped), 1 + scale1).flatten(1, 2)
        attended_RLD = self.attn(entering_RLD, rotary_2LK, mask, cache, layer)
        x_RLD = torch.addcmul(x_RLD.view(grouped), gate1, attended_RLD.view(grouped)).flatten(1, 2)
        entering_RLD = torch.addcmul(shift2, rms_norm(x_RLD).view(grouped), 1 + scale2).flatten(1, 2)
        return torch.addcmul(x_RLD.view(grouped), gate2, self.mlp(entering_RLD).view(grouped)).flatten(1, 2)


class XARTransformer(nn.Module):
    """Latent tokens in, velocities out. Both stacks see the same positions, mask and condition."""

    def __init__(
        self, channels: int, num_tokens: int, width: int, depths: tuple[int, int], num_heads: int, hidden: int,
        num_classes: int, attn_dropout: float, proj_dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.first_depth = num_heads, depths[0]
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.time_mlp = nn.Sequential(Linear(TIME_FEATURES, width), nn.SiLU(), Linear(width, width))
        self.z_proj = Linear(channels, width)
        self.encoder_pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.z_norm = nn.Parameter(torch.ones(width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, hidden, attn_dropout, proj_dropout) for _ in range(sum(depths))
        )
        self.encoder_norm = nn.Parameter(torch.ones(width))
        self.decoder_embed = Linear(width, width)
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.decoder_norm = nn.Parameter(torch.ones(width))
        self.pred = Linear(width, channels)
        for embedding in (self.class_emb.weight, self.encoder_pos_embed, self.decoder_pos_embed):
            nn.init.normal_(embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def condition(self, labels: Tensor, time_index: Tensor) -> Tensor:
        """SiLU of the condition [..., D] for class numbers and times 0..1000 (int64, broadcast against each other)."""
        dtype = compute_dtype(self.z_norm.dtype, self.z_norm.device)
        features = self.time_mlp(time_features(time_index).to(dtype))
        return F.silu(self.class_emb(labels).to(dtype) + features)

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """What each block makes of a condition: [..., 6D] a block."""
        return [block.ada_lin(condition) for block in self.blocks]

    def forward(
        self,
        x_RLC: Tensor,
        modulations: list[Tensor],
        rotary_2LK: Tensor,
        tokens: slice,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Velocities [R, L, C] of the tokens at the places `tokens` of the sequence.

        modulations: one [R, G, 6D] for each block, of G groups of L / G neighbouring tokens.
        mask: bool [L, L], what each token may see (everything, if None).
        cache: finished entities, which all tokens see, too; not together with a mask.
        """
        dtype = compute_dtype(self.z_norm.dtype, self.z_norm.device)
        h_RLD = self.z_proj(x_RLC.to(dtype)) + self.encoder_pos_embed[:, tokens].to(dtype)
        h_RLD = rms_norm(h_RLD, self.z_norm)
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            if layer == self.first_depth:
                h_RLD = self.decoder_embed(rms_norm(h_RLD, self.encoder_norm))
                h_RLD = h_RLD + widened(self.decoder_pos_embed[:, tokens], h_RLD)
            h_RLD = block(h_RLD, modulation, rotary_2LK, mask, cache, layer)
        return self.pred(rms_norm(h_RLD, self.decoder_norm)).float()


def time_features(time_index: Tensor) -> Tensor:
    """128 cosines, then 128 sines of a time index (int64): fp32 [..., 256]."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=time_index.device).float() / half)
    angles = time_index[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
