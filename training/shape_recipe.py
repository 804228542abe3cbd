"""Recipes of shape tokenizers; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from .recipe import Count, Fraction, OptimizerRecipe, Positive, RunRecipe, Section, TrainingRun, Weight, load_recipe
from .shape_data import ShapeDataRecipe
from .speech_recipe import class_name_of

SHAPE_TOKENIZERS = ("VAT",)


class ShapeModelRecipe(Section):
    """Which shape tokenizer is trained.

    config: arguments of the class, over those of `like`. like: a name from `mediatok models` whose sizes are taken.
    init_from: folder in our layout whose weights the run starts from.
    continuous_steps: first steps without quantization; then k-means over the latents places the codes.
    partial_share: share of the quantized batches that are decoded after a random number of scales, so that a shape is
    recognisable before its last scale.
    aligned_start: a start for small data sets; see `shape_start.py`.
    revive_codes: give codes that no token chose for a while the place of a token; without it small runs collapse.
    """

    class_name: Literal["VAT"] = "VAT"
    like: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    init_from: Path | None = None
    continuous_steps: Count = 0
    partial_share: Fraction = 0.0
    aligned_start: bool = False
    revive_codes: bool = False
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _needs(self):
        if self.init_from is not None and (self.like or self.config or self.aligned_start):
            raise ValueError("init_from brings its own sizes and weights; leave out like, config and aligned_start")
        return self


class ShapeLossRecipe(Section):
    """Weights of the losses: binary cross-entropy of the uniform queries has 1, that of the near ones `near_weight`.

    kl_weight: of the KL divergence from the unit Gaussian, a mean over tokens and channels.
    """

    near_weight: Weight = 0.1
    kl_weight: Weight = 1e-3
    quantizer_weight: Weight = 1.0


class ShapeOptimizerRecipe(OptimizerRecipe):
    """As for other tokenizers, with the specification's defaults; `muon` gives the blocks' matrices to Muon."""

    lr: float = Field(1e-4, gt=0)
    warmup_steps: Count = 5_000
    weight_decay: Weight = 1e-2
    muon: bool = False


class ShapeRunRecipe(RunRecipe):
    """As for other runs. val_queries: places of either kind at which a validation shape is compared.
    sample_resolution: cells a side of the meshes that are drawn.
    """

    val_queries: Positive = 8192
    sample_resolution: Positive = 64


class ShapeRecipe(TrainingRun):
    """One training run; `output` is the run's folder."""

    model: ShapeModelRecipe
    data: ShapeDataRecipe
    loss: ShapeLossRecipe = ShapeLossRecipe()
    optimizer: ShapeOptimizerRecipe = ShapeOptimizerRecipe()
    run: ShapeRunRecipe = ShapeRunRecipe()


def load_shape_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ShapeRecipe:
    """Read and check the recipe at `path`; see `load_recipe`."""
    return load_recipe(path, overrides, ShapeRecipe)


def is_shape_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` trains a shape tokenizer, by its model.class_name."""
    return class_name_of(path) in SHAPE_TOKENIZERS
