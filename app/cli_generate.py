"""`mediatok generate`: pictures or meshes of classes or prompts, as files; pictures as one grid, too."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..core.errors import InvalidInput
from .cli_jobs import TOKEN_SUFFIXES, Outcome, make_folder
from .cli_media import MEDIA, MESHES, PICTURES, Medium, check_options
from .cli_models import AsJson, BatchSize, Device, DType, load_generator, load_tokenizer
from .cli_settings import merged, parse_options
from .cli_shapes import EmptyShape, Resolution, shape_options, write_generated

Request = int | str | None  # a class, a prompt, or neither
NO_CLASS = "none"
FOLDER = Path("generated")
NAME_LENGTH = 40  # of a label in a file name
GRID_GAP = 2  # pixels between the pictures of a grid
UNITS = {PICTURES: "images", MESHES: "meshes"}  # made a second
FILE_SUFFIX = re.compile(r"\.(?=\d*[a-z])[a-z0-9]{1,5}", re.IGNORECASE)  # "x.gif" names a file, "run.2" does not


def generate(
    model: Annotated[str, typer.Argument(help="Generator: name, folder or hub id.")],
    labels: Annotated[
        list[str] | None,
        typer.Argument(help='Classes by name or number, "none" for no class; default: all in turn. Or prompts.'),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What a picture shows, for generators that read text; repeatable."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Results of each label; without, in all.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of the first result, the others count on; default random.")] = None,
    steps: Annotated[str | None, typer.Option(help="Steps; two as 50,15 fall from first to last cell (xAR).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of the class; default the model's own.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of the model, as temperature=3; repeatable.")
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            "--decoding", help="How the tokenizer decodes pictures, where there is a choice, as steps=10; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help=f"File for one result or a grid, or folder; default the folder {FOLDER}."),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="One file with all pictures, a row for each label.")] = False,
    resolution: Resolution = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also write each result's tokens as .mtok.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    edit: Annotated[Path | None, typer.Option(help="Picture or .mtok to change: keeps the --keep units.")] = None,
    keep: Annotated[str | None, typer.Option(help="Tokens or cells of --edit that stay, as 0,1,5-9.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Decode with this one; default the model's own.")] = None,
    list_labels: Annotated[bool, typer.Option("--list-labels", help="Print the classes and stop.")] = False,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Make pictures or meshes of classes or prompts; the generator says which.

    Files are named by label or prompt and seed; a PNG says in its text fields how to make it again.
    """
    if (edit is None) != (keep is None):
        raise InvalidInput("--edit and --keep go together: the picture to change, and what stays of it")
    sampling = _sampling(steps, guidance, option or [])
    ways = parse_options(decoding or [], "--decoding")
    units = None if keep is None else parse_units(keep)
    generator = load_generator(model, device, dtype)
    from ..generators.written_pictures import picture_generator

    generator = picture_generator(generator)
    medium = next(medium for medium in MEDIA if medium.modality == generator.modality)
    of_pictures = {"--steps": steps, "--grid": grid, "--edit": edit, "--keep": keep, "--decoding": decoding or None}
    check_options(of_pictures | shape_options(resolution=resolution), medium)
    if list_labels:
        _print_labels(generator, as_json)
        return
    if tokenizer is not None:
        generator.use_tokenizer(load_tokenizer(tokenizer, device, dtype, medium.modality))

    from ..core.generator import image_seeds

    shared = {
        "edit": edit, "keep": keep, "resolution": resolution, "tokenizer": tokenizer,
        "dtype": dtype if dtype != "float32" else None,
    }  # fmt: skip
    plan = _Plan(generator, medium, generator.options_of(generator.checked_settings(**sampling)), ways, shared)
    if ways:
        generator.checked_decoding(**ways)  # a wrong one is found before the work
        sampling["decoding"] = ways
    asked = _asked(generator, labels, prompt)
    classes = _requests(generator, medium, asked, count)
    seeds = image_seeds(image_seeds(seed, 1)[0], len(classes))
    if tokens and (grid or generator.tokenizer.is_continuous):
        reason = "a grid has no tokens of its own" if grid else f"{generator.name} makes latents, not tokens"
        raise InvalidInput(f"--tokens: {reason}")
    names = [f"grid-{seeds[0]}.png"] if grid else [plan.file_name(*pair) for pair in zip(classes, seeds, strict=True)]
    targets = _targets(out, medium, names)
    _check_targets([*targets, *(path.with_suffix(TOKEN_SUFFIXES[0]) for path in targets if tokens)], edit, overwrite)
    if edit is not None:
        sampling |= {"start": _start(generator, edit), "keep": units}
    if resolution is not None:
        sampling["resolution"] = resolution

    outcome, pictures = Outcome(), []
    write = {PICTURES: _write_made, MESHES: write_generated}[medium]
    for rows, result, seconds in _batches(generator, medium, classes, seeds, batch_size, sampling):
        for index, row in enumerate(rows):
            target = targets[0 if grid else row]
            record = plan.record(target, classes[row], seeds[row], seconds / len(rows))
            if grid:
                pictures.append(result.images[index])
                outcome.records.append(record)
                continue
            try:
                record |= write(result, index, target, plan.text(classes[row : row + 1], 1, seeds[row]))
            except EmptyShape as error:
                outcome.fail(target, error)
                continue
            outcome.records.append(record)
            if tokens:
                _tokens(generator, result, index).save(target.with_suffix(TOKEN_SUFFIXES[0]))
    if grid:
        columns = count if asked and count > 1 else _square(len(pictures))
        _write(tile(pictures, columns), targets[0], plan.text(classes[::count] if asked else [], count, seeds[0]))
    outcome.finish(as_json, _line, lambda records: _summary(records, medium))


