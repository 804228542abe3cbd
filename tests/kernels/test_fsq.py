"""Finite scalar quantization: equals its definition, inverts, and passes gradients straight through."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from mediatok.core.errors import InvalidInput
from mediatok.kernels import fsq as kernel
from mediatok.kernels.fsq import bound, codes_of, fsq, reference, thresholds
from mediatok.nn.fsq import FSQ

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LEVELS = [[8, 8, 8, 5, 5, 5], [8, 5, 5, 5], [2], [3, 2, 7]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (4000,)])
def test_operation_is_the_definition(levels, shape, device):
    z = torch.randn(*shape, len(levels), generator=torch.Generator().manual_seed(0)) * 3
    codes, ids = (part.cpu() for part in fsq(z.to(device), levels))
    assert (codes.dtype, ids.dtype, ids.shape) == (torch.float32, torch.int64, z.shape[:-1])
    for ours, defined in zip((codes, ids), reference(z, levels), strict=True):
        assert torch.equal(ours, defined)
    assert torch.equal(codes_of(ids, levels), codes)


@pytest.mark.parametrize("levels", [*LEVELS, [1000, 3], [17, 16]])
def test_thresholds_are_where_levels_begin(levels):
    edges_TD = thresholds(tuple(levels))
    assert edges_TD.shape == (max(levels) - 1, len(levels))
    for channel, level in enumerate(levels):
        edges = edges_TD[: level - 1, channel]
        assert edges_TD[level - 1 :, channel].isinf().all()
        below = edges.nextafter(torch.tensor(-99.0))
        for z, digits in ((edges, torch.arange(1, level)), (below, torch.arange(level - 1))):
            code = reference(z[:, None], [level])[0][:, 0] * (level // 2)
            assert torch.equal(code.round().long() + level // 2, digits)


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


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    z = torch.randn(3, 4, 2, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.mediatok.fsq, (z, [5, 8]))
    torch.library.opcheck(torch.ops.mediatok.fsq, (z.detach()[:0], [5, 8]))


INTERPRETED = """
import torch
from mediatok.kernels.fsq import fsq_triton, reference, thresholds
rng = torch.Generator().manual_seed(0)
for levels in ([8, 8, 8, 5, 5, 5], [2], [3, 2, 7], [20, 5]):
    edges = thresholds(tuple(levels))
    edges = torch.where(edges.isinf(), 0.0, edges)
    near = torch.cat([edges, edges.nextafter(torch.tensor(99.0)), edges.nextafter(torch.tensor(-99.0))])
    for z in (torch.randn(0, len(levels)), torch.randn(130, len(levels), generator=rng) * 3, near, near[:, None] * 99):
        for ours, defined in zip(fsq_triton(z.contiguous(), levels), reference(z, levels), strict=True):
            assert torch.equal(ours, defined), levels
print("equal")
"""


def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernel_compiles_without_a_gpu(capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = ["*fp32", "*fp32", "*i64", "*i64", "*fp32", "*i64", "i32"] + ["constexpr"] * 4
    signature = dict(zip(kernel._fsq_kernel.arg_names, types, strict=True))
    sizes = {"num_thresholds": 7, "dims": 6, "ROWS": 128, "DIMS": 8}
    source = triton.compiler.ASTSource(kernel._fsq_kernel, signature=signature, constexprs=sizes)
    compiled = triton.compile(source, target=compiler.GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    assert "div.full" not in compiled.asm["ptx"]  # which is not rounded as the reference's division


def test_autocast_changes_no_id():
    layer, z = FSQ((8, 8, 8, 5, 5, 5)), torch.randn(500, 6)
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids = layer(z)
    assert torch.equal(ids, layer(z)[1])
    assert codes.dtype == torch.float32
    assert torch.equal(layer.lookup(ids), codes)
    assert (layer.vocab_size, list(layer.state_dict())) == (64_000, [])


@pytest.mark.parametrize("levels", [[], [1, 5], [8, 0], [True], [5.0], ["8"], [1001], [1000] * 5, [2] * 33])
def test_levels_that_cannot_be_are_refused(levels):
    with pytest.raises(InvalidInput, match="levels"):
        FSQ(levels)


def test_other_sizes_are_refused():
    with pytest.raises(InvalidInput, match="needs"):
        fsq(torch.randn(3, 2), [5, 5, 5])
