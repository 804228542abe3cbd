"""Replay of FlexAR: a teacher-forced pass, and generation with and without guidance."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ...generators.next_scale_sampling import probabilities
from ...generators.next_token import NextToken, NextTokenSettings
from ...generators.next_token_text import Prompts
from .. import flexar
from .replay import LOSS, Replay, Tolerance

INNER = Tolerance(atol=2e-5)
LOGITS = Tolerance(atol=5e-5)


class OneGenerator:
    """Draws of a whole batch from one generator, as the official code makes them."""

    def __init__(self, seed: int):
        self.rng = torch.Generator().manual_seed(seed)

    def draw(self, places: slice, logits_B1V: Tensor, settings: NextTokenSettings) -> Tensor:
        if settings.temperature == 0:
            return logits_B1V.argmax(dim=-1)
        return torch.multinomial(probabilities(logits_B1V[:, 0], settings), 1, generator=self.rng)


def replay_class(replay: Replay) -> None:
    """Kind ar_class. Guided rows without a class get class 0 from the second token on, as in the official code."""
    model = flexar.from_official(replay.case.setting("config"), replay.case.weights())
    labels = replay.input("labels")
    # -1 is "no class" to the authors.
    condition = torch.where(labels < 0, model.config.num_classes, labels)
    _replay(replay, model, condition, torch.where(labels < 0, 0, labels))


def replay_text(replay: Replay) -> None:
    """Kind ar_text, from recorded outputs of a text encoder."""
    model = flexar.from_official(replay.case.setting("config"), replay.case.weights())
    states, is_text = replay.input("text_states"), replay.input("text_mask").bool()
    nothing = replay.input("null_text_states"), replay.input("null_text_mask").bool()
    with torch.no_grad():
        replay.check("text_projected", model.transformer.text_proj(states), INNER)
    _replay(replay, model, Prompts(("",) * len(states), states, is_text, *nothing))


def _replay(replay: Replay, model: NextToken, condition: Tensor | Prompts, later: Tensor | None = None) -> None:
    """`later`: the classes of the guided rows from the second token on, conditional ones and then others' class 0."""
    network, ids = model.transformer, replay.input("ids")
    with torch.no_grad():
        begin, text = model._conditioned(condition)
        embeds = torch.cat([begin, network.embed(ids[:, :-1], 0)], dim=1)
        features = network(embeds, text)
        output, logits = model.token_loss(ids, condition)
    replay.check("embeds", embeds, INNER)
    replay.check("features", features, INNER)
    replay.check("logits", logits, LOGITS)
    replay.check("loss", output.loss, LOSS)
    notes = replay.case.setting("notes")
    for match in replay.matches(r"gen_(\w+)\.ids"):
        options = notes["generation"].get(match[1], {})
        settings = _settings(match[1], options, replay.case.io[match[0]].shape[1])
        later_rows = None
        if later is not None and settings.guidance != 1:
            later_rows = torch.cat([later, torch.zeros_like(later)])
        draws = OneGenerator(int(notes["generator_seed"]))
        made = model.generate_ids(condition, settings, [], draws=draws, later_condition=later_rows)
        replay.check(match[0], made)
        name = f"gen_{match[1]}.step_logits"
        if replay.has(name):
            replay.check(name, _step_logits(model, condition, replay.case.io[match[0]], settings, later_rows), LOGITS)


def _settings(name: str, options: dict[str, Any], num_tokens: int) -> NextTokenSettings:
    is_greedy = re.match("greedy", name) is not None
    return NextTokenSettings(
        num_tokens=num_tokens,
        guidance=float(options.get("cfg", 1.0)),
        temperature=0.0 if is_greedy else float(options.get("temperature", 1.0)),
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 0.0)) or 1.0,  # 0 is "all" to the authors
    )


@torch.no_grad()
def _step_logits(
    model: NextToken, condition: Tensor | Prompts, ids: Tensor, settings: NextTokenSettings, later: Tensor | None
) -> Tensor:
    """Logits [R, steps, V] of every step, before guidance, without a cache: by one pass over all that was written."""
    rows = condition if settings.guidance == 1 else model._with_no_condition(condition)
    read = ids.repeat(len(rows) // len(ids), 1)

    def logits(rows: Tensor | Prompts) -> Tensor:
        begin, text = model._conditioned(rows)
        network = model.transformer
        return network.logits(network(torch.cat([begin, network.embed(read[:, :-1], 0)], dim=1), text))

    first = logits(rows)
    return first if later is None else torch.cat([first[:, :1], logits(later)[:, 1:]], dim=1)
