"""bfloat16 is computed as such only where the device is fast at it."""

import pytest
import torch
from mediatok.kernels import precision
from mediatok.kernels.precision import compute_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64", "bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_bfloat16_follows_the_cpu(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype(torch.bfloat16, CPU) == expected
    assert compute_dtype(torch.bfloat16, CUDA) == torch.bfloat16


def test_other_dtypes_stay():
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert compute_dtype(dtype, CPU) == dtype


def test_this_cpu_answers():
    assert precision.has_bfloat16_products() in (True, False)
    assert compute_dtype(torch.bfloat16, CPU) in (torch.bfloat16, torch.float32)
