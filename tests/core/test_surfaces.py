"""Points drawn from a surface lie on it evenly; farthest points spread out and do not depend on the batch."""

import mediatok as mt
import numpy as np
import pytest
import torch
import trimesh
from mediatok.core.surfaces import farthest_points, sample_surface


def test_points_lie_on_the_surface_with_its_normals():
    points, normals = sample_surface(trimesh.creation.box((2, 1, 1)), 20_000, seed=0)
    assert points.dtype == normals.dtype == torch.float32
    assert points.shape == normals.shape == (20_000, 3)
    half = torch.tensor([1.0, 0.5, 0.5])
    assert ((points.abs() - half).amax(dim=1).abs() < 1e-6).all()
    assert ((points * normals).sum(dim=1) > 0).all()
    assert (normals.abs().sum(dim=1) == 1).all()
    # By area: the two ends of 1 x 1 are a fifth of 10. Within a side: as many in each quarter.
    assert (normals[:, 0].abs() == 1).float().mean().item() == pytest.approx(0.2, abs=0.01)
    top = points[normals[:, 2] == 1]
    for x in (-1, 1):
        for y in (-1, 1):
            share = ((top[:, 0] * x > 0) & (top[:, 1] * y > 0)).float().mean().item()
            assert share == pytest.approx(0.25, abs=0.02)


def test_the_seed_decides():
    mesh = trimesh.creation.icosphere(1)
    first, again, other = (sample_surface(mesh, 100, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_very_small_and_large_meshes(scale):
    mesh = trimesh.creation.box()
    expected, normals = sample_surface(mesh, 50, seed=0)
    mesh = trimesh.Trimesh(mesh.vertices * scale, mesh.faces, process=False)
    points, found = sample_surface(mesh, 50, seed=0)
    assert torch.allclose(points / scale, expected)
    assert torch.equal(found, normals)


def test_triangles_without_area_are_never_drawn():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 1, 0]], float)
    mesh = trimesh.Trimesh(vertices, [[0, 1, 2], [0, 1, 3], [2, 1, 0]], process=False)
    _, normals = sample_surface(mesh, 1000, seed=0)
    assert (normals == torch.tensor([0.0, 0, 1])).all()


def test_what_has_no_surface():
    with pytest.raises(mt.InvalidInput, match="no triangle with an area"):
        sample_surface(trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False), 10, 0)
    with pytest.raises(mt.InvalidInput, match="no triangle with an area"):
        sample_surface(trimesh.Trimesh(), 10, 0)
    for count in (0, -1, 2**30):
        with pytest.raises(mt.InvalidInput, match="count must be"):
            sample_surface(trimesh.creation.box(), count, 0)


def test_farthest_points_are_the_definition():
    points = torch.randn(3, 200, 3, generator=torch.Generator().manual_seed(0))
    found = farthest_points(points, 40)
    assert found.dtype == torch.int64
    assert found.shape == (3, 40)
    for cloud, indices in zip(points.double(), found.tolist(), strict=True):
        assert indices[0] == 0
        for step in range(1, 40):
            distance = torch.cdist(cloud, cloud[indices[:step]]).amin(dim=1)
            assert distance[indices[step]] == pytest.approx(distance.max().item(), abs=1e-6)
    for index, cloud in enumerate(points):
        assert torch.equal(farthest_points(cloud[None], 40)[0], found[index])


def test_farthest_points_of_equal_points_are_distinct():
    points = torch.zeros(1, 5, 3)
    points[0, 3, 0] = 1
    assert farthest_points(points, 5).tolist() == [[0, 3, 1, 2, 4]]


def test_farthest_points_of_wrong_shapes():
    for points, count in [(torch.zeros(5, 3), 2), (torch.zeros(1, 5, 2), 2), (torch.zeros(1, 5, 3).long(), 2)]:
        with pytest.raises(mt.InvalidInput, match="floating-point"):
            farthest_points(points, count)
    for count in (0, 6):
        with pytest.raises(mt.InvalidInput, match="1 to 5"):
            farthest_points(torch.zeros(1, 5, 3), count)
