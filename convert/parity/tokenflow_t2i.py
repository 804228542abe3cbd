"""Replay of TokenFlow's text-to-image model: whole generations of one, two and three passes, and the training pass."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.images import to_pil
from ...generators.next_scale_llama import NextScaleLlama, TextToImageSettings
from ...generators.next_scale_sampling import NextScaleSettings, SeededDraws, probabilities
from .. import tokenflow_t2i
from .replay import EXACT, GRADIENT, LOSS, PIXEL, Replay, Tolerance
from .tokenflow import pixels_of

ROWS = Tolerance(atol=2e-5, rtol=1e-5)
LOGITS = Tolerance(atol=1e-4)
PROBABILITIES = Tolerance(atol=1e-4)


class RecordedDraws(SeededDraws):
    """The exponential noise that the official code drew with; compares what is drawn from, and what is drawn."""

    def __init__(self, replay: Replay, loop: str, model: NextScaleLlama, pictures: int):
        self.replay, self.loop, self.slices = replay, loop, model.transformer.slices
        self.chance_BPS = torch.zeros(pictures, 1, 1)  # says how many there are, and where

    def draw(self, places: slice, logits_BkV: Tensor, settings: NextScaleSettings, number: int = 0) -> Tensor:
        prefix = f"{self.loop}.scale{self.slices.index(places)}.pass{number}"
        shares_BkV = probabilities(logits_BkV, settings)
        self.replay.check(f"{prefix}.probs", shares_BkV, PROBABILITIES)
        ids_Bk = (shares_BkV / self.replay.input(f"{prefix}.exp_noise")).argmax(dim=-1)
        self.replay.check(f"{prefix}.tokens", ids_Bk)
        return ids_Bk


def replay_t2i(replay: Replay) -> None:
    """Kind t2i."""
    model = tokenflow_t2i.from_official(replay.case.config, replay.case.weights())
    prefix_BP, negative_P = replay.input("prefix.conditional"), replay.input("prefix.unconditional")
    prefix_RP = torch.cat([prefix_BP, negative_P.expand_as(prefix_BP)])
    for loop, lists in replay.case.setting("sampling").items():
        settings = settings_of(lists, float(replay.case.setting("cfg")), len(model.scales))
        with Calls(model) as calls:
            draws = RecordedDraws(replay, loop, model, len(prefix_BP))
            ids_BS = model.generate_ids(prefix_RP, settings, draws)
        replay.check(f"{loop}.codes", ids_BS)
        with torch.no_grad():
            pixels_B3HW = model.decode_content(ids_BS)
        replay.check(f"{loop}.images_u8_bhwc", torch.stack([pixels_of(to_pil(image)) for image in pixels_B3HW]), PIXEL)
        _replay_calls(replay, model, calls, loop, prefix_RP)
    if replay.has("train.vq_codes"):
        _replay_training(replay, model)


def settings_of(lists: dict, guidance: float, num_scales: int) -> TextToImageSettings:
    """The settings of official lists of k and p, where 0 means no p."""
    pairs = [(int(k), float(p) or 1.0) for k, p in zip(lists["topk_list"], lists["topp_list"], strict=True)]
    (top_k, top_p), *again = pairs
    return TextToImageSettings(num_scales, guidance, 1.0, top_k, top_p, tuple(again))


class Calls:
    """Collects, while it is open, the rows that go into the language model, and what comes out."""

    def __init__(self, model: NextScaleLlama):
        self.model, self.rows, self.hidden = model, [], []

    def __enter__(self) -> Calls:
        def keep(module, args, output) -> None:
            self.rows.append(args[0])
            self.hidden.append(output)

        self.handle = self.model.transformer.register_forward_hook(keep)
        return self

    def __exit__(self, *error) -> None:
        self.handle.remove()


def _replay_calls(replay: Replay, model: NextScaleLlama, calls: Calls, loop: str, prefix_RP: Tensor) -> None:
    """What each pass read and gave, put together as the official code, which has no cache, computes it."""
    num_passes = {}
    for match in replay.matches(rf"{loop}\.scale(\d+)\.pass(\d+)\.tokens"):
        num_passes[int(match[1])] = int(match[2]) + 1
    with torch.no_grad():
        rows, hidden, number = [model.transformer.prefix_rows(prefix_RP)], [calls.hidden[0][:, -1:]], 0
        is_text_RP = prefix_RP != model.ids.pad
        visible_RLL = model.transformer.visible(is_text_RP)
        for scale in sorted(num_passes):
            for turn in range(num_passes[scale]):
                given, made = (calls.rows[number], calls.hidden[number]) if scale else (rows[0], hidden[0])
                before = (rows, hidden) if scale else ([], [])
                name = f"{loop}.scale{scale}.pass{turn}"
                given_RLW = torch.cat([*before[0], given], dim=1)
                replay.check(f"{name}.inputs_embeds", given_RLW, ROWS)
                hidden_RLW = torch.cat([*before[1], made], dim=1)
                replay.check(f"{name}.logits", model.transformer.logits(hidden_RLW), LOGITS)
                allowed = visible_RLL[:, None, : given_RLW.shape[1], : given_RLW.shape[1]]
                replay.check(f"{name}.attention_allowed", allowed.int().bool(), EXACT)
                if scale and turn == 0:
                    first = (given, made)
                number += 1
            if scale:
                rows.append(first[0])
                hidden.append(first[1])


def _replay_training(replay: Replay, model: NextScaleLlama) -> None:
    input_ids, labels = replay.input("train.input_ids"), replay.input("train.labels")
    pixels_B3HW = replay.input("train.image_u8").float() / 255
    with torch.no_grad():
        ids_BS = model.encode_content(pixels_B3HW)
    replay.check("train.vq_codes", ids_BS)
    start = int((labels[0] != -100).nonzero()[0])  # the same in all rows: prompts are padded to one length
    closing = tuple(input_ids[0, start + ids_BS.shape[1] :].tolist())
    model.ids = replace(model.ids, closing=closing)
    model.zero_grad()
    logits_BLV = model.logits(ids_BS, input_ids[:, :start])
    loss, _ = model.loss_of(logits_BLV, ids_BS)
    loss.backward()
    replay.check("train.logits", logits_BLV, LOGITS)
    replay.check("train.loss_vision", loss, LOSS)
    text_labels = replay.input("train.text_labels")
    text_loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), text_labels[:, 1:].flatten(), ignore_index=-100)
    replay.check("train.loss_text", text_loss, LOSS)
    parameters = dict(model.named_parameters())
    for match in replay.matches(r"train\.grad\.(.+)"):
        name, part = tokenflow_t2i.place(match[1])
        gradient = parameters[name].grad
        if part is not None:
            gradient = _part_of(model, name, gradient, part)
        replay.check(match[0], gradient, GRADIENT)


def _part_of(model: NextScaleLlama, name: str, gradient: Tensor, part: int) -> Tensor:
    """The rows of one official parameter in ours, which packs several."""
    if re.search(r"gate_up", name):
        return gradient.chunk(2)[part]
    attn = model.transformer.blocks[0].attn
    sizes = [heads * attn.head_width for heads in (attn.num_heads, attn.num_kv_heads, attn.num_kv_heads)]
    return gradient.split(sizes)[part]
