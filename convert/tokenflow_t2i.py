"""TokenFlow's text-to-image model: the authors' keys and config to our `NextScaleLlama`.

Their folder is that of a LLaVA: a config.json of transformers' LLaMA with some fields more, shards with an index, and
LLaMA-2's text tokenizer. The picture's tokenizer is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import InvalidCheckpoint
from ..core.registry import TEXT_FILES
from ..core.strict import build, check_keys
from ..core.weights import inside, read_config, read_state_dict
from ..generators.next_scale_llama import NextScaleLlama, released_configs
from ..tokenizers.image.tokenflow import SIDES_224, SIDES_256, SIDES_384
from .fields import Config, Fields, StateDict, renamed

SCHEDULES = (SIDES_224, SIDES_256, SIDES_384)
SCALARS = ("image_token_start", "image_token_end")
TOKENIZER = "tokenizer."
MAX_BLOCKS = 512
NAMES = {
    "model.embed_tokens.weight": "embed_tokens.weight", "model.norm.weight": "norm.weight",
    "model.lvl_embed.weight": "level_embed.weight", "model.pos_1LC": "place_embed", "lm_head.weight": "lm_head.weight",
}  # fmt: skip
IN_BLOCK = {  # one parameter of ours, and which of its rows
    "self_attn.q_proj": ("attn.qkv", 0), "self_attn.k_proj": ("attn.qkv", 1), "self_attn.v_proj": ("attn.qkv", 2),
    "self_attn.o_proj": ("attn.o_proj", None), "self_attn.qknorm.query_norm": ("attn.q_norm", None),
    "self_attn.qknorm.key_norm": ("attn.k_norm", None), "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("mlp_norm", None), "mlp.gate_proj": ("gate_up", 0), "mlp.up_proj": ("gate_up", 1),
    "mlp.down_proj": ("down_proj", None),
}  # fmt: skip


def is_folder(path: Path) -> bool:
    """Whether a folder's config.json is that of a TokenFlow text-to-image model."""
    file = path / "config.json"
    return path.is_dir() and file.is_file() and _config_of(path).get("mm_vision_vq_type") == "TOKEN_FLOW"


def from_official(config: Config, state_dict: StateDict) -> NextScaleLlama:
    """The generator of a released config, or of a parity case, whose weights hold its tokenizer, too; in eval mode."""
    own = {key: value for key, value in state_dict.items() if not key.startswith(TOKENIZER) and key not in SCALARS}
    arguments = case_arguments(config, own) if "language_model" in config else released_arguments(config, state_dict)
    check_keys(official_shapes(arguments), own)
    model = build(NextScaleLlama, arguments, renamed(own, place))
    inner = {key.removeprefix(TOKENIZER): value for key, value in state_dict.items() if key.startswith(TOKENIZER)}
    if inner:
        from .tokenflow import from_official as tokenizer_from_official

        model.use_tokenizer(tokenizer_from_official({"constructor": config.get("tokenizer_constructor")}, inner))
    return model


def load_folder(folder: Path, weights: Path) -> NextScaleLlama:
    """The generator in a released folder; prompts are read with the text tokenizer beside it, if there is one."""
    try:
        model = from_official(_config_of(folder), read_state_dict(weights))
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{weights}: {error}") from None
    if any((folder / file).is_file() for file in TEXT_FILES):
        model.use_text(folder)
    model.name = folder.resolve().name
    return model


def _config_of(folder: Path) -> dict[str, Any]:
    return read_config(inside(folder, "config.json"))


def place(key: str) -> tuple[str, int | None]:
    """Our parameter for an official key, and which of its rows where one product of ours is several of theirs."""
    if match := re.fullmatch(r"model\.layers\.(\d{1,4})\.(.+)\.weight", key):
        module, part = IN_BLOCK[match[2]]
        return f"transformer.blocks.{match[1]}.{module}.weight", part
    return "transformer." + NAMES.get(key, key.replace("model.mm_projector.", "projector.")), None


