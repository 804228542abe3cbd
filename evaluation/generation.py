"""How good a generator's pictures are: Frechet distance against a floor of real pictures, and what it memorised.

Shape suffixes: N pictures, F features, K components, S side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.base import OnStep
from ..core.errors import InvalidInput
from ..core.files import read_limited
from ..core.generator import ImageGenerator, image_seeds
from ..core.images import fit_square, list_images, read_image, to_pixels
from .metrics import LITE0_COMPONENTS, find_lite0_weights, frechet_distance, load_lite0

MAX_LABELS_BYTES = 256 * 2**20
SMALLEST_SET = LITE0_COMPONENTS + 1  # fewer pictures cannot fill the components
COPY_PERCENTILE = 5  # nearer to training than this share of held-out pictures counts as a copy


@dataclass(frozen=True)
class GenerationReport:
    """Figures of one generator.

    fd_lite0: Frechet distance of the made pictures to as many training pictures, in the first 64 principal components
    of their EfficientNet-Lite0 features (no FID, and not comparable with one). floor: the same between two disjoint
    sets of training pictures of that size.
    nearest_feature, nearest_pixel: median distance of a made picture to the nearest training picture (1 - cosine of
    the features; root mean square over pixels in [0, 1]). The heldout ones: of validation pictures to training.
    copied_share: made pictures whose features are nearer to a training picture than those of 95 % of the validation
    pictures; 0.05 would be no memorisation.
    """

    model: str
    num_images: int
    settings: str
    seed: int
    fd_lite0: float
    floor: float
    nearest_feature: float
    heldout_nearest_feature: float
    nearest_pixel: float
    heldout_nearest_pixel: float
    copied_share: float
    network_sha256: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        rows = [
            ("model", self.model),
            ("pictures", f"{self.num_images}, seeds from {self.seed}, {self.settings}"),
            ("FD-Lite0", f"{self.fd_lite0:.1f} (floor of real pictures {self.floor:.1f})"),
            ("nearest training picture, features", f"{self.nearest_feature:.4f} "
             f"(held-out pictures {self.heldout_nearest_feature:.4f})"),
            ("nearest training picture, pixels", f"{self.nearest_pixel:.4f} "
             f"(held-out pictures {self.heldout_nearest_pixel:.4f})"),
            ("nearer than 95 % of held-out pictures", f"{100 * self.copied_share:.1f} %"),
            ("network", f"EfficientNet-Lite0, sha256 {self.network_sha256[:16]}"),
        ]  # fmt: skip
        return "\n".join(f"{name:<40}{value}" for name, value in rows)


def evaluate_generator(
    generator: ImageGenerator,
    train: str | Path,
    val: str | Path,
    *,
    labels: str | Path | None = None,
    label_field: str = "category",
    num_images: int = 512,
    seed: int = 0,
    lite0_weights: str | Path | None = None,
    batch_size: int = 16,
    on_step: OnStep | None = None,
    **options,
) -> GenerationReport:
    """Make pictures with the labels of real ones and compare them with real ones.

    Args:
        train, val: folders of the pictures that the model was trained on, and of held-out ones.
        labels: JSON file {file stem: {label_field: class name}}; without it, folder names are classes.
        num_images: pictures to make; twice as many training pictures are needed.
        options: steps, guidance and the others of the model's `settings`.

    Raises:
        InvalidInput: too few pictures, labels that the model does not know, options that it lacks.
    """
    settings = generator.checked_settings(**options)
    network = _network(lite0_weights)
    train_paths, val_paths = list_images(Path(train)), list_images(Path(val))
    first, second = _two_sets(len(train_paths), num_images, seed)
    side = generator.tokenizer.image_size
    wanted = class_names([train_paths[index] for index in second], labels, label_field)
    images = generator.generate(wanted, seed=seed, batch_size=batch_size, on_step=on_step, **options)
    made = torch.stack([to_pixels(image) for image in images])
    real, heldout = _read(train_paths, side), _read(val_paths, side)
    features = {name: _features(network.run, pixels) for name, pixels in
                {"made": made, "train": real, "heldout": heldout}.items()}  # fmt: skip
    fd, floor = _distances(features["made"], features["train"][first], features["train"][second])
    near, near_heldout = (_nearest_cosine(features[name], features["train"]) for name in ("made", "heldout"))
    threshold = np.percentile(near_heldout, COPY_PERCENTILE)
    return GenerationReport(
        model=generator.name,
        num_images=num_images,
        settings=str(settings),
        seed=seed,
        fd_lite0=fd,
        floor=floor,
        nearest_feature=float(np.median(near)),
        heldout_nearest_feature=float(np.median(near_heldout)),
        nearest_pixel=float(_nearest_pixels(made, real).median()),
        heldout_nearest_pixel=float(_nearest_pixels(heldout, real).median()),
        copied_share=float((near < threshold).mean()),
        network_sha256=network.sha256,
    )


def _network(weights: str | Path | None):
    """EfficientNet-Lite0 with `weights`, or with those that are at hand."""
    weights = weights or find_lite0_weights()
    if weights is None:
        raise InvalidInput("EfficientNet-Lite0's weights are not at hand: run `make data`, or pass lite0_weights=")
    return load_lite0(weights)


def _two_sets(num_real: int, num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of `num_images` of the real pictures, and of as many others, drawn with `seed`."""
    if not isinstance(num_images, int) or not SMALLEST_SET <= num_images <= num_real // 2:
        raise InvalidInput(
            f"num_images={num_images} must be from {SMALLEST_SET} to half the {num_real} training pictures"
        )
    image_seeds(seed, num_images)  # a wrong one is told before the work
    order = np.random.default_rng(seed).permutation(num_real)
    return order[:num_images], order[num_images : 2 * num_images]


