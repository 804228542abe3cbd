"""The two transformers of FlexTok's resampler (Bachmann et al. 2025, arXiv 2502.13967, section 3 and its appendix).

The encoder reads latent patches and registers: patches see patches, a register sees all patches and the registers up to
itself. So no register depends on a later one. The decoder predicts the velocity of noisy patches; the codes that are
kept stand beside the patches as registers, and all see all.

Registers that are not kept are one learned vector without position, in the paper as many times as there are registers
missing. Copies of a vector that see the same stay equal in every block, so here it stands once, with the logarithm of
the number of copies added to the scores of its key: the same sums, fewer tokens. The unconditional pass is the case of
no register kept, with another vector.

Shape suffixes: B pictures, R rows (pictures, or twice as many when guided), P patches, N registers, K registers of a
call, L = P + K tokens, C latent channels, G latent rows, W latent columns (H and W of their patches), D width, H heads,
E head width, S numbers of a code, T times.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.linear import linear
from ...nn.layers import Linear, to_compute, widened

EPS = 1e-5
TIME_FEATURES = 256
TIME_PERIOD = 256  # the longest period; 10,000 elsewhere
NUM_KINDS, NUM_MODULATIONS = 2, 6  # patches, registers; gate, gate, shift, scale of attention, shift, scale of the MLP


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulated(x_RLD: Tensor, scale_RD: Tensor, shift_RD: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift; one row of scale and shift serves all."""
    if len(scale_RD) == 1:  # one pass
        weight_D, bias_D = (1 + scale_RD[0]).to(x_RLD.dtype), shift_RD[0].to(x_RLD.dtype)
        return F.layer_norm(x_RLD, x_RLD.shape[-1:], weight_D, bias_D, EPS)
    return torch.addcmul(shift_RD[:, None], norm(x_RLD), 1 + scale_RD[:, None])


class Attention(nn.Module):
    """Self-attention whose queries and keys are normed; scores are scaled by 8 / E (muP: 1 / sqrt(E) at E = 64)."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.gain = 8 / head_width**0.5  # of queries: the kernel divides by sqrt(E)
        self.qkv, self.proj = Linear(width, 3 * width, bias=False), Linear(width, width, bias=False)

    def heads(self, x_RLD: Tensor, queries: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the positions `queries` (all, when None), keys and values of all: [R, H, ., E] each."""
        width = x_RLD.shape[-1]
        if queries is None:
            q, k, v = self.qkv(x_RLD).split(width, dim=-1)
        else:
            weight_q, weight_kv = widened(self.qkv.weight, x_RLD).split([width, 2 * width])
            q = linear(x_RLD[:, queries], weight_q)
            k, v = linear(x_RLD, weight_kv).split(width, dim=-1)
        q, k, v = (rearrange(part, "r l (h e) -> r l h e", e=self.head_width) for part in (q, k, v))
        q, k = norm(q).to(v.dtype), norm(k).to(v.dtype)
        if self.gain != 1:
            q = q * self.gain
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def merged(self, y_RHLE: Tensor) -> Tensor:
        return self.proj(rearrange(y_RHLE, "r h l e -> r l (h e)"))


