"""Replay of Paraformer's parts: frontend, encoder, decoder, losses, masked features, time stamps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.strict import build
from ...generators.paraformer_frontend import INT16, Frontend
from ...generators.paraformer_timestamps import THRESHOLD, Span, completions, spans
from ...generators.paraformer_training import masked_features
from ...nn.parallel import ParallelDecoder, count_loss, token_loss
from ...nn.sanm import Encoder, EncoderLayer, is_inside
from .. import paraformer
from ..fields import Fields
from .replay import Replay, Tolerance

INNER = Tolerance(atol=1e-5)
ENERGY = Tolerance(atol=1e-3)  # logarithms of small energies beside large ones, from another FFT
FEATURE = Tolerance(atol=3e-4)  # the same, scaled
SCORE = Tolerance(atol=1e-6, rtol=1e-6)


def replay_frontend(replay: Replay) -> None:
    """Kind frontend: energies, stacked and normalized; clips alone, short, with noise, silent; frames beyond edges."""
    frontend = case_frontend(replay)
    replay.check("cmvn", frontend.cmvn)
    wave_BN, lengths_B = replay.input("wav"), replay.input("wav_lens")
    energies_BTM, frames_B = frontend.energies(wave_BN, lengths_B)
    features_BLF, feature_lengths_B = frontend(wave_BN, lengths_B)
    inside_BT = is_inside(frames_B, energies_BTM.shape[1])
    stacked_BLF, _ = frontend.stacked(energies_BTM, frames_B)
    inside_BL = is_inside(feature_lengths_B, features_BLF.shape[1])
    replay.check("fbank", energies_BTM * inside_BT[..., None], ENERGY)
    replay.check("fbank_lens", frames_B)
    replay.check("lfr", stacked_BLF * inside_BL[..., None], ENERGY)
    replay.check("feats", features_BLF, FEATURE)
    replay.check("feats_lens", feature_lengths_B)
    if replay.has("single.feats"):
        _check_single(replay, frontend, wave_BN, lengths_B)
    if replay.has("short.wav"):
        features_BLF, feature_lengths_B = frontend(replay.input("short.wav"))
        replay.check("short.feats", features_BLF, FEATURE)
        replay.check("short.feats_lens", feature_lengths_B)
    if replay.has("dither.wav"):
        noise_BTS = replay.input("dither.noise")[None]
        stacked_BLF, feature_lengths_B = frontend.stacked(
            *frontend.energies(replay.input("dither.wav"), None, noise_BTS)
        )
        replay.check("dither.feats", frontend.normalized(stacked_BLF), FEATURE)
        replay.check("dither.feats_lens", feature_lengths_B)
    if replay.has("nosnip.wav"):
        energies_BTM, frames_B = frontend.energies(*reflected(replay.input("nosnip.wav") / INT16, frontend))
        replay.check("nosnip.feats", energies_BTM, ENERGY)
        replay.check("nosnip.feats_lens", frames_B)
    if replay.has("silence.feats"):
        frames = replay.case.io["silence.feats"].shape[1]
        silence_BN = torch.zeros(1, (frames - 1) * frontend.hop + frontend.window)
        replay.check("silence.feats", frontend.energies(silence_BN)[0], ENERGY)
    for match in replay.matches(r"lfr_unit\.(\d+)"):
        frames = int(match[1])
        numbers_BTM = torch.arange(2.0 * frames).view(1, frames, 2)
        replay.check(match[0], frontend.stacked(numbers_BTM, torch.tensor([frames]))[0][0])


def case_frontend(replay: Replay) -> Frontend:
    """The frontend of a case, with its statistics."""
    arguments = paraformer.frontend_arguments(replay.case.config)
    cmvn_2F = paraformer.read_cmvn(replay.case.folder / replay.case.setting("cmvn_file", default="am.mvn"))
    return build(Frontend, arguments, {"cmvn": cmvn_2F})


def _check_single(replay: Replay, frontend: Frontend, wave_BN: Tensor, lengths_B: Tensor) -> None:
    """One of the clips without the padding; which one is not said, so it is the one that is nearest."""
    recorded_BLF, recorded_lengths_B = replay.case.io["single.feats"], replay.case.io["single.feats_lens"]
    alone = [frontend(wave_BN[row : row + 1, :length]) for row, length in enumerate(lengths_B.tolist())]
    alone = [found for found in alone if torch.equal(found[1], recorded_lengths_B.long())]
    if not alone:
        raise InvalidInput(
            f"{replay.case.folder}: no clip has the {recorded_lengths_B.tolist()} vectors of single.feats"
        )
    features_BLF, feature_lengths_B = min(alone, key=lambda found: float((found[0] - recorded_BLF).abs().max()))
    replay.check("single.feats", features_BLF, FEATURE)
    replay.check("single.feats_lens", feature_lengths_B)


def reflected(wave_BN: Tensor, frontend: Frontend) -> tuple[Tensor, Tensor]:
    """Samples mirrored at both edges, so that frames are centred on multiples of the hop, and the length in samples."""
    frames = (wave_BN.shape[1] + frontend.hop // 2) // frontend.hop
    before = frontend.window // 2 - frontend.hop // 2
    mirrored_BN = wave_BN.flip(1)
    wave_BN = torch.cat([mirrored_BN[:, mirrored_BN.shape[1] - before :], wave_BN, mirrored_BN], dim=1)
    length = (frames - 1) * frontend.hop + frontend.window
    return wave_BN[:, :length], torch.full((len(wave_BN),), length)


def replay_encoder(replay: Replay) -> None:
    """Kind encoder: the padded batch layer by layer, and its last row alone."""
    arguments = paraformer.encoder_arguments(replay.case.config, replay.case.setting("input_size"))
    names = paraformer.official_names(Encoder, arguments, "encoder.", "encoder.")
    encoder = build(Encoder, arguments, paraformer.place(names, replay.case.weights()))
    xs_BLF, lengths_B = replay.input("xs"), replay.input("xs_lens")
    inside_BL = is_inside(lengths_B, xs_BLF.shape[1])
    with torch.no_grad():
        x_BLF = encoder.enter(xs_BLF)
        replay.check("pe", x_BLF, INNER)
        for number, layer in enumerate(encoder.layers):
            if number == 0:
                replay.check_all(_inner_encoder(layer, x_BLF, inside_BL), INNER)
            x_BLF = layer(x_BLF, inside_BL)
            replay.check(f"layer{number}", x_BLF, INNER)
        replay.check("out", encoder(xs_BLF, inside_BL), INNER)
        replay.check("out_lens", lengths_B)
        replay.check("last_alone.out", encoder(xs_BLF[-1:, : lengths_B[-1]], None), INNER)


def _inner_encoder(layer: EncoderLayer, x_BLF: Tensor, inside_BL: Tensor) -> dict[str, Tensor]:
    """What the authors' modules of the first layer give."""
    outputs: dict[str, Tensor] = {}
    parts = {"norm1": layer.norm1, "qkv": layer.attn.qkv, "fsmn": layer.attn.memory, "attn_out_proj": layer.attn.out}
    parts |= {"attn": layer.attn, "ff": layer.mlp}

    def keep(name: str):
        def hook(module, args, output) -> None:
            outputs[f"layer0.{name}"] = output.clone()  # sums are made in its place

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in parts.items()]
    layer(x_BLF, inside_BL)
    for handle in handles:
        handle.remove()
    return outputs


