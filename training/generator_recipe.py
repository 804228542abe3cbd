"""Recipes of generators; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .recipe import DataRecipe, OptimizerRecipe, Section, TrainingRun, Weight, load_recipe, read_recipe

GENERATORS = ("MaskGIT", "XAR", "NextToken", "NextScale", "NextScaleLlama")


class GeneratorOptimizerRecipe(OptimizerRecipe):
    """As for tokenizers; `muon` gives the matrices of the blocks to Muon, AdamW keeps the rest."""

    muon: bool = False


class GeneratorModelRecipe(Section):
    """Which generator is trained.

    config: arguments of the class, over those of `like`; what follows from the tokenizer and the labels is filled in.
    like: a name from `mediatok models` whose sizes are taken. init_from: a folder in our layout to start from; classes
    that both know keep what was learned, new ones begin as their pictures' class in the label field before stands.
    near_codes: MaskGIT's `train_with_near_codes` with this temperature; None for hard targets.
    text_encoder: a T5 (its folder, or google/flan-t5-small and the like); NextToken then reads names as prompts.
    """

    class_name: Literal["MaskGIT", "XAR", "NextToken", "NextScaleLlama"]
    like: str | None = None
    config: dict[str, Any] = {}  # noqa: RUF012
    init_from: Path | None = None
    near_codes: Annotated[float, Field(gt=0)] | None = None
    text_encoder: str | None = None

    @model_validator(mode="after")
    def _fits_its_class(self):
        if self.near_codes is not None and self.class_name != "MaskGIT":
            raise ValueError(f"near_codes is for MaskGIT; {self.class_name} has no codes")
        if self.text_encoder is not None and self.class_name != "NextToken":
            raise ValueError(f"text_encoder is for NextToken; {self.class_name} has none")
        return self


class GeneratorDataRecipe(DataRecipe):
    """Pictures with labels, in image folders.

    labels: a JSON file {file stem: {field: value, ...}}; without it a picture's class is the name of its folder.
    label_fields: the fields that classes are taken from, the first one's classes first. A picture's label is drawn
    among its fields at each visit. Pictures without a label train the "no class" one.
    label_weights: how often pictures of a class are visited, relative to 1, by name of a class of the first field.
    encode: "pretokenize" encodes every picture and its mirror image once (and crops nothing but the centre);
    "on_the_fly" encodes augmented pictures at each visit.
    """

    labels: Path | None = None
    label_fields: tuple[str, ...] = ("category",)
    label_weights: dict[str, Weight] = {}  # noqa: RUF012
    encode: Literal["pretokenize", "on_the_fly"] = "pretokenize"


class GeneratorRecipe(TrainingRun):
    """One run; `output` is its folder. tokenizer: a name or a folder of ours; it stays as it is."""

    model: GeneratorModelRecipe
    tokenizer: Annotated[str, Field(min_length=1)]
    data: GeneratorDataRecipe
    optimizer: GeneratorOptimizerRecipe = GeneratorOptimizerRecipe()


def load_generator_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> GeneratorRecipe:
    """Read and check the recipe at `path` by its model.class_name; see `load_recipe`."""
    if _class_name_of(path) == "NextScale":
        from .next_scale_recipe import load_next_scale_recipe  # builds on this module

        return load_next_scale_recipe(path, overrides)
    return load_recipe(path, overrides, GeneratorRecipe)


def is_generator_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` trains a generator, by its model.class_name."""
    return _class_name_of(path) in GENERATORS


def _class_name_of(path: str | Path) -> str:
    model = read_recipe(path).get("model")
    return str(model.get("class_name", "")) if isinstance(model, dict) else ""
