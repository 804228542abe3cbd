"""A training run, finished or not, as a model folder: `python -m mediatok.training.export RUN OUT [--dtype float16]`"""

from __future__ import annotations

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..core.base import Tokenizer
from ..core.compact import BORROWED, COMPACT_WEIGHTS, compact
from ..core.errors import InvalidInput, MediatokError
from ..core.files import atomic_write
from ..core.registry import load, models
from .checkpoint import load_checkpoint, whole_checkpoints
from .recipe import check_recipe

DTYPES = ("float32", "float16", "int8", "int7", "int6", "int5", "int4")


def export_model(model: torch.nn.Module, out: str | Path, dtype: str = "float32") -> Path:
    """Save `model` to `out` in the library's layout, its weights stored as `dtype` (computing is in fp32 again).

    "int8" makes a folder of about half the size of "float16", "int6" of three eighths, "int4" of a quarter, which
    `mediatok.load` reads (see core/compact.py). Parts that are tokenizers keep eight bits: no run gets used to their
    rounding.
    """
    if dtype not in DTYPES:
        raise InvalidInput(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    model = deepcopy(model)
    if hasattr(model, "set_weight_norm"):
        model.set_weight_norm(False)
    # A buffer of training (the running code usage) is of no use to a finished model.
    if model.config.get("clustering"):
        del model.quantize.embed_prob
        model.quantize.clustering = False
        model.register_to_config(clustering=False)
    if dtype.startswith("int"):
        Path(out).mkdir(parents=True, exist_ok=True)
        model.save_config(out)
        lenders = _lenders(model)
        header = {BORROWED: json.dumps(lenders)} if lenders else None
        parts, own, kept = tuple(f"{part}." for part in tokenizer_parts(model)), {}, {}
        for key, value in model.state_dict().items():
            if key.split(".")[0] not in lenders:
                (kept if key.startswith(parts) else own)[key] = value
        stored = compact(own, fingerprinted(model), bits=int(dtype[3:])) | compact(kept, fingerprinted(model), bits=8)
        with atomic_write(Path(out) / COMPACT_WEIGHTS) as temporary:
            save_file(stored, temporary, header)
        return Path(out)
    for name, parameter in model.named_parameters():
        if not name.startswith("quantize."):  # codes are searched in fp32, and are few
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(out, safe_serialization=True)
    return Path(out)


def fingerprinted(model: torch.nn.Module) -> tuple[str, ...]:
    """How the names of the weights begin that ids depend on: of the codes, and what else a fingerprint is made of."""
    return ("quantize.", *getattr(model, "fingerprint_weights", ()))


def tokenizer_parts(model: torch.nn.Module) -> dict[str, Tokenizer]:
    """The parts of a model that are tokenizers of their own, such as the VAE of one over latents, by name."""
    return {name: child for name, child in model.named_children() if isinstance(child, Tokenizer)}


def _lenders(model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """The parts of `model` that are whole shipped models, bit for bit, with the name and the fingerprint of each."""
    found = {}
    for part, child in tokenizer_parts(model).items():
        for entry in models():
            if entry.class_name != type(child).__name__ or not entry.is_shipped:
                continue
            lender = load(entry.name)
            theirs = lender.state_dict()
            if all(key in theirs and torch.equal(theirs[key], value) for key, value in child.state_dict().items()):
                found[part] = (entry.name, lender.fingerprint)
                break
    return found


def export_run(run: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Save the averaged weights of the newest whole checkpoint of `run`.

    Raises:
        InvalidInput: no checkpoint there.
    """
    from .build import build_model, construct
    from .codec_recipe import CODECS, CodecRecipe
    from .flextok_recipe import FlexTokRecipe
    from .generator import build_generator
    from .generator_recipe import GENERATORS, GeneratorRecipe
    from .next_scale_recipe import NextScaleRecipe
    from .seed_recipe import PARTS, SeedRecipe
    from .shape_recipe import SHAPE_TOKENIZERS, ShapeRecipe
    from .speech import trainer_class
    from .speech_recipe import SCHEMAS
    from .tokenflow_recipe import TokenFlowRecipe

    checkpoints = whole_checkpoints(Path(run) / "checkpoints")
    if not checkpoints:
        raise InvalidInput(f"{run} has no whole checkpoint")
    tensors, state = load_checkpoint(checkpoints[-1])
    class_name, part = state["recipe"]["model"]["class_name"], ""
    if class_name in GENERATORS:
        recipe = check_recipe(state["recipe"], NextScaleRecipe if class_name == "NextScale" else GeneratorRecipe)
        model = build_generator(recipe.model, {}, config=state["model_config"])
    elif class_name in CODECS:
        recipe = check_recipe(state["recipe"], CodecRecipe)
        model = construct(class_name, state["model_config"])
        model.set_weight_norm(recipe.model.weight_norm)
    elif class_name == "FlexTok":
        recipe, part = check_recipe(state["recipe"], FlexTokRecipe), "tokenizer"
        model = construct(class_name, state["model_config"])
    elif class_name == "TokenFlow":
        recipe = check_recipe(state["recipe"], TokenFlowRecipe)
        model = construct(class_name, state["model_config"])
    elif class_name in SHAPE_TOKENIZERS:
        recipe = check_recipe(state["recipe"], ShapeRecipe)
        model = construct(class_name, state["model_config"])
    elif class_name == "Seed":
        recipe = check_recipe(state["recipe"], SeedRecipe)
        model, part = construct(class_name, state["model_config"]), PARTS[recipe.model.stage]
    elif class_name in SCHEMAS:
        recipe, part = check_recipe(state["recipe"], SCHEMAS[class_name]), trainer_class(class_name).exported_part
        model = construct(class_name, state["model_config"])
    else:
        recipe = check_recipe(state["recipe"])
        model = build_model(recipe.model, config=state["model_config"])
    prefix = f"{part}." if part else ""
    weights = (tensors["model"] | tensors["ema"]).items()
    model.load_state_dict({name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)})
    return export_model(model, out, dtype or recipe.run.export_dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.export", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("out", type=Path, help="the model folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="how weights are stored (default: the recipe's)")
    arguments = parser.parse_args(argv)
    try:
        print(export_run(arguments.run, arguments.out, arguments.dtype))
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
