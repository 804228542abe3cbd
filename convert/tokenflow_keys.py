"""The official keys of TokenFlow's tokenizers: their shapes, and what we call them.

CLIP's tower has OpenAI's names, SigLIP's those of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .fields import StateDict

SCALING = {"scaling_layer.shift": 0.5, "scaling_layer.scale": 0.5}  # SigLIP's: what maps [0, 1] to [-1, 1]
CLIP_NAMES = {"conv1.": "patch_embed.", "transformer.resblocks.": "blocks."}
SIGLIP_NAMES = {
    "embeddings.patch_embedding.": "patch_embed.", "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "blocks.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
}  # fmt: skip
PACKED = re.compile(r"(.+)self_attn\.([qkv])_proj\.(weight|bias)")


def our_weights(saved: StateDict, name_of: Callable[[str], str] | None = None) -> dict[str, Tensor]:
    """Official weights under our names (`our_name` unless given); q, k and v of SigLIP become one."""
    name_of = name_of or our_name
    weights: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        if key in SCALING:
            continue
        if match := PACKED.fullmatch(key):
            parts.setdefault(name_of(f"{match[1]}attn.in_proj_{match[3]}"), {})[match[2]] = value
        else:
            value = value.flatten(0, -2) if key in ("decoder_vqkd.cls_token", "decoder_vqkd.pos_embed") else value
            weights[name_of(key)] = value
    return weights | {
        name: torch.cat([rows[part] for part in sorted(rows, key="qkv".index)]) for name, rows in parts.items()
    }


def our_name(key: str) -> str:
    """Our parameter of an official key."""
    if key.startswith("encoder_vqkd."):
        return "encoder_vqkd." + tower_name(key.removeprefix("encoder_vqkd."))
    if key.startswith("decoder_vqkd."):
        return key.replace("patch_embed.proj.", "patch_embed.").replace(".mlp.", ".")
    return key.replace(".downsample.conv.", ".downsample.").replace(".upsample.conv.", ".upsample.")


def tower_name(key: str) -> str:
    """Our parameter of a `VisionTower` for OpenAI's key (conv1 ...), or SigLIP's of transformers (vision_model ...)."""
    names = SIGLIP_NAMES if key.startswith("vision_model.") else CLIP_NAMES
    key = key.removeprefix("vision_model.")
    for theirs, ours in names.items():
        key = key.replace(theirs, ours)
    return key


def official_shapes(given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every official key that counts, and its shape, of a `TokenFlow` with all these constructor arguments."""
    width, code_width, pixel_width = given["tower_width"], given["semantic_code_width"], given["pixel_code_width"]
    semantic, grid, z_channels = given["semantic_width"], given["semantic_grid"], given["z_channels"]
    shapes = {
        **tower_shapes("encoder_vqkd.", given),
        **_task_layer("encode_task_layer", width, code_width),
        **_task_layer("decode_task_layer", semantic, given["teacher_width"]),
        **_conv("quant_conv", z_channels, pixel_width, 1), **_conv("post_quant_conv", pixel_width, z_channels, 1),
        "quantize.embedding_vqkd.weight": (given["codebook_size"], code_width),
        "quantize.embedding_vqgan.weight": (given["codebook_size"], pixel_width),
        "decoder_vqkd.cls_token": (1, 1, semantic), "decoder_vqkd.pos_embed": (1, grid**2 + 1, semantic),
        **_conv("decoder_vqkd.patch_embed.proj", code_width, semantic, 1), **_norm("decoder_vqkd.fc_norm", semantic),
    }  # fmt: skip
    if given["tower"] == "siglip":
        shapes |= dict.fromkeys(SCALING, (1, 3, 1, 1))
    for number in range(given["semantic_depth"]):
        block = f"decoder_vqkd.blocks.{number}"
        shapes |= {
            **_norm(f"{block}.norm1", semantic), **_norm(f"{block}.norm2", semantic),
            f"{block}.attn.q_bias": (semantic,), f"{block}.attn.v_bias": (semantic,),
            f"{block}.attn.qkv.weight": (3 * semantic, semantic), **_linear(f"{block}.attn.proj", semantic, semantic),
            **_linear(f"{block}.mlp.fc1", semantic, 4 * semantic),
            **_linear(f"{block}.mlp.fc2", 4 * semantic, semantic),
        }  # fmt: skip
    down = [given["channels"] * multiplier for multiplier in given["multipliers"]]
    up = [given["decoder_channels"] * multiplier for multiplier in reversed(given["multipliers"])]
    shapes |= _cnn("encoder", 3, [given["channels"], *down], given["res_blocks"], z_channels, is_encoder=True)
    return shapes | _cnn("decoder", z_channels, [up[0], *up], given["decoder_res_blocks"] + 1, 3, is_encoder=False)


