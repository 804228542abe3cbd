"""VAT: the training pass, the tensor level, scales, storage; and the planes it decodes to."""

from itertools import pairwise

import mediatok as mt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from mediatok.core.isosurface import extract_surface
from mediatok.nn.point_embedding import PointEmbedding
from mediatok.tokenizers.shape.triplane import PLANES, OccupancyHead, PlaneDecoder, TriplaneField
from mediatok.tokenizers.shape.vat import VAT, Reduction, released_configs

SIZES = {
    "num_points": 256, "num_features": 32, "width": 32, "num_heads": 2, "encoder_depth": 2, "decoder_depth": 2,
    "scales": (1, 4, 9), "codebook_size": 64, "code_width": 6, "plane_size": 4, "plane_channels": (16, 8),
    "head_width": 16,
}  # fmt: skip
KINDS = {
    "interp": {},
    "query": {"resample": "query"},
    "lookup-free": {"lookup_free": True},
    "query lookup-free": {"resample": "query", "lookup_free": True},
}


def build(seed=0, **changes):
    """Random weights whose tokens matter to their shapes, and whose surfaces cross the box."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VAT(**SIZES | changes).eval().requires_grad_(False)
        model.head.last.weight.mul_(8)
        planes = model.decoder(torch.randn(2, SIZES["scales"][-1], SIZES["code_width"]))
        model.head.last.bias -= TriplaneField(planes, model.head).occupancy(torch.rand(2, 500, 3) * 2 - 1).mean()
    model.name = "small-vat"
    return model


def cloud(batch=2, count=256, seed=0):
    """Points and normals of spheres of unequal size."""
    normals = F.normalize(torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed)), dim=2)
    return normals * torch.linspace(0.3, 0.9, batch)[:, None, None], normals


@pytest.fixture(scope="module")
def vat():
    return build()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return build(**request.param)


# The tensor level.


def test_ids_and_fields(kind):
    ids_BS = kind.encode_points(*cloud())
    assert ids_BS.shape == (2, 14)
    assert ids_BS.dtype == torch.int64
    assert (kind.max_tokens, kind.scales, kind.vocab_size, kind.code_width) == (14, (1, 4, 9), 64, 6)
    assert torch.equal(ids_BS, kind.quantize.encode(kind.encode_latents(*cloud())))
    xyz_BP3 = torch.rand(2, 50, 3) * 2 - 1
    for end in (1, 5, 14):
        field = kind.decode_ids(ids_BS[:, :end])
        logits_BP = field.occupancy(xyz_BP3)
        assert len(field) == 2
        assert logits_BP.dtype == torch.float32
        for row in range(2):
            alone = kind.decode_ids(ids_BS[row : row + 1, :end]).occupancy(xyz_BP3[row : row + 1])[0]
            torch.testing.assert_close(alone, logits_BP[row], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(field[row].occupancy(xyz_BP3[row : row + 1])[0], logits_BP[row])


def test_every_scale_counts(vat):
    ids_BS = vat.encode_points(*cloud())
    xyz_BP3 = torch.rand(2, 200, 3) * 2 - 1
    logits = [vat.decode_ids(ids_BS[:, :end]).occupancy(xyz_BP3) for end in (1, 5, 14)]
    for coarse, fine in pairwise(logits):
        assert (coarse - fine).abs().max() > 1e-3
    changed_BS = ids_BS.clone()
    changed_BS[:, 13] = (changed_BS[:, 13] + 1) % 64
    assert (vat.decode_ids(changed_BS).occupancy(xyz_BP3) - logits[-1]).abs().max() > 1e-4


def test_the_order_of_points_hardly_matters(vat):
    points_BN3, normals_BN3 = cloud()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(255)])  # the first starts the reduction
    latents = vat.encode_latents(points_BN3, normals_BN3)
    shuffled = vat.encode_latents(points_BN3[:, order], normals_BN3[:, order])
    torch.testing.assert_close(latents, shuffled, atol=1e-4, rtol=1e-4)
    assert (latents - vat.encode_latents(points_BN3, -normals_BN3)).abs().max() > 1e-3
    assert (latents[0] - latents[1]).abs().max() > 1e-3


def test_reduction_asks_all_points():
    reduction = Reduction(16, 2)
    points_BNW = torch.randn(1, 40, 16, requires_grad=True)
    asking_BMW = points_BNW.detach()[:, :8]
    reduction(asking_BMW, points_BNW).square().sum().backward()
    assert (points_BNW.grad.abs().sum(2) > 0).all()


def test_point_embedding_reads_octaves():
    embed = PointEmbedding(54)
    torch.nn.init.eye_(embed.proj.weight)
    torch.nn.init.zeros_(embed.proj.bias)
    points, normals = torch.tensor([[[0.5, -0.25, 1.0]]]), torch.tensor([[[0.0, 0.6, 0.8]]])
    values = embed(points, normals)[0, 0]
    torch.testing.assert_close(values[:3], points[0, 0])
    torch.testing.assert_close(values[-3:], normals[0, 0])
    for axis, x in enumerate((0.5, -0.25, 1.0)):
        for octave in range(8):
            angle = torch.tensor(x * 2**octave)
            torch.testing.assert_close(values[3 + 8 * axis + octave], angle.sin())
            torch.testing.assert_close(values[27 + 8 * axis + octave], angle.cos())


# The training pass.


def test_training_pass(kind):
    points_BN3, normals_BN3 = cloud()
    queries_BP3 = torch.rand(2, 70, 3) * 2 - 1
    output = kind(points_BN3, normals_BN3, queries_BP3, generator=torch.Generator().manual_seed(1))
    assert output.decoded.shape == (2, 70)
    assert output.ids_BL.shape == (2, 14)
    assert output.posterior.kl().shape == (2, 9)
    torch.testing.assert_close(output.decoded, kind.decode_ids(output.ids_BL).occupancy(queries_BP3))
    coarse = kind(points_BN3, normals_BN3, queries_BP3, num_scales=2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(coarse.decoded, kind.decode_ids(output.ids_BL[:, :5]).occupancy(queries_BP3))


def test_stage_without_quantization(vat):
    points_BN3, normals_BN3 = cloud()
    queries_BP3 = torch.rand(2, 70, 3) * 2 - 1
    outputs = [
        vat(points_BN3, normals_BN3, queries_BP3, quantized=False, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert outputs[0].ids_BL is None
    assert outputs[0].vq is None
    assert torch.equal(outputs[0].decoded, outputs[1].decoded)
    assert not torch.equal(outputs[0].decoded, outputs[2].decoded)
    # Little noise at first: the samples lie near the means.
    mean = vat.decode_latents(vat.encode_latents(points_BN3, normals_BN3)).occupancy(queries_BP3)
    assert (outputs[0].decoded - mean).std() < mean.std()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_weight_and_learns(kind, checkpointing):
    kind.requires_grad_(True).train()
    if checkpointing:
        kind.enable_gradient_checkpointing()
    points_BN3, normals_BN3 = cloud(4)
    queries_BP3 = torch.rand(4, 200, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1
    inside_BP = (queries_BP3.norm(dim=2) < torch.linspace(0.3, 0.9, 4)[:, None]).float()
    optimizer = torch.optim.Adam(kind.parameters(), 3e-3)
    losses = []
    for step in range(12):
        output = kind(points_BN3, normals_BN3, queries_BP3, quantized=step >= 2)
        loss = F.binary_cross_entropy_with_logits(output.decoded, inside_BP)
        losses.append(loss.item())
        loss = loss + 1e-3 * output.posterior.kl().mean()
        if output.vq is not None:
            loss = loss + output.vq.quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    unused = [name for name, parameter in kind.named_parameters() if parameter.grad is None]
    assert not unused


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build().requires_grad_(True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = model(*cloud(), torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0)),
                       generator=torch.Generator().manual_seed(0))  # fmt: skip
        (output.decoded.square().mean() + output.vq.quantizer_loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# Planes.


def planes_and_head(side=8, features=5, batch=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.randn(batch, 3, features, side, side), OccupancyHead(features, 12)


@pytest.mark.parametrize("side", [1, 2, 8])
def test_field_is_bilinear_sampling_and_a_network(side):
    """Against grid_sample, features side by side, and every layer at every point."""
    planes_BNFHH, head = planes_and_head(side)
    xyz_BP3 = torch.rand(2, 300, 3, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2  # also beyond the box
    features = [
        F.grid_sample(planes_BNFHH[:, plane], xyz_BP3[:, None, :, list(axes)], "bilinear", "border", False)[:, :, 0]
        for plane, axes in enumerate(PLANES)
    ]
    x_BPF = torch.cat(features, dim=1).transpose(1, 2)
    for layer in (head.first, *head.layers):
        x_BPF = F.relu(layer(x_BPF))
    expected_BP = head.last(x_BPF)[..., 0]
    logits_BP = TriplaneField(planes_BNFHH, head).occupancy(xyz_BP3)
    torch.testing.assert_close(logits_BP, expected_BP, atol=1e-5, rtol=1e-5)
    if side > 1:
        wanted = torch.randn_like(expected_BP)
        parameters = (head.first.weight, head.layers[0].bias)
        for one, other in zip(*(torch.autograd.grad((y * wanted).sum(), parameters) for y in (logits_BP, expected_BP)),
                              strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_planes_hold_their_own_coordinates():
    """A plane of one bright pixel lights the points over it, whatever their third coordinate."""
    _, head = planes_and_head(features=1)
    for plane, (across, down) in enumerate(PLANES):
        planes = torch.zeros(1, 3, 1, 4, 4)
        planes[0, plane, 0, 3, 1] = 1.0  # row 3, column 1: centres at 0.75 and -0.25
        point = torch.zeros(3)
        point[down], point[across] = 0.75, -0.25
        sides = point.repeat(3, 1)
        sides[1, 3 - across - down] = 0.9
        sides[2, across] = 0.75
        with torch.no_grad():
            lit = TriplaneField(planes, head).occupancy(sides[None])[0]
        assert lit[0] == lit[1] != lit[2]


def test_field_is_evaluated_near_its_surface_alone():
    planes_BNFHH, head = planes_and_head(6)
    field = TriplaneField(planes_BNFHH.detach(), head.requires_grad_(False))
    head.last.bias -= field.occupancy(torch.rand(2, 4000, 3) * 2 - 1).median()
    for index in (0, 1):
        mesh = field.to_mesh(64, index)
        dense = extract_surface(lambda points, index=index: field[index].occupancy(points[None])[0], 64)
        assert len(mesh.vertices) > 100
        assert np.array_equal(mesh.vertices, dense.vertices)
    assert not np.array_equal(field.to_mesh(20, 0).vertices, field.to_mesh(20, 1).vertices)
    with pytest.raises(IndexError):
        field.to_mesh(20, 2)


def test_planes_are_enlarged_apart():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = PlaneDecoder(6, (8, 4, 4))
    tokens_BLW = torch.randn(1, 3 * 9, 6)
    planes = decoder(tokens_BLW)
    assert planes.shape == (1, 3, 4, 12, 12)
    changed_BLW = tokens_BLW.clone()
    changed_BLW[:, 9:18] += 1
    changed = decoder(changed_BLW)
    assert torch.equal(changed[:, ::2], planes[:, ::2])
    assert not torch.equal(changed[:, 1], planes[:, 1])


# Meshes, storage, the registry.


def test_mesh_to_tokens_and_back(vat, tmp_path):
    mesh = trimesh.creation.icosphere(radius=40)
    mesh.apply_translation((5, 600, -7))
    tokens = vat.encode(mesh)
    assert tokens.ids.shape == (1, 14)
    tokens.save(tmp_path / "a.mtok")
    decoded = vat.decode(mt.Tokens.load(tmp_path / "a.mtok"), resolution=32)
    assert len(decoded.faces) > 0
    assert (np.abs(decoded.vertices - (5, 600, -7)) <= 40 / 0.95 * 1.001).all()
    for k in (1, 2, 3):
        vat.decode(tokens, resolution=20, up_to_scale=k)


def test_an_empty_field_is_an_empty_mesh(vat):
    empty = build()
    empty.head.last.weight.zero_()
    empty.head.last.bias.fill_(-1)
    tokens = empty.tokens_of(torch.zeros(1, 14, dtype=torch.int64))
    (mesh,) = empty.decode(tokens, resolution=20)
    assert len(mesh.faces) == 0


def test_fingerprint_is_that_of_the_codes(vat):
    assert build().fingerprint == vat.fingerprint
    for name in ("quantize.codebook", "quantize.resampler.weight"):
        other = build()
        other.get_parameter(name)[0] += 1
        assert other.fingerprint != vat.fingerprint
    other = build()
    other.decoder.embed.weight += 1  # a decoder may be tuned on
    assert other.fingerprint == vat.fingerprint
    assert build(resample="query").fingerprint != vat.fingerprint


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_saved_and_loaded(changes, tmp_path):
    model = build(**changes)
    model.save_pretrained(tmp_path / "small")
    again = VAT.from_pretrained(tmp_path / "small")
    assert again.fingerprint == model.fingerprint
    assert again.scales == model.scales
    assert torch.equal(again.encode_points(*cloud()), model.encode_points(*cloud()))


def test_stored_in_bfloat16(vat):
    narrow = build().cast(torch.bfloat16)
    assert narrow.quantize.codebook.dtype == narrow.head.first.weight.dtype == torch.float32
    assert narrow.encoder.reduce.query.weight.dtype == torch.bfloat16
    assert narrow.fingerprint == vat.fingerprint
    latents, close = narrow.encode_latents(*cloud()), vat.encode_latents(*cloud())
    assert latents.dtype == torch.float32
    assert (latents - close).abs().max() < 0.1 * close.abs().max()
    xyz_BP3 = torch.rand(2, 100, 3) * 2 - 1
    logits, close = (m.decode_latents(close_latents(vat)).occupancy(xyz_BP3) for m in (narrow, vat))
    assert logits.dtype == torch.float32
    assert (logits - close).abs().max() < 0.1 * close.abs().max()


def close_latents(vat):
    return vat.encode_latents(*cloud())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 33}, "not a multiple of num_heads 2"),
        ({"num_points": 31}, "cannot be reduced to num_features 32"),
        ({"plane_channels": ()}, "one for each doubling"),
        ({"plane_channels": (8,) * 12}, "one for each doubling"),
        ({"plane_size": 4096}, "one for each doubling"),
        ({"scales": (4, 1)}, "growing"),
        ({"scales": (0, 1)}, r"scales\[0\]=0"),
        ({"scales": ()}, "growing"),
        ({"encoder_depth": 10_000}, "encoder_depth=10000"),
        ({"codebook_size": 2**25}, "codebook_size"),
        ({"head_width": -1}, "head_width=-1"),
        ({"plane_channels": (8, 2.5)}, r"plane_channels\[1\]=2.5"),
        ({"lookup_free": True, "code_width": 7}, "128, not codebook_size=64"),
        ({"resample": "none"}, "'interp' or 'query'"),
    ],
)
def test_sizes_that_do_not_go_together(changes, reason):
    with pytest.raises(mt.InvalidInput, match=reason):
        VAT(**SIZES | changes)


def test_bad_input(vat):
    points_BN3, normals_BN3 = cloud(count=20)
    with pytest.raises(mt.InvalidInput, match="32 features and got 20"):
        vat.encode_points(points_BN3, normals_BN3)
    with pytest.raises(mt.InvalidInput, match="end at 1, 5, 14"):
        vat.decode_ids(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(mt.InvalidInput, match=r"\[0, 64\)"):
        vat.decode_ids(torch.full((1, 5), 64))


def test_paper_sizes():
    sizes = {name: config["scales"] for name, config in released_configs().items()}
    assert {name: (sum(scales), scales[-1]) for name, scales in sizes.items()} == {
        "vat-680": (680, 256), "vat-1256": (1256, 576), "vat-2280": (2280, 1024),
    }  # fmt: skip
    with torch.device("meta"):
        model = VAT(**released_configs()["vat-2280"])
    bits = sum(model.scales) * (model.vocab_size - 1).bit_length()
    assert bits // 8 == 3990  # the paper's 3.9 KB
    assert 150e6 < sum(p.numel() for p in model.parameters()) < 250e6
