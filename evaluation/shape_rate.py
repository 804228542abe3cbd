"""Rate against quality of shapes: a tokenizer after each of its scales, beside decimated meshes of as many bytes.

All are measured on the same meshes with the figures of `mediatok evaluate`. Bytes are those of whole files: the `.mtok`
with its header, and the decimated mesh with its frame (`mesh_packing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..core.errors import InvalidInput
from ..core.meshes import normalise, read_mesh
from .decimate import simplify
from .mesh_packing import pack_mesh, unpack_mesh
from .plot import Curve, plot_curves
from .shape_distances import SurfacePoints, figures_of_nothing, surface_figures
from .shapes import EMPTY, ShapeTruth, inside_figures, mean_figures

BASELINE = "decimated mesh, zlib"
FACE_COUNTS = (12, 24, 48, 96, 160, 256, 384, 640, 1024)
COORDINATE_BITS = (5, 6, 7, 8)
EXTRA_BUDGETS = (2, 4)  # times the bytes of the whole code: what the baseline does with more
BEST_BY = "Chamfer L1"
PLOTTED = "F-score at 0.05"


@dataclass(frozen=True)
class ShapeRatePoint:
    """One way to store some meshes: the bytes of the mean file and how near to the originals it comes.

    codec: name of the tokenizer, or `BASELINE`. setting: how it was used, in words. figures: means over meshes.
    """

    codec: str
    setting: str
    bytes: int
    figures: dict[str, float]

    def as_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def rate_shapes(
    tokenizer,
    meshes: Sequence,
    *,
    resolution: int = 128,
    num_points: int = 20_000,
    seed: int = 0,
    on_step: Callable[..., None] | None = None,
    on_error: Callable[[object, Exception], None] | None = None,
) -> list[ShapeRatePoint]:
    """Measure a shape tokenizer after each scale, and decimated meshes within as many bytes; fewest bytes first.

    For each mesh and each budget the decimated mesh is the nearest (Chamfer L1) that fits, of several numbers of faces
    and roundings; budgets that some mesh cannot be squeezed into are left out.

    Args:
        meshes: whatever `read_mesh` takes.
        num_points: on either surface, and places of either kind.
        on_error: called with (mesh, error) for each unreadable mesh, which is left out; without it the first raises.

    Raises:
        InvalidInput: no readable mesh.
    """
    coded: list[list[tuple[int, dict[str, float]]]] = []  # of each mesh: bytes and figures after each scale
    decimated: list[list[tuple[int, dict[str, float]]]] = []
    for number, source in enumerate(meshes):
        try:
            mesh = read_mesh(source)
            truth = ShapeTruth.of(mesh, num_points, seed)
        except InvalidInput as error:
            if on_error is None:
                raise
            on_error(source, error)
            continue
        coded.append(_coded(tokenizer, mesh, truth, resolution, num_points, seed))
        decimated.append(_decimated(mesh, truth, num_points, seed))
        if on_step is not None:
            on_step(number + 1, len(meshes), preview=None)
    if not coded:
        raise InvalidInput(f"none of the {len(meshes)} meshes could be read")
    points = []
    for scale, ways in enumerate(zip(*coded, strict=True), 1):
        setting = f"{scale} scale{'s' if scale > 1 else ''}, {sum(tokenizer.scales[:scale])} tokens"
        points.append(_mean_point(tokenizer.name, setting, ways))
    whole = points[-1].bytes
    for budget in [point.bytes for point in points] + [factor * whole for factor in EXTRA_BUDGETS]:
        best = [_best_within(ways, budget) for ways in decimated]
        if all(best):
            points.append(_mean_point(BASELINE, f"within {budget} bytes", best))
    return sorted(points, key=lambda point: (point.bytes, point.codec))


def _coded(
    tokenizer, mesh, truth: ShapeTruth, resolution: int, num_points: int, seed: int
) -> list[tuple[int, dict[str, float]]]:
    tokens = tokenizer.encode(mesh, seed=seed)
    ways = []
    for scale in range(1, len(tokenizer.scales) + 1):
        part = tokens.up_to_scale(scale)
        inside = inside_figures(tokenizer, part, truth, with_scales=False)
        decoded = truth.into_box(tokenizer.decode(part, resolution=resolution))
        ways.append((part.num_bytes, inside | _surface(decoded, truth, num_points, seed)))
    return ways


def _decimated(mesh, truth: ShapeTruth, num_points: int, seed: int) -> list[tuple[int, dict[str, float]]]:
    boxed, frame = normalise(mesh)
    ways = []
    for small in simplify(boxed, [count for count in FACE_COUNTS if count < len(boxed.faces)]) or [boxed]:
        for bits in COORDINATE_BITS:
            data = pack_mesh(small, frame, bits)
            if data is not None:
                ways.append((len(data), _surface(unpack_mesh(data)[0], truth, num_points, seed)))
    return ways


def _surface(decoded, truth: ShapeTruth, num_points: int, seed: int) -> dict[str, float]:
    """Figures of a mesh in the box."""
    if not len(decoded.faces) or not decoded.area > 0:
        return figures_of_nothing() | {EMPTY: 1.0}
    points = SurfacePoints.of(decoded, num_points, seed + 2)
    return surface_figures(truth.surface, points) | {EMPTY: 0.0}


def _best_within(ways: Sequence[tuple[int, dict[str, float]]], budget: float) -> tuple[int, dict[str, float]] | None:
    fitting = [way for way in ways if way[0] <= budget and not way[1][EMPTY]]
    return min(fitting, key=lambda way: way[1][BEST_BY]) if fitting else None


def _mean_point(codec: str, setting: str, ways: Sequence[tuple[int, dict[str, float]]]) -> ShapeRatePoint:
    values: dict[str, list[float]] = {}
    for _, figures in ways:
        for name, value in figures.items():
            values.setdefault(name, []).append(value)
    return ShapeRatePoint(
        codec, setting, round(sum(size for size, _ in ways) / len(ways)), mean_figures(values, len(ways))[0]
    )


def format_points(points: Sequence[ShapeRatePoint]) -> str:
    """A table, one line a point."""
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    widths = [max(len(name), 8) for name in names]
    head = "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
    lines = [f"{'codec':<22}{'setting':<24}{'bytes':>7}  {head}"]
    for point in points:
        cells = "  ".join(
            (f"{point.figures[name]:.4f}" if name in point.figures else "-").rjust(width)
            for name, width in zip(names, widths, strict=True)
        )
        lines.append(f"{point.codec:<22}{point.setting:<24}{point.bytes:>7}  {cells}")
    return "\n".join(lines)


def plot_shape_rate(points: Sequence[ShapeRatePoint], path: str | Path, title: str = "") -> None:
    """Write a PNG: the F-score at 0.05 over bytes, a line for each codec."""
    by_codec: dict[str, list[ShapeRatePoint]] = {}
    for point in points:
        by_codec.setdefault(point.codec, []).append(point)
    curves: Mapping[str, Curve] = {
        codec: Curve(
            [point.bytes for point in group],
            [point.figures.get(PLOTTED, 0.0) for point in group],
            () if codec == BASELINE else [point.setting.partition(",")[0] for point in group],
        )
        for codec, group in by_codec.items()
    }
    plot_curves(curves, path, "bytes of the whole file", PLOTTED, title)