def released_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments from a released config.json and the shapes."""
    fields = Fields(config, "config")
    arguments = sizes_of(state_dict) | {
        "num_heads": fields.integer("num_attention_heads"), "norm_eps": fields.number("rms_norm_eps", 1e-5),
        "rope_theta": fields.number("rope_theta", 10000.0), "sides": _schedule(state_dict),
    }  # fmt: skip
    arguments["num_kv_heads"] = fields.integer("num_key_value_heads", arguments["num_heads"])
    codes, rows = fields.integer("vq_codebook_size", 32768), _shape(state_dict, "model.embed_tokens.weight", 2)[0]
    first = rows - codes
    if "image_token_start" in state_dict and int(state_dict["image_token_start"]) != first:
        raise InvalidCheckpoint(
            f"{rows} ids with {codes} codes put the first code at {first}, but image_token_start is "
            f"{int(state_dict['image_token_start'])}"
        )
    if first < 2:
        raise InvalidCheckpoint(f"a vocabulary of {rows} ids leaves no room for texts beside {codes} codes")
    defaults = released_configs()["tokenflow-t2i"]
    return defaults | arguments | {"codebook_size": codes, "text_vocab_size": first, "pad_id": first - 1}


def case_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments from a parity case."""
    fields = Fields(config.get("language_model"), "language_model")
    constructor = Fields(config.get("tokenizer_constructor"), "tokenizer_constructor")
    first = fields.integer("image_token_start")
    return sizes_of(state_dict) | {
        "num_heads": fields.integer("heads"), "num_kv_heads": fields.integer("kv_heads"),
        "norm_eps": fields.number("rms_norm_eps", 1e-5), "rope_theta": fields.number("rope_theta", 10000.0),
        "sides": constructor.integers("scales", limit=4096), "text_vocab_size": first,
        "codebook_size": fields.integer("image_token_end") - first + 1, "pad_id": fields.integer("pad"),
        "bos_id": fields.integer("bos"), "opening": fields.integers("img_tokens", limit=first), "closing": (),
        "negative_prompt": "", "prompt_length": fields.integer("text_len"),
    }  # fmt: skip


def sizes_of(state_dict: StateDict) -> dict[str, Any]:
    """What the shapes tell."""
    numbers = {int(match[1]) for key in state_dict if (match := re.match(r"model\.layers\.(\d{1,4})\.", key))}
    if not numbers or max(numbers) >= MAX_BLOCKS:
        raise InvalidCheckpoint("these are no weights of TokenFlow's text-to-image model: model.layers is missing")
    return {
        "width": _shape(state_dict, "model.embed_tokens.weight", 2)[1], "depth": max(numbers) + 1,
        "code_width": _shape(state_dict, "model.mm_projector.0.weight", 2)[1],
        "hidden": _shape(state_dict, "model.layers.0.mlp.gate_proj.weight", 2)[0],
    }  # fmt: skip


def official_shapes(given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every official key that counts, and its shape."""
    width, hidden, sides = given["width"], given["hidden"], given["sides"]
    if width % given["num_heads"]:
        raise InvalidCheckpoint(f"a width of {width} cannot be shared by {given['num_heads']} heads")
    head = width // given["num_heads"]
    vocab_size, kv_width = given["text_vocab_size"] + given["codebook_size"], head * given["num_kv_heads"]
    shapes = {
        "model.embed_tokens.weight": (vocab_size, width), "lm_head.weight": (vocab_size, width),
        "model.norm.weight": (width,), "model.lvl_embed.weight": (len(sides) + 1, width),
        "model.pos_1LC": (sum(side**2 for side in sides), width), 
        "model.mm_projector.0.weight": (width, given["code_width"]), "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width), "model.mm_projector.2.bias": (width,),
    }  # fmt: skip
    block = {
        "self_attn.q_proj": (width, width), "self_attn.o_proj": (width, width),
        "self_attn.k_proj": (kv_width, width), "self_attn.v_proj": (kv_width, width),
        "self_attn.qknorm.query_norm": (head,), "self_attn.qknorm.key_norm": (head,),
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden),
    }  # fmt: skip
    for number in range(given["depth"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def _schedule(state_dict: StateDict) -> tuple[int, ...]:
    """The sides of the scales: one of the published schedules."""
    tokens, levels = _shape(state_dict, "model.pos_1LC", 2)[0], _shape(state_dict, "model.lvl_embed.weight", 2)[0]
    for sides in SCHEDULES:
        if (sum(side**2 for side in sides), len(sides) + 1) == (tokens, levels):
            return sides
    raise InvalidCheckpoint(f"no published schedule of scales has {tokens} tokens in {levels - 1} scales")


def _shape(state_dict: StateDict, key: str, ndim: int) -> tuple[int, ...]:
    if key not in state_dict or state_dict[key].ndim != ndim:
        raise InvalidCheckpoint(f"these are no weights of TokenFlow: {key} is missing or has a wrong shape")
    return tuple(state_dict[key].shape)
