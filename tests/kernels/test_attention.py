"""Written-out attention against torch's fused kernel, forward and gradient."""

import pytest
import torch
import torch.nn.functional as F
from mediatok.kernels import attention as module
from mediatok.kernels.attention import attention, attention_of_one
from mediatok.nn.kv_cache import KeyValueCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "block", "rows"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (5, 64), (64, 130)])
def test_equals_the_fused_kernel(dtype, mask, queries, keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16).to(dtype) for length in (queries, keys, keys))
    if mask == "block":
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    elif mask == "rows":  # what each item of a batch may see
        mask = torch.rand(2, 1, 1, keys) < 0.7
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    got = attention(q, k, v, mask)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values_by_channel", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_query_sees_what_a_cache_holds(dtype, values_by_channel, rows):
    torch.manual_seed(0)
    k, v = (torch.randn(rows, 2, 9, 16).to(dtype) for _ in range(2))
    cache = KeyValueCache(2, rows, 2, 20, 16, k, values_by_channel)
    for token in range(9):
        seen = cache.extend(1, k[:, :, token, None], v[:, :, token, None])
        cache.length += 1
    assert all(torch.equal(ours, given) for ours, given in zip(seen, (k, v), strict=True))
    q = torch.randn(rows, 2, 1, 16).to(dtype)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    got = attention_of_one(q, *seen)
    assert (got.dtype, got.shape) == (dtype, expected.shape)
    assert (got - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)


def test_gradients_in_bfloat16():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 20, 16) for _ in range(3)]
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    wide = [value.clone().requires_grad_() for value in inputs]
    narrow = [value.bfloat16().requires_grad_() for value in inputs]
    F.scaled_dot_product_attention(*wide, attn_mask=mask).square().sum().backward()
    attention(*narrow, mask).square().sum().backward()
    for ours, theirs in zip(narrow, wide, strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 60, 8).bfloat16(), torch.randn(1, 4, 60, 8).bfloat16()
    v = torch.ones(1, 4, 60, 8, dtype=torch.bfloat16)
    dropped = attention(q, k, v, dropout=0.5)
    assert dropped.float().std() > 0.05
    assert abs(dropped.float().mean() - 1) < 0.05


def test_many_scores_are_left_to_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(module, "MAX_SCORE_BYTES", 2 * 3 * 20 * 20 * 2 - 1)
    q = torch.randn(2, 3, 20, 16).bfloat16()
    assert torch.equal(attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