class _Plan:
    """What all results of a call share, and what is told about each of them."""

    def __init__(self, generator, medium: Medium, settings: dict[str, Any], decoding: dict, shared: dict[str, Any]):
        self.generator = generator
        self.suffix = medium.outputs[0]
        self.settings = {name: _short(value) for name, value in settings.items() if value != ()}
        self.decoding = decoding
        self.shared = {name: str(value) for name, value in shared.items() if value is not None}

    def label(self, request: Request) -> str:
        """Name of a class, or its number where there are no names; a prompt as it is."""
        if request is None or isinstance(request, str):
            return request or NO_CLASS
        names = self.generator.label_names
        return names[request] if names else str(request)

    def file_name(self, request: Request, seed: int) -> str:
        word = re.sub(r"\W+", "-", self.label(request).lower()).strip("-")[:NAME_LENGTH].rstrip("-")
        number = "prompt" if isinstance(request, str) else f"class-{request}"
        return f"{word if word and not word.isdigit() else number}-{seed}{self.suffix}"

    def record(self, target: Path, request: Request, seed: int, seconds: float) -> dict:
        """One line of the report."""
        record = {"output": str(target), "model": self.generator.name}
        if self.generator.accepts_text:
            record |= {"label": self.label(request), "prompt": request}
        else:
            number = self.generator.config.num_classes if request is None else request
            record |= {"label": self.label(request), "class": number}
        record |= {"seed": seed, "seconds": round(seconds, 4)} | self.settings
        return record | ({"decoding": self.decoding} if self.decoding else {}) | self.shared

    def text(self, requests: list[Request], count: int, seed: int) -> dict[str, str]:
        """Text fields of a PNG: the settings one by one, and the command that makes the file again."""
        settings = {name: _shown(value) for name, value in self.settings.items()}
        names = [self.label(request) for request in requests]
        if self.generator.accepts_text:
            asked = [f"--prompt={request}" for request in requests if request is not None]
        else:
            asked = [NO_CLASS if request is None else str(request) for request in requests]
        command = ["mediatok", "generate", self.generator.name, *asked, "--count", str(count), "--seed", str(seed)]
        for name, value in settings.items():
            command += [f"--{name}", value] if name in ("steps", "guidance") else ["--set", f"{name}={value}"]
        pairs = [f"{name}={json.dumps(value)}" for name, value in self.decoding.items()]
        command += [f"--decoding={pair}" for pair in pairs]
        for name, value in self.shared.items():
            command += [f"--{name}", value]
        if count * len(requests) != 1:
            command.append("--grid")
        fields = {"Software": f"mediatok {__version__}", "model": self.generator.name, "label": ", ".join(names)}
        fields |= {"seed": str(seed)} | settings | ({"decoding": ", ".join(pairs)} if pairs else {})
        return fields | self.shared | {"command": shlex.join(command)}


