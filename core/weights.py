"""Reading released checkpoints and configs as data: nothing named in a file is imported, called or fetched.

Weights: `.safetensors`, `.bin`/`.pt`/`.pth` through torch's weights-only unpickler, or an index of shards beside it.
Configs: JSON or YAML of plain values. Whatever else is found raises InvalidCheckpoint with the offending name.
"""

from __future__ import annotations

import argparse
import json
import re
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from .errors import InvalidCheckpoint, ModelNotFound

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pb")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
MAX_CONFIG_BYTES = 256 * 1024
MAX_INDEX_BYTES = 16 * 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024 * 1024  # the largest released checkpoint needs about 0.1 MB
MAX_CONFIG_DEPTH = 32
# Where training scripts put the weights, best first.
NESTED = ("model_ema", "ema", "model", "state_dict", "model_state_dict", "model_state")
NUMBER_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)

# Keys by which loaders of other libraries build what a file names (hydra, jsonargparse, transformers, diffusers,
# pickle-in-JSON), and those that pick an attention backend, which may be fetched from a hub.
CODE_KEY = re.compile(
    r"_(target|partial|recursive|convert|args|call)_|__\w+__|\$?class_path|init_args|auto_map|trust_remote_code|custom_pipelines?"
    r"|custom_generate|py/\w+|_*(attn|attention|experts)_(implementation|backend|processor)\w*|kernels?_(repo|config)\w*"
)


