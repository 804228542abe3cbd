"""Training next-scale generators of shapes: the loop of `generator.py` over tokens of labelled shapes.

Shape suffixes: N shapes or points, V views of a shape, S tokens of all scales, F label fields, B batch.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import InvalidRecipe, TokenizerMismatch
from ..core.meshes import BOX_FILL
from ..core.registry import load
from ..core.shape_tokenizer import ShapeTokenizer
from ..evaluation.render import render_mesh
from .code_start import start_from_codes
from .data import SampleOrder, batch_positions
from .generator import GeneratorTrainer, build_generator
from .next_scale_recipe import NextScaleDataRecipe
from .shape_data import Move, ShapeShards
from .tracker import Tracker

logger = logging.getLogger(__name__)
PICTURE_SIZE = 128  # pixels a side of the pictures in the log
ENCODED_AT_ONCE = 32
VIEW, LABEL = 1, 2  # what a random number at a place is for


class NextScaleTrainer(GeneratorTrainer):
    """A generator's run. The tokenizer is frozen."""

    samples_name = "shapes"

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        self.tokenizer = load(recipe.tokenizer).requires_grad_(False).to(self.device)
        if not isinstance(self.tokenizer, ShapeTokenizer):
            raise InvalidRecipe(f"tokenizer {recipe.tokenizer} is a {type(self.tokenizer).__name__}, none of shapes")
        self.source = ShapeShards(recipe.data.train, "train")
        self.names = class_names(self.source, recipe.data.label_fields)
        facts = {
            "num_classes": len(self.names), "label_names": self.names, "scales": self.tokenizer.scales,
            "codebook_size": self.tokenizer.vocab_size, "code_width": self.tokenizer.quantize.code_width,
            "tokenizer": recipe.tokenizer, "tokenizer_fingerprint": self.tokenizer.fingerprint,
        }  # fmt: skip
        config = None if state is None else state["model_config"]
        self.raw_model = build_generator(recipe.model, facts, config).to(self.device).train()
        if config is None and recipe.model.init_from is None and not self.tokenizer.quantize.lookup_free:
            start_from_codes(self.raw_model, self.tokenizer.quantize)
        try:
            self.raw_model.use_tokenizer(self.tokenizer)
        except TokenizerMismatch as error:
            raise InvalidRecipe(f"tokenizer: {error}") from error

    def build_data(self) -> None:
        data, seed = self.recipe.data, self.recipe.run.seed
        with self.accelerator.main_process_first():
            cache = self.recipe.output / "ids.safetensors"
            ids_NVS = encode_views(self.source, self.tokenizer, data, cache)
        self.data = LabelledShapes(self.source, ids_NVS, shape_labels(self.source, self.names, data.label_fields), seed)
        val_source = ShapeShards(data.val or data.train[:1], "val")
        del val_source.entries[data.max_val_shapes :]
        as_they_are = data.model_copy(update={"views": 1})
        self.val_stored = encode_views(val_source, self.tokenizer, as_they_are)[:, 0]
        # By their last field, the most exact one.
        self.val_labels = torch.from_numpy(shape_labels(val_source, self.names, data.label_fields)[:, -1])
        logger.info(
            "%d shapes of %d classes to train on, %d to validate", len(self.source), len(self.names), len(val_source)
        )

    def show_samples(self, model: torch.nn.Module, tracker: Tracker) -> None:
        """One column for each of the first classes, two seeds."""
        run = self.recipe.run
        columns = min(run.num_samples, len(self.names))
        meshes = model.generate([*range(columns)] * 2, seed=0, resolution=run.sample_resolution)
        pictures = [torch.from_numpy(render_mesh(mesh, PICTURE_SIZE)).permute(2, 0, 1).float() / 255 for mesh in meshes]
        tracker.grid(self.step, torch.stack(pictures).unflatten(0, (2, columns)))


