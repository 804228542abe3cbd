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
    """

    names: Path | None = None
    caption_fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("name",)


class SeedTextRecipe(Section):
    """How captions are read in the first stage.

    tokenizer: folder of a text tokenizer of transformers (BERT's, as the authors have it); without one, words and
    characters of the training captions are the vocabulary. max_tokens: of a caption. feature_size: of what is compared.
    """

    tokenizer: Path | None = None
    max_tokens: Positive = 32
    feature_size: Positive = 256


class SeedLossRecipe(Section):
    """Weights of the second stage; the defaults are the authors'.

    teacher: folder of the CLIP vision model (`CLIPVisionModelWithProjection`) whose embeddings are predicted; without
    one, the mean of what the own vision tower sees is.
    """

    quantizer_weight: Weight = 5.0
    semantic_weight: Weight = 2.0
    embedding_weight: Weight = 0.5
    teacher: Path | None = None


class SeedRecipe(TrainingRun):
    """One stage's run; `output` is the run's folder."""

    model: SeedModelRecipe
    data: SeedDataRecipe
    text: SeedTextRecipe = SeedTextRecipe()
    loss: SeedLossRecipe = SeedLossRecipe()


def is_seed_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` trains a SEED."""
    model = read_recipe(path).get("model")
    return isinstance(model, dict) and model.get("class_name") == "Seed"


def load_seed_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SeedRecipe:
    """`load_recipe` of one of these stages."""
    return load_recipe(path, overrides, SeedRecipe)
