"""TokenFlow: the authors' tokenizer files to our `TokenFlow`. They hold no config; keys and shapes tell the variant.

Left aside: the record of recently used codes, and what lies behind the layer of SigLIP whose output is used (its last
block, the norm and the pooling head), all frozen when the tokenizer was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from math import isqrt
from typing import Any

import torch
from torch import nn

from ..core.errors import InvalidCheckpoint
from ..core.sizes import MAX_DEPTH
from ..core.strict import build, check_keys
from ..nn.shared_mapping_vq import SharedMappingQuantizer
from ..tokenizers.image.tokenflow import TokenFlow, VisionTower, released_configs
from .fields import Config, Fields, StateDict
from .tokenflow_keys import SCALING, official_shapes, our_weights, tower_name, tower_shapes

USED = "quantize.codebook_used"
TEACHERS = {"clipb_224": "clip", "siglip_384": "siglip"}
VISION = "encoder_vqkd.vision_model."


def from_official(config: Config, state_dict: StateDict) -> nn.Module:
    """Return the `TokenFlow` of these official keys, in eval mode; or the bare quantizer that a parity case may be of.

    `config` is empty for released files, or holds the shrunk sizes of a case as `constructor`.
    """
    if "embedding_vqkd.weight" in state_dict:
        return quantizer_from_official(config, state_dict)
    if any(key.endswith("lm_head.weight") for key in state_dict):
        from .tokenflow_t2i import from_official as generator_from_official

        return generator_from_official(config, state_dict)
    if "constructor" in config:
        return from_arguments(case_arguments(config["constructor"], state_dict), state_dict)
    return from_arguments(released_arguments(state_dict), state_dict)


def of_release(name: str, state_dict: StateDict) -> TokenFlow:
    """The `TokenFlow` of a released file, which `name` must be the name of."""
    if is_siglip(state_dict) != (name == "tokenflow-xl"):
        raise InvalidCheckpoint(f"these are no weights of {name}: the semantic encoder is that of another TokenFlow")
    return from_arguments(released_arguments(state_dict), state_dict)


def is_siglip(state_dict: StateDict) -> bool:
    """Whether the semantic encoder is SigLIP's."""
    return f"{VISION}embeddings.patch_embedding.weight" in state_dict


def from_arguments(arguments: Mapping[str, Any], state_dict: StateDict) -> TokenFlow:
    """The `TokenFlow` of known sizes."""
    given = {name: item.default for name, item in signature(TokenFlow.__init__).parameters.items()} | dict(arguments)
    saved = {key: value for key, value in state_dict.items() if key != USED and not is_tail(key, given["tower_depth"])}
    check_keys(official_shapes(given), saved)
    for key, expected in SCALING.items():
        if key in saved and not torch.allclose(saved[key].float(), torch.tensor(expected), atol=1e-3):
            raise InvalidCheckpoint(f"{key} is not {expected}: pictures of this model are scaled in an unknown way")
    return build(TokenFlow, arguments, our_weights(saved))


def is_tail(key: str, depth: int) -> bool:
    """Whether SigLIP's `key` lies behind the output of block number `depth`, counted from 1."""
    if not key.startswith(VISION):
        return False
    rest = key.removeprefix(VISION)
    match = re.match(r"encoder\.layers\.(\d{1,4})\.", rest)
    return rest.startswith(("head.", "post_layernorm.")) or (match is not None and int(match[1]) >= depth)


# Sizes.


