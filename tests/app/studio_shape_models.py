"""Shape models with random weights, and a few meshes, for the tests of the studio."""

from pathlib import Path

import torch
import trimesh

SCALES = (1, 4, 9)
CLASSES = ("chair", "lamp", "none")


def save_shape_models(folder: Path) -> None:
    """Two tokenizers, one of them with fewer scales, and a generator over the first."""
    from mediatok.generators.next_scale import NextScale
    from mediatok.tokenizers.shape.vat import VAT

    torch.manual_seed(0)
    for name, scales in (("random-shapes", SCALES), ("random-solids", SCALES[:2])):
        tokenizer = VAT(
            num_points=64, num_features=16, width=16, num_heads=2, encoder_depth=1, decoder_depth=1, scales=scales,
            codebook_size=32, code_width=8, plane_size=4, plane_channels=(16,), head_width=8,
        )  # fmt: skip
        make_solid(tokenizer)
        tokenizer.save_pretrained(folder / name)
    tokenizer = VAT.from_pretrained(folder / "random-shapes")
    NextScale(
        scales=SCALES, codebook_size=32, code_width=8, width=16, depth=1, num_heads=2, num_classes=len(CLASSES),
        label_names=CLASSES, tokenizer=str(folder / "random-shapes"), tokenizer_fingerprint=tokenizer.fingerprint,
    ).save_pretrained(folder / "random-sculptor")  # fmt: skip


@torch.no_grad()
def make_solid(tokenizer) -> None:
    """Make random codes matter, and have about half of the box inside."""
    tokenizer.quantize.codebook.mul_(4)
    ids_BS = torch.randint(tokenizer.vocab_size, (8, tokenizer.max_tokens))
    logits_BP = tokenizer.decode_ids(ids_BS).occupancy(2 * torch.rand(8, 500, 3) - 1)
    tokenizer.head.last.bias.sub_(logits_BP.median())


def save_samples(folder: Path) -> None:
    """A box and a ball."""
    trimesh.creation.box((1, 2, 0.5)).export(folder / "a_box.glb")
    trimesh.creation.icosphere(2, 3.0).apply_translation((5, 0, 0)).export(folder / "the_ball.glb")
