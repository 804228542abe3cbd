"""How good made shapes are: how much of a held-out set they resemble, and what they copy from the training set.

    python -m mediatok.evaluation.shape_generation vat-gen-tiny data/furniture

makes a shape for each held-out one of the set, of the same object where the generator knows it, otherwise of the same
category, and compares them. Distances are Chamfer L1 between 2,048 points of either surface, every shape centred with
its longest side 1.9.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..core.errors import InvalidInput, MediatokError
from ..core.meshes import normalise, read_mesh
from ..core.registry import load
from ..training.shape_sets import read_catalogue
from .shape_distances import SurfacePoints, chamfer

NUM_POINTS = 2048
COPY_PERCENTILE = 5  # nearer to training than this share of held-out shapes counts as a copy


@dataclass(frozen=True)
class ShapeGenerationReport:
    """Figures of made shapes; smaller distances are better, a larger coverage is.

    minimum_matching: mean over held-out shapes of the distance to the nearest made one. coverage: share of the held-out
    shapes that are the nearest one of some made shape. floor_matching, floor_coverage: the same of as many training
    shapes in the place of the made ones.
    nearest_training: median distance of a made shape to the nearest training shape; heldout_nearest_training: that of
    held-out shapes. copied_share: made shapes nearer to a training shape than 95 % of the held-out shapes are.
    empty_share: of the made shapes; they count as covering nothing.
    """

    num_made: int
    num_heldout: int
    num_training: int
    minimum_matching: float
    coverage: float
    floor_matching: float
    floor_coverage: float
    nearest_training: float
    heldout_nearest_training: float
    copied_share: float
    empty_share: float
    seed: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        rows = [
            ("shapes", f"{self.num_made} made, {self.num_heldout} held out, {self.num_training} for training"),
            ("minimum matching distance", f"{self.minimum_matching:.4f} (training shapes {self.floor_matching:.4f})"),
            ("coverage", f"{100 * self.coverage:.1f} % (training shapes {100 * self.floor_coverage:.1f} %)"),
            ("nearest training shape", f"{self.nearest_training:.4f} (held-out {self.heldout_nearest_training:.4f})"),
            ("nearer than 95 % of held-out shapes", f"{100 * self.copied_share:.1f} %"),
            ("empty", f"{100 * self.empty_share:.1f} %"),
        ]  # fmt: skip
        return "\n".join(f"{name:<36}{value}" for name, value in rows)


def evaluate_generated(
    made: Sequence,
    heldout: Sequence,
    training: Sequence,
    *,
    seed: int = 0,
    on_step: Callable[..., None] | None = None,
) -> ShapeGenerationReport:
    """Compare made shapes with held-out ones and with those that were trained on.

    Args:
        made, heldout, training: whatever `read_mesh` takes; among `made`, meshes without faces count as empty.
        seed: of the points on the surfaces, and of the training shapes that stand in for made ones.
        on_step: called as shapes are compared.

    Raises:
        InvalidInput: one of the lists is empty, or nothing that was made has a surface.
    """
    for name, meshes in (("made", made), ("heldout", heldout), ("training", training)):
        if not len(meshes):
            raise InvalidInput(f"no {name} shapes to compare")
    solid = [mesh for mesh in made if not hasattr(mesh, "faces") or len(mesh.faces)]
    if not solid:
        raise InvalidInput(f"all {len(made)} made shapes are empty")
    made_points, heldout_points, training_points = (
        [_points_of(mesh, seed) for mesh in meshes] for meshes in (solid, heldout, training)
    )
    total, done = len(solid) + len(heldout_points), 0

    def distances(rows: list[SurfacePoints], columns: list[SurfacePoints]) -> np.ndarray:
        nonlocal done
        table = np.empty((len(rows), len(columns)))
        for index, row in enumerate(rows):
            table[index] = [chamfer(row, column) for column in columns]
            done += 1
            if on_step is not None:
                on_step(min(done, total), total, preview=None)
        return table

    to_training = distances(made_points, training_points)
    heldout_to_training = distances(heldout_points, training_points)
    to_heldout = np.array([[chamfer(one, other) for other in heldout_points] for one in made_points])
    chosen = np.random.default_rng(seed).permutation(len(training_points))[: len(made)]
    near, near_heldout = to_training.min(axis=1), heldout_to_training.min(axis=1)
    matching, coverage = matching_and_coverage(to_heldout)
    floor_matching, floor_coverage = matching_and_coverage(heldout_to_training[:, chosen].T)
    return ShapeGenerationReport(
        num_made=len(made),
        num_heldout=len(heldout),
        num_training=len(training),
        minimum_matching=matching,
        coverage=coverage,
        floor_matching=floor_matching,
        floor_coverage=floor_coverage,
        nearest_training=float(np.median(near)),
        heldout_nearest_training=float(np.median(near_heldout)),
        copied_share=float((near < np.percentile(near_heldout, COPY_PERCENTILE)).mean()),
        empty_share=1 - len(solid) / len(made),
        seed=seed,
    )


def matching_and_coverage(distances: np.ndarray) -> tuple[float, float]:
    """Of distances [made, held out]: the mean of the columns' minima, and the share of columns that some row is
    nearest to.
    """
    return float(distances.min(axis=0).mean()), len(set(distances.argmin(axis=1))) / distances.shape[1]


def _points_of(mesh, seed: int) -> SurfacePoints:
    boxed, _ = normalise(read_mesh(mesh))
    return SurfacePoints.of(boxed, NUM_POINTS, seed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.evaluation.shape_generation", description=__doc__)
    parser.add_argument("generator", help="name or folder of a next-scale generator of shapes")
    parser.add_argument("folder", type=Path, help="a set of meshes with its catalogue, as the generator learned from")
    parser.add_argument("--resolution", type=int, default=64, help="cells a side of the made meshes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        print(_evaluate(arguments).to_json(), end="")
    except MediatokError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _evaluate(arguments: argparse.Namespace) -> ShapeGenerationReport:
    generator = load(arguments.generator)
    names = getattr(generator, "label_names", None)
    if generator.modality != "shape" or not names:
        raise InvalidInput(f"{arguments.generator} holds a {type(generator).__name__}, which makes no labelled shapes")
    entries = read_catalogue(arguments.folder)
    paths = {
        split: [arguments.folder / split / f"{key}.ply" for key, entry in entries.items() if entry["split"] == split]
        for split in ("train", "val")
    }
    labels = [_label_of(entry, names) for entry in entries.values() if entry["split"] == "val"]
    made = generator.generate(labels, seed=arguments.seed, resolution=arguments.resolution)
    return evaluate_generated(made, paths["val"], paths["train"], seed=arguments.seed)


def _label_of(entry: dict[str, str], names: Sequence[str]) -> str:
    for kind in ("object", "category"):
        if (name := str(entry.get(kind, "")).lower()) in names:  # as training names them
            return name
    raise InvalidInput(f"the generator knows neither the object nor the category of {entry.get('name')!r}")


if __name__ == "__main__":
    sys.exit(main())
