"""The authors' two ways of integrate-and-fire, with their roundings, and replays of them and of ours.

Both are for rates up to 1. They disagree where rounding decides whether a last token is complete, and above 1 neither
does what it should; `kernels.cif` is what the models use.

Shape suffixes: B rows, T frames, K tokens, D channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.strict import build, check_keys
from ...generators.paraformer import Heard, hear
from ...generators.paraformer_timestamps import THRESHOLD, TimestampHead, levels
from ...kernels.cif import integrate_and_fire, mass
from ...nn.parallel import RatePredictor, scaled_to
from ...nn.sanm import is_inside
from .. import paraformer
from ..fields import Fields
from .replay import Replay, Tolerance

CIF = Tolerance(atol=1e-5)
LONG = Tolerance(atol=1e-4)  # an fp32 remainder of a sum of hundreds
GRADIENT = Tolerance(atol=1e-4)


def loop(hidden_BTD: Tensor, rates_BT: Tensor, threshold: float = 1.0) -> tuple[Tensor, Tensor]:
    """Frame by frame. Tokens [B, K, D] with K the largest of the rounded sums, and the level of each frame [B, T].

    `threshold` only decides when a token is complete; it is filled up to 1 all the same.
    """
    level_B, filled_BD = torch.zeros_like(rates_BT[:, 0]), torch.zeros_like(hidden_BTD[:, 0])
    tokens: list[list[Tensor]] = [[] for _ in rates_BT]
    traced = []
    for rate_B, hidden_BD in zip(rates_BT.unbind(1), hidden_BTD.unbind(1), strict=True):
        missing_B, level_B = 1 - level_B, level_B + rate_B
        traced.append(level_B)
        fires_B = level_B >= threshold
        level_B = torch.where(fires_B, level_B - 1, level_B)
        used_B = torch.where(fires_B, missing_B, rate_B)
        filled_BD = filled_BD + used_B[:, None] * hidden_BD
        for row in fires_B.nonzero()[:, 0].tolist():
            tokens[row].append(filled_BD[row])
        filled_BD = torch.where(fires_B[:, None], (rate_B - used_B)[:, None] * hidden_BD, filled_BD)
    return _rows(tokens, hidden_BTD, int(rates_BT.sum(dim=1).round().max())), torch.stack(traced, dim=1)


def prefix_sums(hidden_BTD: Tensor, rates_BT: Tensor, rounds: bool = True) -> tuple[Tensor, Tensor]:
    """By differences of running sums ("v1"); as many rows as the largest sum, rounded or (as exported) floored."""
    mass_BT = mass(rates_BT).float()
    whole_BT = mass_BT.floor()
    fires_BT = whole_BT > F.pad(whole_BT, (1, 0))[:, :-1]
    levels_BT = fires_BT + mass_BT - whole_BT
    rest_BT = levels_BT - levels_BT.floor()
    until_BTD = (rates_BT[..., None] * hidden_BTD).cumsum(dim=1) - rest_BT[..., None] * hidden_BTD
    tokens: list[list[Tensor]] = []
    for fires_T, until_TD in zip(fires_BT, until_BTD, strict=True):
        until_KD = until_TD[fires_T]
        tokens.append(list(until_KD - F.pad(until_KD, (0, 0, 1, 0))[:-1]))
    sums_B = rates_BT.sum(dim=1)
    return _rows(tokens, hidden_BTD, int((sums_B.round() if rounds else sums_B.floor()).max())), levels_BT


def _rows(tokens: list[list[Tensor]], hidden_BTD: Tensor, num_rows: int) -> Tensor:
    empty = hidden_BTD.new_zeros(0, hidden_BTD.shape[2])
    stacked = [torch.stack(row) if row else empty for row in tokens]
    return torch.stack([F.pad(row, (0, 0, 0, num_rows - len(row))) for row in stacked])


def trace(rates_BT: Tensor, threshold: float = 1.0) -> Tensor:
    """The level of each frame, where what is complete is taken away as `threshold`; fp32, frame by frame."""
    level_B, traced = torch.zeros_like(rates_BT[:, 0]), []
    for rate_B in rates_BT.unbind(1):
        level_B = level_B + rate_B
        traced.append(level_B)
        level_B = torch.where(level_B >= threshold, level_B - threshold, level_B)
    return torch.stack(traced, dim=1)


def replay_cif(replay: Replay) -> None:
    """Kind cif: both ways on each pattern of rates with gradients, and ours where the two mean the same."""
    names = dict.fromkeys(match[1] for match in replay.matches(r"([^.]+)\.alphas"))
    for name in names:
        threshold = float(f"{match[1]}.{match[2]}") if (match := re.fullmatch(r"thr(\d)(\d+)", name)) else 1.0
        tolerance = LONG if name == "long" else CIF
        _replay_way(replay, f"{name}.loop", lambda h, a, t=threshold: loop(h, a, t), CIF)
        _replay_way(replay, f"{name}.v1", prefix_sums, tolerance)
        rates_BT, hidden_BTD = replay.input(f"{name}.alphas"), replay.input(f"{name}.hidden")
        _check(replay, f"{name}.v1_export.embeds", prefix_sums(hidden_BTD, rates_BT, rounds=False)[0], tolerance)
        replay.check(f"{name}.wo_hidden.fires", trace(rates_BT), CIF)
        replay.check(f"{name}.wo_hidden_v1.fires", prefix_sums(hidden_BTD, rates_BT)[1], tolerance)
        replay.check(f"{name}.wo_hidden_ts.fires", trace(rates_BT, THRESHOLD), CIF)
        if float(rates_BT.max()) <= 1:
            if threshold == 1:
                _replay_ours(replay, name)
            if _is_clear(rates_BT, THRESHOLD):
                replay.check(f"{name}.wo_hidden_ts.fires", levels(rates_BT).float(), CIF, "levels")


def _replay_way(replay: Replay, name: str, way: Callable, tolerance: Tolerance) -> None:
    """`name` is "pattern.way"."""
    pattern, kind = name.split(".")
    if not replay.has(f"{name}.embeds"):
        return
    hidden_BTD = replay.input(f"{pattern}.hidden").clone().requires_grad_()
    rates_BT = replay.input(f"{pattern}.alphas").clone().requires_grad_()
    tokens_BKD, levels_BT = way(hidden_BTD, rates_BT)
    _check(replay, f"{name}.embeds", tokens_BKD, tolerance)
    replay.check(f"{name}.fires", levels_BT, tolerance)
    if replay.has(f"{pattern}.grad_out_{kind}"):
        upstream_BKD = replay.input(f"{pattern}.grad_out_{kind}")
        _check_gradients(replay, name, tokens_BKD, upstream_BKD, hidden_BTD, rates_BT)


def _replay_ours(replay: Replay, pattern: str) -> None:
    """`integrate_and_fire` against the loop, unless a sum is so near to a whole number that rounding decides."""
    hidden_BTD = replay.input(f"{pattern}.hidden").clone().requires_grad_()
    rates_BT = replay.input(f"{pattern}.alphas").clone().requires_grad_()
    if not _is_clear(rates_BT, 1.0):
        return
    tokens_BKD, _ = integrate_and_fire(hidden_BTD, rates_BT)
    recorded_BKD = replay.case.io[f"{pattern}.loop.embeds"]
    tokens_BKD = F.pad(tokens_BKD, (0, 0, 0, recorded_BKD.shape[1] - tokens_BKD.shape[1]))
    _check(replay, f"{pattern}.loop.embeds", tokens_BKD, CIF, "integrate_and_fire")
    if replay.has(f"{pattern}.grad_out_loop"):
        upstream_BKD = replay.input(f"{pattern}.grad_out_loop")
        _check_gradients(
            replay, f"{pattern}.loop", tokens_BKD, upstream_BKD, hidden_BTD, rates_BT, "integrate_and_fire"
        )


def _is_clear(rates_BT: Tensor, unit: float) -> bool:
    """Whether no running sum lies so near to a multiple of `unit` that fp32 and fp64 may differ about it."""
    parts_BT = mass(rates_BT.detach()) / unit
    distance_BT = (parts_BT - parts_BT.round()).abs()
    return bool(((distance_BT == 0) | (distance_BT > 1e-5) | (parts_BT < 0.5)).all())


def _check(replay: Replay, name: str, ours: Tensor, tolerance: Tolerance, note: str | None = None) -> None:
    """`check`, also for tensors that have no elements: then the shape is all there is to compare."""
    if replay.has(name) and not replay.case.io[name].numel() and replay.case.io[name].shape == ours.shape:
        replay.input(name)
    else:
        replay.check(name, ours, tolerance, note)


def _check_gradients(replay, name, tokens_BKD, upstream_BKD, hidden_BTD, rates_BT, note: str | None = None) -> None:
    if tokens_BKD.requires_grad and tokens_BKD.numel():
        gradients = torch.autograd.grad(tokens_BKD, (hidden_BTD, rates_BT), upstream_BKD)
    else:
        gradients = torch.zeros_like(hidden_BTD), torch.zeros_like(rates_BT)
    for kind, gradient in zip(("hidden", "alphas"), gradients, strict=True):
        replay.check(f"{name}.grad_{kind}", gradient, GRADIENT, note)


# The predictors.


def replay_predictor(replay: Replay) -> None:
    """Kind predictor: rates, tokens and levels of every variant, in the batch, alone and with a target."""
    weights = replay.case.weights()
    hidden_BTW, lengths_B = replay.input("hidden"), replay.input("lens")
    inside_BT = is_inside(lengths_B, hidden_BTW.shape[1])
    replay.check("mask", inside_BT[:, None])
    targets_B = (replay.input("target") != -1).sum(dim=1)
    for name, variant in replay.case.setting("variants").items():
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        predictor, timestamps = predictor_from_official(variant, own)
        way = prefix_sums if variant["predictor"] == "CifPredictorV2" else loop
        fields = Fields(variant["predictor_conf"], "predictor_conf")
        tail, is_tail_at_end = paraformer.tail_of(variant), not fields.flag("tail_mask", True)
        ends_B = torch.full_like(lengths_B, hidden_BTW.shape[1]) if is_tail_at_end else lengths_B
        with torch.no_grad():
            rates_BT = predictor(hidden_BTW, inside_BT)
            _check_heard(replay, f"{name}.infer", hear(hidden_BTW, rates_BT, ends_B, tail), hidden_BTW, way, tail)
            for row, length in enumerate(lengths_B.tolist()):
                alone_BTW = hidden_BTW[row : row + 1, :length]
                heard = hear(alone_BTW, predictor(alone_BTW), lengths_B[row : row + 1], tail)
                _check_heard(replay, f"{name}.alone{row}", heard, alone_BTW, way, tail)
            _replay_with_target(replay, f"{name}.train", hidden_BTW, rates_BT, targets_B, way)
            if timestamps is not None:
                source_BTW = predictor.features(hidden_BTW) if timestamps.reads_features else hidden_BTW
                fine_BU = timestamps(source_BTW, lengths_B, reads_padding=True)
                for kind in ("infer", "train"):
                    replay.check(f"{name}.{kind}.token_num2", fine_BU.sum(dim=1), CIF)
                _replay_fine(replay, f"{name}.ts", timestamps, fine_BU, _counts_of_ts(replay, name, targets_B))


def predictor_from_official(variant: dict, weights: dict[str, Tensor]) -> tuple[RatePredictor, TimestampHead | None]:
    """The predictor of a config's `predictor` and `predictor_conf`, and the head for time stamps that it holds."""
    arguments, fine = paraformer.predictor_arguments(variant)
    names = paraformer.official_names(RatePredictor, arguments, "predictor.", "predictor.")
    fine_names = {}
    if fine:
        fine_names = paraformer.official_names(TimestampHead, fine, "timestamps.", "predictor.")
    check_keys({key: shape for key, (_, shape) in (names | fine_names).items()}, weights)
    predictor = build(RatePredictor, arguments, {names[key][0]: weights[key] for key in names})
    if not fine:
        return predictor, None
    return predictor, build(TimestampHead, fine, {fine_names[key][0]: weights[key] for key in fine_names})


