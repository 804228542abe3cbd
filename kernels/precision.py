"""Which precision to compute in when weights are stored in bfloat16."""

from __future__ import annotations

import torch


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of `stored` tensors on `device` are computed fastest.

    Only a CPU with bfloat16 products (AMX, AVX512-BF16, Arm's bf16) multiplies bfloat16 faster than fp32. Without them
    it takes about 1.7 times as long, so there bfloat16 is a storage format: weights are widened when they are used.
    """
    if stored != torch.bfloat16 or device.type != "cpu" or has_bfloat16_products():
        return stored
    return torch.float32


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than fp32 ones."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
