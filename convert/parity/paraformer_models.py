"""Replay of whole Paraformers: training passes, recognition, hotwords.

The authors leave what the encoder makes of the padding where their predictor sees it, so a batch differs from its
clips alone. That is replayed here; `Paraformer.encode` puts zeros there, and a clip alone is the same in both.

Shape suffixes: B clips, T frames, F features, K tokens, W width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...generators.paraformer import Heard, Paraformer
from ...generators.paraformer_text import BLANK, EOS, GOES_ON, SOS, UNKNOWN
from ...generators.paraformer_timestamps import THRESHOLD
from ...nn.parallel import scaled_to
from ...nn.sanm import is_inside
from .. import paraformer
from .paraformer import (
    FEATURE,
    as_text,
    check_value,
    frame_seconds,
    milliseconds,
    padded_to,
    spans_of,
)
from .paraformer_cif import CIF, LONG, check_levels, loop, prefix_sums, trace
from .replay import Replay, Tolerance

LOSS = Tolerance(atol=1e-5, rtol=1e-6)
GRADIENT = Tolerance(atol=1e-4, rtol=1e-5)


def case_model(replay: Replay) -> Paraformer:
    """The case's model, with the statistics and the tokens that lie in its folder."""
    folder, config = replay.case.folder, replay.case.config
    mean_file, token_file = config.get("cmvn_file"), config.get("token_list")
    cmvn_2F = paraformer.read_cmvn(folder / mean_file) if mean_file else None
    tokens = paraformer.read_tokens(folder / token_file) if isinstance(token_file, str) else ()
    frontend = {"frontend": "WavFrontend", "frontend_conf": {"n_mels": replay.case.setting("input_size")}}
    config = config if "frontend" in config else config | frontend
    return paraformer.from_official(config, replay.case.weights(), tokens, cmvn_2F)


