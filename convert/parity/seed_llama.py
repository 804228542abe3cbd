"""Replay of SEED-LLaMA: logits, loss, greedy steps with a cache, and the order of a text with pictures."""

from __future__ import annotations

import torch

from ...generators.next_scale_sampling import probabilities
from ...generators.seed_llama import SeedLLaMA
from ...generators.seed_llama_sampling import WritingSettings
from ...nn.llama import next_token_loss
from .. import seed_llama
from .replay import LOSS, Replay, Tolerance

LOGITS = Tolerance(atol=2e-5)
TOP_P = WritingSettings(max_tokens=1, temperature=1.0, top_p=0.5, max_images=0, starts_with_image=False)


def replay_llm(replay: Replay) -> None:
    """Kind multimodal_llm."""
    from transformers import DynamicCache

    model = seed_llama.from_official(replay.case.config, replay.case.weights())
    with torch.no_grad():
        logits_BLV = model.logits(model.hidden_states(replay.input("input_ids"), use_cache=False))
        loss = next_token_loss(logits_BLV, replay.input("labels"))
        replay.check("logits", logits_BLV, LOGITS)
        replay.check("loss", loss.reshape(replay.case.io["loss"].shape) if replay.has("loss") else loss, LOSS)
        # The official code lets any token follow any other.
        cache, ids_BN = DynamicCache(), replay.input("prompt")
        steps, greedy = [], []
        for _ in range(replay.case.io["greedy_ids"].shape[1] if replay.has("greedy_ids") else 0):
            hidden_BNW = model.hidden_states(ids_BN, past_key_values=cache, use_cache=True)
            steps.append(model.logits(hidden_BNW[:, -1]))
            ids_BN = steps[-1].argmax(dim=-1, keepdim=True)
            greedy.append(ids_BN)
    if greedy:
        step_logits = torch.stack(steps, dim=1)[0] if len(ids_BN) == 1 else torch.stack(steps, dim=1)
        replay.check("greedy_ids", torch.cat(greedy, dim=1))
        replay.check("step_logits", step_logits, LOGITS)
        replay.check("step_top_p_05_probs", probabilities(step_logits, TOP_P), LOGITS)


def replay_sequence(replay: Replay) -> None:
    """Kind sequence_layout: a text with pictures between its words, as the recorded sequence has them."""
    case = replay.case
    small = {"hidden_size": 2, "intermediate_size": 1, "num_layers": 1, "num_heads": 1}
    first, begin, end = int(case.setting("image_id_shift")), int(case.setting("boi")), int(case.setting("eoi"))
    codes, length = int(case.setting("codes")), int(case.setting("image_tokens"))
    with torch.device("meta"):
        model = SeedLLaMA(
            vocab_size=max(first + codes, begin + 1, end + 1), first_code=first, num_codes=codes, begin_image=begin,
            end_image=end, image_tokens=length, begin_text=int(case.setting("bos")), end_text=int(case.setting("eos")),
            **small,
        )  # fmt: skip
    images, text = replay.input("image_ids"), replay.input("text_ids").tolist()
    # Where the pictures stand is the case's choice, so it is read from what was recorded.
    places = [at for at, token in enumerate(case.io.get("sequence", torch.tensor([])).tolist()) if token == begin]
    parts, used = [], 0
    for number, (place, image) in enumerate(zip(places, images, strict=True)):
        words = place - 1 - number * (length + 2)
        parts += [text[used:words], image]
        used = words
    replay.check("sequence", model.layout.sequence([*parts, text[used:]]))