def read_state_dict(path: str | Path, *, numbers_only: bool = True) -> dict[str, Tensor]:
    """Read a flat dict of CPU tensors from a weight file or from the index (`*.index.json`) of its shards.

    `numbers_only` refuses dtypes that no parameter has (uint8, bool, complex, float8).
    Raises ModelNotFound when the file is not there, InvalidCheckpoint when it is not a plain dict of plain tensors.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        tensors = _read_shards(path)
    else:
        tensors = _read_weight_file(path)
    if not tensors:
        raise InvalidCheckpoint(f"{path} holds no tensors")
    for key, tensor in tensors.items():
        if numbers_only and tensor.dtype not in NUMBER_DTYPES:
            raise InvalidCheckpoint(f"{path}: {key!r} is of type {tensor.dtype}; weights are float or integer")
    return tensors


def _read_weight_file(path: Path) -> dict[str, Tensor]:
    _regular_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    # Some releases name their files without an ending.
    if path.suffix in PICKLE_SUFFIXES or (not path.suffix and zipfile.is_zipfile(path)):
        return _read_pickle(path)
    raise InvalidCheckpoint(f"{path} is no weight file; known endings are {', '.join(WEIGHT_SUFFIXES)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(MAX_HEADER_BYTES, max(0, size - 8)):
        raise InvalidCheckpoint(f"{path}: the header claims {header_bytes:,} bytes in a file of {size:,}")
    try:  # the library checks the header, that offsets neither overlap nor leave gaps, and shapes against sizes
        return load_file(path)
    except Exception as error:  # SafetensorError, and ValueError or KeyError for dtypes that torch lacks
        raise InvalidCheckpoint(f"{path} is not a valid safetensors file: {_first_line(error)}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    is_zip = zipfile.is_zipfile(path)  # all since torch 1.6
    if is_zip:  # torch.save stores its entries as they are: a compressed one is a bomb
        with zipfile.ZipFile(path) as archive:
            packed = next((info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED), None)
        if packed:
            raise InvalidCheckpoint(f"{path}: entry {packed.filename!r} is compressed, which torch.save never does")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Training scripts save their arguments beside the weights; a Namespace only holds values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever a hostile pickle makes torch raise; nothing of it has run
        # Torch's own message is left out: it advises loading the file unsafely.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names code ('{code[1]}')" if code else f"torch's safe loader stops with {type(error).__name__}"
        raise InvalidCheckpoint(f"{path} is not a plain checkpoint of tensors: {reason}. It was not run.") from None
    if not isinstance(loaded, dict):
        raise InvalidCheckpoint(f"{path} holds a {type(loaded).__name__}, not a dict of tensors")
    loaded = next((loaded[key] for key in NESTED if isinstance(loaded.get(key), dict)), loaded)
    if len(loaded) > 1 and all(isinstance(part, dict) for part in loaded.values()):  # one for each part of a model
        loaded = {f"{part}.{key}": value for part, values in loaded.items() for key, value in values.items()}
    return {_tensor_name(path, key): _plain_tensor(path, key, value) for key, value in loaded.items()}


def _tensor_name(path: Path, key: Any) -> str:
    if not isinstance(key, str):
        raise InvalidCheckpoint(f"{path}: key {str(key)[:60]!r} is not text")
    return key


def _plain_tensor(path: Path, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidCheckpoint(f"{path}: {key!r} is a {type(value).__name__}; a flat dict of tensors is read")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise InvalidCheckpoint(f"{path}: {key!r} is not a plain dense tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InvalidCheckpoint(f"{path}: {key!r} claims shape {tuple(value.shape)} over less data than that")
    return value.detach()


def _read_shards(index_path: Path) -> dict[str, Tensor]:
    index = read_json(index_path, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InvalidCheckpoint(f"{index_path} has no 'weight_map' from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        shard = inside(index_path.parent, file)
        if not shard.is_file():
            raise InvalidCheckpoint(f"{index_path} names the shard {file!r}, which is missing")
        shard_tensors = _read_weight_file(shard)
        promised = {key for key, value in weight_map.items() if value == file}
        if differing := sorted(promised ^ shard_tensors.keys()):
            raise InvalidCheckpoint(f"{shard} and {index_path.name} disagree about {differing[0]!r}")
        tensors |= shard_tensors
    return tensors


def inside(folder: Path, name: str) -> Path:
    """Return `folder/name` for a plain file name that stays in `folder`; a link out of it is refused.

    The hub's own cache is the exception: its snapshot folders link to the `blobs` folder of the same repository.
    """
    if not name or name != Path(name).name or "\\" in name or "\0" in name or name in (".", ".."):
        raise InvalidCheckpoint(f"{folder} names the file {name!r}; only plain file names are read")
    path, root = folder / name, folder.resolve()
    target = path.resolve()
    cached = any(above.name == "snapshots" and target.parent == above.parent / "blobs" for above in root.parents)
    if target.parent != root and not cached:
        raise InvalidCheckpoint(f"{path} is a link that leaves its folder")
    return path


def read_config(path: str | Path, names: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """Read a JSON or YAML config as plain data: a dict of dicts, lists, text, numbers, booleans and None.

    names: says of which known names of classes `_target_` may stand in it, as text: some authors' configs name theirs.

    Raises ModelNotFound when it is not there; InvalidCheckpoint when it is malformed, has duplicate keys, YAML
    aliases or tags, or a key by which other libraries import code (`_target_`, `class_path`, `auto_map`, ...).
    """
    path = Path(path)
    if path.suffix == ".json":
        config = read_json(path, MAX_CONFIG_BYTES)
    elif path.suffix in (".yaml", ".yml"):
        config = _read_yaml(path)
    else:
        raise InvalidCheckpoint(f"{path} is no config; known endings are .json, .yaml and .yml")
    check_plain(config, str(path), names=names)
    return config


def check_plain(
    value: Any, source: str, at: str = "", depth: int = 0, names: Callable[[str], bool] | None = None
) -> None:
    """Raise InvalidCheckpoint unless `value` is plain data whose keys name no code; `at` is the key path so far.

    names: see `read_config`.
    """
    if depth > MAX_CONFIG_DEPTH:
        raise InvalidCheckpoint(f"{source} is nested deeper than {MAX_CONFIG_DEPTH} levels")
    if isinstance(value, dict):
        for key, child in value.items():
            where = f"{at}.{key}" if at else str(key)
            if not isinstance(key, str):
                raise InvalidCheckpoint(f"{source}: key {where!r} is not text")
            if CODE_KEY.fullmatch(key) and not _is_known_name(key, child, names):
                named = f" ({child[:80]!r})" if names is not None and isinstance(child, str) else ""
                raise InvalidCheckpoint(
                    f"{source}: {where!r} names code to import{named}; configs are read as data only"
                )
            check_plain(child, source, where, depth + 1, names)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            check_plain(child, source, f"{at}[{i}]", depth + 1, names)
    elif not isinstance(value, str | int | float | bool | None):
        raise InvalidCheckpoint(f"{source}: {at!r} is a {type(value).__name__}, not a plain value")


def _is_known_name(key: str, value: Any, names: Callable[[str], bool] | None) -> bool:
    if names is None:
        return False
    if key == "_partial_":  # "not to be called yet"
        return isinstance(value, bool)
    return key == "_target_" and isinstance(value, str) and names(value)


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """Read a JSON object of at most `limit_bytes`; duplicate keys, NaN and what else is not JSON are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise InvalidCheckpoint(f"{path}: the key {twice!r} occurs twice")
        return keys

    def constant(word: str) -> None:
        raise InvalidCheckpoint(f"{path}: {word} is not a JSON number")

    try:
        data = json.loads(_read_text(path, limit_bytes), object_pairs_hook=unique, parse_constant=constant)
    except InvalidCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not valid JSON: {_first_line(error)}") from None
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path} is not a JSON object")
    return data


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases (which can expand without bound), explicit tags, merges and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{event.anchor} in line {event.start_mark.line + 1} (aliases are refused)")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tag {event.tag} in line {event.start_mark.line + 1} (tags are refused)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.YAMLError(f"the key {twice!r} occurs twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(_read_text(path, MAX_CONFIG_BYTES), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not a plain YAML config: {_first_line(error)}") from None
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path} is not a YAML mapping")
    return data


def _read_text(path: Path, limit_bytes: int) -> str:
    size = _regular_file(path)
    if size > limit_bytes:
        raise InvalidCheckpoint(f"{path} has {size:,} bytes; at most {limit_bytes:,} are read")
    return path.read_bytes()[:limit_bytes].decode("utf-8")


def _regular_file(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ModelNotFound(f"{str(path)!r} is not a file name") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidCheckpoint(f"{path} is not a regular file")
    return status.st_size


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
