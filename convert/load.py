"""Finding the config and the weights in what the authors released: hub folders, training outputs and single files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import InvalidCheckpoint, ModelNotFound, nearest_names
from ..core.registry import ENTRIES, ModelEntry, constructor_arguments, find_entry, model_class
from ..core.strict import build
from ..core.weights import WEIGHT_SUFFIXES, inside, read_config, read_state_dict
from . import (
    flexar,
    flextok_release,
    gense,
    kl16_vae,
    maskgit,
    one_d_piece,
    paraformer,
    seed,
    seed_llama,
    semantic,
    simcodec,
    titok,
    tokenflow,
    tokenflow_t2i,
    xar,
)

CONFIG_NAMES = ("config.json", "config.yaml", "config.yml")
# Where releases keep their weights, best first: hub folders, training outputs (the EMA is what was released).
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "ema_model/model.safetensors",
    "ema_model/pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SYSTEMS = {
    "titok": titok.from_official,
    "one_d_piece": one_d_piece.from_official,
    "maskgit_vqgan": titok.vqgan_from_official,
    "maskgit": maskgit.from_official,
    "xar": xar.from_official,
    "kl16_vae": kl16_vae.from_official,
    "simcodec": simcodec.from_official,
    "semantic": semantic.from_official,
    "gense": gense.from_official,
    "paraformer": paraformer.from_official,
    "flextok": flexar.of_family,
    "seed": seed.from_official,
    "seed_llama": seed_llama.from_official,
    "tokenflow": tokenflow.from_official,
}


def from_official(system: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Build our module from an official config and official keys.

    Args:
        system: "titok" (TiTok, TA-TiTok, and their VQGAN and quantizer), "one_d_piece", "maskgit_vqgan", "maskgit"
            (the generators of both), "xar", or "kl16_vae" (a plain diffusers.AutoencoderKL).
        config: the authors' config as plain data, or a parity case's config.json that holds it.
        state_dict: tensors by official key; they are copied as fp32.

    Raises:
        InvalidCheckpoint: a config that cannot be, or unknown or missing keys or wrong shapes (listed).
    """
    if system not in SYSTEMS:
        raise InvalidCheckpoint(
            f"unknown system {system!r}.{nearest_names(system, SYSTEMS)} Known: {', '.join(SYSTEMS)}"
        )
    if not state_dict:
        raise InvalidCheckpoint("the state dict is empty")
    return SYSTEMS[system](config, state_dict)


def is_official_folder(path: str | Path) -> bool:
    """True for a folder (or released file) that `load_official` is for: an official config, or a name that tells.

    Raises InvalidCheckpoint when the folder's config is malformed or names code.
    """
    path = Path(path)
    if flextok_release.is_release(path):  # before those who read config.json, which names the authors' classes
        return True
    if not path.is_dir():
        is_known = simcodec.is_release(path) or seed.is_release(path)
        return path.is_file() and (_entry_of_file(path.name) is not None or is_known)
    if simcodec.is_release(path) or gense.is_folder(path) or seed.is_release(path) or seed_llama.is_release(path):
        return True
    if tokenflow_t2i.is_folder(path):
        return True
    config = _find_config(path)
    if config is not None:
        is_ours = paraformer.is_release(config) or config.get("model_type") in semantic.MODEL_TYPES
        return is_ours or isinstance(config.get("model"), Mapping)
    return any(_entry_of_file(file.name) for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)


def load_official(path: str | Path, name: str | None = None) -> nn.Module:
    """Load a checkpoint in a layout that the authors release or train to.

    Args:
        path: a folder with config.json or config.yaml and weights (`model.safetensors`, shards with an index,
            `ema_model/pytorch_model.bin`, or one `.bin`), or a single weight file, whose name tells the model
            ("tokenizer_titok_b64.bin", "titok_bl64_vae_c16.bin", "maskgit-vqgan-imagenet-f16-256.bin").
        name: a name of `mediatok.models()`, for a file or folder that does not tell by itself.

    Raises:
        ModelNotFound: there is nothing to load, or no telling what it is.
        InvalidCheckpoint: weights or a config that are hostile, or that do not fit each other.
    """
    path = Path(path)
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    entry = find_entry(name) if name else None
    if name and entry is None:
        raise ModelNotFound(f"unknown model {name!r}.{nearest_names(name, ENTRIES)}")
    if flextok_release.is_release(path):
        return flextok_release.load_release(path, name)
    if gense.is_folder(path):  # with the codec's config.json in it
        return gense.load_folder(path, name)
    if tokenflow_t2i.is_folder(path):  # a LLaVA's config.json
        return tokenflow_t2i.load_folder(path, _find_weights(path, None))
    if simcodec.is_release(path):
        return simcodec.load_release(path, name)
    if seed.is_release(path):
        return seed.load_release(path, name)
    if seed_llama.is_release(path):
        return seed_llama.load_release(path, entry)
    config = _find_config(path) if path.is_dir() else None
    if paraformer.is_release(config):
        return paraformer.load_folder(path, config, name)
    weights = _find_weights(path, config) if path.is_dir() else path
    entry = entry or _entry_of_file(weights.name)
    state_dict = read_state_dict(weights)
    entry = entry or _entry_of_weights(state_dict)
    if config is None and entry is None:
        raise ModelNotFound(
            f"{weights} does not say what it is: put its config.json or config.yaml beside it, or keep the released "
            "file name (such as tokenizer_titok_b64.bin)"
        )
    try:
        if config is not None:
            model = from_official(_system_of(config, state_dict), config, state_dict)
        else:
            model = of_entry(entry, state_dict)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{weights}: {error}") from None
    model.name = entry.name if entry else path.stem
    return model


