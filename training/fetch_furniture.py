"""Prepare the furniture meshes: `python -m mediatok.training.fetch_furniture --out data/furniture`.

820 models of furniture, people, vehicles and household things with a name and a category (Debian's
`sweethome3d-furniture` 1.8-1), of which those with an interior are kept; `shape_sets.py` says what is written.
Licences: CC-BY 3.0 (Scopia, Kator Legaz, Reallusion, Blend Swap) and CC0 (Blend Swap); OUT/ATTRIBUTION.md names every
model's author, and OUT/LICENCE is the package's own copyright file.

The split is by a hash of the model's path inside its catalogue file. The two staircases count as miscellaneous.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from ..core.errors import InvalidInput, MediatokError
from .fetch_festvox import _ar_member, fetch_deb
from .shape_sets import CATALOGUE, RawShape, count_splits, read_catalogue, write_shape_set

# name=version as apt knows it, file, bytes, SHA-256, where Debian's mirrors have it.
PACKAGE = (
    "sweethome3d-furniture=1.8-1", "sweethome3d-furniture_1.8-1_all.deb", 119_782_356,
    "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
    "https://deb.debian.org/debian/pool/main/s/sweethome3d-furniture/sweethome3d-furniture_1.8-1_all.deb",
)  # fmt: skip
NUM_MODELS = 820
FOLDER = "./usr/share/sweethome3d/furniture/"
COPYRIGHT = "./usr/share/doc/sweethome3d-furniture/copyright"
PROPERTIES = "PluginFurnitureCatalog.properties"
# Catalogue file -> licence, and the author of models that name none.
SOURCES = {
    "BlendSwap-CC-0": ("CC0 1.0", "a Blend Swap contributor"),
    "BlendSwap-CC-BY": ("CC-BY 3.0", "a Blend Swap contributor"),
    "KatorLegaz": ("CC-BY 3.0 US", "Andrew Kator & Jennifer Legaz"),
    "Reallusion": ("CC-BY 3.0 US", "Reallusion"),
    "Scopia": ("CC-BY 3.0", "Scopia Visual Interfaces Systems"),
}
MAX_MEMBER_BYTES = 128 * 2**20  # of a catalogue file in the package
MAX_MESH_BYTES = 32 * 2**20
ABOUT = """# Furniture

From Debian's package sweethome3d-furniture 1.8-1, https://www.sweethome3d.com/importModels.jsp; models cleaned and
converted to OBJ by Emmanuel Puybaret / eTeks."""


def prepare(out: Path, packages: Path | None = None, say=print) -> dict[str, int]:
    """Make the data set in `out`; how many meshes are in each split.

    packages: folder that already holds the package file; without it apt or a Debian mirror gives it.

    Raises:
        ModelNotFound: the package cannot be fetched. InvalidInput: it is not what it should be.
    """
    if (out / CATALOGUE).is_file():
        return count_splits(read_catalogue(out))
    with tempfile.TemporaryDirectory() as scratch:
        package = fetch_deb(PACKAGE, packages or Path(scratch), download=packages is None)
        catalogues, licence = _members(package)
        shapes = [shape for name, data in sorted(catalogues.items()) for shape in read_sh3f(name, data)]
        if len(shapes) != NUM_MODELS:
            raise InvalidInput(f"{package.name} holds {len(shapes)} models, expected {NUM_MODELS}")
        return write_shape_set(out, shapes, ABOUT, licence, say)


def read_sh3f(source: str, data: bytes) -> Iterator[RawShape]:
    """The models of a Sweet Home 3D catalogue file, a zip archive; `source` is its name without suffix.

    Raises:
        InvalidInput: damaged, or a model that the catalogue lists is missing.
    """
    licence, author = SOURCES[source]
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        facts = read_properties(archive.read(PROPERTIES).decode("latin-1"))
        for number, model in facts["model"].items():
            path = model.lstrip("/")
            if archive.getinfo(path).file_size > MAX_MESH_BYTES:
                raise InvalidInput(f"{source}: {path} has more than {MAX_MESH_BYTES:,} bytes")
            name = facts["name"][number]
            category = facts["category"][number]
            yield RawShape(
                key=f"{source.lower()}-{PurePosixPath(path).stem}",
                path=path,
                data=archive.read(path),
                facts={
                    "name": name,
                    "category": "Miscellaneous" if category == "Staircases" else category,
                    "object": name.lower().split()[-1],
                    "creator": facts.get("creator", {}).get(number, author),
                    "licence": licence,
                },
                rotation=_rotation(facts.get("modelRotation", {}).get(number)),
            )
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        if isinstance(error, MediatokError):
            raise
        raise InvalidInput(f"{source}.sh3f is damaged: {error!r}") from error


def read_properties(text: str) -> dict[str, dict[str, str]]:
    """Lines "key#number=value" of a Java properties file as {key: {number: value}}; all others are left out."""
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        key, sign, number = name.strip().partition("#")
        if sign and key:
            found.setdefault(key, {})[number] = value.strip().replace("\\", "")
    return found


def _rotation(text: str | None) -> np.ndarray | None:
    """The nine numbers of a rotation, row by row."""
    return None if text is None else np.array([float(number) for number in text.split()]).reshape(3, 3)


def _members(package: Path) -> tuple[dict[str, bytes], bytes]:
    """The catalogue files of the package by name, and its copyright file."""
    catalogues, licence = {}, b""
    with package.open("rb") as file, tarfile.open(fileobj=_ar_member(file, "data.tar", package.name)) as tar:
        for member in tar:
            name = member.name.removeprefix(FOLDER).removesuffix(".sh3f")
            if member.isreg() and member.size <= MAX_MEMBER_BYTES:
                if name in SOURCES:
                    catalogues[name] = tar.extractfile(member).read()
                elif member.name == COPYRIGHT:
                    licence = tar.extractfile(member).read()
    if len(catalogues) != len(SOURCES) or not licence:
        raise InvalidInput(f"{package.name} lacks {', '.join(SOURCES.keys() - catalogues.keys()) or COPYRIGHT}")
    return catalogues, licence


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.fetch_furniture", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/furniture"))
    parser.add_argument("--packages", type=Path, help=f"folder that already holds {PACKAGE[1]}")
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
