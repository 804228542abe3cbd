"""The same action as Python and as a command, for "Show code"."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from .studio_actions import Result
from .studio_generation import Gallery, Made, Recipe

DECODING_FLAGS = ("steps", "guidance", "seed")
FLAGS = {"num_tokens": "--num-tokens", "target_psnr": "--target-psnr", "max_bytes": "--max-bytes"}


def python_code(result: Result) -> str:
    """Python that repeats what the page shows."""
    name, stem = result.picture_name, safe_stem(result.picture_name)
    lines = ["import mediatok as mt", "", f"tokenizer = mt.load({result.source!r})"]
    text = "" if result.caption is None else f", text={result.caption!r}"
    text += "".join(f", {key}={value!r}" for key, value in result.decoding.items())
    if result.tokens is None:
        return "\n".join(
            [*lines, f"image = tokenizer.reconstruct({name!r}{text})", f'image.save("{stem}-decoded.png")']
        )
    if result.reference is None:
        lines.append(f"tokens = mt.Tokens.load({name!r})")
    else:
        options = "".join(f", {key}={value!r}" for key, value in result.options.items())
        lines.append(f"tokens = tokenizer.encode({name!r}{options})")
    lines += [f"tokens.ids[0, {position}] = {code}" for position, code in sorted(result.edits.items())]
    lines += [
        f'tokens.save("{stem}.mtok")  # {result.tokens.num_bytes} bytes',
        f"image = tokenizer.decode(tokens{text})",
        f'image.save("{stem}-decoded.png")',
    ]
    return "\n".join(lines)


def command_code(result: Result) -> str:
    """Shell commands that repeat what the page shows."""
    name, stem = shlex.quote(result.picture_name), safe_stem(result.picture_name)
    model = f"--model {shlex.quote(result.source)}"
    options = " ".join(
        "--tile" if key == "tile" else f"{FLAGS[key]} {value:g}" for key, value in result.options.items()
    )
    text = "" if result.caption is None else f" --text {shlex.quote(result.caption)}"
    for key, value in result.decoding.items():
        text += f" --{key} {value:g}" if key in DECODING_FLAGS else f" --set {key}={str(value).lower()}"
    if result.tokens is None:
        return f"mediatok reconstruct {name} {model}{text} --out {stem}-decoded.png"
    lines = []
    if result.reference is not None:
        lines.append(f"mediatok encode {name} {model} {options} --out {stem}.mtok".replace("  ", " "))
    source = f"{stem}.mtok" if result.reference is not None else name
    lines.append(f"mediatok decode {source} {model}{text} --out {stem}-decoded.png")
    if result.edits:
        lines.insert(0, "# Changed tokens: use the Python code; the command line does not edit tokens.")
    return "\n".join(lines)


def generation_python(gallery: Gallery) -> str:
    """Python that makes the gallery's pictures again."""
    lines = ["import mediatok as mt", "", f"generator = mt.load({gallery.source!r})"]
    recipes = [picture.recipe for picture in gallery.pictures]
    earlier = _earlier(recipes[0])
    lines += [f"start = generator.sample({_arguments(gallery, [recipe])})" for recipe in earlier]
    lines.append(f"made = generator.{gallery.method}({_arguments(gallery, recipes)})")
    lines += ["for image, seed in zip(made.images, made.seeds):", '    image.save(f"{seed}.png")']
    return "\n".join(lines)


def generation_command(gallery: Gallery) -> str:
    """Shell commands that make the gallery's pictures again."""
    recipes = [picture.recipe for picture in gallery.pictures]
    earlier = _earlier(recipes[0])
    has_ids = not gallery.pictures[0].content.is_floating_point()
    lines = []
    if earlier and not has_ids:
        lines.append("# Close, not equal: the command line goes on from the picture, Python from its latents.")
    for number, recipe in enumerate(earlier):
        tokens = " --tokens" if has_ids else ""
        lines.append(f"{_generate(gallery, [recipe], has_ids, number)} --out start-{number + 1}.png{tokens}")
    runs = [list(run) for _, run in groupby(recipes, key=lambda recipe: recipe.label)]
    if len({len(run) for run in runs}) == 1:
        runs = [recipes]  # one call: the same number for each class
    lines += [_generate(gallery, run, has_ids, len(earlier)) for run in runs]
    return "\n".join(lines)


