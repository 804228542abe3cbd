"""nearest_code's fast paths against its definition: on CPU, in Triton's interpreter, on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mediatok.core.errors import InvalidInput
from mediatok.kernels import nearest
from mediatok.kernels.nearest import Codebook, nearest_code, reference, straight_through

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(0, 5, 3), (1, 1, 1), (9, 1, 4), (33, 70, 1), (77, 33, 5), (130, 1000, 12), (65, 2100, 64), (40, 100, 300)]


def codebook_with_duplicates(num_codes: int, dims: int) -> torch.Tensor:
    codebook = torch.randn(num_codes, dims)
    codebook[num_codes // 2 :] = codebook[: num_codes - num_codes // 2].clone()
    return codebook


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_duplicate_codes(shape, cosine, device):
    torch.manual_seed(0)
    z, codebook = torch.randn(shape[0], shape[2], device=device), codebook_with_duplicates(*shape[1:]).to(device)
    ids = nearest_code(z, codebook, cosine)
    assert ids.dtype == torch.int64
    assert ids.shape == (shape[0],)
    assert ids.device == z.device
    assert torch.equal(ids, reference(z, codebook, cosine))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 9), st.integers(-126, 120), st.integers(-126, 120))
def test_equals_reference_at_every_scale_and_among_ties(device, num_rows, num_codes, dims, z_exponent, code_exponent):
    """Small integers give many exact ties; powers of two reach under- and overflow of fp32 products."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_codes)
    z = torch.randint(-3, 4, (num_rows, dims), generator=generator) * 2.0**z_exponent
    codebook = torch.randint(-3, 4, (num_codes, dims), generator=generator) * 2.0**code_exponent
    z, codebook = z.to(device), codebook.to(device)
    assert torch.equal(nearest_code(z, codebook), reference(z, codebook))


@pytest.mark.parametrize("device", DEVICES)
def test_near_ties_beyond_fp32_scores(device):
    """Codes that differ in the last bit of one coordinate: fp32 scores cannot tell them apart, the definition can."""
    torch.manual_seed(0)
    centre = torch.randn(64)
    codebook = centre.repeat(500, 1)
    codebook[torch.arange(500), torch.randint(64, (500,))] *= 1 + 2.0**-22
    z = centre + 3 * torch.randn(200, 64)
    z, codebook = z.to(device), codebook.to(device)
    ids = nearest_code(z, codebook)
    assert ids.unique().numel() > 20
    assert torch.equal(ids, reference(z, codebook))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_are_defined(device):
    torch.manual_seed(0)
    z, codebook = torch.randn(12, 4, device=device), torch.randn(40, 4, device=device)
    z[3, 1], z[5] = torch.nan, torch.inf
    ids = nearest_code(z, codebook)
    assert ids[3] == ids[5] == 0
    clean = [row for row in range(12) if row not in (3, 5)]
    codebook[ids[0]] = torch.nan
    spoilt = nearest_code(z, codebook)
    assert ids[0] not in spoilt[clean]
    assert torch.equal(spoilt, reference(z, codebook))


def test_scores_held_at_once_are_bounded(monkeypatch):
    """Many blocks give the same ids as one, and no tensor of N x K scores is ever made."""
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 6), torch.randn(500, 6)
    whole = nearest_code(z, codebook)
    monkeypatch.setattr(nearest, "BLOCK_SCORES", 2**14)
    made = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: made.append(out.numel()) or mm(*args, out=out))
    assert torch.equal(nearest_code(z, codebook), whole)
    assert len(made) == 10
    assert max(made) <= 2**14


def test_reads_any_float_layout_as_fp32():
    torch.manual_seed(0)
    z, codebook = torch.randn(6, 50), torch.randn(80, 6)
    assert torch.equal(nearest_code(z.T, codebook), reference(z.T.contiguous(), codebook))
    low = z.T.bfloat16()
    assert torch.equal(nearest_code(low, codebook), reference(low.float(), codebook))
    assert torch.equal(nearest_code(z.T.double(), codebook.double()), reference(z.T, codebook))


