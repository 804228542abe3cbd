"""`mediatok models` and `mediatok info`, and how every command gets its model."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InvalidInput, MediatokError, ModelNotFound, nearest_names
from .cli_jobs import TOKEN_SUFFIXES, Outcome, collect_files

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
DType = Annotated[str, typer.Option(help="float32, or bfloat16 (faster, tokens may differ slightly).")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures, meshes or windows of audio computed together.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]

EXAMPLES = {"image": "titok-tiny", "speech": "simcodec-tiny", "shape": "vat-tiny"}  # of tokenizers
# Method that a generator has -> what the command of that name does, by the generator's modality.
ACTIONS = {
    "generate": {"image": "makes pictures", "shape": "makes shapes"},
    "enhance": {"speech": "cleans speech"},
    "transcribe": {"speech": "writes down speech"},
    "speak": {"speech": "reads a text aloud"},
}


def load_tokenizer(name: str, device: str = "cpu", dtype: str = "float32", modality: str = "image"):
    """The tokenizer called `name` (registry name, folder or hub id), on a device that exists."""
    check_device(device)
    from ..core import registry

    known, model = find_class(name), None
    if known is None:
        _check_is_here(name, "give its folder with --model FOLDER")
        model = registry.load(name, device=device, dtype=dtype)
        known = type(model)
    action = _action(known)
    if action is not None:
        raise InvalidInput(
            f"{name} is a generator, and this takes a tokenizer, such as {EXAMPLES[modality]}; `mediatok {action}` "
            f"{_does(action, known.modality)} with it"
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
        place = "in the place of its name" if action == "generate" else "with --model FOLDER"
        _check_is_here(name, f"give its folder {place}")
        if "/" not in name and not Path(name).exists():
            hint = nearest_names(name, _names(action)) or " `mediatok models` lists the known ones."
            what = f"{name!r} is neither a known model nor a folder here"
            raise ModelNotFound(f"{what}; --model names one that {_does(action)}.{hint}")
        model = registry.load(name, device=device, dtype=dtype)
        known = type(model)
    if not hasattr(known, action):
        other, names = _action(known), _names(action, known.modality)
        kind = f"{_does(other, known.modality)} (`mediatok {other}`)" if other else "is a tokenizer"
        others = f" Those that do are {', '.join(names)}." if names else " `mediatok models` lists the known ones."
        hint = nearest_names(f"maskgit-{name}", names) or others
        raise InvalidInput(f"{name} {kind}, and this takes a generator that {_does(action, known.modality)}.{hint}")
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


def _check_is_here(name: str, way_out: str) -> None:
    """Say of an unknown name that it can be trained, where a recipe of that name ships."""
    from .cli_train import RECIPES

    if not Path(name).exists() and name in {recipe.stem for recipe in RECIPES.glob("*.yaml")}:
        raise ModelNotFound(
            f"the weights of {name} do not come with this version; train it with `mediatok train {name}` and {way_out}"
        )


def _action(model_class: type) -> str | None:
    """The command that a generator is for; None for tokenizers."""
    return next((action for action in ACTIONS if hasattr(model_class, action)), None)


def _does(action: str, modality: str | None = None) -> str:
    """What generators for a command do: those of one modality, or all."""
    does = ACTIONS[action]
    return does.get(modality) or " or ".join(does.values())


def _names(action: str, modality: str | None = None) -> list[str]:
    """Known generators for a command: those of one modality where it has such generators, or all."""
    from ..core import registry

    able = [entry for entry in registry.models() if hasattr(registry.model_class(entry.class_name), action)]
    return [entry.name for entry in able if modality not in ACTIONS[action] or entry.modality == modality]


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
    describe = {"image": _describe_picture, "speech": _describe_sound, "shape": _describe_shapes}[tokens.modality]
    return record | describe(tokens)


def _describe_picture(tokens) -> dict[str, Any]:
    frame = tokens.frames[0]
    tiles = f" in {frame.rows}x{frame.cols} tiles" if frame.is_tiled else ""
    return {"picture": f"{frame.width}x{frame.height}{tiles}"}


def _describe_shapes(tokens) -> dict[str, Any]:
    """How the scales are filled, and where the shapes stand."""
    from ..core.meshes import BOX_FILL

    facts: dict[str, list] = {
        "centre": [[frame.x, frame.y, frame.z] for frame in tokens.frames],
        "longest_side": [float(f"{2 * BOX_FILL * frame.scale:.7g}") for frame in tokens.frames],
    }
    if tokens.scales:
        ends = list(accumulate(tokens.scales))
        facts["scales"] = [ends.index(length) + 1 for length in tokens.lengths.tolist()]
    record = {name: values[0] if len(values) == 1 else values for name, values in facts.items()}
    return record | {"tokens_of_scales": list(tokens.scales)}


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
    describe = {
        "image": _describe_image_tokenizer, "speech": _describe_speech_tokenizer, "shape": _describe_shape_tokenizer,
    }[model.modality]  # fmt: skip
    return record | describe(model) | {"config": config}


def _describe_generator(model, config: dict[str, Any]) -> dict[str, Any]:
    """What it makes, and the tokenizers that it names, which stand in its config with their fingerprints."""
    from ..generators.written_pictures import picture_generator

    action = _action(type(model))
    if action == "generate":
        maker = picture_generator(model)
        units = {"scales": len(model.scales)} if model.modality == "shape" else {"units": maker.num_units}
        asked = {"takes": "prompts"} if maker.accepts_text else {"classes": config["num_classes"]}
        return asked | {"tokenizer": config["tokenizer"]} | units
    companions = {
        key: config[key]
        for key in ("tokenizer", "semantic_tokenizer", "codec")
        if config.get(key) is not None
    }  # fmt: skip
    return {"does": f"{_does(action, model.modality)} (`mediatok {action}`)"} | companions


def _describe_image_tokenizer(model) -> dict[str, Any]:
    vocabulary = {} if model.is_continuous else {"vocab_size": model.vocab_size}
    scales = {"tokens_of_scales": list(model.scales)} if model.scales else {}
    if model.decoding_option_names:
        scales["decoding_options"] = list(model.decoding_option_names)
    return vocabulary | {"max_tokens": model.max_tokens, "variable_length": model.is_variable_length} | scales


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


def _describe_shape_tokenizer(model) -> dict[str, Any]:
    return {"vocab_size": model.vocab_size, "max_tokens": model.max_tokens, "tokens_of_scales": list(model.scales)}


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
