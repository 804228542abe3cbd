"""The Generate tab's pieces of HTML: the gallery that fills in, and the chosen picture with its pieces to keep."""

from __future__ import annotations

import base64
import io
import math
from html import escape

import torch
from PIL import Image

from ..core.images import to_pil
from .studio_generation import Gallery, Progress
from .studio_views import hue, number_strip, seconds

MAX_CAPTION = 40  # characters of a label or prompt
ASPECT = 1.4  # the gallery is about this much wider than high


def gallery_numbers(gallery: Gallery, *, stopped: bool = False) -> str:
    """The strip of numbers above the gallery."""
    count = len(gallery.pictures)
    seeds = [picture.recipe.seed for picture in gallery.pictures]
    rate = f"{count / gallery.seconds:.2f} pictures/s" if gallery.seconds else ""
    remark = f"stopped, {gallery.asked} asked" if stopped else gallery.model_name
    return number_strip([
        ("Pictures", str(count), remark),
        ("Seed" if count == 1 else "Seeds", str(seeds[0]) if seeds else "–", f"to {seeds[-1]}" if count > 1 else ""),
        ("Steps", gallery.steps, "a cell" if gallery.unit_grid else ""),
        ("Guidance", f"{gallery.guidance:g}", ""),
        ("Time", seconds(gallery.seconds), rate),
        ("Device", gallery.device, ""),
    ])  # fmt: skip


def gallery_grid(gallery: Gallery, chosen: int | None = 0) -> str:
    """Finished pictures as buttons, with their number in `data-i`."""
    return _grid([_finished(gallery, index, index == chosen) for index in range(len(gallery.shown))])


def progress_grid(progress: Progress) -> str:
    """Finished pictures, those in the making, and empty places."""
    gallery = progress.gallery
    cells = [_finished(gallery, index, False) for index in range(len(gallery.shown))]
    free = gallery.asked - len(gallery.pictures)
    if progress.previews is not None:
        making = [_source(to_pil(preview)) for preview in progress.previews[:free]]
        cells += [f'<figure class="making"><img alt="in the making" src="{source}"></figure>' for source in making]
        free -= len(making)
    cells += ['<figure class="empty"></figure>'] * free
    return _grid(cells, progress.share)


def waiting_grid(count: int, num_jobs: int) -> str:
    """Empty places, and how many jobs of others come first."""
    before = max(num_jobs - 1, 0)
    note = f"waiting for {before} other job{'s' if before > 1 else ''}" if before else "starting"
    return _grid(['<figure class="empty"></figure>'] * count, 0.0, note)


def _grid(cells: list[str], share: float | None = None, note: str = "") -> str:
    columns, rows = _layout(len(cells))
    percent = "" if share is None else f'<span style="width:{100 * share:.0f}%"></span>'
    label = "" if share is None else escape(note or f"{100 * share:.0f} %")
    return (
        f'<div class="mt-progress" role="progressbar" aria-label="{label}">{percent}<em>{label}</em></div>'
        f'<div class="mt-gallery" style="--columns:{columns};--rows:{rows}">{"".join(cells)}</div>'
    )


def _layout(count: int) -> tuple[int, int]:
    """Columns and rows in which `count` squares are largest, and few places stay empty."""
    options = [(columns, math.ceil(count / columns)) for columns in range(1, max(count, 1) + 1)]
    return max(options, key=lambda option: (min(ASPECT / option[0], 1 / max(option[1], 1)), -option[0] * option[1]))


def _finished(gallery: Gallery, index: int, chosen: bool) -> str:
    picture = gallery.shown[index]
    name = f"{gallery.label(picture)}, seed {picture.recipe.seed}"
    is_origin = picture is gallery.origin
    caption = "before" if is_origin else f"seed {picture.recipe.seed} · {seconds(picture.seconds)}"
    if len({made.recipe.label for made in gallery.pictures}) > 1:
        caption += f" · {escape(gallery.label(picture)[:MAX_CAPTION])}"
    return (
        f'<button type="button" class="mt-made{" chosen" if chosen else ""}" data-i="{index}" '
        f'title="{escape(name)}" aria-label="{escape(name)}"><img alt="" src="{_source(picture.image)}">'
        f"<small>{caption}</small></button>"
    )


