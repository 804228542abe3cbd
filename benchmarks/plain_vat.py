"""VAT's slow parts as public code of its family formulates them: the baselines of `vat.py`.

A field is sampled plane by plane with grid_sample at every point of a grid and read by the whole network; quantization
compares every row with the whole codebook as one matrix of distances, scale by scale, with torch's interpolation.
"""

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from mediatok.nn.multiscale_vq import MultiScaleQuantizer
from mediatok.tokenizers.shape.triplane import PLANES, OccupancyHead
from skimage.measure import marching_cubes
from torch import Tensor

CHUNK = 100_000  # points at a time


def plain_occupancy(planes_NFHH: Tensor, head: OccupancyHead, xyz_P3: Tensor) -> Tensor:
    sampled = [
        F.grid_sample(planes_NFHH[plane : plane + 1], xyz_P3[None, None, :, list(axes)], "bilinear", "border", False)
        for plane, axes in enumerate(PLANES)
    ]
    x_PF = torch.cat(sampled, dim=1)[0, :, 0].T
    for layer in (head.first, *head.layers):
        x_PF = torch.relu(layer(x_PF))
    return head.last(x_PF)[:, 0]


def dense_surface(values_of, resolution: int) -> trimesh.Trimesh:
    """Marching cubes over the values at every point of the grid."""
    axis = -1 + 2 * torch.arange(resolution + 1) / resolution
    values = torch.empty((resolution + 1) ** 3)
    for part in torch.arange(len(values)).split(CHUNK):
        z, y, x = part % len(axis), part // len(axis) % len(axis), part // len(axis) ** 2
        values[part] = values_of(torch.stack([axis[x], axis[y], axis[z]], dim=1))
    grid = values.view((resolution + 1,) * 3).numpy()
    vertices, faces, _, _ = marching_cubes(grid, 0.0, gradient_direction="ascent")
    return trimesh.Trimesh(vertices.astype(np.float64) * 2 / resolution - 1, faces, process=False)


def plain_encode(quantize: MultiScaleQuantizer, z_BLC: Tensor) -> Tensor:
    codes_KC, resampler = quantize.codebook, quantize.resampler
    rest_BCL, ids = z_BLC.transpose(1, 2), []
    for k, tokens in enumerate(quantize.scales):
        rows_NC = F.interpolate(rest_BCL, tokens, mode="area").transpose(1, 2).reshape(-1, z_BLC.shape[2])
        distance_NK = (rows_NC**2).sum(1, keepdim=True) + (codes_KC**2).sum(1) - 2 * rows_NC @ codes_KC.T
        ids_Bk = distance_NK.argmin(1).view(len(z_BLC), tokens)
        up_BCL = F.interpolate(F.embedding(ids_Bk, codes_KC).transpose(1, 2), z_BLC.shape[1], mode="linear")
        conv_BCL = F.conv1d(up_BCL, resampler.weight[k], resampler.bias[k], padding=1)
        rest_BCL = rest_BCL - (up_BCL + conv_BCL) / 2
        ids.append(ids_Bk)
    return torch.cat(ids, dim=1)