def tower_shapes(prefix: str, given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The official keys of a `VisionTower`: OpenAI's for CLIP, those of transformers for SigLIP."""
    width, hidden, patch, grid = (given[f"tower_{name}"] for name in ("width", "hidden", "patch", "grid"))
    shapes: dict[str, tuple[int, ...]] = {}
    if given["tower"] == "clip":
        shapes = {
            f"{prefix}conv1.weight": (width, 3, patch, patch), f"{prefix}class_embedding": (width,),
            f"{prefix}positional_embedding": (grid**2 + 1, width), **_norm(f"{prefix}ln_pre", width),
            **_norm(f"{prefix}ln_post", width),
        }  # fmt: skip
        for number in range(given["tower_depth"]):
            block = f"{prefix}transformer.resblocks.{number}"
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,),
                **_linear(f"{block}.attn.out_proj", width, width), **_norm(f"{block}.ln_1", width),
                **_norm(f"{block}.ln_2", width), **_linear(f"{block}.mlp.c_fc", width, hidden),
                **_linear(f"{block}.mlp.c_proj", hidden, width),
            }  # fmt: skip
        return shapes
    prefix += "vision_model."
    shapes |= _conv(f"{prefix}embeddings.patch_embedding", 3, width, patch)
    shapes[f"{prefix}embeddings.position_embedding.weight"] = (grid**2, width)
    for number in range(given["tower_depth"]):
        block = f"{prefix}encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{block}.self_attn.{part}", width, width)
        shapes |= {
            **_norm(f"{block}.layer_norm1", width), **_norm(f"{block}.layer_norm2", width),
            **_linear(f"{block}.mlp.fc1", width, hidden), **_linear(f"{block}.mlp.fc2", hidden, width),
        }  # fmt: skip
    return shapes


def _cnn(name: str, first: int, widths: list[int], blocks: int, last: int, is_encoder: bool) -> dict:
    """Keys of a convolutional network; `widths` are those before the first level and behind each."""
    num_levels = len(widths) - 1
    middle = widths[-1] if is_encoder else widths[0]
    shapes = {
        **_conv(f"{name}.conv_in", first, widths[0], 3), **_resnet(f"{name}.mid.0", middle, middle),
        **_attn(f"{name}.mid.1", middle), **_resnet(f"{name}.mid.2", middle, middle),
        **_norm(f"{name}.norm_out", widths[-1]), **_conv(f"{name}.conv_out", widths[-1], last, 3),
    }  # fmt: skip
    for level in range(num_levels):
        stem, width = f"{name}.conv_blocks.{level}", widths[level + 1]
        for block in range(blocks):
            shapes |= _resnet(f"{stem}.res.{block}", width if block else widths[level], width)
            if level == (num_levels - 1 if is_encoder else 0):
                shapes |= _attn(f"{stem}.attn.{block}", width)
        if level < num_levels - 1:
            shapes |= _conv(f"{stem}.{'downsample' if is_encoder else 'upsample'}.conv", width, width, 3)
    return shapes


def _resnet(name: str, before: int, width: int) -> dict:
    shapes = {
        **_norm(f"{name}.norm1", before), **_conv(f"{name}.conv1", before, width, 3), **_norm(f"{name}.norm2", width),
        **_conv(f"{name}.conv2", width, width, 3),
    }  # fmt: skip
    return shapes if before == width else shapes | _conv(f"{name}.nin_shortcut", before, width, 1)


def _attn(name: str, width: int) -> dict:
    shapes = _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.{part}", width, width, 1)
    return shapes


def _task_layer(name: str, width: int, out: int) -> dict:
    return _linear(f"{name}.0", width, width) | _linear(f"{name}.2", width, out)


def _conv(name: str, before: int, width: int, side: int) -> dict:
    return {f"{name}.weight": (width, before, side, side), f"{name}.bias": (width,)}


def _linear(name: str, before: int, width: int) -> dict:
    return {f"{name}.weight": (width, before), f"{name}.bias": (width,)}


def _norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
