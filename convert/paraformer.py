"""Paraformer: released folders (config.yaml, model.pt, am.mvn, tokens.json) to our `Paraformer`.

Names such as `sanm_shfit` are the authors' own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint, ModelNotFound
from ..core.files import read_limited
from ..core.strict import build, check_keys
from ..core.weights import inside, read_state_dict
from ..generators.paraformer import Paraformer
from ..generators.paraformer_text import BLANK, EOS, SOS
from .fields import MAX_SIZE, Config, Fields, StateDict

WEIGHT_FILES = ("model.pt", "model.pb")
TOKEN_FILES = ("tokens.json", "tokens.txt")
MEAN_FILE = "am.mvn"
MAX_TEXT_BYTES = 4 * 2**20
DEFAULT_ATTENTION_DEPTH = 6  # of a decoder that does not say
CLASSES = ("Paraformer", "BiCifParaformer", "SeacoParaformer")
NOT_HERE = {
    "ContextualParaformer": "its older way of hotwords is not implemented; SeacoParaformer has the newer one",
    "ParaformerStreaming": "it was trained on chunks of sound with caches between them, which are not implemented",
}

# Our names of an encoder layer's and a decoder layer's parts, and the authors'.
ENCODER_PARTS = {
    "attn.qkv": "self_attn.linear_q_k_v", "attn.out": "self_attn.linear_out", "attn.memory": "self_attn.fsmn_block",
    "mlp.fc1": "feed_forward.w_1", "mlp.fc2": "feed_forward.w_2",
}  # fmt: skip
DECODER_PARTS = {
    "memory": "self_attn.fsmn_block", "cross.q": "src_attn.linear_q", "cross.kv": "src_attn.linear_k_v",
    "cross.out": "src_attn.linear_out", "mlp.fc1": "feed_forward.w_1", "mlp.fc2": "feed_forward.w_2",
    "mlp.norm": "feed_forward.norm",
}  # fmt: skip
PLACES = {
    "encoder.projection": "encoder.embed", "encoder.norm": "encoder.after_norm",
    "predictor.conv": "predictor.cif_conv1d", "predictor.out": "predictor.cif_output",
    "timestamps.spread": "predictor.upsample_cnn", "timestamps.lstm": "predictor.blstm",
    "timestamps.out": "predictor.cif_output2", "decoder.embedding": "decoder.embed.0",
    "decoder.head": "decoder.output_layer", "hotwords.encoder": "bias_encoder",
    "hotwords.head": "hotword_output_layer", "ctc_head": "ctc.ctc_lo",
}  # fmt: skip
STACKS = {"decoder.stack": "decoder", "hotwords.stack": "seaco_decoder"}
STACK_ENDS = {"last_norm": "decoders3.0.norm1", "norm": "after_norm"}


def from_official(
    config: Config, state_dict: StateDict, tokens: Sequence[str] = (), cmvn_2F: Tensor | None = None
) -> Paraformer:
    """Return the `Paraformer` of these official keys, in eval mode.

    Args:
        config: of config.yaml, or a parity case's.
        tokens: the text of each id; those of the config when there are none.
        cmvn_2F: shifts and scales of the features, as `read_cmvn` gives them; none when None.

    Raises:
        InvalidCheckpoint: a config of another kind of model, or keys and shapes that do not fit it (listed).
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    arguments = paraformer_arguments(config, state_dict)
    listed = config.get("token_list")
    tokens = tuple(tokens or (listed if isinstance(listed, list) else ()))
    if tokens and len(tokens) != arguments["vocab_size"]:
        raise InvalidCheckpoint(f"{len(tokens)} tokens for weights with {arguments['vocab_size']}")
    arguments["tokens"] = _texts(tokens, "token_list")
    names = official_names(Paraformer, arguments)
    features = arguments["stack"] * arguments["num_mels"]
    if cmvn_2F is None:
        cmvn_2F = torch.stack([torch.zeros(features), torch.ones(features)])
    if cmvn_2F.shape != (2, features):
        raise InvalidCheckpoint(f"{cmvn_2F.shape[1]} means of features, and the model has {features} features")
    return build(Paraformer, arguments, place(names, state_dict) | {"frontend.cmvn": cmvn_2F})


def place(names: Mapping[str, tuple[str, tuple[int, ...]]], state_dict: StateDict) -> dict[str, Tensor]:
    """Weights under our names; `names` gives for each of the authors' ours and the shape."""
    check_keys({official: shape for official, (_, shape) in names.items()}, state_dict)
    return {names[key][0]: value for key, value in state_dict.items()}


