"""MaskGIT-VQGAN: 256x256 pixels as 16x16 codes (Chang et al. 2022, arXiv 2202.04200, in the PyTorch port of open-muse).

Two-stage TiTok predicts these codes as proxies, and its pixel decoder is a fine-tuned copy of this decoder. The
network is convolutional, so any size that is a multiple of the downsampling factor goes through.

How it is made fast, with the same result: activations are channels-last; padding is the convolution's own, since the
authors' "same" padding is symmetric at stride 1; activation and residual sum work in place; the 3x3 convolution behind
each nearest-neighbour upsampling reads the small map directly (`UpsampleConv`).

Parameter names are those of the released checkpoint.

Shape suffixes: B batch, C channels, 3/H/W image, h/w code grid, L = h*w codes, E code size, K codebook size.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from ...core.base import TokenizerOutput
from ...core.errors import InvalidInput
from ...core.image_tokenizer import ImageTokenizer
from ...nn.conv_blocks import NormSiLU, UpsampleConv, as_computed
from ...nn.layers import Conv2d
from ...nn.vq import VectorQuantizer


class ResBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))). Where the channels change, the block's input is dropped, see `forward`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = NormSiLU(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = NormSiLU(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))))
        if not hasattr(self, "nin_shortcut"):
            return h_BCHW.add_(x_BCHW)
        # The released weights were trained with the shortcut applied to the branch's output instead of its input.
        return self.nin_shortcut(h_BCHW).add_(h_BCHW)


class DownLevel(nn.Module):
    """Residual blocks, then 2x2 average pooling on all levels but the last."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, downsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_res_blocks - 1)
        self.block = nn.ModuleList(ResBlock(width, out_channels) for width in widths)
        self.downsample = downsample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return F.avg_pool2d(x_BCHW, 2) if self.downsample else x_BCHW


