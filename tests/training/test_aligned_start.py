"""The start for small data sets: latents and places correspond, in an order that suits the model."""

import pytest
import torch
from mediatok.core.errors import InvalidRecipe
from mediatok.training.aligned_start import align_latents, coarse_to_fine, reorder_coarse_to_fine
from mediatok.training.build import build_model
from mediatok.training.recipe import ModelRecipe

SIZES = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("width", 64), ("heads", 2))}
SIZES |= {"encoder_depth": 1, "decoder_depth": 1, "image_size": 32, "num_latent_tokens": 16, "codebook_size": 32}
SIZES |= {"encoder_patch_size": 8, "decoder_patch_size": 8}


def build(**options):
    torch.manual_seed(0)
    return build_model(ModelRecipe(config=SIZES, **options)).eval()


@torch.no_grad()
def test_latents_read_their_own_place():
    """Changing one corner changes that corner's latent most; with the published start it hardly matters which."""
    pixels = torch.rand(8, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, :8, :8] = torch.rand(8, 3, 8, 8)
    model = build(aligned_start=True)
    effect = model.encoder(changed, model.latent_tokens) - model.encoder(pixels, model.latent_tokens)
    share_N = effect.square().mean(dim=(0, 1, 2))
    assert share_N.argmax() == 0
    assert share_N[0] > 5 * share_N[10]


def test_places_are_spread_from_coarse_to_fine():
    for count in (16, 64):
        assert len({tuple(place) for place in coarse_to_fine(count).tolist()}) == count
    quadrants = {(y >= 4, x >= 4) for y, x in coarse_to_fine(64)[:4].tolist()}
    assert len(quadrants) == 4


def test_two_stage_models_are_refused():
    with pytest.raises(InvalidRecipe, match="single-stage"):
        build(aligned_start=True, stage="1", vqgan="x")


@torch.no_grad()
def test_one_d_piece_from_titok_decodes_the_whole_sequence_alike():
    titok = build(aligned_start=True)
    piece = build(class_name="OneDPiece")
    reorder_coarse_to_fine(titok, piece)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(piece(pixels).decoded, titok(pixels).decoded, atol=1e-5, rtol=1e-4)
    assert not torch.equal(piece(pixels).ids_BL, titok(pixels).ids_BL)
    with pytest.raises(InvalidRecipe):
        align_latents(build_model(ModelRecipe(config=SIZES | {"encoder_width": 36}, aligned_start=True)))


def test_revival_can_be_switched_on_again(tmp_path):
    build(aligned_start=True).save_pretrained(tmp_path / "model")
    model = build_model(ModelRecipe(init_from=tmp_path / "model", config={"clustering": True}))
    assert model.quantize.clustering
    assert torch.equal(model.latent_tokens, build(aligned_start=True).latent_tokens)
    with pytest.raises(InvalidRecipe, match="own sizes"):
        build_model(ModelRecipe(init_from=tmp_path / "model", config={"token_size": 4}))
