"""What is left of a shape after a tokenizer: its inside, its surface, and in how many bytes.

Published figures of 3D tokenizers follow many protocols; this is ours, whole: each mesh is moved into the box
[-1, 1]^3, its longest side 1.9, and everything is measured there.

Shape suffixes: N points, K scales.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.meshes import MESH_SUFFIXES, normalise, read_mesh
from ..core.solids import solid_of
from ..core.surfaces import sample_surface
from .report import Protocol, Report, set_hash
from .shape_distances import SurfacePoints, figures_of_nothing, surface_figures
from .shape_points import NEAR_SPREADS, intersection_over_union, near_points, uniform_points

QUERY_CHUNK = 2**16
EMPTY = "share of empty meshes"


@torch.inference_mode()
def evaluate_shapes(
    tokenizer,
    meshes,
    *,
    set_name: str | None = None,
    resolution: int = 128,
    num_points: int = 100_000,
    seed: int = 0,
    on_step: Callable[..., None] | None = None,
    on_error: Callable[[object, Exception], None] | None = None,
) -> Report:
    """Encode and decode every mesh and measure what comes out.

    IoU compares the decoded field (inside where its logit is at least 0) with the mesh's inside at `num_points` places
    uniform in the box, and apart from these at as many near the surface. CS-IoU is the mean IoU of the fields after
    each scale but the last with the field after the last. Distances are between `num_points` points of either surface;
    the original's is taken as it is, with what it has inside. Figures are means over the meshes that they can say
    something of: distances leave out empty results, IoU what has no inside.

    Args:
        meshes: a folder, or a list of whatever `read_mesh` takes.
        set_name: what the report calls the set; default the folder's name.
        resolution: cells a side of the decoded meshes.
        seed: of the points on both surfaces, of the places, and of the points that the tokenizer reads.
        on_step: called with the number of finished meshes and their total.
        on_error: called with (mesh, error) for each unreadable mesh, which is then left out; without it the first one
            raises.

    Raises:
        InvalidInput: no readable mesh.
    """
    if tokenizer.modality != "shape":
        raise InvalidInput(f"{tokenizer.name} is no shape tokenizer; it codes {tokenizer.modality}")
    sources, set_name = mesh_sources(meshes, set_name)
    values: dict[str, list[float]] = {}
    digests, file_bytes, id_bits, methods, compute = [], 0, 0, {}, 0.0
    start_time = time.perf_counter()
    for number, source in enumerate(sources):
        try:
            mesh = read_mesh(source)
            truth = ShapeTruth.of(mesh, num_points, seed)
        except InvalidInput as error:
            if on_error is None:
                raise
            on_error(source, error)
            continue
        begin = time.perf_counter()
        tokens = tokenizer.encode(mesh, seed=seed)
        decoded = tokenizer.decode(tokens, resolution=resolution)
        compute += time.perf_counter() - begin
        figures = inside_figures(tokenizer, tokens, truth) | decoded_figures(decoded, truth, num_points, seed)
        for name, value in figures.items():
            values.setdefault(name, []).append(value)
        digests.append(_digest(source, mesh))
        file_bytes += tokens.num_bytes
        id_bits += tokens.ids.numel() * tokens.bits_per_token
        methods[truth.method] = methods.get(truth.method, 0) + 1
        if on_step is not None:
            on_step(number + 1, len(sources), preview=None)
    if not digests:
        raise InvalidInput(f"none of the {len(sources)} meshes of {set_name} could be read")
    count = len(digests)
    figures, notes = mean_figures(values, count)
    figures |= {
        "bytes (.mtok file)": file_bytes / count,
        "bytes (ids alone)": id_bits / 8 / count,
        "seconds to encode and decode": compute / count,
    }
    protocol = Protocol(
        modality="shape",
        set_name=set_name,
        num_items=count,
        set_sha256=set_hash(digests),
        preprocessing="centred, longest side 1.9 in the box [-1, 1]^3",
        postprocessing=f"surface of the field on a grid of {resolution} cells a side",
        metrics=f"per mesh, in the box: {num_points:,} places or points of each kind, seed {seed}; then averaged",
        settings={"near": f"surface points moved by Gaussian noise of deviation {' or '.join(map(str, NEAR_SPREADS))}"},
    )
    told_by = ", ".join(f"{method} {number}" for method, number in sorted(methods.items()))
    return Report(
        model=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        dtype=str(tokenizer.dtype).removeprefix("torch."),
        device=str(tokenizer.device),
        num_tokens=tokenizer.max_tokens,
        protocol=protocol,
        figures=figures,
        notes=(*notes, f"inside of the originals told by: {told_by}"),
        seconds=time.perf_counter() - start_time,
    )


@dataclass(frozen=True)
class ShapeTruth:
    """What a mesh really is, in the box: its surface, and its inside at places of both kinds.

    centre, scale: place p of the box is centre + scale * p of the mesh's world. method: how inside was told.
    """

    centre: np.ndarray
    scale: float
    surface: SurfacePoints
    places_N3: dict[str, Tensor]
    inside_N: dict[str, Tensor]
    method: str

    @classmethod
    def of(cls, mesh, num_points: int, seed: int) -> ShapeTruth:
        """Measure `mesh`; two calls with one seed give the same."""
        boxed, frame = normalise(mesh)
        solid = solid_of(boxed)
        surface = SurfacePoints.of(boxed, num_points, seed)
        rng = np.random.default_rng([seed, 1])
        # Not the points of `surface`: their noise would then know where the original was sampled.
        near_source_N3, _ = sample_surface(boxed, num_points, seed + 1)
        places = {"uniform": uniform_points(num_points, rng), "near": near_points(near_source_N3, rng)}
        inside = {kind: solid.contains(places_N3) for kind, places_N3 in places.items()}
        centre = np.array([frame.x, frame.y, frame.z])
        return cls(centre, frame.scale, surface, places, inside, solid.method)

    def into_box(self, mesh):
        """A mesh of the original's world, moved into the box."""
        moved = mesh.copy()
        moved.vertices = (np.asarray(mesh.vertices) - self.centre) / self.scale
        return moved


