"""Checkpoints that are whole or not there, and that nothing needs to unpickle.

A checkpoint is a folder `step_00001000` of safetensors and JSON. It is written under a temporary name, its manifest
last, and then renamed in one step; so a kill at any moment leaves the older checkpoints intact and at most a temporary
folder, which the next save removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import InvalidCheckpoint

MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step_(\d{8,})")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int) -> Path:
    """Write `tensors` (one safetensors file per entry) and `state` (JSON); keep only the newest `keep` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # what a kill left of an earlier save or deletion
        if path.name.startswith(".writing_") or (NAME.fullmatch(path.name) and not _is_whole(path)):
            shutil.rmtree(path)
    target = folder / f"step_{step:08d}"
    staged = folder / f".writing_{target.name}"
    staged.mkdir()
    for name, values in tensors.items():
        save_file({key: value.detach().contiguous() for key, value in values.items()}, staged / f"{name}.safetensors")
    (staged / STATE).write_text(json.dumps(state, indent=1))
    files = {path.name: path.stat().st_size for path in sorted(staged.iterdir())}
    for path in staged.iterdir():
        _flush(path)
    (staged / MANIFEST).write_text(json.dumps({"format": 1, "step": step, "files": files}, indent=1))
    _flush(staged / MANIFEST)
    _flush(staged)
    if target.exists():  # a resumed run reaches the same step again
        shutil.rmtree(target)
    os.replace(staged, target)
    _flush(folder)
    for old in whole_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if _is_whole(path)]


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors and the state that `save_checkpoint` wrote.

    Raises:
        InvalidCheckpoint: incomplete or unreadable.
    """
    if not _is_whole(path):
        raise InvalidCheckpoint(f"{path} is not a complete checkpoint (its manifest and its files disagree)")
    try:
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return tensors, json.loads((path / STATE).read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state under "PARAMETER/ENTRY" names."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{names[parameter]}/{entry}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave."""
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        on_device = value if entry == "step" and not parameter.is_cuda else value.to(parameter.device)
        optimizer.state[parameter][entry] = on_device


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _flush(path: Path) -> None:
    """Have the file or folder on the disk before the rename says that it is complete."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