def chosen_panel(gallery: Gallery, index: int) -> str:
    """The chosen picture, large, and its units as switches: over the picture, or beside it where they have no place."""
    picture = gallery.shown[index]
    word, words = gallery.unit_word, f"{gallery.unit_word}s"
    image = f'<img alt="{escape(gallery.label(picture))}" src="{_source(picture.image)}">'
    num_units = gallery.units_of(picture)
    if not num_units:
        heading = f"{escape(gallery.label(picture))} <small>seed {picture.recipe.seed}</small>"
        body = f'<div class="mt-vary over"><div class="mt-canvas">{image}</div></div>'
        return f'<h3 class="mt-heading">{heading}</h3>{body}<div class="mt-acts"></div>'
    if gallery.unit_grid is not None:
        rows, columns = gallery.unit_grid
        switches = "".join(_switch(unit, f"{word.title()} {unit + 1}") for unit in range(num_units))
        body = (
            f'<div class="mt-canvas">{image}<div class="mt-units over" style="--columns:{columns};--rows:{rows}">'
            f"{switches}</div></div>"
        )
    else:
        codes = picture.content[0].tolist() if gallery.unit_word == "token" else range(num_units)
        switches = "".join(_switch(unit, f"{word.title()} {unit + 1}", hue(code)) for unit, code in enumerate(codes))
        columns = min(num_units, 8 if num_units <= 64 else 16)
        body = (
            f'<div class="mt-canvas">{image}</div>'
            f'<div class="mt-units beside" style="--columns:{columns}">{switches}</div>'
        )
    choices = [("all", "Keep all"), ("none", "None"), ("invert", "Invert")]
    choices = choices[:2] if gallery.unit_word == "scale" else choices  # the first ones of these stay, or none
    acts = "".join(f'<button type="button" data-act="{act}">{text}</button>' for act, text in choices)
    return (
        f'<h3 class="mt-heading">{escape(gallery.label(picture))} <small>seed {picture.recipe.seed}; '
        f"click the {words} to keep</small></h3>"
        f'<div class="mt-vary {"over" if gallery.unit_grid else "beside"}">{body}</div>'
        f'<div class="mt-acts">{acts}<output data-words="{words}">0 of {num_units} {words} kept</output>'
        '<button type="button" class="redo" data-act="redo" id="generate-redo">Redo the rest</button></div>'
    )


def _switch(unit: int, name: str, colour: int | None = None) -> str:
    style = "" if colour is None else f' style="--h:{colour}"'
    return (
        f'<button type="button" class="mt-unit" data-i="{unit}" aria-pressed="false" title="{name}" '
        f'aria-label="Keep {name}"{style}></button>'
    )


def _source(image: Image.Image | torch.Tensor) -> str:
    """A picture as a data address: it comes with the page, so that nothing flickers."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=92, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


GALLERY_SCRIPT = """
element.addEventListener('click', (event) => {
  const made = event.target.closest('button.mt-made');
  if (!made) return;
  element.querySelectorAll('.chosen').forEach((other) => other.classList.remove('chosen'));
  made.classList.add('chosen');
  trigger('click', {index: Number(made.dataset.i)});
});
"""

# Switches answer in the browser; the server hears of them when the rest is to be made anew.
VARY_SCRIPT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const units = [...element.querySelectorAll('.mt-unit')];
  const isKept = (unit) => unit.getAttribute('aria-pressed') === 'true';
  const keep = (unit, value) => unit.setAttribute('aria-pressed', String(value));
  const act = button.dataset.act;
  if (button.classList.contains('mt-unit')) keep(button, !isKept(button));
  const told = element.querySelector('output');
  if (button.classList.contains('mt-unit') && told.dataset.words === 'scales') {  // coarse ones stay before finer ones
    const at = units.indexOf(button), last = isKept(button) ? at : at - 1;
    units.forEach((unit, index) => keep(unit, index <= last));
  }
  if (act === 'all' || act === 'none') units.forEach((unit) => keep(unit, act === 'all'));
  if (act === 'invert') units.forEach((unit) => keep(unit, !isKept(unit)));
  const kept = units.filter(isKept);
  told.textContent = `${kept.length} of ${units.length} ${told.dataset.words} kept`;
  if (act === 'redo') trigger('submit', {keep: kept.map((unit) => Number(unit.dataset.i))});
});
"""
