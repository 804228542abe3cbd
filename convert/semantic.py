"""Speech encoders to our `SemanticTokenizer`: WavLM and Wav2Vec2/XLS-R in the layout of their authors (fairseq's, also
inside GenSE's checkpoints) or of `transformers`, with k-means centres as `km.emb.weight` where there are some.

Sizes are measured; a config only says what shapes do not tell: strides, heads and WavLM's largest distance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint
from ..core.strict import build
from ..tokenizers.speech.semantic import SemanticTokenizer
from .fields import Config, Fields, StateDict

LAYER = 6  # GenSE's
CENTERS = "km.emb.weight"
HEAD_WIDTH = 64  # of the released encoders
STRIDES = (5, 2, 2, 2, 2, 2, 2)
MAX_DISTANCE = 800
MAX_CONVOLUTIONS = 16
MODEL_TYPES = ("wavlm", "wav2vec2")  # in a config of `transformers`

# fairseq -> transformers, as prefixes in this order
NAMES = (
    (r"feature_extractor\.conv_layers\.(\d{1,2})\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d{1,2})\.2\.1\.", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"layer_norm\.", "feature_projection.layer_norm."),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"(encoder\.layers\.\d{1,3})\.self_attn\.([qkv]|out)_proj\.", r"\1.attention.\2_proj."),
    (r"(encoder\.layers\.\d{1,3})\.self_attn\.grep_linear\.", r"\1.attention.gru_rel_pos_linear."),
    (r"(encoder\.layers\.\d{1,3})\.self_attn\.grep_a$", r"\1.attention.gru_rel_pos_const"),
    (r"(encoder\.layers\.\d{1,3})\.self_attn\.relative_attention_bias\.", r"\1.attention.rel_attn_embed."),
    (r"(encoder\.layers\.\d{1,3})\.self_attn_layer_norm\.", r"\1.layer_norm."),
    (r"(encoder\.layers\.\d{1,3})\.fc1\.", r"\1.feed_forward.intermediate_dense."),
    (r"(encoder\.layers\.\d{1,3})\.fc2\.", r"\1.feed_forward.output_dense."),
)
# What only pre-training needs, and the norm behind the last layer.
UNUSED = re.compile(
    r"(mask_emb|masked_spec_embed)$|(quantizer|project_q|project_hid|final_proj)\.|encoder\.layer_norm\."
)
POSITION = "encoder.pos_conv_embed.conv."
MAGNITUDE = (f"{POSITION}weight_g", f"{POSITION}parametrizations.weight.original0")
DIRECTION = (f"{POSITION}weight_v", f"{POSITION}parametrizations.weight.original1")


def from_official(config: Config, state_dict: StateDict, layer: int = LAYER) -> SemanticTokenizer:
    """The tokenizer of the first `layer` layers of an encoder, in eval mode; without centres it has no clusters yet.

    `config` is the authors' or that of `transformers`; it may be empty for the released sizes.

    Raises:
        InvalidCheckpoint: keys or shapes of no such encoder, and configs that do not fit them.
    """
    weights = dict(state_dict)
    centers = weights.pop(CENTERS, None)
    weights = {name: value for key, value in weights.items() if (name := place(key)) is not None}
    fold_weight_norm(weights)
    arguments = semantic_arguments(config, weights) | {"layer": layer, "num_clusters": 0}
    weights = {key: value for key, value in weights.items() if _number(key, "encoder.layers") < layer}
    ours = {f"encoder.{key}": value for key, value in weights.items()}
    if centers is None:
        centers = torch.empty(0, arguments["hidden_size"])
    if centers.ndim != 2:
        raise InvalidCheckpoint(f"{CENTERS} must be [clusters, width], not {list(centers.shape)}")
    arguments["num_clusters"] = len(centers)
    return build(SemanticTokenizer, arguments, ours | {"quantize.embedding.weight": centers})


def place(key: str) -> str | None:
    """The name of an official key in `transformers`; None for what is of no use. Other names stay as they are."""
    key = re.sub(r"^(wav2vec2|wavlm)\.", "", key)
    if UNUSED.match(key):
        return None
    for pattern, name in NAMES:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    return key


def fold_weight_norm(weights: dict[str, Tensor]) -> None:
    """Put the plain weight g v / |v| of the position convolution, of each kernel place, where g and v were."""
    magnitude = next((weights.pop(key) for key in MAGNITUDE if key in weights), None)
    direction = next((weights.pop(key) for key in DIRECTION if key in weights), None)
    if magnitude is not None and direction is not None:
        norm = torch.linalg.vector_norm(direction.float(), dim=(0, 1), keepdim=True)
        weights[f"{POSITION}weight"] = magnitude.float() * (direction.float() / norm)


def semantic_arguments(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments but for `layer` and `num_clusters`, from `transformers` names and what `config` adds."""
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    count = 1 + max((_number(key, "feature_extractor.conv_layers") for key in shapes), default=-1)
    if not 1 <= count <= MAX_CONVOLUTIONS:
        raise InvalidCheckpoint("these are no weights of a WavLM or Wav2Vec2: feature_extractor.conv_layers is missing")
    convs = [_shape(shapes, f"feature_extractor.conv_layers.{i}.conv.weight", 3) for i in range(count)]
    if count > 1 and "feature_extractor.conv_layers.1.layer_norm.weight" not in shapes:
        raise InvalidCheckpoint(
            "only encoders with a norm behind every convolution (the large ones) are read; this one has none"
        )
    width, channels, kernel = _shape(shapes, f"{POSITION}weight", 3)
    intermediate, _ = _shape(shapes, "encoder.layers.0.feed_forward.intermediate_dense.weight", 2)
    given = Fields(config, "the encoder's config")
    gate = shapes.get("encoder.layers.0.attention.gru_rel_pos_const")
    heads = _first(given, ("encoder_attention_heads", "num_attention_heads"))
    if gate is not None and len(gate) == 4:
        heads = gate[1]
    buckets = shapes.get("encoder.layers.0.attention.rel_attn_embed.weight", (320, 0))[0]
    for flag in ("layer_norm_first", "do_stable_layer_norm"):
        if not given.flag(flag, default=True):
            raise InvalidCheckpoint(f"only encoders that normalise before each layer are read, and {flag} is false")
    return {
        "architecture": "wav2vec2" if gate is None else "wavlm", "hidden_size": width,
        "num_attention_heads": heads or max(1, width // HEAD_WIDTH), "intermediate_size": intermediate,
        "conv_dim": tuple(shape[0] for shape in convs), "conv_kernel": tuple(shape[2] for shape in convs),
        "conv_stride": conv_strides(given), "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in shapes,
        "pos_conv_kernel": kernel, "pos_conv_groups": max(1, width // max(1, channels)), "num_buckets": buckets,
        "max_distance": _first(given, ("max_distance", "max_bucket_distance")) or MAX_DISTANCE,
    }  # fmt: skip


def conv_strides(config: Fields) -> tuple[int, ...]:
    """Of a list, or of fairseq's text "[(512,10,5)] + [(512,3,2)] * 4 + ...", which is read and not evaluated."""
    text = config.section.get("conv_feature_layers")
    if text is None:
        return config.integers("conv_stride", STRIDES)
    term = r"\s*\[\s*\(\s*\d+\s*,\s*\d+\s*,\s*(\d+)\s*\)\s*\]\s*(?:\*\s*(\d+)\s*)?"
    if not isinstance(text, str) or len(text) > 1000 or not re.fullmatch(rf"{term}(?:\+{term})*", text):
        raise InvalidCheckpoint(
            f"conv_feature_layers must look like '[(512,10,5)] + [(512,3,2)] * 4', not {text!r:.80}"
        )
    strides = [int(stride) for stride, times in re.findall(term, text) for _ in range(min(int(times or 1), 17))]
    return Fields({"conv_stride": strides}, "the encoder's config").integers("conv_stride")


def _first(config: Fields, names: tuple[str, ...]) -> int | None:
    return next((config.integer(name) for name in names if name in config), None)


def _number(key: str, prefix: str) -> int:
    """The number behind `prefix` in a key; -1 for other keys."""
    match = re.match(rf"{re.escape(prefix)}\.(\d{{1,3}})\.", key)
    return int(match[1]) if match else -1


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, ndim: int) -> tuple[int, ...]:
    if len(shapes.get(key, ())) != ndim:
        raise InvalidCheckpoint(f"these are no weights of a WavLM or Wav2Vec2: {key} is missing or has a wrong shape")
    return shapes[key]
