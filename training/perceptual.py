"""Perceptual losses: distances between pictures in the features of a frozen network.

Every network's weights are given by path (nothing is downloaded during training); EfficientNet-Lite0, which `make data`
fetches, is the one that always works. Each loss maps (fake, real), fp32 [B, 3, H, W] in [0, 1], to one number per
picture or to a scalar; take its mean.

Shape suffixes: B batch, C channels, H, W height and width, K classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InvalidCheckpoint, InvalidRecipe, ModelNotFound, nearest_names
from ..nn.efficientnet_lite import EfficientNetLite0

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_EFFICIENTNET = Path("data/efficientnet_lite0.safetensors")
EFFICIENTNET_STAGES = 5  # features down to 1/16 of the side; deeper ones see too few positions of a small picture

# VGG-16: indices of the convolutions in torchvision's `features`, one row up to each of relu1_2 ... relu5_3.
VGG_SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)
LPIPS_EPS = 1e-10


class FeatureDistance(nn.Module):
    """Mean over stages of EfficientNet-Lite0 of the squared distance between features of unit length: [B].

    The idea of LPIPS without its learned weights; works at the picture's own size.
    """

    def __init__(self, network: EfficientNetLite0):
        super().__init__()
        self.network = network

    def forward(self, fake_B3HW: Tensor, real_B3HW: Tensor) -> Tensor:
        with torch.no_grad():
            real_stages = self.network.stage_outputs(real_B3HW, EFFICIENTNET_STAGES)
        fake_stages = self.network.stage_outputs(fake_B3HW, EFFICIENTNET_STAGES)
        distances = [
            (F.normalize(fake, dim=1) - F.normalize(real, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for fake, real in zip(fake_stages, real_stages, strict=True)
        ]
        return torch.stack(distances).mean(dim=0)


class ConvNeXtLogits(nn.Module):
    """Mean squared difference of a ConvNeXt's ImageNet logits at 224 px: a scalar."""

    def __init__(self, state_dict: dict[str, Tensor]):
        super().__init__()
        self.convnext = convnext_from_state_dict(state_dict)
        self.register_buffer("imagenet_mean", torch.tensor(IMAGENET_MEAN)[None, :, None, None], persistent=False)
        self.register_buffer("imagenet_std", torch.tensor(IMAGENET_STD)[None, :, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def logits(self, pixels_B3HW: Tensor) -> Tensor:
        pixels = F.interpolate(pixels_B3HW, size=224, mode="bilinear", align_corners=False, antialias=True)
        return self.convnext((pixels - self.imagenet_mean) / self.imagenet_std)

    def forward(self, fake_B3HW: Tensor, real_B3HW: Tensor) -> Tensor:
        with torch.no_grad():
            real_BK = self.logits(real_B3HW)
        return F.mse_loss(self.logits(fake_B3HW), real_BK)


class LPIPS(nn.Module):
    """Learned perceptual similarity (Zhang et al. 2018) over VGG-16: [B, 1, 1, 1].

    convolutions: weight and bias of the 13 VGG-16 convolutions by their index in torchvision's `features`.
    heads: five non-negative 1x1 weights [1, C, 1, 1].
    """

    def __init__(self, convolutions: dict[int, tuple[Tensor, Tensor]], heads: list[Tensor]):
        super().__init__()
        self.slices = nn.ModuleList()
        for indices in VGG_SLICES:
            convs = []
            for index in indices:
                weight, bias = convolutions[index]
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                conv.load_state_dict({"weight": weight, "bias": bias})
                convs.append(conv)
            self.slices.append(nn.ModuleList(convs))
        for index, head in enumerate(heads):
            self.register_buffer(f"head_{index}", head, persistent=False)
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT)[None, :, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE)[None, :, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def features(self, pixels_B3HW: Tensor) -> list[Tensor]:
        x_BCHW = (pixels_B3HW * 2 - 1 - self.shift) / self.scale
        outputs = []
        for index, convs in enumerate(self.slices):
            x_BCHW = x_BCHW if index == 0 else F.max_pool2d(x_BCHW, 2)
            for conv in convs:
                x_BCHW = F.relu(conv(x_BCHW))
            outputs.append(x_BCHW / (x_BCHW.square().sum(dim=1, keepdim=True).sqrt() + LPIPS_EPS))
        return outputs

    def forward(self, fake_B3HW: Tensor, real_B3HW: Tensor) -> Tensor:
        with torch.no_grad():
            real_features = self.features(real_B3HW)
        total = 0.0
        for index, (fake, real) in enumerate(zip(self.features(fake_B3HW), real_features, strict=True)):
            difference = (fake - real).square() * getattr(self, f"head_{index}")
            total = total + difference.sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
        return total


class WeightedMean(nn.Module):
    """(w1 * first + w2 * second) / (w1 + w2): the "lpips-convnext_s-W1-W2" of the single-stage recipes."""

    def __init__(self, first: nn.Module, second: nn.Module, first_weight: float, second_weight: float):
        super().__init__()
        self.first, self.second = first, second
        self.first_weight, self.second_weight = first_weight, second_weight

    def forward(self, fake_B3HW: Tensor, real_B3HW: Tensor) -> Tensor:
        first = self.first_weight * self.first(fake_B3HW, real_B3HW)
        second = self.second_weight * self.second(fake_B3HW, real_B3HW)
        return (first + second) / (self.first_weight + self.second_weight)


def build_perceptual(name: str, weights: dict[str, Path]) -> nn.Module | None:
    """The perceptual loss called `name`, with network weights from the files in `weights`; None for "none".

    Names: "efficientnet_lite0", "convnext_s", "lpips", "lpips-convnext_s" with optional "-W1-W2", "none".

    Raises:
        InvalidRecipe: unknown name. ModelNotFound: a weight file that is not given or not there.
    """
    if name == "none":
        return None
    if name == "efficientnet_lite0":
        return FeatureDistance(EfficientNetLite0.from_file(weights.get(name, DEFAULT_EFFICIENTNET)))
    if name == "convnext_s":
        return ConvNeXtLogits(_read_weights("convnext_s", weights))
    if name == "lpips":
        return lpips_from_files(weights)
    first, *rest = name.removeprefix("lpips-convnext_s").split("-")
    if name.startswith("lpips-convnext_s") and first == "" and len(rest) in (0, 2):
        try:
            first_weight, second_weight = (float(text) for text in rest) if rest else (1.0, 1.0)
        except ValueError:
            raise InvalidRecipe(f"loss.perceptual {name!r} must end in two numbers, such as -1.0-0.1") from None
        return WeightedMean(
            lpips_from_files(weights), build_perceptual("convnext_s", weights), first_weight, second_weight
        )
    known = ("efficientnet_lite0", "convnext_s", "lpips", "lpips-convnext_s-1.0-0.1", "none")
    raise InvalidRecipe(f"loss.perceptual {name!r} is unknown.{nearest_names(name, known)} Known: {', '.join(known)}.")


def lpips_from_files(weights: dict[str, Path]) -> LPIPS:
    """LPIPS from torchvision's VGG-16 file (key "vgg16") and the linear heads (key "lpips"; torchmetrics has them)."""
    vgg = _read_weights("vgg16", weights)
    if "lpips" not in weights:
        import torchmetrics

        heads_file = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
        weights = weights | {"lpips": heads_file}
    heads = _read_weights("lpips", weights)
    try:
        convolutions = {i: (vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"]) for row in VGG_SLICES for i in row}
        return LPIPS(convolutions, [heads[f"lin{index}.model.1.weight"] for index in range(len(VGG_SLICES))])
    except (KeyError, RuntimeError) as error:
        raise InvalidCheckpoint(
            f"{weights['vgg16']} and {weights['lpips']} are not VGG-16 and LPIPS weights: {error}"
        ) from error


def convnext_from_state_dict(state_dict: dict[str, Tensor]) -> nn.Module:
    """torchvision's ConvNeXt with the depths and widths that `state_dict` has."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    try:
        stages = sorted({int(key.split(".")[1]) for key in state_dict if key.startswith("features.")})[1::2]
        widths = [state_dict[f"features.{stage}.0.block.0.weight"].shape[0] for stage in stages]
        depths = [len({key.split(".")[2] for key in state_dict if key.startswith(f"features.{s}.")}) for s in stages]
        settings = [
            CNBlockConfig(width, following, depth)
            for width, following, depth in zip(widths, [*widths[1:], None], depths, strict=True)
        ]
        model = ConvNeXt(settings, num_classes=state_dict["classifier.2.weight"].shape[0])
        model.load_state_dict(state_dict)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise InvalidCheckpoint(f"not the weights of a torchvision ConvNeXt: {error}") from error
    return model


def _read_weights(name: str, weights: dict[str, Path]) -> dict[str, Tensor]:
    path = weights.get(name)
    if path is None or not Path(path).is_file():
        where = "is not given" if path is None else f"{path} does not exist"
        raise ModelNotFound(
            f"weights of {name} {where}: set loss.perceptual_weights.{name} to torchvision's file (.pth or "
            ".safetensors), or loss.perceptual to efficientnet_lite0, which `make data` fetches"
        )
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and safetensors readers raise many kinds
        raise InvalidCheckpoint(f"{path} does not hold weights: {error}") from error
