"""integrate_and_fire against its definition and the sequential recipe: on CPU, in Triton's interpreter, on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mediatok.core.errors import InvalidInput
from mediatok.kernels import cif
from mediatok.kernels.cif import integrate_and_fire, reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PATTERNS = {
    "ordinary": lambda rng, shape: torch.rand(shape, generator=rng) * 0.6,
    "expanding": lambda rng, shape: torch.rand(shape, generator=rng) * 5,
    "quarters": lambda rng, shape: torch.randint(0, 5, shape, generator=rng) / 4,  # boundaries on frame ends
    "whole": lambda rng, shape: torch.randint(0, 4, shape, generator=rng).float(),
    "sparse": lambda rng, shape: torch.rand(shape, generator=rng) * (torch.rand(shape, generator=rng) < 0.3),
    "nothing": lambda rng, shape: torch.zeros(shape),
    "too little": lambda rng, shape: torch.full(shape, 0.9 / shape[1]),
}


def inputs(pattern, batch, frames, channels, seed=0, device="cpu"):
    rng = torch.Generator().manual_seed(seed)
    rates = PATTERNS[pattern](rng, (batch, frames)).double()
    hidden = torch.randn(batch, frames, channels, generator=rng, dtype=torch.float64)
    return hidden.to(device).requires_grad_(), rates.to(device).requires_grad_()


def gradients(function, hidden, rates, *counts):
    tokens, _ = function(hidden, rates, *counts)
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1), dtype=tokens.dtype)
    return tokens, *torch.autograd.grad(tokens, (hidden, rates), upstream.to(tokens.device))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(PATTERNS)), st.integers(1, 3), st.integers(1, 40), st.integers(1, 6), st.booleans(),
    st.integers(0, 1000),
)  # fmt: skip
def test_equals_reference_with_gradients(device, pattern, batch, frames, channels, is_given, seed):
    hidden, rates = inputs(pattern, batch, frames, channels, seed, device)
    rng = torch.Generator().manual_seed(seed)
    counts = (torch.randint(0, frames + 3, (batch,), generator=rng).to(device),) if is_given else ()
    tokens, counts_B = integrate_and_fire(hidden, rates, *counts)
    expected, expected_B = reference(hidden, rates, *counts)
    assert torch.equal(counts_B, expected_B)
    torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=0)
    if is_one_sided(pattern):
        ours, theirs = (gradients(function, hidden, rates, *counts) for function in (integrate_and_fire, reference))
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def is_one_sided(pattern):
    """Patterns without boundaries on frame ends, where the two sides' derivatives differ."""
    return pattern not in ("quarters", "whole", "nothing")


def sequential(hidden_TD, rates_T):
    """The recipe as published, in fp64, for rates up to 1."""
    tokens, filled, level = [], torch.zeros(hidden_TD.shape[1], dtype=torch.float64), 0.0
    for h, rate in zip(hidden_TD.double(), rates_T.tolist(), strict=True):
        if level + rate < 1:
            level, filled = level + rate, filled + rate * h
        else:
            tokens.append(filled + (1 - level) * h)
            level = level + rate - 1
            filled = level * h
    return torch.stack(tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frames", [50, 5000])
def test_fp32_is_as_exact_as_the_sequential_recipe(frames, device):
    """Prefix sums in fp32, which people write, are off by 3e-4 here."""
    torch.manual_seed(0)
    hidden, rates = torch.randn(1, frames, 64), torch.rand(1, frames) * 0.5
    tokens, counts = integrate_and_fire(hidden.to(device), rates.to(device))
    expected = sequential(hidden[0], rates[0])
    assert counts.tolist() == [len(expected)]
    torch.testing.assert_close(tokens[0].double().cpu(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_given_counts_are_kept_where_rounding_would_decide(device):
    torch.manual_seed(0)
    wanted = torch.tensor([7, 5, 9], device=device)
    short = 0
    for _ in range(20):
        rates = torch.rand(3, 31, device=device)
        rates = rates * (wanted / rates.sum(dim=1))[:, None]
        tokens, counts = integrate_and_fire(torch.ones(3, 31, 4, device=device), rates, wanted)
        short += int((rates.double().sum(dim=1) < wanted).sum())
        assert torch.equal(counts, wanted)
        expected = (torch.arange(9, device=device) < wanted[:, None]).float()
        torch.testing.assert_close(tokens, expected[..., None].expand(-1, -1, 4), atol=1e-5, rtol=0)
    assert short > 10  # floor would have dropped so many last tokens


@pytest.mark.parametrize("device", DEVICES)
def test_rows_do_not_see_each_other_and_padding_is_never_read(device):
    torch.manual_seed(0)
    hidden, rates = torch.randn(2, 20, 8, device=device), torch.rand(2, 20, device=device)
    hidden[1, 12:], rates[1, 12:] = torch.nan, 0
    tokens, counts = integrate_and_fire(hidden, rates)
    alone, count = integrate_and_fire(hidden[1:, :12], rates[1:, :12])
    assert counts[1] == count[0] < counts[0]
    assert torch.equal(tokens[1, : counts[1]], alone[0])
    assert not tokens[1, counts[1] :].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_or_a_batch_that_never_fires_trains(device):
    hidden = torch.randn(2, 6, 3, device=device, requires_grad=True)
    rates = torch.tensor([[0.1] * 6, [0.5] * 6], device=device, requires_grad=True)
    tokens, counts = integrate_and_fire(hidden, rates)
    assert counts.tolist() == [0, 3]
    tokens.sum().backward()
    assert not hidden.grad[0].any()
    assert hidden.grad[1].any()
    tokens, counts = integrate_and_fire(hidden, rates * 0.1)
    assert tokens.shape == (2, 0, 3)
    hidden.grad = None
    tokens.sum().backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_sums_in_fp32(device):
    torch.manual_seed(0)
    hidden, rates = torch.randn(1, 400, 16, device=device), torch.rand(1, 400, device=device)
    tokens, _ = integrate_and_fire(hidden.bfloat16(), rates)
    expected, _ = integrate_and_fire(hidden.bfloat16().float(), rates)
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, expected.bfloat16())


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_shapes(shape):
    hidden, rates = torch.randn(shape, requires_grad=True), torch.ones(shape[:2])
    tokens, counts = integrate_and_fire(hidden, rates)
    assert tokens.shape == (shape[0], int(counts.max()) if shape[0] else 0, shape[2])
    tokens.sum().backward()
    assert hidden.grad.shape == shape


@pytest.mark.parametrize("rates", [[-0.1, 0.5], [torch.nan, 0.5], [torch.inf, 0.5], [1e9, 0.5]])
def test_refuses_impossible_rates(rates):
    with pytest.raises(InvalidInput, match="rates must be at least 0"):
        integrate_and_fire(torch.ones(1, 2, 3), torch.tensor([rates]))


def test_unchecked_rates_stay_in_bounds():
    """With everything given nothing is read back to be checked, and no memory is touched that is not the rows'."""
    for rates in ([-3.0, 0.5, 9.0], [torch.nan, torch.inf, 1.0], [1e30, -1e30, 2.0]):
        tokens, _ = integrate_and_fire(torch.ones(1, 3, 2), torch.tensor([rates]), torch.tensor([4]), 4)
        assert tokens.shape == (1, 4, 2)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (2, 4)), ((2, 3, 4), (3, 3))])
