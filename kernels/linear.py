"""Products with weights for inference on a CPU: by oneDNN in fp32, and with weights laid out once for this processor.

For fp32, torch calls a BLAS that rearranges the weight at every call. With few rows, as in sampling one picture, that
takes a good part of the time. oneDNN is faster at it (`linear`), and can keep the rearranged weight in the place of
torch's (`PackedLinear`). Results agree to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..core.packed import PackedLayer
from .precision import compute_dtype


def can_pack() -> bool:
    """Whether this torch has oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x [..., K] W^T + b as [..., N]; by oneDNN where nothing asks for a gradient and all is fp32 on the CPU."""
    is_fp32 = x.dtype == weight_NK.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    inputs = (x, weight_NK) if bias_N is None else (x, weight_NK, bias_N)
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    # Forward-mode derivatives (torch.func.jvp) would be lost without a word. A torch without the name is not trusted.
    wants_gradient = wants_gradient or getattr(forward_ad, "_current_level", 0) >= 0
    is_here = x.device.type == "cpu" and x.numel() > 0
    if not (is_here and is_fp32 and can_pack()) or wants_gradient or torch.compiler.is_compiling():
        return F.linear(x, weight_NK, bias_N)
    return torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")


class PackedLinear(PackedLayer):
    """x [..., K] to [..., N] as `nn.Linear`, for inference on the CPU; takes the weight of `linear` [N, K]."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.weight.dtype)
        with torch.no_grad():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
            self._bias = None if linear.bias is None else linear.bias.detach().clone()
        self.packed_bytes = linear.weight.numel() * linear.weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._packed, self._bias, "none", [], "")


def pack_for_inference(model: nn.Module, network: nn.Module) -> None:
    """Pack the `network` of a model that is on the CPU, from now on to be used only; leave others as they are."""
    if can_pack() and all(parameter.device.type == "cpu" for parameter in network.parameters()):
        model.eval().requires_grad_(False)
        pack_linears(network)


def pack_linears(network: nn.Module) -> None:
    """Replace every linear layer below `network` by a packed one, layer by layer, so that no memory is added.

    Layers that are stored in bfloat16 and computed in fp32 stay: packing would widen them for good.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            weight = child.weight
            if compute_dtype(weight.dtype, weight.device) == weight.dtype:
                setattr(parent, name, PackedLinear(child))
