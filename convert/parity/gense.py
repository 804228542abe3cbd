"""Replay of GenSE: the language models alone, the speech encoders, and the whole chain from recorded noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.strict import build
from ...generators.gense import ExponentialNoise, GenSESettings, official_length
from ...nn.gpt2 import GPT2
from ...tokenizers.speech.semantic import RIGHT_PAD, SemanticTokenizer, receptive_field
from .. import gense, semantic
from .replay import LOSS, Replay, Tolerance

FEATURE = Tolerance(atol=6e-5, rtol=1e-4)  # features have a standard deviation near 3
HIDDEN = Tolerance(atol=2e-5, rtol=1e-4)
DISTANCE = Tolerance(atol=1e-3, rtol=1e-4)  # differences of large squares
WAVE = Tolerance(atol=2e-5)


class RecordedNoise(ExponentialNoise):
    """The noise [steps, V] over all ids that the official code drew, of which those that can be written count."""

    def __init__(self, noises: dict[str, Tensor], ids: dict[str, slice]):
        self.noises, self.ids = noises, ids

    def draw(self, model: str, step: int, num_ids: int) -> Tensor:
        return self.noises[model][step, self.ids[model]][None]


def replay_language_models(replay: Replay) -> None:
    """Kind lm_forward: hidden states after the first block, logits, and the loss over every position."""
    config, weights = replay.case.setting("config"), replay.case.weights()
    for name in gense.MODELS:
        if not replay.has(f"{name}.ids"):
            continue
        lm = build(GPT2, gense.lm_arguments(config, weights, name), gense.lm_weights(config, weights, name))
        ids_BL, positions_BL = replay.input(f"{name}.ids"), replay.input(f"{name}.positions")
        first_layer = lm.blocks[0] if len(lm.blocks) > 1 else lm.ln_f  # the library counts the norm to the last block
        with torch.no_grad(), outputs_of(first_layer) as first:
            logits_BLV = lm.logits(lm(ids_BL, positions_BL))
        replay.check(f"{name}.hidden1", first[0], HIDDEN)
        replay.check(f"{name}.logits", logits_BLV, HIDDEN)
        loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())
        replay.check(f"{name}.loss", loss, LOSS)


def replay_wavlm(replay: Replay) -> None:
    """Kind wavlm: every layer of one clip, a padded batch, and the tokens of layer 6."""
    weights, config = replay.case.weights(), replay.case.setting("config")
    norm = {key: weights[f"encoder.layer_norm.{key}"] for key in ("weight", "bias")}
    depth = int(replay.case.setting("config", "encoder_layers"))
    whole = semantic.from_official(config, weights, layer=depth)

    def normed(x_BLD: Tensor) -> Tensor:
        return F.layer_norm(x_BLD, x_BLD.shape[-1:], norm["weight"], norm["bias"])

    if replay.has("one.wav"):
        wave = replay.input("one.wav")
        with torch.no_grad(), hidden_states(whole) as layers:
            last = whole.hidden_states(wave)
        replay.check("one.projected", layers[0], FEATURE)  # the official code adds the position convolution in place
        replay.check("one.layers", torch.stack(layers), FEATURE)
        replay.check("one.last", last, FEATURE)
        replay.check("one.normed", normed(last), HIDDEN)
        tokenizer = semantic.from_official(config, weights)
        replay.check("km.centers", tokenizer.quantize.embedding.weight)
        with torch.no_grad():
            replay.check("one.layer6", tokenizer.hidden_states(wave), FEATURE)
            replay.check("one.tokens", tokenizer.quantize.nearest(tokenizer.hidden_states(wave)))
    if replay.has("batch.wav"):
        _replay_batch(replay, whole, normed)


def _replay_batch(replay: Replay, whole: SemanticTokenizer, normed) -> None:
    """Rows of unequal length: each alone, with no more samples than its frames see; padded frames mean nothing."""
    wave_BT, lengths_B = replay.input("batch.wav"), replay.input("batch.lengths")
    is_padding_BL = replay.input("batch.padding_mask")
    hop, kernels, strides = whole.hop_length, whole.config.conv_kernel, whole.config.conv_stride
    field = receptive_field(kernels, strides)
    layers_of, last_of = [], []
    for wave_T, length, is_padding_L in zip(wave_BT, lengths_B.tolist(), is_padding_BL, strict=True):
        frames = int((~is_padding_L).sum())
        own_T = torch.where(torch.arange(len(wave_T)) < length, wave_T, 0.0)[: hop * (frames - 1) + field]
        own_T = F.pad(own_T, (0, hop * (frames - 1) + field - len(own_T)))
        with torch.no_grad(), hidden_states(whole) as layers:
            last_of.append(normed(whole.hidden_states(own_T[None]))[0])
        layers_of.append([layer[0] for layer in layers])
    for match in replay.matches(r"batch\.(layer(\d+)|normed)"):
        rows = last_of if match[1] == "normed" else [layers[int(match[2])] for layers in layers_of]
        filled = replay.case.io[match[0]].clone()
        for row, values in enumerate(rows):
            filled[row, : len(values)] = values
        replay.check(match[0], filled, HIDDEN if match[1] == "normed" else FEATURE)


def replay_pipeline(replay: Replay) -> None:
    """Kind pipeline: features, tokens, both language models step by step, and the enhanced sound.

    Where the codec's weights are left out of a case, the recorded noisy acoustic tokens count, and no sound is made.
    """
    case, config = replay.case, replay.case.setting("config")
    weights = case.weights()
    model = gense.from_official(case.config, weights)
    wave_BT = replay.input("wav")[:, 0]  # the first channel
    semantic_BT = _replay_encoder(replay, model.semantic_tokenizer, config["ssl"], weights, wave_BT)
    has_codec = any(".codec_tokenizer." in key for key in weights)
    acoustic_BA = replay.input("noisy_acoustic")[..., 0]
    if has_codec:
        with torch.no_grad():  # of any length: `encode_waveform` reads whole tokens, the official code what there is
            replay.check("noisy_acoustic", model.codec.quantize.nearest(model.codec.encode_latent(wave_BT)))
    for way in ("sample", "greedy"):
        if not replay.has(f"{way}.acoustic"):
            continue
        replay.check(f"{way}.noisy_semantic", semantic_BT)
        noise = {name: replay.input(f"sample.{name}.noise") for name in gense.MODELS} if way == "sample" else {}
        recorded = RecordedNoise(noise, {"n2s": model.semantic_ids, "s2s": model.acoustic_ids})
        settings = GenSESettings(greedy=way == "greedy", temperature=1.0)
        count = official_length(semantic_BT.shape[1], acoustic_BA.shape[1])
        with calls_of(model.n2s) as n2s, calls_of(model.s2s) as s2s:
            clean_BT, written_BA = model.generate_ids(semantic_BT, acoustic_BA, settings, [], count, noise=recorded)
        for name, lm, calls in (("n2s", model.n2s, n2s), ("s2s", model.s2s, s2s)):
            replay.check(f"{way}.{name}.logits", lm.logits(torch.cat([hidden[:, -1] for *_, hidden in calls])), HIDDEN)
            replay.check(f"{way}.{name}.last_ids", torch.cat([ids for ids, *_ in calls], dim=1))
            replay.check(f"{way}.{name}.last_positions", torch.cat([places for _, places, _ in calls])[None])
        replay.check(f"{way}.clean_semantic", clean_BT[0])
        replay.check(f"{way}.acoustic", written_BA[..., None])
        if has_codec:
            replay.check(f"{way}.enhanced", model.codec.decode_ids(written_BA), WAVE)


def _replay_encoder(replay: Replay, tokenizer: SemanticTokenizer, config, weights, wave_BT: Tensor) -> Tensor:
    """The encoder's features, of the layers that the tokenizer has and of those behind them; returns the tokens."""
    own = {key.removeprefix("n2s.xlsr."): value for key, value in weights.items() if key.startswith("n2s.xlsr.")}
    centers_KD = tokenizer.quantize.embedding.weight
    depth = 1 + max(int(key.split(".")[2]) for key in own if key.startswith("encoder.layers."))
    whole = semantic.from_official(config, own, layer=depth)
    projection_norm = whole.encoder.feature_projection.layer_norm
    wave_BT = F.pad(wave_BT, (0, RIGHT_PAD))  # not up to a whole hop: the official code has no frame for what is over
    with torch.no_grad(), outputs_of(projection_norm) as features, hidden_states(whole) as layers:
        x_BLD, last = tokenizer.hidden_states(wave_BT), whole.hidden_states(wave_BT)
        x_LD = x_BLD[0]
        distances_LK = x_LD.square().sum(1, keepdim=True) - 2 * x_LD @ centers_KD.T + centers_KD.square().sum(1)
        semantic_BT = tokenizer.quantize.nearest(x_BLD)
    replay.check("km.distances", distances_LK, DISTANCE)
    replay.check("ssl.features", features[0], FEATURE)
    for match in replay.matches(r"ssl\.layer(\d+)"):
        replay.check(match[0], layers[int(match[1])], FEATURE)
    replay.check("ssl.layer6", x_BLD, FEATURE, note="of the tokenizer")
    if "encoder.layer_norm.weight" in own and depth == config.get("encoder_layers"):
        normed = F.layer_norm(last, last.shape[-1:], own["encoder.layer_norm.weight"], own["encoder.layer_norm.bias"])
        replay.check("ssl.last_normed", normed, HIDDEN)
    return semantic_BT


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of each call of `module`."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(_first(output)))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def calls_of(lm: GPT2) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Ids, positions and hidden states of each call of `lm`."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = lm.register_forward_hook(lambda module, args, output: calls.append((args[0], args[1], output)))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def hidden_states(tokenizer: SemanticTokenizer) -> Iterator[list[Tensor]]:
    """What goes into the first block, and what comes out of each."""
    states: list[Tensor] = []
    blocks = tokenizer.encoder.encoder.layers
    handles = [blocks[0].register_forward_pre_hook(lambda block, args: states.append(args[0]))]
    handles += [
        block.register_forward_hook(lambda block, args, output: states.append(_first(output))) for block in blocks
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
