"""Train SEED: `accelerate launch -m mediatok.training.seed RECIPE.yaml [section.key=value ...]`, one stage a run.

    contrast   the last query of a picture and its caption are pulled together: the Q-Former learns what pictures show
    codebook   codes for what the queries found, and the decoder from codes to a teacher's image embedding
    drawing    small models only: the image decoder that draws what those embeddings say

What is trained in a stage is frozen in the next.

Shape suffixes: B batch, V validation pictures, 3/H/W image, L tokens of a caption, E embedding channels.
"""

from __future__ import annotations

import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InvalidRecipe, ModelNotFound, TokenizerMismatch
from ..core.registry import load
from ..tokenizers.image.drawing import checked_drawing
from ..tokenizers.image.seed import Seed
from ..tokenizers.image.seed_contrast import SeedContrast
from .build import config_of, construct, sizes_like
from .code_revival import place_centres
from .data import TrainingPictures, centre_crops, derived_seed, open_source, to_float, training_batches
from .schedule import make_optimizer
from .seed_data import CaptionPairs, Captions, NamedFolder
from .seed_losses import seed_loss
from .seed_recipe import PARTS, SeedModelRecipe, SeedRecipe, load_seed_recipe
from .teachers import build_teacher
from .tracker import Tracker
from .trainer import Trainer, run_from_command_line
from .validate import code_usage

logger = logging.getLogger(__name__)
FITTED_PICTURES = 1024  # whose vectors place the codes
Batch = tuple[Tensor, list[str]]


class SeedTrainer(Trainer):
    """What the three stages share: the model and the pictures."""

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        self.split = recipe.data.val is None
        self.source = self._open(recipe.data.train, "train" if self.split else None, recipe.data.styles)
        model = build_seed(recipe.model, None if state is None else state["model_config"])
        self.raw_model = self.wrapped(model).to(self.device).train()
        self.is_new = state is None

    @abstractmethod
    def wrapped(self, model: Seed) -> nn.Module:
        """What is trained, with all else frozen."""

    @property
    def seed(self) -> Seed:
        return self.raw_model.get_submodule(self.exported_part)

    def _open(self, path: str, split: str | None, styles: Sequence[Path] = ()):
        data = self.recipe.data
        if data.names is None:
            return open_source(path, split)
        return CaptionPairs([path, *styles], split, data) if styles else NamedFolder([path], split, data)

    def build_optimizers(self) -> None:
        optimizer = self.recipe.optimizer

        def is_decayed(name: str, parameter: nn.Parameter) -> bool:  # the authors' rule
            return parameter.ndim >= 2 and not any(part in name for part in ("bias", "ln", "bn"))

        groups = make_optimizer(
            self.raw_model.named_parameters(), optimizer.lr, optimizer.betas, optimizer.weight_decay,
            is_decayed=is_decayed,
        )  # fmt: skip
        self.model, self.optimizer = self.accelerator.prepare(self.trained(), groups)

    def trained(self) -> nn.Module:
        """What is called in training."""
        return self.raw_model

    def build_data(self) -> None:
        recipe, side = self.recipe, self.seed.image_size
        self.pictures = TrainingPictures(self.source, recipe.data, side, recipe.run.seed)
        val = self._open(recipe.data.val or recipe.data.train, "val" if self.split else None)
        chosen = range(min(len(val), recipe.data.max_val_images))
        self.val_pixels, self.val_captions = centre_crops(val, side, chosen)
        if not any(self.val_captions) and self.recipe.model.stage == "contrast":
            raise InvalidRecipe("the pictures have no captions: put text files beside them, or name a data.names")
        logger.info("%d pictures to train on, %d to validate", len(self.source), len(self.val_pixels))

    def open_batches(self, first_batch: int) -> Iterator[Batch]:
        accelerator = self.accelerator
        place = first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        return training_batches(self.pictures, *place)

    def pixels(self, batch: Batch) -> Tensor:
        return to_float(batch[0].to(self.device, non_blocking=True))

    def val_batches(self) -> Iterator[Tensor]:
        for pixels in self.val_pixels.split(self.recipe.run.batch_size):
            yield to_float(pixels.to(self.device))

    def show_samples(self, model: nn.Module, tracker: Tracker) -> None:
        """Nothing: only the last stage has pictures to show."""


