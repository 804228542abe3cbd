"""How much memory is free."""

from __future__ import annotations

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` without swapping; what torch's CUDA cache holds unused counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available
