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
CODE, BEGIN, END = "<img_{:05d}>", "<img>", "</img>"  # names of added tokens
WAY_OUT = "take a SEED-LLaMA, such as AILab-CVC/seed-llama-8b-sft"
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
            f"{BEGIN} {begin} and {END} {end}; {WAY_OUT}"
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
    """Whether a folder is a LLaMA; `load_release` says when it lacks SEED's words."""
    if not folder.is_dir() or not (folder / "config.json").is_file():
        return False
    if not any((folder / file).is_file() for file in WEIGHTS):
        return False
    try:
        config = read_config(inside(folder, "config.json"))
    except MediatokError:
        return False
    return config.get("model_type") == "llama" and "mm_vision_vq_type" not in config  # which is TokenFlow's


def image_vocabulary(folder: Path) -> dict[str, int]:
    """Where codes and the marks of pictures are among the ids, by the names in a parity case; {} where nothing says.

    Raises:
        InvalidCheckpoint: there are added tokens, and not those of pictures, or not in a row.
    """
    if not (folder / ADDED_TOKENS).exists():
        return {}
    path = inside(folder, ADDED_TOKENS)
    added = read_json(path, MAX_ADDED_BYTES)
    if missing := [name for name in (CODE.format(0), BEGIN, END) if name not in added]:
        raise InvalidCheckpoint(
            f"{path} lacks {', '.join(missing)}: this language model has not the image vocabulary; {WAY_OUT}"
        )
    fields = Fields(added, ADDED_TOKENS)
    first = fields.integer(CODE.format(0))
    codes = sum(re.fullmatch(r"<img_\d{5}>", name) is not None for name in added)
    for number in range(codes):
        if added.get(name := CODE.format(number)) != first + number:
            raise InvalidCheckpoint(
                f"{path}: the {codes} codes from {first} on must be in a row, and {name} is {added.get(name)!r}"
            )
    return {"image_id_shift": first, "codes": codes, "boi": fields.integer(BEGIN), "eoi": fields.integer(END)}


def load_release(folder: Path, entry: ModelEntry | None = None) -> SeedLLaMA:
    """The model of a released folder, with its text tokenizer.

    Raises:
        InvalidCheckpoint: weights that do not fit, or lack the image vocabulary.
    """
    config = read_config(inside(folder, "config.json")) | image_vocabulary(folder)
    weights = next(inside(folder, file) for file in WEIGHTS if (folder / file).is_file())
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