def _system_of(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> str:
    if config.get("model_type") in semantic.MODEL_TYPES:
        return "semantic"
    if any(key.endswith("lm_head.weight") for key in state_dict):
        return "maskgit"
    model = config.get("model")
    if isinstance(model, Mapping) and model.get("type") == "one_d_piece":
        return "one_d_piece"
    return "titok"


def of_entry(entry: ModelEntry, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The model of a release without a config."""
    if entry.class_name == "XAR":
        return xar.from_official({}, state_dict)
    if entry.class_name == "KLAutoencoder":
        return kl16_vae.tokenizer_from_official({}, state_dict)
    if entry.class_name == "SimCodec":
        return simcodec.from_arguments(constructor_arguments(entry), state_dict)
    if entry.class_name == "SemanticTokenizer":
        return semantic.from_official({}, state_dict)
    if entry.class_name == "MaskGIT":
        return maskgit.from_arguments(constructor_arguments(entry), state_dict)
    if entry.class_name == "TokenFlow":
        return tokenflow.of_release(entry.name, state_dict)
    return build(model_class(entry.class_name), constructor_arguments(entry), state_dict)


def _entry_of_weights(state_dict: Mapping[str, Tensor]) -> ModelEntry | None:
    """The release that the weights themselves tell."""
    if "quant_conv.weight" in state_dict and "encoder.down.0.block.0.norm1.weight" in state_dict:
        return find_entry("kl16")
    if "z_proj_ln.weight" in state_dict and "class_emb.weight" in state_dict:
        width = state_dict["class_emb.weight"].shape[-1]
        return next((e for name, e in ENTRIES.items() if xar.WIDTHS.get(name) == width), None)
    if "quantize.embedding_vqkd.weight" in state_dict:
        return find_entry("tokenflow-xl" if tokenflow.is_siglip(state_dict) else "tokenflow-b")
    if "post_extract_proj.weight" in state_dict:
        is_wavlm = any(key.endswith(".grep_a") for key in state_dict)
        return find_entry("semantic-wavlm-large" if is_wavlm else "semantic-xls-r-300m")
    return None


def _find_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config; of several, the one that describes a tokenizer."""
    files = [file for file in CONFIG_NAMES if (folder / file).exists() or (folder / file).is_symlink()]
    configs = {file: read_config(inside(folder, file)) for file in files}
    official = {file: config for file, config in configs.items() if isinstance(config.get("model"), Mapping)}
    if len(official) > 1:
        raise InvalidCheckpoint(f"{folder} has {' and '.join(official)}; keep the one that belongs to the weights")
    return next(iter((official or configs).values()), None)


def _find_weights(folder: Path, config: Mapping[str, Any] | None) -> Path:
    for known in WEIGHT_NAMES:
        directory, _, file = known.rpartition("/")
        parent = inside(folder, directory) if directory else folder
        path = inside(parent, file)
        if path.exists():
            return path
    experiment = config.get("experiment") if config else None
    named = experiment.get("tokenizer_checkpoint") if isinstance(experiment, Mapping) else None
    if isinstance(named, str) and Path(named).name == named and (folder / named).is_file():
        return inside(folder, named)
    files = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if not files:
        raise ModelNotFound(f"{folder} holds no weights ({', '.join(WEIGHT_NAMES)} or one *.bin)")
    if len(files) > 1:
        raise InvalidCheckpoint(f"{folder} holds several weight files ({', '.join(files[:5])}); name one of them")
    return inside(folder, files[0])


def _entry_of_file(file_name: str) -> ModelEntry | None:
    """The released model that a file name tells: tokenizer_titok_b64.bin, titok_bl64_vae_c16.bin, ..."""
    if entry := next((e for e in ENTRIES.values() if e.hub_file == file_name), None):
        return entry
    stem = re.sub(r"\.(bin|pt|pth|ckpt|safetensors)$", "", file_name.lower()).replace("_", "-")
    stem = stem.removeprefix("tokenizer-").removesuffix("-imagenet").removesuffix("-imagenet-f16-256")
    entry = find_entry(re.sub("^generator-", "maskgit-", stem))
    return None if entry is None or entry.is_shipped else entry