class GatedMLP(nn.Module):
    """fc2(SiLU(gate) * value), gate and value from one product; 8/3 of the width wide, rounded down."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(2 * int(4 * width) / 3)
        self.fc1, self.fc2 = Linear(width, 2 * hidden, bias=False), Linear(hidden, width, bias=False)

    def forward(self, x_RLD: Tensor) -> Tensor:
        gate, value = self.fc1(x_RLD).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class EncoderBlock(nn.Module):
    """x = x + attention(norm(x)); x = x + MLP(norm(x))."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.attn, self.mlp = Attention(width, head_width), GatedMLP(width)

    def forward(self, x_BLD: Tensor, num_patches: int, seen_KL: Tensor, registers_only: bool = False) -> Tensor:
        """[B, L, D] to the same, or to the registers [B, K, D] alone. `seen_KL`: what each register sees."""
        registers = slice(num_patches, None)
        q, k, v = self.attn.heads(norm(x_BLD), registers if registers_only else None)
        y_BHKE = attention(q[:, :, -seen_KL.shape[0] :], k, v, seen_KL)
        if registers_only:
            x_BLD = x_BLD[:, registers]
        else:
            y_BHPE = attention(*(part[:, :, :num_patches] for part in (q, k, v)))
            y_BHKE = torch.cat([y_BHPE, y_BHKE], dim=2)
        x_BLD = x_BLD + self.attn.merged(y_BHKE)
        return x_BLD + self.mlp(norm(x_BLD))


class DecoderBlock(nn.Module):
    """As the encoder's, with norms that a time scales and shifts and sums that it gates, for each kind of token."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.attn, self.mlp = Attention(width, head_width), GatedMLP(width)
        self.modulation = Linear(width, NUM_KINDS * NUM_MODULATIONS * width)

    def forward(
        self, patches_RPD: Tensor, registers_RKD: Tensor, modulation: Tensor, bias: Tensor | None,
        patches_only: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Patches and registers, each as it came in; with `patches_only` the registers stay what they were.

        modulation: [R, 2, 6, D] or, where all rows have the same time, [1, 2, 6, D]. bias: of the scores, [R, 1, 1, L].
        """
        num_patches = patches_RPD.shape[1]
        gate1, gate2, shift1, scale1, shift2, scale2 = modulation.unbind(dim=2)  # [R, 2, D] each
        entering = torch.cat(
            [modulated(patches_RPD, scale1[:, 0], shift1[:, 0]), modulated(registers_RKD, scale1[:, 1], shift1[:, 1])],
            dim=1,
        )
        q, k, v = self.attn.heads(entering, slice(0, num_patches) if patches_only else None)
        attended = self.attn.merged(attention(q, k, v, None if bias is None else bias.to(q.dtype)))
        patches_RPD = torch.addcmul(patches_RPD, gate1[:, 0, None], attended[:, :num_patches])
        entering = modulated(patches_RPD, scale2[:, 0], shift2[:, 0])
        if patches_only:
            return torch.addcmul(patches_RPD, gate2[:, 0, None], self.mlp(entering)), registers_RKD
        registers_RKD = torch.addcmul(registers_RKD, gate1[:, 1, None], attended[:, num_patches:])
        entering = torch.cat([entering, modulated(registers_RKD, scale2[:, 1], shift2[:, 1])], dim=1)
        through = self.mlp(entering)
        patches_RPD = torch.addcmul(patches_RPD, gate2[:, 0, None], through[:, :num_patches])
        return patches_RPD, torch.addcmul(registers_RKD, gate2[:, 1, None], through[:, num_patches:])


