"""Training text-to-image generators: the loop of `generator.py`, where the classes are captions.

What a picture is called in the label fields is its prompt, and "no class" is no prompt. Every prompt is read once,
before the first step.

Shape suffixes: B batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.prompts import NO_PROMPT
from .generator import GeneratorTrainer


class TextToImageTrainer(GeneratorTrainer):
    """A run of what reads text: a `NextScaleLlama`, or a `NextToken` with a text encoder."""

    def build_models(self, state: dict | None) -> None:
        super().build_models(state)
        self.prompts = self.raw_model.condition_of([*self.folder.labels.names, NO_PROMPT])

    def condition(self, labels_B: Tensor) -> Any:
        return self.prompts[labels_B].to(self.device)

    def shown_labels(self, number: int) -> list[str]:
        return self.folder.labels.names[:number]
