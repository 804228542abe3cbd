"""Folders of solid meshes with a catalogue, as the `fetch_...` programs for shapes make them.

    OUT/train/KEY.ply        one mesh each, y up, in the units of its source
    OUT/val/KEY.ply
    OUT/catalogue.json       {KEY: {"name", "category", "object", "creator", "licence", "source", "split", ...}, ...}
    OUT/ATTRIBUTION.md       who made what, under which licence
    OUT/LICENCE              of the package it comes from

Meshes without an interior (sheets, wires, open shells) have no occupancy to learn and are left out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..core.errors import InvalidInput, MediatokError
from ..core.files import read_limited
from ..core.meshes import normalise, read_mesh, write_mesh
from ..core.solids import solid_of
from .data import is_held_out

CATALOGUE = "catalogue.json"
SPLITS = ("train", "val")
MAX_CATALOGUE_BYTES = 64 * 2**20
MIN_INTERIOR = 0.005  # of the bounding box's volume
ROOM = 0.01  # around the bounding box, in the tokenizers' box
INTERIOR_POINTS = 16_384
LICENCES = {
    "CC-BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY 3.0 US": "https://creativecommons.org/licenses/by/3.0/us/",
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "zlib": "https://spdx.org/licenses/Zlib.html",
}


@dataclass(frozen=True)
class RawShape:
    """A mesh as a package holds it.

    key: file stem in the set. path: where in its archive; its hash decides the split. data: the mesh file.
    facts: "name", "category", "object", "creator" and "licence" (of `LICENCES`). rotation: brings it upright, [3, 3].
    """

    key: str
    path: str
    data: bytes
    facts: dict[str, str]
    rotation: np.ndarray | None = field(default=None, repr=False)


def write_shape_set(
    out: Path, shapes: Iterable[RawShape], about: str, licence: bytes, say: Callable[[str], None] = print
) -> dict[str, int]:
    """Write the set to `out`, whole or not at all; how many meshes are in each split, and "left out".

    about: first lines of the attribution file: where all this comes from. licence: the package's own licence file.
    """
    staged = out.with_name(out.name + ".writing")
    shutil.rmtree(staged, ignore_errors=True)
    entries: dict[str, dict] = {}
    left_out = 0
    try:
        for split in SPLITS:
            (staged / split).mkdir(parents=True)
        for number, shape in enumerate(shapes, 1):
            try:
                mesh = read_mesh(shape.data)
                if shape.rotation is not None:
                    mesh.vertices = np.asarray(mesh.vertices) @ shape.rotation.T
                method, interior = interior_of(mesh)
            except MediatokError as error:
                say(f"left out {shape.key}: {error}")
                left_out += 1
                continue
            if interior < MIN_INTERIOR:
                left_out += 1
                continue
            split = "val" if is_held_out(shape.path) else "train"
            write_mesh(mesh, staged / split / f"{shape.key}.ply")
            entries[shape.key] = shape.facts | {
                "source": shape.path, "split": split, "faces": len(mesh.faces), "inside_by": method,
                "interior": round(interior, 4),
            }  # fmt: skip
            if number % 50 == 0:
                say(f"{number} meshes read, {len(entries)} are solid")
        (staged / CATALOGUE).write_text(json.dumps(entries, indent=0, sort_keys=True, ensure_ascii=False))
        (staged / "ATTRIBUTION.md").write_text(_attribution(about, entries))
        (staged / "LICENCE").write_bytes(licence)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return count_splits(entries) | {"left out": left_out}


def read_catalogue(folder: str | Path) -> dict[str, dict]:
    """The catalogue of a set.

    Raises:
        InvalidInput: missing, or something else.
    """
    path = Path(folder) / CATALOGUE
    try:
        entries = json.loads(read_limited(path, MAX_CATALOGUE_BYTES))
        if not all(entry["split"] in SPLITS for entry in entries.values()):
            raise ValueError
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        if isinstance(error, MediatokError):
            raise
        raise InvalidInput(f"{path} is no catalogue of shapes; `make data` writes one") from error
    return entries


def count_splits(entries: dict[str, dict]) -> dict[str, int]:
    return {split: sum(entry["split"] == split for entry in entries.values()) for split in SPLITS}


def interior_of(mesh) -> tuple[str, float]:
    """How inside and outside were told apart, and the share of the bounding box that is inside."""
    boxed, _ = normalise(mesh)
    low, high = boxed.bounds
    rng = np.random.default_rng(0)
    # A flat sheet fills its bounding box; with some room around it, it does not.
    places_N3 = rng.uniform(low - ROOM, high + ROOM, (INTERIOR_POINTS, 3))
    points_N3 = torch.from_numpy(places_N3.astype(np.float32))
    solid = solid_of(boxed)
    return solid.method, float(solid.contains(points_N3).float().mean())


def _attribution(about: str, entries: dict[str, dict]) -> str:
    lines = [about.strip(), "", "| model | name | creator | licence |", "| --- | --- | --- | --- |"]
    lines += [f"| {key} | {e['name']} | {e['creator']} | {e['licence']} |" for key, e in sorted(entries.items())]
    used = sorted({entry["licence"] for entry in entries.values()})
    lines += ["", *(f"- {licence}: {LICENCES[licence]}" for licence in used)]
    lines += ["", "Changed: read as bare triangles without materials, turned upright, stored as PLY."]
    return "\n".join(lines) + "\n"
