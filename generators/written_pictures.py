"""Pictures of prompts by a model that writes texts and pictures, as any generator of pictures makes them.

SEED-LLaMA replies to prompts; its `draw` has it write one picture for each text. What asks generators for pictures (the
command line, the studio) sees that as a generator whose pictures have no pieces to keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.base import OnStep
from ..core.errors import InvalidInput
from ..core.generator import Generation, check_flag, check_names, check_option_names
from ..core.image_tokenizer import ImageTokenizer
from ..core.prompts import read_prompts
from ..core.tokens import Tokens


def picture_generator(model: Any) -> Any:
    """`model`, if it makes pictures of labels or prompts by itself; else what makes them with it."""
    return WrittenPictures(model) if not hasattr(model, "sample") and hasattr(model, "draw") else model


@dataclass(frozen=True)
class DrawnSettings:
    """How to write and draw: `options` of the model's `draw`; steps and guidance are the image decoder's."""

    options: dict[str, Any]
    total_steps: int


class WrittenPictures:
    """One picture for each prompt, by the `draw` of `model`. See `ImageGenerator` for what the methods do."""

    modality = "image"
    accepts_text = True
    method = "draw"
    label_names: tuple[str, ...] = ()
    scales: tuple[int, ...] = ()
    num_units, unit_grid, unit_word = 0, None, "token"
    decoding_option_names: tuple[str, ...] = ()  # steps and guidance of drawing are settings here

    def __init__(self, model: Any):
        self.model = model
        self._defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(model.draw).parameters.items()
            if name not in ("texts", "seed", "batch_size", "on_step")
        }

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> ImageTokenizer:
        return self.model.tokenizer

    def use_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        self.model.use_tokenizer(tokenizer)

    def requests(self, labels) -> list[str]:
        prompts = read_prompts(labels)
        if not all(prompts):
            raise InvalidInput(f"{self.name} needs a prompt: write what the picture shows")
        return prompts

    def checked_settings(self, /, steps=None, guidance: float | None = None, **options) -> DrawnSettings:
        check_option_names(self, options, self._defaults)
        given = {"steps": steps, "guidance": guidance} | options
        given = self._defaults | {name: value for name, value in given.items() if value is not None}
        (drawing,) = self.tokenizer.decoding_arguments(steps=given["steps"], guidance=given["guidance"]).values()
        self.model.settings(temperature=given["temperature"], top_p=given["top_p"])
        check_flag(given["negative"], "negative")
        given |= {"steps": drawing.steps, "guidance": drawing.guidance}
        return DrawnSettings(given, self.model.vocabulary.length + 2)

    def decoding_defaults(self) -> dict[str, Any]:
        return {}

    def checked_decoding(self, /, **options) -> dict[str, Any]:
        if options:
            raise InvalidInput(
                f"{self.name} has no options of decoding, so {', '.join(options)} cannot be chosen there; steps and "
                "guidance of drawing are settings of its own"
            )
        return {}

    def options_of(self, settings: DrawnSettings) -> dict[str, Any]:
        return dict(settings.options)

    def sample(
        self,
        labels,
        *,
        seed: int | Sequence[int] | None = None,
        start=None,
        keep=None,
        decoding: Mapping[str, Any] | None = None,
        batch_size: int = 8,
        previews: bool = False,
        on_step: OnStep | None = None,
        **options,
    ) -> Generation:
        if start is not None or keep is not None:
            raise InvalidInput(f"{self.name} writes whole pictures: none of one can be kept")
        self.checked_decoding(**check_names(decoding, "decoding"))
        settings = self.checked_settings(**options)
        return self.model.draw(
            self.requests(labels), seed=seed, batch_size=batch_size, on_step=on_step, **settings.options
        )

    def start_content(self, start) -> Tensor:
        raise InvalidInput(f"{self.name} writes whole pictures: none of one can be kept")

    def tokens(self, content: Tensor) -> Tokens:
        return self.model.image_tokens(content)
