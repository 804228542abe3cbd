"""Train a speech model: `accelerate launch -m mediatok.training.speech RECIPE.yaml [section.key=value ...]`.

The recipe's model.class_name says which: the encoder of semantic tokens (SemanticTokenizer), enhancement (GenSE),
recognition (Paraformer) or speaking (Speak). Codecs have a command of their own, `mediatok.training.codec`.
"""

from __future__ import annotations

import importlib
import sys

from .speech_recipe import SpeechRunRecipe, load_speech_recipe
from .trainer import Trainer, run_from_command_line

# Class of the model -> module in this folder, and the trainer there.
TRAINERS = {
    "SemanticTokenizer": ("semantic_training", "SemanticTrainer"),
    "GenSE": ("gense_training", "GenSETrainer"),
    "Paraformer": ("paraformer_training", "ParaformerTrainer"),
    "Speak": ("speak_training", "SpeakTrainer"),
}


def trainer_class(class_name: str) -> type[Trainer]:
    """The trainer of a model of that class."""
    module, name = TRAINERS[class_name]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def speech_trainer(recipe: SpeechRunRecipe) -> Trainer:
    """A run of `recipe`."""
    return trainer_class(recipe.model.class_name)(recipe)


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.speech", load_speech_recipe, speech_trainer, argv)


if __name__ == "__main__":
    sys.exit(main())
