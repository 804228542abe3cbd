"""The classes of a generator, and what people call them: names, beginnings of names, numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import InvalidInput, nearest_names

MAX_LABELS = 4096  # of one call
NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
FEW_CLASSES = 20  # all are listed when an unknown one is asked for


@dataclass(frozen=True)
class Classes:
    """Classes 0 .. number - 1 of the model called `model`; `number` stands for "no class".

    names: of each class, or () when there are only numbers.
    """

    model: str
    number: int
    names: tuple[str, ...] = ()

    def find_all(self, labels: Any) -> list[int]:
        """Class numbers of one label or of several (a list, tuple, range, tensor or array).

        Raises:
            InvalidInput: no or too many labels, unknown names (the nearest are offered), numbers out of range.
        """
        if hasattr(labels, "tolist"):  # tensors and arrays
            labels = labels.tolist()
        labels = list(labels) if isinstance(labels, (list, tuple, range)) else [labels]
        if not 1 <= len(labels) <= MAX_LABELS:
            raise InvalidInput(f"give 1 to {MAX_LABELS} labels, not {len(labels)}")
        return [self.find(label) for label in labels]

    def requests(self, labels: Any) -> list[int | None]:
        """`find_all`, where None stands for no class."""
        return [None if number == self.number else number for number in self.find_all(labels)]

    def find(self, label: int | str | None) -> int:
        """Class number of one label; None is "no class", text that is no name may be a number."""
        if label is None:
            return self.number
        if isinstance(label, str):
            word = label.strip()
            if word in self.names or not NUMBER.fullmatch(word):
                return self._find_name(label)
            label = int(word)
        if isinstance(label, bool) or not isinstance(label, int):
            raise InvalidInput(f"a label is a name, a number or None, not {label!r}")
        if not 0 <= label < self.number:
            raise InvalidInput(f"label {label} is out of range; {self.model} has classes 0 to {self.number - 1}")
        return label

    def _find_name(self, label: str) -> int:
        word, names = label.strip().lower(), [name.lower() for name in self.names]
        matches = [i for i, name in enumerate(names) if name == word]
        matches = matches or [i for i, name in enumerate(names) if word and name.startswith(word)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            options = ", ".join(f"{self.names[i]!r} ({i})" for i in matches[:5])
            raise InvalidInput(f"label {label!r} could be any of {options}; give the whole name or the number")
        raise InvalidInput(f"unknown label {label!r}.{self._hint(word, names)}")

    def _hint(self, word: str, names: list[str]) -> str:
        if not names:
            return f" {self.model} has no names, only the numbers 0 to {self.number - 1}."
        # A word within a name counts as near: "cat" is not close to "Egyptian cat" by its letters.
        inside = [name for name in names if word and word in name][:3]
        hint = f" Did you mean {' or '.join(map(repr, inside))}?" if inside else nearest_names(word, names)
        if self.number <= FEW_CLASSES:
            return f"{hint} {self.model} knows {', '.join(self.names)}."
        where = "`label_names` in Python and --list-labels on the command line give them"
        return f"{hint} {self.model} knows {self.number} classes; {where}."


def check_class_names(names: Any, number: int) -> None:
    """Raise InvalidInput unless a config's `names` are none, or one text for each of `number` classes."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InvalidInput("label_names must be a list of texts, one for each class")
    if len(names) not in (0, number):
        raise InvalidInput(f"label_names holds {len(names)} names for {number} classes; give each class one, or none")


@cache
def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, in the order of their numbers."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
