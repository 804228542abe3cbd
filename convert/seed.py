"""SEED: the authors' keys to our `Seed`, and those of their first training stage to a `SeedContrast`.

Sizes are measured; a parity case's config says what shapes do not tell (heads, causality). The released
`seed_quantizer.pt` lacks the vision tower, which comes from `eva_vit_g.pth` of BLIP-2, or from a BLIP-2 checkpoint of
transformers, and holds left-overs of training, which are not loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint, ModelNotFound
from ..core.strict import build, check_keys, shown
from ..core.weights import inside, read_state_dict
from ..tokenizers.image.seed import Seed
from ..tokenizers.image.seed_contrast import SeedContrast
from .fields import Config, Fields, StateDict, renamed

logger = logging.getLogger(__name__)
CAUSAL_QUERIES = 32  # the official code masks when there are exactly so many
TOWER_DEPTH = 39
VISION_HEAD_WIDTH, QFORMER_HEAD_WIDTH, DECODER_HEADS = 88, 64, 12
TOWER = "visual_encoder."
QUANTIZER_FILE, TOWER_FILE, BLIP2_FOLDER = "seed_quantizer.pt", "eva_vit_g.pth", "blip2"
TOWER_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
BLIP2_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TABLES = {  # stored with a batch dimension of one
    "query_tokens": "queries",
    "pos_embed": "semantic_decoder.positions",
    "pos_embed_image": "image_blocks.positions",
    "reverse_tokens": "to_embedding.query",
}
PREFIXES = (
    ("encode_task_layer.", "to_code."), ("decode_task_layer.", "from_code."), ("image_down.", "to_embedding.down."),
    ("distill_image_proj.", "to_embedding.proj."), ("ln_vision.", "vision.network.post_layernorm."),
)  # fmt: skip
TOWER_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embedding."), ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"), ("blocks.", "encoder.layers."), (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."), (".attn.proj.", ".self_attn.projection."), (".attn.qkv.", ".self_attn.qkv."),
)  # fmt: skip
BLOCK_NAMES = (
    (".norm1.", ".ln_1."), (".norm2.", ".ln_2."), (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."),
)  # fmt: skip
LAYER_NAMES = {
    "attention.output.dense": "attn.proj", "attention.output.LayerNorm": "attn.norm",
    "crossattention.self.query": "cross.q", "crossattention.output.dense": "cross.proj",
    "crossattention.output.LayerNorm": "cross.norm", "intermediate_query.dense": "mlp.fc1",
    "output_query.dense": "mlp.fc2", "output_query.LayerNorm": "mlp.norm",
}  # fmt: skip
TEXT_NAMES = {"intermediate.dense": "fc1", "output.dense": "fc2", "output.LayerNorm": "norm"}
PARTS = ("query", "key", "value")


def from_official(config: Config, state_dict: StateDict) -> Seed:
    """Return the `Seed` of these official keys, vision tower included, in eval mode.

    `config` is empty, or a parity case's.
    """
    saved = {key: value for key, value in state_dict.items() if not key.endswith(".position_ids")}
    arguments = seed_arguments(config, saved)
    check_keys(official_shapes(arguments), saved)
    return build(Seed, arguments, our_weights(saved, arguments["cross_every"]))


def contrast_from_official(config: Config, state_dict: StateDict) -> SeedContrast:
    """Return the `SeedContrast` of the first training stage, in eval mode; its codebook and decoder are random."""
    saved = {key: value for key, value in state_dict.items() if not key.endswith(".position_ids")}
    shapes = {key: tuple(value.shape) for key, value in saved.items()}
    words, _ = _shape(shapes, "Qformer.bert.embeddings.word_embeddings.weight", 2)
    places, _ = _shape(shapes, "Qformer.bert.embeddings.position_embeddings.weight", 2)
    features, _ = _shape(shapes, "vision_proj.weight", 2)
    unused = {"codebook_size": 1, "token_size": 1, "decoder_depth": 1, "decoder_heads": 1, "embedding_size": 1}
    arguments = encoder_arguments(config, saved) | unused
    text = text_shapes(arguments, words, places, features)
    check_keys(encoder_shapes(arguments) | text, saved)
    own = {f"seed.{key}": value for key, value in our_weights(_without(saved, text), arguments["cross_every"]).items()}
    own |= {place_text(key): saved[key] for key in text}

    def factory() -> SeedContrast:
        return SeedContrast(Seed(**arguments), words, places, features)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        rest = factory().state_dict()
    return build(factory, {}, rest | own)


def our_weights(state_dict: StateDict, cross_every: int) -> dict[str, Tensor]:
    """Official tensors under our names."""
    flat = {key: value[0] if key in TABLES else value for key, value in state_dict.items()}
    for key in [key for key in flat if key.endswith(".attn.q_bias")]:
        flat[key.replace("q_bias", "k_bias")] = torch.zeros_like(flat[key])  # keys have none
    return renamed(flat, lambda key: place(key, cross_every))


def place(key: str, cross_every: int) -> tuple[str, int | None]:
    """Our parameter for an official key, and which part of its rows, where several official ones are one of ours."""
    if key in TABLES:
        return TABLES[key], None
    if key.startswith(TOWER):
        if match := re.fullmatch(r"visual_encoder\.blocks\.(\d+)\.attn\.([qkv])_bias", key):
            return f"vision.network.encoder.layers.{match[1]}.self_attn.qkv.bias", "qkv".index(match[2])
        return "vision.network." + _replaced(key.removeprefix(TOWER), TOWER_NAMES), None
    if match := re.fullmatch(r"(Qformer|Reverse_Qformer)\.bert\.(.+)", key):
        name, part = place_in_qformer(match[2], cross_every)
        return ("qformer." if match[1] == "Qformer" else "to_embedding.qformer.") + name, part
    if match := re.fullmatch(r"(blocks|blocks_image)\.(.+)", key):
        owner = "semantic_decoder" if match[1] == "blocks" else "image_blocks"
        return f"{owner}.blocks." + _replaced(match[2], BLOCK_NAMES), None
    return next((ours + key.removeprefix(theirs) for theirs, ours in PREFIXES if key.startswith(theirs)), key), None


def place_in_qformer(key: str, cross_every: int) -> tuple[str, int | None]:
    """`place` of a key below `bert.`."""
    if key.startswith("embeddings.LayerNorm."):
        return key.replace("embeddings.LayerNorm", "norm"), None
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        return key, None
    layer, module, kind = int(match[1]), match[2], match[3]
    if module.startswith("attention.self."):
        return f"layers.{layer}.attn.qkv.{kind}", PARTS.index(module.rpartition(".")[2])
    if module in ("crossattention.self.key", "crossattention.self.value"):
        return f"cross_kv.{kind}", 2 * (layer // cross_every) + module.endswith("value")
    return f"layers.{layer}.{LAYER_NAMES.get(module, module)}.{kind}", None


def place_text(key: str) -> str:
    """Our parameter, below `SeedContrast`, for an official key that only captions need."""
    if match := re.fullmatch(r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", key):
        return f"text.{match[1]}s.weight"
    if match := re.fullmatch(r"Qformer\.bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key):
        return f"text.mlps.{match[1]}.{TEXT_NAMES[match[2]]}.{match[3]}"
    return "temperature" if key == "temp" else key


# Sizes.


def seed_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Constructor arguments of `Seed` from what the weights' shapes and a case's config say."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    codes, channels = _shape(shapes, "quantize.embedding.weight", 2)
    embedding, _ = _shape(shapes, "distill_image_proj.weight", 2)
    depths = {name: _count(shapes, rf"{name}\.(\d+)\.") for name in ("blocks", "blocks_image")}
    if len(set(depths.values())) > 1:
        raise InvalidCheckpoint(f"both decoders have the same depth, not {' and '.join(map(str, depths.values()))}")
    arguments = encoder_arguments(config, state_dict) | {
        "codebook_size": codes, "token_size": channels, "decoder_depth": depths["blocks"],
        "decoder_heads": DECODER_HEADS, "embedding_size": embedding,
        "head": "qformer" if "reverse_tokens" in shapes else "mlp",
    }  # fmt: skip
    if arguments["head"] == "mlp":
        arguments["head_widths"] = tuple(_shape(shapes, f"image_down.{number}.weight", 2)[0] for number in (0, 2, 4))
    return arguments


def encoder_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Those of the vision tower and the Q-Former."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    arch = Fields(config.get("arch", {}), "arch")
    tower = Fields(arch.section.get("vit", {}), "arch.vit")
    vision_width, _, patch, _ = _shape(shapes, TOWER + "patch_embed.proj.weight", 4)
    _, places, _ = _shape(shapes, TOWER + "pos_embed", 3)
    hidden, _ = _shape(shapes, TOWER + "blocks.0.mlp.fc1.weight", 2)
    _, queries, width = _shape(shapes, "query_tokens", 3)
    qformer_hidden, _ = _shape(shapes, "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", 2)
    crossed = sorted(
        int(match[1])
        for key in shapes
        if (match := re.fullmatch(r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.self\.key\.weight", key))
    )
    depth = _count(shapes, r"Qformer\.bert\.encoder\.layer\.(\d+)\.")
    cross_every = crossed[1] if len(crossed) > 1 else depth
    if not depth or crossed != list(range(0, depth, max(cross_every, 1))):
        raise InvalidCheckpoint(f"layers {crossed} of {depth} look at the picture; it must be every n-th from 0 on")
    side = isqrt(places - 1)
    if side**2 != places - 1:
        raise InvalidCheckpoint(f"{TOWER}pos_embed has {places} places; a class token and a square are expected")
    return {
        "image_size": side * patch, "patch_size": patch, "vision_width": vision_width,
        "vision_depth": _count(shapes, r"visual_encoder\.blocks\.(\d+)\."),
        "vision_heads": tower.integer("heads", max(1, vision_width // VISION_HEAD_WIDTH)), "vision_hidden": hidden,
        "num_queries": queries, "causal": Fields(config, "config").flag("causal_queries", queries == CAUSAL_QUERIES),
        "qformer_width": width, "qformer_depth": depth, "qformer_hidden": qformer_hidden, "cross_every": cross_every,
        "qformer_heads": arch.integer("heads", max(1, width // QFORMER_HEAD_WIDTH)),
    }  # fmt: skip


def official_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every official parameter, and its shape, of a `Seed` with these constructor arguments."""
    given = dict(_defaults() | dict(arguments))
    width, channels, queries = given["qformer_width"], given["token_size"], given["num_queries"]
    embedding = given["embedding_size"]
    shapes = encoder_shapes(given) | {
        "pos_embed": (1, queries, width), "pos_embed_image": (1, queries, width),
        "quantize.embedding.weight": (given["codebook_size"], channels),
    }  # fmt: skip
    linears = {
        "encode_task_layer.0": (width, width), "encode_task_layer.2": (channels, width),
        "decode_task_layer.0": (channels, channels), "decode_task_layer.2": (width, channels),
    }  # fmt: skip
    norms: dict[str, int] = {}
    for stack in ("blocks", "blocks_image"):
        for number in range(given["decoder_depth"]):
            block = f"{stack}.{number}"
            norms |= {f"{block}.norm1": width, f"{block}.norm2": width}
            linears |= {
                f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width),
                f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width),
            }  # fmt: skip
    if given["head"] == "mlp":
        widths = (width, *given["head_widths"])
        shapes |= {f"image_down.{2 * number}.weight": (widths[number + 1], widths[number]) for number in range(3)}
        linears["distill_image_proj"] = (embedding, queries * widths[-1])
    else:
        shapes["reverse_tokens"] = (1, 1, width)
        shapes |= qformer_shapes("Reverse_Qformer.bert.", given, width)
        linears["distill_image_proj"] = (embedding, width)
    return shapes | _of_linears(linears) | _of_norms(norms)