def released_arguments(state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments of a released file."""
    arguments = released_configs()["tokenflow-xl" if is_siglip(state_dict) else "tokenflow-b"]
    # The base decoder of TokenFlow-B was never released; who trained one can load it.
    if (
        len(shape_of(state_dict, "decoder.conv_out.weight", 4))
        and state_dict["decoder.conv_out.weight"].shape[1] == 128
    ):
        arguments = arguments | {"decoder_channels": 128, "decoder_res_blocks": 2}
    return arguments


def case_arguments(constructor: Any, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments of a parity case: what the shapes do not tell is in its `constructor`."""
    fields = Fields(constructor, "constructor")
    is_clip = TEACHERS[fields.choice("teacher", TEACHERS)] == "clip"
    key = "conv1.weight" if is_clip else "vision_model.embeddings.patch_embedding.weight"
    width, _, patch, _ = shape_of(state_dict, f"encoder_vqkd.{key}", 4)
    positions = "positional_embedding" if is_clip else "vision_model.embeddings.position_embedding.weight"
    stem = r"transformer\.resblocks" if is_clip else r"vision_model\.encoder\.layers"
    depth = fields.integer("sem_layers", count(state_dict, rf"encoder_vqkd\.{stem}\.(\d{{1,4}})\."), MAX_DEPTH)
    fc = "transformer.resblocks.0.mlp.c_fc" if is_clip else "vision_model.encoder.layers.0.mlp.fc1"
    codes, semantic_width = shape_of(state_dict, "quantize.embedding_vqkd.weight", 2)
    z_channels = shape_of(state_dict, "encoder.conv_out.weight", 4)[0]
    decoder_blocks = count(state_dict, r"decoder\.conv_blocks\.0\.res\.(\d{1,4})\.")
    return {
        "image_size": fields.integer("image_size"), "sides": fields.integers("scales", limit=4096),
        "codebook_size": codes, "semantic_code_width": semantic_width,
        "pixel_code_width": shape_of(state_dict, "quantize.embedding_vqgan.weight", 2)[1],
        "tower": "clip" if is_clip else "siglip", "tower_width": width, "tower_depth": depth - (not is_clip),
        "tower_heads": fields.integer("sem_heads"), "tower_patch": patch,
        "tower_hidden": shape_of(state_dict, f"encoder_vqkd.{fc}.weight", 2)[0],
        "tower_grid": isqrt(shape_of(state_dict, f"encoder_vqkd.{positions}", 2)[0]),
        "semantic_depth": count(state_dict, r"decoder_vqkd\.blocks\.(\d{1,4})\."),
        "semantic_heads": fields.integer("sem_dec_heads"),
        "semantic_width": shape_of(state_dict, "decoder_vqkd.patch_embed.proj.weight", 4)[0],
        "semantic_grid": isqrt(shape_of(state_dict, "decoder_vqkd.pos_embed", 3)[1]),
        "teacher_width": shape_of(state_dict, "decode_task_layer.2.weight", 2)[0],
        "channels": shape_of(state_dict, "encoder.conv_in.weight", 4)[0],
        "multipliers": fields.integers("ch_mult", limit=64), "z_channels": z_channels,
        "res_blocks": count(state_dict, r"encoder\.conv_blocks\.0\.res\.(\d{1,4})\."),
        "decoder_channels": shape_of(state_dict, "decoder.conv_out.weight", 4)[1],
        "decoder_res_blocks": decoder_blocks - 1,
    }  # fmt: skip


def shape_of(state_dict: StateDict, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of `key`, or InvalidCheckpoint where it is missing or has another number of dimensions."""
    if key not in state_dict or state_dict[key].ndim != ndim:
        raise InvalidCheckpoint(f"these are no weights of TokenFlow: {key} is missing or has a wrong shape")
    return tuple(state_dict[key].shape)


def count(state_dict: StateDict, pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the beginning of a key."""
    numbers = {int(match[1]) for key in state_dict if (match := re.match(pattern, key))}
    if not numbers:
        raise InvalidCheckpoint(f"these are no weights of TokenFlow: nothing is called {pattern}")
    return max(numbers) + 1


# Parts.


def quantizer_from_official(config: Config, state_dict: StateDict, sides: tuple[int, ...] = (1,)) -> nn.Module:
    """A bare `SharedMappingQuantizer` from `embedding_vqkd.weight` and `embedding_vqgan.weight`."""
    fields = Fields(config, "config")
    codes, semantic_width = shape_of(state_dict, "embedding_vqkd.weight", 2)
    arguments = {
        "codebook_size": codes, "semantic_width": semantic_width, "sides": sides,
        "pixel_width": shape_of(state_dict, "embedding_vqgan.weight", 2)[1],
        "commitment_cost": fields.number("beta", 0.25), "entropy_ratio": fields.number("entropy_loss_ratio", 0.0),
    }  # fmt: skip
    weights = {key: value for key, value in state_dict.items() if key != "codebook_used"}
    return build(SharedMappingQuantizer, arguments, weights)


def clip_tower_from_openai(state_dict: StateDict, heads: int) -> VisionTower:
    """A `VisionTower` of CLIP from OpenAI's keys, its projection to the common space left aside."""
    width, _, patch, _ = shape_of(state_dict, "conv1.weight", 4)
    given = {
        "tower": "clip", "tower_width": width, "tower_patch": patch,
        "tower_depth": count(state_dict, r"transformer\.resblocks\.(\d{1,4})\."),
        "tower_hidden": shape_of(state_dict, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "tower_grid": isqrt(shape_of(state_dict, "positional_embedding", 2)[0]),
    }  # fmt: skip
    saved = {key: value for key, value in state_dict.items() if key != "proj"}
    check_keys(tower_shapes("", given), saved)
    arguments = ("clip", width, given["tower_depth"], heads, given["tower_hidden"], patch, given["tower_grid"])
    return build(lambda: VisionTower(*arguments), {}, {tower_name(key): value for key, value in saved.items()})
