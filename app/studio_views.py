"""Pieces of the page as HTML: the title bar, the numbers, the token grid, tables. Values are escaped here."""

from __future__ import annotations

import math
from html import escape

from .studio_actions import Result
from .studio_models import ModelRow

MAX_GRID_TOKENS = 1024  # more cells than this are neither readable nor quick to draw
GOLDEN = 2654435761  # Knuth's multiplicative hash: neighbouring codes get unlike colours, the same in every session


def hue(code: int) -> int:
    """Colour of a codebook entry: degrees on the colour wheel, stable over sessions and models."""
    return (code * GOLDEN % 2**32) * 360 // 2**32


def file_size(num_bytes: float) -> str:
    """Bytes as people read them; small files, the subject here, to the byte."""
    if num_bytes < 10_000:
        return f"{num_bytes:.0f} B"
    power = min(int(math.log(num_bytes, 1024)), 3)
    return f"{num_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def decibels(psnr: float | None) -> str:
    """PSNR, or a dash where there is no original."""
    if psnr is None:
        return "–"
    return "exact" if math.isinf(psnr) else f"{psnr:.2f} dB"


def seconds(value: float) -> str:
    """A duration: milliseconds below one second."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def measures(result: Result) -> list[tuple[str, str, str]]:
    """(name, value, remark) of everything that is measured on a result; the same words in every tab."""
    if result.tokens is None:
        tokens, size, remark, bpp = "–", "–", "continuous latents", "–"
    else:
        tiles = "" if result.num_tiles == 1 else f" × {result.num_tiles} tiles"
        tokens, size = str(result.tokens_per_tile), file_size(result.tokens.num_bytes)
        remark = f"of {result.max_tokens}{tiles}"
        if result.scales:
            remark += f", {result.num_scales} of {len(result.scales)} scales"
        bpp = f"{result.bits_per_pixel:.3f}"
    bits = "" if result.tokens is None else f"{result.tokens.bits_per_token} bits each"
    return [
        ("Tokens", tokens, remark),
        ("Bytes", size, bits),
        ("Bits per pixel", bpp, f"{result.image.width} × {result.image.height} px"),
        (
            "PSNR",
            decibels(result.psnr),
            "no original" if result.reference is None else ("edited" if result.edits else ""),
        ),
        ("Time", seconds(result.seconds), "encode + decode"),
        ("Device", result.device, ""),
    ]


def numbers(result: Result) -> str:
    """The strip of numbers above the pictures."""
    return number_strip(measures(result))


def number_strip(rows: list[tuple[str, str, str]]) -> str:
    """(name, value, remark) side by side."""
    cells = "".join(
        f'<div class="mt-number" data-name="{name}"><span class="name">{name}</span>'
        f'<span class="value">{escape(value)}</span><span class="remark">{escape(remark)}</span></div>'
        for name, value, remark in rows
    )
    return f'<div class="mt-numbers" role="status" aria-live="polite">{cells}</div>'


def token_grid(result: Result) -> str:
    """All tokens in order as coloured cells, dropped ones as outlines; cells carry their position in `data-i`."""
    ids = result.ids()
    if not ids:
        return '<div class="mt-empty">This tokenizer has continuous latents, no tokens to show.</div>'
    dropped = (result.max_tokens - result.tokens_per_tile) if result.num_tiles == 1 else 0
    shown, total = ids[:MAX_GRID_TOKENS], min(len(ids) + dropped, MAX_GRID_TOKENS)
    columns = next(c for c in (8, 16, 32) if total <= c * c or c == 32)
    size = {8: "large", 16: "medium", 32: "small"}[columns]
    cells = []
    for position, code in enumerate(shown):
        kind = "mt-token edited" if position in result.edits else "mt-token"
        name = f"Token {position + 1}, code {code}"
        cells.append(
            f'<button type="button" class="{kind}" data-i="{position}" style="--h:{hue(code)}" title="{name}" '
            f'aria-label="{name}">{code}</button>'
        )
    cells += ['<span class="mt-token dropped" title="dropped"></span>'] * (total - len(shown))
    rest = f'<p class="mt-hint">The first {MAX_GRID_TOKENS} of {len(ids)} tokens.</p>' if len(ids) > len(shown) else ""
    return f'<div class="mt-grid {size}" style="--columns:{columns}">{"".join(cells)}</div>{rest}'


# Arrow keys move between tokens; the chosen cell is marked in the browser, so that a click answers at once.
GRID_SCRIPT = """
element.addEventListener('click', (event) => {
  const cell = event.target.closest('button.mt-token');
  if (!cell) return;
  element.querySelectorAll('.chosen').forEach((other) => other.classList.remove('chosen'));
  cell.classList.add('chosen');
  trigger('click', {position: Number(cell.dataset.i)});
});
element.addEventListener('keydown', (event) => {
  const cell = event.target.closest('button.mt-token');
  const cells = [...element.querySelectorAll('button.mt-token')];
  const columns = Number(getComputedStyle(element.querySelector('.mt-grid')).getPropertyValue('--columns'));
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[event.key];
  if (!cell || !step) return;
  event.preventDefault();
  const next = cells[cells.indexOf(cell) + step];
  if (next) next.focus();
});
"""


def compare_table(results: list[Result], notes: list[str]) -> str:
    """Numbers of two or more results side by side; the best value of a row is bold."""
    names = "".join(f"<th>{escape(result.model_name)}</th>" for result in results)
    rows = []
    columns = [measures(result) for result in results]
    for index, (name, _, _) in enumerate(columns[0]):
        best = _best(name, results)
        cells = []
        for column, (_, value, remark) in enumerate(row[index] for row in columns):
            text = f"<strong>{escape(value)}</strong>" if column in best else escape(value)
            cells.append(f'<td>{text} <span class="remark">{escape(remark)}</span></td>')
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    hints = "".join(f'<p class="mt-hint">{escape(note)}</p>' for note in notes if note)
    table = f"<thead><tr><th></th>{names}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<table class="mt-table compare">{table}</table>{hints}'


def _best(name: str, results: list[Result]) -> set[int]:
    """Columns with the best value of a row; none if all are equal or the row has no better or worse."""
    value = {
        "Bytes": lambda r: r.tokens and r.tokens.num_bytes,
        "Tokens": lambda r: r.tokens and r.tokens_per_tile,
        "Bits per pixel": lambda r: r.bits_per_pixel,
        "PSNR": lambda r: None if r.psnr is None else -r.psnr,
        "Time": lambda r: r.seconds,
    }.get(name)
    values = [None if value is None else value(result) for result in results]
    if any(v is None for v in values) or len(set(values)) == 1:
        return set()
    return {i for i, v in enumerate(values) if v == min(values)}


def models_table(rows: list[ModelRow], loaded: dict[str, int]) -> str:
    """What is known, what is here, and what is in memory."""
    lines = []
    for row in rows:
        memory = file_size(loaded[row.source]) if row.source in loaded else "–"
        parameters = "–" if row.parameters is None else f"{row.parameters / 1e6:.1f} M"
        kind = "here" if row.is_here else "away"
        lines.append(
            f'<tr class="{kind}{" loaded" if row.source in loaded else ""}"><th>{escape(row.label)}</th>'
            f'<td><span class="mt-status {kind}">{escape(row.status)}</span></td><td class="figure">{parameters}</td>'
            f'<td class="figure">{memory}</td><td>{escape(row.licence or "–")}</td>'
            f"<td>{escape(row.description)}</td></tr>"
        )
    head = "".join(
        f'<th class="{"figure" if name in ("Parameters", "In memory") else ""}">{name}</th>'
        for name in ("Model", "Weights", "Parameters", "In memory", "Licence", "What it is")
    )
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="mt-scroll"><table class="mt-table">{table}</table></div>'


def title_bar(device: str, model_memory: int, process_memory: int) -> str:
    """Name, device and memory, docs, and the switch between light and dark."""
    return (
        '<header class="mt-title"><span class="mt-name">mediatok <em>studio</em></span>'
        f'<span class="mt-facts"><span>{escape(device)}</span><span>models {file_size(model_memory)}</span>'
        f"<span>process {file_size(process_memory)}</span></span>"
        f'<nav><button type="button" id="mt-theme" aria-label="Switch between light and dark">Light / dark</button>'
        '<button type="button" id="mt-docs">Docs</button></nav></header>'
    )