def encoder_shapes(given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Those of the vision tower, its norm, the Q-Former and its queries."""
    width, vision, hidden = given["qformer_width"], given["vision_width"], given["vision_hidden"]
    patch = given["patch_size"]
    shapes = {
        "query_tokens": (1, given["num_queries"], width), TOWER + "cls_token": (1, 1, vision),
        TOWER + "pos_embed": (1, (given["image_size"] // patch) ** 2 + 1, vision),
        TOWER + "patch_embed.proj.weight": (vision, 3, patch, patch), TOWER + "patch_embed.proj.bias": (vision,),
    }  # fmt: skip
    linears, norms = {}, {"ln_vision": vision}
    for number in range(given["vision_depth"]):
        block = f"{TOWER}blocks.{number}"
        norms |= {f"{block}.norm1": vision, f"{block}.norm2": vision}
        shapes |= {f"{block}.attn.{bias}_bias": (vision,) for bias in "qv"}
        shapes[f"{block}.attn.qkv.weight"] = (3 * vision, vision)
        linears |= {
            f"{block}.attn.proj": (vision, vision), f"{block}.mlp.fc1": (hidden, vision),
            f"{block}.mlp.fc2": (vision, hidden),
        }  # fmt: skip
    return shapes | _of_linears(linears) | _of_norms(norms) | qformer_shapes("Qformer.bert.", given, vision)


def qformer_shapes(prefix: str, given: Mapping[str, Any], features: int) -> dict[str, tuple[int, ...]]:
    width, hidden = given["qformer_width"], given["qformer_hidden"]
    linears, norms = {}, {f"{prefix}embeddings.LayerNorm": width}
    for number in range(given["qformer_depth"]):
        layer = f"{prefix}encoder.layer.{number}"
        blocks = {"attention": width}
        if number % given["cross_every"] == 0:
            blocks["crossattention"] = features
        for block, inner in blocks.items():
            linears |= {f"{layer}.{block}.self.query": (width, width), f"{layer}.{block}.output.dense": (width, width)}
            linears |= {f"{layer}.{block}.self.{part}": (width, inner) for part in ("key", "value")}
            norms[f"{layer}.{block}.output.LayerNorm"] = width
        linears |= _feed_forward(layer, "_query", width, hidden)
        norms[f"{layer}.output_query.LayerNorm"] = width
    return _of_linears(linears) | _of_norms(norms)


def text_shapes(given: Mapping[str, Any], words: int, places: int, features: int) -> dict[str, tuple[int, ...]]:
    """Those of the first stage that only captions and their comparison need."""
    width, hidden = given["qformer_width"], given["qformer_hidden"]
    shapes = {
        "temp": (), "Qformer.bert.embeddings.word_embeddings.weight": (words, width),
        "Qformer.bert.embeddings.position_embeddings.weight": (places, width),
    }  # fmt: skip
    linears, norms = {"vision_proj": (features, width), "text_proj": (features, width)}, {}
    for number in range(given["qformer_depth"]):
        layer = f"Qformer.bert.encoder.layer.{number}"
        linears |= _feed_forward(layer, "", width, hidden)
        norms[f"{layer}.output.LayerNorm"] = width
    return shapes | _of_linears(linears) | _of_norms(norms)


def _feed_forward(layer: str, kind: str, width: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {f"{layer}.intermediate{kind}.dense": (hidden, width), f"{layer}.output{kind}.dense": (width, hidden)}


def _of_linears(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def _of_norms(norms: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}


def _defaults() -> dict[str, Any]:
    from inspect import signature

    return {name: item.default for name, item in signature(Seed.__init__).parameters.items()}


# Released files.


def is_release(path: Path) -> bool:
    """Whether a folder or file is the released tokenizer."""
    return (path / QUANTIZER_FILE).is_file() if path.is_dir() else path.name == QUANTIZER_FILE


def load_release(path: Path, name: str | None = None) -> Seed:
    """The tokenizer of a released folder or `seed_quantizer.pt`, with the vision tower that lies beside it.

    Raises:
        ModelNotFound: the tower is not there; the message tells which file, and where from.
        InvalidCheckpoint: missing keys or wrong shapes (listed).
    """
    folder = path if path.is_dir() else path.parent
    weights = inside(folder, QUANTIZER_FILE) if path.is_dir() else path
    state_dict = read_state_dict(weights)
    own = {key: value for key, value in state_dict.items() if not key.startswith(TOWER)}
    tower = {key: value for key, value in state_dict.items() if key.startswith(TOWER)} or read_tower(folder)
    saved = {key: value for key, value in (own | tower).items() if not key.endswith(".position_ids")}
    try:
        known = official_shapes(seed_arguments({}, saved))
        unused = [key for key in saved if key not in known]
        if unused:
            logger.info("%s: %d tensors are not needed (%s, ...)", weights, len(unused), shown(unused[0]))
        model = from_official({}, {key: value for key, value in saved.items() if key in known})
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{weights}: {error}") from None
    model.name = name or "seed-2"
    return model


def read_tower(folder: Path) -> dict[str, Tensor]:
    """The vision tower under the names it has within SEED's checkpoints, from a file beside them."""
    if (folder / TOWER_FILE).exists():
        tower = read_state_dict(inside(folder, TOWER_FILE))
        last = f"blocks.{TOWER_DEPTH}."  # EVA's last block, which BLIP-2 leaves out
        return {TOWER + key: value for key, value in tower.items() if not key.startswith(last)}
    below = folder / BLIP2_FOLDER
    for file in BLIP2_WEIGHTS:
        if (below / file).is_file():
            return tower_of_blip2(read_state_dict(inside(below, file)))
    raise ModelNotFound(
        f"{folder} lacks the vision tower, which {QUANTIZER_FILE} does not hold: put {TOWER_FILE} beside it (2 GB, from"
        f" {TOWER_URL}), or a BLIP-2 checkpoint such as Salesforce/blip2-itm-vit-g in {folder / BLIP2_FOLDER}"
    )


def tower_of_blip2(state_dict: StateDict) -> dict[str, Tensor]:
    """The tower of a BLIP-2 checkpoint of transformers under SEED's names."""
    tower: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not key.startswith("vision_model.") or ".post_layernorm." in key:  # SEED brings its own norm
            continue
        name = key.removeprefix("vision_model.")
        if name.endswith(".self_attn.qkv.bias"):
            block = name.removesuffix("self_attn.qkv.bias").replace("encoder.layers.", "blocks.")
            query, _, values = value.chunk(3)
            tower |= {f"{TOWER}{block}attn.q_bias": query, f"{TOWER}{block}attn.v_bias": values}
        else:
            tower[TOWER + _replaced(name, [(ours, theirs) for theirs, ours in TOWER_NAMES])] = value
    return tower


def _replaced(name: str, pairs) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _without(state_dict: StateDict, keys: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if key not in keys}


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, ndim: int) -> tuple[int, ...]:
    if len(shapes.get(key, ())) != ndim:
        raise InvalidCheckpoint(f"these are no weights of SEED: {key} is missing or has a wrong shape")
    return shapes[key]


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the largest number that the keys have at a place."""
    numbers = [int(match[1]) for key in shapes if (match := re.match(pattern, key)) and len(match[1]) < 5]
    return max(numbers, default=-1) + 1
