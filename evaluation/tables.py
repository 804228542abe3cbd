"""Tables in Markdown, line by line, as the README has them."""

from __future__ import annotations


def head(*names: str) -> str:
    """The names of the columns, and the line below them."""
    return f"{row(*names)}\n{row(*['---'] * len(names))}"


def row(*cells: str) -> str:
    """One line of a table."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A figure with so many digits behind the point, nothing for None."""
    return "" if value is None else f"{value:.{digits}f}{unit}"
