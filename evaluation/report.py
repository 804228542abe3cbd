"""Figures of a tokenizer on a set, always with the protocol behind them, and the comparison of two such reports.

Published figures differ by set, preprocessing and feature network as much as by model; so a report carries all of
these, and `compare` refuses reports whose protocols differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn

from ..core.errors import InvalidInput
from ..core.files import atomic_write, read_limited

MAX_REPORT_BYTES = 2**20
UNITS = {"image": "pictures", "speech": "clips", "shape": "shapes"}  # of a set


@dataclass(frozen=True)
class Protocol:
    """What two figures must share to be comparable; only the set's name may differ.

    modality: "image" or "speech". num_items: pictures or clips.
    set_sha256: hash over the sorted hashes of the files, so that order and names do not matter and content does.
    settings: whatever else the figures depend on, as a caption.
    feature_nets: SHA-256 of the weights of each network used, by metric.
    """

    modality: str
    set_name: str
    num_items: int
    set_sha256: str
    preprocessing: str
    postprocessing: str
    metrics: str
    settings: dict[str, str] = field(default_factory=dict)
    feature_nets: dict[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the set consists of."""
        return UNITS.get(self.modality, "items")


@dataclass(frozen=True)
class Report:
    """Figures of one tokenizer on one set. `figures` maps a name with its unit to a value; higher or lower as named.

    num_tokens: mean tokens of a picture, or of a second of sound.
    """

    model: str
    fingerprint: str
    dtype: str
    device: str
    num_tokens: float
    protocol: Protocol
    figures: dict[str, float]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        with atomic_write(path) as temporary:
            Path(temporary).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that `save` wrote; InvalidInput if it is none."""
        data = read_limited(path, MAX_REPORT_BYTES)
        try:
            values = json.loads(data)
            values["protocol"] = Protocol(**values["protocol"])
            values["figures"] = {str(name): float(value) for name, value in values["figures"].items()}
            return cls(**values | {"notes": tuple(values.get("notes", ()))})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a report of `mediatok evaluate --out`: {error!r}") from error

    def __str__(self) -> str:
        protocol = self.protocol
        rows = [
            ("model", f"{self.model} (fingerprint {self.fingerprint}), {self.dtype} on {self.device}"),
            (
                "set",
                f"{protocol.set_name}: {protocol.num_items} {protocol.unit}, sha256 {protocol.set_sha256[:16]}",
            ),
            ("input", protocol.preprocessing),
            ("output", protocol.postprocessing),
            ("metrics", protocol.metrics),
            *protocol.settings.items(),
            *(("network", f"{name}, sha256 {sha256[:16]}") for name, sha256 in protocol.feature_nets.items()),
            *(("note", note) for note in self.notes),
        ]
        lines = [f"{name:<12}{value}" for name, value in rows]
        width = max(map(len, self.figures), default=0)
        lines += [f"{name:<{width}}  {value:10.4f}" for name, value in self.figures.items()]
        return "\n".join([*lines, f"{self.seconds:.1f} seconds for {protocol.num_items} {protocol.unit}"])


def compare(report: Report, other: Report) -> str:
    """A table of both reports' figures; InvalidInput naming what differs when they were not measured alike."""
    unlike = [
        f"{part.name} ({_short(getattr(report.protocol, part.name))} / {_short(getattr(other.protocol, part.name))})"
        for part in fields(Protocol)
        if part.name != "set_name" and getattr(report.protocol, part.name) != getattr(other.protocol, part.name)
    ]
    if unlike:
        raise InvalidInput(f"the reports were measured differently and cannot be compared: {', '.join(unlike)}")
    names = [name for name in report.figures if name in other.figures]
    width = max(map(len, ["figure", *names]))
    left, right = f"{report.model} ({report.num_tokens:g})", f"{other.model} ({other.num_tokens:g})"
    lines = [f"{'figure':<{width}}  {left:>24}  {right:>24}  {'difference':>11}"]
    for name in names:
        a, b = report.figures[name], other.figures[name]
        lines.append(f"{name:<{width}}  {a:>24.4f}  {b:>24.4f}  {a - b:>+11.4f}")
    return "\n".join(lines)


def set_hash(digests: Iterable[str]) -> str:
    """SHA-256 of a set from those of its files, whatever their order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's tensors and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:17]}..."
