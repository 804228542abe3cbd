"""Weights of eight and six bits: how exact they are, what stays as it was, and what is refused."""

import mediatok as mt
import pytest
import torch
from mediatok.core.compact import (
    CLIPPED,
    COMPACT_WEIGHTS,
    PACKED,
    PACKED_SCALES,
    SCALES,
    SHAPE,
    _packed,
    _rounded,
    _unpacked,
    compact,
    expand,
)
from mediatok.core.errors import InvalidCheckpoint
from mediatok.training.export import export_model
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (6, 0.025)])
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
    assert stored["a.weight" if bits == 8 else "a.weight.int6"].dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert list(again) == list(state)
    row_error = (again["a.weight"] - state["a.weight"]).norm(dim=1) / state["a.weight"].norm(dim=1)
    assert row_error[10:].median() < error
    assert torch.equal(again["quantize.embedding.weight"], state["quantize.embedding.weight"])
    assert torch.equal(again["steps"], state["steps"])
    assert torch.equal(again["zeros.weight"], state["zeros.weight"])
    assert torch.allclose(again["a.bias"].float(), state["a.bias"], rtol=1e-3)


def test_six_bits_are_packed_without_loss():
    whole = torch.arange(-32, 32, dtype=torch.int8).repeat(2, 1)
    whole[1] = whole[1].flip(0)
    packed = _packed(whole)
    assert packed.shape == (2, 48)
    assert torch.equal(_unpacked(packed), whole.int())


def test_clipping_a_block_is_never_worse():
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    whole, scales = _rounded(values, 31, (1.0,))
    clipped, clipped_scales = _rounded(values, 31, CLIPPED)
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


@pytest.mark.parametrize("change", ["no scales", "short scales", "wide scales", "scales alone", "bytes", "bool"])
def test_what_does_not_fit_is_refused(folder, tmp_path, change):
    stored = load_file(folder / COMPACT_WEIGHTS)
    name = next(key.removesuffix(SCALES) for key in stored if key.endswith(SCALES))
    if change == "no scales":
        del stored[name + SCALES]
    elif change == "short scales":
        stored[name + SCALES] = stored[name + SCALES][:-1].clone()
    elif change == "wide scales":
        stored[name + SCALES] = stored[name + SCALES].float()
    elif change == "scales alone":
        stored["x" + SCALES] = torch.ones(3, dtype=torch.float16)
    else:
        stored[name] = stored[name].to(torch.uint8 if change == "bytes" else torch.bool)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(stored, tmp_path / COMPACT_WEIGHTS)
    with pytest.raises(InvalidCheckpoint, match=r"scales|of type"):
        mt.load(tmp_path)


@pytest.mark.parametrize(
    "change", ["no scales", "no shape", "wrong shape", "negative", "short", "wide", "scales alone"]
)
def test_packed_weights_that_do_not_fit_are_refused(change):
    stored = compact({"a": torch.randn(80, 80)}, ("quantize.",), bits=6)
    if change == "no scales":
        del stored["a" + PACKED_SCALES]
    elif change == "no shape":
        del stored["a" + SHAPE]
    elif change == "wrong shape":
        stored["a" + SHAPE] = torch.tensor([80, 81])
    elif change == "negative":
        stored["a" + SHAPE] = torch.tensor([-80, -80])
    elif change == "short":
        stored["a" + PACKED] = stored["a" + PACKED][:-1]
    elif change == "wide":
        stored["a" + PACKED] = stored["a" + PACKED].int()
    else:
        stored["b" + PACKED_SCALES] = stored["a" + PACKED_SCALES]
    with pytest.raises(InvalidCheckpoint, match=r"scales|shape|uint8"):
        expand(stored)
