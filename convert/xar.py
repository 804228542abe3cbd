"""xAR: the authors' keys to our `XAR`. Their files have no config: the sizes tell the variant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from inspect import signature
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint
from ..core.strict import build, check_keys
from ..generators.xar import XAR, released_configs
from ..generators.xar_network import NUM_MODULATIONS, TIME_FEATURES
from .fields import Config, Fields, StateDict, renamed

NAMES = {
    "encoder_pos_embed_learned": "transformer.encoder_pos_embed",
    "decoder_pos_embed_learned": "transformer.decoder_pos_embed",
    "z_proj_ln.weight": "transformer.z_norm",
    "encoder_norm.weight": "transformer.encoder_norm",
    "decoder_norm.weight": "transformer.decoder_norm",
}
GATED = {"mlp.fc1_g": ("mlp.fc1", 0), "mlp.fc1_x": ("mlp.fc1", 1)}
ROPE = re.compile(r"(encoder|decoder)_blocks\.\d+\.attn\.rope\.(freqs|freqs_cos|freqs_sin)")
CELL_SIDE = 8
WIDTHS = {name: arguments["embed_dim"] for name, arguments in released_configs().items()}
TABLE_TOLERANCE = 1e-4


def from_official(config: Config, state_dict: StateDict) -> XAR:
    """Return the `XAR` of these official keys, in eval mode.

    `config` is empty for released files, or holds the authors' `constructor` arguments and the `geometry`.
    """
    arguments = xar_arguments(config, state_dict)
    derived = {key: value for key, value in state_dict.items() if key == "mask" or ROPE.fullmatch(key)}
    saved = {key: value for key, value in state_dict.items() if key not in derived}
    check_keys(official_shapes(arguments), saved)
    weights = renamed(saved, partial(place, first_depth=arguments["encoder_depth"]))
    model = build(XAR, arguments, weights)
    _check_derived(model, derived)
    return model


def place(key: str, first_depth: int) -> tuple[str, int | None]:
    """Our parameter for an official key, and which half of its rows where gate and value are one product of ours."""
    if match := re.fullmatch(r"(encoder|decoder)_blocks\.(\d{1,4})\.(.+)\.(weight|bias)", key):
        block = int(match[2]) + (first_depth if match[1] == "decoder" else 0)
        module = match[3].replace("ada_lin.1", "ada_lin")
        module, half = GATED.get(module, (module, None))
        return f"transformer.blocks.{block}.{module}.{match[4]}", half
    return NAMES.get(key, f"transformer.{key.replace('time_embed.mlp', 'time_mlp')}"), None


def official_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every official parameter, and its shape, of an `XAR` with these constructor arguments."""
    given = {name: item.default for name, item in signature(XAR.__init__).parameters.items()} | dict(arguments)
    width, channels, tokens = given["embed_dim"], given["latent_channels"], given["grid"] ** 2
    hidden = int(width * given["mlp_ratio"] * 2 / 3)
    shapes = {
        "encoder_pos_embed_learned": (1, tokens, width), "decoder_pos_embed_learned": (1, tokens, width),
        "class_emb.weight": (given["num_classes"] + 1, width),
    }  # fmt: skip
    shapes |= {f"{norm}.weight": (width,) for norm in ("z_proj_ln", "encoder_norm", "decoder_norm")}
    linears = {
        "time_embed.mlp.0": (width, TIME_FEATURES), "time_embed.mlp.2": (width, width), "z_proj": (width, channels),
        "decoder_embed": (width, width), "pred": (channels, width),
    }  # fmt: skip
    for stack in ("encoder", "decoder"):
        for number in range(given[f"{stack}_depth"]):
            block = f"{stack}_blocks.{number}"
            linears |= {
                f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width),
                f"{block}.mlp.fc1_g": (hidden, width), f"{block}.mlp.fc1_x": (hidden, width),
                f"{block}.mlp.fc2": (width, hidden), f"{block}.ada_lin.1": (NUM_MODULATIONS * width, width),
            }  # fmt: skip
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def xar_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments from what the weights' shapes and `config` say."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    classes, width = _shape(shapes, "class_emb.weight", 2)
    _, tokens, _ = _shape(shapes, "encoder_pos_embed_learned", 3)
    _, channels = _shape(shapes, "z_proj.weight", 2)
    depths = [_depth(shapes, stack) for stack in ("encoder_blocks", "decoder_blocks")]
    measured = {
        "latent_channels": channels, "embed_dim": width, "encoder_depth": depths[0], "decoder_depth": depths[1],
        "num_classes": classes - 1,
    }  # fmt: skip
    if "constructor" in config:
        return case_arguments(config) | measured
    released = {(known["embed_dim"], known["encoder_depth"]): known for known in released_configs().values()}
    if (width, depths[0]) not in released:
        known = ", ".join(f"{width} with {depth}" for width, depth in released)
        raise InvalidCheckpoint(f"no released xAR is {width} wide with {depths[0]} blocks a stack ({known})")
    grid = isqrt(tokens)
    layout = {"grid": grid, "layout": "cell", "layout_size": min(CELL_SIDE, grid)}
    return layout | measured | released[width, depths[0]]


