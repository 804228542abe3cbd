"""FlexAR: the authors' keys to our `NextToken`.

Most of what a model is follows from its keys and shapes; the config says the rest (the heads' width, the kind of
norms). It names classes, as FlexTok's does, and is read as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InvalidCheckpoint
from ..core.strict import build, shown
from ..generators.next_token import NextToken
from . import flextok
from .fields import Config, StateDict, renamed

PREFIX = "models.ar_image_model."
TEXT_PREFIX = "models.text_encoder.mlp."
OWN_FILES = ("models.image_tokenizer.", "models.text_encoder.t5_embedder.")  # models with files of their own
NAMES = re.compile(r"(flextok|flextok_ar|l3m|torch\.nn|functools)(\.\w{1,60}){1,8}")  # of classes in configs
TRUNK = re.compile(r"trunk\.blocks\.(\d{1,4})\.(.+)\.(weight|bias)")
PLACES = {
    "preprocessor.embedding.weight": "embedding.weight",
    "preprocessor.sos_token_embed": "start",
    "preprocessor.positional_embedding": "positions",
    "preprocessor.cls_embedding.weight": "class_embed.weight",
    "trunk.post_trunk_norm.weight": "last_norm.weight",
    "trunk.post_trunk_norm.bias": "last_norm.bias",
    "head.norm.weight": "head_norm.weight",
    "head.norm.bias": "head_norm.bias",
    "head.linear.weight": "head.weight",
    "head.linear.bias": "head.bias",
}
IN_BLOCK = {
    "qkv": ("attn.qkv", None), "q_proj": ("attn.qkv", 0), "k_proj": ("attn.qkv", 1), "v_proj": ("attn.qkv", 2),
    "mlp.fc1": ("mlp.fc1", 0), "mlp.fc3": ("mlp.fc1", 1),
    "cross_attn.Wq": ("text_attn.q", None), "cross_attn.Wk": ("text_attn.kv", 0), "cross_attn.Wv": ("text_attn.kv", 1),
}  # fmt: skip


def is_known_name(name: str) -> bool:
    """Whether a config's `_target_` is a name of the authors' packages."""
    return NAMES.fullmatch(name) is not None


def is_weights(state_dict: StateDict) -> bool:
    """Whether these are FlexAR's keys."""
    return any(key.startswith(PREFIX) for key in state_dict)


def of_family(config: Config, state_dict: StateDict) -> nn.Module:
    """The `FlexTok` or the `NextToken` of these official keys."""
    return (from_official if is_weights(state_dict) else flextok.from_official)(config, state_dict)


def from_official(config: Config, state_dict: StateDict) -> NextToken:
    """Return the `NextToken` of these official keys, in eval mode.

    Raises:
        InvalidCheckpoint: keys or shapes that are missing, unknown or do not fit each other (listed).
    """
    saved = {key: value for key, value in state_dict.items() if not key.startswith(OWN_FILES)}
    arguments = flexar_arguments(config, saved)
    reads_text = arguments["text_width"] > 0
    try:
        weights = renamed(saved, lambda key: place(key, reads_text))
    except RuntimeError as error:  # rows of one product of ours that are not equally wide
        raise InvalidCheckpoint(f"the weights do not fit each other: {' '.join(str(error).split())[:200]}") from None
    return build(NextToken, arguments, _completed(weights, arguments))


def place(key: str, reads_text: bool) -> tuple[str, int | None]:
    """Our parameter for an official key, and which part of its rows where several are one product of ours."""
    if key.startswith(TEXT_PREFIX):
        name = key.removeprefix(TEXT_PREFIX).replace("fc1.", "text_proj.0.").replace("fc2.", "text_proj.2.")
        return f"transformer.{name}", None
    name = key.removeprefix(PREFIX)
    if (match := TRUNK.fullmatch(name)) is None:
        return f"transformer.{PLACES.get(name, shown(key))}", None
    module, part = match[2], None
    if reads_text:
        module = {"norm_2": "norm_text", "norm_3": "norm_2"}.get(module, module)
    module = re.sub("^(self_)?attn[.]", "attn.", module)
    module, part = IN_BLOCK.get(module.removeprefix("attn."), IN_BLOCK.get(module, (module, None)))
    module = module.replace("cross_attn.", "text_attn.")
    return f"transformer.blocks.{match[1]}.{module}.{match[3]}", part


