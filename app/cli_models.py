"""`mediatok models` and `mediatok info`, and how every command gets its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InvalidInput, MediatokError, ModelNotFound, nearest_names
from .cli_jobs import TOKEN_SUFFIXES, Outcome, collect_files

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
DType = Annotated[str, typer.Option(help="float32, or bfloat16 (faster, tokens may differ slightly).")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures, or windows of audio, computed together.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]

EXAMPLES = {"image": "titok-tiny", "speech": "simcodec-tiny"}  # of tokenizers
# Method that a generator has -> what the command of that name does.
ACTIONS = {
    "generate": "makes pictures",
    "enhance": "cleans speech",
    "transcribe": "writes down speech",
    "speak": "reads a text aloud",
}


def load_tokenizer(name: str, device: str = "cpu", dtype: str = "float32", modality: str = "image"):
    """The tokenizer called `name` (registry name, folder or hub id), on a device that exists."""
    check_device(device)
    from ..core import registry

    known, model = find_class(name), None
    if known is None:
        model = registry.load(name, device=device, dtype=dtype)
        known = type(model)
    action = _action(known)
    if action is not None:
        raise InvalidInput(
            f"{name} is a generator, and this takes a tokenizer, such as {EXAMPLES[modality]}; `mediatok {action}` "
            f"{ACTIONS[action]} with it"
        )
    if not hasattr(known, "encode") or known.modality != modality:
        raise InvalidInput(f"{name} is not {_kind(modality)}; `mediatok models` lists them")
    return model or registry.load(name, device=device, dtype=dtype)


def load_generator(
    name: str, device: str = "cpu", dtype: str = "float32", action: str = "generate", packed: bool = True
):  # fmt: skip
    """The model called `name` (registry name, folder or hub id) that can do `action`.

    packed: lay the weights out for speed, after which the model can only be used.
    """
    check_device(device)
    from ..core import registry

    known, model = find_class(name), None
    if known is None:
        if "/" not in name and not Path(name).exists():
            hint = nearest_names(name, _names(action)) or " `mediatok models` lists the known ones."
            what = f"{name!r} is neither a known model nor a folder here"
            raise ModelNotFound(f"{what}; --model names one that {ACTIONS[action]}.{hint}")
        model = registry.load(name, device=device, dtype=dtype)
        known = type(model)
    if not hasattr(known, action):
        other, names = _action(known), _names(action)
        kind = f"{ACTIONS[other]} (`mediatok {other}`)" if other else "is a tokenizer"
        hint = nearest_names(f"maskgit-{name}", names) or f" Those that do are {', '.join(names)}."
        raise InvalidInput(f"{name} {kind}, and this takes a generator that {ACTIONS[action]}.{hint}")
    model = model or registry.load(name, device=device, dtype=dtype)
    if packed and hasattr(model, "pack_network"):
        model.pack_network()
    return model


def find_class(name: str) -> type | None:
    """The class of a known model or of a folder in our layout, without its weights; None where only loading tells."""
    from ..core import registry
    from ..core.weights import inside, read_config

    entry, folder = registry.find_entry(name), Path(name)
    if entry is not None:
        return registry.model_class(entry.class_name)
    if (folder / "config.json").is_file():
        config = read_config(inside(folder, "config.json"))
        return registry.model_class(str(config["_class_name"])) if "_class_name" in config else None
    return None


def _action(model_class: type) -> str | None:
    """The command that a generator is for; None for tokenizers."""
    return next((action for action in ACTIONS if hasattr(model_class, action)), None)


def _names(action: str) -> list[str]:
    from ..core import registry

    return [entry.name for entry in registry.models() if hasattr(registry.model_class(entry.class_name), action)]


def _kind(modality: str) -> str:
    return f"{'an' if modality[0] in 'aeiou' else 'a'} {modality} tokenizer"


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
    columns = ("name", "modality", "kind", "system", "parameters", "licence", "status", "description")
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
    record = {
        "file": str(path),
        "tokenizer": tokens.tokenizer,
        "fingerprint": tokens.fingerprint,
        "modality": tokens.modality,
        "items": len(lengths),
        "tokens": lengths[0] if len(lengths) == 1 else lengths,
        "vocab_size": tokens.vocab_size,
        "bits_per_token": tokens.bits_per_token,
        "bytes": path.stat().st_size,
    }
    if tokens.modality == "speech":
        return record | _describe_sound(tokens)
    frame = tokens.frames[0]
    tiles = f" in {frame.rows}x{frame.cols} tiles" if frame.is_tiled else ""
    return record | {"picture": f"{frame.width}x{frame.height}{tiles}"}


def _describe_sound(tokens) -> dict[str, Any]:
    """Length of the clips, in seconds too where their tokenizer is a known one that is here."""
    from ..core import registry

    samples = [frame.num_samples for frame in tokens.frames]
    record: dict[str, Any] = {"codebooks": tokens.ids.shape[2] if tokens.ids.ndim == 3 else 1}
    record["samples"] = samples[0] if len(samples) == 1 else samples
    entry = registry.find_entry(tokens.tokenizer)
    if entry is not None and entry.modality == "speech":
        rate = registry.constructor_arguments(entry).get("sample_rate")
        if rate:
            seconds = [round(count / rate, 3) for count in samples]
            record["seconds"] = seconds[0] if len(seconds) == 1 else seconds
    return record


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
    record |= {"class": type(model).__name__, "modality": model.modality}
    record |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if _action(type(model)) is not None:
        return record | _describe_generator(model, config) | {"config": config}
    record |= {"fingerprint": model.fingerprint}
    record |= _describe_speech_tokenizer(model) if model.modality == "speech" else _describe_image_tokenizer(model)
    return record | {"config": config}


def _describe_generator(model, config: dict[str, Any]) -> dict[str, Any]:
    """What it makes, and the tokenizers that it names, which stand in its config with their fingerprints."""
    action = _action(type(model))
    if action == "generate":
        return {"classes": config["num_classes"], "tokenizer": config["tokenizer"], "units": model.num_units}
    companions = {
        key: config[key]
        for key in ("tokenizer", "semantic_tokenizer", "codec")
        if config.get(key) is not None
    }  # fmt: skip
    return {"does": f"{ACTIONS[action]} (`mediatok {action}`)"} | companions


def _describe_image_tokenizer(model) -> dict[str, Any]:
    vocabulary = {} if model.is_continuous else {"vocab_size": model.vocab_size}
    return vocabulary | {"max_tokens": model.max_tokens, "variable_length": model.is_variable_length}


def _describe_speech_tokenizer(model) -> dict[str, Any]:
    context = model.context_frames
    return {
        "vocab_size": model.vocab_size,
        "codebooks": model.num_codebooks,
        "sample_rate": model.sample_rate,
        "tokens_per_second": model.frame_rate,
        "bits_per_second": model.bit_rate,
        "context": "the whole clip" if context is None else f"{context} tokens on either side",
    }


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
        lines.append(f"  {key:<19}{value}")
    return "\n".join(lines)
