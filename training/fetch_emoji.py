"""Prepare the emoji pictures, `data/fluent-emoji` and `data/emoji-google`: `python -m mediatok.training.fetch_emoji`.

3,391 rendered pictures (npm `@lobehub/fluent-emoji-3d` 1.1.0, MIT) with names and categories (npm
`emoji-datasource-google` 16.0.0, MIT), on white, as RGB PNG:

    OUT/64/train/1f34e.png    (also 128 and 256, and val)
    OUT/labels.json           {"1f34e": {"category", "subcategory", "name", "base", "split"}, ...}

Skin-tone variants of one emoji are in the same split: the base emoji decides (3,061 train, 330 val).

The second package draws the same emoji flat: Google's Noto Emoji (Apache-2.0), 64 pixels a side. They get the file
names and the splits of the rendered ones, so that labels.json holds for both (3,058 train, 330 val: it lacks 3):

    GOOGLE/64/train/1f34e.png    (also val)
    GOOGLE/LICENCE
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import InvalidInput, MediatokError
from ..core.files import read_limited
from ..core.images import fit_square, read_image
from .data import is_held_out
from .npm_package import Package, npm_packages, package_members

PICTURES: Package = (
    "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz", 15_792_027,
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)  # fmt: skip
LABELS: Package = (
    "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz", 74_344_091,
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)  # fmt: skip
SIZES = (64, 128, 256)
GOOGLE_SIZE = 64  # as the package has them
NUM_TRAIN, NUM_VAL = 3061, 330
NUM_GOOGLE_TRAIN, NUM_GOOGLE_VAL = 3058, 330
PICTURES_FOLDER, GOOGLE_FOLDER, EMOJI_FILE = "package/assets/", "package/img/google/64/", "package/emoji.json"
MAX_LABELS_BYTES = 8 * 2**20
GOOGLE_LICENCE = """\
The pictures are those of Noto Emoji (https://github.com/googlefonts/noto-emoji), version 2.048, copyright Google LLC,
under the Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0), laid on white. They come from the package
emoji-datasource-google 16.0.0, copyright (c) 2013 Cal Henderson, under the MIT licence.
"""


def prepare(out: Path, get: Callable[[Package], Path], sizes: tuple[int, ...] = SIZES) -> dict[str, int]:
    """Make the set of rendered pictures in `out` unless it is there; counts of its splits.

    get: gives the file of a package, see `npm_packages`, and raises what that does.

    Raises:
        InvalidInput: a package does not hold what it should.
    """
    if (out / "labels.json").is_file():
        return _counts(_read_labels(out / "labels.json"))
    pictures = {
        Path(name).stem: data
        for name, data in package_members(get(PICTURES), lambda name: name.endswith(".webp"))
        if name.startswith(PICTURES_FOLDER)
    }
    labels = _labels(pictures, _entries(get(LABELS)))
    counts = _counts(labels)
    _check_counts(counts, NUM_TRAIN, NUM_VAL)
    with _staged(out) as staged:
        for key, data in pictures.items():
            image = read_image(data)
            for size in sizes:
                path = staged / str(size) / labels[key]["split"] / f"{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                fit_square(image, size).save(path)
        (staged / "labels.json").write_text(json.dumps(labels, indent=0, sort_keys=True))
    return counts


def prepare_google(out: Path, labels_file: Path, get: Callable[[Package], Path]) -> dict[str, int]:
    """Make Google's drawings of the emoji in `labels_file` unless they are there; counts of their splits.

    Raises:
        InvalidInput: the package does not hold what it should.
    """
    if (out / "LICENCE").is_file():
        return {split: len(list((out / str(GOOGLE_SIZE) / split).glob("*.png"))) for split in ("train", "val")}
    labels, package = _read_labels(labels_file), get(LABELS)
    keys_of = _keys_of_drawings(labels, _entries(package))
    drawings = package_members(package, lambda name: name.startswith(GOOGLE_FOLDER) and name.endswith(".png"))
    counts = {"train": 0, "val": 0}
    with _staged(out) as staged:
        for split in counts:
            (staged / str(GOOGLE_SIZE) / split).mkdir(parents=True)
        for name, data in drawings:
            for key in keys_of.get(name.removeprefix(GOOGLE_FOLDER), ()):
                split = labels[key]["split"]
                fit_square(read_image(data), GOOGLE_SIZE).save(staged / str(GOOGLE_SIZE) / split / f"{key}.png")
                counts[split] += 1
        _check_counts(counts, NUM_GOOGLE_TRAIN, NUM_GOOGLE_VAL)
        (staged / "LICENCE").write_text(GOOGLE_LICENCE)
    return counts


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place at the end, or goes away with an error."""
    staged = out.with_name(out.name + ".writing")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        shutil.rmtree(out, ignore_errors=True)
        os.replace(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _entries(package: Path) -> list[dict]:
    """All emoji of the package's emoji.json."""
    return json.loads(next(data for _, data in package_members(package, lambda name: name == EMOJI_FILE)))


def _normal(code_points: str) -> str:
    """ "0023-FE0F" -> "23-fe0f": how files and labels are joined."""
    return "-".join(part.lower().lstrip("0") for part in code_points.split("-"))


def _labels(pictures: dict[str, bytes], emoji: list[dict]) -> dict[str, dict]:
    entry_of = {}
    for entry in emoji:
        for drawn in _drawn(entry):
            for name in _names(drawn):
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


def _keys_of_drawings(labels: dict[str, dict], emoji: list[dict]) -> dict[str, list[str]]:
    """File of a drawing -> the keys of `labels` that it belongs to, by code points; mostly one."""
    file_of: dict[str, str] = {}
    for entry in emoji:
        for drawn in _drawn(entry):
            for name in _names(drawn):
                file_of.setdefault(_normal(name), drawn.get("image", ""))
    keys_of: dict[str, list[str]] = {}
    for key in labels:
        if file := file_of.get(_normal(key)):
            keys_of.setdefault(file, []).append(key)
    return keys_of


def _drawn(entry: dict) -> list[dict]:
    """An emoji and its skin-tone variants: what has a drawing of its own."""
    return [entry, *entry.get("skin_variations", {}).values()]


def _names(drawn: dict) -> list[str]:
    """The code points by which something drawn may be called."""
    return [name for name in (drawn["unified"], drawn.get("non_qualified")) if name]


def _read_labels(path: Path) -> dict[str, dict]:
    try:
        return json.loads(read_limited(path, MAX_LABELS_BYTES))
    except ValueError as error:
        raise InvalidInput(f"{path} is no JSON: {error}; remove its folder to make it anew") from error


def _counts(labels: dict[str, dict]) -> dict[str, int]:
    return {split: sum(label["split"] == split for label in labels.values()) for split in ("train", "val")}


def _check_counts(counts: dict[str, int], train: int, val: int) -> None:
    if counts != {"train": train, "val": val}:
        raise InvalidInput(f"the packages hold {counts}, expected {train} train and {val} val pictures")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.fetch_emoji", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/fluent-emoji"))
    parser.add_argument("--google", type=Path, default=Path("data/emoji-google"), help="folder of the flat drawings")
    parser.add_argument("--packages", type=Path, help="folder that already holds the two .tgz files")
    arguments = parser.parse_args(argv)
    try:
        with npm_packages(arguments.packages) as get:
            made = {arguments.out: prepare(arguments.out, get)}
            made[arguments.google] = prepare_google(arguments.google, arguments.out / "labels.json", get)
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for out, counts in made.items():
        print(f"{out}: {counts['train']} train and {counts['val']} val pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
