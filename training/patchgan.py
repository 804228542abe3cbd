"""The discriminator of pix2pix (Isola et al. 2017, arXiv 1611.07004), as VQGAN and TokenFlow are trained with.

Shape suffixes: B batch, 3/H/W image, h/w grid of patches.
"""

from __future__ import annotations

from torch import Tensor, nn

NEGATIVE_SLOPE = 0.2
MAX_WIDENING = 8


class PatchGAN(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to logits [B, 1, h, w], one a patch: high means real.

    Its batch norms see real and generated pictures apart, so give them in two calls.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(NEGATIVE_SLOPE)]
        width = channels
        for number in range(1, num_layers + 1):
            before, width = width, channels * min(2**number, MAX_WIDENING)
            stride = 2 if number < num_layers else 1
            layers += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width),
                nn.LeakyReLU(NEGATIVE_SLOPE),
            ]  # fmt: skip
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, mean=1.0, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return self.main(pixels_B3HW * 2 - 1)
