"""Giving a model its weights: every key and shape must agree before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidCheckpoint, MediatokError

MAX_LISTED = 10


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
