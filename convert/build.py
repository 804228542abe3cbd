"""Building one of our modules from official tensors: every key and shape must agree before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InvalidCheckpoint, MediatokError

MAX_LISTED = 10
MAX_SIZE = 2**20  # of any number in a config: beyond all released sizes, below what would hang a constructor


def build(
    factory: Callable[..., nn.Module], arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> nn.Module:
    """Return `factory(**arguments)` in eval mode with the fp32 values of `state_dict`, which is left as it is.

    Raises InvalidCheckpoint when the arguments are impossible, or when keys or shapes differ (listing them).
    """
    try:
        with torch.device("meta"):  # no memory and no random numbers before the weights are known to fit
            module = factory(**arguments)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        if isinstance(error, InvalidCheckpoint):
            raise
        kind = "" if isinstance(error, MediatokError) else f"{type(error).__name__}: "
        raise InvalidCheckpoint(f"the config describes an impossible model ({kind}{error})") from None
    load_strictly(module, state_dict)
    return module.eval()


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Give `module` (on any device, meta included) copies of the tensors of `state_dict`; see `check_keys`."""
    check_keys({key: tuple(value.shape) for key, value in module.state_dict().items()}, state_dict)
    own = {key: value.to(torch.float32, copy=True).contiguous() for key, value in state_dict.items()}
    module.load_state_dict(own, strict=True, assign=True)


def check_keys(expected: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Tensor]) -> None:
    """Raise InvalidCheckpoint listing missing keys, unknown keys and wrong shapes, if there are any."""
    problems = [
        *(f"missing {key} {list(expected[key])}" for key in expected if key not in state_dict),
        *(f"unknown {shown(key)} {list(value.shape)}" for key, value in state_dict.items() if key not in expected),
        *(
            f"{key} has shape {list(state_dict[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in state_dict and tuple(state_dict[key].shape) != shape
        ),
    ]
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        listed = "; ".join(problems[:MAX_LISTED])
        raise InvalidCheckpoint(f"the weights do not fit the config ({len(problems)} differences): {listed}{more}")


def shown(name: str) -> str:
    """A name from a file as part of a one-line message: escaped, and cut where it is absurdly long."""
    return repr(name if len(name) <= 120 else name[:120] + "...")[1:-1]


class Fields:
    """Typed reading of a config section, so that a wrong value is named instead of failing somewhere inside."""

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

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A list of 1 to 16 whole numbers in [1, 64]."""
        value = self._get(key, default)
        whole = isinstance(value, list | tuple) and all(type(item) is int and 1 <= item <= 64 for item in value)
        if not whole or not 1 <= len(value) <= 16:
            raise InvalidCheckpoint(f"{self.where}.{key} must be a list of small whole numbers, not {value!r}")
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
