"""MaskGIT-VQGAN against the recorded outputs of the authors' code, and its fast paths against the plain ones."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mediatok.core.errors import InvalidInput
from mediatok.kernels import precision
from mediatok.nn import conv_blocks
from mediatok.nn.conv_blocks import UpsampleConv
from mediatok.tokenizers.image.maskgit_vqgan import MaskGitVQGAN, VQGANDecoder
from safetensors.torch import load_file

CASE = Path(__file__).parents[1] / "parity" / "titok" / "maskgit_vqgan"
SIZES = {"image_size": 32, "hidden_channels": 32, "channel_multipliers": (2, 1), "num_res_blocks": 1, "z_channels": 24}


@pytest.fixture(scope="module")
def io():
    return load_file(CASE / "io.safetensors")


@pytest.fixture
def vqgan():
    model = MaskGitVQGAN(**SIZES, codebook_size=64)
    model.load_state_dict(load_file(CASE / "weights.safetensors"))
    return model.eval()


def test_matches_the_authors_code(vqgan, io):
    taps = {}
    encoder, decoder = vqgan.encoder, vqgan.decoder
    modules = {"enc.conv_in": encoder.conv_in, "enc.mid0": encoder.mid[0], "enc.z": encoder}
    modules |= {f"enc.down{i}": level for i, level in enumerate(encoder.down)}
    modules |= {"dec.conv_in": decoder.conv_in, "dec.mid0": decoder.mid[0]}
    modules |= {f"dec.up{i}": level for i, level in enumerate(decoder.up)}
    for name, module in modules.items():
        module.register_forward_hook(lambda _module, _args, output, name=name: taps.update({name: output.clone()}))
    with torch.no_grad():
        output = vqgan(io["image"])
    for name, tap in taps.items():
        torch.testing.assert_close(tap, io[name], atol=2e-5, rtol=1e-4, msg=name)
    assert torch.equal(output.ids_BL, io["indices"])
    torch.testing.assert_close(output.decoded, io["recon"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.vq.quantizer_loss, io["loss"], atol=0, rtol=1e-5)


@torch.no_grad()
def test_inference_methods_match_the_authors_code(vqgan, io):
    assert torch.equal(vqgan.encode_pixels(io["image"]), io["indices"])
    soft, ids = vqgan.encode_soft(io["image"], temperature=0.7)
    torch.testing.assert_close(soft, io["soft_code"], atol=2e-5, rtol=1e-4)
    assert torch.equal(ids, io["soft_code.indices"])
    for name in ("square_codes", "grid_codes"):
        torch.testing.assert_close(vqgan.decode_ids(io[name]), io[f"{name}.image"], atol=1e-4, rtol=0)


def test_released_keys_and_sizes():
    with torch.device("meta"):
        model = MaskGitVQGAN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 54_515_587
    assert model.max_tokens == 256
    assert model.vocab_size == 1024


@pytest.mark.parametrize("size", [(40, 31), (7, 5)])
def test_folded_upsampling_equals_the_two_steps(size, monkeypatch):
    monkeypatch.setattr(conv_blocks, "MIN_POSITIONS_TO_FOLD", 0)
    torch.manual_seed(0)
    layer, x = UpsampleConv(16), torch.randn(2, 16, *size, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    upstream = torch.randn_like(plain)
    inputs = (x, layer.weight, layer.bias)
    folded = layer(x)
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(
        torch.autograd.grad(folded, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("has_matrix_units", [True, False])
@torch.no_grad()
def test_bfloat16_weights_decode_closely(has_matrix_units, vqgan, io, monkeypatch):
    """Both ways: products in bfloat16, and fp32 products of bfloat16 weights on CPUs without bf16 matrix units."""
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: has_matrix_units)
    vqgan.cast(torch.bfloat16)
    assert vqgan.decoder.conv_in.weight.dtype == torch.bfloat16
    decoded = vqgan.decode_ids(io["square_codes"])
    assert decoded.dtype == torch.float32
    scale = io["square_codes.image"].abs().max()
    assert (decoded - io["square_codes.image"]).abs().max() < 0.06 * scale
    assert vqgan.encode_pixels(io["image"]).shape == io["indices"].shape


def test_saves_and_loads(vqgan, io, tmp_path):
    vqgan.save_pretrained(tmp_path)
    again = MaskGitVQGAN.from_pretrained(tmp_path)
    assert again.fingerprint == vqgan.fingerprint
    with torch.no_grad():
        assert torch.equal(again.decode_ids(io["square_codes"]), vqgan.decode_ids(io["square_codes"]))


def test_gradients_reach_every_parameter(vqgan, io):
    vqgan(io["image"]).decoded.square().mean().backward()
    missing = [name for name, p in vqgan.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == ["quantize.embedding.weight"]  # reached by the quantizer's own losses


def test_refuses_what_it_cannot_read(vqgan):
    with pytest.raises(InvalidInput, match="multiples of 2"):
        vqgan.encode_pixels(torch.zeros(1, 3, 8, 7))
    with pytest.raises(InvalidInput, match="do not form a square"):
        vqgan.decode_ids(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(InvalidInput, match=r"\[0, 64\)"):
        vqgan.decode_ids(torch.full((1, 9), 64))
    with pytest.raises(InvalidInput, match="int64"):
        vqgan.decode_ids(torch.zeros(1, 9))
    with pytest.raises(InvalidInput, match="whole grids"):
        vqgan.decode_ids(torch.zeros(2, 9, dtype=torch.int64), torch.tensor([9, 4]))


def test_decoder_output_is_contiguous_and_scaled():
    decoder = VQGANDecoder(32, (1, 2), 1, 8)
    with torch.no_grad():
        pixels = decoder(torch.randn(1, 8, 3, 5))
    assert pixels.shape == (1, 3, 6, 10)
    assert pixels.is_contiguous()
