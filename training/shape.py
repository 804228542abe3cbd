"""Train a shape tokenizer: `accelerate launch -m mediatok.training.shape RECIPE.yaml [section.key=value ...]`.

Points of a surface go through the tokenizer, which is asked at places in the box whether they are inside. In the first
`continuous_steps` the latents are decoded as they are; then k-means places the codes and the latents are quantized.

Shape suffixes: B batch, N surface points, Q queries (uniform ones first, then near ones), S tokens of all scales.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.base import TokenizerOutput
from ..core.errors import InvalidRecipe, nearest_names
from ..core.registry import ENTRIES, constructor_arguments, find_entry, load
from ..core.shape_tokenizer import ShapeField
from ..evaluation.render import render_mesh, render_points
from ..evaluation.shape_points import intersection_over_union
from .build import construct
from .schedule import make_optimizer
from .shape_codes import ROWS_PER_CODE, CodebookRevival, place_codes
from .shape_data import Batch, ShapeShards, TrainingShapes, shape_batches, validation_shapes
from .shape_recipe import ShapeLossRecipe, ShapeModelRecipe, load_shape_recipe
from .shape_start import align_places
from .shape_threshold import fit_threshold
from .tracker import Tracker
from .trainer import Trainer, run_from_command_line
from .validate import code_usage

logger = logging.getLogger(__name__)
PICTURE_SIZE = 128  # pixels a side of the pictures in the log
SPLAT = 3  # pixels a side of a surface point in them


class ShapeTrainer(Trainer):
    """A shape tokenizer's run."""

    samples_name = "shapes"

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe.model
        self.raw_model = build_shape_tokenizer(recipe, None if state is None else state["model_config"])
        if recipe.aligned_start and state is None:
            align_places(self.raw_model)
        self.raw_model.to(self.device).train()
        if recipe.gradient_checkpointing:
            self.raw_model.enable_gradient_checkpointing()
        has_codebook = not self.raw_model.config.lookup_free
        self.revival = CodebookRevival(self.raw_model.quantize) if recipe.revive_codes and has_codebook else None

    def build_optimizers(self) -> None:
        optimizer = self.recipe.optimizer
        self.model, self.optimizer = self.accelerator.prepare(
            self.raw_model,
            make_optimizer(
                self.raw_model.named_parameters(), optimizer.lr, optimizer.betas, optimizer.weight_decay,
                is_decayed=_is_decayed, muon=optimizer.muon,
            ),
        )  # fmt: skip

    def build_data(self) -> None:
        data, needed = self.recipe.data, self.raw_model.config.num_features
        if data.points < needed:
            raise InvalidRecipe(f"data.points {data.points} are fewer than the model's num_features {needed}")
        self.source = ShapeShards(data.train, "train")
        self.shapes = TrainingShapes(self.source, data, self.recipe.run.seed)
        val_source = ShapeShards(data.val or data.train[:1], "val")
        self.val_shapes = validation_shapes(val_source, data, self.recipe.run.val_queries)
        logger.info("%d shapes to train on, %d to validate", len(self.source), len(self.val_shapes))

    def open_batches(self, first_batch: int) -> Iterator[tuple[Tensor, Any]]:
        accelerator = self.accelerator
        batches = shape_batches(
            self.shapes, first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        )
        return ((points_BN3, rest) for points_BN3, *rest in batches)

    def train_on(self, batch: tuple[Tensor, Any], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        points_BN3, normals_BN3, queries_BQ3, inside_BQ = self._on_device(batch)
        continuous_steps = self.recipe.model.continuous_steps
        if micro == 0:
            self._ids = []  # of this step, for the use of codes
            if self.step == continuous_steps > 0 and not self.raw_model.config.lookup_free:
                self._place_codes()
        is_quantized = self.step >= continuous_steps
        num_scales = self._drawn_scales() if is_quantized else None
        output = self.model(points_BN3, normals_BN3, queries_BQ3, quantized=is_quantized, num_scales=num_scales)
        if output.ids_BL is not None:
            self._ids.append(output.ids_BL)
        loss, metrics = shape_loss(output, inside_BQ, self.recipe.data.uniform_queries, self.recipe.loss)
        if not is_quantized:  # DDP waits for a gradient of every parameter
            loss = loss + sum(0.0 * parameter.sum() for parameter in self.raw_model.quantize.parameters())
        return loss, metrics

    def after_step(self) -> dict[str, Tensor]:
        if self.revival is None:
            return {}
        revived = self.revival.step()
        self.ema.restart_rows(self.raw_model, self.revival.moved, "quantize.")
        return {"revived_codes": revived}

    def batch_statistics(self) -> dict[str, float]:
        if not self._ids:
            return {}
        usage = code_usage(torch.cat(self._ids), self.raw_model.vocab_size)
        return {f"batch_{name}": value for name, value in usage.items()}

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """IoU at both kinds of places, near accuracy, and the use of codes; of the means themselves as long as codes
        are not in use.
        """
        totals: dict[str, float] = {}
        ids = []
        for batch in self.val_shapes:
            points_BN3, normals_BN3, queries_BQ3, inside_BQ = (part.to(self.device) for part in batch)
            field, ids_BS = self._reconstruct(model, points_BN3, normals_BN3)
            if ids_BS is not None:
                ids.append(ids_BS)
            decoded_BQ = field.occupancy(queries_BQ3) >= 0
            half = queries_BQ3.shape[1] // 2
            figures = {
                "iou": intersection_over_union(decoded_BQ[:, :half], inside_BQ[:, :half]),
                "near_iou": intersection_over_union(decoded_BQ[:, half:], inside_BQ[:, half:]),
                "near_accuracy": float((decoded_BQ[:, half:] == inside_BQ[:, half:]).float().mean()),
            }
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value / len(self.val_shapes)
        if ids:
            totals |= code_usage(torch.cat(ids), model.vocab_size)
        return {f"val_{name}": value for name, value in totals.items()}

    def before_export(self, model: torch.nn.Module) -> None:
        if self.step > self.recipe.model.continuous_steps:  # codes are in use
            logger.info("a logit of %.1f counts as inside", fit_threshold(model, self.source, self.recipe.data.points))

    def show_samples(self, model: torch.nn.Module, tracker: Tracker) -> None:
        """Surface points in the upper row, meshes that are made of them below."""
        rows: list[list[Tensor]] = [[], []]
        for batch in self.val_shapes[: self.recipe.run.num_samples]:
            points_BN3, normals_BN3 = (part.to(self.device) for part in batch[:2])
            mesh = self._reconstruct(model, points_BN3, normals_BN3)[0].to_mesh(self.recipe.run.sample_resolution)
            real = render_points(batch[0][0].numpy(), batch[1][0].numpy(), PICTURE_SIZE, splat=SPLAT)
            for row, picture in zip(rows, (real, render_mesh(mesh, PICTURE_SIZE)), strict=True):
                row.append(torch.from_numpy(picture).permute(2, 0, 1).float() / 255)
        tracker.grid(self.step, torch.stack([torch.stack(row) for row in rows]))

    def _reconstruct(
        self, model: torch.nn.Module, points_BN3: Tensor, normals_BN3: Tensor
    ) -> tuple[ShapeField, Tensor | None]:
        """The fields of surfaces, and their ids; without quantization while codes are not in use."""
        if self.step <= self.recipe.model.continuous_steps > 0:
            return model.decode_latents(model.encode_latents(points_BN3, normals_BN3)), None
        ids_BS = model.encode_points(points_BN3, normals_BN3)
        return model.decode_ids(ids_BS), ids_BS

    def _drawn_scales(self) -> int | None:
        """How many scales this batch is decoded after; None for all."""
        num_scales = len(self.raw_model.scales)
        is_partial = num_scales > 1 and float(torch.rand(())) < self.recipe.model.partial_share
        return int(torch.randint(1, num_scales, ())) if is_partial else None

    def _place_codes(self) -> None:
        """K-means over latents of the first samples, which are the same in every run with this seed."""
        run, model = self.recipe.run, self.raw_model
        needed = -(-ROWS_PER_CODE * model.vocab_size // (run.batch_size * sum(model.scales)))
        batches = shape_batches(self.shapes, 0, run.batch_size)
        with torch.no_grad():
            latents = []
            for _ in range(needed):
                points_BN3, normals_BN3, *_ = next(batches)
                latents.append(model.encode_latents(points_BN3.to(self.device), normals_BN3.to(self.device)))
        place_codes(model.quantize, torch.cat(latents), torch.Generator().manual_seed(run.seed))
        self.ema.copy_from(model, "quantize.")
        logger.info("placed the codes by k-means over %d batches", needed)

    def _on_device(self, batch: tuple[Tensor, Any]) -> Batch:
        return tuple(part.to(self.device, non_blocking=True) for part in (batch[0], *batch[1]))

    def checkpoint_contents(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        tensors, state = super().checkpoint_contents()
        if self.revival is not None:
            tensors["code_revival"] = self.revival.state_dict()
        return tensors, state

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        super().restore(tensors, state)
        if self.revival is not None:
            self.revival.load_state_dict(tensors["code_revival"])


def shape_loss(
    output: TokenizerOutput, inside_BQ: Tensor, num_uniform: int, recipe: ShapeLossRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, 0-d with gradient, and detached metrics.

    output: of the tokenizer's training pass. inside_BQ: the truth, the first `num_uniform` of the uniform queries.
    """
    errors_BQ = F.binary_cross_entropy_with_logits(output.decoded.float(), inside_BQ.float(), reduction="none")
    uniform, near = errors_BQ[:, :num_uniform].mean(), errors_BQ[:, num_uniform:].mean()
    kl = output.posterior.kl().mean() / output.posterior.mean.shape[1]  # a mean over channels, too
    loss = uniform + recipe.near_weight * near + recipe.kl_weight * kl
    metrics = {"uniform_loss": uniform, "near_loss": near, "kl": kl}
    if output.vq is not None:
        loss = loss + recipe.quantizer_weight * output.vq.quantizer_loss
        metrics["quantizer_loss"] = output.vq.quantizer_loss
    metrics["accuracy"] = ((output.decoded >= 0) == inside_BQ).float().mean()
    return loss, {name: value.detach() for name, value in ({"total_loss": loss} | metrics).items()}


def build_shape_tokenizer(recipe: ShapeModelRecipe, config: dict | None = None):
    """The tokenizer of a recipe: fresh, from `init_from`, or random with exactly `config` (that of a checkpoint).

    Raises:
        InvalidRecipe: names or sizes that do not fit together.
    """
    if config is not None:
        return construct(recipe.class_name, config)
    if recipe.init_from is not None:
        model = load(str(recipe.init_from))
        if type(model).__name__ != recipe.class_name:
            raise InvalidRecipe(f"model.init_from {recipe.init_from} holds a {type(model).__name__}")
        return model
    like = {}
    if recipe.like is not None:
        entry = find_entry(recipe.like)
        if entry is None or entry.class_name != recipe.class_name:
            names = [name for name, known in ENTRIES.items() if known.class_name == recipe.class_name]
            raise InvalidRecipe(
                f"model.like {recipe.like!r} is no {recipe.class_name}.{nearest_names(recipe.like, names)}"
            )
        like = constructor_arguments(entry)
    return construct(recipe.class_name, like | recipe.config)


def _is_decayed(name: str, parameter: torch.nn.Parameter) -> bool:
    """Matrices and kernels; not the codes, nor learned tokens and places."""
    return parameter.ndim >= 2 and name.endswith("weight") and not name.startswith("quantize.")


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.shape", load_shape_recipe, ShapeTrainer, argv)


if __name__ == "__main__":
    sys.exit(main())
