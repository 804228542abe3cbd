"""Replay of the bare vector quantizer: training passes, gradients, dead-code revival, soft lookup."""

from __future__ import annotations

import torch

from .. import titok
from .replay import GRADIENT, LOSS, TAP, Replay
from .titok import margin


def replay_quantizer(replay: Replay) -> None:
    """Kinds quantizer and quantizer_clustering: passes `step0`, `step1`, ... in a row, then the soft lookup."""
    quantizer = titok.quantizer_from_official(replay.case.config, replay.case.weights())
    quantizer.train(replay.case.setting("mode", default="train") == "train")
    for match in replay.matches(r"step(\d+)\.z"):
        step = f"step{match[1]}"
        z = replay.input(match[0]).clone().requires_grad_()
        with torch.no_grad():
            replay.check(f"{step}.margin", margin(quantizer, z), TAP)
        quantizer.zero_grad()
        codebook_before = quantizer.embedding.weight.detach().clone()
        quantized, vq = quantizer(z)
        replay.check(f"{step}.indices", vq.ids_BHW)
        replay.check(f"{step}.z_quantized", quantized, TAP)
        for name in ("quantizer_loss", "commitment_loss", "codebook_loss"):
            replay.check(f"{step}.{name}", getattr(vq, name), LOSS)
        if replay.has(f"{step}.upstream"):
            ((quantized * replay.input(f"{step}.upstream")).sum() + vq.quantizer_loss).backward()
            replay.check(f"{step}.grad_z", z.grad, GRADIENT)
            replay.check(f"{step}.grad_codebook", quantizer.embedding.weight.grad, GRADIENT)
        replay.check(f"{step}.codebook_before", codebook_before, TAP)
        replay.check(f"{step}.codebook_after", quantizer.embedding.weight, TAP)
        if quantizer.clustering:
            replay.check(f"{step}.embed_prob_after", quantizer.embed_prob, TAP)
    if replay.has("soft_lookup.in"):
        with torch.no_grad():
            replay.check("soft_lookup.out", quantizer.lookup_soft(replay.input("soft_lookup.in")), TAP)
