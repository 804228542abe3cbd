"""Recipes of SEED's training, one a stage; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .recipe import (
    DataRecipe,
    Positive,
    Section,
    TrainingRun,
    Weight,
    load_recipe,
    read_recipe,
)

PARTS = {"contrast": "seed", "codebook": "", "drawing": ""}  # stage -> where the model is in what is trained


class SeedModelRecipe(Section):
    """Which stage of which model is trained.

    stage: "contrast" (pictures and captions: the Q-Former), "codebook" (codes, and the decoder to an image embedding)
    or "drawing" (the small image decoder of small models).
    config: arguments of the class, over those of `like`, or of the model in `init_from`, where only `clustering` and
    `drawing_sizes` may change. like: a name from `mediatok models` whose sizes are taken. init_from: folder of the
    stage before.
    train_tower: let the vision tower learn in the first stage, too; for small models, which have no trained one.
    """

    class_name: Literal["Seed"]
    stage: Literal["contrast", "codebook", "drawing"]
    like: str | None = None
    config: dict[str, Any] = {}  # noqa: RUF012
    init_from: Path | None = None
    train_tower: bool = False

    @model_validator(mode="after")
    def _follows(self):
        if self.stage != "contrast" and self.init_from is None:
            raise ValueError(f"stage {self.stage!r} continues the one before it and needs init_from= (its folder)")
        if self.init_from is not None and (self.like or set(self.config) - {"clustering", "drawing_sizes"}):
            raise ValueError("init_from brings its own sizes; leave out like, and config but clustering, drawing_sizes")
        return self


class SeedDataRecipe(DataRecipe):
    """Pictures as `DataRecipe` has them.

    names: a JSON file that has the captions of pictures without a text file beside them, by their file's stem:
    {"1f34e": {"name": "red apple"}}. caption_fields: what of it makes a caption, joined by commas.
    styles: more folders to train on, which draw the same things in other styles, with the same captions. Two pictures
    of a caption then come one after the other, and the first stage pulls them together, too.
    """

    names: Path | None = None
    styles: tuple[Path, ...] = ()
    caption_fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("name",)

    @model_validator(mode="after")
    def _captions_of_styles(self):
        if self.styles and self.names is None:
            raise ValueError("styles= draw what the same captions say: give those in names=")
        return self


class SeedTextRecipe(Section):
    """How captions are read in the first stage.

    tokenizer: folder of a text tokenizer of transformers (BERT's, as the authors have it); without one, words and
    characters of the training captions are the vocabulary. max_tokens: of a caption. feature_size: of what is compared.
    """

    tokenizer: Path | None = None
    max_tokens: Positive = 32
    feature_size: Positive = 256


class SeedLossRecipe(Section):
    """Weights of the losses; the defaults of the second stage are the authors'.

    tower_teacher: the network whose features the vision tower and the last query learn to give back in the first
    stage, where the tower is trained (`train_tower`); by tower_weight, beside 1 for the contrast.
    teacher: folder of the CLIP vision model (`CLIPVisionModelWithProjection`) whose embeddings are predicted; without
    one, what the last query finds is.
    """

    quantizer_weight: Weight = 5.0
    semantic_weight: Weight = 2.0
    embedding_weight: Weight = 0.5
    teacher: Path | None = None
    tower_teacher: Literal["efficientnet_lite0"] | None = None
    tower_weight: Weight = 5.0


class SeedRecipe(TrainingRun):
    """One stage's run; `output` is the run's folder."""

    model: SeedModelRecipe
    data: SeedDataRecipe
    text: SeedTextRecipe = SeedTextRecipe()
    loss: SeedLossRecipe = SeedLossRecipe()

    @model_validator(mode="after")
    def _taught_tower_learns(self):
        if self.loss.tower_teacher is not None and not (self.model.stage == "contrast" and self.model.train_tower):
            raise ValueError("loss.tower_teacher teaches in the first stage, with model.train_tower: true")
        return self


def is_seed_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` trains a SEED."""
    model = read_recipe(path).get("model")
    return isinstance(model, dict) and model.get("class_name") == "Seed"


def load_seed_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SeedRecipe:
    """`load_recipe` of one of these stages."""
    return load_recipe(path, overrides, SeedRecipe)
