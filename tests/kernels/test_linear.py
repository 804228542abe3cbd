"""Packed weights give what plain ones give, and can only be used."""

import pytest
import torch
import torch.nn.functional as F
from mediatok.core.errors import InvalidInput
from mediatok.generators.maskgit import MaskGIT
from mediatok.generators.xar import XAR
from mediatok.kernels import linear as module
from mediatok.kernels import precision
from mediatok.kernels.linear import PackedLinear, can_pack, pack_linears
from mediatok.nn.layers import Linear

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 33, 24), (3, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_agree(shape, bias):
    torch.manual_seed(0)
    linear = Linear(24, 40, bias=bias)
    x = torch.randn(*shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)
        transposed = x.transpose(0, -2)  # not contiguous
        torch.testing.assert_close(PackedLinear(linear)(transposed), linear(transposed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_no_derivative_is_lost(part):
    """Of x, weight or bias, where that alone is differentiated, backwards and forwards."""
    torch.manual_seed(0)
    given = [torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)]
    direction = torch.randn_like(given[part])

    def derivatives(function):
        def of_part(value):
            return function(*given[:part], value, *given[part + 1 :])

        wanted = given[part].clone().requires_grad_()
        of_part(wanted).square().sum().backward()
        return wanted.grad, torch.func.jvp(of_part, (given[part],), (direction,))[1]

    torch.testing.assert_close(derivatives(module.linear), derivatives(F.linear))


@pytest.mark.parametrize("network", ["vit", "uvit"])
def test_maskgit_draws_the_same_ids(network):
    torch.manual_seed(0)
    model = MaskGIT(
        network=network, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        codebook_size=50, num_tokens=9, num_classes=3,
    ).eval()  # fmt: skip
    labels, settings = torch.tensor([0, 2]), model.settings(6)
    expected = model.generate_ids(labels, settings, rngs(0, 1))
    model.pack_network()
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) >= 12
    assert torch.equal(model.generate_ids(labels, settings, rngs(0, 1)), expected)


def test_xar_makes_the_same_latents():
    torch.manual_seed(0)
    model = XAR(
        layout="cell", layout_size=2, grid=4, latent_channels=3, embed_dim=32, encoder_depth=2, decoder_depth=2,
        num_heads=2, num_classes=3,
    ).eval()  # fmt: skip
    labels, settings = torch.tensor([0, 2]), model.settings(5)
    expected = model.generate_latents(labels, settings, rngs(0, 1))
    model.pack_network()
    torch.testing.assert_close(model.generate_latents(labels, settings, rngs(0, 1)), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_packed_only_where_it_is_computed(monkeypatch):
    for fast in {False, precision.has_bfloat16_products()}:
        monkeypatch.setattr(precision, "has_bfloat16_products", lambda fast=fast: fast)
        linear = Linear(16, 8).bfloat16()
        network = torch.nn.Sequential(linear)
        x = torch.randn(5, 16, dtype=torch.bfloat16 if fast else torch.float32)
        with torch.inference_mode():
            expected = network(x)
            pack_linears(network)
            assert isinstance(network[0], PackedLinear) == fast
            torch.testing.assert_close(network(x), expected, rtol=2e-2, atol=2e-2)


def test_packed_models_are_not_saved_trained_or_moved(tmp_path):
    model = torch.nn.Sequential(Linear(4, 4))
    pack_linears(model)
    assert isinstance(model[0], PackedLinear)
    for act in (model.state_dict, model.train, model.double, lambda: model.to("meta")):
        with pytest.raises(InvalidInput, match="load the model again"):
            act()
    model.eval().to("cpu").float()  # nothing to do
    generator = MaskGIT(
        network="uvit", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        codebook_size=8, num_tokens=4, num_classes=3,
    )  # fmt: skip
    generator.pack_network()
    with pytest.raises(InvalidInput, match="load the model again"):
        generator.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_torch_without_onednn_is_left_alone(monkeypatch):
    monkeypatch.setattr(module.torch.backends.mkldnn, "is_available", lambda: False)
    model = MaskGIT(
        network="uvit", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        codebook_size=8, num_tokens=4, num_classes=3,
    )  # fmt: skip
    model.pack_network()
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
