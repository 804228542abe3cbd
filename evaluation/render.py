"""Small pictures of shapes, without a GPU or a window: points of the surface, splatted into a depth buffer.

Shape suffixes: N points, P covered pixels, H/W picture.
"""

from __future__ import annotations

import math

import numpy as np

from ..core.surfaces import sample_surface

AZIMUTH, ELEVATION = 35.0, 20.0  # degrees; the camera looks from the front right, a little from above
LIGHT = (-0.4, 0.7, 0.6)  # direction towards the lamp, as the camera sees it
SAMPLES_PER_PIXEL = 8  # of the picture: leaves no holes in a surface that fills it
ZOOM = 0.62  # of the half picture, for one unit of the box: its corners stay inside
PAPER, DARK, BRIGHT = 255.0, 40.0, 225.0


def render_mesh(mesh, size: int = 256, azimuth: float = AZIMUTH, elevation: float = ELEVATION) -> np.ndarray:
    """A picture uint8 [size, size, 3] of a mesh in the box [-1, 1]^3, y up; white where there is none."""
    if not len(mesh.faces):
        return np.full((size, size, 3), int(PAPER), dtype=np.uint8)
    points_N3, normals_N3 = sample_surface(mesh, SAMPLES_PER_PIXEL * size**2, 0)
    return render_points(points_N3.numpy(), normals_N3.numpy(), size, azimuth, elevation)


def render_points(
    points_N3: np.ndarray,
    normals_N3: np.ndarray,
    size: int = 256,
    azimuth: float = AZIMUTH,
    elevation: float = ELEVATION,
    splat: int = 1,
) -> np.ndarray:
    """A picture uint8 [size, size, 3] of points with normals; each covers `splat` x `splat` pixels.

    Both sides of a surface are lit alike: the meshes of the world do not agree on where their faces look.
    """
    view = _view(azimuth, elevation)
    seen_N3, facing_N3 = points_N3 @ view.T, normals_N3 @ view.T
    facing_N3 = facing_N3 * np.where(facing_N3[:, 2:] < 0, -1, 1)
    lamp = np.array(LIGHT) / np.linalg.norm(LIGHT)
    light_N = DARK + (BRIGHT - DARK) * (facing_N3 @ lamp).clip(0, 1)
    column_N = ((1 + ZOOM * seen_N3[:, 0]) * size / 2).astype(np.int64)
    row_N = ((1 - ZOOM * seen_N3[:, 1]) * size / 2).astype(np.int64)
    # Far points first: the last that is written to a pixel is the nearest.
    order = np.argsort(seen_N3[:, 2], kind="stable")
    offsets = np.arange(splat) - splat // 2
    row_P = (row_N[order, None, None] + offsets[:, None] + 0 * offsets).ravel()
    column_P = (column_N[order, None, None] + 0 * offsets[:, None] + offsets).ravel()
    is_in = (row_P >= 0) & (row_P < size) & (column_P >= 0) & (column_P < size)
    picture = np.full(size * size, PAPER)
    picture[row_P[is_in] * size + column_P[is_in]] = np.repeat(light_N[order], splat**2)[is_in]
    grey = picture.reshape(size, size).round().astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def contact_sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures of equal size in rows, as one uint8 [H, W, 3]."""
    return np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)


def _view(azimuth: float, elevation: float) -> np.ndarray:
    """Rotation [3, 3] into the camera's axes: x right, y up, z towards the camera."""
    a, e = math.radians(azimuth), math.radians(elevation)
    about_y = np.array([[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(e), -math.sin(e)], [0, math.sin(e), math.cos(e)]])
    return about_x @ about_y
