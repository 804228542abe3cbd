"""Shared by the tests of the generators: small random ones with their tokenizers."""

import pytest
import torch
from mediatok.generators.maskgit import MaskGIT
from mediatok.generators.xar import XAR
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from mediatok.tokenizers.image.titok import TiTok

NAMES = ("animals", "food", "flags")
CLASSES = {"num_classes": 3, "label_names": NAMES}


def make_labels_matter(generator: MaskGIT) -> None:
    """Weights so large that ids depend on the label; with those that training begins with only the noise decides."""
    for parameter in generator.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)


def small_generator(kind: str):
    """A small generator of 16 x 16 pictures with random weights, and its tokenizer."""
    torch.manual_seed(0)
    if kind == "maskgit":
        tokenizer = TiTok(
            image_size=16, encoder_patch_size=8, decoder_patch_size=8, num_latent_tokens=4, token_size=4,
            codebook_size=32, is_legacy=False, has_pixel_decoder=False, encoder_width=32, encoder_depth=1,
            encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2,
        )  # fmt: skip
        generator = MaskGIT(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, codebook_size=32,
            num_tokens=4, tokenizer_fingerprint=tokenizer.fingerprint, num_steps=3, **CLASSES,
        )  # fmt: skip
        make_labels_matter(generator)
    else:
        tokenizer = KLAutoencoder(
            image_size=16, latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
        )
        generator = XAR(
            layout_size=4, grid=8, latent_channels=2, embed_dim=32, encoder_depth=1, decoder_depth=1, num_heads=2,
            tokenizer_fingerprint=tokenizer.fingerprint, num_steps=2, **CLASSES,
        )  # fmt: skip
    generator.eval().use_tokenizer(tokenizer.eval())
    return generator


@pytest.fixture(scope="session")
def make_small():
    """Function from "maskgit" or "xar" to a generator with its tokenizer."""
    return small_generator
