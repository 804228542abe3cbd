"""SEED-LLaMA: checkpoints of transformers' LLaMA with the image vocabulary to our `SeedLLaMA`.

Sizes are measured; heads and what else shapes do not tell come from config.json, and the ids of pictures from
added_tokens.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..core.errors import InvalidCheckpoint, MediatokError
from ..core.registry import TEXT_FILES, ModelEntry, constructor_arguments, find_entry
from ..core.strict import build
from ..core.weights import inside, read_config, read_json, read_state_dict
from ..generators.seed_llama import SeedLLaMA
from .fields import Config, Fields, StateDict

ROTATION = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # follows from the sizes
ADDED_TOKENS, MAX_ADDED_BYTES = "added_tokens.json", 4 * 2**20
FIRST_CODE = "<img_00000>"
HEAD_WIDTH = 128  # of every LLaMA
LARGE_WIDTH = 5120  # of the 14B models
WEIGHTS = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip
# Names in a parity case -> in a config of transformers.
CASE_NAMES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "rope_base": "rope_theta"}


def from_official(config: Config, state_dict: StateDict) -> SeedLLaMA:
    """Return the `SeedLLaMA` of these official keys, in eval mode.

    `config` is that of transformers, or a parity case's, with `image_id_shift`, `codes`, `boi`, `eoi` and
    `image_tokens`; the released ones where it lacks them.
    """
    weights = {f"llm.{key}": value for key, value in state_dict.items() if not ROTATION.fullmatch(key)}
    return build(SeedLLaMA, llama_arguments(config, state_dict), weights)


def llama_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments from what the weights' shapes and `config` say.

    Raises:
        InvalidCheckpoint: no LLaMA, or one without the image vocabulary.
    """
    config = dict(config) | {theirs: config[ours] for ours, theirs in CASE_NAMES.items() if ours in config}
    fields = Fields(config, "config")
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate_proj.weight"):
        if len(shapes.get(key, ())) != 2:
            raise InvalidCheckpoint(f"these are no weights of a LLaMA: {key} is missing or has a wrong shape")
    vocab_size, width = shapes["model.embed_tokens.weight"]
    layers = [int(match[1]) for key in shapes if (match := re.match(r"model\.layers\.(\d{1,4})\.", key))]
    first, codes = fields.integer("image_id_shift", 32000), fields.integer("codes", 8192)
    begin, end = fields.integer("boi", first + codes), fields.integer("eoi", first + codes + 1)
    if max(first + codes, begin + 1, end + 1) > vocab_size:
        raise InvalidCheckpoint(
            f"this language model has {vocab_size} ids and not the image vocabulary: {codes} codes from {first} on, "
            f"<img> {begin} and </img> {end}"
        )
    heads = fields.integer("num_attention_heads", max(1, width // HEAD_WIDTH))
    if fields.integer("num_key_value_heads", heads) != heads:
        raise InvalidCheckpoint("SEED-LLaMA has as many key and value heads as heads")
    rope = config.get("rope_parameters") or {}
    base = rope.get("rope_theta") if isinstance(rope, dict) else None
    return {
        "vocab_size": vocab_size, "first_code": first, "num_codes": codes, "begin_image": begin, "end_image": end,
        "image_tokens": fields.integer("image_tokens", 32), "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0], "num_layers": max(layers) + 1,
        "num_heads": heads, "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_base": fields.number("rope_theta", base or 10000.0),
        "max_positions": fields.integer("max_position_embeddings", 2048),
    }  # fmt: skip


def is_release(folder: Path) -> bool:
    """Whether a folder is a LLaMA with SEED's words."""
    if not folder.is_dir() or not (folder / "config.json").is_file():
        return False
    if not any((folder / file).is_file() for file in WEIGHTS):
        return False
    try:
        config = read_config(inside(folder, "config.json"))
        if config.get("model_type") != "llama" or "mm_vision_vq_type" in config:  # TokenFlow's
            return False
        return FIRST_CODE in added_tokens(folder) or not (folder / ADDED_TOKENS).exists()
    except MediatokError:
        return False


def added_tokens(folder: Path) -> dict[str, Any]:
    if not (folder / ADDED_TOKENS).exists():
        return {}
    return read_json(inside(folder, ADDED_TOKENS), MAX_ADDED_BYTES)


def load_release(folder: Path, entry: ModelEntry | None = None) -> SeedLLaMA:
    """The model of a released folder, with its text tokenizer.

    Raises:
        InvalidCheckpoint: weights that do not fit, or lack the image vocabulary.
    """
    config = read_config(inside(folder, "config.json"))
    weights = next(inside(folder, file) for file in WEIGHTS if (folder / file).is_file())
    added = added_tokens(folder)
    if FIRST_CODE in added:
        codes = [key for key in added if re.fullmatch(r"<img_\d{5}>", key)]
        names = {"image_id_shift": FIRST_CODE, "boi": "<img>", "eoi": "</img>"}
        config |= {ours: added[name] for ours, name in names.items() if name in added} | {"codes": len(codes)}
    state_dict = read_state_dict(weights)
    try:
        arguments = llama_arguments(config, state_dict)
        entry = entry or find_entry(folder.resolve().name)
        if entry is not None and entry.class_name == SeedLLaMA.__name__:
            arguments["prompt"] = constructor_arguments(entry).get("prompt", "vicuna")
        else:
            arguments["prompt"] = "llama2" if arguments["hidden_size"] == LARGE_WIDTH else "vicuna"
        own = {f"llm.{key}": value for key, value in state_dict.items() if not ROTATION.fullmatch(key)}
        model = build(SeedLLaMA, arguments, own)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{weights}: {error}") from None
    model.name = entry.name if entry is not None else folder.resolve().name
    if any((folder / file).exists() for file in TEXT_FILES):
        model.use_text(folder)
    return model
