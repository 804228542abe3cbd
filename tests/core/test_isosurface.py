"""The surface found coarse to fine is the dense grid's; scale and sides are exact."""

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.core import isosurface
from mediatok.core.isosurface import extract_surface
from skimage.measure import marching_cubes

CENTRE = (0.1, -0.2, 0.05)


def sphere(points_N3, radius=0.63):
    return radius - (points_N3 - torch.tensor(CENTRE)).norm(dim=1)


def torus(points_N3):
    ring_N = points_N3[:, :2].norm(dim=1) - 0.6
    return 0.25 - torch.stack([ring_N, points_N3[:, 2]], dim=1).norm(dim=1)


def bumps(points_N3):
    """Several bodies with tunnels, as a network gives them: smooth, of no certain size."""
    waves_N = (points_N3 * torch.tensor([7.0, 5.0, 6.0])).sin().sum(1) + (points_N3 * 3).cos().prod(1)
    return waves_N - 2 * (points_N3.abs().amax(1) - 0.7).clamp(min=0) * 10


def thin_rod(points_N3):
    """A ball and a rod, thinner than a coarse cell, that goes out from it along no axis."""
    direction = torch.tensor([0.6, 0.64, 0.48])
    along_N = (points_N3 @ direction).clamp(0, 0.95)
    rod_N = 0.02 - (points_N3 - along_N[:, None] * direction).norm(dim=1)
    return torch.maximum(rod_N, 0.2 - points_N3.norm(dim=1))


FIELDS = [sphere, torus, bumps, thin_rod]


def dense(field, resolution, level=0.0):
    axis = -1 + 2 * torch.arange(resolution + 1) / resolution
    points = torch.cartesian_prod(axis, axis, axis)
    values = field(points).view((resolution + 1,) * 3).numpy()
    vertices, faces, _, _ = marching_cubes(values, level, gradient_direction="ascent")
    return vertices.astype(np.float64) * 2 / resolution - 1, faces


class Counted:
    def __init__(self, field):
        self.field, self.points, self.largest = field, 0, 0

    def __call__(self, points_N3):
        self.points, self.largest = self.points + len(points_N3), max(self.largest, len(points_N3))
        return self.field(points_N3)


@pytest.mark.parametrize("resolution", [21, 64, 128])
@pytest.mark.parametrize("field", FIELDS)
def test_equals_the_dense_grid(field, resolution):
    counted = Counted(field)
    mesh = extract_surface(counted, resolution)
    vertices, faces = dense(field, resolution)
    assert len(vertices) > 50
    assert mesh.vertices.shape == vertices.shape
    np.testing.assert_allclose(mesh.vertices, vertices, atol=1e-6, rtol=0)
    assert np.array_equal(mesh.faces, faces)
    assert counted.largest <= isosurface.CHUNK
    if resolution == 128:
        assert counted.points < 0.3 * 129**3


@pytest.mark.parametrize("field", [sphere, torus])
def test_scale_and_sides_are_exact(field):
    mesh = extract_surface(field, 96)
    assert mesh.is_watertight
    volume = {"sphere": 4 / 3 * np.pi * 0.63**3, "torus": 2 * np.pi**2 * 0.6 * 0.25**2}[field.__name__]
    assert mesh.volume == pytest.approx(volume, rel=2e-3)  # positive: faces look outward
    if field is sphere:
        np.testing.assert_allclose(mesh.bounds, [np.subtract(CENTRE, 0.63), np.add(CENTRE, 0.63)], atol=1e-3)


def test_level():
    mesh = extract_surface(lambda points: 5 + sphere(points), 64, level=5.2)
    assert np.abs(np.linalg.norm(mesh.vertices - CENTRE, axis=1) - 0.43).max() < 2e-3


def test_a_surface_is_followed_where_coarse_levels_did_not_see_it():
    """The rod is all there, though no coarse cell with a sign change reaches its end."""
    mesh = extract_surface(thin_rod, 128)
    assert np.linalg.norm(mesh.vertices, axis=1).max() > 0.93
    assert len(mesh.split(only_watertight=False)) == 1


def test_a_bubble_between_the_samples_is_suspected():
    """No sample of the coarse grid is inside, and none of its cells is near another surface."""
    centre = torch.tensor([-0.79, 0.8, 0.77])

    def with_a_bubble(points_N3):
        return torch.maximum(sphere(points_N3), 0.0006 - (points_N3 - centre).square().sum(1))

    vertices, _ = dense(with_a_bubble, 128)
    assert (vertices[:, 1] > 0.7).sum() > 20
    assert np.array_equal(extract_surface(with_a_bubble, 128).vertices.shape, vertices.shape)


def test_what_is_missed_is_whole_pieces():
    """A splinter that does not show in the values around it."""

    def with_a_splinter(points_N3):
        is_splinter_N = (points_N3 - torch.tensor([-0.79, 0.8, 0.77])).norm(dim=1) < 0.02
        return torch.where(is_splinter_N, 1.0, sphere(points_N3))

    vertices, _ = dense(with_a_splinter, 128)
    assert (vertices[:, 1] > 0.7).any()
    mesh = extract_surface(with_a_splinter, 128)
    assert np.array_equal(mesh.vertices, extract_surface(sphere, 128).vertices)


@pytest.mark.parametrize("value", [-1.0, 1.0, 0.0, float("nan"), float("inf"), float("-inf")])
def test_nothing_crosses(value):
    mesh = extract_surface(lambda points: torch.full((len(points),), value), 33)
    assert len(mesh.faces) == len(mesh.vertices) == 0


def test_not_a_number_is_outside():
    def half(points_N3):
        return torch.where(points_N3[:, 0] > 0.1, torch.nan, sphere(points_N3))

    mesh = extract_surface(half, 64)
    assert np.isfinite(mesh.vertices).all()
    assert -0.54 < mesh.bounds[0, 0] < -0.5
    assert mesh.bounds[1, 0] < 0.14


def test_infinite_values():
    mesh = extract_surface(lambda points: sphere(points).sign() * torch.inf, 64)
    assert np.isfinite(mesh.vertices).all()
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.63**3, rel=0.02)


def test_inside_up_to_the_box_leaves_it_open():
    mesh = extract_surface(lambda points: 0.5 - points[:, 2], 40)
    assert not mesh.is_watertight
    np.testing.assert_allclose(mesh.bounds, [[-1, -1, 0.5], [1, 1, 0.5]], atol=1e-6)


def test_progress_and_cancelling():
    seen = []
    extract_surface(sphere, 128, on_step=lambda step, total, preview=None: seen.append((step, total)))
    assert seen[-1] == (4, 4)
    assert seen == sorted(seen)
    assert {step for step, _ in seen} == {0, 1, 2, 4}

    def stop(step, total, preview=None):
        if step == 2:
            raise mt.Cancelled("enough")

    with pytest.raises(mt.Cancelled):
        extract_surface(sphere, 128, on_step=stop)


@pytest.mark.parametrize("resolution", [1, 0, -5, 513, 64.0, True, "64"])
def test_refuses_resolutions(resolution):
    with pytest.raises(mt.InvalidInput, match="2 to 512"):
        extract_surface(sphere, resolution)


@pytest.mark.parametrize("resolution", [2, 3])
def test_smallest_grids(resolution):
    mesh = extract_surface(lambda points: 0.9 - points.norm(dim=1), resolution)
    assert mesh.is_watertight
    assert mesh.volume > 0
