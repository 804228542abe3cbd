"""GenSE: the authors' N2S and S2S checkpoints to our `GenSE`, with the tokenizers that lie inside them.

N2S brings the speech encoder and the k-means centres, S2S the codec. S2S holds the encoder once more, and never uses
it. The authors' code is yaoxunji/gen-se; the names of the files stand in its `gense.yaml`.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint, ModelNotFound
from ..core.strict import build, check_keys
from ..core.weights import inside, read_config, read_state_dict
from ..generators.gense import FIRST_ID, GenSE
from . import semantic, simcodec
from .fields import Config, Fields, StateDict

CONFIG = "gense.yaml"
MODELS = ("n2s", "s2s")
MAX_DEPTH = 256
LM = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj"}
CAUSAL_MASKS = re.compile(
    r"(n2s|s2s)\.lm\.transformer\.h\.\d{1,3}\.attn\.(bias|masked_bias)"
)  # saved by older libraries
ENCODER = "xlsr."  # also when it is a WavLM
CODEC = "codec_tokenizer."


def from_official(config: Config, state_dict: StateDict) -> GenSE:
    """Return the `GenSE` of these official keys, in eval mode, with the tokenizers that are among them.

    Args:
        config: that of `gense.yaml`; the codec's as "codec" and the encoder's as "ssl" beside it, where there are any.
        state_dict: the keys of N2S's checkpoint behind "n2s.", those of S2S's behind "s2s.".

    Raises:
        InvalidCheckpoint: unknown or missing keys or wrong shapes (listed), or a config that does not fit them.
    """
    config = config.get("config", config)
    lms, encoder, codec = {}, {}, {}
    for key, value in state_dict.items():
        model, _, name = key.partition(".")
        if model in MODELS and name.startswith("lm."):
            lms[key] = value
        elif model in MODELS and name.startswith((ENCODER, semantic.CENTERS)):
            if model == "n2s":
                encoder[name.removeprefix(ENCODER)] = value
        elif model == "s2s" and name.startswith(CODEC):
            codec[name.removeprefix(CODEC)] = value
        else:
            raise InvalidCheckpoint(f"{key} is no key of GenSE")
    arguments = gense_arguments(config, lms)
    tokenizers: dict[str, Any] = {}
    if encoder:
        tokenizers["semantic"] = semantic.from_official(config.get("ssl") or {}, encoder)
        arguments["semantic_fingerprint"] = tokenizers["semantic"].fingerprint
    if codec:
        tokenizers["codec"] = simcodec.from_official(Fields(config.get("codec"), "codec").section, codec)
        arguments["codec_fingerprint"] = tokenizers["codec"].fingerprint
    weights = {f"{name}.{key}": value for name in MODELS for key, value in lm_weights(config, lms, name).items()}
    model = build(GenSE, arguments, weights)
    for name, tokenizer in tokenizers.items():
        tokenizer.name = f"gense-{name}"
    model.use_tokenizers(**tokenizers)
    return model


def gense_arguments(config: Config, lms: StateDict) -> dict[str, Any]:
    """Constructor arguments of `GenSE` from the config's section "model" and the shapes of the language models."""
    model = Fields(config.get("model"), "model")
    num_semantic = model.integer("semantic_num")
    n2s, s2s = model.integer("n2s_vocab_size"), model.integer("s2s_vocab_size")
    if n2s != FIRST_ID + num_semantic or s2s <= n2s:
        raise InvalidCheckpoint(
            f"vocabularies of {n2s} and {s2s} ids do not consist of {FIRST_ID} others, {num_semantic} semantic ids and "
            "acoustic ones"
        )
    sizes = {name: lm_arguments(config, lms, name) for name in MODELS}
    return {
        "num_semantic": num_semantic, "num_acoustic": s2s - n2s, "hidden_size": sizes["n2s"]["width"],
        "num_hidden_layers": sizes["n2s"]["depth"], "num_attention_heads": sizes["n2s"]["num_heads"],
        "n2s_positions": sizes["n2s"]["num_positions"], "s2s_positions": sizes["s2s"]["num_positions"],
    }  # fmt: skip


