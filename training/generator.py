"""Train a generator: `accelerate launch -m mediatok.training.generator RECIPE.yaml [section.key=value ...]`.

MaskGIT, xAR and next-token generators alike: the tokenizer's content of a picture and a label go in, the model's
`forward` gives the loss.
Next-scale generators of shapes (`next_scale_training.py`) share all but the data.

Shape suffixes: B batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidRecipe, TokenizerMismatch, nearest_names
from ..core.images import to_pixels
from ..core.registry import ENTRIES, constructor_arguments, find_entry, load
from ..generators.next_scale_llama import NextScaleLlama
from ..generators.next_token import NextToken
from ..generators.next_token_text import encoder_width
from ..generators.text_pieces import pieces_of
from ..nn.shared_mapping_vq import SharedMappingQuantizer
from .build import config_of, construct
from .code_start import start_from_codes
from .data import derived_seed
from .generator_data import (
    EncodedPictures,
    LabelledFolder,
    PicturesOnTheFly,
    to_content,
    validation_content,
)
from .generator_recipe import GeneratorModelRecipe, GeneratorRecipe, load_generator_recipe
from .schedule import make_optimizer
from .tracker import Tracker
from .trainer import Trainer, run_from_command_line


class GeneratorTrainer(Trainer):
    """A generator's run. The tokenizer is frozen."""

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        self.tokenizer = load(recipe.tokenizer).requires_grad_(False).to(self.device)
        split = recipe.data.val is None
        self.folder = LabelledFolder(recipe.data.train, "train" if split else None, recipe.data)
        self.val_folder = LabelledFolder(
            recipe.data.val or recipe.data.train, "val" if split else None, recipe.data, self.folder.labels
        )
        config = None if state is None else state["model_config"]
        facts = what_follows(self.tokenizer, recipe, self.folder.labels.names)
        wider = self.folder.labels.wider(self.folder.paths)
        self.raw_model = build_generator(recipe.model, facts, config, wider).to(self.device).train()
        try:
            self.raw_model.use_tokenizer(self.tokenizer)
        except TokenizerMismatch as error:
            raise InvalidRecipe(f"tokenizer: {error}") from error
        if config is None and recipe.model.init_from is None and isinstance(self.raw_model, NextToken | NextScaleLlama):
            start_from_codes(self.raw_model, self.tokenizer.quantize)
        if recipe.model.near_codes is not None:
            self.raw_model.train_with_near_codes(self.tokenizer.quantize.codebook(), recipe.model.near_codes)

    def build_optimizers(self) -> None:
        optimizer = self.recipe.optimizer
        self.model, self.optimizer = self.accelerator.prepare(
            self.raw_model,
            make_optimizer(
                self.raw_model.named_parameters(), optimizer.lr, optimizer.betas, optimizer.weight_decay,
                is_decayed=self.raw_model.is_decayed, muon=optimizer.muon,
            ),
        )  # fmt: skip

    def build_data(self) -> None:
        recipe = self.recipe
        if recipe.data.encode == "pretokenize":
            with self.accelerator.main_process_first():
                cache = recipe.output / "content.safetensors"
                self.data = EncodedPictures(self.folder, self.tokenizer, recipe.data, recipe.run.seed, cache)
        else:
            self.data = PicturesOnTheFly(self.folder, self.tokenizer, recipe.data, recipe.run.seed)
        self.val_stored, self.val_labels = validation_content(
            self.val_folder, self.tokenizer, recipe.data.max_val_images
        )

    def open_batches(self, first_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        accelerator = self.accelerator
        return self.data.batches(
            first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        )

    def train_on(self, batch: tuple[Tensor, Tensor], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        stored, labels_B = batch
        seed = derived_seed(self.recipe.run.seed, self.step, self.accelerator.process_index, micro)
        rng = torch.Generator().manual_seed(seed)
        content = to_content(stored.to(self.device), self.tokenizer, rng)
        output = self.model(content, self.condition(labels_B), rng)
        return output.loss, output.metrics | {"total_loss": output.loss.detach()}

    def condition(self, labels_B: Tensor) -> Any:
        """What the model reads of class numbers, on this run's device."""
        return labels_B.to(self.device)

    def shown_labels(self, number: int) -> list:
        """What the first `number` pictures of the log are asked for by."""
        return [*range(number)]

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """The loss on held-out pictures; noise and masks are the same each time."""
        rng = torch.Generator().manual_seed(0)
        totals: dict[str, float] = {}
        size = self.recipe.run.batch_size
        for stored, labels_B in zip(self.val_stored.split(size), self.val_labels.split(size), strict=True):
            content = to_content(stored.to(self.device), self.tokenizer, rng)
            output = model(content, self.condition(labels_B), rng)
            for name, value in (output.metrics | {"loss": output.loss}).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(stored) / len(self.val_stored)
        return {f"val_{name}": value for name, value in totals.items()}

    def show_samples(self, model: torch.nn.Module, tracker: Tracker) -> None:
        """One column for each of the first classes, two seeds."""
        columns = min(self.recipe.run.num_samples, len(self.folder.labels.names))
        images = model.generate(self.shown_labels(columns) * 2, seed=0)
        pixels = torch.stack([to_pixels(image) for image in images])
        tracker.grid(self.step, pixels.unflatten(0, (2, columns)))


def what_follows(tokenizer, recipe: GeneratorRecipe, names: list[str]) -> dict:
    """The config values that the tokenizer and the labels decide."""
    facts = {
        "num_classes": len(names),
        "label_names": tuple(names),
        "tokenizer": recipe.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    if recipe.model.class_name == "NextScaleLlama":
        if not isinstance(getattr(tokenizer, "quantize", None), SharedMappingQuantizer):
            raise InvalidRecipe(f"tokenizer {recipe.tokenizer} is no TokenFlow, whose ids NextScaleLlama writes")
        return {
            "sides": tuple(tokenizer.config.sides), "codebook_size": tokenizer.vocab_size,
            "code_width": tokenizer.quantize.code_width, "text_pieces": pieces_of(names),
            "tokenizer": recipe.tokenizer, "tokenizer_fingerprint": tokenizer.fingerprint,
        }  # fmt: skip
    if recipe.model.class_name == "MaskGIT":
        if tokenizer.is_continuous:
            raise InvalidRecipe(f"tokenizer {recipe.tokenizer} has continuous latents; MaskGIT needs tokens")
        return facts | {"codebook_size": tokenizer.vocab_size, "num_tokens": tokenizer.max_tokens}
    if recipe.model.class_name == "NextToken":
        if tokenizer.is_continuous:
            raise InvalidRecipe(f"tokenizer {recipe.tokenizer} has continuous latents; NextToken needs tokens")
        facts |= {"vocab_size": tokenizer.vocab_size, "num_tokens": tokenizer.max_tokens}
        encoder = recipe.model.text_encoder
        if encoder is None:
            return facts
        return facts | {
            "num_classes": 0, "label_names": (), "text_width": encoder_width(encoder), "text_encoder": encoder,
        }  # fmt: skip
    if getattr(tokenizer, "latent_shape", None) is None:
        raise InvalidRecipe(f"tokenizer {recipe.tokenizer} has no latent map; xAR needs a KL autoencoder")
    channels, grid, _ = tokenizer.latent_shape
    return facts | {"latent_channels": channels, "grid": grid}


def build_generator(
    recipe: GeneratorModelRecipe, facts: dict, config: dict | None = None, wider: dict[str, list[str]] | None = None
):
    """The generator of `recipe`: fresh, from `init_from`, or random with exactly `config` (that of a checkpoint).

    `wider` gives the classes that a new class of `init_from`'s labels is a part of; see `take_weights`.

    Raises:
        InvalidRecipe: names, sizes or facts that do not fit together.
    """
    if config is not None:
        return construct(recipe.class_name, config)
    for key in facts.keys() & recipe.config.keys() - {"tokenizer"}:  # the tokenizer may go by another name later
        if recipe.config[key] != facts[key]:
            raise InvalidRecipe(f"model.config.{key} is {recipe.config[key]!r}, but the data say {facts[key]!r}")
    if recipe.init_from is None:
        return construct(recipe.class_name, _sizes_of(recipe) | facts | recipe.config)
    model = load(str(recipe.init_from))
    if type(model).__name__ != recipe.class_name or recipe.like:
        raise InvalidRecipe(f"model.init_from holds a {type(model).__name__}: its class and sizes are taken, no others")
    fresh = construct(recipe.class_name, config_of(model) | facts | recipe.config)
    take_weights(fresh, model, wider or {})
    return fresh


def take_weights(fresh, model, wider: dict[str, list[str]]) -> None:
    """Copy the weights of `model` into `fresh`, its classes (where there are any) by name.

    A new class begins as the first of its `wider` classes that `model` knows, or as "no class" stands.

    Raises:
        InvalidRecipe: other shapes than those of the class table differ.
    """
    given, own = model.state_dict(), fresh.state_dict()  # `own` shares its memory with the parameters
    if not fresh.accepts_text:
        table, rows = fresh.class_rows()
        row_of = {label: rows.start + number for number, label in enumerate(model.label_names)}
        known = [[name for name in (label, *wider.get(label, ())) if name in row_of] for label in fresh.label_names]
        kept = [row_of[names[0]] if names else -1 for names in known]  # "no class" is the last row
        given[table] = torch.cat([given[table][: rows.start], given[table][[*kept, -1]]])
    for name, value in own.items():
        if name not in given or given[name].shape != value.shape:
            raise InvalidRecipe(
                f"model.init_from was trained for other tokens or texts: the shape of its {name} differs"
            )
        value.copy_(given[name])


def _sizes_of(recipe: GeneratorModelRecipe) -> dict:
    if recipe.like is None:
        return {}
    entry = find_entry(recipe.like)
    if entry is None or entry.class_name != recipe.class_name:
        names = [name for name, known in ENTRIES.items() if known.class_name == recipe.class_name]
        raise InvalidRecipe(
            f"model.like {recipe.like!r} is not a known {recipe.class_name}.{nearest_names(recipe.like, names)}"
        )
    return constructor_arguments(entry)


def generator_trainer(recipe: GeneratorRecipe) -> GeneratorTrainer:
    """A run of `recipe`."""
    if recipe.model.class_name == "NextScale":
        from .next_scale_training import NextScaleTrainer  # builds on this module

        return NextScaleTrainer(recipe)
    if recipe.model.class_name == "NextScaleLlama" or recipe.model.text_encoder is not None:
        from .text_to_image import TextToImageTrainer  # builds on this module

        return TextToImageTrainer(recipe)
    return GeneratorTrainer(recipe)


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.generator", load_generator_recipe, generator_trainer, argv)


if __name__ == "__main__":
    sys.exit(main())
