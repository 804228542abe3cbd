"""The quantizer over scales: what it sums up is what training, decoding and generators see."""

import mediatok as mt
import pytest
import torch
from mediatok.nn.multiscale_vq import MultiScaleQuantizer, scales_in, waves

SCALES = (1, 4, 9, 16)
KINDS = {
    "interp": {},
    "query": {"resample": "query"},
    "interp lookup-free": {"codebook_size": 64, "lookup_free": True},
    "query lookup-free": {"codebook_size": 64, "resample": "query", "lookup_free": True},
}


def build(codebook_size=50, code_width=6, scales=SCALES, seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultiScaleQuantizer(codebook_size, code_width, scales, **changes)


def latents(batch=3, seed=0, length=16):
    return torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def quantize(request):
    return build(**request.param)


def test_training_and_inference_agree(quantize):
    z_BLC = latents()
    ids_BS = quantize.encode(z_BLC)
    assert ids_BS.shape == (3, 30)
    assert ids_BS.unique().numel() > 10
    assert 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < (64 if quantize.lookup_free else 50)
    sum_BLC, output = quantize(z_BLC)
    assert torch.equal(output.ids_BS, ids_BS)
    torch.testing.assert_close(quantize.sum_of(ids_BS), sum_BLC)


def test_scales_add_up(quantize):
    """`accumulate` step by step, `sum_of` prefixes and `forward` with fewer scales are the same sums."""
    z_BLC = latents()
    ids_BS, sum_BLC = quantize.encode(z_BLC), torch.zeros_like(z_BLC)
    for k, places in enumerate(quantize.slices):
        view_BkC = quantize.view(sum_BLC, k)
        assert view_BkC.shape == (3, SCALES[k], 6)
        torch.testing.assert_close(view_BkC.mean(1), sum_BLC.mean(1)) if 16 % SCALES[k] == 0 else None
        sum_BLC = quantize.accumulate(sum_BLC, k, ids_BS[:, places])
        torch.testing.assert_close(quantize.sum_of(ids_BS[:, : places.stop]), sum_BLC)
        torch.testing.assert_close(quantize(z_BLC, num_scales=k + 1)[0], sum_BLC)


def test_searched_rows_are_what_is_left(quantize):
    z_BLC = latents()
    output = quantize(z_BLC)[1]
    for k, places in enumerate(quantize.slices):
        before_BLC = quantize.sum_of(output.ids_BS[:, : places.start]) if k else torch.zeros_like(z_BLC)
        expected_BkC = quantize.resampler.down(z_BLC - before_BLC, k)
        torch.testing.assert_close(output.rows_BSC[:, places], expected_BkC, atol=1e-5, rtol=0)


def test_codes_are_the_nearest():
    quantize = build()
    output = quantize(latents())[1]
    distance_BSK = torch.cdist(output.rows_BSC, quantize.codebook.detach().expand(3, -1, -1))
    assert torch.equal(distance_BSK.argmin(-1), output.ids_BS)


@pytest.mark.parametrize("resample", ["interp", "query"])
def test_random_weights_already_interpolate(resample):
    """A smooth sequence goes down and up nearly as it was, so training starts with a sensible residual."""
    quantize = build(resample=resample)
    z_BLC = torch.linspace(-1, 1, 16)[None, :, None].expand(1, 16, 6).contiguous()
    back_BLC = quantize.resampler.up(quantize.resampler.down(z_BLC, 2), 2)
    assert torch.corrcoef(torch.stack([back_BLC.flatten(), z_BLC.flatten()]))[0, 1] > 0.9


def test_gradients(quantize):
    z_BLC = latents().requires_grad_()
    sum_BLC, output = quantize(z_BLC)
    upstream = torch.randn_like(sum_BLC)
    (gradient,) = torch.autograd.grad((sum_BLC * upstream).sum(), z_BLC, retain_graph=True)
    torch.testing.assert_close(gradient, upstream)  # straight through
    output.quantizer_loss.backward()
    assert z_BLC.grad.abs().sum() > 0
    for name, parameter in quantize.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0 or name == "resampler.up_key.weight", name


def test_training_lowers_what_is_left(quantize):
    optimizer = torch.optim.Adam(quantize.parameters(), 1e-2)
    z_BLC, losses = latents(8), []
    for _ in range(30):
        _, output = quantize(z_BLC)
        losses.append(output.codebook_loss.item())
        optimizer.zero_grad()
        output.quantizer_loss.backward()
        optimizer.step()
    assert losses[-1] < (1 if quantize.lookup_free else 0.9) * losses[0]  # signs have a size alone to learn


def test_entropy_wants_sure_and_even_bits():
    quantize = build(codebook_size=64, lookup_free=True)

    def loss(z_BLC):
        return float(quantize(z_BLC)[1].entropy_loss)

    even = torch.where(torch.arange(16) % 2 == 0, 5.0, -5.0)[None, :, None].expand(1, 16, 6)
    assert loss(even) < loss(torch.zeros(1, 16, 6)) + 1e-6
    assert loss(even) < loss(even.abs()) - 0.01
    assert float(build()(latents())[1].entropy_loss) == 0


def test_bfloat16_autocast_changes_nothing(quantize):
    z_BLC = latents()
    plain, _ = quantize(z_BLC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, output = quantize(z_BLC)
    assert torch.equal(plain, cast)
    assert output.quantizer_loss.dtype == torch.float32


def test_whole_scales():
    assert [scales_in(count, SCALES) for count in (1, 5, 14, 30)] == [1, 2, 3, 4]
    for count in (0, 2, 29, 31):
        with pytest.raises(mt.InvalidInput, match="end within a scale; whole scales end at 1, 5, 14, 30"):
            scales_in(count, SCALES)


def test_waves_tell_places():
    for tokens in (1, 9, 256):
        waves_kC = waves(tokens, 32)
        torch.testing.assert_close(waves_kC.norm(dim=1), torch.ones(tokens))
        assert torch.equal((waves_kC @ waves_kC.T).argmax(1), torch.arange(tokens))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resample": "cubic"}, "'interp' or 'query'"),
        ({"scales": (1, 4, 4)}, "growing"),
        ({"scales": ()}, "growing"),
        ({"scales": tuple(range(1, 258))}, "1 to 255"),
        ({"lookup_free": True}, "64, not codebook_size=50"),
    ],
)
def test_sizes_that_do_not_go_together(changes, reason):
    with pytest.raises(mt.InvalidInput, match=reason):
        build(**changes)
