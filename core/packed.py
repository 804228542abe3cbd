"""Layers whose weights are laid out for this processor: they can be used, and not trained, saved, moved or converted.

A model that holds some must refuse as a whole and beforehand: torch and diffusers go layer by layer and file by file,
and would stop half-way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import InvalidInput

WAY_OUT = "packed weights can only be used; load the model again to train, save or move it"


class PackedLayer(nn.Module):
    """Base of such layers; subclasses keep the weights where torch does not see them.

    dtype: of the weights before they were packed, on the CPU.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.eval()

    def _save_to_state_dict(self, *args) -> None:
        raise InvalidInput(WAY_OUT)

    def __reduce_ex__(self, protocol) -> tuple:  # pickling, as torch.save does it
        raise InvalidInput(WAY_OUT)

    def __deepcopy__(self, memo: dict) -> PackedLayer:
        return self  # it never changes, so a copy of the model can use it, too

    def train(self, mode: bool = True):
        if mode:
            raise InvalidInput(WAY_OUT)
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        probe = torch.empty(0, dtype=self.dtype)
        moved = fn(probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise InvalidInput(WAY_OUT)
        return self


def check_can_apply(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise InvalidInput when `fn`, which is to move or convert the weights of `model`, changes a packed layer's."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module._apply(fn)


def check_not_packed(model: nn.Module) -> None:
    """Raise InvalidInput when `model` has packed layers."""
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise InvalidInput(WAY_OUT)