def replay_decoder(replay: Replay) -> None:
    """Kind decoder: layer by layer to the logits."""
    fields = Fields(replay.case.setting("decoder_conf"), "decoder_conf")
    arguments = paraformer.decoder_arguments(fields, replay.case.setting("decoder"))
    arguments |= {"vocab_size": replay.case.setting("vocab_size"), "width": replay.case.setting("encoder_output_size")}
    names = paraformer.official_names(ParallelDecoder, arguments, "decoder.", "decoder.")
    decoder = build(ParallelDecoder, arguments, paraformer.place(names, replay.case.weights()))
    memory_BTW, x_BKW = replay.input("memory"), replay.input("embeds")
    lengths_B, counts_B = replay.input("memory_lens"), replay.input("embeds_lens")
    inside_BT, inside_BK = is_inside(lengths_B, memory_BTW.shape[1]), is_inside(counts_B, x_BKW.shape[1])
    stack = decoder.stack
    with torch.no_grad():
        logits_BKV = decoder(x_BKW, inside_BK, memory_BTW, inside_BT)
        for number, layer in enumerate(stack.layers):
            if number == 0:
                normed_BKW = layer.mlp(layer.norm1(x_BKW))
                replay.check("layer0.ff", normed_BKW, INNER)
                replay.check("layer0.self", layer.memory(layer.norm2(normed_BKW), inside_BK), INNER)
                asked_BKW = layer.norm3(layer.remember(x_BKW, inside_BK))
                replay.check("layer0.cross", layer.cross(asked_BKW, memory_BTW, inside_BT), INNER)
            x_BKW = layer(x_BKW, inside_BK, memory_BTW, inside_BT)
            later = number - arguments["attention_depth"]
            replay.check(f"layer{number}" if later < 0 else f"layer2_{later}", x_BKW, INNER)
        x_BKW = stack.last_mlp(stack.last_norm(x_BKW))
        replay.check("layer3_0", x_BKW, INNER)
        replay.check("after_norm", stack.norm(x_BKW), INNER)
    replay.check("logits", logits_BKV, INNER)
    replay.check("log_probs", logits_BKV.log_softmax(dim=-1), INNER)
    replay.check("out_lens", counts_B[:, None].float())


