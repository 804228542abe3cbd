"""`mediatok models` and `mediatok info`, and how every command gets its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InvalidInput, MediatokError, ModelNotFound, nearest_names
from .cli_jobs import TOKEN_SUFFIXES, Outcome, collect_files

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
DType = Annotated[str, typer.Option(help="float32, or bfloat16 (faster, tokens may differ slightly).")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures computed together.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]


def load_tokenizer(name: str, device: str = "cpu", dtype: str = "float32"):
    """The image tokenizer called `name` (registry name, folder or hub id), on a device that exists."""
    check_device(device)
    from ..core import registry

    entry = registry.find_entry(name)
    model = None
    if entry is None or entry.kind != "generator":  # else refused without reading its weights
        model = registry.load(name, device=device, dtype=dtype)
    if model is None or hasattr(model, "generate"):
        raise InvalidInput(
            f"{name} is a generator, and this takes a tokenizer, such as titok-tiny; `mediatok generate {name}` makes "
            "pictures with it"
        )
    if not hasattr(model, "encode") or getattr(model, "modality", None) != "image":
        raise InvalidInput(f"{name} is not an image tokenizer; `mediatok models` lists them")
    return model


def load_generator(name: str, device: str = "cpu", dtype: str = "float32"):
    """The generator called `name` (registry name, folder or hub id), on a device that exists, to be used only."""
    check_device(device)
    from ..core import registry

    known = [entry.name for entry in registry.models() if entry.kind == "generator"]
    entry = registry.find_entry(name)
    if entry is None and "/" not in name and not Path(name).exists():
        raise ModelNotFound(f"{name!r} is neither a known generator nor a folder here.{nearest_names(name, known)}")
    model = None
    if entry is None or entry.kind == "generator":  # else refused without reading its weights
        model = registry.load(name, device=device, dtype=dtype)
    if not hasattr(model, "generate"):
        hint = nearest_names(f"maskgit-{name}", known) or f" The generators are {', '.join(known)}."
        raise InvalidInput(f"{name} is a tokenizer, and this takes a generator.{hint}")
    model.pack_network()
    return model


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine does not have."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise InvalidInput(f"--device {device} is unknown; use cpu, cuda, cuda:1 or mps")
    if kind == "cpu":
        return
    import torch

    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if int(number or 0) >= count:
        raise InvalidInput(f"--device {device} is not available here ({count} {kind} devices); use --device cpu")


def models(as_json: AsJson = False) -> None:
    """List the models known by name."""
    from ..core import registry

    rows = [
        {
            "name": entry.name,
            "kind": entry.kind,
            "system": entry.class_name,
            "modality": entry.modality,
            "parameters": entry.parameters,
            "licence": entry.licence,
            "status": entry.status,
            "hub_id": entry.hub_id,
            "description": entry.description,
        }
        for entry in registry.models()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ("name", "kind", "system", "parameters", "licence", "status", "description")
    table = [columns, *(tuple(_cell(column, row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def info(
    inputs: Annotated[list[Path], typer.Argument(help=".mtok files, folders of them, model names or model folders.")],
    as_json: AsJson = False,
) -> None:
    """Tell what a .mtok file holds, or what a model is."""
    outcome = Outcome()
    files = []
    for given in inputs:
        is_model_folder = given.is_dir() and ((given / "config.json").is_file() or not any(given.rglob("*.mtok")))
        try:
            if given.is_file() or (given.is_dir() and not is_model_folder):
                files += [path for path, _ in collect_files([given], TOKEN_SUFFIXES, outcome)]
            else:
                outcome.records.append(describe_model(given))
        except (MediatokError, OSError) as error:
            outcome.fail(given, error)
    for path in files:
        try:
            outcome.records.append(describe_tokens(path))
        except (MediatokError, OSError) as error:
            outcome.fail(path, error)
    outcome.finish(as_json, line=_block, summary=lambda records: f"{len(records)} in all")


def describe_tokens(path: Path) -> dict[str, Any]:
    """What the header of a `.mtok` file says."""
    from ..core.tokens import Tokens

    tokens = Tokens.load(path)
    lengths = tokens.lengths.tolist()
    frame = tokens.frames[0]
    return {
        "file": str(path),
        "tokenizer": tokens.tokenizer,
        "fingerprint": tokens.fingerprint,
        "modality": tokens.modality,
        "items": len(lengths),
        "tokens": lengths[0] if len(lengths) == 1 else lengths,
        "vocab_size": tokens.vocab_size,
        "bits_per_token": tokens.bits_per_token,
        "bytes": path.stat().st_size,
        "picture": f"{frame.width}x{frame.height}" + (f" in {frame.rows}x{frame.cols} tiles" if frame.is_tiled else ""),
    }


def describe_model(given: Path) -> dict[str, Any]:
    """What a model is; its weights are read only when they are here."""
    from ..core import registry

    name = str(given)
    entry = registry.find_entry(name)
    if entry is None and not given.exists():
        known = [known.name for known in registry.models()]
        raise ModelNotFound(f"neither a file, a folder nor a known model.{nearest_names(name, known)}")
    record: dict[str, Any] = {"model": name}
    if entry is not None:
        record |= {"description": entry.description, "licence": entry.licence, "status": entry.status}
        record |= {"hub_id": entry.hub_id} if entry.hub_id else {}
        if entry.status == "needs download":
            return record | {"parameters": entry.parameters, "config": registry.constructor_arguments(entry)}
    model = registry.load(name)
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    record |= {"class": type(model).__name__, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    if hasattr(model, "generate"):
        record |= {"classes": config["num_classes"], "tokenizer": config["tokenizer"], "units": model.num_units}
        return record | {"config": config}
    record |= {"fingerprint": model.fingerprint}
    record |= {} if model.is_continuous else {"vocab_size": model.vocab_size}
    return record | {"max_tokens": model.max_tokens, "variable_length": model.is_variable_length, "config": config}


def _cell(column: str, value: object) -> str:
    if column == "parameters":
        return "" if value is None else f"{value / 1e6:.1f} M"
    return "" if value is None else str(value)


def _block(record: dict) -> str:
    """One record as indented lines."""
    (first, title), *rest = record.items()
    lines = [f"{title}" if first in ("file", "model") else f"{first}: {title}"]
    for key, value in rest:
        if isinstance(value, dict):
            value = " ".join(f"{name}={part}" for name, part in value.items())
        lines.append(f"  {key:<17}{value}")
    return "\n".join(lines)
