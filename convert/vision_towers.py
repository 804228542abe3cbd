"""CLIP's and SigLIP's image encoders in transformers' layout: what TokenFlow's own begins as, and what teaches it."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint, ModelNotFound
from ..core.files import shown
from ..core.strict import build
from ..core.weights import inside, read_config, read_state_dict
from ..tokenizers.image.tokenflow_towers import TOWERS, VisionTower
from .fields import Fields
from .tokenflow_keys import our_weights, tower_name

HUB_IDS = {"clip": "openai/clip-vit-base-patch16", "siglip": "google/siglip-so400m-patch14-384"}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# transformers' names of CLIP that SigLIP's tower does not have
CLIP_NAMES = {
    "embeddings.class_embedding": "class_embedding", "pre_layrnorm.": "ln_pre.", "post_layernorm.": "ln_post.",
}  # fmt: skip
PROJECTION = "visual_projection.weight"


def load_tower(kind: str, folder: str | Path | None) -> tuple[VisionTower, Tensor | None]:
    """The tower in a folder of the hub's, and CLIP's projection [T, D] to the space that it shares with texts.

    Of SigLIP only the blocks up to the last but one are taken, as language models read it.

    Raises:
        ModelNotFound: there is nothing; the message says which files, and where they come from.
        InvalidCheckpoint: files that do not fit each other.
    """
    if kind not in TOWERS:
        raise ModelNotFound(f"unknown vision tower {kind!r}; there are {', '.join(TOWERS)}")
    folder = None if folder is None else Path(folder)
    names = [] if folder is None else [name for name in WEIGHT_FILES if (folder / name).exists()]
    if not names or not (folder / "config.json").is_file():
        where = "no folder is given" if folder is None else f"{shown(folder)} lacks config.json or {WEIGHT_FILES[0]}"
        raise ModelNotFound(
            f"the vision tower {kind!r} is missing ({where}): download config.json and model.safetensors of "
            f"huggingface.co/{HUB_IDS[kind]} and give their folder"
        )
    config = read_config(inside(folder, "config.json"))
    state_dict = read_state_dict(inside(folder, names[0]))
    try:
        return tower_of(kind, config.get("vision_config", config), state_dict), state_dict.get(PROJECTION)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{shown(folder)}: {error}") from None


def tower_of(kind: str, config: dict, state_dict: dict[str, Tensor]) -> VisionTower:
    """The tower of transformers' `vision_config` and keys (`vision_model. ...`, or without that)."""
    fields = Fields(config, "vision_config")
    width = fields.integer("hidden_size")
    depth = fields.integer("num_hidden_layers") - (kind == "siglip")
    parts = ("embeddings.", "encoder.layers.", "pre_layrnorm.", "post_layernorm.")
    saved = {}
    for key, value in state_dict.items():
        key = key.removeprefix("vision_model.")
        if key.startswith(parts) and not key.endswith("position_ids"):
            saved[f"vision_model.{key}"] = value
    if kind == "siglip":
        tail = ("vision_model.post_layernorm.", f"vision_model.encoder.layers.{depth}.")
        saved = {key: value for key, value in saved.items() if not key.startswith(tail)}
    weights = our_weights(saved, _name_of)
    positions = weights.get("positional_embedding", torch.empty(0))
    arguments = (
        kind, width, depth, fields.integer("num_attention_heads"), fields.integer("intermediate_size"),
        fields.integer("patch_size"), isqrt(len(positions)),
    )  # fmt: skip
    return build(lambda: VisionTower(*arguments), {}, weights)


def _name_of(key: str) -> str:
    key = tower_name(key)
    for theirs, ours in CLIP_NAMES.items():
        key = key.replace(theirs, ours)
    return key
