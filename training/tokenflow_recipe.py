"""Recipes of TokenFlow; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from .recipe import Count, DataRecipe, LossRecipe, Section, TrainingRun, Weight, load_recipe
from .speech_recipe import class_name_of


class TokenFlowModelRecipe(Section):
    """What is trained.

    stage: "single" trains everything; "decoder" the pixel decoder alone, of the model in `init_from` (the authors'
    second stage): a new one where `config` gives it other sizes, so that ids keep their meaning.
    tower: folder of CLIP or SigLIP (of transformers) that the semantic encoder begins as; None for a random one.
    config: arguments of the class, over those of `like`. like: a name from `mediatok models` whose sizes are taken.
    init_from: folder in our layout whose weights the run starts from.
    """

    class_name: Literal["TokenFlow"]
    stage: Literal["single", "decoder"] = "single"
    tower: Path | None = None
    like: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    init_from: Path | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _needs(self):
        if self.stage == "decoder" and self.init_from is None:
            raise ValueError("stage decoder goes on with a trained model and needs init_from= (its folder)")
        if self.init_from is not None and (self.like or self.tower):
            raise ValueError("init_from brings its own sizes and tower; leave out like and tower")
        strange = set(self.config) - {"decoder_channels", "decoder_res_blocks"}
        if self.init_from is not None and (strange or (self.config and self.stage != "decoder")):
            raise ValueError("init_from brings its own sizes; only stage decoder may change those of the pixel decoder")
        return self


class TokenFlowLossRecipe(LossRecipe):
    """The authors' losses. Their pictures lie in [-1, 1], so that their mean square is 4 times ours.

    teacher: a network of `teachers.py`, whose features the semantic decoder gives back. teacher_weights: its files.
    discriminator: "pix2pix" (the authors'), or "maskbit", the one of the other tokenizers here.
    """

    reconstruction_weight: Weight = 4.0
    perceptual: str = "lpips"
    discriminator: Literal["pix2pix", "maskbit"] = "pix2pix"
    discriminator_weight: Weight = 0.5
    discriminator_start: Count = 20_000
    lecam_weight: Weight = 0.0
    teacher: str = "clip"
    teacher_weights: Path | None = None
    semantic_weight: Weight = 1.0


class TokenFlowRecipe(TrainingRun):
    """One training run; `output` is the run's folder."""

    model: TokenFlowModelRecipe
    data: DataRecipe
    loss: TokenFlowLossRecipe = TokenFlowLossRecipe()


def load_tokenflow_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TokenFlowRecipe:
    """Read and check the recipe at `path`; see `load_recipe`."""
    return load_recipe(path, overrides, TokenFlowRecipe)


def is_tokenflow_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` trains a TokenFlow, by its model.class_name."""
    return class_name_of(path) == "TokenFlow"
