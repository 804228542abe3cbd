"""What the 3D tab did, as Python and as commands, for "Show code"."""

from __future__ import annotations

import shlex

from .studio_code import label_word, safe_stem
from .studio_shapes_actions import Coded, Made, TokensFile


def coded_python(coded: Coded) -> str:
    """Python that encodes and decodes the shape."""
    name, stem = coded.subject.name, safe_stem(coded.subject.name)
    lines = ["import mediatok as mt", "", f"tokenizer = mt.load({coded.source!r})"]
    if isinstance(coded.subject, TokensFile):
        lines.append(f"tokens = mt.Tokens.load({name!r})[0]")
    else:
        lines.append(f"tokens = tokenizer.encode({name!r})")
    if coded.num_scales < coded.max_scales:
        lines.append(f"tokens = tokens.up_to_scale({coded.num_scales})")
    return "\n".join([
        *lines, f'tokens.save("{stem}.mtok")  # {coded.tokens.num_bytes} bytes',
        f"mesh = tokenizer.decode(tokens, resolution={coded.resolution})",
        f'mesh.export("{stem}-decoded.glb")',
    ])  # fmt: skip


def coded_command(coded: Coded) -> str:
    """Commands that encode and decode the shape."""
    name, stem, model = shlex.quote(coded.subject.name), safe_stem(coded.subject.name), _model(coded.source)
    scales = f" --up-to-scale {coded.num_scales}" if coded.num_scales < coded.max_scales else ""
    decode = f"--resolution {coded.resolution} --out {stem}-decoded.glb"
    if isinstance(coded.subject, TokensFile):
        return f"mediatok decode {name} {model}{scales} {decode}"
    return f"mediatok encode {name} {model}{scales} --out {stem}.mtok\nmediatok decode {stem}.mtok {model} {decode}"


def made_python(made: Made) -> str:
    """Python that makes the shape again."""
    options = f"seed={made.seed}, guidance={made.guidance:g}, resolution={made.resolution}"
    return "\n".join([
        "import mediatok as mt", "", f"generator = mt.load({made.source!r})",
        f"made = generator.sample({label_word(made.label_names, made.label)!r}, {options})",
        f'made.meshes[0].export("{made_stem(made)}.glb")',
        f'made.tokens.save("{made_stem(made)}.mtok")  # {made.tokens.num_bytes} bytes',
    ])  # fmt: skip


def made_command(made: Made) -> str:
    """The command that makes the shape again."""
    word = label_word(made.label_names, made.label)
    label = "none" if word is None else shlex.quote(str(word))
    return (
        f"mediatok generate {shlex.quote(made.source)} {label} --seed {made.seed} --guidance {made.guidance:g} "
        f"--resolution {made.resolution} --out {made_stem(made)}.glb"
    )


def made_stem(made: Made) -> str:
    """Name of a new shape's files, without the suffix."""
    return f"{safe_stem(made.label_name)}-{made.seed}"


def _model(source: str) -> str:
    return f"--model {shlex.quote(source)}"
