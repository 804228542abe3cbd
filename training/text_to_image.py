"""Training text-to-image generators over scales: the loop of `generator.py`, where the classes are captions.

What a picture is called in the label fields is its prompt, and "no class" is no prompt.

Shape suffixes: B batch, P prefix tokens, N classes.
"""

from __future__ import annotations

from torch import Tensor

from ..core.prompts import NO_PROMPT
from .generator import GeneratorTrainer


class TextToImageTrainer(GeneratorTrainer):
    """A `NextScaleLlama`'s run."""

    def build_models(self, state: dict | None) -> None:
        super().build_models(state)
        self.prefix_NP = self.raw_model.prompt_ids([*self.folder.labels.names, NO_PROMPT]).to(self.device)

    def condition(self, labels_B: Tensor) -> Tensor:
        return self.prefix_NP[labels_B]

    def shown_labels(self, number: int) -> list[str]:
        return self.folder.labels.names[:number]