def replay_losses(replay: Replay) -> None:
    """Kind losses: the divergence from smoothed targets, and the error of the counts."""
    logits_BKV, target_BK = replay.input("logits"), replay.input("target")
    ignored = replay.case.setting("padding_idx", default=-1)
    target_BK = target_BK.masked_fill(target_BK == ignored, -1)
    for match in replay.matches(r"lsm\.smoothing([\d.]+)\.normalize([01])"):
        loss = token_loss(logits_BKV, target_BK, float(match[1]), match[2] == "1")
        replay.check(match[0], loss[None], SCORE)
    sums_B, counts_B = replay.input("mae.pred_len"), replay.input("mae.target_len")
    for match in replay.matches(r"mae\.normalize([01])"):
        replay.check(match[0], count_loss(sums_B, counts_B, match[1] == "1")[None], SCORE)


def replay_specaug(replay: Replay) -> None:
    """Kind specaug: features masked by the recorded draws."""
    draws = [replay.input(f"randint{number}") for number in range(4)]
    stack = int(replay.case.setting("specaug_conf", "lfr_rate", default=6)) + 1
    replay.check("y", masked_features(replay.input("x"), draws, stack=stack))


# Time stamps.


def replay_timestamps(replay: Replay) -> None:
    """Kind timestamps: spans of tokens and silences as whole milliseconds and as text."""
    for name, subcase in replay.case.setting("subcases").items():
        rates_T, levels_T = replay.input(f"{name}.alphas"), replay.input(f"{name}.peaks")
        options = subcase["kwargs"]
        found = spans_of(rates_T, levels_T, subcase["chars"])
        chars = [char for char in subcase["chars"] if char != "</s>"]
        unit, offset = frame_seconds(options.get("upsample_rate", 3)), options.get("vad_offset", 0.0) / 1000
        check_value(replay, f"{name}.ms", subcase["ms"], milliseconds(found, unit, offset))
        check_value(replay, f"{name}.string", subcase["string"], as_text(found, chars, unit, offset))


def spans_of(rates_T: Tensor, levels_T: Tensor, chars: list[str]) -> list[Span]:
    """Spans by levels that are given; where they complete another number of tokens, by the rates."""
    count = len(chars) - (bool(chars) and chars[-1] == "</s>")
    if not count:
        return []
    completed = (levels_T >= THRESHOLD).nonzero()[:, 0].tolist()
    if len(completed) != count + 1:
        completed = completions(rates_T, count)
    return spans(completed, len(rates_T))


def frame_seconds(times: int) -> float:
    return 10.0 * 6 / 1000 / times


def milliseconds(found: list[Span], unit: float, offset: float = 0.0) -> list[list[int]]:
    """Start and end of each token, cut to whole milliseconds."""
    return [
        [int((frame * unit + offset) * 1000) for frame in (span.start, span.end)]
        for span in found
        if span.token is not None
    ]


def as_text(found: list[Span], chars: list[str], unit: float, offset: float = 0.0) -> str:
    def shown(frame: float) -> str:
        return str(frame * unit + offset + 0.0005)[:5]

    return "".join(
        f"{'<sil>' if span.token is None else chars[span.token]} {shown(span.start)} {shown(span.end)};"
        for span in found
    )


def check_value(replay: Replay, name: str, recorded: str | list, ours: str | list) -> None:
    """Compare text or whole numbers that a config holds, as tensors; the length in front keeps them from being empty.

    A text is compared as its characters' codes.
    """
    tensors = []
    for value in (recorded, ours):
        numbers = [ord(char) for char in value] if isinstance(value, str) else torch.tensor(value).flatten().tolist()
        tensors.append(torch.tensor([len(numbers), *map(int, numbers)]))
    replay.case.io[name] = tensors[0]
    replay.check(name, tensors[1])


def padded_to(x: Tensor, length: int) -> Tensor:
    """x [B, L, ...] with zeros up to `length`."""
    return F.pad(x, [0, 0] * (x.ndim - 2) + [0, length - x.shape[1]])