class UpLevel(nn.Module):
    """Residual blocks, then upsampling by 2 on all levels but the last."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_res_blocks - 1)
        self.block = nn.ModuleList(ResBlock(width, out_channels) for width in widths)
        if upsample:
            self.upsample_conv = UpsampleConv(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return self.upsample_conv(x_BCHW) if hasattr(self, "upsample_conv") else x_BCHW


class VQGANEncoder(nn.Module):
    """Pixels [B, 3, H, W] in [0, 1] -> vectors [B, E, h, w] before quantization, 2^(levels - 1) times smaller."""

    def __init__(
        self, hidden_channels: int, channel_multipliers: tuple[int, ...], num_res_blocks: int, z_channels: int,
        in_channels: int = 3,
    ):  # fmt: skip
        super().__init__()
        widths = [hidden_channels * multiplier for multiplier in channel_multipliers]
        last = len(widths) - 1
        self.conv_in = Conv2d(in_channels, hidden_channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            DownLevel(before, width, num_res_blocks, downsample=level < last)
            for level, (before, width) in enumerate(zip([hidden_channels, *widths[:-1]], widths, strict=True))
        )
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(num_res_blocks))
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = Conv2d(widths[-1], z_channels, 1)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(as_computed(pixels_B3HW, self.conv_in.weight))
        for stage in (*self.down, *self.mid):
            x_BCHW = stage(x_BCHW)
        return self.conv_out(self.norm_out(x_BCHW))


class VQGANDecoder(nn.Module):
    """Codes [B, E, h, w] -> pixels [B, 3, H, W], nominally in [0, 1] but not clamped, 2^(levels - 1) times larger."""

    def __init__(
        self, hidden_channels: int, channel_multipliers: tuple[int, ...], num_res_blocks: int, z_channels: int,
        out_channels: int = 3,
    ):  # fmt: skip
        super().__init__()
        widths = [hidden_channels * multiplier for multiplier in channel_multipliers]
        self.conv_in = Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(num_res_blocks))
        self.up = nn.ModuleList(
            UpLevel(before, width, num_res_blocks, upsample=level > 0)
            for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = NormSiLU(widths[0])
        self.conv_out = Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z_BEhw: Tensor) -> Tensor:
        x_BCHW = self.conv_in(as_computed(z_BEhw, self.conv_in.weight))
        for stage in (*self.mid, *reversed(self.up)):
            x_BCHW = stage(x_BCHW)
        return self.conv_out(self.norm_out(x_BCHW)).contiguous()


class MaskGitVQGAN(ImageTokenizer):
    """The 1,024-code tokenizer of MaskGIT, 54.5 M parameters; defaults are the released sizes."""

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        hidden_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 1024,
        commitment_cost: float = 0.25,
    ):
        super().__init__()
        sizes = (hidden_channels, tuple(channel_multipliers), num_res_blocks, z_channels)
        self.encoder = VQGANEncoder(*sizes)
        self.quantize = VectorQuantizer(codebook_size, z_channels, commitment_cost)
        self.decoder = VQGANDecoder(*sizes)

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def downsampling(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    @property
    def max_tokens(self) -> int:
        return (self.image_size // self.downsampling) ** 2

    def forward(self, pixels_B3HW: Tensor) -> TokenizerOutput:
        """Encode, quantize and decode `pixels_B3HW` (fp32, [0, 1]): the training pass."""
        codes_BEhw, vq = self.quantize(self._encode(pixels_B3HW))
        return TokenizerOutput(self.decoder(codes_BEhw), ids_BL=vq.ids_BHW.flatten(1), vq=vq)

    def encode_pixels(self, pixels_B3HW: Tensor, num_tokens: int | None = None) -> Tensor:
        """Ids int64 [B, h*w], row by row, of pixels in [0, 1] whose sides are multiples of `downsampling`."""
        self.check_num_tokens(num_tokens)
        return self.quantize.nearest(self._encode(pixels_B3HW)).flatten(1)

    def encode_soft(self, pixels_B3HW: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Soft targets fp32 [B, h*w, K], softmax(-squared distance / temperature), and the ids int64 [B, h*w]."""
        z_BEhw = self._encode(pixels_B3HW).float()
        z_BLE, codebook_KE = rearrange(z_BEhw, "b e h w -> b (h w) e"), self.quantize.codebook()
        distance_BLK = z_BLE.square().sum(-1, keepdim=True) + codebook_KE.square().sum(-1) - 2 * z_BLE @ codebook_KE.T
        return F.softmax(-distance_BLK / temperature, dim=-1), self.quantize.nearest(z_BEhw).flatten(1)

    def decode_ids(self, ids: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Pixels fp32 [B, 3, H, W], nominally in [0, 1], not clamped, of int64 ids [B, h, w], or [B, L] of a square."""
        if ids.ndim == 2:
            side = isqrt(ids.shape[1])
            if side**2 != ids.shape[1]:
                raise InvalidInput(f"{ids.shape[1]} ids do not form a square; pass them as [B, h, w]")
            ids = ids.unflatten(1, (side, side))
        if ids.ndim != 3 or ids.dtype != torch.int64:
            raise InvalidInput(f"ids must be int64 [B, L] or [B, h, w], got {ids.dtype} {list(ids.shape)}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidInput(f"ids must lie in [0, {self.vocab_size}), got {int(ids.min())} to {int(ids.max())}")
        if lengths_B is not None and bool((lengths_B != ids[0].numel()).any()):
            raise InvalidInput(
                f"{self.name} decodes whole grids of {ids[0].numel()} ids, got lengths {lengths_B.tolist()}"
            )
        return self.decoder(rearrange(self.quantize.lookup(ids), "b h w e -> b e h w")).float()

    def _encode(self, pixels_B3HW: Tensor) -> Tensor:
        factor, shape = self.downsampling, pixels_B3HW.shape
        if pixels_B3HW.ndim != 4 or shape[1] != 3 or shape[2] % factor or shape[3] % factor or 0 in shape[2:]:
            raise InvalidInput(
                f"{self.name} reads pixels [B, 3, H, W] with sides that are multiples of {factor}, got {list(shape)}"
            )
        return self.encoder(pixels_B3HW)


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released model, by name."""
    return {"maskgit-vqgan": {}}
