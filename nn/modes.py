"""Evaluation mode for the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps


def in_evaluation_mode(method: Callable) -> Callable:
    """Decorate a module's method: no dropout while it runs, also amid training, and every part's mode as it was after.

    So a result depends on its seed alone.
    """

    @wraps(method)
    def wrapped(self, *args, **options):
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return method(self, *args, **options)
        finally:
            for module in training:
                module.training = True

    return wrapped
