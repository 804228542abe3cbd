"""Meshes through any shape tokenizer: alone or in a list, each in its own place and scale; bad input is refused."""

import mediatok as mt
import numpy as np
import pytest
import torch
import trimesh
from diffusers.configuration_utils import register_to_config
from mediatok.core.shape_tokenizer import ShapeField, ShapeTokenizer, as_list, surface_points


class Ellipsoids(ShapeField):
    def __init__(self, radii_B3):
        self.radii_B3, self.device = radii_B3, radii_B3.device

    def __len__(self):
        return len(self.radii_B3)

    def __getitem__(self, index):
        return Ellipsoids(self.radii_B3[index][None])

    def occupancy(self, xyz_BP3):
        return 1 - (xyz_BP3 / self.radii_B3[:, None]).norm(dim=2)


class Extents(ShapeTokenizer):
    """The half extents of a shape along three axes in 1/99: the first scale is x, the second y and z."""

    vocab_size = 100

    @register_to_config
    def __init__(self, num_points: int = 2000, scales: tuple[int, ...] = (1, 2)):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def encode_points(self, points_BN3, normals_BN3):
        self.check_points(points_BN3, normals_BN3)
        assert ((points_BN3 * normals_BN3).sum(2).mean(1) > 0).all()  # they look outward
        return (points_BN3.abs().amax(1) * 99 * self.gain).round().long()

    def decode_ids(self, ids_BL):
        self.check_ids(ids_BL)
        radii_B3 = torch.full((len(ids_BL), 3), 0.5)
        radii_B3[:, : ids_BL.shape[1]] = ids_BL / 99
        return Ellipsoids(radii_B3)


@pytest.fixture(scope="module")
def tokenizer():
    return Extents().requires_grad_(False)


def ellipsoid(*radii, centre=(0.0, 0.0, 0.0)):
    mesh = trimesh.creation.icosphere(subdivisions=4)
    mesh.apply_scale(radii)
    mesh.apply_translation(centre)
    return mesh


MESHES = [ellipsoid(1, 1, 1), ellipsoid(30, 10, 20, centre=(100, -5, 3)), ellipsoid(0.002, 0.001, 0.004)]


def test_shapes_come_back_in_their_place_and_scale(tokenizer):
    for mesh, decoded in zip(MESHES, tokenizer.reconstruct(MESHES, resolution=64), strict=True):
        assert isinstance(decoded, trimesh.Trimesh)
        size = np.ptp(mesh.bounds, axis=0).max()
        np.testing.assert_allclose(decoded.bounds, mesh.bounds, atol=0.015 * size)
        assert decoded.is_watertight
        assert decoded.volume == pytest.approx(mesh.volume, rel=0.05)


def test_an_item_does_not_depend_on_its_company(tokenizer):
    tokens = tokenizer.encode(MESHES, batch_size=2)
    assert tokens.is_batch
    assert tokens.scales == (1, 2)
    assert tokens.modality == "shape"
    for mesh, item in zip(MESHES, tokens, strict=True):
        alone = tokenizer.encode(mesh)
        assert not alone.is_batch
        assert alone == item
    assert tokenizer.decode(tokens[1], resolution=20).bounds == pytest.approx(
        tokenizer.decode(tokens, resolution=20)[1].bounds
    )


def test_what_a_mesh_can_be(tokenizer, tmp_path):
    mesh = MESHES[1]
    expected = tokenizer.encode(mesh)
    mesh.export(tmp_path / "a.ply")
    same = [tmp_path / "a.ply", str(tmp_path / "a.ply"), (tmp_path / "a.ply").read_bytes()]
    for source in (*same, (np.array(mesh.vertices), np.array(mesh.faces))):
        assert torch.equal(tokenizer.encode(source).ids, expected.ids)
    assert as_list(tuple(same))[1]
    assert not as_list((mesh.vertices, mesh.faces))[1]


def test_inverted_faces_look_outward(tokenizer):
    inverted = MESHES[1].copy()
    inverted.invert()
    assert tokenizer.encode(inverted) == tokenizer.encode(MESHES[1])
    points_N3, normals_N3 = surface_points(inverted, 100, 0)
    assert points_N3.dtype == normals_N3.dtype == torch.float32