def _check_heard(replay: Replay, name: str, heard: Heard, hidden_BTW: Tensor, way: Callable, tail: float) -> None:
    """Rates, counts and tokens: by the authors' way, and by ours. Without a tail theirs have no frame for it."""
    theirs_BKW, levels_BT = way(F.pad(hidden_BTW, (0, 0, 0, 1)), heard.rates_BT)
    frames = heard.rates_BT.shape[1] - (tail == 0)
    rates_BT = heard.rates_BT[:, :frames]
    replay.check(f"{name}.alphas", rates_BT, CIF)
    replay.check(f"{name}.peak", levels_BT[:, :frames], CIF)
    sums_B = rates_BT.sum(dim=1)
    replay.check(f"{name}.token_num", sums_B.floor() if tail else sums_B, CIF)
    if replay.has(f"{name}.embeds"):
        kept = replay.case.io[f"{name}.embeds"].shape[1]
        ours_BKW = F.pad(heard.vectors_BKW, (0, 0, 0, kept - heard.vectors_BKW.shape[1]))
        _check(replay, f"{name}.embeds", ours_BKW, CIF, "integrate_and_fire")
        _check(replay, f"{name}.embeds", theirs_BKW[:, :kept], CIF)


def _replay_with_target(replay, name, hidden_BTW, rates_BT, targets_B, way) -> None:
    """Rates scaled to a number of tokens, where rounding decides about the last one.

    Tokens come from the recorded rates, whose last bit is the authors'; all but each row's last one also from ours.
    """
    replay.check(f"{name}.token_num", rates_BT.sum(dim=1), CIF)
    scaled_BT = scaled_to(rates_BT, targets_B)
    replay.check(f"{name}.alphas", scaled_BT, CIF)
    recorded_BT, recorded_BKW = replay.case.io[f"{name}.alphas"], replay.case.io[f"{name}.embeds"]
    tokens_BKW, levels_BT = way(hidden_BTW, recorded_BT)
    replay.check(f"{name}.embeds", tokens_BKW, CIF)
    replay.check(f"{name}.peak", levels_BT, CIF)
    ours_BKW, _ = integrate_and_fire(hidden_BTW, scaled_BT, targets_B, recorded_BKW.shape[1])
    is_last_BK1 = (torch.arange(recorded_BKW.shape[1]) == targets_B[:, None] - 1)[..., None]
    replay.check(f"{name}.embeds", torch.where(is_last_BK1, recorded_BKW, ours_BKW), CIF, "integrate_and_fire")