def test_refuses_wrong_shapes(shapes):
    with pytest.raises(InvalidInput, match="needs frames"):
        integrate_and_fire(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    with pytest.raises(InvalidInput, match="need counts"):
        integrate_and_fire(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 3, device=device, requires_grad=True)
    rates = torch.rand(2, 9, device=device, requires_grad=True)
    counts = torch.tensor([3, 2], device=device)
    for tokens in (3, 5, 0):
        torch.library.opcheck(torch.ops.mediatok.integrate_and_fire.default, (hidden, rates, counts, tokens))
    grad = torch.randn(2, 3, 3, device=device)
    arguments = (grad, hidden.detach(), rates.detach(), counts)
    torch.library.opcheck(torch.ops.mediatok.integrate_and_fire_backward.default, arguments)


def test_without_torchs_dot_kernel(monkeypatch):
    """A torch that drops the private kernel costs time, not results."""
    hidden, rates = inputs("ordinary", 2, 30, 5)
    expected = gradients(integrate_and_fire, hidden, rates)
    with monkeypatch.context() as patched:
        patched.setattr(cif, "_DOTS", None)
        ours = gradients(integrate_and_fire, hidden, rates)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


INTERPRETED = """
import torch
from mediatok.kernels.cif import backward_triton, integrate_triton, reference
torch.manual_seed(0)
for batch, frames, channels, scale, dtype in [
    (1, 1, 1, 1.0, torch.float32), (2, 17, 5, 0.5, torch.float64), (2, 9, 40, 4.0, torch.float32),
    (1, 6, 1100, 0.7, torch.float64), (2, 5, 3, 0.01, torch.float32),
]:
    hidden = torch.randn(batch, frames, channels, dtype=dtype, requires_grad=True)
    rates = (torch.rand(batch, frames) * scale).requires_grad_()
    for counts in (None, torch.arange(1, batch + 1) * 3):
        expected, counts_B = reference(hidden, rates, counts)
        tokens = expected.shape[1]
        ours = integrate_triton(hidden.detach(), rates.detach(), counts_B, tokens)
        torch.testing.assert_close(ours, expected.detach(), atol=2e-6, rtol=1e-5)
        upstream = torch.randn_like(expected)
        given = backward_triton(upstream, hidden.detach(), rates.detach(), counts_B)
        wanted = torch.autograd.grad(expected, (hidden, rates), upstream)
        torch.testing.assert_close(given, wanted, atol=2e-5, rtol=1e-5)
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
    sizes = {"channels": 512, "CHANNELS": 512, "SUM": triton.language.float32}
    for kernel, pointers in [
        (cif._forward_kernel, ["*fp32", "*i64", "*fp32", "*i64", "*fp32"]),
        (cif._backward_kernel, ["*fp32", "*fp32", "*i64", "*fp32", "*i64", "*fp32", "*fp32"]),
    ]:
        types = [*pointers, "i32", "i32", "constexpr", "constexpr", "constexpr"]
        signature = dict(zip(kernel.arg_names, types, strict=True))
        source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=sizes)
        compiled = triton.compile(source, target=compiler.GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
