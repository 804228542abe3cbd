"""xAR: the authors' keys to our `XAR`. Their files have no config: the sizes tell the variant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint
from ..core.strict import build
from ..generators.xar import XAR, released_configs
from .fields import Fields
from .titok import Config, StateDict

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
    packed: dict[str, dict[int, Tensor]] = {}
    for key, value in state_dict.items():
        if key not in derived:
            name, half = place(key, arguments["encoder_depth"])
            packed.setdefault(name, {})[half or 0] = value
    weights = {name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in packed.items()}
    model = build(XAR, arguments, weights)
    _check_derived(model, derived)
    return model


def place(key: str, first_depth: int) -> tuple[str, int | None]:
    """Our parameter for an official key, and which half of its rows where gate and value are one product of ours."""
    if match := re.fullmatch(r"(encoder|decoder)_blocks\.(\d{1,4})\.(.+)\.(weight|bias)", key):
        block = int(match[2]) + (first_depth if match[1] == "decoder" else 0)
        module = match[3].replace("ada_lin.1", "ada_lin")
        return f"transformer.blocks.{block}.{GATED.get(module, (module,))[0]}.{match[4]}", GATED.get(module, (0, None))[
            1
        ]
    return NAMES.get(key, f"transformer.{key.replace('time_embed.mlp', 'time_mlp')}"), None


def xar_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments from what the weights' shapes and `config` say."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    classes, width = _shape(shapes, "class_emb.weight", 2)
    _, tokens, _ = _shape(shapes, "encoder_pos_embed_learned", 3)
    _, channels = _shape(shapes, "z_proj.weight", 2)
    depths = [_depth(shapes, stack) for stack in ("encoder_blocks", "decoder_blocks")]
    grid = isqrt(tokens)
    arguments = {
        "grid": grid, "layout": "cell", "layout_size": min(CELL_SIDE, grid), "latent_channels": channels,
        "embed_dim": width, "encoder_depth": depths[0], "decoder_depth": depths[1], "num_classes": classes - 1,
    }  # fmt: skip
    sizes = (width, depths[0])
    released = {(known["embed_dim"], known["encoder_depth"]): known for known in released_configs().values()}
    if "constructor" in config:
        constructor = Fields(config["constructor"], "constructor")
        geometry = Fields(config.get("geometry"), "geometry")
        arguments |= {
            "grid": geometry.integer("grid"), "layout_size": geometry.integer("cell_side"),
            "num_heads": constructor.integer("encoder_num_heads"), "mlp_ratio": constructor.number("mlp_ratio", 4.0),
            "label_drop_prob": constructor.number("label_drop_prob", 0.1),
            "attn_dropout": constructor.number("attn_dropout", 0.1),
            "proj_dropout": constructor.number("proj_dropout", 0.1),
        }  # fmt: skip
    elif sizes in released:
        arguments |= released[sizes]
    else:
        known = ", ".join(f"{width} with {depth}" for width, depth in released)
        raise InvalidCheckpoint(f"no released xAR is {width} wide with {depths[0]} blocks a stack ({known})")
    return arguments


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