def inside_figures(tokenizer, tokens, truth: ShapeTruth, with_scales: bool = True) -> dict[str, float]:
    """IoU at both kinds of places, accuracy near the surface, and CS-IoU (`with_scales`) of one item's tokens."""
    (field,) = tokenizer.decode_fields(tokens)
    decoded = {kind: inside_of(field, places_N3) for kind, places_N3 in truth.places_N3.items()}
    figures = {}
    for kind, inside_N in truth.inside_N.items():
        iou = intersection_over_union(decoded[kind], inside_N)
        figures[f"IoU ({kind})"] = iou if bool(inside_N.any()) else math.nan
    figures["accuracy (near)"] = float((decoded["near"] == truth.inside_N["near"]).float().mean())
    num_scales = len(tokenizer.scales)
    if with_scales and num_scales > 1:
        parts = [tokenizer.decode_fields(tokens.up_to_scale(k))[0] for k in range(1, num_scales)]
        ious = [
            intersection_over_union(inside_of(part, truth.places_N3["uniform"]), decoded["uniform"]) for part in parts
        ]
        figures["CS-IoU"] = sum(ious) / len(ious)
    return figures


def decoded_figures(decoded, truth: ShapeTruth, num_points: int, seed: int) -> dict[str, float]:
    """Distances between the original's surface and a mesh of its world, and whether that is empty (1 or 0)."""
    if not len(decoded.faces):
        return figures_of_nothing() | {EMPTY: 1.0}
    points = SurfacePoints.of(truth.into_box(decoded), num_points, seed + 2)
    return surface_figures(truth.surface, points) | {EMPTY: 0.0}


def inside_of(field, places_N3: Tensor) -> Tensor:
    """Whether a decoded field is at least 0 at each place: bool [N], on the CPU."""
    chunks = [field.occupancy(part_N3[None].to(field.device))[0] >= 0 for part_N3 in places_N3.split(QUERY_CHUNK)]
    return torch.cat(chunks).cpu()


def mean_figures(values: Mapping[str, list[float]], count: int) -> tuple[dict[str, float], list[str]]:
    """Means of what is not NaN, and notes on how many meshes are missing."""
    figures, missing = {}, {}
    for name, numbers in values.items():
        known = [number for number in numbers if math.isfinite(number)]
        if known:
            figures[name] = sum(known) / len(known)
        if len(known) < count:
            missing.setdefault(count - len(known), []).append(name)
    notes = [f"{', '.join(names)}: without {number} of {count} meshes" for number, names in missing.items()]
    return figures, notes


def mesh_sources(meshes, set_name: str | None) -> tuple[list, str]:
    """The meshes as a list, and the set's name; a folder is searched recursively.

    Raises:
        InvalidInput: an empty list, or a folder without meshes.
    """
    if isinstance(meshes, (str, Path)) and Path(meshes).is_dir():
        found = sorted(path for path in Path(meshes).rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
        sources, set_name = found, set_name or Path(meshes).resolve().name
    else:
        sources = list(meshes) if isinstance(meshes, (list, tuple)) else [meshes]
    if not sources:
        raise InvalidInput(f"{set_name or 'the list'} holds no meshes ({', '.join(MESH_SUFFIXES)})")
    return sources, set_name or "meshes"


def _digest(source, mesh) -> str:
    """SHA-256 of a file, or of the triangles of what is none."""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    corners = np.asarray(mesh.vertices, dtype=np.float32)[np.asarray(mesh.faces)]
    return hashlib.sha256(corners.tobytes()).hexdigest()
