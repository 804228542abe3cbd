"""A recorded case: the official code's config, weights, inputs and outputs in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import InvalidCheckpoint, InvalidInput
from ...core.weights import read_config, read_state_dict
from ..flextok import is_known_name


@dataclass(frozen=True)
class Case:
    """`config.json` and `io.safetensors` of one case folder; weights are read when asked for."""

    folder: Path
    system: str
    kind: str
    config: dict[str, Any]
    io: dict[str, Tensor]

    def weights(self, file: str = "weights.safetensors") -> dict[str, Tensor]:
        """Return the tensors of `file` in the official key layout."""
        return read_state_dict(self.folder / file)

    def setting(self, *path: str, default: Any = None) -> Any:
        """Return the config value at `path`; without it, `default`, or InvalidInput where `default` is None."""
        value: Any = self.config
        for key in path:
            if not isinstance(value, dict) or key not in value:
                if default is None:
                    raise InvalidInput(f"{self.folder / 'config.json'} has no '{'.'.join(path)}'")
                return default
            value = value[key]
        return value


def read_case(folder: str | Path) -> Case:
    """Read a case folder. The system is config.json's "system" or else the name of the folder above."""
    folder = Path(folder)
    for file in ("config.json", "io.safetensors"):
        if not (folder / file).is_file():
            raise InvalidInput(f"{folder} is not a parity case: it has no {file}")
    try:
        config = read_config(folder / "config.json", is_known_name)
        io = read_state_dict(folder / "io.safetensors", numbers_only=False)
    except InvalidCheckpoint as error:
        raise InvalidInput(f"{folder} is not a readable parity case: {error}") from None
    system = config.get("system", folder.resolve().parent.name)
    kind = config.get("kind")
    if not isinstance(system, str) or not isinstance(kind, str):
        raise InvalidInput(f'{folder / "config.json"} must name its "kind" (and "system") as text')
    return Case(folder, system, kind, config, io)


def find_cases(folder: str | Path) -> list[Path]:
    """Return `folder` itself when it is a case, else the cases directly below it, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder")
    if (folder / "config.json").exists():
        return [folder]
    below = sorted(path.parent for path in folder.glob("*/config.json"))
    if not below:
        raise InvalidInput(f"{folder} holds no parity case (a folder with config.json and io.safetensors)")
    return below
