"""The KL autoencoder: latents by mean or draw, any size, its scale and fingerprint, training of the decoder alone."""

import mediatok as mt
import pytest
import torch
from diffusers import AutoencoderKL
from mediatok.core.errors import InvalidInput
from mediatok.nn.gaussian import DiagonalGaussian
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from PIL import Image


def model(**changes):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "latent_channels": 3, "block_out_channels": (8, 8, 16), "layers_per_block": 1}
    return KLAutoencoder(**sizes | {"norm_num_groups": 4, "scaling_factor": 0.5} | changes).eval()


@torch.inference_mode()
def test_mean_and_draws():
    vae, pixels = model(), torch.rand(2, 3, 16, 16)
    mean = vae.encode_latents(pixels)
    assert mean.shape == (2, 3, 4, 4)
    draws = [vae.encode_latents(pixels, torch.Generator().manual_seed(seed), sample=True) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    moments = vae.encode_moments(pixels)
    torch.testing.assert_close(mean, moments[:, :3] * 0.5)
    torch.testing.assert_close(vae.decode_latents(mean), (vae.vae.decode(mean / 0.5).sample + 1) / 2)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(17, 30), (4, 40), (16, 16)])
def test_sides_are_rounded_down(height, width):
    vae = model()
    latents = vae.encode_latents(torch.rand(1, 3, height, width))
    assert latents.shape == (1, 3, height // 4, width // 4)
    assert vae.decode_latents(latents).shape == (1, 3, height // 4 * 4, width // 4 * 4)


def test_log_variance_is_clamped():
    assert DiagonalGaussian(torch.tensor([0.0, 100.0]).view(1, 2, 1, 1)).logvar.item() == 20
    assert DiagonalGaussian(torch.tensor([0.0, -100.0]).view(1, 2, 1, 1)).logvar.item() == -30


def test_the_scale_gives_unit_variance():
    vae, pixels = model(), torch.rand(400, 3, 16, 16)
    vae.calibrate(pixels)
    with torch.inference_mode():
        draws = vae.encode_latents(pixels, torch.Generator().manual_seed(5), sample=True)
    assert float(draws.std()) == pytest.approx(1, abs=0.05)
    assert vae.vae.config.scaling_factor == vae.config.scaling_factor


def test_the_fingerprint_follows_the_encoder_alone(tmp_path):
    vae = model()
    before = vae.fingerprint
    torch.nn.init.normal_(vae.vae.decoder.conv_out.weight)
    assert vae.fingerprint == before
    vae.save_pretrained(tmp_path / "m")
    assert mt.load(tmp_path / "m").fingerprint == mt.load(tmp_path / "m", dtype="bfloat16").fingerprint == before
    torch.nn.init.normal_(vae.vae.quant_conv.weight)
    assert vae.fingerprint != before


def test_freezing_the_encoder_leaves_the_decoder():
    vae = model().train()
    vae.freeze_encoder()
    output = vae(torch.rand(2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    output.decoded.mean().backward()
    trained = {name.split(".")[1] for name, parameter in vae.named_parameters() if parameter.grad is not None}
    assert trained == {"post_quant_conv", "decoder"}


def test_pictures_of_any_size_are_reconstructed_and_ids_refused():
    vae = model()
    assert vae.reconstruct(Image.new("RGB", (50, 30))).size == (16, 16)
    with pytest.raises(InvalidInput, match="continuous"):
        vae.encode(Image.new("RGB", (16, 16)))
    with pytest.raises(InvalidInput, match="continuous"):
        vae.encode_pixels(torch.rand(1, 3, 16, 16))
    with pytest.raises(InvalidInput, match="multiple of 4"):
        model(image_size=18)
    assert isinstance(vae.vae, AutoencoderKL)


def test_the_shipped_one():
    vae = mt.load("kl-tiny")
    assert vae.latent_shape == (8, 8, 8)
    assert vae.max_tokens == 64