def lm_arguments(config: Config, lms: StateDict, name: str) -> dict[str, int]:
    """Constructor arguments of the `GPT2` that is "n2s" or "s2s"."""
    model, table = Fields(config.get("model"), "model"), f"{name}.lm.transformer.wpe.weight"
    if table not in lms or lms[table].ndim != 2:
        raise InvalidCheckpoint(f"these are no weights of GenSE: {table} is missing or has a wrong shape")
    return {
        "vocab_size": model.integer(f"{name}_vocab_size"), "num_positions": len(lms[table]),
        "width": model.integer("hidden_size"), "depth": model.integer("num_hidden_layers", limit=MAX_DEPTH),
        "num_heads": model.integer("num_attention_heads"),
    }  # fmt: skip


def lm_weights(config: Config, lms: StateDict, name: str) -> dict[str, Tensor]:
    """The weights of one language model under our names; GPT-2 has its products as [in, out], we as [out, in].

    Raises:
        InvalidCheckpoint: other keys or shapes, or a head that is not tied to the embedding.
    """
    saved = {key: value for key, value in lms.items() if key.startswith(f"{name}.") and not CAUSAL_MASKS.fullmatch(key)}
    check_keys(official_shapes(name, **lm_arguments(config, lms, name)), saved)
    embedding, head = f"{name}.lm.transformer.wte.weight", f"{name}.lm.lm_head.weight"
    if not torch.equal(saved.pop(head), saved[embedding]):
        raise InvalidCheckpoint(f"{head} differs from {embedding}, to which GenSE ties it")
    weights = {}
    for key, value in saved.items():
        ours = key.removeprefix(f"{name}.lm.transformer.")
        if match := re.fullmatch(r"h\.(\d{1,3})\.(.+)\.(weight|bias)", ours):
            block, module, kind = match.groups()
            ours = f"blocks.{block}.{LM.get(module, module)}.{kind}"
            value = value.T if module in LM and kind == "weight" else value
        weights[ours] = value
    return weights


def official_shapes(
    name: str, vocab_size: int, num_positions: int, width: int, depth: int, num_heads: int
) -> dict[str, tuple[int, ...]]:
    """Every key, and its shape, of "n2s" or "s2s" with these sizes."""
    at = f"{name}.lm.transformer"
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}.wte.weight": (vocab_size, width), f"{at}.wpe.weight": (num_positions, width),
        f"{name}.lm.lm_head.weight": (vocab_size, width),
    }  # fmt: skip
    norms = [f"{at}.ln_f", *(f"{at}.h.{i}.{norm}" for i in range(depth) for norm in ("ln_1", "ln_2"))]
    shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    products = {
        "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width),
    }  # fmt: skip
    for block in (f"{at}.h.{i}" for i in range(depth)):
        shapes |= {f"{block}.{product}.weight": shape for product, shape in products.items()}
        shapes |= {f"{block}.{product}.bias": shape[1:] for product, shape in products.items()}
    return shapes


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder with the authors' `gense.yaml`."""
    return (path / CONFIG).is_file()


def load_folder(folder: Path, name: str | None = None) -> GenSE:
    """Load the authors' files: `gense.yaml`, and beside it those that it names, whatever folder it says.

    name: of the model; that of the folder without.

    Raises:
        ModelNotFound: a file is missing.
        InvalidCheckpoint: files that are hostile, or that do not fit each other.
    """
    config = read_config(inside(folder, CONFIG))
    paths = Fields(config.get("path"), "path")
    files = {key: _named(folder, paths, key) for key in ("n2s_ckpt_path", "s2s_ckpt_path", "codec_config_path")}
    state_dict = {}
    for model in MODELS:
        weights = read_state_dict(files[f"{model}_ckpt_path"])
        state_dict |= {f"{model}.{key}": value for key, value in weights.items()}
    try:
        model = from_official(config | {"codec": read_config(files["codec_config_path"])}, state_dict)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{folder}: {error}") from None
    model.name = name or folder.resolve().name
    return model


def _named(folder: Path, paths: Fields, key: str) -> Path:
    value = paths.section.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidCheckpoint(f"{folder / CONFIG} lacks path.{key}")
    file = inside(folder, PurePosixPath(value).name)
    if not file.is_file():
        raise ModelNotFound(f"{folder / CONFIG} names {file.name}, which is missing beside it")
    return file