class ContrastTrainer(SeedTrainer):
    """The first stage."""

    exported_part = PARTS["contrast"]

    def wrapped(self, model: Seed) -> SeedContrast:
        recipe = self.recipe
        texts = [] if recipe.text.tokenizer is not None else self._all_captions()
        self.captions = Captions(texts, recipe.text.max_tokens, recipe.text.tokenizer)
        self.teacher, teacher_width = self._tower_teacher(model)
        contrast = SeedContrast(
            model, self.captions.size, recipe.text.max_tokens, recipe.text.feature_size,
            between_pictures=bool(recipe.data.styles), teacher_width=teacher_width,
        )  # fmt: skip
        model.vision.requires_grad_(recipe.model.train_tower)
        model.vision.network.post_layernorm.requires_grad_(True)
        return contrast

    def _tower_teacher(self, model: Seed) -> tuple[nn.Module | None, int]:
        """The network that the tower learns from, and how many features it has."""
        name = self.recipe.loss.tower_teacher
        if name is None:
            return None, 0
        teacher = build_teacher(name, None, model.image_size // model.config.patch_size).to(self.device)
        with torch.no_grad():
            return teacher, teacher(torch.zeros(1, 3, model.image_size, model.image_size, device=self.device)).shape[2]

    def _all_captions(self) -> list[str]:
        if isinstance(self.source, NamedFolder):
            return self.source.captions()
        return [self.source.read(index)[1] for index in range(len(self.source))]

    def train_on(self, batch: Batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels_B3HW = self.pixels(batch)
        taught_BPT = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught_BPT = self.teacher(pixels_B3HW)
        contrast, teaching, accuracy = self.model(*self._inputs(pixels_B3HW, batch[1]), taught_BPT)
        loss = contrast + self.recipe.loss.tower_weight * teaching
        metrics = {"total_loss": loss, "contrast_loss": contrast, "teaching_loss": teaching}
        return loss, {name: value.detach() for name, value in metrics.items()} | {"contrast_accuracy": accuracy}

    def _inputs(self, pixels_B3HW: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids_BL, is_token_BL = self.captions(captions)
        return self.seed.normalized(pixels_B3HW), ids_BL.to(self.device), is_token_BL.to(self.device)

    def validate(self, model: SeedContrast) -> dict[str, float]:
        """How often the nearest of all held-out captions is a picture's own."""
        features = []
        parts = _split(self.val_captions, self.recipe.run.batch_size)
        for pixels_B3HW, captions in zip(self.val_batches(), parts, strict=True):
            normal, ids, is_token = self._inputs(pixels_B3HW, captions)
            text_BE = model.text_features(model.caption_states(ids, is_token))
            features.append((model.image_features(model.seed.query_features(normal)), text_BE))
        image_VE, text_VE = (torch.cat(part) for part in zip(*features, strict=True))
        found_V = (image_VE @ text_VE.T).argmax(dim=1).tolist()
        own = [self.val_captions[found] == caption for found, caption in zip(found_V, self.val_captions, strict=True)]
        return {"val_caption_accuracy": sum(own) / len(own)}


class CodebookTrainer(SeedTrainer):
    """The second stage."""

    def wrapped(self, model: Seed) -> Seed:
        model.freeze_encoder()
        self.teacher = teacher_of(model, self.recipe.loss.teacher, self.device)
        return model

    def build_models(self, state: dict | None) -> None:
        super().build_models(state)
        self.seed.freeze_encoder()  # in evaluation mode, which `train` ended

    def build_data(self) -> None:
        super().build_data()
        if self.is_new:
            self._place_codes()

    @torch.no_grad()
    def _place_codes(self) -> None:
        """Codes begin where vectors of training pictures are; scattered at random, most would never be used."""
        model, rows = self.seed, []
        pixels, _ = centre_crops(self.source, model.image_size, range(min(len(self.source), FITTED_PICTURES)))
        for part in pixels.split(self.recipe.run.batch_size):
            z_BQD = model.frozen_features(model.normalized(to_float(part.to(self.device))))
            rows.append(model.to_code(z_BQD).flatten(0, 1))
        rng = torch.Generator().manual_seed(self.recipe.run.seed)
        place_centres(model.quantize.embedding.weight, torch.cat(rows), rng)

    def train_on(self, batch: Batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels_B3HW, loss = self.pixels(batch), self.recipe.loss
        output = self.model(pixels_B3HW)
        self._ids = output.ids_BQ
        target_BE = output.target_BQD[:, -1]  # what the own teacher would find once more
        if loss.teacher is not None:
            target_BE = self.teacher(self.seed.normalized(pixels_B3HW))
        return seed_loss(output, target_BE, loss.quantizer_weight, loss.semantic_weight, loss.embedding_weight)

    def batch_statistics(self) -> dict[str, float]:
        usage = code_usage(self._ids, self.raw_model.vocab_size)
        return {f"batch_{name}": value for name, value in usage.items()}

    def validate(self, model: Seed) -> dict[str, float]:
        """Cosine to the teacher's embeddings, how often a picture's own is the nearest of all, and the use of codes."""
        ids, predicted, targets = [], [], []
        for pixels_B3HW in self.val_batches():
            ids.append(model.encode_pixels(pixels_B3HW))
            predicted.append(model.decode_embedding(ids[-1]))
            targets.append(self.teacher(model.normalized(pixels_B3HW)))
        predicted_VE, target_VE = (F.normalize(torch.cat(rows).float()) for rows in (predicted, targets))
        found_V = (predicted_VE @ target_VE.T).argmax(dim=1)
        is_own_V = found_V == torch.arange(len(found_V), device=found_V.device)
        usage = code_usage(torch.cat(ids), model.vocab_size)
        return {
            "val_embedding_cosine": float((predicted_VE * target_VE).sum(dim=1).mean()),
            "val_embedding_accuracy": float(is_own_V.float().mean()),
        } | {f"val_{name}": value for name, value in usage.items()}


class DrawingTrainer(SeedTrainer):
    """The third stage."""

    def wrapped(self, model: Seed) -> Seed:
        if model.drawing is None:
            raise InvalidRecipe("stage 'drawing' trains a small image decoder: give its model.config.drawing_sizes")
        model.requires_grad_(False).eval()
        model.drawing.requires_grad_(True)
        try:
            self.autoencoder = model.drawing.autoencoder.requires_grad_(False).to(self.device)
        except TokenizerMismatch as error:
            raise InvalidRecipe(f"model.config.drawing_sizes: {error}") from error
        if self.autoencoder.image_size != model.image_size:
            raise InvalidRecipe(
                f"pictures of {model.image_size} pixels are drawn by an autoencoder of {self.autoencoder.image_size}"
            )
        return model

    def build_models(self, state: dict | None) -> None:
        super().build_models(state)
        self.raw_model.eval()
        self.raw_model.drawing.train()

    def trained(self) -> nn.Module:
        return self.raw_model.drawing

    def train_on(self, batch: Batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        seed = derived_seed(self.recipe.run.seed, self.step, self.accelerator.process_index, micro)
        loss = self._loss(self.model, self.pixels(batch), torch.Generator().manual_seed(seed))
        return loss, {"total_loss": loss.detach()}

    def _loss(self, decoder: nn.Module, pixels_B3HW: Tensor, rng: torch.Generator) -> Tensor:
        with torch.no_grad():
            embedding_BE = self.raw_model.decode_embedding(self.raw_model.encode_pixels(pixels_B3HW))
            latents_BCGG = self.autoencoder.encode_latents(pixels_B3HW)
        return decoder(latents_BCGG, embedding_BE, rng)

    def validate(self, model: Seed) -> dict[str, float]:
        rng = torch.Generator().manual_seed(0)
        losses = [self._loss(model.drawing, pixels, rng) for pixels in self.val_batches()]
        return {"val_loss": float(torch.stack(losses).mean())}

    def show_samples(self, model: Seed, tracker: Tracker) -> None:
        real = to_float(self.val_pixels[: self.recipe.run.num_samples])
        ids_BQ = model.encode_pixels(real.to(self.device))
        tracker.pairs(self.step, real, model.decode_ids(ids_BQ, drawing=checked_drawing(model.drawing)).cpu())


def build_seed(recipe: SeedModelRecipe, config: dict | None = None) -> Seed:
    """The model of `recipe`: fresh, from `init_from`, or random with exactly `config` (that of a checkpoint).

    Raises:
        InvalidRecipe: names, sizes or flags that do not fit together.
    """
    if config is not None:
        return construct("Seed", config)
    if recipe.init_from is None:
        return construct("Seed", sizes_like(recipe) | recipe.config)
    model = load(str(recipe.init_from))
    if not isinstance(model, Seed):
        raise InvalidRecipe(f"model.init_from holds a {type(model).__name__}, not a Seed")
    if not recipe.config:
        return model
    changed = dict(recipe.config)
    if isinstance(changed.get("drawing_sizes"), dict):
        changed["drawing_sizes"] = _with_fingerprint(changed["drawing_sizes"])
    own, model = model.state_dict(), construct("Seed", config_of(model) | changed)
    model.load_state_dict(own, strict=False)  # what is new stays random
    return model


def _with_fingerprint(sizes: dict) -> dict:
    """`drawing_sizes` that say which autoencoder exactly they are for."""
    name = sizes.get("autoencoder")
    if not isinstance(name, str):
        raise InvalidRecipe("model.config.drawing_sizes must name an autoencoder, such as kl-tiny")
    return {**sizes, "autoencoder_fingerprint": load(name).fingerprint}


def teacher_of(model: Seed, folder: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What gives the embeddings [B, E] that codes are decoded to, of pictures normalised as CLIP's.

    Stable unCLIP's are CLIP's, trained by contrast with captions. So is the last query, which stands in without a
    folder.
    """
    if folder is None:
        if model.config.embedding_size != model.config.qformer_width:
            raise InvalidRecipe(
                f"without loss.teacher what the last query finds is predicted: config.embedding_size must be "
                f"{model.config.qformer_width}, not {model.config.embedding_size}"
            )
        return lambda normal_B3HW: model.frozen_features(normal_B3HW)[:, -1]
    from transformers import CLIPVisionModelWithProjection

    try:
        clip = CLIPVisionModelWithProjection.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelNotFound(f"loss.teacher {folder} holds no CLIP vision model ({type(error).__name__})") from error
    theirs = (clip.config.projection_dim, clip.config.image_size)
    if theirs != (model.config.embedding_size, model.image_size):
        raise InvalidRecipe(
            f"loss.teacher makes embeddings of {theirs[0]} channels of {theirs[1]} pixels; the model has "
            f"{model.config.embedding_size} and {model.image_size}"
        )
    clip = clip.requires_grad_(False).to(device).eval()

    @torch.no_grad()
    def released(normal_B3HW: Tensor) -> Tensor:
        return clip(pixel_values=normal_B3HW.to(clip.dtype)).image_embeds.float()

    return released


def _split(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


TRAINERS = {"contrast": ContrastTrainer, "codebook": CodebookTrainer, "drawing": DrawingTrainer}


def seed_trainer(recipe: SeedRecipe) -> SeedTrainer:
    """A run of `recipe`."""
    return TRAINERS[recipe.model.stage](recipe)


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.seed", load_seed_recipe, seed_trainer, argv)


if __name__ == "__main__":
    sys.exit(main())
