"""The loop that all training runs share: steps, logs, validation, samples, checkpoints, resuming, export.

Every random choice of a step is a function of (seed, step, process), and the sample at each place one of (seed,
position): a resumed run continues bit for bit.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidRecipe, MediatokError
from .build import config_of, make_accelerator
from .checkpoint import load_checkpoint, load_optimizer_tensors, optimizer_tensors, save_checkpoint, whole_checkpoints
from .data import derived_seed
from .export import export_model
from .rounding import rounded_weights
from .schedule import WeightAverage, cosine_lr, set_lr
from .tracker import Tracker

logger = logging.getLogger(__name__)


class Trainer(ABC):
    """One run. Subclasses say what is trained (`build_models`, `build_optimizers`), on what (`build_data`,
    `open_batches`) and how (`train_on`), and what is measured (`validate`, `show_samples`).
    """

    samples_name = "images"  # what a batch holds, for the log
    exported_part = ""  # the submodule of `raw_model` that the run is for, where others only help to train it
    raw_model: torch.nn.Module
    model: torch.nn.Module  # what accelerate made of `raw_model`
    optimizer: Any

    def __init__(self, recipe):
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe.run.mixed_precision)
        self.device = self.accelerator.device
        torch.manual_seed(recipe.run.seed)
        checkpoints = whole_checkpoints(recipe.output / "checkpoints")
        tensors, state = load_checkpoint(checkpoints[-1]) if checkpoints else ({}, None)
        self.step = self.samples_seen = 0
        self.build_models(state)
        self.ema = WeightAverage(self.raw_model, recipe.optimizer.ema_decay)
        self.build_optimizers()
        self.build_data()
        if state is not None:
            self.restore(tensors, state)

    # What a subclass gives.

    @abstractmethod
    def build_models(self, state: dict | None) -> None:
        """Set `raw_model`, in training mode on the device; `state` is that of the checkpoint to resume."""

    @abstractmethod
    def build_optimizers(self) -> None:
        """Set `model` and `optimizer`."""

    @abstractmethod
    def build_data(self) -> None:
        """Open the training and the validation set."""

    @abstractmethod
    def open_batches(self, first_batch: int) -> Iterator[tuple[Tensor, Any]]:
        """Endless batches of this process from number `first_batch` on; the first tensor has one row a sample."""

    @abstractmethod
    def train_on(self, batch: tuple[Tensor, Any], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss with gradient and detached metrics of one batch; `micro` counts batches within a step."""

    def after_step(self) -> dict[str, Tensor]:
        """What else belongs to a step, after the optimizer's; metrics."""
        return {}

    def batch_statistics(self) -> dict[str, float]:
        """Figures of the last step that are computed only when they are logged."""
        return {}

    @abstractmethod
    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Figures of the averaged `model` on held-out data."""

    @abstractmethod
    def show_samples(self, model: torch.nn.Module, tracker: Tracker) -> None:
        """Put pictures or sound of the averaged `model` into the log."""

    def before_export(self, model: torch.nn.Module) -> None:  # noqa: B027  a hook: most runs change nothing
        """Last changes to the averaged model that is exported."""

    # The loop.

    def run(self) -> None:
        run = self.recipe.run
        tracker = Tracker(self.recipe.output, self.step) if self.accelerator.is_main_process else None
        batch_of_all = run.batch_size * self.accelerator.num_processes
        first_batch, rest = divmod(self.samples_seen, batch_of_all)
        if rest:
            raise InvalidRecipe(f"{self.samples_seen} samples were seen, which is no multiple of {batch_of_all}")
        batches = self.open_batches(first_batch)
        num_parameters = sum(parameter.numel() for parameter in self.raw_model.parameters())
        logger.info("%.1f M parameters, from step %d of %d", num_parameters / 1e6, self.step, run.steps)
        started, started_at = time.perf_counter(), self.step
        while self.step < run.steps:
            # What a step draws depends on nothing before it, so there is no generator state to save.
            torch.manual_seed(derived_seed(run.seed, self.step, self.accelerator.process_index))
            metrics = self._step(batches)
            self.step += 1
            if is_due(self.step, run.log_every, run.steps):
                statistics = self.batch_statistics()
                metrics |= {name: torch.tensor(value, device=self.device) for name, value in statistics.items()}
                metrics = {name: float(self.accelerator.reduce(value, "mean")) for name, value in metrics.items()}
                elapsed = time.perf_counter() - started
                speed = (self.step - started_at) * batch_of_all * run.gradient_accumulation / elapsed
                if tracker is not None:
                    tracker.log(self.step, metrics | {f"{self.samples_name}_per_second": speed})
                if not math.isfinite(metrics["total_loss"]):
                    raise MediatokError(f"the loss became {metrics['total_loss']} at step {self.step}; lower the rate")
            if tracker is not None:
                self._measure(tracker)
            if is_due(self.step, run.checkpoint_every, run.steps):
                self.save()
        if tracker is not None:
            tracker.close()
            with self.ema.applied_to(self.raw_model) as model:
                self.before_export(model)
                export_model(model.get_submodule(self.exported_part), self.recipe.output / "model", run.export_dtype)
        self.accelerator.wait_for_everyone()

    def _step(self, batches: Iterator) -> dict[str, Tensor]:
        """One update, of `gradient_accumulation` batches."""
        run, optimizer = self.recipe.run, self.recipe.optimizer
        lr = cosine_lr(
            self.step, optimizer.lr, optimizer.end_lr, optimizer.warmup_steps, run.steps, optimizer.hold_steps
        )
        set_lr(self.optimizer, lr)
        totals: dict[str, Tensor] = {}
        for micro in range(run.gradient_accumulation):
            batch = next(batches)
            last = micro == run.gradient_accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model), self._as_stored():
                loss, metrics = self.train_on(batch, micro)
                self.accelerator.backward(loss / run.gradient_accumulation)
            self.samples_seen += len(batch[0]) * self.accelerator.num_processes
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value / run.gradient_accumulation
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.raw_model)
        totals |= self.after_step()
        totals |= {"lr": torch.tensor(lr), "grad_norm": torch.as_tensor(grad_norm)}
        return {name: value.to(self.device, torch.float32) for name, value in totals.items()}

    def _as_stored(self) -> AbstractContextManager[None]:
        """Weights as the export rounds them, in the last `rounded_steps` of the run."""
        run = self.recipe.run
        if self.step < run.steps - run.rounded_steps or not run.rounded_steps:
            return nullcontext()
        return rounded_weights(self.raw_model.get_submodule(self.exported_part), int(run.export_dtype[3:]))

    def _measure(self, tracker: Tracker) -> None:
        run = self.recipe.run
        if is_due(self.step, run.validate_every, run.steps):
            with self.ema.applied_to(self.raw_model) as model, self._as_stored():
                values = self.validate(model)
            if values:
                tracker.log(self.step, values)
        if is_due(self.step, run.sample_every, run.steps):
            with self.ema.applied_to(self.raw_model) as model, self._as_stored():
                self.show_samples(model, tracker)

    # Saving.

    def checkpoint_contents(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Tensors by file, and plain state, of a checkpoint."""
        scaler = self.accelerator.scaler
        tensors = {
            "model": self.raw_model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer.optimizer, self.raw_model),
        }
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "ema_steps": self.ema.ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
            "model_config": config_of(self.raw_model.get_submodule(self.exported_part)),
            "recipe": self.recipe.model_dump(mode="json"),
        }
        return tensors, state

    def save(self) -> None:
        """Write a checkpoint (one process) and let the others wait for it."""
        if self.accelerator.is_main_process:
            tensors, state = self.checkpoint_contents()
            folder = self.recipe.output / "checkpoints"
            save_checkpoint(folder, self.step, tensors, state, self.recipe.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Continue from a checkpoint's contents."""
        self.raw_model.load_state_dict(tensors["model"])
        self.ema.load_state_dict(tensors["ema"], state["ema_steps"])
        load_optimizer_tensors(self.optimizer.optimizer, self.raw_model, tensors["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]


def is_due(step: int, every: int, last: int) -> bool:
    """True at every `every`-th step and the last one; never when `every` is 0."""
    return bool(every) and (step % every == 0 or step == last)


def run_from_command_line(module: str, load, trainer: type[Trainer], argv: list[str] | None) -> int:
    """`python -m MODULE RECIPE.yaml [section.key=value ...]`; the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: accelerate launch -m {module} RECIPE.yaml [section.key=value ...]")
        return 0 if arguments else 2
    try:
        trainer(load(Path(arguments[0]), arguments[1:])).run()
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
