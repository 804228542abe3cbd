"""Comparing what our modules compute with what the official code recorded, one line a tensor.

Every recorded tensor must end up in one of two sets: read as an input, or compared. What is left over is a failure, so
that a new tensor in a case can never pass unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from .case import Case


@dataclass(frozen=True)
class Tolerance:
    """|ours - recorded| <= atol + rtol * |recorded| for every element."""

    atol: float = 0.0
    rtol: float = 0.0

    def __str__(self) -> str:
        if not self.rtol:
            return f"{self.atol:.0e}" if self.atol else "equal"
        relative = f"{self.rtol:.0e}*|x|"
        return f"{self.atol:.0e}+{relative}" if self.atol else relative


EXACT = Tolerance()
PIXEL = Tolerance(atol=1)  # uint8 pictures
TAP = Tolerance(atol=2e-5, rtol=1e-4)  # outputs of inner layers
IMAGE = Tolerance(atol=1e-4)
LOSS = Tolerance(rtol=1e-5)
GRADIENT = Tolerance(atol=1e-6, rtol=1e-3)


class Replay:
    """One run of one case: hands out recorded inputs, compares outputs and keeps the score."""

    def __init__(self, case: Case, echo: Callable[[str], None] = print):
        self.case = case
        self.echo = echo
        self.inputs: set[str] = set()
        self.compared: set[str] = set()
        self.failures: list[str] = []

    def has(self, name: str) -> bool:
        """True when the case recorded `name`."""
        return name in self.case.io

    def input(self, name: str) -> Tensor:
        """Return a recorded tensor that the replay starts from."""
        if name not in self.case.io:
            raise InvalidInput(f"{self.case.folder / 'io.safetensors'} lacks the input '{name}'")
        self.inputs.add(name)
        return self.case.io[name]

    def matches(self, pattern: str) -> Iterator[re.Match]:
        """Full matches of `pattern` among the recorded names, in order of their numbers."""

        def numeric(match: re.Match) -> list:
            return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", match.string)]

        return iter(sorted(filter(None, (re.fullmatch(pattern, name) for name in self.case.io)), key=numeric))

    def check(
        self, name: str, ours: Tensor | float | int, tolerance: Tolerance = EXACT, note: str | None = None
    ) -> None:
        """Compare `ours` with the recorded tensor `name` and print the line. Nothing happens when it was not recorded.

        One tensor may be compared several times, when we have several ways to compute it; `note` says which.
        """
        if name not in self.case.io:
            return
        recorded = self.case.io[name]
        ours = torch.tensor(ours, dtype=torch.float64) if isinstance(ours, float) else torch.as_tensor(ours)
        ours = ours.detach().cpu()
        self.compared.add(name)
        label = f"{name} ({note})" if note else name
        reason = _kind_difference(ours, recorded)
        if reason is None:
            error, ok = _largest_error(ours, recorded, tolerance)
            self._line(label, recorded, f"{error:.2e}", str(tolerance), "ok" if ok else "FAIL")
        else:
            ok = False
            self._line(label, recorded, "-", str(tolerance), f"FAIL ({reason})")
        if not ok:
            self.failures.append(label)

    def check_all(self, values: Mapping[str, Tensor], tolerance: Tolerance) -> None:
        """`check` every item of `values`."""
        for name, ours in values.items():
            self.check(name, ours, tolerance)

    def finish(self) -> bool:
        """Fail what was neither read nor compared, print the summary, and return True when all is well."""
        for name, recorded in self.case.io.items():
            if name not in self.inputs | self.compared:
                self._line(name, recorded, "-", "-", "FAIL (not replayed)")
                self.failures.append(name)
        ok = bool(self.compared) and not self.failures
        counts = f"{len(self.compared)} compared, {len(self.inputs)} inputs, {len(self.failures)} failed"
        if not self.compared:
            counts += " (nothing was compared)"
        self.echo(f"{'ok  ' if ok else 'FAIL'} {self.case.system}/{self.case.kind} {self.case.folder}: {counts}")
        return ok

    def _line(self, name: str, recorded: Tensor, error: str, tolerance: str, verdict: str) -> None:
        shape = "x".join(map(str, recorded.shape)) or "scalar"
        self.echo(f"  {name:<40} {shape:<14} {error:>9}  {tolerance:<14} {verdict}")


def _kind_difference(ours: Tensor, recorded: Tensor) -> str | None:
    if ours.shape != recorded.shape:
        return f"our shape is {tuple(ours.shape)}"
    if ours.is_floating_point() != recorded.is_floating_point():
        return f"our dtype is {ours.dtype}"
    if not recorded.numel():
        return "the recorded tensor is empty"
    return None


def _largest_error(ours: Tensor, recorded: Tensor, tolerance: Tolerance) -> tuple[float, bool]:
    if not recorded.is_floating_point():
        error = (ours.long() - recorded.long()).abs()
        return float(error.max()), bool((error <= tolerance.atol).all())
    ours, recorded = ours.double(), recorded.double()
    error = torch.where(ours == recorded, 0.0, (ours - recorded).abs())  # equal infinities differ by nothing
    within = error <= tolerance.atol + tolerance.rtol * recorded.abs()
    return float(error.max()), bool(within.all())  # NaN is within nothing
