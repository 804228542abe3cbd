"""Learning rate, weight decay groups and the averaged weights of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Parameters whose name contains one of these are not decayed (TiTok's list; One-D-Piece's lacks "embed").
NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma")
NO_DECAY_TITOK = (*NO_DECAY, "embed")


def cosine_lr(
    step: int, base_lr: float, end_lr: float, warmup_steps: int, total_steps: int, hold_steps: int = 0
) -> float:
    """Learning rate of update `step` (from 0): linear warm-up from 0, `base_lr` until step `hold_steps`, then a cosine
    down to `end_lr` at `total_steps`.

    A pure function of the update count: how many processes take part does not matter.
    """
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    start = max(warmup_steps, hold_steps)
    if step < start:
        return base_lr
    progress = (step - start) / max(1, total_steps - start)
    return end_lr + (base_lr - end_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    no_decay: tuple[str, ...] = NO_DECAY_TITOK,
    is_decayed: Callable[[str, nn.Parameter], bool] | None = None,
    muon: bool = False,
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; with `muon`, Muon for the matrices of the blocks.

    `is_decayed(name, parameter)` says which are decayed; without it, all but vectors and names of `no_decay`.
    The matrices are those of blocks, and the kernels of 1-D convolutions over several channels.
    """
    matrices, decayed, plain = [], [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or any(part in name for part in no_decay)
            if is_decayed is not None:
                is_plain = not is_decayed(name, parameter)
            is_matrix = muon and not is_plain and _is_matrix(name, parameter)
            (matrices if is_matrix else plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)
    return MuonAdamW(matrices, adamw, lr, weight_decay) if matrices else adamw


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    is_kernel = parameter.ndim == 3 and min(parameter.shape[:2]) > 1
    return is_kernel or (parameter.ndim == 2 and "block" in name)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) over `matrices`, beside the AdamW of everything else, as one optimizer.

    A kernel [O, I, k] of a convolution counts as the matrix [O, I * k]. Muon's update is scaled to the size of AdamW's
    (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one rate serves both.
    """

    def __init__(self, matrices: list[nn.Parameter], adamw: torch.optim.AdamW, lr: float, weight_decay: float):
        flat = [matrix.detach().flatten(1) for matrix in matrices]  # Muon takes nothing but matrices
        muon = torch.optim.Muon(flat, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        super().__init__([*adamw.param_groups, {**muon.param_groups[0], "params": matrices}], {})
        self.adamw, self.muon = adamw, muon

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        # Anew each time: `load_state_dict`, which accelerate calls, puts other objects in the place of both.
        self.adamw.param_groups, self.adamw.state = self.param_groups[:-1], self.state
        self.adamw.step(closure)
        flat, state = [], {}
        for matrix in self.param_groups[-1]["params"]:
            if matrix.grad is None:
                continue
            own = self.state[matrix]
            own.setdefault("momentum_buffer", torch.zeros_like(matrix.grad, memory_format=torch.contiguous_format))
            view = matrix.detach().flatten(1)  # the same memory
            view.grad = matrix.grad.flatten(1)
            flat.append(view)
            state[view] = {"momentum_buffer": own["momentum_buffer"].flatten(1)}
        self.muon.param_groups, self.muon.state = [{**self.param_groups[-1], "params": flat}], state
        self.muon.step()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def ema_decay(step: int, maximum: float) -> float:
    """Decay of the weight average after update `step` (from 1): 0 at first, then (1 + s) / (10 + s) up to `maximum`."""
    s = max(0, step - 1)
    return 0.0 if s == 0 else min(maximum, (1 + s) / (10 + s))


class WeightAverage:
    """diffusers' EMAModel over a module, with its state under the parameters' names."""

    def __init__(self, module: nn.Module, decay: float):
        from diffusers.training_utils import EMAModel

        self.names = [name for name, _ in module.named_parameters()]
        self.ema = EMAModel(module.parameters(), decay=decay)

    def step(self, module: nn.Module) -> None:
        """Account for one update of `module`; frozen parameters are copied."""
        self.ema.step(module.parameters())

    def copy_from(self, module: nn.Module, prefix: str) -> None:
        """Forget the average of the parameters whose names start with `prefix`: they were set anew."""
        values = dict(module.named_parameters())
        for name, shadow in self.state_dict().items():
            if name.startswith(prefix):
                shadow.copy_(values[name].detach())

    def restart_rows(self, module: nn.Module, rows: dict[str, Tensor], prefix: str = "") -> None:
        """Forget the average of rows of parameters, {name behind `prefix`: int64 [rows]}: codes that were moved.

        Their average would lie between the old place and the new one, where nothing calls it.
        """
        values, shadows = dict(module.named_parameters()), self.state_dict()
        for name, rows_M in rows.items():
            shadows[prefix + name][rows_M] = values[prefix + name].detach()[rows_M].to(shadows[prefix + name])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.ema.shadow_params, strict=True))

    def load_state_dict(self, tensors: dict[str, Tensor], steps: int) -> None:
        for name, shadow in self.state_dict().items():
            shadow.copy_(tensors[name])
        self.ema.optimization_step = steps

    @contextmanager
    def applied_to(self, module: nn.Module):
        """The averaged weights in `module`, in evaluation mode and without gradients, while the block runs."""
        modes = {child: child.training for child in module.modules()}
        self.ema.store(module.parameters())
        self.ema.copy_to(module.parameters())
        module.eval()
        try:
            with torch.no_grad():
                yield module
        finally:
            self.ema.restore(module.parameters())
            for child, mode in modes.items():
                child.training = mode