class LabelledShapes:
    """Ids of shapes in an order that needs no state: which one, which view and which label is a function of the place
    in the run.
    """

    def __init__(self, source: ShapeShards, ids_NVS: Tensor, labels_NF: np.ndarray, seed: int):
        self.ids_NVS, self.labels_NF, self.seed = ids_NVS, labels_NF, seed
        self.order = SampleOrder(source, seed)

    def batches(
        self, first_batch: int, batch_size: int, process: int, num_processes: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (ids [B, S], labels [B]) of one process."""
        for positions in batch_positions(first_batch, batch_size, process, num_processes):
            indices = [self.order.index(position) for position in positions]
            views = [self._drawn(position, VIEW, self.ids_NVS.shape[1]) for position in positions]
            fields = [self._drawn(position, LABEL, self.labels_NF.shape[1]) for position in positions]
            yield self.ids_NVS[indices, views], torch.from_numpy(self.labels_NF[indices, fields])

    def _drawn(self, position: int, what: int, number: int) -> int:
        return int(np.random.default_rng([self.seed, position, what]).integers(number))


def class_names(source: ShapeShards, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a training set, in lower case: those of the first field first, sorted within a field."""
    names: dict[str, None] = {}
    for field in fields:
        names |= dict.fromkeys(sorted({str(e.facts.get(field, "")).lower() for e in source.entries} - {""}))
    if not names:
        raise InvalidRecipe(f"data.label_fields: no shape to train on has {', '.join(fields)}")
    return tuple(names)


def shape_labels(source: ShapeShards, names: tuple[str, ...], fields: tuple[str, ...]) -> np.ndarray:
    """Class numbers int64 [N, F]; "no class" where a shape has none, or one that is not among `names`."""
    number = {name: index for index, name in enumerate(names)}
    return np.array(
        [[number.get(str(e.facts.get(field, "")).lower(), len(names)) for field in fields] for e in source.entries]
    )


@torch.inference_mode()
def encode_views(
    source: ShapeShards, tokenizer: ShapeTokenizer, recipe: NextScaleDataRecipe, cache: Path | None = None
) -> Tensor:
    """Ids int64 [N, V, S] of all views, read from `cache` when that is of the same shapes, views and tokenizer."""
    listing = [f"{e.file} {e.file.stat().st_size} {e.file.stat().st_mtime_ns} {e.key}" for e in source.entries]
    listing += [tokenizer.fingerprint, f"{recipe.views} {recipe.mirror} {recipe.min_scale}"]
    key = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    if cache is not None and (found := _read_cache(cache, key)) is not None:
        return found.long()
    places = [(index, view) for index in range(len(source)) for view in range(recipe.views)]
    ids = []
    for start in range(0, len(places), ENCODED_AT_ONCE):
        drawn = [view_of(source, *place, recipe, tokenizer.num_points) for place in places[start:][:ENCODED_AT_ONCE]]
        points_BN3, normals_BN3 = (torch.stack(part).to(tokenizer.device) for part in zip(*drawn, strict=True))
        ids.append(tokenizer.encode_points(points_BN3, normals_BN3).cpu())
        if start // ENCODED_AT_ONCE % 50 == 0:
            logger.info("encoded %d of %d views", min(start + ENCODED_AT_ONCE, len(places)), len(places))
    ids_NVS = torch.cat(ids).unflatten(0, (len(source), recipe.views))
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        staged = cache.with_suffix(".writing")
        save_file({"ids": ids_NVS.int()}, staged, {"key": key})
        staged.replace(cache)
    return ids_NVS.clone()


def view_of(
    source: ShapeShards, index: int, view: int, recipe: NextScaleDataRecipe, count: int
) -> tuple[Tensor, Tensor]:
    """`count` points and normals fp32 [count, 3] of a view of a shape; view 0 is the shape as it is."""
    points_N3, normals_N3 = source.surface(index)
    rng = np.random.default_rng([view, zlib.crc32(source.entries[index].key.encode())])
    chosen = np.arange(count) % len(points_N3)
    if view:
        limit = -np.log(recipe.min_scale)
        stretch = np.exp(rng.uniform(-limit, limit, 3)) * [-1.0 if rng.random() < recipe.mirror else 1.0, 1.0, 1.0]
        low, high = ((points_N3 * stretch).min(axis=0), (points_N3 * stretch).max(axis=0))
        move = Move(np.diag(stretch), (low + high) / 2, 2 * BOX_FILL / float((high - low).max()))
        chosen = (chosen + rng.integers(len(points_N3))) % len(points_N3)
        points_N3, normals_N3 = move(points_N3), move.normals(normals_N3)
    return tuple(torch.from_numpy(np.ascontiguousarray(array[chosen])) for array in (points_N3, normals_N3))


def _read_cache(cache: Path, key: str) -> Tensor | None:
    try:
        with safe_open(cache, "pt") as file:
            return file.get_tensor("ids") if (file.metadata() or {}).get("key") == key else None
    except (SafetensorError, OSError):
        return None  # not there yet, or cut short
