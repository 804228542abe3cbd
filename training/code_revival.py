"""Keeping a codec's codebooks in use: their places are taken from latents at the start, and again when nobody calls.

A codebook that starts anywhere and is searched by nearest code ends with a few codes in use. Here the codec first
trains without quantization; then k-means over its latents places the codes; and a code that no frame chose for a while
moves to where a random frame of the batch is (Dhariwal et al. 2020, arXiv 2005.00341, section 3.1).

Shape suffixes: Q codebooks, K codes, N frames, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..kernels.nearest import nearest_code
from ..nn.grouped_vq import GroupedResidualVQ, GroupedVQOutput

PATIENCE = 4  # times as long as a code has to wait for its turn when all are used alike
MAX_SHARE = 8  # at most one frame in so many gives its place away, in a step
KMEANS_STEPS = 10


class CodeRevival:
    """Watches a quantizer in training; `step` after each update of the weights."""

    def __init__(self, quantize: GroupedResidualVQ):
        self.quantize = quantize
        codebooks = quantize.codebooks
        self.idle_QK = torch.zeros(len(codebooks), len(codebooks[0]), dtype=torch.int64, device=codebooks[0].device)
        self.moved: dict[str, Tensor] = {}
        self._seen: tuple[Tensor, Tensor] | None = None
        quantize.register_forward_hook(self._watch)

    def _watch(self, module: GroupedResidualVQ, inputs: tuple, output: GroupedVQOutput) -> None:
        if module.training:
            latent_NC = rearrange(inputs[0].detach().float(), "b c l -> (b l) c")
            self._seen = latent_NC, output.ids_BLQ.detach().flatten(0, 1)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Move the codes that waited too long; returns how many, 0-d. Every process does the same.

        `moved` then holds them by the name of the quantizer's parameter, int64.
        """
        self.moved = {}
        if self._seen is None:
            return torch.zeros((), device=self.idle_QK.device)
        latent_NC, ids_NQ = self._seen
        used_QK = torch.stack([torch.bincount(ids_N, minlength=self.idle_QK.shape[1]) for ids_N in ids_NQ.unbind(1)])
        _on_all_processes(used_QK)
        self.idle_QK = torch.where(used_QK > 0, 0, self.idle_QK + 1)
        patience = PATIENCE * self.idle_QK.shape[1] / int(used_QK[0].sum())
        for index, part_NC in enumerate(residuals(self.quantize, latent_NC, ids_NQ)):
            dead = (self.idle_QK[index] > patience).nonzero()[:, 0]
            dead = dead[torch.randperm(len(dead))[: len(part_NC) // MAX_SHARE].to(dead.device)]
            places = part_NC[torch.randperm(len(part_NC))[: len(dead)].to(dead.device)]
            _from_first_process(dead, places)
            self.quantize.codebooks[index][dead] = places.to(self.quantize.codebooks[index].dtype)
            self.idle_QK[index, dead] = 0
            self.moved[f"codebooks.{index}"] = dead
        self._seen = None
        return torch.tensor(float(sum(map(len, self.moved.values()))), device=self.idle_QK.device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"idle_QK": self.idle_QK}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.idle_QK = tensors["idle_QK"].to(self.idle_QK)


@torch.no_grad()
def place_codes(quantize: GroupedResidualVQ, latents: Iterable[Tensor], generator: torch.Generator) -> None:
    """Put the codes where k-means over `latents` (each [B, C, L]) finds centres, layer after layer.

    Draws come from `generator`; with several processes all get the places of the first.
    """
    residual_NC = torch.cat([rearrange(latent.float(), "b c l -> (b l) c") for latent in latents])
    for layer in range(quantize.num_layers):
        codes = []
        for group, part_NC in enumerate(residual_NC.chunk(quantize.num_groups, dim=1)):
            codebook = quantize.codebooks[layer * quantize.num_groups + group]
            centres_KC = _kmeans(part_NC.contiguous(), len(codebook), generator)
            _from_first_process(centres_KC)
            codebook.copy_(centres_KC)
            codes.append(F.embedding(nearest_code(part_NC.contiguous(), centres_KC), centres_KC))
        residual_NC = residual_NC - torch.cat(codes, dim=1)


def residuals(quantize: GroupedResidualVQ, latent_NC: Tensor, ids_NQ: Tensor) -> list[Tensor]:
    """What each codebook had to quantize, [N, C / groups]."""
    parts: list[Tensor] = []
    for layer in range(ids_NQ.shape[1] // quantize.num_groups):
        groups = latent_NC.chunk(quantize.num_groups, dim=1)
        parts += groups
        first = layer * quantize.num_groups
        codes = [F.embedding(ids_NQ[:, first + g], quantize.codebooks[first + g].float()) for g in range(len(groups))]
        latent_NC = latent_NC - torch.cat(codes, dim=1)
    return parts


@torch.no_grad()
def place_centres(codebook_KC: Tensor, vectors_NC: Tensor, generator: torch.Generator) -> None:
    """Put the codes of one codebook where k-means over `vectors_NC` finds centres; see `place_codes`."""
    centres_KC = _kmeans(vectors_NC.float().contiguous(), len(codebook_KC), generator)
    _from_first_process(centres_KC)
    codebook_KC.copy_(centres_KC)


def _kmeans(points_NC: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Lloyd's iteration from random points; a centre that loses all its points starts anew at a random one."""

    def some_points() -> Tensor:
        return points_NC[torch.randint(len(points_NC), (num_codes,), generator=generator).to(points_NC.device)]

    first = torch.randperm(len(points_NC), generator=generator)[:num_codes].to(points_NC.device)
    centres_KC = points_NC[first] if len(first) == num_codes else some_points()
    for _ in range(KMEANS_STEPS):
        ids_N = nearest_code(points_NC, centres_KC.contiguous())
        counts_K1 = torch.bincount(ids_N, minlength=num_codes)[:, None]
        sums_KC = torch.zeros_like(centres_KC).index_add_(0, ids_N, points_NC)
        centres_KC = torch.where(counts_K1 > 0, sums_KC / counts_K1.clamp(min=1), some_points())
    return centres_KC


def _on_all_processes(counts: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)


def _from_first_process(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