def official_names(
    factory, arguments: Mapping[str, Any], ours: str = "", theirs: str = ""
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each of the authors' names: ours in `factory(**arguments)`, and its shape.

    ours, theirs: where in the whole model that module is ("timestamps." and "predictor."), for a part of one.
    """
    try:
        with torch.device("meta"):
            module = factory(**arguments)
    except ValueError as error:
        raise InvalidCheckpoint(f"the config describes an impossible model ({error})") from None
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items() if name != "frontend.cmvn"}
    attention_depth = arguments.get("attention_depth")
    return {
        official_name(ours + name, attention_depth).removeprefix(theirs): (name, shape)
        for name, shape in shapes.items()
    }


def official_name(name: str, attention_depth: int | None) -> str:
    """The authors' name of a parameter of ours.

    attention_depth: layers of the decoder that attend to frames; the others are in a list of their own.
    """
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        number, part = int(match[1]), ENCODER_PARTS.get(match[2], match[2])
        layer = "encoders0.0" if number == 0 else f"encoders.{number - 1}"
        return f"encoder.{layer}.{part}.{match[3]}"
    if match := re.fullmatch(r"(decoder\.stack|hotwords\.stack)\.(.+)\.(weight|bias)", name):
        depth = attention_depth if match[1] == "decoder.stack" else None
        return f"{STACKS[match[1]]}.{_of_stack(match[2], depth)}.{match[3]}"
    ours = next(prefix for prefix in PLACES if name.startswith(f"{prefix}."))
    return PLACES[ours] + name.removeprefix(ours)


def _of_stack(part: str, attention_depth: int | None) -> str:
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", part):
        number, inner = int(match[1]), DECODER_PARTS.get(match[2], match[2])
        if attention_depth is None or number < attention_depth:
            return f"decoders.{number}.{inner}"
        return f"decoders2.{number - attention_depth}.{inner}"
    if part.startswith("last_mlp."):
        return f"decoders3.0.{DECODER_PARTS[part.removeprefix('last_')]}"
    return STACK_ENDS[part]


# Configs.


def paraformer_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments from a config, and from the weights' shapes what it leaves open."""
    name = config.get("model")
    if name in NOT_HERE:
        raise InvalidCheckpoint(f"a {name}: {NOT_HERE[name]}")
    if name not in CLASSES:
        raise InvalidCheckpoint(f"model must be one of {', '.join(CLASSES)}, not {name!r}")
    head = state_dict.get("decoder.output_layer.weight")
    if head is None or head.ndim != 2:
        raise InvalidCheckpoint("these are no weights of a Paraformer: decoder.output_layer.weight is missing")
    for key, number in (("blank_id", BLANK), ("sos", SOS), ("eos", EOS)):
        if config.get(key, number) != number:
            raise InvalidCheckpoint(f"{key} must be {number}, not {config[key]!r}")
    frontend, width = frontend_arguments(config), int(head.shape[1])
    encoder = encoder_arguments(config, frontend["stack"] * frontend["num_mels"])
    decoder = decoder_arguments(Fields(config.get("decoder_conf"), "decoder_conf"), config.get("decoder"))
    if encoder.pop("width") != width:
        raise InvalidCheckpoint(f"encoder_conf.output_size does not fit the weights' width of {width}")
    drops = {key: encoder[key] for key in ("dropout", "attention_dropout")}
    predictor, timestamps = predictor_arguments(config)
    settings = Fields({**config, **_section(config, "model_conf")}, "model_conf")
    arguments = {
        "vocab_size": int(head.shape[0]), "width": width, **frontend, **drops,
        "encoder_depth": encoder["depth"], "encoder_heads": encoder["num_heads"],
        "encoder_mlp_width": encoder["hidden"], "encoder_taps": encoder["taps"], "encoder_shift": encoder["shift"],
        "projects_features": encoder["has_projection"],
        "decoder_depth": decoder["depth"], "decoder_heads": decoder["num_heads"],
        "decoder_mlp_width": decoder["hidden"], "decoder_taps": decoder["taps"], "decoder_shift": decoder["shift"],
        "attention_depth": decoder["attention_depth"],
        "rate_neighbours": (predictor["before"], predictor["after"]), "rate_depthwise": predictor["is_depthwise"],
        "rate_factor": predictor["factor"], "rate_threshold": predictor["threshold"],
        "tail": tail_of(config),
        "ends_with_eos": settings.number("predictor_bias", 0) == 1,
        "glancing_ratio": settings.number("sampling_ratio", 0.2), "smoothing": settings.number("lsm_weight", 0.0),
        "loss_per_token": settings.flag("length_normalized_loss", False),
        "count_weight": settings.number("predictor_weight", 0.0), "ctc_weight": settings.number("ctc_weight", 0.5),
    }  # fmt: skip
    if timestamps:
        arguments |= {
            "timestamp_times": timestamps["times"], "timestamp_lstm": timestamps["has_lstm"],
            "timestamp_features": timestamps["reads_features"], "timestamp_factor": timestamps["factor"],
            "timestamp_threshold": timestamps["threshold"],
        }  # fmt: skip
    elif name != "Paraformer":
        raise InvalidCheckpoint(f"a {name} has a CifPredictorV3, not {config.get('predictor')!r}")
    return arguments | (_hotword_arguments(config, settings, width) if name == "SeacoParaformer" else {})


def encoder_arguments(config: Config, in_width: int) -> dict[str, Any]:
    """Arguments of `nn.sanm.Encoder`."""
    if config.get("encoder") != "SANMEncoder":
        raise InvalidCheckpoint(f"the encoder must be a SANMEncoder; a {config.get('encoder')!r} is not implemented")
    fields = Fields(config.get("encoder_conf"), "encoder_conf")
    fields.choice("selfattention_layer_type", ("sanm",), "sanm")
    if not fields.flag("normalize_before", True):
        raise InvalidCheckpoint("encoder_conf.normalize_before must be true")
    return {
        "in_width": in_width, "width": fields.integer("output_size", 256), "depth": fields.integer("num_blocks", 6),
        "num_heads": fields.integer("attention_heads", 4), "hidden": fields.integer("linear_units", 2048),
        "taps": fields.integer("kernel_size", 11), "shift": _shift(fields),
        "dropout": fields.number("dropout_rate", 0.1),
        "attention_dropout": fields.number("attention_dropout_rate", 0.0),
        "has_projection": fields.choice("input_layer", ("pe", "linear"), "conv2d") == "linear",
    }  # fmt: skip


def decoder_arguments(fields: Fields, name: Any) -> dict[str, Any]:
    """Sizes of a `nn.sanm.DecoderStack`. A decoder has at least the layers that attend to frames."""
    if name != "ParaformerSANMDecoder":
        raise InvalidCheckpoint(f"the decoder must be a ParaformerSANMDecoder; a {name!r} is not implemented")
    attention_depth = fields.integer("att_layer_num", DEFAULT_ATTENTION_DEPTH)
    return {
        "depth": max(fields.integer("num_blocks", 6), attention_depth), "attention_depth": attention_depth,
        "num_heads": fields.integer("attention_heads", 4), "hidden": fields.integer("linear_units", 2048),
        "taps": fields.integer("kernel_size", 21), "shift": _shift(fields),
    }  # fmt: skip


def predictor_arguments(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `RatePredictor`, and of `TimestampHead` (none but for the third version)."""
    name = config.get("predictor")
    if name not in ("CifPredictor", "CifPredictorV2", "CifPredictorV3"):
        raise InvalidCheckpoint(f"the predictor must be a CifPredictor, V2 or V3; a {name!r} is not implemented")
    fields = Fields(config.get("predictor_conf"), "predictor_conf")
    if fields.number("threshold", 1.0) != 1.0:
        raise InvalidCheckpoint("predictor_conf.threshold must be 1: tokens are made of a mass of 1")
    arguments = {
        "width": fields.integer("idim"), "before": _count(fields, "l_order", 1), "after": _count(fields, "r_order", 1),
        "is_depthwise": name == "CifPredictor", "factor": fields.number("smooth_factor", 1.0),
        "threshold": fields.number("noise_threshold", 0.0),
    }  # fmt: skip
    if name != "CifPredictorV3":
        return arguments, {}
    kind = fields.choice("upsample_type", ("cnn", "cnn_blstm"), "cnn")
    return arguments, {
        "width": arguments["width"], "times": fields.integer("upsample_times", 5), "has_lstm": kind == "cnn_blstm",
        "reads_features": fields.flag("use_cif1_cnn", True), "factor": fields.number("smooth_factor2", 1.0),
        "threshold": fields.number("noise_threshold2", 0.0),
    }  # fmt: skip


def tail_of(config: Config) -> float:
    default = 0.45 if config.get("predictor") == "CifPredictor" else 0.0
    return Fields(config.get("predictor_conf"), "predictor_conf").number("tail_threshold", default)


def frontend_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `Frontend`, by the names that they have in a `Paraformer`. Dither, a noise, is left out."""
    if config.get("frontend") not in ("WavFrontend", "WavFrontendOnline"):
        raise InvalidCheckpoint(f"the frontend must be a WavFrontend; a {config.get('frontend')!r} is not implemented")
    fields = Fields(config.get("frontend_conf"), "frontend_conf")
    fields.choice("window", ("hamming",), "hamming")
    if not (fields.flag("upsacle_samples", True) and fields.flag("snip_edges", True)):
        raise InvalidCheckpoint("frontend_conf: samples must be scaled to 16 bits, and frames lie inside the clip")
    return {
        "sample_rate": fields.integer("fs", 16000), "num_mels": fields.integer("n_mels", 80),
        "window_ms": fields.number("frame_length", 25), "hop_ms": fields.number("frame_shift", 10),
        "stack": fields.integer("lfr_m", 1), "stride": fields.integer("lfr_n", 1),
    }  # fmt: skip


def _hotword_arguments(config: Config, settings: Fields, width: int) -> dict[str, Any]:
    if settings.choice("bias_encoder_type", ("lstm",), "lstm") and settings.flag("bias_encoder_bid", False):
        raise InvalidCheckpoint("bias_encoder_bid must be false: hotwords are read in one direction")
    if settings.integer("inner_dim", 256) != width:
        raise InvalidCheckpoint(f"inner_dim must be the model's width of {width}")
    fields = Fields(config.get("seaco_decoder_conf"), "seaco_decoder_conf")
    sizes = decoder_arguments(fields, config.get("seaco_decoder"))
    if sizes["depth"] != sizes["attention_depth"] or sizes["shift"]:
        raise InvalidCheckpoint("every layer of seaco_decoder must attend to the hotwords, without a shift")
    return {
        "hotword_depth": sizes["depth"], "hotword_heads": sizes["num_heads"], "hotword_mlp_width": sizes["hidden"],
        "hotword_taps": sizes["taps"], "no_hotword_id": _count(settings, "NO_BIAS", 8377),
    }  # fmt: skip


def _section(config: Config, name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _shift(fields: Fields) -> int:
    return _count(fields, "sanm_shfit" if "sanm_shfit" in fields else "sanm_shift", 0)


def _count(fields: Fields, key: str, default: int) -> int:
    """A whole number from 0 on."""
    value = fields.number(key, default)
    if not 0 <= value <= MAX_SIZE or value != int(value):
        raise InvalidCheckpoint(f"{fields.where}.{key} must be a whole number from 0 on, not {value!r}")
    return int(value)


# Folders.


def is_release(config: Config | None) -> bool:
    """Whether a folder's config is one of this family of models."""
    return config is not None and isinstance(config.get("model"), str) and "encoder_conf" in config


def load_folder(folder: Path, config: Config, name: str | None = None) -> Paraformer:
    """The model of a released folder, called `name`, or as the folder.

    Raises:
        ModelNotFound: a file is missing.
        InvalidCheckpoint: files that are malformed or do not fit each other.
    """
    weights = next((inside(folder, file) for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise ModelNotFound(f"{folder} holds no weights ({' or '.join(WEIGHT_FILES)})")
    token_file = next((inside(folder, file) for file in TOKEN_FILES if (folder / file).is_file()), None)
    tokens = read_tokens(token_file) if token_file is not None else ()
    cmvn_2F = read_cmvn(inside(folder, MEAN_FILE)) if (folder / MEAN_FILE).is_file() else None
    if cmvn_2F is None:
        raise ModelNotFound(f"{folder} lacks {MEAN_FILE}, the means of the features; recognition fails without")
    try:
        model = from_official(config, read_state_dict(weights), tokens, cmvn_2F)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{weights}: {error}") from None
    model.name = name or folder.resolve().name
    return model


def read_cmvn(path: Path) -> Tensor:
    """Shifts and scales [2, F] of a text file in Kaldi's nnet form.

    Raises:
        InvalidCheckpoint: it is another kind of file, or holds what is no finite number.
    """
    lines = read_limited(path, MAX_TEXT_BYTES).decode("utf-8", errors="replace").splitlines()
    rows = []
    for mark in ("<AddShift>", "<Rescale>"):
        after = next((i for i, line in enumerate(lines) if line.startswith(mark)), len(lines)) + 1
        fields = lines[after].split() if after < len(lines) else []
        if len(fields) < 5 or fields[0] != "<LearnRateCoef>" or (fields[2], fields[-1]) != ("[", "]"):
            raise InvalidCheckpoint(f"{path} is no Kaldi feature statistics: no line of numbers follows {mark}")
        try:
            rows.append(torch.tensor([float(field) for field in fields[3:-1]]))
        except ValueError:
            raise InvalidCheckpoint(f"{path}: what follows {mark} are not all numbers") from None
    if len(rows[0]) != len(rows[1]) or not all(bool(row.isfinite().all()) for row in rows):
        raise InvalidCheckpoint(f"{path}: shifts and scales must be finite, and as many as each other")
    return torch.stack(rows)


def read_tokens(path: Path) -> tuple[str, ...]:
    """The token of each id: a JSON list, or a text file with one in each line."""
    text = read_limited(path, MAX_TEXT_BYTES).decode("utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            tokens = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidCheckpoint(f"{path} is not valid JSON") from None
    else:
        tokens = [line.split()[0] if line.split() else line for line in text.splitlines()]
    return _texts(tokens, str(path))


def _texts(tokens: Any, where: str) -> tuple[str, ...]:
    if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, str) for token in tokens):
        raise InvalidCheckpoint(f"{where} must be a list of texts, one for each id")
    return tuple(tokens)
