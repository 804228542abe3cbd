"""From an aligned start, registers and patches of the same place find each other."""

import pytest
import torch
from mediatok.core.errors import InvalidRecipe
from mediatok.training.aligned_start import coarse_to_fine
from mediatok.training.flextok import build_flextok
from mediatok.training.flextok_recipe import FlexTokModelRecipe

CONFIG = {
    "num_tokens": 16, "levels": [8, 8, 8, 5], "patch_size": 1, "encoder_width": 64, "encoder_depth": 2,
    "encoder_head_width": 32, "decoder_width": 64, "decoder_depth": 2, "decoder_head_width": 32,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_flextok(FlexTokModelRecipe(class_name="FlexTok", vae="kl-tiny", config=CONFIG, aligned_start=True))


def test_a_register_sees_its_place(model):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 8, 8, 8, generator=rng)
    with torch.no_grad():
        before = model.encoder(latents)
        assert before.std() > 0.3  # codes are in use from the first step
        for register, (y, x) in enumerate(coarse_to_fine(16).floor().int().tolist()):
            changed = latents.clone()
            changed[:, :, y, x] = torch.randn(8, 8, generator=rng)
            moved_K = (model.encoder(changed) - before).square().sum(dim=(0, 2))
            assert int(moved_K.argmax()) == register


def test_a_patch_sees_the_register_of_its_place(model):
    rng = torch.Generator().manual_seed(0)
    noisy, codes = torch.randn(8, 8, 8, 8, generator=rng), torch.rand(8, 16, 4, generator=rng) * 2 - 1
    torch.nn.init.normal_(model.decoder.head.weight)
    with torch.no_grad():
        modulations = model.decoder.modulations(torch.full((1,), 0.5))
        before, _ = model.decoder(noisy, *model.decoder.condition(codes), modulations)
        for register, (y, x) in enumerate(coarse_to_fine(16).tolist()):
            changed = codes.clone()
            changed[:, register] = -changed[:, register]
            after, _ = model.decoder(noisy, *model.decoder.condition(changed), modulations)
            moved = (after - before).square().sum(dim=(0, 1))
            row, column = divmod(int(moved.argmax()), 8)
            assert abs(row + 0.5 - y) <= 1.5
            assert abs(column + 0.5 - x) <= 1.5


def test_sizes_that_cannot_be_aligned():
    config = CONFIG | {"encoder_width": 36, "encoder_head_width": 18}
    with pytest.raises(InvalidRecipe, match="multiples of 8"):
        build_flextok(FlexTokModelRecipe(class_name="FlexTok", vae="kl-tiny", config=config, aligned_start=True))
