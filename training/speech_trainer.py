"""What the runs of speech models share: building the model, its optimizer, the division of the data."""

from __future__ import annotations

import re
from typing import Any

from ..core.errors import InvalidRecipe, nearest_names
from ..core.registry import ENTRIES, constructor_arguments, find_entry, load
from .build import construct
from .schedule import make_optimizer
from .speech_recipe import SpeechModelRecipe
from .trainer import Trainer


class SpeechTrainer(Trainer):
    """One run of a speech model."""

    samples_name = "clips"

    def build_optimizers(self) -> None:
        optimizer = self.recipe.optimizer
        # `make_optimizer` knows the matrices for Muon by the name "block"; some models call their blocks layers.
        named = [(re.sub(r"\blayers\.", "blocks.", name), value) for name, value in self.raw_model.named_parameters()]
        self.model, self.optimizer = self.accelerator.prepare(
            self.raw_model,
            make_optimizer(named, optimizer.lr, optimizer.betas, optimizer.weight_decay, muon=optimizer.muon),
        )

    @property
    def train_split(self) -> str | None:
        """Which part of the folder `data.train` is trained on: all of it when there is another to validate on."""
        return "train" if self.recipe.data.val is None else None

    @property
    def val_folder(self) -> tuple[str, str | None]:
        """The folder to validate on, and which part of it."""
        data = self.recipe.data
        return (data.train, "val") if data.val is None else (data.val, None)


def build_speech_model(recipe: SpeechModelRecipe, facts: dict[str, Any], config: dict | None = None):
    """The model of `recipe`: fresh, from `init_from`, or random with exactly `config` (that of a checkpoint).

    facts: arguments of the class that data and tokenizers decide.

    Raises:
        InvalidRecipe: names, sizes or facts that do not fit together.
    """
    if config is not None:
        return construct(recipe.class_name, config)
    if recipe.init_from is None:
        for key in facts.keys() & recipe.config.keys():
            if recipe.config[key] != facts[key]:
                raise InvalidRecipe(f"model.config.{key} is {recipe.config[key]!r}, but the data say {facts[key]!r}")
        return construct(recipe.class_name, _sizes_of(recipe) | facts | recipe.config)
    model = load(str(recipe.init_from))
    if type(model).__name__ != recipe.class_name:
        raise InvalidRecipe(f"model.init_from holds a {type(model).__name__}, model.class_name is {recipe.class_name}")
    return model


def _sizes_of(recipe: SpeechModelRecipe) -> dict:
    if recipe.like is None:
        return {}
    entry = find_entry(recipe.like)
    if entry is None or entry.class_name != recipe.class_name:
        names = [name for name, known in ENTRIES.items() if known.class_name == recipe.class_name]
        raise InvalidRecipe(
            f"model.like {recipe.like!r} is not a known {recipe.class_name}.{nearest_names(recipe.like, names)}"
        )
    return constructor_arguments(entry)
