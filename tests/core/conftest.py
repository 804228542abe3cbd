"""Shared by the tests of the core: making `Tokens` with few words."""

import mediatok as mt
import pytest
import torch


def build_tokens(
    lengths, vocab_size=4096, codebooks=None, is_batch=True, name="titok-tiny", frame=None, seed=0, modality="image",
    scales=(),
):  # fmt: skip
    """Random tokens of the given lengths, padded as `Tokens` wants them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), *([codebooks] if codebooks else []))
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    return mt.Tokens(
        ids=ids,
        lengths=torch.tensor(lengths),
        tokenizer=name,
        fingerprint="0123456789abcdef",
        vocab_size=vocab_size,
        modality=modality,
        frames=(frame or mt.ImageFrame(640, 480),) * len(lengths),
        is_batch=is_batch,
        scales=scales,
    )


@pytest.fixture(scope="session")
def make_tokens():
    return build_tokens
