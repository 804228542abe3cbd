"""Recipes of next-scale generators of shapes; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .generator_recipe import GeneratorRecipe
from .recipe import Fraction, Positive, RunRecipe, Section, load_recipe


class NextScaleModelRecipe(Section):
    """Which generator is trained; see `GeneratorModelRecipe`."""

    class_name: Literal["NextScale"]
    like: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    init_from: Path | None = None


class NextScaleDataRecipe(Section):
    """Shapes with labels, in folders of shards (`shape_shards.py`).

    train: folders, of which the training split is used; name one twice to see its shapes twice as often.
    val: folders of whose shapes the validation split is used; default the first of `train`.
    label_fields: facts of a shape that classes are taken from, the first one's classes first. Its label is drawn among
    them at each visit. Shapes without a label train the "no class" one.
    views: variants of each shape, which are encoded once: the shape as it is, then others. All keep its front in front.
    mirror: probability of a mirror image. min_scale: each axis is scaled by a factor from this to its inverse, then the
    shape is normalised again.
    """

    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    val: tuple[Path, ...] = ()
    label_fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("category", "object")
    views: Positive = 16
    mirror: Fraction = 0.5
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_val_shapes: Positive = 512


class NextScaleRunRecipe(RunRecipe):
    """As for other runs. sample_resolution: cells a side of the meshes that are drawn."""

    sample_resolution: Positive = 64


class NextScaleRecipe(GeneratorRecipe):
    """One run; `output` is its folder. tokenizer: a name or a folder of ours; it stays as it is."""

    model: NextScaleModelRecipe
    data: NextScaleDataRecipe
    run: NextScaleRunRecipe = NextScaleRunRecipe()


def load_next_scale_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> NextScaleRecipe:
    """Read and check the recipe at `path`; see `load_recipe`."""
    return load_recipe(path, overrides, NextScaleRecipe)
