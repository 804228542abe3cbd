"""Losses of codecs against their formulas written out, and the discriminators against the published ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mediatok.core.base import TokenizerOutput
from mediatok.training.codec_recipe import CodecLossRecipe
from mediatok.training.speech_discriminators import PERIODS, STFT_SIZES, SpeechDiscriminator
from mediatok.training.speech_losses import (
    CodecLoss,
    LogMel,
    SpectralDistance,
    discriminator_gan_loss,
    feature_loss,
    generator_gan_loss,
)

RATE = 16000


def waves(num_samples=4000):
    rng = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(2, num_samples, generator=rng), 0.1 * torch.randn(2, num_samples, generator=rng)


def plain_magnitudes(wave_T, n_fft, hop):
    """Frame by frame, by the definition of the discrete Fourier transform."""
    margin = (n_fft - hop) // 2
    padded = np.pad(wave_T.numpy().astype(np.float64), margin, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    turns = np.exp(-2j * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft)
    starts = range(0, len(padded) - n_fft + 1, hop)
    return np.stack([np.sqrt(abs(turns @ (window * padded[s : s + n_fft])) ** 2 + 1e-9) for s in starts], axis=1)


def plain_mel_filters(n_fft, num_mels=80):
    """Slaney's triangles: linear below 1 kHz, logarithmic above, of equal area."""

    def to_hz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    edges, bins = to_hz(np.linspace(0, top, num_mels + 2)), np.linspace(0, RATE / 2, n_fft // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]


@pytest.mark.filterwarnings("ignore:At least one mel")
@pytest.mark.parametrize(("n_fft", "hop"), [(1024, 240), (512, 120), (256, 60)])
def test_log_mel_by_its_definition(n_fft, hop):
    wave_T = waves()[0][0]
    plain = np.log(np.maximum(plain_mel_filters(n_fft) @ plain_magnitudes(wave_T, n_fft, hop), 1e-5))
    found = LogMel(RATE, n_fft)(wave_T[None])[0].numpy()
    assert found.shape == plain.shape
    np.testing.assert_allclose(found, plain, atol=2e-3)


def test_spectral_distance_by_its_definition():
    fake, real = waves()
    fake_FT, real_FT = (np.stack([plain_magnitudes(row, 128, 32) for row in side]) for side in (fake, real))
    convergence = np.sqrt(((real_FT - fake_FT) ** 2).sum()) / np.sqrt((real_FT**2).sum())
    distance = abs(np.log(np.maximum(real_FT, 1e-5)) - np.log(np.maximum(fake_FT, 1e-5))).mean()
    assert float(SpectralDistance(128)(fake, real)) == pytest.approx(convergence + distance, rel=1e-4)
    assert float(SpectralDistance(128)(real, real)) == 0


def test_gan_losses_by_their_definition():
    rng = torch.Generator().manual_seed(0)
    real, fake = ([[torch.randn(2, 3, n, generator=rng) for n in (5, 4)] for _ in range(3)] for _ in range(2))
    assert float(generator_gan_loss(fake)) == pytest.approx(sum(float(((m[1] - 1) ** 2).mean()) for m in fake))
    total, metrics = discriminator_gan_loss(real, fake)
    wanted = sum(float(((r[1] - 1) ** 2).mean() + (f[1] ** 2).mean()) for r, f in zip(real, fake, strict=True))
    assert float(total) == pytest.approx(wanted)
    assert float(metrics["logits_fake"]) == pytest.approx(sum(float(m[1].mean()) for m in fake) / 3)
    maps = [pair for sides in zip(real, fake, strict=True) for pair in zip(*sides, strict=True)]
    assert float(feature_loss(real, fake)) == pytest.approx(sum(float((r - f).abs().mean()) for r, f in maps))


@pytest.mark.filterwarnings("ignore:At least one mel")
def test_codec_loss_is_the_weighted_sum():
    fake, real = waves()
    recipe = CodecLossRecipe(mel_weights={1024: 45.0, 256: 2.0}, stft_weights={512: 0.5}, feature_weight=3.0)
    discriminator = SpeechDiscriminator(4, ("period", "stft")).eval().requires_grad_(False)
    vq = type("Output", (), {"quantizer_loss": torch.tensor(0.25)})
    total, metrics = CodecLoss(recipe, RATE)(TokenizerOutput(fake, None, vq), real, discriminator)
    mels = {n_fft: F.l1_loss(LogMel(RATE, n_fft)(fake), LogMel(RATE, n_fft)(real)) for n_fft in (1024, 256)}
    wanted = {
        "mel_loss": 45 * mels[1024] + 2 * mels[256],
        "stft_loss": 0.5 * SpectralDistance(512)(fake, real),
        "quantizer_loss": torch.tensor(2.5),
        "weighted_gan_loss": generator_gan_loss(discriminator(fake)),
        "feature_loss": 3 * feature_loss(discriminator(real), discriminator(fake)),
    }
    assert metrics.keys() == wanted.keys() | {"total_loss"}
    for name, value in wanted.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
    assert float(total) == pytest.approx(float(sum(wanted.values())), rel=1e-5)


def test_discriminators_have_the_published_sizes():
    """HiFi-GAN's five and three have 41.1 and 29.6 M parameters."""
    with torch.device("meta"):
        found = SpeechDiscriminator()
    count = {part: sum(p.numel() for p in getattr(found, part).parameters()) for part in ("period", "scale", "stft")}
    channels = (1, 32, 128, 512, 1024, 1024)
    body = sum(5 * a * b + 2 * b for a, b in pairwise(channels))
    assert count["period"] == 5 * (body + 3 * 1024 + 2)
    assert count["period"] == pytest.approx(41.1e6, rel=0.01)
    assert count["scale"] == pytest.approx(29.6e6, rel=0.01)
    assert len(found.stft) == 5


def test_feature_maps_have_their_shapes():
    maps = SpeechDiscriminator(4)(waves(3000)[0])
    assert len(maps) == len(PERIODS) + 3 + len(STFT_SIZES)
    by_period = maps[1]  # every third sample: 1,000 a column
    assert [tuple(m.shape) for m in by_period[:2]] == [(2, 4, 334, 3), (2, 16, 112, 3)]
    assert by_period[-1].shape == (2, 1, 13, 3)
    whole, half = maps[5], maps[6]
    assert [tuple(m.shape[1:]) for m in whole[:3]] == [(16, 3000), (16, 1500), (32, 750)]
    assert half[0].shape[2] == 1501
    frames, bins = 3000 // 256 + 1, 513
    assert maps[8][0].shape == (2, 4, frames, bins)
    assert maps[8][3].shape == (2, 4, frames, -(-bins // 8))
    assert maps[8][-1].shape == (2, 1, frames, -(-bins // 8))
