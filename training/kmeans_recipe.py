"""Recipes of semantic tokens' clusters; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from .recipe import Count, Positive, Section, load_recipe, read_recipe


class ClusteredSpeechRecipe(Section):
    """Speech whose features are clustered: the "train" part of a folder, see `SpeechFolder`.

    max_frames: features that are kept, drawn over all clips; they are held in memory (4 KiB each with a large encoder).
    """

    train: str
    max_frames: Positive = 200_000


class ClustersRecipe(Section):
    """Mini-batch k-means (Sculley 2010).

    start: "k-means++" or "random" features. batch_size: features a step; all are visited `passes` times.
    """

    num_clusters: Annotated[int, Field(ge=2)] = 1024
    start: Literal["k-means++", "random"] = "k-means++"
    batch_size: Positive = 10_000
    passes: Positive = 50
    seed: Count = 0


class KMeansRecipe(Section):
    """Fitting of the clusters of a semantic tokenizer.

    encoder: whose features are clustered: a name from `mediatok models`, a folder in our layout or in that of
    `transformers`, or a hub id. Clusters that it has are replaced.
    output: the tokenizer with its clusters is written to `model` in this folder.
    """

    name: str
    output: Path
    encoder: Annotated[str, Field(min_length=1)]
    data: ClusteredSpeechRecipe
    clusters: ClustersRecipe = ClustersRecipe()
    export_dtype: Literal["float32", "float16", "int8", "int7", "int6", "int5", "int4"] = "float32"


def load_kmeans_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> KMeansRecipe:
    """Read and check the recipe at `path`; see `load_recipe`."""
    return load_recipe(path, overrides, KMeansRecipe)


def is_kmeans_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` fits clusters: it has an encoder, and no model to train."""
    values = read_recipe(path)
    return "encoder" in values and "model" not in values
