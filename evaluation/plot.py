"""Curves of quality over size, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.files import atomic_write


@dataclass(frozen=True)
class Curve:
    """One line of a plot. labels: at its points, for the curve that the plot is about; others are drawn thinner."""

    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()


def plot_curves(curves: Mapping[str, Curve], path: str | Path, x_label: str, y_label: str, title: str = "") -> None:
    """Write a PNG with one line a curve over a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        marker, width = ("o", 2) if curve.labels else (".", 1.2)
        axes.plot(curve.x, curve.y, marker=marker, linewidth=width, label=name)
        for label, x, y in zip(curve.labels, curve.x, curve.y, strict=bool(curve.labels)):
            axes.annotate(label, (x, y), (0, 6), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    if curves:
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
