"""Recipes of FlexTok's resampler; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from .recipe import Count, DataRecipe, Fraction, OptimizerRecipe, Section, TrainingRun, Weight, load_recipe
from .speech_recipe import class_name_of


class FlexTokModelRecipe(Section):
    """What is trained: the two transformers between a frozen VAE's latents and tokens.

    vae: a KLAutoencoder, by name or folder; its sizes and weights become part of the model. Train one with a recipe of
    class KLAutoencoder.
    config: arguments of the class, over those of `like`. like: a name from `mediatok models` whose sizes are taken.
    init_from: folder in our layout whose weights the run starts from, VAE included.
    aligned_start: see `flextok_start.py`.
    """

    class_name: Literal["FlexTok"]
    vae: str | None = None
    like: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    init_from: Path | None = None
    aligned_start: bool = False
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _needs(self):
        if (self.vae is None) == (self.init_from is None):
            raise ValueError("give vae= (a KLAutoencoder) for a new model, or init_from= to go on with one")
        if self.init_from is not None and (self.like or self.config or self.aligned_start):
            raise ValueError("init_from brings its own sizes and weights; leave out like, config and aligned_start")
        return self


class FlexTokLossRecipe(Section):
    """The flow's loss has weight 1.

    times: density of the times that are trained. null_share: of pictures without condition, for guidance.
    teacher: a network of `teachers.py` whose features at the patches the decoder's features behind block `features_of`
    (counted from 0) are to give back, through a small network of their own ("REPA"; Yu et al. 2024, arXiv 2410.06940);
    None for none. teacher_weights: its files. teacher_weight: of that loss.
    """

    times: Literal["mode", "uniform", "logit_normal", "stratified"] = "mode"
    null_share: Fraction = 0.1
    teacher: str | None = None
    teacher_weights: Path | None = None
    teacher_weight: Weight = 1.0
    features_of: Count = 1


class FlexTokOptimizerRecipe(OptimizerRecipe):
    """As for other tokenizers; `muon` gives the matrices of the blocks to Muon, AdamW keeps the rest."""

    muon: bool = False


class FlexTokRecipe(TrainingRun):
    """One training run; `output` is the run's folder."""

    model: FlexTokModelRecipe
    data: DataRecipe
    loss: FlexTokLossRecipe = FlexTokLossRecipe()
    optimizer: FlexTokOptimizerRecipe = FlexTokOptimizerRecipe()


def load_flextok_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> FlexTokRecipe:
    """Read and check the recipe at `path`; see `load_recipe`."""
    return load_recipe(path, overrides, FlexTokRecipe)


def is_flextok_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` trains a FlexTok, by its model.class_name."""
    return class_name_of(path) == "FlexTok"
