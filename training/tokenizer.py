"""Train an image tokenizer: `accelerate launch -m mediatok.training.tokenizer RECIPE.yaml [section.key=value ...]`.

One loop serves single-stage models, stage 1 (predict the proxy codes of MaskGIT-VQGAN) and stage 2 (fine-tune the
decoders against pixels) of two-stage ones, on one process or several. Every random choice of a step is a function of
(seed, step, process), and the picture at each place one of (seed, position): a resumed run continues bit for bit.

Shape suffixes: B batch, 3/H/W image, P patches.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import nullcontext

import torch
from torch import Tensor

from ..core.errors import InvalidRecipe, MediatokError
from .build import build_model, load_vqgan, make_accelerator
from .checkpoint import (
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
    whole_checkpoints,
)
from .data import TrainingPictures, derived_seed, open_source, to_float, training_batches, validation_pictures
from .discriminator import PatchDiscriminator
from .export import export_model
from .losses import DiscriminatorLoss, GeneratorLoss, proxy_code_loss
from .perceptual import build_perceptual
from .recipe import Recipe, load_recipe
from .schedule import NO_DECAY, NO_DECAY_TITOK, WeightAverage, cosine_lr, make_optimizer, set_lr
from .tracker import Tracker
from .validate import code_usage, measure, reconstruct

logger = logging.getLogger(__name__)


class TokenizerTrainer:
    """The parts of one run, and its loop (`run`)."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe.run.mixed_precision)
        self.device = self.accelerator.device
        torch.manual_seed(recipe.run.seed)
        checkpoints = whole_checkpoints(recipe.output / "checkpoints")
        tensors, state = load_checkpoint(checkpoints[-1]) if checkpoints else ({}, None)
        self._build_models(state)
        self._build_optimizers()
        self._build_data()
        self.step = self.discriminator_step = self.samples_seen = 0
        if state is not None:
            self._restore(tensors, state)

    # Building

    def _build_models(self, state: dict | None) -> None:
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

    def _build_optimizers(self) -> None:
        optimizer, loss = self.recipe.optimizer, self.recipe.loss
        no_decay = NO_DECAY_TITOK if self.recipe.model.class_name == "TiTok" else NO_DECAY
        settings = {"betas": optimizer.betas, "weight_decay": optimizer.weight_decay, "no_decay": no_decay}
        self.ema = WeightAverage(self.raw_model, optimizer.ema_decay)
        self.model, self.optimizer = self.accelerator.prepare(
            self.raw_model, make_optimizer(self.raw_model.named_parameters(), optimizer.lr, **settings)
        )
        if self.raw_discriminator is not None:
            parameters = self.raw_discriminator.named_parameters()
            self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
                self.raw_discriminator, make_optimizer(parameters, loss.discriminator_lr, **settings)
            )

    def _build_data(self) -> None:
        recipe = self.recipe
        image_size = self.raw_model.image_size
        split = recipe.data.val is None
        source = open_source(recipe.data.train, "train" if split else None)
        self.pictures = TrainingPictures(source, recipe.data, image_size, recipe.run.seed)
        val_source = open_source(recipe.data.val or recipe.data.train, "val" if split else None)
        self.val_pixels, self.val_captions = validation_pictures(val_source, image_size, recipe.data.max_val_images)
        logger.info("%d pictures to train on, %d to validate", len(source), len(self.val_pixels))

    # The loop

    def run(self) -> None:
        run = self.recipe.run
        tracker = Tracker(self.recipe.output, self.step) if self.accelerator.is_main_process else None
        batch_of_all = run.batch_size * self.accelerator.num_processes
        first_batch, rest = divmod(self.samples_seen, batch_of_all)
        if rest:
            raise InvalidRecipe(f"{self.samples_seen} samples were seen, which is no multiple of {batch_of_all}")
        batches = training_batches(
            self.pictures, first_batch, run.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )
        num_parameters = sum(parameter.numel() for parameter in self.raw_model.parameters())
        logger.info("%.1f M parameters, from step %d of %d", num_parameters / 1e6, self.step, run.steps)
        started, started_at = time.perf_counter(), self.step
        while self.step < run.steps:
            # What a step draws depends on nothing before it, so there is no generator state to save.
            torch.manual_seed(derived_seed(run.seed, self.step, self.accelerator.process_index))
            metrics, ids_BL = self._train_step(batches)
            self.step += 1
            if _is_due(self.step, run.log_every, run.steps):
                if ids_BL is not None:
                    usage = code_usage(ids_BL, self.raw_model.vocab_size)
                    metrics |= {
                        f"batch_{name}": torch.tensor(value, device=self.device) for name, value in usage.items()
                    }
                metrics = {name: float(self.accelerator.reduce(value, "mean")) for name, value in metrics.items()}
                elapsed = time.perf_counter() - started
                speed = (self.step - started_at) * batch_of_all * run.gradient_accumulation / elapsed
                if tracker is not None:
                    tracker.log(self.step, metrics | {"images_per_second": speed})
                if not math.isfinite(metrics["total_loss"]):
                    raise MediatokError(f"the loss became {metrics['total_loss']} at step {self.step}; lower the rate")
            if tracker is not None:
                if _is_due(self.step, run.validate_every, run.steps):
                    with self.ema.applied_to(self.raw_model) as model:
                        values = measure(model, self.vqgan, self.val_pixels, self.val_captions, run.batch_size)
                    tracker.log(self.step, values)
                if _is_due(self.step, run.sample_every, run.steps):
                    real = to_float(self.val_pixels[: run.num_samples])
                    with self.ema.applied_to(self.raw_model) as model:
                        tracker.samples(self.step, real, reconstruct(model, self.vqgan, real, self.val_captions))
            if _is_due(self.step, run.checkpoint_every, run.steps):
                self.save()
        if tracker is not None:
            tracker.close()
            with self.ema.applied_to(self.raw_model) as model:
                if self.recipe.model.class_name == "KLAutoencoder" and self.recipe.model.stage == "single":
                    model.calibrate(to_float(self.val_pixels))
                export_model(model, self.recipe.output / "model", run.export_dtype)
        self.accelerator.wait_for_everyone()

    def _train_step(self, batches) -> tuple[dict[str, Tensor], Tensor | None]:
        """One update of the tokenizer and, in the adversarial phase, one of the discriminator, on the same pictures."""
        run, optimizer = self.recipe.run, self.recipe.optimizer
        lr = cosine_lr(self.step, optimizer.lr, optimizer.end_lr, optimizer.warmup_steps, run.steps)
        set_lr(self.optimizer, lr)
        pairs, ids, totals = [], [], {}
        for micro in range(run.gradient_accumulation):
            pixels, captions = next(batches)
            pixels_B3HW = to_float(pixels.to(self.device, non_blocking=True))
            last = micro == run.gradient_accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                output = self._forward(pixels_B3HW, captions, micro)
                loss, metrics = self._loss(output, pixels_B3HW)
                self.accelerator.backward(loss / run.gradient_accumulation)
            self.samples_seen += len(pixels) * self.accelerator.num_processes
            pairs.append((pixels_B3HW, output.decoded.detach().float()))
            if output.ids_BL is not None:
                ids.append(output.ids_BL)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value / run.gradient_accumulation
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.raw_model)
        if self._is_adversarial():
            totals |= self._train_discriminator(pairs)
        totals |= {"lr": torch.tensor(lr), "grad_norm": torch.as_tensor(grad_norm)}
        metrics = {name: value.to(self.device, torch.float32) for name, value in totals.items()}
        return metrics, torch.cat(ids) if ids else None

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

    # Saving

    def save(self) -> None:
        """Write a checkpoint (one process) and let the others wait for it."""
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.raw_model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer.optimizer, self.raw_model),
                "discriminator_loss": self.discriminator_loss.state_dict(),
            }
            if self.raw_discriminator is not None:
                tensors["discriminator"] = self.raw_discriminator.state_dict()
                tensors["discriminator_optimizer"] = optimizer_tensors(
                    self.discriminator_optimizer.optimizer, self.raw_discriminator
                )
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "discriminator_step": self.discriminator_step,
                "samples_seen": self.samples_seen,
                "ema_steps": self.ema.ema.optimization_step,
                "scaler": None if scaler is None else scaler.state_dict(),
                "model_config": {k: v for k, v in dict(self.raw_model.config).items() if not k.startswith("_")},
                "recipe": self.recipe.model_dump(mode="json"),
            }
            folder = self.recipe.output / "checkpoints"
            save_checkpoint(folder, self.step, tensors, state, self.recipe.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _restore(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        self.raw_model.load_state_dict(tensors["model"])
        self.ema.load_state_dict(tensors["ema"], state["ema_steps"])
        load_optimizer_tensors(self.optimizer.optimizer, self.raw_model, tensors["optimizer"])
        self.discriminator_loss.load_state_dict(tensors["discriminator_loss"])
        if self.raw_discriminator is not None:
            self.raw_discriminator.load_state_dict(tensors["discriminator"])
            load_optimizer_tensors(
                self.discriminator_optimizer.optimizer, self.raw_discriminator, tensors["discriminator_optimizer"]
            )
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.discriminator_step = state["discriminator_step"]


def _is_due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: accelerate launch -m mediatok.training.tokenizer RECIPE.yaml [section.key=value ...]")
        return 0 if arguments else 2
    try:
        TokenizerTrainer(load_recipe(arguments[0], arguments[1:])).run()
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
