"""Weights of eight to four bits: how exact they are, what stays as it was, and what is refused."""

import copy
import zlib

import mediatok as mt
import pytest
import torch
from mediatok.core.compact import (
    BORROWED,
    CLIPPED,
    COMPACT_WEIGHTS,
    DEFLATED,
    SCALES,
    SHAPE,
    _rounded,
    compact,
    deflated,
    expand,
    rounded,
)
from mediatok.core.errors import InvalidCheckpoint
from mediatok.training.export import export_model
from mediatok.training.flextok import build_flextok
from mediatok.training.flextok_recipe import FlexTokModelRecipe
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (7, 0.015), (6, 0.025), (5, 0.055), (4, 0.11)])
def test_large_matrices_lose_little(bits, error):
    rng = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(65, 101, generator=rng) * torch.logspace(-6, 3, 65)[:, None],
        "a.bias": torch.randn(65, generator=rng),
        "quantize.embedding.weight": torch.randn(100, 100, generator=rng),
        "zeros.weight": torch.zeros(64, 64),
        "steps": torch.tensor(7),
    }
    stored = compact(state, ("quantize.",), bits)
    again = expand(stored)
    assert stored["a.weight" + DEFLATED].numel() < state["a.weight"].numel() * bits / 8
    assert list(again) == list(state)
    row_error = (again["a.weight"] - state["a.weight"]).norm(dim=1) / state["a.weight"].norm(dim=1)
    assert row_error[10:].median() < error
    codes = state["quantize.embedding.weight"]
    assert torch.equal(again["quantize.embedding.weight"].float(), codes.bfloat16().float())
    assert torch.equal(again["steps"], state["steps"])
    assert torch.equal(again["zeros.weight"], state["zeros.weight"])
    assert torch.allclose(again["a.bias"].float(), state["a.bias"], rtol=1e-3)


def test_numbers_are_deflated_without_loss():
    whole = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    scales = torch.tensor([1.0, 2.0, 0.5, 2.0**-20], dtype=torch.float16)
    again = expand(deflated("a", whole, scales, (5, 50)))["a"]
    assert torch.equal(again, (whole.float() * scales.float()[:, None]).flatten()[:250].view(5, 50))


def test_rounding_for_training_is_what_is_stored_where_nothing_is_clipped():
    value = torch.randint(-7, 8, (64, 65), generator=torch.Generator().manual_seed(0)).float() / 7
    value[:, :2] = 1.0
    assert torch.equal(rounded(value, 4), expand(compact({"a": value}, ("quantize.",), 4))["a"])
    noisy = value + torch.randn_like(value) * 0.1
    near = expand(compact({"a": noisy}, ("quantize.",), 4))["a"]
    assert (near - noisy).norm() <= (rounded(noisy, 4) - noisy).norm()


def test_clipping_a_block_is_never_worse():
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    whole, scales = _rounded(values, 6, (1.0,))
    clipped, clipped_scales = _rounded(values, 6, CLIPPED)
    errors = [(w.float() * s.float()[:, None] - values).norm() for w, s in ((whole, scales), (clipped, clipped_scales))]
    assert errors[1] < errors[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compact") / "model"
    export_model(mt.load("titok-tiny"), path, "int8")
    return path


def test_a_folder_of_half_the_size_gives_nearly_the_same_pictures(folder):
    model, small = mt.load("titok-tiny"), mt.load(folder)
    assert (folder / COMPACT_WEIGHTS).stat().st_size < 0.6 * sum(p.numel() * 2 for p in model.parameters())
    assert small.fingerprint == model.fingerprint
    ids = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(0))
    assert mt.psnr(small.decode_ids(ids), model.decode_ids(ids)) > 35
    assert all(parameter.dtype == torch.float32 for parameter in small.parameters())


def test_from_pretrained_reads_it_too(folder):
    small, again = mt.load(folder), mt.TiTok.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    with pytest.raises(mt.InvalidInput, match="holds a TiTok, not a XAR"):
        mt.XAR.from_pretrained(folder)


