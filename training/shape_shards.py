"""Precompute what shapes are trained on: `python -m mediatok.training.shape_shards data/furniture --out data/shards`.

Telling inside from outside takes seconds a mesh, so it is done once. Each mesh of a set (`shape_sets.py`) is moved into
the box [-1, 1]^3 as the tokenizer does it, and gives

    KEY.points, KEY.normals              int16, int8 [N, 3]: points of the surface, in random order
    KEY.uniform, KEY.uniform_inside      int16 [M, 3] uniform in the box; uint8 [M / 8], one bit a point
    KEY.near, KEY.near_inside            the same near the surface

in `OUT/shapes-0000.safetensors` and so on; `OUT/index.json` has the names, classes and splits. Coordinates are stored
as round(32767 * x), and inside is asked at the stored places. All is a function of the mesh and its key.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import InvalidInput, MediatokError
from ..core.meshes import normalise, read_mesh
from ..core.shape_tokenizer import surface_points
from ..core.solids import solid_of
from ..evaluation.shape_points import near_points, uniform_points
from .shape_sets import read_catalogue

INDEX = "index.json"
FORMAT = 1
SHAPES_A_SHARD = 64
SURFACE_POINTS = 16_384
QUERIES = 32_768  # of each kind
COORDINATE_STEPS = 32767
NORMAL_STEPS = 127
KEPT_FACTS = ("name", "category", "object", "licence", "split", "inside_by")


def write_shards(
    folder: Path, out: Path, surface: int = SURFACE_POINTS, queries: int = QUERIES, workers: int = 1, say=print
) -> int:
    """Write the shards of the set in `folder` to `out`, whole or not at all; the number of shapes.

    Raises:
        InvalidInput: no set there, or a number of queries that does not fill whole bytes.
    """
    if queries % 8:
        raise InvalidInput(f"{queries} queries do not fill whole bytes; take a multiple of 8")
    entries = read_catalogue(folder)
    tasks = [(str(folder / entry["split"] / f"{key}.ply"), key, surface, queries) for key, entry in entries.items()]
    staged = out.with_name(out.name + ".writing")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    shapes: dict[str, dict] = {}
    try:
        sampled = _in_parallel(tasks, workers)
        while group := list(islice(sampled, SHAPES_A_SHARD)):
            name = f"shapes-{len(shapes) // SHAPES_A_SHARD:04d}.safetensors"
            save_file({f"{key}.{kind}": value for key, found in group for kind, value in found.items()}, staged / name)
            for key, _ in group:
                facts = {fact: entries[key][fact] for fact in KEPT_FACTS if fact in entries[key]}
                shapes[key] = facts | {"shard": name}
            say(f"{len(shapes)} of {len(tasks)} shapes")
        index = {"format": FORMAT, "surface": surface, "queries": queries, "shapes": shapes}
        (staged / INDEX).write_text(json.dumps(index, indent=0, sort_keys=True, ensure_ascii=False))
        shutil.rmtree(out, ignore_errors=True)
        os.replace(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return len(shapes)


def sample_shape(mesh, key: str, surface: int, queries: int) -> dict[str, Tensor]:
    """The stored tensors of one mesh, by kind."""
    boxed, _ = normalise(mesh)
    solid, seed = solid_of(boxed), zlib.crc32(key.encode())
    rng = np.random.default_rng(seed)
    points_N3, normals_N3 = surface_points(boxed, max(surface, queries), seed)
    found = {
        "points": to_steps(points_N3[:surface], COORDINATE_STEPS, torch.int16),
        "normals": to_steps(normals_N3[:surface], NORMAL_STEPS, torch.int8),
    }
    for kind, places_M3 in (
        ("uniform", uniform_points(queries, rng)),
        ("near", near_points(points_N3[:queries], rng)),
    ):
        stored_M3 = to_steps(places_M3, COORDINATE_STEPS, torch.int16)
        inside_M = solid.contains(stored_M3.float() / COORDINATE_STEPS)
        found[kind] = stored_M3
        found[f"{kind}_inside"] = torch.from_numpy(np.packbits(inside_M.numpy()))
    return found


def to_steps(values: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Values in [-1, 1] as whole numbers from -steps to steps."""
    return (values * steps).round().clamp(-steps, steps).to(dtype)


def _in_parallel(tasks: Iterable[tuple], workers: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(key, tensors) of each task, in order; the work of `workers` processes."""
    if workers == 1:
        yield from map(_sample_file, tasks)
        return
    # Arrays travel between processes by value; tensors would go through shared memory, which is scarce in containers.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for key, found in pool.map(_sample_file_as_arrays, tasks):
            yield key, {kind: torch.from_numpy(value) for kind, value in found.items()}


def _sample_file(task: tuple[str, str, int, int]) -> tuple[str, dict[str, Tensor]]:
    path, key, surface, queries = task
    return key, sample_shape(read_mesh(path), key, surface, queries)


def _sample_file_as_arrays(task: tuple[str, str, int, int]) -> tuple[str, dict[str, np.ndarray]]:
    key, found = _sample_file(task)
    return key, {kind: value.numpy() for kind, value in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.shape_shards", description=__doc__)
    parser.add_argument("folder", type=Path, help="a set of meshes with its catalogue")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--surface", type=int, default=SURFACE_POINTS, help="points of the surface of each shape")
    parser.add_argument("--queries", type=int, default=QUERIES, help="points of either kind to ask for the inside")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    arguments = parser.parse_args(argv)
    try:
        count = write_shards(
            arguments.folder, arguments.out, arguments.surface, arguments.queries, arguments.workers
        )  # fmt: skip
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {count} shapes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
