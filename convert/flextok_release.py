"""What FlexTok's authors released: a safetensors file with its config beside it or in its header.

FlexTok's config is a config.json; FlexAR's, the generators of the same people, is a config.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..core.errors import InvalidCheckpoint, ModelNotFound
from ..core.registry import find_entry
from ..core.weights import inside, read_config, read_state_dict
from . import flexar, flextok

WEIGHTS = "model.safetensors"
CONFIGS = ("config.json", "config.yaml", "config.yml")
FLEXTOK_KEY = "encoder.module_dict.enc_register_module.registers"


def is_release(path: Path) -> bool:
    """True for a folder or a file with the authors' weights, whatever its config says. Never raises."""
    file = path / WEIGHTS if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            keys = opened.keys()
            return FLEXTOK_KEY in keys or any(key.startswith(flexar.PREFIX) for key in keys)
    except (SafetensorError, OSError, ValueError):
        return False


def load_release(path: Path, name: str | None = None) -> nn.Module:
    """The `FlexTok` or `NextToken` of a folder or file; `name`: of `mediatok.models()`, if it is known.

    Raises:
        ModelNotFound: a FlexTok without a config.
        InvalidCheckpoint: a config or weights that are hostile, or that do not fit each other.
    """
    file = inside(path, WEIGHTS) if path.is_dir() else path
    state_dict = read_state_dict(file)
    is_generator = flexar.is_weights(state_dict)
    config = _config(path, file, is_generator)
    if config is None and not is_generator:
        raise ModelNotFound(
            f"{file} has no config: put the config.json of its repository beside it (time and latents cannot be "
            "scaled without it)"
        )
    try:
        model = flexar.of_family(config or {}, state_dict)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{file}: {error}") from None
    entry = find_entry(name) if name else None
    model.name = entry.name if entry else path.stem
    return model


def _config(path: Path, file: Path, is_generator: bool) -> dict[str, Any] | None:
    """The config beside the weights, or that in their header."""
    if path.is_dir():
        is_known_name = flexar.is_known_name if is_generator else flextok.is_known_name
        for name in CONFIGS:
            if (path / name).exists() or (path / name).is_symlink():
                config = read_config(inside(path, name), is_known_name)
                if is_generator or flextok.is_config(config):
                    return config
    return None if is_generator else flextok.header_config(file)
