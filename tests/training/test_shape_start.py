"""VAT's start for small data sets: tokens look at their own part of the box."""

import mediatok as mt
import pytest
import torch
from mediatok.core.surfaces import farthest_points
from mediatok.tokenizers.shape.triplane import PLANES
from mediatok.tokenizers.shape.vat import VAT
from mediatok.training.shape_start import align_places, along_curve

SIZES = {
    "num_points": 256, "num_features": 64, "width": 96, "num_heads": 4, "encoder_depth": 1, "decoder_depth": 1,
    "scales": [1, 8, 64], "codebook_size": 16, "code_width": 4, "plane_size": 4, "plane_channels": [16, 16],
    "head_width": 16,
}  # fmt: skip
SPACING = 0.5  # of 64 latents in a box of side 2


@pytest.fixture(scope="module")
def aligned():
    torch.manual_seed(0)
    model = VAT(**SIZES)
    align_places(model)
    return model


def attention_of(block, x_LW, num_heads):
    """Shares [H, L, L] of a block's attention."""
    q, k, _ = (block.attn.in_proj_weight @ block.ln_1(x_LW).T).T.chunk(3, dim=-1)
    q, k = (part.unflatten(1, (num_heads, -1)).transpose(0, 1) for part in (q, k))
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)


def test_the_curve_passes_through_every_cell_by_neighbours():
    place_N3 = along_curve(16**3)
    assert len({tuple(place) for place in place_N3.tolist()}) == 16**3
    steps = (place_N3[1:] - place_N3[:-1]).abs().sum(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 2 / 16))


@torch.no_grad()
def test_latents_look_at_points_nearby(aligned):
    points = torch.rand(1, 256, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoder = aligned.encoder
    embedded = encoder.embed(points, torch.nn.functional.normalize(points, dim=2))
    chosen = farthest_points(points, 64)[0]
    x_LW = torch.cat([encoder.reduce(embedded[:, chosen], embedded)[0], encoder.latent_tokens])
    shares_HL = attention_of(encoder.transformer.blocks[0], x_LW, SIZES["num_heads"])[0, 64:, :64]
    distance_LM = torch.cdist(along_curve(64), points[0, chosen])
    assert shares_HL.sum(dim=1).min() > 0.9  # of features, not of other latents
    mean_distance = (shares_HL * distance_LM).sum(dim=1).mean()
    assert mean_distance < 0.6 * SPACING + distance_LM.min(dim=1).values.mean() < distance_LM.mean()


@torch.no_grad()
def test_pixels_look_along_their_columns_each_head_at_its_height(aligned):
    decoder, side, num_heads = aligned.decoder, SIZES["plane_size"], SIZES["num_heads"]
    codes_LW = decoder.embed(torch.zeros(64, SIZES["code_width"])) + decoder.latent_places
    x_LW = torch.cat([decoder.triplane_tokens, codes_LW])
    pixels = 3 * side * side
    shares_HPL = attention_of(decoder.transformer.blocks[0], x_LW, num_heads)[:, :pixels, pixels:]
    seen_HP3 = shares_HPL @ along_curve(64) / shares_HPL.sum(dim=2, keepdim=True)
    centre = (2 * torch.arange(side) + 1) / side - 1
    for plane, (across, down) in enumerate(PLANES):
        seen_HYX3 = seen_HP3[:, plane * side**2 : (plane + 1) * side**2].unflatten(1, (side, side))
        assert (seen_HYX3[0, ..., across] - centre).abs().mean() < SPACING / 2
        assert (seen_HYX3[0, ..., down] - centre[:, None]).abs().mean() < SPACING / 2
        height_H = seen_HYX3[..., 3 - across - down].mean(dim=(1, 2))
        assert height_H[-1] - height_H[0] > 2 * SPACING, height_H
        assert height_H.sort().values.equal(height_H)


def test_narrow_heads_are_refused():
    with pytest.raises(mt.MediatokError, match="24 channels and a width of 72 or more, not 8 and 32"):
        align_places(VAT(**SIZES | {"width": 32, "num_heads": 4}))
