"""The same action as Python and as a command, for "Show code"."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .studio_actions import Result

FLAGS = {"num_tokens": "--num-tokens", "target_psnr": "--target-psnr", "max_bytes": "--max-bytes"}


def python_code(result: Result) -> str:
    """Python that repeats what the page shows."""
    name, stem = result.picture_name, safe_stem(result.picture_name)
    lines = ["import mediatok as mt", "", f"tokenizer = mt.load({result.source!r})"]
    text = "" if result.caption is None else f", text={result.caption!r}"
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


def safe_stem(name: str) -> str:
    """A file name without its suffix, in letters that need no quoting anywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).stem).strip("._")[:60] or "picture"
