"""Losses of codec training: spectral distances, and the least-squares GAN with feature matching of HiFi-GAN.

SimCodec's own code has only its quantizer's loss; the rest is its parent HiFi-Codec's (arXiv 2305.02765, section 3.3).

Shape suffixes: B batch, T samples, N frames, K frequencies, M mel bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.base import TokenizerOutput
from .codec_recipe import CodecLossRecipe
from .speech_discriminators import FeatureMaps

Metrics = dict[str, Tensor]
NUM_MELS = 80
SMALLEST_MEL = 1e-5
SMALLEST_POWER = 1e-9


class LogMel(nn.Module):
    """Waveforms [B, T] -> natural logarithms of their mel spectra [B, M, N] (Slaney filters over magnitudes).

    hop: 15/64 of `n_fft`, which is 240 samples at 1024. The edges are mirrored by (n_fft - hop) / 2.
    """

    def __init__(self, sample_rate: int, n_fft: int = 1024, num_mels: int = NUM_MELS):
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.n_fft, self.hop = n_fft, n_fft * 15 // 64
        filters_KM = melscale_fbanks(
            n_fft // 2 + 1, 0.0, sample_rate / 2, num_mels, sample_rate, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters_KM", filters_KM, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, wave_BT: Tensor) -> Tensor:
        magnitude_BKN = magnitudes(wave_BT, self.n_fft, self.hop, self.window)
        mel_BMN = self.filters_KM.T @ magnitude_BKN
        return mel_BMN.clamp(min=SMALLEST_MEL).log()


def magnitudes(wave_BT: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """STFT magnitudes fp32 [B, K, N], smoothed at zero; the edges are mirrored by (n_fft - hop) / 2."""
    margin = (n_fft - hop) // 2
    padded_BT = F.pad(wave_BT.float()[:, None], (margin, margin), mode="reflect")[:, 0]
    spectrum_BKN = torch.stft(padded_BT, n_fft, hop, window=window, center=False, return_complex=True)
    return (spectrum_BKN.real.square() + spectrum_BKN.imag.square() + SMALLEST_POWER).sqrt()


class SpectralDistance(nn.Module):
    """Distance of STFT magnitudes (Parallel WaveGAN, arXiv 1910.11480, eq. 4): spectral convergence + log distance."""

    def __init__(self, n_fft: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, fake_BT: Tensor, real_BT: Tensor) -> Tensor:
        fake, real = (magnitudes(wave, self.n_fft, self.n_fft // 4, self.window) for wave in (fake_BT, real_BT))
        convergence = torch.linalg.vector_norm(real - fake) / torch.linalg.vector_norm(real).clamp(min=1e-5)
        distance = (real.clamp(min=SMALLEST_MEL).log() - fake.clamp(min=SMALLEST_MEL).log()).abs().mean()
        return convergence + distance


class CodecLoss(nn.Module):
    """Spectral + quantizer + adversarial + feature-matching term. Metrics: weighted terms, detached, 0-d."""

    def __init__(self, recipe: CodecLossRecipe, sample_rate: int):
        super().__init__()
        self.recipe = recipe
        self.mels = nn.ModuleList(LogMel(sample_rate, n_fft) for n_fft in recipe.mel_weights)
        self.spectra = nn.ModuleList(SpectralDistance(n_fft) for n_fft in recipe.stft_weights)

    def forward(
        self, output: TokenizerOutput, real_BT: Tensor, discriminator: nn.Module | None = None
    ) -> tuple[Tensor, Metrics]:
        """Give `discriminator` (its parameters frozen) only from `discriminator_start` on."""
        recipe, fake_BT = self.recipe, output.decoded.float()
        terms = {"mel_loss": fake_BT.new_zeros(())}
        for mel, weight in zip(self.mels, recipe.mel_weights.values(), strict=True):
            terms["mel_loss"] = terms["mel_loss"] + weight * F.l1_loss(mel(fake_BT), mel(real_BT))
        if recipe.stft_weights:
            pairs = zip(self.spectra, recipe.stft_weights.values(), strict=True)
            terms["stft_loss"] = sum(weight * spectrum(fake_BT, real_BT) for spectrum, weight in pairs)
        if output.vq is not None:
            terms["quantizer_loss"] = recipe.quantizer_weight * output.vq.quantizer_loss
        if discriminator is not None:
            with torch.no_grad():
                real_maps = discriminator(real_BT)
            fake_maps = discriminator(fake_BT)
            terms["weighted_gan_loss"] = recipe.discriminator_weight * generator_gan_loss(fake_maps)
            terms["feature_loss"] = recipe.feature_weight * feature_loss(real_maps, fake_maps)
        total = sum(terms.values())
        return total, {name: term.detach() for name, term in terms.items()} | {"total_loss": total.detach()}


def generator_gan_loss(fake: list[FeatureMaps]) -> Tensor:
    """Least squares: every logit of a decoded clip should be 1; a sum over the discriminators."""
    return torch.stack([(1 - maps[-1].float()).square().mean() for maps in fake]).sum()


def discriminator_gan_loss(real: list[FeatureMaps], fake: list[FeatureMaps]) -> tuple[Tensor, Metrics]:
    """Least squares: logits of real clips should be 1, of decoded ones 0; a sum over the discriminators."""
    real_losses = [(1 - maps[-1].float()).square().mean() for maps in real]
    fake_losses = [maps[-1].float().square().mean() for maps in fake]
    total = torch.stack(real_losses + fake_losses).sum()
    means = [torch.stack([maps[-1].float().mean() for maps in side]).mean() for side in (real, fake)]
    metrics = {"discriminator_loss": total, "logits_real": means[0], "logits_fake": means[1]}
    return total, {name: value.detach() for name, value in metrics.items()}


def feature_loss(real: list[FeatureMaps], fake: list[FeatureMaps]) -> Tensor:
    """Mean absolute difference of each feature map (logits too), summed over maps and discriminators."""
    pairs = [pair for maps in zip(real, fake, strict=True) for pair in zip(*maps, strict=True)]
    return torch.stack([F.l1_loss(fake_map.float(), real_map.float()) for real_map, fake_map in pairs]).sum()
