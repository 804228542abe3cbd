"""A start for small data sets: every latent of a VAT begins by looking at its own part of the box.

From the published initialisation latents attend to all points alike, and what they say of places is slow to come: with
2,302 shapes to train on, the IoU on others stood at 0.25 after 500 steps of 8 and at 0.30 after 2,000, without
quantization; with places and attention as here, it stood at 0.30 after 500. (One trial each, of 100 latents.)

So places start as waves of their coordinates, attention as "queries look at keys nearby" (as `aligned_start.py` does
it for pictures), and latents lie along a curve that fills the box, neighbours beside neighbours: averages along the
tokens, which coarse scales are made of, are averages over parts of space. A pixel of a plane looks along its column,
each head at another height. MLPs, convolutions and the head start with gain one. Nothing of it is fixed: training moves
all of it.

Shape suffixes: L latents, W width, D head width, P = 6 * OCTAVES_USED waves of a place, N places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import InvalidRecipe
from ..nn.point_embedding import OCTAVES
from ..tokenizers.shape.triplane import NUM_PLANES, PLANES
from ..tokenizers.shape.vat import VAT
from .aligned_start import copy_values

OCTAVES_USED = 4  # waves of x, 2 x, 4 x and 8 x: nearby is what lies within a tenth of the box
WAVES = 6 * OCTAVES_USED  # sines and cosines of three coordinates
GAINS = (2.4, 1.9, 1.5, 1.1)  # of queries and keys, head by head and then again: from near to farther
HEIGHT_GAIN, HEIGHT_OCTAVES = 2.0, 2  # how sharply a head sees its height in a column: by the waves of x and 2 x alone
HIGHEST = 0.8  # the heads' heights are spread from minus this to this
MLP_GAINS = (1.5, 0.7)  # of a block's two layers, each over the root of its inputs
LAST_SIZE, LAST_BIAS = 0.05, -2.0  # of the logits' layer: most of the box is outside
CURVE_BITS = 4  # the curve passes through (2 ** 4) ** 3 cells


@torch.no_grad()
def align_places(model: VAT) -> None:
    """Initialise a fresh `VAT` in place so that latents, points and pixels of the planes correspond.

    The first `WAVES` channels hold where a token looks, the next where it is found, three more which plane it is of.

    Raises:
        InvalidRecipe: heads or a width too narrow for the waves.
    """
    width, num_heads = model.config.width, model.config.num_heads
    if width // num_heads < WAVES or width < 3 * WAVES:
        raise InvalidRecipe(
            f"model.aligned_start needs heads of {WAVES} channels and a width of {3 * WAVES} or more, not "
            f"{width // num_heads} and {width}"
        )
    looks, is_found = slice(0, WAVES), slice(WAVES, 2 * WAVES)
    plane_marks = slice(2 * WAVES, 2 * WAVES + NUM_PLANES)
    encoder, decoder = model.encoder, model.decoder
    latent_LP = waves_of(along_curve(model.config.scales[-1]))

    for channels in (looks, is_found):
        encoder.embed.proj.weight[channels] = _embedded_waves()
        encoder.embed.proj.bias[channels] = 0
    _look(encoder.reduce.query.weight, encoder.reduce.key_value.weight[:width], num_heads)
    copy_values(encoder.reduce.key_value.weight[width:], encoder.reduce.out.weight)
    encoder.latent_tokens[:, looks] = latent_LP.to(encoder.latent_tokens)
    encoder.latent_tokens[:, is_found] = 0

    decoder.embed.weight[: plane_marks.stop] = 0  # codes are found by their places
    decoder.latent_places[:, plane_marks] = 0
    decoder.latent_places[:, looks] = decoder.latent_places[:, is_found] = latent_LP.to(decoder.latent_places)
    decoder.triplane_tokens[:, looks] = pixel_waves(model.config.plane_size).to(decoder.triplane_tokens)
    decoder.triplane_tokens[:, is_found] = 0
    decoder.triplane_tokens[:, plane_marks] = (
        torch.eye(NUM_PLANES).repeat_interleave(model.config.plane_size**2, dim=0).to(decoder.triplane_tokens)
    )
    for stack in (encoder.transformer, decoder.transformer):
        for block in stack.blocks:
            query_WW, key_WW, value_WW = block.attn.in_proj_weight.chunk(3)
            _look(query_WW, key_WW, num_heads)
            copy_values(value_WW, block.attn.out_proj.weight)
            _open(block.mlp)
    for block in decoder.transformer.blocks:
        _look_along_columns(block.attn.in_proj_weight.chunk(3)[0], num_heads)
    _open(encoder.reduce.mlp)
    _open_planes(model)


def _look(query_WW: Tensor, key_WW: Tensor, num_heads: int) -> None:
    """Queries read the waves of where a token looks, keys those of where it is found."""
    head_width = len(query_WW) // num_heads
    for head in range(num_heads):
        rows = slice(head * head_width, head * head_width + WAVES)
        for matrix_WW, first in ((query_WW, 0), (key_WW, WAVES)):
            matrix_WW[rows, first : first + WAVES] += GAINS[head % len(GAINS)] * torch.eye(WAVES).to(matrix_WW)


def _look_along_columns(query_WW: Tensor, num_heads: int) -> None:
    """Each head of a pixel looks at one height of its column, by the mark of its plane."""
    head_width = len(query_WW) // num_heads
    for head, height in enumerate(torch.linspace(-HIGHEST, HIGHEST, num_heads)):
        waves = waves_of(height.expand(1, 3)).view(2, 3, OCTAVES_USED)
        for plane, (across, down) in enumerate(PLANES):
            along = torch.zeros_like(waves)
            lacking = 3 - across - down
            along[:, lacking, :HEIGHT_OCTAVES] = waves[:, lacking, :HEIGHT_OCTAVES]
            rows = slice(head * head_width, head * head_width + WAVES)
            query_WW[rows, 2 * WAVES + plane] = HEIGHT_GAIN * along.flatten().to(query_WW)


def _open(mlp: nn.Sequential) -> None:
    """What passes through both layers keeps about its size."""
    layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    for layer, gain in zip(layers, MLP_GAINS, strict=True):
        nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)


def _open_planes(model: VAT) -> None:
    """Convolutions and the head keep the size of what they read (He et al. 2015)."""
    for layer in (*model.decoder.planes.modules(), *model.head.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    nn.init.normal_(model.head.last.weight, std=LAST_SIZE)
    nn.init.constant_(model.head.last.bias, LAST_BIAS)


def waves_of(place_N3: Tensor) -> Tensor:
    """Sines and cosines [N, P] of places, in the order of `PointEmbedding`."""
    angle_NA = (place_N3[..., None] * 2.0 ** torch.arange(OCTAVES_USED)).flatten(1)
    return torch.cat([angle_NA.sin(), angle_NA.cos()], dim=1)


def _embedded_waves() -> Tensor:
    """Which of the values of `PointEmbedding` are the waves: [P, its number of values]."""
    used = torch.arange(3)[:, None] * OCTAVES + torch.arange(OCTAVES_USED)
    columns_P = 3 + torch.cat([used.flatten(), 3 * OCTAVES + used.flatten()])
    chosen = torch.zeros(WAVES, 3 + 6 * OCTAVES + 3)
    chosen[torch.arange(WAVES), columns_P] = 1
    return chosen


def pixel_waves(side: int) -> Tensor:
    """Waves of the pixels of the three planes, in their order; nothing of the coordinate that a plane lacks."""
    centre = (2 * torch.arange(side) + 1) / side - 1
    planes = []
    for across, down in PLANES:
        place_N3 = torch.zeros(side * side, 3)
        place_N3[:, across], place_N3[:, down] = centre.repeat(side), centre.repeat_interleave(side)
        waves_N6 = waves_of(place_N3).view(-1, 2, 3, OCTAVES_USED)
        waves_N6[:, :, 3 - across - down] = 0
        planes.append(waves_N6.flatten(1))
    return torch.cat(planes)


def along_curve(count: int) -> Tensor:
    """`count` places [N, 3] of the box [-1, 1]^3, evenly along a Hilbert curve."""
    cells = 2 ** (3 * CURVE_BITS)
    index = ((torch.arange(count) + 0.5) * cells / count).long()
    return (torch.tensor([_hilbert(int(i)) for i in index]) + 0.5) * 2 / 2**CURVE_BITS - 1


def _hilbert(index: int) -> list[int]:
    """Cell number `index` of the three-dimensional Hilbert curve (Skilling 2004, "Programming the Hilbert curve")."""
    # The index's bits in turn are bits of the three axes, Gray coded ...
    axes = [sum((index >> (3 * bit + 2 - axis) & 1) << bit for bit in range(CURVE_BITS)) for axis in range(3)]
    gray = axes[2] >> 1
    for axis in (2, 1):
        axes[axis] ^= axes[axis - 1]
    axes[0] ^= gray
    # ... and each cube's quarter turns are undone from the smallest cubes up.
    for bit in range(1, CURVE_BITS):
        low = (1 << bit) - 1
        for axis in (2, 1, 0):
            if axes[axis] >> bit & 1:
                axes[0] ^= low
            else:
                swap = (axes[0] ^ axes[axis]) & low
                axes[0] ^= swap
                axes[axis] ^= swap
    return axes
