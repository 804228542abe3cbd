"""Every error that a user can cause is a `MediatokError`: one line with the offending value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MediatokError(Exception):
    """Base of all errors that mediatok raises for its users. The command line prints the message and exits with 2."""


class InvalidInput(MediatokError, ValueError):
    """A media file, array or argument that cannot be used as given."""


class LimitExceeded(InvalidInput):
    """Input beyond a stated limit (bytes, pixels, tokens); refused before it is decoded."""


class InvalidTokens(MediatokError, ValueError):
    """A `.mtok` file or `Tokens` value that is corrupt or inconsistent."""


class TokenizerMismatch(InvalidTokens):
    """Tokens that another tokenizer made."""


class ModelNotFound(MediatokError, LookupError):
    """An unknown model name, or weights that are neither here nor reachable."""


class InvalidCheckpoint(MediatokError, ValueError):
    """Weights or a model config that are hostile, incomplete or of another shape."""


class InvalidRecipe(MediatokError, ValueError):
    """A training recipe with a wrong key or value."""


class Cancelled(MediatokError):
    """Raised by an `on_step` callback to stop the work that called it."""


class MissingDependency(MediatokError, ImportError):
    """An optional package that this action needs is not installed."""


def nearest_names(word: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x' or 'y'?" for the choices closest to `word`, or an empty string when none is close."""
    matches = difflib.get_close_matches(word, list(choices), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