def case_arguments(config: Config) -> dict[str, Any]:
    """Constructor arguments from the authors' `constructor` arguments and, where there is one, a case's `geometry`."""
    constructor, geometry = (
        Fields(config.get("constructor"), "constructor"),
        Fields(config.get("geometry", {}), "geometry"),
    )
    grid = constructor.integer("img_size", 256) // constructor.integer("vae_stride", 16)
    side = grid // isqrt(constructor.integer("clusters", 4))
    width, heads = constructor.integer("encoder_embed_dim"), constructor.integer("encoder_num_heads")
    others = constructor.integer("decoder_embed_dim", width), constructor.integer("decoder_num_heads", heads)
    if others != (width, heads):
        raise InvalidCheckpoint(
            f"both stacks of an xAR have the same width and heads, not {width} and {heads}, "
            f"then {others[0]} and {others[1]}"
        )
    return {
        "grid": geometry.integer("grid", grid), "layout": "cell", "layout_size": geometry.integer("cell_side", side),
        "latent_channels": constructor.integer("vae_embed_dim", 16), "embed_dim": width, "num_heads": heads,
        "encoder_depth": constructor.integer("encoder_depth"), "decoder_depth": constructor.integer("decoder_depth"),
        "num_classes": constructor.integer("class_num", 1000), "mlp_ratio": constructor.number("mlp_ratio", 4.0),
        "label_drop_prob": constructor.number("label_drop_prob", 0.1),
        "attn_dropout": constructor.number("attn_dropout", 0.1),
        "proj_dropout": constructor.number("proj_dropout", 0.1),
    }  # fmt: skip


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, ndim: int) -> tuple[int, ...]:
    if len(shapes.get(key, ())) != ndim:
        raise InvalidCheckpoint(f"these are no weights of xAR: {key} is missing or has a wrong shape")
    return shapes[key]


def _depth(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    numbers = {int(match[1]) for key in shapes if (match := re.match(rf"{stack}\.(\d{{1,4}})\.", key))}
    if not numbers:
        raise InvalidCheckpoint(f"these are no weights of xAR: {stack} is missing")
    return max(numbers) + 1


def _check_derived(model: XAR, derived: Mapping[str, Tensor]) -> None:
    """What follows from the geometry must be what was saved: another order of tokens would load without a word."""
    cos, sin = model.rotary.repeat_interleave(2, dim=-1)
    visible = torch.zeros(model.visible.shape).masked_fill(~model.visible, float("-inf"))
    for key, value in derived.items():
        if key.endswith(".freqs"):  # angles or bare frequencies; their cosines and sines are compared
            continue
        expected = visible if key == "mask" else cos if key.endswith("cos") else sin
        if value.numel() != expected.numel() or not torch.allclose(
            value.float().reshape(expected.shape), expected, atol=TABLE_TOLERANCE
        ):
            raise InvalidCheckpoint(f"{key} does not belong to {model.config.layout} entities on this grid")