def test_exact_under_reduced_matmul_precision():
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 32), torch.randn(400, 32)
    torch.set_float32_matmul_precision("medium")
    try:
        ids = nearest_code(z, codebook)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(ids, reference(z, codebook))


@pytest.mark.parametrize("shapes", [((3,), (4, 3)), ((3, 4), (5, 3)), ((3, 4), (0, 4)), ((1, 3, 4), (5, 4))])
def test_refuses_wrong_shapes(shapes):
    with pytest.raises(InvalidInput, match="nearest_code needs rows"):
        nearest_code(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    z, codebook = torch.randn(7, 3, device=device, requires_grad=True), torch.randn(20, 3, device=device)
    torch.library.opcheck(torch.ops.mediatok.nearest_code.default, (z, codebook))
    torch.library.opcheck(torch.ops.mediatok.nearest_code.default, (z[:0], codebook))


def test_traces_without_a_graph_break():
    z, codebook = torch.randn(7, 3), torch.randn(20, 3)
    compiled = torch.compile(nearest_code, backend="eager", fullgraph=True)
    assert torch.equal(compiled(z, codebook), nearest_code(z, codebook))


def test_straight_through_is_the_code_with_the_gradient_of_the_identity():
    z, zq = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    out = straight_through(z, zq)
    assert torch.equal(out, zq)
    upstream = torch.randn(5, 3)
    out.backward(upstream)
    assert torch.equal(z.grad, upstream)
    assert zq.grad is None


INTERPRETED = """
import torch
from mediatok.kernels.nearest import nearest_triton, reference
torch.manual_seed(0)
for rows, codes, dims in [(0, 5, 3), (1, 1, 1), (33, 70, 1), (40, 130, 12), (20, 90, 40)]:
    z, codebook = torch.randn(rows, dims), torch.randn(codes, dims)
    codebook[codes // 2:] = codebook[:codes - codes // 2].clone()
    assert torch.equal(nearest_triton(z, codebook), reference(z, codebook)), (rows, codes, dims)
centre = torch.randn(20)
codebook = centre.repeat(100, 1)
codebook[torch.arange(100), torch.randint(20, (100,))] *= 1 + 2.0**-22
z = centre + 3 * torch.randn(30, 20)
assert torch.equal(nearest_triton(z, codebook), reference(z, codebook))
z[3, 1], z[5], codebook[7] = torch.nan, torch.inf, torch.nan
assert torch.equal(nearest_triton(z, codebook), reference(z, codebook))
for scale in (1e-30, 1e25):
    codebook = torch.randn(70, 5) * scale
    assert torch.equal(nearest_triton(z[:, :5].contiguous(), codebook), reference(z[:, :5], codebook))
print("equal")
"""


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile_without_a_gpu(capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"num_codes": 4096, "dims": 12, "CODES": 64}
    compiled = {}
    for kernel, pointers, more_sizes in [
        (nearest._score_kernel, ["*fp32"] * 4 + ["*i64", "*i8", "i32"], {"ROWS": 32, "DIMS": 16}),
        (nearest._resolve_kernel, ["*fp32", "*fp32", "*i8", "*i64"], {}),
    ]:
        types = pointers + ["constexpr"] * (len(kernel.arg_names) - len(pointers))
        signature = dict(zip(kernel.arg_names, types, strict=True))
        source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=sizes | more_sizes)
        target = compiler.GPUTarget("cuda", capability, 32)
        compiled[kernel] = triton.compile(source, target=target, options={"enable_fp_fusion": False})
        assert compiled[kernel].asm["cubin"]
    assert "fma.rn.f64" not in compiled[nearest._resolve_kernel].asm["ptx"]  # would round differently


def test_a_codebook_for_several_searches_gives_the_same_ids():
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn(70, 5, generator=rng)
    codebook = Codebook(codes)
    for rows in (0, 1, 33):
        z = torch.randn(rows, 5, generator=rng)
        assert torch.equal(codebook.nearest(z), nearest_code(z, codes))
    with pytest.raises(InvalidInput):
        codebook.nearest(torch.zeros(2, 4))
    with pytest.raises(InvalidInput):
        Codebook(torch.zeros(0, 4))