def test_the_seed_draws_the_points(tokenizer):
    cube = trimesh.creation.box()
    first, again, other = (surface_points(cube, 50, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scales(tokenizer):
    tokens = tokenizer.encode(MESHES[1])
    coarse = tokenizer.decode(tokens, resolution=40, up_to_scale=1)
    assert np.array_equal(coarse.vertices, tokenizer.decode(tokens.up_to_scale(1), resolution=40).vertices)
    whole = tokenizer.decode(tokens, resolution=40)
    assert np.ptp(coarse.bounds, axis=0)[1] > 1.4 * np.ptp(whole.bounds, axis=0)[1]
    (field,) = tokenizer.decode_fields(tokens, up_to_scale=1)
    assert field.occupancy(torch.tensor([[[0.0, 0.4, 0.0], [0.0, 0.6, 0.0]]])).sign().tolist() == [[1, -1]]
    for scale in (0, 3, 1.5):
        with pytest.raises(mt.InvalidInput, match="1 to 2"):
            tokenizer.decode(tokens, up_to_scale=scale)


def test_tokens_through_a_file(tokenizer, tmp_path):
    tokens = tokenizer.encode(MESHES)
    tokens.save(tmp_path / "a.mtok")
    again = mt.Tokens.load(tmp_path / "a.mtok")
    assert again == tokens
    assert (tmp_path / "a.mtok").stat().st_size == tokens.num_bytes
    for one, other in zip(tokenizer.decode(again, resolution=20), tokenizer.decode(tokens, resolution=20), strict=True):
        assert np.array_equal(one.vertices, other.vertices)


def test_tokens_without_a_mesh_stay_in_the_box(tokenizer):
    tokens = tokenizer.tokens_of(torch.tensor([[50], [90]]))
    meshes = tokenizer.decode(tokens, resolution=40)
    assert meshes[1].bounds[1, 0] == pytest.approx(90 / 99, abs=0.02)


def test_progress_and_cancelling(tokenizer):
    seen = []

    def watch(step, total, preview=None):
        seen.append((step, total))

    tokens = tokenizer.encode(MESHES, batch_size=2, on_step=watch)
    assert seen == [(2, 3), (3, 3)]
    seen.clear()
    tokenizer.decode(tokens, resolution=64, on_step=watch)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) >= 9

    def stop(step, total, preview=None):
        raise mt.Cancelled("enough")

    for work in (lambda: tokenizer.encode(MESHES, on_step=stop), lambda: tokenizer.decode(tokens, on_step=stop)):
        with pytest.raises(mt.Cancelled):
            work()


def test_bad_input(tokenizer, tmp_path):
    tokens = tokenizer.encode(MESHES[0])
    with pytest.raises(mt.InvalidInput, match="list of meshes is empty"):
        tokenizer.encode([])
    with pytest.raises(mt.MediatokError, match="does not exist"):
        tokenizer.encode(tmp_path / "none.obj")
    with pytest.raises(mt.InvalidInput, match="2 to 512"):
        tokenizer.decode(tokens, resolution=10_000)
    with pytest.raises(mt.InvalidInput, match="2 to 512"):
        tokenizer.reconstruct("not looked at", resolution=1)
    with pytest.raises(mt.InvalidInput, match="batch_size"):
        tokenizer.encode(MESHES[0], batch_size=0)
    with pytest.raises(mt.InvalidInput, match="to call"):
        tokenizer.encode(MESHES[0], on_step=3)
    with pytest.raises(mt.TokenizerMismatch):
        Extents(num_points=1000).decode(tokens)
    points = torch.zeros(2, 5, 3)
    for bad, message in [
        ((points[0], points[0]), r"float points \[B, N, 3\]"),
        ((points, points.long()), r"float normals \[B, N, 3\]"),
        ((points, points[:, :4]), "every point needs its normal"),
    ]:
        with pytest.raises(mt.InvalidInput, match=message):
            tokenizer.encode_points(*bad)
    for ids, message in [
        (torch.zeros(1, 2, dtype=torch.int64), "end at 1, 3"),
        (torch.zeros(3, dtype=torch.int64), r"int64 \[B, L\]"),
        (torch.zeros(1, 3), "int64"),
        (torch.full((1, 3), 100), r"\[0, 100\)"),
    ]:
        with pytest.raises(mt.InvalidInput, match=message):
            tokenizer.decode_ids(ids)
