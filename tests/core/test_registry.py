"""Names, folders and hub ids become models; what cannot says how it could."""

import json

import mediatok as mt
import pytest
import torch
from mediatok.core.registry import ENTRIES, constructor_arguments, find_entry, model_class


def test_models_lists_shipped_and_released():
    entries = {entry.name: entry for entry in mt.models()}
    assert entries["titok-tiny"].status == entries["one-d-piece-tiny"].status == "shipped"
    assert entries["titok-s128"].hub_id == "yucornetto/tokenizer_titok_s128_imagenet"
    assert entries["titok-s128"].status in ("downloaded", "needs download")
    assert {entry.kind for entry in entries.values()} == {"tokenizer", "generator"}


def test_names_and_hub_ids_are_found():
    assert find_entry("titok_s128").name == find_entry("TiTok-S128").name == "titok-s128"
    assert find_entry("turing-motors/One-D-Piece-S-256").name == "one-d-piece-s256"
    assert find_entry("fun-research/TiTok") is None  # a repository of several models


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if not entry.is_shipped])
def test_stated_parameters_are_exact(name):
    entry = ENTRIES[name]
    with torch.device("meta"):
        model = model_class(entry.class_name)(**constructor_arguments(entry))
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


@pytest.mark.parametrize("name", ["titok-tiny", "one-d-piece-tiny"])
def test_shipped_models_load(name):
    model = mt.load(name)
    assert model.name == name
    assert not model.training
    assert model.image_size == 64
    assert sum(parameter.numel() for parameter in model.parameters()) == ENTRIES[name].parameters
    assert sum(file.stat().st_size for file in ENTRIES[name].folder.iterdir()) < 8 * 2**20
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_create_is_reproducible_by_seed():
    first, second, other = (mt.create("titok-tiny", seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_unknown_names_get_suggestions():
    with pytest.raises(mt.ModelNotFound, match="'titok-tiny'"):
        mt.load("titok-tinny")
    with pytest.raises(mt.ModelNotFound, match="titok-s128"):
        mt.create("titok-s-128")
    with pytest.raises(mt.InvalidInput, match="float16"):
        mt.load("titok-tiny", dtype="float16")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cuda:-1", "", 1.5])
@pytest.mark.parametrize("name", ["titok-tiny", "maskgit-tiny"])
def test_devices_that_cannot_be_used_are_told_before_the_work(name, device, monkeypatch):
    monkeypatch.setattr("mediatok.core.registry.model_class", lambda name: pytest.fail("built a model"))
    for make in (mt.load, mt.create):
        with pytest.raises(mt.InvalidInput, match=r"device=.* cannot be used here .* use device='cpu'"):
            make(name, device=device)


def test_released_weights_without_network_say_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(mt.ModelNotFound, match="pass its folder"):
        mt.load("titok-l32")


def test_our_folders_round_trip_and_are_strict(tmp_path, build_small):
    model = build_small()
    folder = tmp_path / "small"
    model.save_pretrained(folder)
    assert mt.load(folder).fingerprint == model.fingerprint
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"decoder_depth": 3}, "missing decoder.transformer"),
        ({"auto_map": "x.py"}, "auto_map"),
        ({"_target_": "os.system"}, "_target_"),
        ({"_class_name": "Popen"}, "not a mediatok model class"),
        ({"unheard_of": 1}, "unheard_of"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(mt.InvalidCheckpoint, match=message):
            mt.load(folder)


def test_sharded_folders_load(tmp_path, build_small):
    model = build_small()
    model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert mt.load(tmp_path / "small").fingerprint == model.fingerprint


@pytest.fixture
def build_small():
    def build():
        return mt.OneDPiece(
            image_size=32, encoder_patch_size=8, decoder_patch_size=8, num_latent_tokens=4, token_size=4,
            codebook_size=16, is_legacy=False, has_pixel_decoder=False, encoder_width=16, encoder_depth=1,
            encoder_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2,
        )  # fmt: skip

    return build