class PatchEmbedding(nn.Module):
    """Square patches of latents through one product, with the places of a fixed table added."""

    def __init__(self, channels: int, width: int, patch_size: int, grid: tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(channels * patch_size**2, width)
        # Part of the released files, and of their parameter counts.
        self.positions = nn.Parameter(sincos_table(width, grid), requires_grad=False)

    def forward(self, latents_BCGW: Tensor) -> Tensor:
        """Patches [B, P, D], row by row; maps smaller than the table take its top left corner."""
        patches = rearrange(
            to_compute(latents_BCGW, self.proj.weight), "b c (h p) (w q) -> b h w (p q c)", p=self.patch_size,
            q=self.patch_size,
        )  # fmt: skip
        height, width = patches.shape[1:3]
        return (self.proj(patches) + widened(self.positions[:height, :width], patches)).flatten(1, 2)


class FlexTokEncoder(nn.Module):
    """Latents to what is quantized, one vector a register."""

    def __init__(
        self, channels: int, width: int, depth: int, head_width: int, patch_size: int, grid: tuple[int, int],
        num_registers: int, code_size: int,
    ):  # fmt: skip
        super().__init__()
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbedding(channels, width, patch_size, grid)
        self.registers = nn.Parameter(torch.empty(num_registers, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, head_width) for _ in range(depth))
        self.head = Linear(width, code_size)

    def forward(self, latents_BCGW: Tensor, num_tokens: int | None = None) -> Tensor:
        """fp32 [B, K, S] of scaled latents: of all registers, or of the first `num_tokens`, which are the same."""
        patches_BPD = self.patch_embed(latents_BCGW)
        registers_KD = self.registers[:num_tokens].to(patches_BPD.dtype)
        batch, num_patches, _ = patches_BPD.shape
        x_BLD = torch.cat([patches_BPD, registers_KD.expand(batch, -1, -1)], dim=1)
        seen_KL = torch.ones(len(registers_KD), x_BLD.shape[1], dtype=torch.bool, device=x_BLD.device)
        seen_KL = seen_KL.tril(num_patches)
        for index, block in enumerate(self.blocks):
            args = (x_BLD, num_patches, seen_KL, index == len(self.blocks) - 1)
            x_BLD = run_block(self, block, args)
        return self.head(norm(x_BLD)).float()


class FlexTokDecoder(nn.Module):
    """The velocity of noisy latents, given codes."""

    def __init__(
        self, channels: int, width: int, depth: int, head_width: int, patch_size: int, grid: tuple[int, int],
        num_registers: int, code_size: int, max_timestep: float,
    ):  # fmt: skip
        super().__init__()
        self.gradient_checkpointing = False
        self.num_registers, self.patch_size, self.max_timestep = num_registers, patch_size, max_timestep
        self.code_embed = Linear(code_size, width)
        self.register_positions = nn.Parameter(torch.empty(num_registers, width))
        self.mask_token, self.null_token = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.patch_embed = PatchEmbedding(channels, width, patch_size, grid)
        self.time_mlp = nn.Sequential(Linear(TIME_FEATURES, width), nn.SiLU(), Linear(width, width))
        self.blocks = nn.ModuleList(DecoderBlock(width, head_width) for _ in range(depth))
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, channels * patch_size**2)

    def condition(
        self, codes_RKS: Tensor, lengths_R: Tensor | None = None, is_null_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Registers [R, K or K + 1, D] for `forward`, and what is added to the scores of their keys (or None).

        lengths_R: codes that each row keeps (all, when None; 0 is none of them). is_null_R: rows without a condition.
        """
        codes_RKS = to_compute(codes_RKS, self.mask_token)
        rows, num_codes, _ = codes_RKS.shape
        device = codes_RKS.device
        kept_R = torch.full((rows,), num_codes, device=device) if lengths_R is None else lengths_R.to(device)
        registers_RKD = self.code_embed(codes_RKS) + widened(self.register_positions[:num_codes], codes_RKS)
        if is_null_R is not None:
            kept_R = torch.where(is_null_R, 0, kept_R)
        elif lengths_R is None and num_codes == self.num_registers:
            return registers_RKD, None
        rest_RD = self.mask_token.to(codes_RKS.dtype).expand(rows, -1)
        if is_null_R is not None:
            rest_RD = torch.where(is_null_R[:, None], self.null_token.to(codes_RKS.dtype), rest_RD)
        is_kept_RK = torch.arange(num_codes, device=device) < kept_R[:, None]
        bias_RK = torch.zeros(is_kept_RK.shape, device=device).masked_fill(~is_kept_RK, float("-inf"))
        copies_R = (self.num_registers - kept_R).float()
        registers_RKD = torch.cat([registers_RKD.to(rest_RD.dtype), rest_RD[:, None]], dim=1)
        return registers_RKD, torch.cat([bias_RK, copies_R.log()[:, None]], dim=1)

    def modulations(self, times_T: Tensor) -> list[Tensor]:
        """What times in [0, 1] (fp32) make of each block, [T, 2, 6, D], and of the head behind them, [T, 2, D]."""
        features_TF = to_compute(time_features(times_T, self.max_timestep), self.mask_token)
        condition_TD = F.silu(self.time_mlp(features_TF))
        blocks = [
            rearrange(block.modulation(condition_TD), "t (k m d) -> t k m d", k=NUM_KINDS, m=NUM_MODULATIONS)
            for block in self.blocks
        ]
        return [*blocks, rearrange(self.head_modulation(condition_TD), "t (m d) -> t m d", m=2)]

    def forward(
        self, noisy_RCGW: Tensor, registers_RKD: Tensor, bias_RK: Tensor | None, modulations: list[Tensor],
        features_of: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Velocities fp32 [R, C, G, W], and the patches [R, P, D] behind block `features_of`.

        registers_RKD, bias_RK: of `condition`. modulations: of `modulations`, of one time or of one for each row.
        """
        patches_RPD, features_RPD = self.patch_embed(noisy_RCGW), None
        bias = None if bias_RK is None else F.pad(bias_RK, (patches_RPD.shape[1], 0))[:, None, None]
        *of_blocks, of_head = modulations
        for index, (block, modulation) in enumerate(zip(self.blocks, of_blocks, strict=True)):
            args = (patches_RPD, registers_RKD, modulation, bias, index == len(self.blocks) - 1)
            patches_RPD, registers_RKD = run_block(self, block, args)
            if index == features_of:
                features_RPD = patches_RPD
        return self.velocities(patches_RPD, of_head, noisy_RCGW.shape[-1]), features_RPD

    def velocities(self, patches_RPD: Tensor, modulation: Tensor, columns: int) -> Tensor:
        """The head: fp32 [R, C, G, W], W = `columns`, of what the last block gave."""
        shift, scale = modulation.unbind(dim=1)
        return rearrange(
            self.head(modulated(patches_RPD, scale, shift)).float(), "r (h w) (p q c) -> r c (h p) (w q)",
            w=columns // self.patch_size, p=self.patch_size, q=self.patch_size,
        )  # fmt: skip


def run_block(stack: FlexTokEncoder | FlexTokDecoder, block: nn.Module, args: tuple):
    """block(*args), its inner values computed anew in the backward pass where that is switched on."""
    if stack.gradient_checkpointing and torch.is_grad_enabled():
        return stack._gradient_checkpointing_func(block, *args)
    return block(*args)


def time_features(times: Tensor, max_timestep: float) -> Tensor:
    """128 cosines, then 128 sines of times in [0, 1]: fp32 [..., 256]."""
    half = TIME_FEATURES // 2
    steps = torch.arange(half, device=times.device).float() / half
    frequencies = (1000 / max_timestep) * torch.exp(-math.log(TIME_PERIOD) * steps)
    angles = times[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_table(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed places fp32 [H, W, D] on a grid of H x W.

    As the authors make it: numbers run over a W x H grid and are then read as H x W, so that a grid that is not square
    is scrambled. Released files bring their tables; this is for models that are trained anew.
    """
    height, columns = grid
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.arange(height * columns, dtype=torch.float64)
    slow, fast = (
        torch.outer(place.div(height, rounding_mode="floor"), frequencies),
        torch.outer(place % height, frequencies),
    )
    table = torch.cat([slow.sin(), slow.cos(), fast.sin(), fast.cos()], dim=1).float()
    return table.view(height, columns, -1)


def init_flextok_weights(model: nn.Module) -> None:
    """Xavier's for products, zeros for biases, modulations and heads, and a truncated normal for learned vectors."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(("modulation", "head")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("registers", "register_positions", "mask_token", "null_token")):
            nn.init.trunc_normal_(parameter, std=0.02)
