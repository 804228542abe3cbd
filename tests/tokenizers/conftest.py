"""Tiny tokenizers with random weights whose tokens matter to their pictures."""

import pytest
import torch
from mediatok.tokenizers.image.one_d_piece import OneDPiece
from mediatok.tokenizers.image.titok import TiTok

SIZES = {
    "image_size": 32, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 16, "token_size": 8,
    "codebook_size": 64, "is_legacy": False, "has_pixel_decoder": False,
    "encoder_width": 32, "encoder_depth": 2, "encoder_heads": 2,
    "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2,
}  # fmt: skip


def build(cls=OneDPiece, seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(**SIZES | changes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
            if hasattr(model.decoder, "conv_out"):
                model.decoder.conv_out.weight.mul_(0.3)
                model.decoder.conv_out.bias.fill_(0.5)
    model.name = f"tiny-{cls.__name__.lower()}"
    return model


@pytest.fixture(scope="session")
def one_d_piece():
    return build(OneDPiece)


@pytest.fixture(scope="session")
def titok():
    return build(TiTok)


@pytest.fixture(scope="session")
def build_tokenizer():
    return build


@pytest.fixture
def picture():
    """A smooth picture [3, 50, 70] in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 50), torch.linspace(0, 1, 70), indexing="ij")
    return torch.stack([x, y, (x * 6).sin() * 0.5 + 0.5])
