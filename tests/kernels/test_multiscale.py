"""multiscale_quantize against its definition, and its resampling against torch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mediatok.core.errors import InvalidInput
from mediatok.kernels import multiscale
from mediatok.kernels.multiscale import area_down, linear_up, multiscale_quantize, reference, smooth

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CASES = [
    (2, 16, 4, 50, (1, 4, 9, 16)),
    (3, 7, 5, 20, (1, 2, 3, 5)),  # ends before the latents' length
    (1, 1, 3, 9, (1,)),
    (0, 5, 3, 9, (1, 5)),
    (2, 25, 8, 300, (1, 4, 9, 16, 25)),
    (2, 16, 6, None, (1, 4, 9, 16)),  # lookup-free
]


def arguments(batch, length, channels, num_codes, scales, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    codes = 0.1 + normal(len(scales)).abs() if num_codes is None else normal(num_codes, channels)
    weight = normal(len(scales), channels, channels, 3) / 5
    return normal(batch, length, channels), codes, weight, normal(len(scales), channels) / 5, scales


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, device):
    args = arguments(*case, device=device)
    ids_BS, rows_BSC = multiscale_quantize(*args)
    expected_ids_BS, expected_rows_BSC = reference(*args)
    assert ids_BS.dtype == torch.int64
    assert torch.equal(ids_BS, expected_ids_BS)
    torch.testing.assert_close(rows_BSC, expected_rows_BSC, atol=1e-6, rtol=0)
    if case[0] and case[3]:
        assert ids_BS.unique().numel() > 1 or case[1] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(0, 5), st.integers(1, 6), st.data())
def test_equals_reference_among_ties(batch, doublings, channels, data):
    """Small integers without phi's convolution, and powers of two: sums are exact and many codes are equally near."""
    length = 2**doublings
    scales = sorted(2**k for k in data.draw(st.sets(st.integers(0, doublings), min_size=1, max_size=4)))
    generator = torch.Generator().manual_seed(length)
    z_BLC = torch.randint(-3, 4, (batch, length, channels), generator=generator).float()
    codes_KC = torch.randint(-2, 3, (12, channels), generator=generator).float()
    nothing = torch.zeros(len(scales), channels, channels, 3), torch.zeros(len(scales), channels)
    ids_BS, _ = multiscale_quantize(z_BLC, codes_KC, *nothing, scales)
    assert torch.equal(ids_BS, reference(z_BLC, codes_KC, *nothing, scales)[0])


def test_an_item_does_not_depend_on_its_batch():
    args = arguments(5, 16, 4, 50, (1, 4, 9, 16))
    whole_BS, _ = multiscale_quantize(*args)
    for row in range(5):
        assert torch.equal(multiscale_quantize(args[0][row : row + 1], *args[1:])[0][0], whole_BS[row])


@pytest.mark.parametrize(
    ("length", "tokens"), [(16, 1), (16, 4), (16, 9), (16, 16), (7, 5), (256, 169), (5, 2), (2, 1)]
)
def test_resampling_is_torchs(length, tokens):
    x_BLC = torch.randn(2, length, 3, dtype=torch.float64)
    expected = F.interpolate(x_BLC.transpose(1, 2), tokens, mode="area").transpose(1, 2)
    small_BkC = area_down(x_BLC, tokens)
    torch.testing.assert_close(small_BkC, expected)
    expected = F.interpolate(small_BkC.transpose(1, 2), length, mode="linear").transpose(1, 2)
    torch.testing.assert_close(linear_up(small_BkC, length), expected)


def test_smoothing_is_half_a_convolution():
    x_BLC = torch.randn(2, 9, 4, dtype=torch.float64)
    conv = torch.nn.Conv1d(4, 4, 3, padding=1).double()
    expected = (x_BLC + conv(x_BLC.transpose(1, 2)).transpose(1, 2)) / 2
    torch.testing.assert_close(smooth(x_BLC, conv.weight, conv.bias), expected)


def test_resampling_trains_after_inference():
    """What the resampling keeps between calls must be of use to a gradient."""
    multiscale._area.cache_clear()
    multiscale._linear.cache_clear()
    with torch.inference_mode():
        linear_up(area_down(torch.randn(1, 10, 2, dtype=torch.float64), 4), 10)
    x_BLC = torch.randn(1, 10, 2, dtype=torch.float64, requires_grad=True)
    linear_up(area_down(x_BLC, 4), 10).sum().backward()
    assert x_BLC.grad.abs().min() > 0


def test_bits_and_signs():
    ids = torch.arange(2**5)
    signs = multiscale.signs_of(ids, 5)
    assert torch.equal(multiscale.bits_of(signs), ids)
    assert signs.unique().tolist() == [-1, 1]
    assert multiscale.signs(torch.tensor([0.0, -0.0, 2.0])).tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(16, 4)},
        {1: torch.zeros(0, 4)},
        {1: torch.zeros(50, 3)},
        {1: torch.zeros(3)},
        {2: torch.zeros(4, 4, 4, 5)},
        {3: torch.zeros(3, 4)},
        {4: (1, 4, 9, 17)},
        {4: (0, 4, 9, 16)},
        {4: ()},
    ],
)
def test_refuses_wrong_shapes(change):
    args = list(arguments(2, 16, 4, 50, (1, 4, 9, 16)))
    for index, value in change.items():
        args[index] = value
    for function in (multiscale_quantize, reference):
        with pytest.raises(InvalidInput, match="multiscale_quantize needs latents"):
            function(*args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]])
def test_opcheck(case, device):
    *tensors, scales = arguments(*case, device=device)
    torch.library.opcheck(torch.ops.mediatok.multiscale_quantize.default, (*tensors, list(scales)))


def test_traces_without_a_graph_break():
    args = arguments(2, 16, 4, 50, (1, 4, 9, 16))
    compiled = torch.compile(lambda z: multiscale_quantize(z, *args[1:])[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(args[0]), multiscale_quantize(*args)[0])
