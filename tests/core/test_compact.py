"""Weights of one byte: how exact they are, what stays as it was, and what is refused."""

import mediatok as mt
import pytest
import torch
from mediatok.core.compact import COMPACT_WEIGHTS, SCALES, compact, expand
from mediatok.core.errors import InvalidCheckpoint
from mediatok.training.export import export_model
from safetensors.torch import load_file, save_file


def test_large_matrices_lose_less_than_one_percent():
    rng = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(65, 101, generator=rng) * torch.logspace(-6, 3, 65)[:, None],
        "a.bias": torch.randn(65, generator=rng),
        "quantize.embedding.weight": torch.randn(100, 100, generator=rng),
        "zeros.weight": torch.zeros(64, 64),
        "steps": torch.tensor(7),
    }
    stored = compact(state, ("quantize.",))
    again = expand(stored)
    assert stored["a.weight"].dtype == torch.int8
    assert list(again) == list(state)
    row_error = (again["a.weight"] - state["a.weight"]).norm(dim=1) / state["a.weight"].norm(dim=1)
    assert row_error[10:].median() < 0.01
    assert torch.equal(again["quantize.embedding.weight"], state["quantize.embedding.weight"])
    assert torch.equal(again["steps"], state["steps"])
    assert torch.equal(again["zeros.weight"], state["zeros.weight"])
    assert torch.allclose(again["a.bias"].float(), state["a.bias"], rtol=1e-3)


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
