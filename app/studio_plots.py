"""The rate-distortion plot as SVG: crisp at any zoom, coloured by the page's style so that light and dark both read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..evaluation.rate import RatePoint

WIDE, NARROW, HEIGHT = 580, 350, 232  # px; the page shows one of two widths so that letters never shrink
LEFT, RIGHT, TOP, BOTTOM = 40, 78, 12, 34
BYTE_TICKS = [m * 10**e for e in range(1, 8) for m in (1, 2, 5)]
MAX_PSNR = 60.0  # an exact copy has infinite PSNR; it is drawn here


def rate_plot(curves: dict[str, Sequence[RatePoint]], own: str, mark: tuple[int, float] | None, note: str = "") -> str:
    """PSNR over file size, one line a curve, in two widths.

    Args:
        curves: name -> points, smallest file first; `own` names the tokenizer's, which gets the accent colour.
        mark: (bytes, dB) of what the page shows now.
        note: a sentence in place of curves that are not there.
    """
    curves = {name: [(p.bytes, min(p.psnr, MAX_PSNR), p.setting) for p in points] for name, points in curves.items()}
    curves = _trim({name: points for name, points in curves.items() if points}, own, mark)
    pictures = "".join(_svg(curves, own, mark, note, width) for width in (WIDE, NARROW))
    return f'<div class="mt-plot">{pictures}</div>'


def _trim(curves: dict, own: str, mark) -> dict:
    """Leave out codec points far above what the tokenizer reaches; they would squeeze the part that matters."""
    best = max([psnr for _, psnr, _ in curves.get(own, [])] + ([min(mark[1], MAX_PSNR)] if mark else []), default=22)
    best = max(best, 22)
    return {
        name: points if name == own else [p for i, p in enumerate(points) if p[1] <= best + 8 or i < 2]
        for name, points in curves.items()
    }


def _svg(curves: dict, own: str, mark, note: str, width: int) -> str:
    spots = [point[:2] for points in curves.values() for point in points]
    if mark:
        spots.append((mark[0], min(mark[1], MAX_PSNR)))
    if not spots:
        spots = [(50, 10), (5000, 40)]
    low_x, high_x = math.log10(min(x for x, _ in spots) * 0.8), math.log10(max(x for x, _ in spots) * 1.25)
    low_y, high_y = math.floor(min(y for _, y in spots) - 1), math.ceil(max(y for _, y in spots) + 1)

    def px(num_bytes: float) -> float:
        return LEFT + (math.log10(num_bytes) - low_x) / (high_x - low_x) * (width - LEFT - RIGHT)

    def py(psnr: float) -> float:
        return TOP + (high_y - psnr) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(px, py, low_x, high_x, low_y, high_y, width)]
    labels = []
    for name, points in curves.items():
        kind = "own" if name == own else name.lower()
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in points)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        for x, y, setting in points:
            radius = 3 if name == own else 2
            title = f"{escape(name)}: {x} B, {y:.2f} dB ({escape(setting)})"
            parts.append(
                f'<circle class="dot {kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="{radius}">'
                f"<title>{title}</title></circle>"
            )
        labels.append([py(points[-1][1]), px(points[-1][0]), kind, "this model" if name == own else name])
    if mark:
        x, y = px(mark[0]), py(min(mark[1], MAX_PSNR))
        parts.append(
            f'<line class="guide" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{HEIGHT - BOTTOM}"/>'
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="6">'
            f"<title>now: {mark[0]} B, {mark[1]:.2f} dB</title></circle>"
        )
    parts += _end_labels(labels, width)
    if note:
        parts.append(
            f'<text class="note" x="{(LEFT + width - RIGHT) / 2:.0f}" y="{HEIGHT / 2:.0f}">{escape(note)}</text>'
        )
    size = "wide" if width == WIDE else "narrow"
    summary = "PSNR over file size for " + ", ".join(escape(name) for name in curves) if curves else "no curves yet"
    return (
        f'<svg class="{size}" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{summary}">{"".join(parts)}</svg>'
    )


def _axes(px, py, low_x, high_x, low_y, high_y, width) -> str:
    parts = []
    step = next(step for step in (1, 2, 5, 10, 20) if (high_y - low_y) / step <= 6)
    for value in range(math.ceil(low_y / step) * step, high_y + 1, step):
        y = py(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 6}" y="{y + 4:.1f}">{value}</text>')
    last = -100.0
    for value in BYTE_TICKS:
        if low_x <= math.log10(value) <= high_x and px(value) - last > 38:
            last = px(value)
            parts.append(f'<line class="grid" x1="{last:.1f}" x2="{last:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text class="tick x" x="{last:.1f}" y="{HEIGHT - BOTTOM + 14}">{short_number(value)}</text>')
    middle = (LEFT + width - RIGHT) / 2
    parts.append(f'<text class="title x" x="{middle:.0f}" y="{HEIGHT - 4}">bytes of the whole file</text>')
    parts.append(
        f'<text class="title y" transform="translate(10 {(HEIGHT - BOTTOM + TOP) / 2:.0f}) rotate(-90)">PSNR, dB</text>'
    )
    return "".join(parts)


def _end_labels(labels: list[list], width: int) -> list[str]:
    """Names at the ends of the lines, pushed apart where they would touch."""
    parts, last = [], -100.0
    for y, x, kind, name in sorted(labels):
        y = max(y, last + 13)
        last = y
        parts.append(
            f'<text class="name {kind}" x="{min(x + 12, width - RIGHT + 8):.1f}" y="{y + 4:.1f}">{escape(name)}</text>'
        )
    return parts


def short_number(value: int) -> str:
    """2000 -> "2k"."""
    return f"{value // 1000}k" if value >= 1000 else str(value)
