"""xAR's sampling written the plain way: what the fast path is measured against.

Both branches in every call, modulations of every call computed anew and spread over the tokens, two products for gate
and value, caches that grow by concatenation, and a mask over the first call of each cell, which also runs the finished
one. The weights are those of a `mediatok` model.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from mediatok.generators.xar import XAR, XARSettings, time_index
from mediatok.generators.xar_network import EPS, NUM_MODULATIONS
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], eps=EPS)
    return normed if weight is None else normed * weight


def rotate(x: Tensor, rotary_2LK: Tensor) -> Tensor:
    cos, sin = rotary_2LK.repeat_interleave(2, dim=-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class PlainXAR:
    """A run's functions over the parameters of `model`."""

    def __init__(self, model: XAR):
        self.model, self.network = model, model.transformer
        self.heads = model.transformer.num_heads

    def generate(self, labels_B: Tensor, settings: XARSettings, noise) -> Tensor:
        """Latents [B, C, G, G]."""
        model, layout = self.model, self.model.entities
        labels_2B = torch.cat([labels_B, torch.full_like(labels_B, model.config.num_classes)])
        cache: list[tuple[Tensor, Tensor]] = [None] * len(self.network.blocks)
        cells: list[Tensor] = []
        for entity in range(layout.num_entities):
            shape, times = (layout.sizes[entity], model.config.latent_channels), settings.times(entity)
            x = noise.start(entity, shape).double()
            weight = settings.guidance_of(entity)
            for step, (now, then) in enumerate(pairwise(times)):
                fed, indices, tokens = [x.float()], [now], layout.tokens_of(entity)
                if step == 0 and entity > 0:
                    fed, indices = [cells[-1], *fed], [0.0, now]
                    tokens = slice(layout.tokens_of(entity - 1).start, tokens.stop)
                v = self.call(torch.cat(fed, dim=1).repeat(2, 1, 1), indices, labels_2B, tokens, cache, step == 0)
                drift = (2 - now) * v[:, -shape[0] :].double() + x.repeat(2, 1, 1)
                conditional, unconditional = drift.chunk(2)
                drift = unconditional + weight * (conditional - unconditional) if weight > 1 else conditional
                x = x + (then - now) * drift
                if then > 0:
                    x = x + (2 * now) ** 0.5 * (now - then) ** 0.5 * noise.step(entity, step, shape)
            cells.append(x.float())
        return layout.to_latents(torch.cat(cells, dim=1))

    def call(self, x, times, labels_2B, tokens: slice, cache: list, keeps: bool) -> Tensor:
        network, layout = self.network, self.model.entities
        size = x.shape[1] // len(times)
        index = time_index(torch.tensor(times))
        condition = network.condition(labels_2B[:, None], index[None])
        mask = None
        if len(times) > 1:
            past = 0 if cache[0] is None else cache[0][0].shape[2]
            visible = layout.visible()[tokens, tokens]
            mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
            mask = torch.cat([torch.zeros(len(mask), past), mask], dim=1)
        h = rms_norm(network.z_proj(x) + network.encoder_pos_embed[:, tokens], network.z_norm)
        for layer, block in enumerate(network.blocks):
            if layer == network.first_depth:
                h = network.decoder_embed(rms_norm(h, network.encoder_norm))
                h = h + network.decoder_pos_embed[:, tokens]
            m = repeat(block.ada_lin(condition), "r e (n d) -> r (e l) n d", l=size, n=NUM_MODULATIONS)
            gate1, gate2, scale1, scale2, shift1, shift2 = m.unbind(dim=2)
            q, k, v = rearrange(
                block.attn.qkv(rms_norm(h) * (1 + scale1) + shift1), "r l (n h k) -> n r h l k", n=3, h=self.heads
            )
            rotary = self.model.rotary[:, tokens]
            q, k = rotate(q, rotary), rotate(k, rotary)
            if cache[layer] is not None:
                k, v = torch.cat([cache[layer][0], k], dim=2), torch.cat([cache[layer][1], v], dim=2)
            if keeps and len(times) > 1:  # all but the cell that is being made
                cache[layer] = (k[:, :, :-size], v[:, :, :-size])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            h = h + gate1 * block.attn.proj(rearrange(y, "r h l k -> r l (h k)"))
            z = rms_norm(h) * (1 + scale2) + shift2
            (weight_g, weight_x), (bias_g, bias_x) = block.mlp.fc1.weight.chunk(2), block.mlp.fc1.bias.chunk(2)
            gated = F.gelu(F.linear(z, weight_g, bias_g)) * F.linear(z, weight_x, bias_x)
            h = h + gate2 * block.mlp.fc2(gated)
        return network.pred(rms_norm(h, network.decoder_norm))