def _counts_of_ts(replay: Replay, name: str, targets_B: Tensor) -> Tensor:
    """What the recorded fine rates were scaled to."""
    if not replay.has(f"{name}.ts.us_alphas"):
        return targets_B
    return replay.case.io[f"{name}.ts.us_alphas"].sum(dim=1).round()


def _replay_fine(replay: Replay, name: str, timestamps: TimestampHead, fine_BU: Tensor, counts_B: Tensor) -> None:
    scaled_BU = scaled_to(fine_BU, counts_B)
    coarse_BT = timestamps.coarse(scaled_BU)
    replay.check(f"{name}.us_alphas", scaled_BU, CIF)
    replay.check(f"{name}.ds_alphas", coarse_BT, CIF)
    for kind, rates in (("us_peaks", scaled_BU), ("ds_peak", coarse_BT)):
        if replay.has(f"{name}.{kind}"):
            check_levels(replay, f"{name}.{kind}", rates, LONG)


def check_levels(replay: Replay, name: str, rates_BT: Tensor, tolerance: Tolerance) -> None:
    """Levels frame by frame, and by ours where no frame is more than a token and rounding decides nothing."""
    if name not in replay.case.io:
        raise InvalidInput(f"{replay.case.folder / 'io.safetensors'} lacks '{name}'")
    replay.check(name, trace(rates_BT, THRESHOLD), tolerance)
    if float(rates_BT.max()) < THRESHOLD and _is_clear(rates_BT, THRESHOLD):
        replay.check(name, levels(rates_BT).float(), tolerance, "levels")
