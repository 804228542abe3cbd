"""From a recipe's model section to the modules that are trained."""

from __future__ import annotations

import inspect

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..core.errors import InvalidInput, InvalidRecipe, nearest_names
from ..core.registry import constructor_arguments, find_entry, load, model_class
from .aligned_start import align_latents, reorder_coarse_to_fine
from .recipe import ModelRecipe

DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def build_model(recipe: ModelRecipe, config: dict | None = None):
    """The tokenizer of `recipe`: fresh, from `init_from`, or random with exactly `config` (that of a checkpoint).

    Raises:
        InvalidRecipe: names, sizes or flags that do not fit together.
    """
    model = _build(recipe, config)
    if recipe.class_name == "OneDPiece":
        model.full_length_share = recipe.full_length_share
    return model


def _build(recipe: ModelRecipe, config: dict | None):
    if config is not None:
        return construct(recipe.class_name, config)
    if recipe.init_from is None:
        model = construct(recipe.class_name, _fresh_config(recipe))
        if recipe.aligned_start:
            align_latents(model)
        return model
    if recipe.like or set(recipe.config) - {"clustering"}:
        raise InvalidRecipe("model.init_from brings its own sizes; leave out model.like and model.config")
    model = load(str(recipe.init_from))
    source_class = type(model).__name__
    if source_class == "TiTok" and recipe.class_name == "OneDPiece":
        piece = construct("OneDPiece", config_of(model) | recipe.config)
        reorder_coarse_to_fine(model, piece)
        return piece
    if source_class != recipe.class_name:
        raise InvalidRecipe(f"model.init_from holds a {source_class}, model.class_name is {recipe.class_name}")
    if recipe.config:  # a finished model has dead-code revival off; the recipe can switch it on again
        weights, model = model.state_dict(), construct(source_class, config_of(model) | recipe.config)
        model.load_state_dict(weights, strict=False)  # the running code usage starts anew
    if recipe.stage == "2" and recipe.class_name != "KLAutoencoder" and not model.config.has_pixel_decoder:
        if recipe.vqgan is None:
            raise InvalidRecipe("stage 2 of a stage-1 model needs model.vqgan (MaskGIT-VQGAN weights)")
        model.add_pixel_decoder(load_vqgan(recipe).requires_grad_(True))  # its copy is trained
    return model


def make_accelerator(mixed_precision: str) -> Accelerator:
    """accelerate's view of the processes and devices at hand.

    Raises:
        InvalidRecipe: a precision that the device lacks, or a launch configuration other than data parallelism.
    """
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:  # fp16 without a GPU, among others
        raise InvalidRecipe(f"run.mixed_precision {mixed_precision!r}: {error}") from error
    if accelerator.distributed_type not in DATA_PARALLEL:
        kind = accelerator.distributed_type.value
        raise InvalidRecipe(f"accelerate is set to {kind}; training runs in one process or with DDP")
    return accelerator


def config_of(model) -> dict:
    """Constructor arguments that `model` was built with."""
    return {key: value for key, value in dict(model.config).items() if not key.startswith("_")}


def load_vqgan(recipe: ModelRecipe):
    """The frozen MaskGIT-VQGAN that gives stage 1 its targets and stage 2 its first pixel decoder."""
    vqgan = load(str(recipe.vqgan))
    if type(vqgan).__name__ != "MaskGitVQGAN":
        raise InvalidRecipe(f"model.vqgan {recipe.vqgan} holds a {type(vqgan).__name__}, not a MaskGitVQGAN")
    return vqgan.requires_grad_(False).eval()


def sizes_like(recipe) -> dict:
    """Arguments of the model that `recipe.like` names; none where it names none."""
    if recipe.like is None:
        return {}
    entry = find_entry(recipe.like)
    if entry is None or entry.class_name != recipe.class_name:
        from ..core.registry import ENTRIES

        names = [name for name, known in ENTRIES.items() if known.class_name == recipe.class_name]
        raise InvalidRecipe(
            f"model.like {recipe.like!r} is not a known {recipe.class_name}.{nearest_names(recipe.like, names)}"
        )
    return dict(constructor_arguments(entry))


def _fresh_config(recipe: ModelRecipe) -> dict:
    config = sizes_like(recipe)
    if recipe.class_name != "KLAutoencoder":
        config |= {"is_legacy": recipe.stage != "single", "has_pixel_decoder": recipe.stage == "2"}
    return config | recipe.config


def construct(class_name: str, config: dict):
    """A random model of ours; InvalidRecipe for arguments that it does not have or that cannot be."""
    cls = model_class(class_name)
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    for key in config:
        if key not in known:
            raise InvalidRecipe(f"unknown key model.config.{key}.{nearest_names(key, known)}")
    try:
        return cls(**config)
    except (InvalidInput, ValueError, TypeError) as error:
        raise InvalidRecipe(f"model.config: {error}") from error
