"""SimCodec as the published training code formulates it: the baseline of `simcodec.py`.

Written from the architecture's description, with plain torch: weight norm computed at every call, latents against the
whole codebook as one matrix of distances, and the quantizer's losses, with all similarities of its codes to each other,
also where only ids are asked for. Parameter names are `mediatok`'s, but for weight norm's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm


def conv(*sizes: int, **options: int) -> nn.Module:
    return weight_norm(nn.Conv1d(*sizes, **options))


def pairs(config, first: str, second: str) -> list[tuple]:
    return list(zip(config[first], config[second], strict=True))


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(
            conv(channels, channels, kernel, dilation=d, padding=(kernel * d - d) // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(conv(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x_BCT: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            h_BCT = F.leaky_relu(x_BCT, 0.1)
            h_BCT = F.leaky_relu(first(h_BCT), 0.1)
            x_BCT = second(h_BCT) + x_BCT
        return x_BCT


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, blocks = (
            config.en_filters,
            list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)),
        )
        self.conv_pre = conv(1, width, 7, padding=3)
        self.downs, self.resblocks, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for rate, kernel in list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))[::-1]:
            self.downs.append(conv(width, 2 * width, kernel, stride=rate, padding=(kernel - rate) // 2))
            width *= 2
            self.resblocks.append(nn.ModuleList(ResBlock(width, *block) for block in blocks[::-1]))
            self.norms.append(nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in blocks))
        self.conv_post = nn.Conv1d(width, config.vq_dim, 3, padding=1)

    def forward(self, x_BCT: Tensor) -> Tensor:
        x_BCT = self.conv_pre(x_BCT)
        for down, blocks, norms in zip(self.downs, self.resblocks, self.norms, strict=True):
            x_BCT, total_BCT = down(x_BCT), None
            for block, norm in zip(blocks, norms, strict=True):
                h_BCT = block(x_BCT)
                total_BCT = h_BCT if total_BCT is None else total_BCT + h_BCT
                total_BCT = norm(total_BCT.transpose(1, 2)).transpose(1, 2)
            x_BCT = total_BCT / len(blocks)
        return self.conv_post(F.leaky_relu(x_BCT, 0.1))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.de_filters * 2 ** len(config.upsample_rates)
        blocks = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        self.conv_pre = conv(config.vq_dim, width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            up = nn.ConvTranspose1d(width, width // 2, kernel, stride=rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            width //= 2
            self.resblocks.append(nn.ModuleList(ResBlock(width, *block) for block in blocks))
        self.conv_post = conv(width, 1, 7, padding=3)

    def forward(self, x_BCT: Tensor) -> Tensor:
        x_BCT = self.conv_pre(x_BCT)
        for up, blocks in zip(self.ups, self.resblocks, strict=True):
            x_BCT, total_BCT = up(x_BCT), None
            for block in blocks:
                h_BCT = block(x_BCT)
                total_BCT = h_BCT if total_BCT is None else total_BCT + h_BCT
            x_BCT = total_BCT / len(blocks)
        return torch.tanh(self.conv_post(F.leaky_relu(x_BCT, 0.1)))


class PlainSimCodec(nn.Module):
    """`config`: that of a `mediatok` SimCodec with one codebook."""

    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.codebook = nn.Embedding(config.n_codes, config.vq_dim)

    def copy_from(self, model: nn.Module) -> "PlainSimCodec":
        """Take the weights of a `mediatok` SimCodec."""
        for name, value in model.state_dict().items():
            layer, _, kind = name.rpartition(".")
            if layer == "quantize.codebooks":
                self.codebook.weight.data.copy_(value)
            elif kind == "weight":  # where there is weight norm, this sets its two factors
                module = self.get_submodule(layer)
                module.weight = value if parametrize.is_parametrized(module) else nn.Parameter(value.clone())
            else:
                self.get_submodule(layer).bias.data.copy_(value)
        return self

    def quantize(self, latent_BCL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_NC = latent_BCL.transpose(1, 2).reshape(-1, latent_BCL.shape[1])
        codes_KC = self.codebook.weight
        distance_NK = (x_NC**2).sum(1, keepdim=True) + (codes_KC**2).sum(1) - 2 * x_NC @ codes_KC.T
        ids_N = distance_NK.argmin(1)
        similar_KK = 3 * codes_KC @ codes_KC.T
        spread = F.cross_entropy(similar_KK, torch.arange(len(codes_KC)))
        quantized_NC = self.codebook(ids_N)
        loss = 0.1 * spread + F.mse_loss(quantized_NC, x_NC.detach()) + 0.25 * F.mse_loss(quantized_NC.detach(), x_NC)
        quantized_NC = x_NC + (quantized_NC - x_NC).detach()
        quantized_BCL = quantized_NC.view(len(latent_BCL), -1, latent_BCL.shape[1]).transpose(1, 2)
        return quantized_BCL, loss, ids_N.view(len(latent_BCL), -1)

    def encode_waveform(self, wave_BT: Tensor) -> Tensor:
        return self.quantize(self.encoder(wave_BT[:, None]))[2]

    def decode_ids(self, ids_BL: Tensor) -> Tensor:
        return self.decoder(self.codebook(ids_BL).transpose(1, 2))[:, 0]