def picture_name(gallery: Gallery, picture: Made) -> str:
    """File name of a generated picture."""
    before = "before-" if picture is gallery.origin else ""
    return f"{before}{safe_stem(gallery.label(picture))}-{picture.recipe.seed}.png"


def _earlier(recipe: Recipe) -> list[Recipe]:
    """The recipes that an edit went on from, first to last."""
    chain = []
    while recipe.start is not None:
        recipe = recipe.start
        chain.insert(0, recipe)
    return chain


def _arguments(gallery: Gallery, recipes: list[Recipe]) -> str:
    """Arguments of `sample` for recipes that differ in label and seed only."""
    first = recipes[0]
    words = (label_word(gallery.label_names, recipe.label) for recipe in recipes)
    runs = [(word, len(list(run))) for word, run in groupby(words)]
    if all(count == 1 for _, count in runs):
        text = repr([word for word, _ in runs])
    else:
        text = " + ".join(f"[{word!r}]" + (f" * {count}" if count > 1 else "") for word, count in runs)
    parts = [text, f"seed={first.seed}"]
    parts += [f"{name}={getattr(first, name)!r}" for name in ("steps", "guidance") if getattr(first, name) is not None]
    parts += [f"decoding={first.decoding!r}"] if first.decoding else []
    if first.start is not None:
        parts += ["start=start", f"keep={list(first.keep)}"]
    return ", ".join(parts)


def _generate(gallery: Gallery, recipes: list[Recipe], has_ids: bool, number: int) -> str:
    """One `mediatok generate`, going on from start file `number` where the recipes say so."""
    first, labels = recipes[0], list(dict.fromkeys(recipe.label for recipe in recipes))
    parts = ["mediatok generate", shlex.quote(gallery.source)]
    words = [label_word(gallery.label_names, label) for label in labels]
    if gallery.reads_text:
        parts += [f"--prompt {shlex.quote(word)}" for word in words if word is not None]
    else:
        parts += ["none" if word is None else shlex.quote(str(word)) for word in words]
    parts += [f"--count {len(recipes) // len(labels)}"] * (len(recipes) > len(labels)) + [f"--seed {first.seed}"]
    for name in ("steps", "guidance"):
        value = getattr(first, name)
        parts += [] if value is None else [f"--{name} {value:g}"]
    parts += [f"--decoding {name}={json.dumps(value)}" for name, value in first.decoding.items()]
    if first.start is not None:
        parts.append(f"--edit start-{number}.{'mtok' if has_ids else 'png'} --keep {_ranges(first.keep)}")
    return " ".join(parts)


def label_word(names: Sequence[str], number: int | str | None) -> str | int | None:
    """A class as people write it: by its name, or by its number where the name could be taken for something else.

    A prompt is what it is.
    """
    if number is None or not names or isinstance(number, str):
        return number
    name = names[number]
    is_word = name == name.strip() != "" and name[0] not in "+-" and not name.isdecimal() and name.lower() != "none"
    is_only_one = sum(other.lower() == name.lower() for other in names) == 1
    return name if is_word and is_only_one else number


def _ranges(units: tuple[int, ...]) -> str:
    """Numbers with their ranges, as 0,3-7."""
    by_run = groupby(enumerate(sorted(units)), key=lambda pair: pair[1] - pair[0])
    runs = [[unit for _, unit in run] for _, run in by_run]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def safe_stem(name: str) -> str:
    """A file name without its suffix, in letters that need no quoting anywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).stem).strip("._")[:60] or "picture"
