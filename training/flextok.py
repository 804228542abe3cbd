"""Train FlexTok's resampler: `accelerate launch -m mediatok.training.flextok RECIPE.yaml [section.key=value ...]`.

The VAE is frozen. Encoder, quantizer and decoder are trained end to end by the flow's loss, with a random number of
tokens kept; optionally the decoder also learns to give back a features model's view of the picture.

Shape suffixes: B batch, 3/H/W image, P patches, D width of the decoder, T features of the teacher.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..core.errors import InvalidRecipe
from ..core.registry import load
from ..nn.layers import Linear
from ..tokenizers.image.flextok import FlexTok
from .build import config_of, construct, sizes_like
from .data import TrainingPictures, derived_seed, open_source, to_float, training_batches, validation_pictures
from .flextok_recipe import FlexTokModelRecipe, load_flextok_recipe
from .flextok_start import align_registers
from .schedule import make_optimizer
from .teachers import build_teacher, semantic_loss
from .tracker import Tracker
from .trainer import Trainer, run_from_command_line
from .validate import SMALLEST_ERROR, code_usage

logger = logging.getLogger(__name__)
VAE_ARGUMENTS = {  # of FlexTok, and of the KLAutoencoder that they follow from
    "latent_channels": "latent_channels", "vae_channels": "block_out_channels", "vae_layers": "layers_per_block",
    "vae_norm_groups": "norm_num_groups", "vae_encoder_attention": "encoder_attention",
    "scaling_factor": "scaling_factor",
}  # fmt: skip
SHORT = (8, 4, 2)  # validation pictures are also decoded from these fractions of their tokens


class FlexTokTraining(nn.Module):
    """A FlexTok, and what only its training needs."""

    def __init__(self, tokenizer: FlexTok, teacher_width: int | None):
        super().__init__()
        self.tokenizer = tokenizer
        if teacher_width is not None:
            width = tokenizer.config.decoder_width
            self.to_teacher = nn.Sequential(
                Linear(width, 4 * width), nn.SiLU(), Linear(4 * width, 4 * width), nn.SiLU(),
                Linear(4 * width, teacher_width),
            )  # fmt: skip

    def forward(
        self, latents_BCGG: Tensor, rng: torch.Generator, times: str, null_share: float,
        target_BPT: Tensor | None = None, features_of: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
        """Losses by name (0-d), and the ids int64 [B, K]."""
        output = self.tokenizer(latents_BCGG, rng, null_share, times, features_of)
        losses = {"flow_loss": output.loss}
        if target_BPT is not None:
            losses["teacher_loss"] = semantic_loss(self.to_teacher(output.features_BPD.float()), target_BPT)
        return losses, output.ids_BK


class FlexTokTrainer(Trainer):
    """A resampler's run."""

    exported_part = "tokenizer"

    def build_models(self, state: dict | None) -> None:
        recipe, loss = self.recipe.model, self.recipe.loss
        tokenizer = build_flextok(recipe, None if state is None else state["model_config"])
        tokenizer.freeze_vae()
        grid = tokenizer.config.grid
        if grid[0] != grid[1]:
            raise InvalidRecipe(f"model.config.grid {tuple(grid)} is not square, and pictures to train on are")
        self.teacher, teacher_width = None, None
        if loss.teacher is not None:
            if loss.features_of >= tokenizer.config.decoder_depth:
                raise InvalidRecipe(f"loss.features_of {loss.features_of}: the decoder's blocks are 0 to "
                                    f"{tokenizer.config.decoder_depth - 1}")  # fmt: skip
            self.teacher = build_teacher(loss.teacher, loss.teacher_weights, grid[0]).to(self.device)
            with torch.no_grad():
                side = tokenizer.image_size
                teacher_width = self.teacher(torch.zeros(1, 3, side, side, device=self.device)).shape[-1]
        self.raw_model = FlexTokTraining(tokenizer, teacher_width).to(self.device).train()
        tokenizer.vae.eval()
        if recipe.gradient_checkpointing:
            tokenizer.enable_gradient_checkpointing()

    def build_optimizers(self) -> None:
        optimizer = self.recipe.optimizer
        self.model, self.optimizer = self.accelerator.prepare(
            self.raw_model,
            make_optimizer(
                self.raw_model.named_parameters(), optimizer.lr, optimizer.betas, optimizer.weight_decay,
                is_decayed=is_decayed, muon=optimizer.muon,
            ),
        )  # fmt: skip

    def build_data(self) -> None:
        recipe, side = self.recipe, self.raw_model.tokenizer.image_size
        split = recipe.data.val is None
        source = open_source(recipe.data.train, "train" if split else None)
        self.pictures = TrainingPictures(source, recipe.data, side, recipe.run.seed)
        val_source = open_source(recipe.data.val or recipe.data.train, "val" if split else None)
        self.val_pixels, _ = validation_pictures(val_source, side, recipe.data.max_val_images)
        logger.info("%d pictures to train on, %d to validate", len(source), len(self.val_pixels))

    def open_batches(self, first_batch: int) -> Iterator[tuple[Tensor, list[str]]]:
        accelerator = self.accelerator
        return training_batches(
            self.pictures, first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        )

    def train_on(self, batch: tuple[Tensor, list[str]], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels_B3HW, loss = to_float(batch[0].to(self.device, non_blocking=True)), self.recipe.loss
        seed = derived_seed(self.recipe.run.seed, self.step, self.accelerator.process_index, micro)
        losses, ids_BK = self._losses(self.model, pixels_B3HW, torch.Generator().manual_seed(seed))
        self._ids = [*(self._ids if micro else []), ids_BK]
        total = losses["flow_loss"] + loss.teacher_weight * losses.get("teacher_loss", 0.0)
        return total, {name: value.detach() for name, value in (losses | {"total_loss": total}).items()}

    def batch_statistics(self) -> dict[str, float]:
        usage = code_usage(torch.cat(self._ids), self.raw_model.tokenizer.vocab_size)
        return {f"batch_{name}": value for name, value in usage.items()}

    def validate(self, model: FlexTokTraining) -> dict[str, float]:
        """The losses on held-out pictures, with the same draws each time; and the PSNR in dB of the first ones, decoded
        from some and from all of their tokens.
        """
        rng, size, totals, ids = torch.Generator().manual_seed(0), self.recipe.run.batch_size, {}, []
        for pixels in self.val_pixels.split(size):
            losses, ids_BK = self._losses(model, to_float(pixels).to(self.device), rng)
            ids.append(ids_BK)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(pixels) / len(self.val_pixels)
        tokenizer, real = model.tokenizer, to_float(self.val_pixels[: self.recipe.run.num_samples])
        longest = tokenizer.max_tokens
        values = {f"val_{name}": value for name, value in totals.items()}
        for length in dict.fromkeys([*(max(1, longest // part) for part in SHORT), longest]):
            error = (self._decoded(tokenizer, real, length) - real).square().mean(dim=(1, 2, 3))
            psnr = float(-10 * error.clamp(min=SMALLEST_ERROR).log10().mean())
            values["val_psnr" if length == longest else f"val_psnr_{length}_tokens"] = psnr
        usage = code_usage(torch.cat(ids), tokenizer.vocab_size)
        return values | {f"val_{name}": value for name, value in usage.items()}

    def show_samples(self, model: FlexTokTraining, tracker: Tracker) -> None:
        """Originals in the upper row, below them the pictures of more and more tokens."""
        tokenizer, real = model.tokenizer, to_float(self.val_pixels[: self.recipe.run.num_samples])
        lengths = dict.fromkeys([*(max(1, tokenizer.max_tokens // part) for part in SHORT), tokenizer.max_tokens])
        rows = [self._decoded(tokenizer, real, length) for length in lengths]
        tracker.grid(self.step, torch.stack([real, *rows]))

    def _losses(self, model: nn.Module, pixels_B3HW: Tensor, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        loss = self.recipe.loss
        with torch.no_grad():
            latents_BCGG = self.raw_model.tokenizer.vae.encode_latents(pixels_B3HW, rng, sample=True)
            with self.accelerator.autocast():
                target_BPT = None if self.teacher is None else self.teacher(pixels_B3HW)
        features_of = None if self.teacher is None else loss.features_of
        return model(latents_BCGG, rng, loss.times, loss.null_share, target_BPT, features_of)

    def _decoded(self, tokenizer: FlexTok, pixels_B3HW: Tensor, length: int) -> Tensor:
        ids_BK = tokenizer.encode_pixels(pixels_B3HW.to(self.device), length)
        return tokenizer.decode_ids(ids_BK).clamp(0, 1).cpu()


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to the matrices of products alone."""
    return parameter.ndim >= 2 and name.endswith("weight")


def build_flextok(recipe: FlexTokModelRecipe, config: dict | None = None) -> FlexTok:
    """The model of `recipe`: fresh over its VAE, from `init_from`, or random with exactly `config` (a checkpoint's).

    Raises:
        InvalidRecipe: names, sizes or kinds of models that do not fit together.
    """
    if config is not None:
        return construct("FlexTok", config)
    source = load(str(recipe.vae if recipe.init_from is None else recipe.init_from))
    if recipe.init_from is not None:
        if not isinstance(source, FlexTok):
            raise InvalidRecipe(f"model.init_from holds a {type(source).__name__}, not a FlexTok")
        return source
    if type(source).__name__ != "KLAutoencoder":
        raise InvalidRecipe(f"model.vae {recipe.vae} is a {type(source).__name__}, not a KLAutoencoder")
    given = config_of(source)
    follows = {ours: given[theirs] for ours, theirs in VAE_ARGUMENTS.items()}
    for key in follows.keys() & recipe.config.keys():
        raise InvalidRecipe(f"model.config.{key} follows from the VAE; leave it out")
    sizes = sizes_like(recipe) | recipe.config
    patch = sizes.get("patch_size", 2)
    if isinstance(patch, int) and patch > 0:
        side = source.image_size // source.downsampling // patch
        sizes.setdefault("grid", (side, side))
    model = construct("FlexTok", sizes | follows)
    model.vae.load_state_dict(source.state_dict())
    if recipe.aligned_start:
        align_registers(model)
    return model


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.flextok", load_flextok_recipe, FlexTokTrainer, argv)


if __name__ == "__main__":
    sys.exit(main())
