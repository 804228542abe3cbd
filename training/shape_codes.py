"""Keeping the one codebook of a multi-scale quantizer in use: placed by k-means, and revived where it is not called.

As for codecs (`code_revival.py`), but all scales share the codes, and what a scale codes depends on the codes of the
scales before it: so the codes are placed anew from what each scale has to code, a few times.

Shape suffixes: B items, L latents, C channels, S tokens of all scales, K codes, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.multiscale_vq import MultiScaleOutput, MultiScaleQuantizer
from .code_revival import MAX_SHARE, PATIENCE, _from_first_process, _kmeans, _on_all_processes

PLACING_ROUNDS = 3
ROWS_PER_CODE = 4  # that k-means sees


@torch.no_grad()
def place_codes(quantize: MultiScaleQuantizer, z_BLC: Tensor, generator: torch.Generator) -> None:
    """Put the codes where k-means over the rows of all scales of latents `z_BLC` finds centres.

    Draws come from `generator`; with several processes all get the places of the first.
    """
    rows_NC = z_BLC.float().flatten(0, 1)
    for _ in range(PLACING_ROUNDS):
        chosen = torch.randperm(len(rows_NC), generator=generator)[: ROWS_PER_CODE * len(quantize.codebook)]
        centres_KC = _kmeans(rows_NC[chosen.to(rows_NC.device)].contiguous(), len(quantize.codebook), generator)
        _from_first_process(centres_KC)
        quantize.codebook.copy_(centres_KC)
        rows_NC = quantize(z_BLC)[1].rows_BSC.flatten(0, 1)


class CodebookRevival:
    """Watches a quantizer in training; `step` after each update of the weights."""

    def __init__(self, quantize: MultiScaleQuantizer):
        self.quantize = quantize
        self.idle_K = torch.zeros(len(quantize.codebook), dtype=torch.int64, device=quantize.codebook.device)
        self.moved: dict[str, Tensor] = {}
        self._seen: tuple[Tensor, Tensor] | None = None
        quantize.register_forward_hook(self._watch)

    def _watch(self, module: MultiScaleQuantizer, inputs: tuple, output: tuple[Tensor, MultiScaleOutput]) -> None:
        if module.training:
            self._seen = output[1].ids_BS.flatten(), output[1].rows_BSC.detach().flatten(0, 1)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Move the codes that waited too long; returns how many, 0-d. Every process does the same.

        `moved` then holds them by the name of the quantizer's parameter, int64.
        """
        self.moved = {}
        if self._seen is None:
            return torch.zeros((), device=self.idle_K.device)
        ids_N, rows_NC = self._seen
        used_K = torch.bincount(ids_N, minlength=len(self.idle_K))
        _on_all_processes(used_K)
        self.idle_K = torch.where(used_K > 0, 0, self.idle_K + 1)
        dead = (self.idle_K > PATIENCE * len(self.idle_K) / int(used_K.sum())).nonzero()[:, 0]
        dead = dead[torch.randperm(len(dead))[: len(rows_NC) // MAX_SHARE].to(dead.device)]
        places_NC = rows_NC[torch.randperm(len(rows_NC))[: len(dead)].to(dead.device)]
        _from_first_process(dead, places_NC)
        self.quantize.codebook[dead] = places_NC.to(self.quantize.codebook.dtype)
        self.idle_K[dead] = 0
        self.moved["codebook"] = dead
        self._seen = None
        return torch.tensor(float(len(dead)), device=self.idle_K.device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"idle_K": self.idle_K}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.idle_K = tensors["idle_K"].to(self.idle_K)