def parse_steps(text: str | None) -> int | tuple[int, int] | None:
    """ "40" as a number, "50,15" as a pair."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise InvalidInput(f"--steps {text} must be a number of steps, or two as 50,15")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_units(text: str) -> list[int]:
    """Numbers and ranges: "0,1,5-9" as [0, 1, 5, 6, 7, 8, 9]."""
    units: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part, flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise InvalidInput(f"--keep {text}: {part.strip()!r} is neither a number nor a range such as 5-9")
        units += range(first, last + 1)
    return units


def _sampling(steps: str | None, guidance: float | None, pairs: list[str]) -> dict[str, Any]:
    """What --steps, --guidance and --set say together; what is not given is the generator's to choose."""
    given = {"steps": parse_steps(steps), "guidance": guidance}
    return merged({name: value for name, value in given.items() if value is not None}, pairs)


def tile(pictures: list, columns: int):
    """Pictures of one size side by side on white, `columns` in a row."""
    from PIL import Image

    width, height = (side + GRID_GAP for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * width - GRID_GAP, rows * height - GRID_GAP), "white")
    for index, picture in enumerate(pictures):
        canvas.paste(picture, (index % columns * width, index // columns * height))
    return canvas


def _asked(generator, labels: list[str] | None, prompts: list[str] | None) -> list[str]:
    """What the command names: labels, or prompts, which may stand in their place."""
    if prompts and not generator.accepts_text:
        raise InvalidInput(f"--prompt: {generator.name} reads no text; name classes, which --list-labels prints")
    return [*(labels or ()), *(prompts or ())]


def _requests(generator, medium: Medium, labels: list[str], count: int) -> list[Request]:
    """What each result is to be: a class or a prompt, None for no such."""
    from ..core.generator import MAX_IMAGES

    asked = count * max(len(labels), 1)
    if asked > MAX_IMAGES:
        raise InvalidInput(f"{asked} {medium.many} are asked for; one call makes at most {MAX_IMAGES}")
    if generator.accepts_text:
        return [prompt for prompt in generator.requests(labels or [None]) for _ in range(count)]
    if not labels:
        num_classes = generator.config.num_classes
        return [index % num_classes if num_classes else None for index in range(count)]
    names = [name.lower() for name in generator.label_names]
    given = [None if label.lower() == NO_CLASS and NO_CLASS not in names else label for label in labels]
    return [number for number in generator.requests(given) for _ in range(count)]


def _targets(out: Path | None, medium: Medium, names: list[str]) -> list[Path]:
    """The file of each result, or of the grid, called one of `names` unless `out` names it."""
    if out is not None and not out.is_dir() and out.suffix.lower() in medium.outputs:
        if len(names) > 1:
            way_out = "name a folder" + (", or add --grid" if "--grid" in medium.options else "")
            raise InvalidInput(f"--out {out} is one file for {len(names)} {medium.many}; {way_out}")
        return [out]
    if out is not None and not out.is_dir() and (out.is_file() or FILE_SUFFIX.fullmatch(out.suffix)):
        raise InvalidInput(f"--out {out} must end in {', '.join(medium.outputs)}, or be a folder")
    return [(out or FOLDER) / name for name in names]


def _check_targets(targets: list[Path], edit: Path | None, overwrite: bool) -> None:
    """Refuse before the work, not after it, what may not be replaced."""
    for path in targets:
        if edit is not None and path.resolve() == edit.resolve():
            raise InvalidInput(f"{path} is an input and is not overwritten; choose another --out")
        if path.exists() and not overwrite:
            raise InvalidInput(f"{path} exists; choose another --out or --seed, or add --overwrite")


def _start(generator, edit: Path):
    """Content of the one picture in the file `edit`."""
    from ..core.tokens import Tokens

    start = generator.start_content(Tokens.load(edit) if edit.suffix.lower() in TOKEN_SUFFIXES else edit)
    if len(start) != 1:
        raise InvalidInput(f"{edit} holds {len(start)} pictures; --edit takes one")
    return start


def _batches(generator, medium: Medium, requests: list[Request], seeds: list[int], batch_size: int, sampling: dict):
    """Rows, result and seconds of one batch after the other, so that files are there as soon as they are made."""
    from tqdm import tqdm

    total = len(requests)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    unit = f" {UNITS[medium]}"
    with tqdm(total=total, desc="generate", unit=unit, bar_format=bar_format, file=sys.stderr, leave=False) as bar:
        for first in range(0, total, batch_size):
            rows = range(first, min(first + batch_size, total))

            def advance(step: int, steps: int, preview=None, rows: range = rows) -> None:
                bar.update(rows.start + len(rows) * step / steps - bar.n)

            begin = time.perf_counter()
            result = generator.sample(
                [requests[row] for row in rows],
                seed=[seeds[row] for row in rows], batch_size=batch_size, on_step=advance, **sampling,
            )  # fmt: skip
            yield rows, result, time.perf_counter() - begin


def _write_made(result, index: int, path: Path, text: dict[str, str]) -> dict:
    """Write one picture of a batch; what is told about it besides, which is nothing."""
    _write(result.images[index], path, text)
    return {}


def _write(picture, path: Path, text: dict[str, str]) -> None:
    from ..core.images import write_image

    make_folder(path)
    write_image(picture, path, text=text)


def _tokens(generator, result, index: int):
    """The tokens of one result of a batch."""
    return result.tokens[index] if hasattr(result, "tokens") else generator.tokens(result.content[index : index + 1])


def _print_labels(generator, as_json: bool) -> None:
    names = generator.label_names
    num_classes = 0 if generator.accepts_text else generator.config.num_classes
    if as_json:
        print(json.dumps({"model": generator.name, "num_classes": num_classes, "labels": list(names)}, indent=2))
    elif not num_classes:
        print(f"{generator.name} has no classes" + ("; it reads prompts" if generator.accepts_text else ""))
    elif not names:
        print(f"{generator.name} has {num_classes} classes without names: 0 to {num_classes - 1}")
    else:
        for number, name in enumerate(names):
            print(f"{number:>5}  {name}")


def _square(count: int) -> int:
    """Columns of a grid that is about as wide as high."""
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)


def _short(value: Any) -> Any:
    """Steps of every cell as they are asked for: one number, or those of the first and the last cell."""
    if not isinstance(value, (tuple, list)):
        return value
    return value[0] if len(set(value)) == 1 else [value[0], value[-1]]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(record: dict) -> str:
    return f"{record['output']}  {record['label']}  seed {record['seed']}  {record['seconds']:.2f} s"


def _summary(records: list[dict], medium: Medium) -> str:
    seconds = sum(record["seconds"] for record in records)
    speed = f", {len(records) / seconds:.2f} {UNITS[medium]}/s" if seconds else ""
    where = sorted({str(Path(record["output"]).parent) for record in records})
    return f"made {len(records)} {medium.many} with {records[0]['model']} in {', '.join(where)}: {seconds:.1f} s{speed}"
