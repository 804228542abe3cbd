"""Whole numbers that a stranger may have written, checked before anything is built from them: configs and options."""

from __future__ import annotations

import operator
from typing import Any

from .errors import InvalidInput

MAX_SIZE = 2**24  # of any number in a config: beyond all released sizes
MAX_DEPTH = 512  # blocks of a network: each takes memory and time even before it has weights


def check_sizes(largest: int = MAX_SIZE, /, **sizes: int) -> None:
    """Raise InvalidInput for one of `sizes`, named, that is no whole number from 1 to `largest`."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
            raise InvalidInput(f"{name}={size!r} must be a whole number from 1 to {largest}")


def whole(value: Any) -> int | None:
    """`value` as an int, or None when it is no whole number; numpy's count as such, and bools do not."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_whole(value: Any, what: str, smallest: int, largest: int | None = None) -> int:
    """`value` as an int, or InvalidInput when it is no whole number in its range."""
    number = whole(value)
    if number is None or number < smallest or (largest is not None and number > largest):
        end = "on" if largest is None else f"to {largest}"
        raise InvalidInput(f"{what}={value!r} must be a whole number from {smallest} {end}")
    return number
