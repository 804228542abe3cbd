"""Settings of models that have no option of their own: `--set name=value` and its like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import InvalidInput

FLAGS = {"true": True, "yes": True, "false": False, "no": False}


def parse_options(pairs: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """["temperature=3", "annealing=no", "sampler=ode"] as {"temperature": 3, "annealing": False, "sampler": "ode"}.

    flag: what the pairs were given with, for messages.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name:
            raise InvalidInput(f"{flag} {pair} must be name=value")
        if name in options:
            raise InvalidInput(f"{flag} {name} is given twice")
        try:
            options[name] = FLAGS[value.lower()] if value.lower() in FLAGS else json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def merged(given: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    """`given`, by options of their own, and what `pairs` of --set say."""
    options = parse_options(pairs)
    for name in options:
        if name in given:
            raise InvalidInput(f"--{name} and --set {name} say the same thing; give one of them")
    return {**given, **options}
