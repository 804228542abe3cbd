"""Recipes: what a training run is, as a YAML file that is checked whole before anything heavy starts.

A recipe holds plain values only. `section.key=value` on the command line overrides one of them; a key that does not
exist is an error that names the nearest one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core.errors import InvalidRecipe, nearest_names

MAX_RECIPE_BYTES = 2**20
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecipe(Section):
    """Which tokenizer is trained.

    stage: "single", or "1" (predict proxy codes) and "2" (fine-tune the decoders) of two-stage models.
    config: arguments of the class, over those of `like`. like: a name from `mediatok models` whose sizes are taken.
    init_from: folder in our layout whose weights the run starts from; stage 2 needs the stage-1 model here, and a
    single-stage OneDPiece may start from an aligned TiTok.
    vqgan: MaskGIT-VQGAN weights (a released file or a folder of ours); stage 1 takes its targets from it, stage 2
    starts its pixel decoder from it.
    aligned_start: start single-stage models with every latent looking at its own place; worth it on small data sets.
    full_length_share: share of One-D-Piece's training batches that drop no tail. The paper has none; a small model
    gains at full length what it loses at short lengths.
    """

    class_name: Literal["TiTok", "OneDPiece", "KLAutoencoder"] = "TiTok"
    stage: Literal["single", "1", "2"] = "single"
    like: str | None = None
    config: dict[str, Any] = {}
    init_from: Path | None = None
    vqgan: Path | None = None
    aligned_start: bool = False
    full_length_share: Fraction = 0.0
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _needs(self):
        if self.stage != "single" and self.vqgan is None and self.init_from is None:
            raise ValueError("two-stage models need vqgan= (MaskGIT-VQGAN weights)")
        if self.stage == "1" and self.vqgan is None:
            raise ValueError("stage 1 predicts proxy codes and needs vqgan= (MaskGIT-VQGAN weights)")
        if self.stage == "2" and self.init_from is None:
            raise ValueError("stage 2 continues a stage-1 model and needs init_from= (its folder)")
        return self


class DataRecipe(Section):
    """Pictures to train on, RGB in [0, 1] after a random crop to the model's `image_size`.

    train, val: an image folder, or webdataset shards ("shards/{000..127}.tar"). Without `val`, a tenth of the pictures
    of `train` (chosen by a hash of their names) is held out.
    min_scale: smallest side of a random square crop, as a fraction of the shorter edge; 1 keeps the whole edge.
    flip: probability of mirroring. in_memory: keep all pictures decoded (None: when they fit `memory_mib`).
    """

    train: str
    val: str | None = None
    min_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    flip: Fraction = 0.5
    in_memory: bool | None = None
    memory_mib: Positive = 512
    num_workers: Count = 0
    max_val_images: Positive = 2048


class LossRecipe(Section):
    """Losses and their weights (specification, section 4: the defaults are those of single-stage TiTok).

    perceptual: "efficientnet_lite0" (offline), "convnext_s", "lpips", "lpips-convnext_s-W1-W2" (a weighted mean) or
    "none"; `perceptual_weights` gives the file of each network. logvar_init: fixed log-variance of the reconstruction.
    """

    reconstruction: Literal["l1", "l2"] = "l2"
    reconstruction_weight: Weight = 1.0
    quantizer_weight: Weight = 1.0
    kl_weight: Weight = 1e-6
    logvar_init: float = 0.0
    perceptual: str = "efficientnet_lite0"
    perceptual_weight: Weight = 1.0
    perceptual_weights: dict[str, Path] = {}
    discriminator_weight: Weight = 0.0
    discriminator_factor: Weight = 1.0
    discriminator_start: Count = 0
    discriminator_lr: Weight = 1e-4
    lecam_weight: Weight = 0.001
    lecam_decay: Fraction = 0.999


class OptimizerRecipe(Section):
    """AdamW with linear warm-up, the full rate until step `hold_steps`, and a cosine to `end_lr` at the last step."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    end_lr: Weight = 1e-5
    warmup_steps: Count = 10_000
    hold_steps: Count = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: Weight = 1e-4
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Fraction = 0.999


class RunRecipe(Section):
    """Length, batch and rhythm. `batch_size` is per process and accumulation step; an `every` of 0 is never.

    rounded_steps: of the last ones, with large weights rounded to the bits of `export_dtype`; their gradients go to the
    weights as they were.
    """

    steps: Positive = 1_000_000
    batch_size: Positive = 32
    gradient_accumulation: Positive = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: Count = 0
    log_every: Positive = 50
    sample_every: Count = 1000
    validate_every: Count = 1000
    checkpoint_every: Count = 1000
    keep_checkpoints: Positive = 2
    num_samples: Positive = 8
    export_dtype: Literal["float32", "float16", "int8", "int7", "int6", "int5", "int4"] = "float32"
    rounded_steps: Count = 0

    @model_validator(mode="after")
    def _rounds(self):
        if self.rounded_steps and not self.export_dtype.startswith("int"):
            raise ValueError(f"rounded_steps needs an export_dtype to round to (int8 to int4), not {self.export_dtype}")
        return self


class TrainingRun(Section):
    """What every run has; `output` is its folder."""

    name: str
    output: Path
    optimizer: OptimizerRecipe = OptimizerRecipe()
    run: RunRecipe = RunRecipe()

    @model_validator(mode="after")
    def _fits(self):
        if max(self.optimizer.warmup_steps, self.optimizer.hold_steps) >= self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} and hold_steps {self.optimizer.hold_steps} "
                f"must be below run.steps {self.run.steps}"
            )
        return self


class Recipe(TrainingRun):
    """One training run; `output` is the run's folder."""

    model: ModelRecipe
    data: DataRecipe
    loss: LossRecipe = LossRecipe()


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = (), schema: type[Section] = Recipe):
    """Read and check the recipe at `path`, with `section.key=value` overrides (values are YAML).

    `schema` is what the recipe is: a `Recipe` of a tokenizer or a `GeneratorRecipe`.

    Raises:
        InvalidRecipe: unreadable file, unknown key (with the nearest right one) or a value of the wrong kind.
    """
    values = read_recipe(path)
    for override in overrides:
        _apply_override(values, override)
    return check_recipe(values, schema)


def read_recipe(path: str | Path) -> dict:
    """The plain values of the recipe at `path`."""
    path = Path(path)
    if not path.is_file():
        known = [p.name for p in (Path(__file__).parent.parent / "recipes").glob("*.yaml")]
        raise InvalidRecipe(f"recipe {path} does not exist.{nearest_names(path.name, known)}")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise InvalidRecipe(f"recipe {path} is larger than {MAX_RECIPE_BYTES} bytes")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InvalidRecipe(f"recipe {path} must be a mapping of sections")
    return values


def check_recipe(values: dict, schema: type[Section] = Recipe):
    """Turn plain `values` into a recipe, or raise InvalidRecipe with one line that says what is wrong."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise InvalidRecipe("; ".join(_explain(item, schema) for item in error.errors())) from error


def _apply_override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InvalidRecipe(f"override {override!r} must look like section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InvalidRecipe(f"override {override!r}: {section} is not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRecipe(f"override {override!r}: {' '.join(str(error).split())}") from error


def _explain(item: dict, schema: type[Section]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{where or 'recipe'}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r:.80})"
    section: Any = schema
    for part in item["loc"][:-1]:
        section = section.model_fields[part].annotation
    return f"unknown key {where}.{nearest_names(str(item['loc'][-1]), list(section.model_fields))}"
