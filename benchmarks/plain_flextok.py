"""FlexTok written the plain way: what the fast path is measured against.

Every pass has all registers in its sequence, those that are not kept as copies of the mask; modulations are computed
in every pass for every picture and spread over the tokens; guidance takes two passes; all blocks compute all tokens;
the encoder has all registers, with one mask over the whole sequence. The weights are those of a `mediatok` model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from mediatok.tokenizers.image.flextok import FlexTok
from mediatok.tokenizers.image.flextok_flow import FlowSettings, ProjectedGuidance, plain_guidance
from mediatok.tokenizers.image.flextok_network import EPS, NUM_KINDS, NUM_MODULATIONS, time_features
from torch import Tensor, nn


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def attend(attn: nn.Module, x_BLD: Tensor, mask: Tensor | None) -> Tensor:
    weights = attn.qkv.weight.chunk(3)
    q, k, v = (rearrange(F.linear(x_BLD, w), "b l (h e) -> b h l e", e=attn.head_width) for w in weights)
    y = F.scaled_dot_product_attention(norm(q), norm(k), v, attn_mask=mask, scale=8 / attn.head_width)
    return F.linear(rearrange(y, "b h l e -> b l (h e)"), attn.proj.weight)


def gated(mlp: nn.Module, x_BLD: Tensor) -> Tensor:
    gate, value = mlp.fc1.weight.chunk(2)
    return F.linear(F.silu(F.linear(x_BLD, gate)) * F.linear(x_BLD, value), mlp.fc2.weight)


class PlainFlexTok:
    """Functions over the parameters of `model`."""

    def __init__(self, model: FlexTok):
        self.model = model

    def encode(self, latents_BCGG: Tensor, num_tokens: int) -> Tensor:
        """Ids int64 [B, K]."""
        encoder = self.model.encoder
        patches = encoder.patch_embed(latents_BCGG)
        x = torch.cat([patches, encoder.registers.expand(len(patches), -1, -1)], dim=1)
        place = torch.arange(x.shape[1])
        mask = (place < patches.shape[1]) | (place <= place[:, None])
        for block in encoder.blocks:
            x = x + attend(block.attn, norm(x), mask)
            x = x + gated(block.mlp, norm(x))
        z = F.linear(norm(x[:, patches.shape[1] :]), encoder.head.weight, encoder.head.bias)
        return self.model.quantize(z.float())[1][:, :num_tokens]

    def velocity(self, noisy_BCGG: Tensor, time: float, codes_BNS: Tensor, kept: int | None) -> Tensor:
        """[B, C, G, G], with the first `kept` codes, or without condition."""
        decoder = self.model.decoder
        registers = decoder.code_embed(codes_BNS) + decoder.register_positions
        if kept is None:
            registers = decoder.null_token.expand_as(registers)
        else:
            registers = torch.cat([registers[:, :kept], decoder.mask_token.expand_as(registers[:, kept:])], dim=1)
        patches = decoder.patch_embed(noisy_BCGG)
        x = torch.cat([patches, registers], dim=1)
        times = torch.full((len(x),), time)
        condition = F.silu(decoder.time_mlp(time_features(times, decoder.max_timestep)))
        counts = (patches.shape[1], registers.shape[1])
        for block in decoder.blocks:
            kinds = block.modulation(condition).chunk(NUM_KINDS, dim=-1)
            spread = [kind[:, None].expand(-1, count, -1) for kind, count in zip(kinds, counts, strict=True)]
            gate1, gate2, shift1, scale1, shift2, scale2 = torch.cat(spread, dim=1).chunk(NUM_MODULATIONS, dim=-1)
            x = x + gate1 * attend(block.attn, norm(x) * (1 + scale1) + shift1, None)
            x = x + gate2 * gated(block.mlp, norm(x) * (1 + scale2) + shift2)
        return decoder.velocities(
            x[:, : counts[0]], rearrange(decoder.head_modulation(condition), "b (m d) -> b m d", m=2),
            noisy_BCGG.shape[-1],
        )  # fmt: skip

    def flow(self, ids_BK: Tensor, settings: FlowSettings, noise_BCGG: Tensor) -> Tensor:
        """Latents [B, C, G, G]."""
        missing = self.model.max_tokens - ids_BK.shape[1]
        codes_BNS = self.model.quantize.lookup(F.pad(ids_BK, (0, missing)))
        guide = ProjectedGuidance() if settings.norm_guidance else plain_guidance
        x = noise_BCGG
        for time in settings.times():
            v, scale = self.velocity(x, time, codes_BNS, ids_BK.shape[1]), settings.guidance_at(time)
            if scale != 1:
                v = guide(v, self.velocity(x, time, codes_BNS, None), scale)
            x = x - v / settings.steps
        return x
