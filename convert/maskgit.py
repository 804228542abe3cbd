"""MaskGIT generators of TiTok and One-D-Piece: the authors' config and keys to our `MaskGIT`."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from ..core.errors import InvalidCheckpoint
from ..core.strict import build, check_keys
from ..generators.maskgit import DECAYS, MaskGIT
from .fields import Config, Fields, StateDict, renamed
from .titok import unwrap

# Modules of a ViT layer: official name below the layer, ours.
VIT_LAYER = {
    "attention.output.dense": "attn.proj", "attention.output.LayerNorm": "norm1", "intermediate.dense": "fc1",
    "output.dense": "fc2", "output.LayerNorm": "norm2",
}  # fmt: skip
QKV = {"attention.self.query": 0, "attention.self.key": 1, "attention.self.value": 2}
BERT = "model.encoder.layer"
TOKEN_TYPES = "token types"  # a parameter that ours does not have
VIT_NAMES = {
    "model.embeddings.word_embeddings.weight": "transformer.embeddings.weight",
    "model.embeddings.position_embeddings.weight": "transformer.pos_embed",
    "model.embeddings.token_type_embeddings.weight": TOKEN_TYPES,
    "model.embeddings.LayerNorm.weight": "transformer.norm.weight",
    "model.embeddings.LayerNorm.bias": "transformer.norm.bias",
}


def from_official(config: Config, state_dict: StateDict) -> MaskGIT:
    """Return the `MaskGIT` of these official keys, in eval mode.

    Sampling settings that the config lacks are those of the authors' code.
    """
    official, _ = unwrap(config)
    if any("adaln" in key.lower() for key in state_dict):
        raise InvalidCheckpoint(
            "these are the weights of RAR, which mediatok does not have; it has MaskGIT's ViT and UViT"
        )
    return from_arguments(maskgit_arguments(official), state_dict)


def from_arguments(arguments: Mapping[str, Any], state_dict: StateDict) -> MaskGIT:
    """The same, for a release whose sizes are known: `arguments` of the constructor."""
    state_dict = {key: value for key, value in state_dict.items() if key != "model.embeddings.position_ids"}
    if arguments.get("network", "vit") == "vit":
        defaults = {name: item.default for name, item in signature(MaskGIT.__init__).parameters.items()}
        check_keys(_vit_shapes(defaults | dict(arguments)), state_dict)
    weights = renamed(state_dict, place)
    if TOKEN_TYPES in weights:  # only its first row is ever used: it moves into the positions
        positions = weights["transformer.pos_embed"] + weights.pop(TOKEN_TYPES)[0]
        weights["transformer.pos_embed"] = positions[None]
    return build(MaskGIT, arguments, weights)


def place(key: str) -> tuple[str, int | None]:
    """Our parameter for an official key, and which third of its rows where q, k and v are one matrix of ours."""
    if key.startswith(f"{BERT}."):
        _, _, _, layer, rest = key.split(".", 4)
        module, _, kind = rest.rpartition(".")
        if module in QKV:
            return f"transformer.blocks.{layer}.attn.qkv.{kind}", QKV[module]
        return f"transformer.blocks.{layer}.{VIT_LAYER.get(module, module)}.{kind}", None
    if key in VIT_NAMES:
        return VIT_NAMES[key], None
    if key.startswith(("lm_head.", "model.")):
        return key.removeprefix("model."), None
    return f"transformer.{key.replace('.mlp.fc', '.fc')}", None


def maskgit_arguments(official: Config) -> dict[str, Any]:
    """Constructor arguments from the official config."""
    model = Fields(official.get("model"), "model")
    generator = Fields(model.section.get("generator"), "model.generator")
    quantizer = Fields(model.section.get("vq_model"), "model.vq_model")
    losses = Fields(official.get("losses") or {}, "losses")
    network = generator.choice("model_type", ("ViT", "UViT"), default="ViT")
    width = generator.integer("hidden_size", 768)
    arguments = {
        "network": network.lower(),
        "hidden_size": width,
        "num_hidden_layers": generator.integer("num_hidden_layers", 24, limit=512),
        "num_attention_heads": generator.integer("num_attention_heads", 16),
        "intermediate_size": generator.integer("intermediate_size", 4 * width),
        "dropout": generator.number("dropout", 0.1),
        "attn_drop": generator.number("attn_drop", 0.1),
        "codebook_size": quantizer.integer("codebook_size"),
        "num_tokens": generator.integer("image_seq_len", quantizer.section.get("num_latent_tokens")),
        "num_classes": generator.integer("condition_num_classes", 1000),
        "class_label_dropout": generator.number("class_label_dropout", 0.1),
        "label_smoothing": losses.number("label_smoothing", 0.1),
        "loss_weight_unmasked_token": losses.number("loss_weight_unmasked_token", 0.1),
        "num_steps": generator.integer("num_steps", 8, limit=1000),
        "guidance_scale": generator.number("guidance_scale", 3.0),
        "guidance_decay": generator.choice("guidance_decay", DECAYS, default="constant"),
        "guidance_scale_pow": generator.number("guidance_scale_pow", 3.0),
        "randomize_temperature": generator.number("randomize_temperature", 4.5),
        "softmax_temperature_annealing": generator.flag("softmax_temperature_annealing", default=False),
    }
    if width % arguments["num_attention_heads"]:
        heads = arguments["num_attention_heads"]
        raise InvalidCheckpoint(f"model.generator.hidden_size {width} is not divisible by {heads} heads")
    return arguments


def _vit_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every official key of a ViT, and its shape."""
    width, hidden = arguments["hidden_size"], arguments["intermediate_size"]
    codes, length = arguments["codebook_size"], arguments["num_tokens"] + 1
    shapes = {
        "model.embeddings.word_embeddings.weight": (codes + arguments["num_classes"] + 2, width),
        "model.embeddings.position_embeddings.weight": (length, width),
        "model.embeddings.token_type_embeddings.weight": (2, width),
        "model.lm_head.weight": (codes, width),
        "model.lm_head.bias": (codes,),
    }
    linears = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
    linears |= {"attention.output.dense": (width, width), "intermediate.dense": (hidden, width)}
    linears["output.dense"] = (width, hidden)
    norms = ["model.embeddings.LayerNorm"]
    for layer in range(arguments["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes[f"{BERT}.{layer}.{name}.weight"] = shape
            shapes[f"{BERT}.{layer}.{name}.bias"] = shape[:1]
        norms += [f"{BERT}.{layer}.attention.output.LayerNorm", f"{BERT}.{layer}.output.LayerNorm"]
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