def class_names(paths: Sequence[Path], labels: str | Path | None, field: str) -> list[str | None]:
    """The class of each picture; None where it has none."""
    if labels is None:
        return [path.parent.name for path in paths]
    try:
        table = json.loads(read_limited(labels, MAX_LABELS_BYTES))
        return [str(table.get(path.stem, {}).get(field, "")) or None for path in paths]
    except (ValueError, AttributeError) as error:
        raise InvalidInput(f"{labels} does not map file stems to fields: {error}") from error


def _read(paths: Sequence[Path], side: int) -> Tensor:
    """Pixels fp32 [N, 3, S, S] in [0, 1]."""
    return torch.stack([to_pixels(fit_square(read_image(path), side)) for path in paths])


def _features(run: Callable[[Tensor], Tensor], pixels_N3SS: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return torch.cat([run(batch) for batch in pixels_N3SS.split(32)]).double().numpy()


def _distances(made_NF: np.ndarray, first_NF: np.ndarray, second_NF: np.ndarray) -> tuple[float, float]:
    """Frechet distances made-first and second-first, in the principal components of the real ones."""
    real = np.concatenate([first_NF, second_NF])
    mean_F = real.mean(0)
    axes_KF = np.linalg.svd(real - mean_F, full_matrices=False)[2][:LITE0_COMPONENTS]
    made, first, second = ((features - mean_F) @ axes_KF.T for features in (made_NF, first_NF, second_NF))
    return frechet_distance(made, first), frechet_distance(second, first)


def _nearest_cosine(a_NF: np.ndarray, b_MF: np.ndarray) -> np.ndarray:
    """1 - cosine of each of `a_NF` to the nearest of `b_MF`."""
    a, b = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (a_NF, b_MF))
    return 1 - (a @ b.T).max(axis=1)


def _nearest_pixels(a_N3SS: Tensor, b_M3SS: Tensor) -> Tensor:
    """Root mean square difference of each of `a_N3SS` to the nearest of `b_M3SS`."""
    a, b = a_N3SS.flatten(1), b_M3SS.flatten(1)
    return torch.cat([torch.cdist(rows, b).min(dim=1).values for rows in a.split(256)]) / a.shape[1] ** 0.5