def encode_as_they_do(model: Paraformer, features_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    inside_BT = is_inside(lengths_B, features_BTF.shape[1])
    return model.encoder(features_BTF, inside_BT), inside_BT


def way_of(replay: Replay):
    """The form of integrate-and-fire that the case's predictor has."""
    return prefix_sums if replay.case.setting("predictor") == "CifPredictorV2" else loop


# Training.


def replay_training(replay: Replay) -> None:
    """Kind train: encoder, rates, tokens, draft, mixture, losses and gradients."""
    model = case_model(replay)
    features_BTF, lengths_B = replay.input("speech"), replay.input("speech_lens")
    ids_BK, counts_B = replay.input("text"), replay.input("text_lens")
    frames_BTW, _ = encode_as_they_do(model, features_BTF, lengths_B)
    replay.check("encoder_out", frames_BTW, LOSS)
    target_counts_B = counts_B + model.config.ends_with_eos
    longest = int(target_counts_B.max())
    order_BK = None
    if replay.has("randperm"):
        order_BK = recorded_order(replay.input("randperm"), replay.case.config.get("glance"), target_counts_B)
    recorded_BKW = replay.case.io["predictor_embeds"]
    our_vectors, is_there_BK1 = model.target_vectors, recorded_BKW.ne(0).any(dim=-1, keepdim=True)
    # Theirs may lack a last token, where rounding decides; the draft then lacks it, too.
    model.target_vectors = lambda *args: our_vectors(*args) * is_there_BK1
    run = model.training_pass(frames_BTW, lengths_B, ids_BK, counts_B, order_BK=order_BK)

    scaled_BT = scaled_to(run.rates_BT, target_counts_B)
    replay.check("predictor_token_num", run.rates_BT.sum(dim=1), LOSS)
    replay.check("predictor_alphas", scaled_BT, LOSS)
    if replay.has("predictor_alphas"):
        theirs_BKW, levels_BT = way_of(replay)(replay.case.io["encoder_out"], replay.case.io["predictor_alphas"])
        replay.check("predictor_embeds", theirs_BKW, CIF)
        replay.check("predictor_peaks", levels_BT, CIF)
    replay.check("predictor_embeds", run.vectors_BKW, CIF, "integrate_and_fire")
    replay.check("sampler_encoder_out", frames_BTW, LOSS)
    replay.check("sampler_acoustic_embeds", run.vectors_BKW, CIF)
    replay.check("sampler_ys", run.target_BK)
    replay.check("sampler_ys_lens", target_counts_B)
    if run.draft_BKV is not None:
        inside_BK1 = is_inside(target_counts_B, longest)[..., None]
        recorded_BKV = replay.case.io.get("sampler_first_pass_logits", run.draft_BKV)
        replay.check("sampler_first_pass_logits", torch.where(inside_BK1, run.draft_BKV, recorded_BKV), LONG)
        replay.check("sampler_semantic_embeds", run.mixed_BKW, CIF)
    _check_losses(replay, model, run.losses, int(target_counts_B.sum()) if model.config.loss_per_token else len(ids_BK))
    _check_gradients(replay, model, run.losses["loss"])


def recorded_order(randperm_RK: Tensor, glance: list[dict[str, Any]] | None, counts_B: Tensor) -> Tensor:
    """Places of each row in the order in which they are shown: recorded where anything is, else as they come."""
    longest = int(counts_B.max())
    recorded, rows = iter(randperm_RK.tolist()), []
    for row in range(len(counts_B)):
        order = next(recorded, []) if glance is None or glance[row]["glanced"] > 0 else []
        order = [place for place in order if place >= 0]
        rows.append(order + [place for place in range(longest) if place not in order])
    return torch.tensor(rows)


def _check_losses(replay: Replay, model: Paraformer, losses: dict[str, Tensor], weight: int) -> None:
    named = {
        "loss": "loss", "stats.loss": "loss", "stats.loss_att": "tokens", "stats.loss_pre": "counts",
        "stats.loss_pre2": "fine_counts", "stats.acc": "accuracy", "stats.loss_ctc": "ctc",
    }  # fmt: skip
    for name, ours in named.items():
        if replay.has(name):
            replay.check(name, losses[ours].view(replay.case.io[name].shape), LOSS)
    if replay.has("weight"):
        replay.check("weight", torch.tensor([float(weight)]).to(replay.case.io["weight"].dtype))
    if replay.has("stats.batch_size"):
        replay.check("stats.batch_size", torch.tensor([len(replay.case.io["text"])]))


def _check_gradients(replay: Replay, model: Paraformer, loss: Tensor) -> None:
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    names = paraformer.official_names(Paraformer, dict(model.config))
    for match in replay.matches(r"grad\.(.+)"):
        replay.check(match[0], gradients[names[match[1]][0]], GRADIENT)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    replay.check("grad_norm_all", norm[None], GRADIENT)


# Recognition.


@torch.no_grad()
def replay_recognize(replay: Replay) -> None:
    """Kind recognize: waveform to text in a batch and one by one, with time stamps."""
    model = case_model(replay)
    wave_BN, samples_B = replay.input("wav"), replay.input("wav_lens")
    features_BTF, lengths_B = model.frontend(wave_BN, samples_B)
    replay.check("feats", features_BTF, FEATURE)
    replay.check("feats_lens", lengths_B)
    # From what was recorded, so that the difference of another FFT does not count again.
    features_BTF = replay.case.io.get("feats", features_BTF)
    frames_BTW, inside_BT = encode_as_they_do(model, features_BTF, lengths_B)
    replay.check("encoder_out", frames_BTW, LONG)
    replay.check("encoder_out_lens", lengths_B)
    heard = model.hear(frames_BTW, lengths_B)
    levels_BT = _check_heard(replay, heard, frames_BTW)
    log_probs_BKV = model.name_tokens(heard, frames_BTW, inside_BT)
    replay.check("log_probs", log_probs_BKV, LONG)
    ids_BK = log_probs_BKV.argmax(dim=-1)
    inside_BK = is_inside(heard.counts_B, ids_BK.shape[1])
    replay.check("ids", ids_BK.masked_fill(~inside_BK, -1))

    rates_BT, times = heard.rates_BT, 1
    if model.timestamps is not None:
        fine_BU = model.fine_rates(frames_BTW, lengths_B, reads_padding=True)
        rates_BT, times = scaled_to(fine_BU, heard.counts_B), model.timestamps.times
        replay.check("us_alphas", rates_BT, LONG)
        if replay.has("us_peaks"):
            check_levels(replay, "us_peaks", rates_BT, LONG)
            levels_BT = replay.case.io["us_peaks"]
    results = replay.case.config.get("results", {})
    for row, length in enumerate(lengths_B.tolist()):
        said = visible(ids_BK[row, : heard.counts_B[row]].tolist())
        if "ids" in results:
            check_value(replay, f"results.ids.{row}", results["ids"][row]["token_int"], said)
        rates_T, levels_T = rates_BT[row, : length * times], levels_BT[row, : length * times]
        if "text" in results:
            _check_text(replay, f"results.text.{row}", results["text"][row], model, said, rates_T, levels_T, times)
        features_1TF = features_BTF[row : row + 1, :length]
        _replay_alone(replay, model, row, features_1TF, results)


def _replay_alone(replay: Replay, model: Paraformer, row: int, features_BTF: Tensor, results: dict) -> None:
    """One clip without the others, by what users call."""
    lengths_B = torch.tensor([features_BTF.shape[1]])
    said = model.recognize(features_BTF, lengths_B)[0].ids
    frames_BTW, _ = model.encode(features_BTF, lengths_B)
    heard = model.hear(frames_BTW, lengths_B)
    rates_T, times = heard.rates_BT[0], 1
    levels_T = way_of(replay)(padded_to(frames_BTW, frames_BTW.shape[1] + 1), heard.rates_BT)[1][0]
    if "timestamps_right_order" in results:
        expected = results["timestamps_right_order"][row]
        found = spans_of(rates_T, levels_T, expected["tokens"])
        name, unit = f"results.timestamps.{row}", frame_seconds(1)
        check_value(replay, f"{name}.ms", expected["ms"], milliseconds(found, unit))
        check_value(replay, f"{name}.string", expected["string"], as_text(found, expected["tokens"], unit))
    if model.timestamps is not None:
        rates_T = scaled_to(model.fine_rates(frames_BTW, lengths_B), heard.counts_B)[0]
        levels_T, times = trace(rates_T[None], THRESHOLD)[0], model.timestamps.times
    if "text_one_by_one" in results:
        expected = results["text_one_by_one"][row]
        _check_text(replay, f"results.text_one_by_one.{row}", expected, model, said, rates_T, levels_T, times)


def _check_heard(replay: Replay, heard: Heard, frames_BTW: Tensor) -> Tensor:
    """Rates, counts and vectors; returns the levels by the authors' way."""
    theirs_BKW, levels_BT = way_of(replay)(padded_to(frames_BTW, frames_BTW.shape[1] + 1), heard.rates_BT)
    replay.check("alphas", heard.rates_BT, LONG)
    replay.check("peaks", levels_BT, LONG)
    replay.check("token_num", heard.counts_B.float())
    replay.check("acoustic_embeds", heard.vectors_BKW, LONG, "integrate_and_fire")
    replay.check("acoustic_embeds", theirs_BKW[:, : heard.vectors_BKW.shape[1]], LONG)
    return levels_BT


def visible(ids: list[int]) -> list[int]:
    return [number for number in ids if number not in (BLANK, SOS, EOS)]


def _check_text(
    replay: Replay, name: str, expected: dict, model: Paraformer, ids: list[int], rates_T: Tensor, levels_T: Tensor,
    times: int,
) -> None:  # fmt: skip
    """Text, and milliseconds where there are any.

    Theirs give the n-th word that is left when <unk> is dropped the n-th time of all tokens.
    """
    tokens = model.vocabulary.tokens
    chars = [tokens[number] for number in ids]
    if not _is_whole(chars):  # a word that breaks off: theirs glues its pieces to the next word
        return
    kept = [number for number in ids if tokens[number] != UNKNOWN]
    if "timestamp" not in expected:
        words = model.vocabulary.words(kept, [(0.0, 0.0)] * len(kept))
        check_value(replay, name, expected["text"].replace(" ", ""), "".join(word.text for word in words))
        return
    spans = milliseconds(spans_of(rates_T, levels_T, chars), frame_seconds(times))
    words = model.vocabulary.words(kept, [tuple(span) for span in spans[: len(kept)]])
    check_value(replay, name, expected["text"], " ".join(word.text for word in words))
    check_value(replay, f"{name}.ms", expected["timestamp"], [[word.start, word.end] for word in words])


def _is_whole(chars: list[str]) -> bool:
    """Whether every piece that promises another is followed by a Latin one."""
    followed = pairwise([*(char for char in chars if char != UNKNOWN), ""])
    return all(not char.endswith(GOES_ON) or (after.isascii() and after != "") for char, after in followed)


# Hotwords.


@torch.no_grad()
def replay_seaco(replay: Replay) -> None:
    """Kind seaco: log-probabilities with and without hotwords."""
    model = case_model(replay)
    features_BTF, lengths_B = replay.input("feats"), replay.input("feats_lens")
    frames_BTW, inside_BT = encode_as_they_do(model, features_BTF, lengths_B)
    replay.check("encoder_out", frames_BTW, LONG)
    replay.check("encoder_out_lens", lengths_B)
    heard = model.hear(frames_BTW, lengths_B)
    replay.check("token_num", heard.counts_B.float())
    replay.check("acoustic_embeds", heard.vectors_BKW, LONG)
    hotwords = replay.case.setting("hotwords")
    replay.check("hotword.pad", pad_sequence([torch.tensor(ids) for ids in hotwords], batch_first=True))
    replay.check("hotword.lens", torch.tensor([len(ids) for ids in hotwords]))
    hotwords_NW = model.hotwords.embed(model.decoder, hotwords)
    replay.check("hotword.embeds", hotwords_NW, LONG)
    replay.check("no_hotword.log_probs", model.name_tokens(heard, frames_BTW, inside_BT), LONG)
    for match in replay.matches(r"hotword(?:_w(\d)(\d+))?\.log_probs"):
        weight = float(f"{match[1]}.{match[2]}") if match[1] else 1.0
        log_probs_BKV = model.name_tokens(heard, frames_BTW, inside_BT, hotwords_NW, weight)
        replay.check(match[0], log_probs_BKV, LONG)
