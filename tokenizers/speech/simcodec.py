"""SimCodec: speech as one stream of tokens (GenSE, Yao et al. 2025, arXiv 2502.02942, section 3.2).

Strided convolutions make a latent vector of every 20 ms (or 10 ms) of a waveform, a quantizer makes an id of it, and a
HiFi-GAN decoder makes the waveform anew. Its parent HiFi-Codec (Yang et al. 2023, arXiv 2305.02765) differs in norms,
activations and in its four codebooks; one class is both.

Shape suffixes: B batch, T samples, L frames, C channels, Q codebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from math import ceil, floor, gcd, prod
from operator import attrgetter

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from ...core.base import TokenizerOutput
from ...core.errors import InvalidInput
from ...core.speech_tokenizer import SpeechTokenizer
from ...kernels.convolution import can_pack, pack_convolutions
from ...kernels.precision import compute_dtype
from ...nn.grouped_vq import GroupedResidualVQ
from ...nn.layers import Conv1d, ConvTranspose1d, GroupNorm, LayerNorm

SLOPE = 0.1  # of every leaky ReLU ...
HIFICODEC_LAST_SLOPE = 0.01  # ... but the last one of HiFi-Codec's encoder
NORM_EPS = 1e-6
CHANNELS_PER_NORM = 16  # in a group of HiFi-Codec's norms
EDGE_KERNEL = 7  # of the convolutions next to the waveform, and of the decoder's first
RESIDUAL_GAIN = 0.3  # of random weights at the end of a residual branch
FIRST_LOUDNESS = 0.2  # of what an untrained decoder gives
ARCHITECTURES = ("simcodec", "hificodec")

Tap = Callable[[str, Tensor], None]  # gets the name and value of what is computed on the way; for comparisons


def activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def sum_(tensors: Iterable[Tensor]) -> Tensor:
    """The sum, in the place of the first."""
    return reduce(Tensor.add_, tensors)


class ActivatedConv1d(Conv1d):
    """A convolution of the leaky ReLU of its input."""

    input_slope = SLOPE

    def forward(self, x_BCT: Tensor) -> Tensor:
        return super().forward(activation(x_BCT))


class ResBlock(nn.Module):
    """x = x + conv(act(dilated conv(act(x)))) for each of its dilations."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(
            ActivatedConv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(
            ActivatedConv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations
        )

    def forward(self, x_BCT: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x_BCT = second(first(x_BCT)).add_(x_BCT)  # in place: nothing else needs what a convolution returned
        return x_BCT


class ChannelNorm(LayerNorm):
    """Layer norm over the channels of [B, C, T]."""

    def forward(self, x_BCT: Tensor) -> Tensor:
        return super().forward(x_BCT.transpose(1, 2)).transpose(1, 2)


def _norm(width: int, groups: int | None) -> nn.Module:
    return ChannelNorm(width, NORM_EPS) if groups is None else GroupNorm(groups, width, NORM_EPS)


class Encoder(nn.Module):
    """Waveform [B, 1, T] to latents [B, C, L]. Walks the sizes, which are the decoder's, from the back."""

    def __init__(self, sizes: dict, architecture: str, norm_groups: Sequence[int]):
        super().__init__()
        self.is_hificodec = architecture == "hificodec"
        width = sizes["en_filters"]
        self.conv_pre = Conv1d(1, width, EDGE_KERNEL, padding=EDGE_KERNEL // 2)
        self.downs, self.resblocks, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, (rate, kernel) in enumerate(reversed(list(zip(sizes["rates"], sizes["kernels"], strict=True)))):
            self.downs.append(Conv1d(width, 2 * width, kernel, stride=rate, padding=(kernel - rate) // 2))
            width *= 2
            blocks = reversed(list(zip(sizes["block_kernels"], sizes["block_dilations"], strict=True)))
            self.resblocks.append(nn.ModuleList(ResBlock(width, *block) for block in blocks))
            groups = norm_groups[stage] if self.is_hificodec else None
            self.norms.append(nn.ModuleList(_norm(width, groups) for _ in self.resblocks[-1]))
        self.conv_post = Conv1d(width, sizes["vq_dim"], 3, padding=1)

    def forward(self, x_BCT: Tensor, tap: Tap | None = None) -> Tensor:
        x_BCT = self.conv_pre(x_BCT)
        _tell(tap, "conv_pre", x_BCT)
        for stage, (down, blocks, norms) in enumerate(zip(self.downs, self.resblocks, self.norms, strict=True)):
            x_BCT = down(activation(x_BCT) if self.is_hificodec else x_BCT)
            _tell(tap, f"down{stage}", x_BCT)
            total_BCT = None
            for block, norm in zip(blocks, norms, strict=True):
                h_BCT = block(x_BCT)
                total_BCT = norm(h_BCT if total_BCT is None else h_BCT.add_(total_BCT))
            x_BCT = total_BCT.div_(len(blocks))
            _tell(tap, f"stage{stage}", x_BCT)
        _tell(tap, "before_post", x_BCT)
        return self.conv_post(F.leaky_relu(x_BCT, HIFICODEC_LAST_SLOPE if self.is_hificodec else SLOPE))


class Decoder(nn.Module):
    """Codes [B, C, L] to a waveform [B, 1, T] in [-1, 1]."""

    def __init__(self, sizes: dict, architecture: str):
        super().__init__()
        self.is_hificodec = architecture == "hificodec"
        width = sizes["de_filters"] * 2 ** len(sizes["rates"])
        self.conv_pre = Conv1d(sizes["vq_dim"], width, EDGE_KERNEL, padding=EDGE_KERNEL // 2)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(sizes["rates"], sizes["kernels"], strict=True):
            self.ups.append(ConvTranspose1d(width, width // 2, kernel, stride=rate, padding=(kernel - rate) // 2))
            width //= 2
            blocks = zip(sizes["block_kernels"], sizes["block_dilations"], strict=True)
            self.resblocks.append(nn.ModuleList(ResBlock(width, *block) for block in blocks))
        self.conv_post = Conv1d(width, 1, EDGE_KERNEL, padding=EDGE_KERNEL // 2)

    def forward(self, x_BCT: Tensor, tap: Tap | None = None) -> Tensor:
        x_BCT = self.conv_pre(x_BCT)
        _tell(tap, "conv_pre", x_BCT)
        for stage, (up, blocks) in enumerate(zip(self.ups, self.resblocks, strict=True)):
            x_BCT = up(activation(x_BCT) if self.is_hificodec else x_BCT)
            _tell(tap, f"up{stage}", x_BCT)
            x_BCT = sum_(block(x_BCT) for block in blocks).div_(len(blocks))
        x_BCT = F.leaky_relu_(x_BCT, SLOPE)
        _tell(tap, "before_post", x_BCT)
        return self.conv_post(x_BCT).tanh()


class SimCodec(SpeechTokenizer):
    """A convolutional speech codec. The defaults are SimCodec at 50 tokens a second with the widths assumed for it.

    Args:
        sample_rate: samples a second.
        en_filters, de_filters: width of the encoder's first and of the decoder's last layers; it doubles at each stage.
        vq_dim: channels of a latent vector.
        upsample_rates, upsample_kernel_sizes: of the decoder's stages; the encoder goes through them backwards. Their
            product is the number of samples of a frame.
        resblock_kernel_sizes, resblock_dilation_sizes: of the residual blocks of each stage.
        n_q, n_code_groups, n_codes: residual layers, groups in each, and codes in each codebook.
        codebook_loss_lambda, commitment_loss_lambda, spread_loss_lambda: weights of the quantizer's losses; HiFi-Codec
            has no third one.
        architecture: "simcodec" or "hificodec" (group norms, activations before the strided convolutions).
        norm_groups: groups of HiFi-Codec's group norms, for each of the encoder's stages; None: one for 16 channels.

    Raises:
        InvalidInput: sizes that do not go together.
    """

    fingerprint_weights = ("quantize.",)

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 16000,
        en_filters: int = 32,
        de_filters: int = 32,
        vq_dim: int = 512,
        upsample_rates: tuple[int, ...] = (8, 5, 4, 2),
        upsample_kernel_sizes: tuple[int, ...] = (16, 11, 8, 4),
        resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11),
        resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3,
        n_q: int = 1,
        n_code_groups: int = 1,
        n_codes: int = 8192,
        codebook_loss_lambda: float = 1.0,
        commitment_loss_lambda: float = 0.25,
        spread_loss_lambda: float = 0.1,
        architecture: str = "simcodec",
        norm_groups: tuple[int, ...] | None = None,
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise InvalidInput(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}")
        _check_sizes(upsample_rates, upsample_kernel_sizes, resblock_kernel_sizes, resblock_dilation_sizes)
        widths = [en_filters * 2 ** (stage + 1) for stage in range(len(upsample_rates))]
        norm_groups = list(norm_groups or [max(1, width // CHANNELS_PER_NORM) for width in widths])
        fits = len(norm_groups) == len(widths) and list(map(gcd, widths, norm_groups)) == norm_groups
        if architecture == "hificodec" and not fits:
            raise InvalidInput(f"norm_groups {norm_groups} do not divide the stages' widths {widths}")
        if vq_dim % n_code_groups:
            raise InvalidInput(f"vq_dim {vq_dim} is not a multiple of n_code_groups {n_code_groups}")
        sizes = {
            "en_filters": en_filters, "de_filters": de_filters, "vq_dim": vq_dim, "rates": tuple(upsample_rates),
            "kernels": tuple(upsample_kernel_sizes), "block_kernels": tuple(resblock_kernel_sizes),
            "block_dilations": tuple(map(tuple, resblock_dilation_sizes)),
        }  # fmt: skip
        self.encoder = Encoder(sizes, architecture, norm_groups)
        self.quantize = GroupedResidualVQ(
            n_q, n_code_groups, n_codes, vq_dim, codebook_loss_lambda, commitment_loss_lambda,
            spread_loss_lambda,
        )  # fmt: skip
        self.decoder = Decoder(sizes, architecture)
        self._packed_fingerprint = ""
        self._initialise()

    @property
    def hop_length(self) -> int:
        return prod(self.config.upsample_rates)

    @property
    def vocab_size(self) -> int:
        return self.config.n_codes

    @property
    def num_codebooks(self) -> int:
        return self.config.n_q * self.config.n_code_groups

    @property
    def context_frames(self) -> int | None:
        if self.config.architecture == "hificodec":
            return None  # group norms average over the whole clip
        return max(self._encoder_context(), self._decoder_context())

    def forward(self, wave_BT: Tensor, quantized: bool = True) -> TokenizerOutput:
        """Encode, quantize and decode `wave_BT`, fp32 in [-1, 1]: the training pass; decoded is fp32 [B, T].

        quantized: False decodes the latents themselves, for the first steps of training; there are no ids then.
        """
        latent_BCL = self.encode_latent(self.check_wave(wave_BT))
        if not quantized:
            return TokenizerOutput(self.decode_latent(latent_BCL))
        vq = self.quantize(latent_BCL)
        ids = vq.ids_BLQ[..., 0] if self.num_codebooks == 1 else vq.ids_BLQ
        return TokenizerOutput(self.decode_latent(vq.quantized_BCL), ids, vq)

    def encode_latent(self, wave_BT: Tensor, tap: Tap | None = None) -> Tensor:
        """Latents [B, C, L] before quantization."""
        return self.encoder(wave_BT[:, None].to(self._dtype(self.encoder)), tap)

    def decode_latent(self, codes_BCL: Tensor, tap: Tap | None = None) -> Tensor:
        """Waveform fp32 [B, T] of codes [B, C, L]."""
        return self.decoder(codes_BCL.to(self._dtype(self.decoder)), tap)[:, 0].float()

    def encode_waveform(self, wave_BT: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Ids int64 [B, L], or [B, L, Q] with several codebooks, layer by layer; see `SpeechTokenizer`."""
        return self.by_length(wave_BT, lengths_B, self._encode)

    def decode_ids(self, ids: Tensor) -> Tensor:
        """Waveform fp32 [B, L * hop_length] in [-1, 1].

        Where there are residual layers, ids [B, L, q] of the first ones alone decode, too.
        """
        return self.decode_latent(self.quantize.lookup(self.check_ids(ids)))

    def check_ids(self, ids: Tensor) -> Tensor:
        """Return ids as [B, L, q]; see `SpeechTokenizer.check_ids`."""
        groups, codebooks = self.config.n_code_groups, self.num_codebooks
        if codebooks == 1:
            return super().check_ids(ids)[..., None]
        if ids.ndim == 3 and ids.dtype == torch.int64 and 0 < ids.shape[2] < codebooks and ids.shape[2] % groups == 0:
            super().check_ids(F.pad(ids, (0, codebooks - ids.shape[2])))
            return ids
        return super().check_ids(ids)

    def pack_network(self) -> None:
        """On the CPU, lay the weights out for the processor, in their place: they can only be used from then on.

        Results agree to rounding. Long kernels take about twice their memory.
        """
        if can_pack() and self.device.type == "cpu":
            self._packed_fingerprint = self.fingerprint
            self.eval().requires_grad_(False)
            pack_convolutions(self.encoder)
            pack_convolutions(self.decoder)

    @property
    def fingerprint(self) -> str:
        return self._packed_fingerprint or super().fingerprint

    def set_weight_norm(self, on: bool) -> None:
        """Train with weight norm on every convolution but the encoder's last, as the authors; or fold it again.

        Folded weights give the same results, and are what is saved.
        """
        for module in self.modules():
            if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) or module is self.encoder.conv_post:
                continue
            if parametrize.is_parametrized(module) and not on:
                parametrize.remove_parametrizations(module, "weight")
            elif on and not parametrize.is_parametrized(module):
                weight_norm(module)

    def save_pretrained(self, save_directory, *args, **options) -> None:
        if not any(parametrize.is_parametrized(module) for module in self.modules()):
            super().save_pretrained(save_directory, *args, **options)
            return
        with torch.device("meta"):
            plain = SimCodec(**{key: value for key, value in self.config.items() if not key.startswith("_")})
        # A copy of this model would share the classes that weight norm made for its layers.
        plain.load_state_dict({name: attrgetter(name)(self).detach() for name in plain.state_dict()}, assign=True)
        plain.save_pretrained(save_directory, *args, **options)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Random weights that keep the signal's size from layer to layer, with small residual branches."""
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                continue
            is_up = isinstance(module, nn.ConvTranspose1d)
            fan_in = module.in_channels * module.kernel_size[0] / (module.stride[0] if is_up else 1)
            is_after_activation = "convs1" in name or name.endswith("conv_post")
            gain = RESIDUAL_GAIN if "convs2" in name else 2**0.5 if is_after_activation else 1.0
            gain *= FIRST_LOUDNESS if name == "decoder.conv_post" else 1.0
            nn.init.normal_(module.weight, std=gain / fan_in**0.5)
            nn.init.zeros_(module.bias)

    def _encode(self, wave_BT: Tensor) -> Tensor:
        ids_BLQ = self.quantize.nearest(self.encode_latent(wave_BT))
        return ids_BLQ[..., 0] if self.num_codebooks == 1 else ids_BLQ

    @staticmethod
    def _dtype(network: Encoder | Decoder) -> torch.dtype:
        bias = network.conv_post.bias
        return compute_dtype(bias.dtype, bias.device)

    # How far a frame sees: the range of inputs of a range of outputs, followed back through the layers.

    def _block_reach(self) -> int:
        sizes = zip(self.config.resblock_kernel_sizes, self.config.resblock_dilation_sizes, strict=True)
        return max(sum((kernel - 1) // 2 * (dilation + 1) for dilation in dilations) for kernel, dilations in sizes)

    def _encoder_context(self) -> int:
        low, high, reach = -1, 1, self._block_reach()  # the last convolution has three taps
        for rate, kernel in zip(self.config.upsample_rates, self.config.upsample_kernel_sizes, strict=True):
            padding = (kernel - rate) // 2
            low, high = (low - reach) * rate - padding, (high + reach) * rate - padding + kernel - 1
        low, high = low - EDGE_KERNEL // 2, high + EDGE_KERNEL // 2
        return ceil(max(-low, high - self.hop_length + 1) / self.hop_length)

    def _decoder_context(self) -> int:
        low, high, reach = -(EDGE_KERNEL // 2), self.hop_length - 1 + EDGE_KERNEL // 2, self._block_reach()
        stages = zip(self.config.upsample_rates, self.config.upsample_kernel_sizes, strict=True)
        for rate, kernel in reversed(list(stages)):
            padding = (kernel - rate) // 2
            low = ceil((low - reach + padding - kernel + 1) / rate)
            high = floor((high + reach + padding) / rate)
        return max(-low, high) + EDGE_KERNEL // 2


def _check_sizes(
    rates: Sequence[int], kernels: Sequence[int], block_kernels: Sequence[int], block_dilations: Sequence[Sequence[int]]
) -> None:
    if len(rates) != len(kernels) or len(block_kernels) != len(block_dilations) or not rates or not block_kernels:
        raise InvalidInput(
            f"{len(rates)} upsample_rates and {len(kernels)} upsample_kernel_sizes, {len(block_kernels)} "
            f"resblock_kernel_sizes and {len(block_dilations)} resblock_dilation_sizes: each pair must be of one length"
        )
    for rate, kernel in zip(rates, kernels, strict=True):
        if kernel < rate or (kernel - rate) % 2:
            raise InvalidInput(f"a kernel of {kernel} with a rate of {rate} does not keep whole frames")
    if any(kernel % 2 == 0 for kernel in block_kernels):
        raise InvalidInput(f"resblock_kernel_sizes must be odd, not {tuple(block_kernels)}")


def _tell(tap: Tap | None, name: str, value: Tensor) -> None:
    if tap is not None:
        tap(name, value)


@torch.no_grad()
def merge_codebooks(stage1: SimCodec, counts_GK: Tensor, keep: tuple[int, int]) -> SimCodec:
    """SimCodec's second stage out of its first (section 3.2): two groups' codebooks become one.

    Its codes are all pairs of the `keep[0]` most used codes of the first group and the `keep[1]` most used of the
    second; pair (a, b) has the number a * keep[1] + b, by their ranks, and decodes as it did before. Encoder and
    decoder are copied.

    counts_GK: how often each code of each group was used, [2, K].

    Raises:
        InvalidInput: another quantizer than one layer of two groups, or more codes to keep than there are.
    """
    if (stage1.config.n_q, stage1.config.n_code_groups) != (1, 2):
        raise InvalidInput(f"{stage1.name} must have one layer of two groups to be merged")
    if not all(1 <= kept <= stage1.config.n_codes for kept in keep):
        raise InvalidInput(f"{keep[0]} and {keep[1]} codes cannot be kept of {stage1.config.n_codes}")
    config = {key: value for key, value in stage1.config.items() if not key.startswith("_")}
    merged = SimCodec(**config | {"n_code_groups": 1, "n_codes": prod(keep)})
    merged.encoder.load_state_dict(stage1.encoder.state_dict())
    merged.decoder.load_state_dict(stage1.decoder.state_dict())
    most_used = [
        codes[counts.argsort(descending=True, stable=True)[:kept]]
        for codes, counts, kept in zip(stage1.quantize.layer(0), counts_GK, keep, strict=True)
    ]
    first = rearrange(most_used[0], "a c -> a 1 c").expand(-1, keep[1], -1)
    second = rearrange(most_used[1], "b c -> 1 b c").expand(keep[0], -1, -1)
    merged.quantize.codebooks[0].copy_(torch.cat([first, second], dim=2).flatten(0, 1))
    return merged


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released models, by our name; SimCodec's own sizes are assumed."""
    hificodec = {"architecture": "hificodec", "n_q": 2, "n_code_groups": 2, "n_codes": 1024, "spread_loss_lambda": 0.0}
    fast = {"upsample_rates": (8, 5, 3, 2), "upsample_kernel_sizes": (16, 11, 7, 4)}
    return {
        "simcodec-50hz": {},
        "simcodec-100hz": {"upsample_rates": (5, 4, 4, 2), "upsample_kernel_sizes": (11, 8, 8, 4)},
        "hifi-codec-16k-320d": hificodec,
        "hifi-codec-16k-320d-large-universal": hificodec,
        "hifi-codec-24k-320d": hificodec | {"sample_rate": 24000},
        "hifi-codec-24k-240d": hificodec | fast | {"sample_rate": 24000},
    }
