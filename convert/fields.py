"""What the conversions share: typed reading of the authors' configs, and renaming the authors' weights.

A wrong value of a config is named, instead of failing somewhere inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint

Config = Mapping[str, Any]
StateDict = Mapping[str, Tensor]

MAX_SIZE = 2**20  # of any number in a config: beyond all released sizes, below what would hang a constructor


class Fields:
    """One section of a config; `where` is its name in messages."""

    def __init__(self, section: Any, where: str):
        if not isinstance(section, Mapping):
            raise InvalidCheckpoint(f"the config has no section '{where}'")
        self.section, self.where = section, where

    def __contains__(self, key: str) -> bool:
        return self.section.get(key) is not None

    def integer(self, key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        """A whole number in [1, limit]."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise InvalidCheckpoint(f"{self.where}.{key} must be a whole number from 1 to {limit}, not {value!r}")
        return value

    def integers(
        self, key: str, default: tuple[int, ...] | None = None, limit: int = 64, may_be_empty: bool = False
    ) -> tuple[int, ...]:
        """A list of at most 16 whole numbers in [1, limit]."""
        value = self._get(key, default)
        whole = isinstance(value, list | tuple) and all(type(item) is int and 1 <= item <= limit for item in value)
        if not whole or len(value) > 16 or not (value or may_be_empty):
            raise InvalidCheckpoint(f"{self.where}.{key} must be a list of whole numbers up to {limit}, not {value!r}")
        return tuple(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; text such as "1e-4", which YAML does not read as one, counts."""
        value = self._get(key, default)
        try:
            return float(value) if not isinstance(value, bool) else float("bool")
        except (TypeError, ValueError):
            raise InvalidCheckpoint(f"{self.where}.{key} must be a number, not {value!r}") from None

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; absent or null means `default`."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise InvalidCheckpoint(f"{self.where}.{key} must be true or false, not {value!r}")
        return value

    def choice(self, key: str, choices: Mapping[str, Any] | tuple[str, ...], default: str | None = None) -> str:
        """One of `choices`."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise InvalidCheckpoint(f"{self.where}.{key} must be one of {', '.join(choices)}, not {value!r}")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.section.get(key)
        value = default if value is None else value
        if value is None:
            raise InvalidCheckpoint(f"the config lacks {self.where}.{key}")
        return value


def renamed(state_dict: StateDict, place: Callable[[str], tuple[str, int | None]]) -> dict[str, Tensor]:
    """Weights under our names.

    `place(key)` is our name of an official key and, where several official ones are the rows of one of ours, which of
    them it is (0, 1, ...).
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state_dict.items():
        name, number = place(key)
        parts.setdefault(name, {})[number or 0] = value
    return {name: torch.cat([rows[i] for i in sorted(rows)]) for name, rows in parts.items()}
