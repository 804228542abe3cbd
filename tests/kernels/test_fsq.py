"""Finite scalar quantization: equals its definition, inverts, and passes gradients straight through."""

import itertools

import pytest
import torch
from mediatok.core.errors import InvalidInput
from mediatok.kernels.fsq import bound, codes_of, fsq, reference
from mediatok.nn.fsq import FSQ

LEVELS = [[8, 8, 8, 5, 5, 5], [8, 5, 5, 5], [2], [3, 2, 7]]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_operation_is_the_definition(levels, shape):
    z = torch.randn(*shape, len(levels), generator=torch.Generator().manual_seed(0)) * 3
    codes, ids = fsq(z, levels)
    assert (codes.dtype, ids.dtype, ids.shape) == (torch.float32, torch.int64, z.shape[:-1])
    for ours, defined in zip((codes, ids), reference(z, levels), strict=True):
        assert torch.equal(ours, defined)
    assert torch.equal(codes_of(ids, levels), codes)


@pytest.mark.parametrize("levels", [[8, 5], [2, 3, 4]])
def test_every_id_stands_for_one_code(levels):
    ids = torch.arange(torch.tensor(levels).prod())
    codes = codes_of(ids, levels)
    assert len({tuple(code) for code in codes.tolist()}) == len(ids)
    digits = [[(d - level // 2) / (level // 2) for d in range(level)] for level in levels]
    expected = [tuple(reversed(code)) for code in itertools.product(*reversed(digits))]
    torch.testing.assert_close(codes, torch.tensor(expected))
    # Values that are rounded to a code have its id.
    half = (torch.tensor(levels) - 1) * 1.001 / 2
    offset = torch.where(torch.tensor(levels) % 2 == 0, 0.5, 0.0)
    z = torch.atanh((codes * (torch.tensor(levels) // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(fsq(z, levels)[1], ids)


def test_extremes_are_codes():
    z = torch.tensor([[-50.0, 50.0], [50.0, -50.0], [0.0, 0.0], [float("inf"), float("-inf")]])
    codes, ids = fsq(z, [8, 5])
    assert codes.tolist() == [[-1, 1], [0.75, -1], [0, 0], [0.75, -1]]
    assert ids.min() >= 0
    assert ids.max() < 40


def test_gradient_is_that_of_the_values_before_rounding():
    levels = [8, 5, 3]
    z = torch.randn(4, 3, requires_grad=True)
    upstream = torch.randn(4, 3)
    (fsq(z, levels)[0] * upstream).sum().backward()
    plain = z.detach().clone().requires_grad_()
    (bound(plain, levels) / torch.tensor([4, 2, 1]) * upstream).sum().backward()
    torch.testing.assert_close(z.grad, plain.grad)


def test_registration():
    z = torch.randn(3, 4, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.mediatok.fsq, (z, [5, 8]))
    torch.library.opcheck(torch.ops.mediatok.fsq, (torch.randn(0, 2), [5, 8]))


def test_autocast_changes_no_id():
    layer, z = FSQ((8, 8, 8, 5, 5, 5)), torch.randn(500, 6)
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids = layer(z)
    assert torch.equal(ids, layer(z)[1])
    assert codes.dtype == torch.float32
    assert torch.equal(layer.lookup(ids), codes)
    assert (layer.vocab_size, list(layer.state_dict())) == (64_000, [])


@pytest.mark.parametrize("levels", [[], [1, 5], [8, 0], [True], [5.0], ["8"], [4096] * 4, [2] * 33])
def test_levels_that_cannot_be_are_refused(levels):
    with pytest.raises(InvalidInput, match="levels"):
        FSQ(levels)


def test_other_sizes_are_refused():
    with pytest.raises(InvalidInput, match="needs"):
        fsq(torch.randn(3, 2), [5, 5, 5])