def change_of(stored: dict, name: str, change: str) -> None:
    """Break what stands for `name`."""
    packed = name + DEFLATED
    data = stored[packed]
    broken = {
        "no scales": (packed + SCALES, None), "short scales": (packed + SCALES, stored[packed + SCALES][:-1].clone()),
        "wide scales": (packed + SCALES, stored[packed + SCALES].float()),
        "scales alone": ("x" + DEFLATED + SCALES, torch.ones(3, dtype=torch.float16)),
        "no shape": (name + SHAPE, None), "wrong shape": (name + SHAPE, torch.tensor([80, 810])),
        "negative": (name + SHAPE, torch.tensor([-80, -80])), "wide": (packed, data.int()),
        "short": (packed, data[:-1].clone()), "longer": (packed, torch.cat([data, data[:9]])),
        "no stream": (packed, torch.zeros_like(data)), "none": (packed, data[:0].clone()),
        "bomb": (packed, torch.frombuffer(bytearray(zlib.compress(bytes(2**24))), dtype=torch.uint8)),
        "bool": ("x", torch.ones(3, dtype=torch.bool)),
    }  # fmt: skip
    key, value = broken[change]
    if value is None:
        del stored[key]
    else:
        stored[key] = value


CHANGES = (
    "no scales", "short scales", "wide scales", "scales alone", "no shape", "wrong shape", "negative", "wide", "short",
    "longer", "no stream", "none", "bomb", "bool",
)  # fmt: skip
REFUSALS = r"scales|shape|uint8|deflated|of type"


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused(change):
    stored = compact({"a": torch.randn(80, 80)}, ("quantize.",), bits=6)
    change_of(stored, "a", change)
    with pytest.raises(InvalidCheckpoint, match=REFUSALS):
        expand(stored)


def test_a_broken_file_is_refused(folder, tmp_path):
    stored = load_file(folder / COMPACT_WEIGHTS)
    change_of(stored, next(key.removesuffix(DEFLATED) for key in stored if key.endswith(DEFLATED)), "short")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(stored, tmp_path / COMPACT_WEIGHTS)
    with pytest.raises(InvalidCheckpoint, match=REFUSALS):
        mt.load(tmp_path)


@pytest.fixture(scope="module")
def borrower(tmp_path_factory):
    """A folder of a FlexTok over kl-tiny, and the model."""
    config = {
        "num_tokens": 8, "levels": (4, 4), "patch_size": 1, "encoder_width": 32, "encoder_depth": 1,
        "encoder_head_width": 16, "decoder_width": 32, "decoder_depth": 1, "decoder_head_width": 16,
    }  # fmt: skip
    model = build_flextok(FlexTokModelRecipe(class_name="FlexTok", vae="kl-tiny", config=config))
    path = tmp_path_factory.mktemp("borrower") / "model"
    export_model(model, path, "int6")
    return path, model


def test_a_part_that_is_a_shipped_model_is_left_to_it(borrower):
    path, model = borrower
    assert (path / COMPACT_WEIGHTS).stat().st_size < 200_000
    again = mt.load(path)
    assert all(torch.equal(again.vae.state_dict()[key], value) for key, value in model.vae.state_dict().items())
    assert again.fingerprint == model.fingerprint


def test_a_part_that_differs_is_stored(borrower, tmp_path):
    model = copy.deepcopy(borrower[1])
    with torch.no_grad():
        next(model.vae.parameters()).add_(1e-3)
    export_model(model, tmp_path / "own", "int4")
    stored = load_file(tmp_path / "own" / COMPACT_WEIGHTS)
    packed = {key: value.numpy().tobytes() for key, value in stored.items() if key.endswith(DEFLATED)}
    steps = {key: len(set(zlib.decompress(data))) for key, data in packed.items()}
    assert max(count for key, count in steps.items() if not key.startswith("vae.")) == 15  # of four bits
    # Nothing in training made up for the rounding of the VAE.
    assert max(count for key, count in steps.items() if key.startswith("vae.")) > 15


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"vae": "kl-tiny"}',
        '{"vae": [1, 2]}',
        '{"vae": ["titok-s128", "0"]}',
        '{"vae": ["/", "0"]}',
        '{"vae": ["kl-tiny", "0"]}',
    ],
)
def test_lenders_that_are_none_are_refused(borrower, tmp_path, header):
    (tmp_path / "config.json").write_bytes((borrower[0] / "config.json").read_bytes())
    save_file(load_file(borrower[0] / COMPACT_WEIGHTS), tmp_path / COMPACT_WEIGHTS, {BORROWED: header})
    with pytest.raises(InvalidCheckpoint, match=r"borrowed|leaves"):
        mt.load(tmp_path)
