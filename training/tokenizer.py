"""Train an image tokenizer: `accelerate launch -m mediatok.training.tokenizer RECIPE.yaml [section.key=value ...]`.

`TokenizerTrainer` serves single-stage models, stage 1 (predict the proxy codes of MaskGIT-VQGAN) and stage 2
(fine-tune the decoders against pixels) of two-stage ones, on one process or several.

Shape suffixes: B batch, 3/H/W image, P patches.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from .build import build_model, load_vqgan
from .checkpoint import load_optimizer_tensors, optimizer_tensors
from .data import TrainingPictures, derived_seed, open_source, to_float, training_batches, validation_pictures
from .discriminator import PatchDiscriminator
from .losses import DiscriminatorLoss, GeneratorLoss, proxy_code_loss
from .perceptual import build_perceptual
from .recipe import load_recipe
from .schedule import NO_DECAY, NO_DECAY_TITOK, cosine_lr, make_optimizer, set_lr
from .tracker import Tracker
from .trainer import Trainer, run_from_command_line
from .validate import code_usage, measure, reconstruct

logger = logging.getLogger(__name__)


class TokenizerTrainer(Trainer):
    """A tokenizer's run: reconstruction, perceptual, quantizer and adversarial losses."""

    def build_models(self, state: dict | None) -> None:
        recipe, stage = self.recipe, self.recipe.model.stage
        self.raw_model = build_model(recipe.model, None if state is None else state["model_config"]).to(self.device)
        self.vqgan = load_vqgan(recipe.model).to(self.device) if stage == "1" else None
        self.raw_model.train()
        if stage == "2":
            self.raw_model.freeze_encoder()
        if recipe.model.gradient_checkpointing:
            self.raw_model.enable_gradient_checkpointing()
        loss = recipe.loss
        perceptual = None
        if stage != "1" and loss.perceptual_weight:
            perceptual = build_perceptual(loss.perceptual, loss.perceptual_weights)
        self.generator_loss = GeneratorLoss(loss, perceptual).to(self.device)
        self.discriminator_loss = DiscriminatorLoss(loss).to(self.device)
        self.raw_discriminator = None
        if stage != "1" and loss.discriminator_weight:
            self.raw_discriminator = PatchDiscriminator().to(self.device)

    def build_optimizers(self) -> None:
        optimizer, loss = self.recipe.optimizer, self.recipe.loss
        no_decay = NO_DECAY_TITOK if self.recipe.model.class_name == "TiTok" else NO_DECAY
        settings = {"betas": optimizer.betas, "weight_decay": optimizer.weight_decay, "no_decay": no_decay}
        self.model, self.optimizer = self.accelerator.prepare(
            self.raw_model, make_optimizer(self.raw_model.named_parameters(), optimizer.lr, **settings)
        )
        self.discriminator_step = 0
        if self.raw_discriminator is not None:
            parameters = self.raw_discriminator.named_parameters()
            self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
                self.raw_discriminator, make_optimizer(parameters, loss.discriminator_lr, **settings)
            )

    def build_data(self) -> None:
        recipe = self.recipe
        image_size = self.raw_model.image_size
        split = recipe.data.val is None
        source = open_source(recipe.data.train, "train" if split else None)
        self.pictures = TrainingPictures(source, recipe.data, image_size, recipe.run.seed)
        val_source = open_source(recipe.data.val or recipe.data.train, "val" if split else None)
        self.val_pixels, self.val_captions = validation_pictures(val_source, image_size, recipe.data.max_val_images)
        logger.info("%d pictures to train on, %d to validate", len(source), len(self.val_pixels))

    def open_batches(self, first_batch: int) -> Iterator[tuple[Tensor, list[str]]]:
        accelerator = self.accelerator
        return training_batches(
            self.pictures, first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        )

    def train_on(self, batch: tuple[Tensor, list[str]], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, captions = batch
        pixels_B3HW = to_float(pixels.to(self.device, non_blocking=True))
        output = self._forward(pixels_B3HW, captions, micro)
        if micro == 0:
            self._pairs, self._ids = [], []  # of this step: for the discriminator, and for the use of codes
        self._pairs.append((pixels_B3HW, output.decoded.detach().float()))
        if output.ids_BL is not None:
            self._ids.append(output.ids_BL)
        return self._loss(output, pixels_B3HW)

    def after_step(self) -> dict[str, Tensor]:
        return self._train_discriminator(self._pairs) if self._is_adversarial() else {}

    def batch_statistics(self) -> dict[str, float]:
        if not self._ids:
            return {}
        usage = code_usage(torch.cat(self._ids), self.raw_model.vocab_size)
        return {f"batch_{name}": value for name, value in usage.items()}

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        return measure(model, self.vqgan, self.val_pixels, self.val_captions, self.recipe.run.batch_size)

    def show_samples(self, model: torch.nn.Module, tracker: Tracker) -> None:
        real = to_float(self.val_pixels[: self.recipe.run.num_samples])
        tracker.pairs(self.step, real, reconstruct(model, self.vqgan, real, self.val_captions))

    def before_export(self, model: torch.nn.Module) -> None:
        if self.recipe.model.class_name == "KLAutoencoder" and self.recipe.model.stage == "single":
            model.calibrate(to_float(self.val_pixels))

    def _forward(self, pixels_B3HW: Tensor, captions: list[str], micro: int):
        # Tail drop is one draw for the batch, which the processes share; noise of a VAE is one per picture.
        process = self.accelerator.process_index if self.raw_model.is_continuous else 0
        seed = derived_seed(self.recipe.run.seed, self.step, process, micro)
        generator = torch.Generator().manual_seed(seed)
        if self.raw_model.accepts_text:
            return self.model(pixels_B3HW, text_BTE=self.raw_model.encode_text(captions), generator=generator)
        return self.model(pixels_B3HW, generator=generator)

    def _loss(self, output, pixels_B3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.vqgan is not None:
            with torch.no_grad():
                codes_BP = self.vqgan.encode_pixels(pixels_B3HW)
            return proxy_code_loss(output, codes_BP, self.recipe.loss.quantizer_weight)
        if not self._is_adversarial():
            return self.generator_loss(output, pixels_B3HW)
        self.raw_discriminator.requires_grad_(False)
        try:
            return self.generator_loss(output, pixels_B3HW, self.raw_discriminator)
        finally:
            self.raw_discriminator.requires_grad_(True)

    def _is_adversarial(self) -> bool:
        return self.raw_discriminator is not None and self.step >= self.recipe.loss.discriminator_start

    def _train_discriminator(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        run, optimizer, loss_recipe = self.recipe.run, self.recipe.optimizer, self.recipe.loss
        lr = cosine_lr(
            self.discriminator_step, loss_recipe.discriminator_lr, optimizer.end_lr, optimizer.warmup_steps,
            run.steps - loss_recipe.discriminator_start,
        )  # fmt: skip
        set_lr(self.discriminator_optimizer, lr)
        totals: dict[str, Tensor] = {}
        for micro, (real_B3HW, fake_B3HW) in enumerate(pairs):
            last = micro == len(pairs) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.discriminator):
                loss, metrics = self.discriminator_loss(self.discriminator, real_B3HW, fake_B3HW)
                self.accelerator.backward(loss / len(pairs))
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value / len(pairs)
        self.accelerator.clip_grad_norm_(self.discriminator.parameters(), optimizer.max_grad_norm)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        self.discriminator_step += 1
        return totals

    def checkpoint_contents(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        tensors, state = super().checkpoint_contents()
        tensors["discriminator_loss"] = self.discriminator_loss.state_dict()
        if self.raw_discriminator is not None:
            tensors["discriminator"] = self.raw_discriminator.state_dict()
            tensors["discriminator_optimizer"] = optimizer_tensors(
                self.discriminator_optimizer.optimizer, self.raw_discriminator
            )
        return tensors, state | {"discriminator_step": self.discriminator_step}

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        super().restore(tensors, state)
        self.discriminator_loss.load_state_dict(tensors["discriminator_loss"])
        if self.raw_discriminator is not None:
            self.raw_discriminator.load_state_dict(tensors["discriminator"])
            load_optimizer_tensors(
                self.discriminator_optimizer.optimizer, self.raw_discriminator, tensors["discriminator_optimizer"]
            )
        self.discriminator_step = state["discriminator_step"]


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.tokenizer", load_recipe, TokenizerTrainer, argv)


if __name__ == "__main__":
    sys.exit(main())
