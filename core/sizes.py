"""Sizes in a model's config, checked before anything is built from them: a config can come from a stranger."""

from __future__ import annotations

from .errors import InvalidInput

MAX_SIZE = 2**24  # of any number in a config: beyond all released sizes
MAX_DEPTH = 512  # blocks of a network: each takes memory and time even before it has weights


def check_sizes(largest: int = MAX_SIZE, /, **sizes: int) -> None:
    """Raise InvalidInput for one of `sizes`, named, that is no whole number from 1 to `largest`."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
            raise InvalidInput(f"{name}={size!r} must be a whole number from 1 to {largest}")