def flexar_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments from what the keys, the shapes and `config` say."""
    shapes = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in state_dict.items()}
    codes, width = _shape(shapes, "preprocessor.embedding.weight", 2)
    blocks = [int(match[1]) for key in shapes if (match := TRUNK.fullmatch(key))]
    if not blocks:
        raise InvalidCheckpoint("these are no weights of FlexAR: trunk.blocks is missing")
    hidden, _ = _shape(shapes, "trunk.blocks.0.mlp.fc1.weight", 2)
    positions = shapes.get("preprocessor.positional_embedding", (0,))
    attn = "trunk.blocks.0.self_attn" if "trunk.blocks.0.norm_3.weight" in shapes else "trunk.blocks.0.attn"
    text = shapes.get(f"{TEXT_PREFIX}fc1.weight", (0, 0))
    classes = shapes.get("preprocessor.cls_embedding.weight", (0, 0))
    return {
        "width": width, "depth": max(blocks) + 1, "hidden": hidden, "vocab_size": codes,
        "num_tokens": positions[-2] if len(positions) > 1 else 0,
        "num_heads": _heads(config, shapes.get(f"{attn}.q_norm.weight", ()), width),
        "norm": _norm(config, "trunk.blocks.0.norm_1.bias" in shapes), "qk_norm": f"{attn}.q_norm.weight" in shapes,
        "qkv_bias": any(f"{attn}.{name}.bias" in shapes for name in ("qkv", "q_proj")),
        "bias": f"{attn}.proj.bias" in shapes,
        "last_norm": "trunk.post_trunk_norm.weight" in shapes, "head_norm": "head.norm.weight" in shapes,
        "num_classes": classes[0], "text_width": text[-1],
        "guidance_scale": 3.0 if text[-1] else 1.5,
        "tokenizer": "flextok-d18-d28-dfn" if text[-1] else "flextok-d18-d28-in1k",
    }  # fmt: skip


def _completed(weights: dict[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """With tables in our shapes, and zeros where the authors have nothing: "no class", biases that are left out."""
    width = arguments["width"]
    for name, shape in (("start", (width,)), ("positions", (arguments["num_tokens"], width))):
        key = f"transformer.{name}"
        if key in weights and weights[key].numel() == shape[0] * (width if len(shape) > 1 else 1):
            weights[key] = weights[key].reshape(shape)
    if "transformer.class_embed.weight" in weights:
        table = weights["transformer.class_embed.weight"]
        weights["transformer.class_embed.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    is_norm = re.compile(r".*norm\w*\.weight")
    for key in [key for key in weights if is_norm.fullmatch(key)]:
        if arguments["norm"] == "layer" or key.endswith("head_norm.weight"):
            weights.setdefault(key.removesuffix("weight") + "bias", torch.zeros_like(weights[key]))
    if arguments["bias"]:
        for key in ("transformer.head", "transformer.text_proj.0", "transformer.text_proj.2"):
            if f"{key}.weight" in weights:
                rows = weights[f"{key}.weight"]
                weights.setdefault(f"{key}.bias", rows.new_zeros(len(rows)))
    return weights


def _heads(config: Config, norm_shape: tuple[int, ...], width: int) -> int:
    if norm_shape:
        return max(1, width // max(1, norm_shape[0]))
    given = [value for key, value in _entries(config) if key == "num_heads" and type(value) is int and value > 0]
    return given[0] if given else max(1, width // 64)


def _norm(config: Config, has_bias: bool) -> str:
    if has_bias:
        return "layer"
    said = [str(value).lower() for key, value in _entries(config) if "norm" in key and isinstance(value, str)]
    said += [str(value).lower() for key, value in _entries(config) if key == "_target_" and "Norm" in str(value)]
    return "layer" if any("layer" in name for name in said) and not any("rms" in name for name in said) else "rms"


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config and what stands there, at any depth."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield str(key), value
            yield from _entries(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _entries(value)


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, ndim: int) -> tuple[int, ...]:
    if len(shapes.get(key, ())) != ndim:
        raise InvalidCheckpoint(f"these are no weights of FlexAR: {key} is missing or has a wrong shape")
    return shapes[key]
