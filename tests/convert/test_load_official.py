"""Released layouts, simulated with the parity cases' weights: hub folders, training outputs, single files."""

import contextlib
import json
import os
from pathlib import Path

import mediatok as mt
import pytest
import torch
import yaml
from mediatok.convert import is_official_folder, load_official
from mediatok.core.errors import InvalidCheckpoint, MediatokError, ModelNotFound
from safetensors.torch import load_file, save_file

CASES = Path(__file__).parent.parent / "parity"


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def official(case):
    """The official tree of a case with its sizes beside it, and the weights."""
    config = json.loads((CASES / case / "config.json").read_text())
    tree = config["official_config"] | {"size_overrides": config["size_overrides"]}
    tree |= {"experiment": {"output_dir": "x"}, "optimizer": {"params": {"learning_rate": "1e-4"}}}
    return tree, load_file(CASES / case / "weights.safetensors")


def write_shards(folder, weights):
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LAYOUTS = ["model.safetensors", "shards", "ema_model/pytorch_model.bin", "pytorch_model.bin", "tokenizer_mine.bin"]


def write_release(folder, config, weights, layout="model.safetensors", config_name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config) if config_name.endswith(".json") else yaml.safe_dump(config)
    (folder / config_name).write_text(text)
    if layout == "shards":
        write_shards(folder, weights)
        return folder
    path = folder / layout
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path) if layout.endswith(".safetensors") else torch.save(weights, path)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "config_name"), [("titok/two_stage_vq", "config.json"),
                                                   ("one_d_piece/lengths", "config.yaml")])  # fmt: skip
def test_released_layouts(tmp_path, layout, case, config_name):
    folder = write_release(tmp_path / "release", *official(case), layout, config_name)
    assert is_official_folder(folder)
    model = load_official(folder)
    assert type(model).__name__ == ("OneDPiece" if "one_d" in case else "TiTok")
    io = load_file(CASES / case / "io.safetensors")
    assert torch.equal(model.encode_pixels(io["image"])[:, None], io["vq.indices"])
    with torch.no_grad():
        decoded = model.decode_ids(io["decode_tokens.in"][:, 0])
    assert torch.allclose(decoded, io["decode_tokens.out"], atol=1e-4)


@pytest.mark.parametrize(
    "case", ["titok/single_stage_vq", "titok/single_stage_vae", "titok/tatitok_vq", "titok/stage1_train"]
)
def test_public_load_and_our_own_layout(tmp_path, case):
    folder = write_release(tmp_path / "theirs", *official(case))
    model = mt.load(folder)
    model.save_pretrained(tmp_path / "ours")
    assert not is_official_folder(tmp_path / "ours")
    again = mt.load(tmp_path / "ours")
    assert again.fingerprint == model.fingerprint
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_config_that_names_its_weights(tmp_path):
    config, weights = official("titok/single_stage_vq")
    config["experiment"]["tokenizer_checkpoint"] = "tokenizer_x.bin"
    folder = write_release(tmp_path / "r", config, weights, "tokenizer_x.bin")
    torch.save({"model.lm_head.weight": torch.ones(1)}, folder / "generator_x.bin")
    assert load_official(folder).max_tokens == 6
    config["experiment"]["tokenizer_checkpoint"] = "../r/tokenizer_x.bin"  # never followed
    write_release(folder, config, weights, "tokenizer_x.bin")
    with pytest.raises(InvalidCheckpoint, match="several weight files"):
        load_official(folder)


def test_single_files_by_name(tmp_path, monkeypatch):
    config, weights = official("titok/single_stage_vae")
    small = dict(load_official(write_release(tmp_path / "r", config, weights)).config)
    small = {key: value for key, value in small.items() if not key.startswith("_")}
    monkeypatch.setattr("mediatok.convert.load.constructor_arguments", lambda entry: small)
    for file in ("titok_bl64_vae_c16.bin", "tokenizer_titok_bl64_vae_c16.bin", "TiTok-BL64-VAE-C16.pt"):
        torch.save(weights, tmp_path / file)
        assert is_official_folder(tmp_path / file)
        assert load_official(tmp_path / file).name == "titok-bl64-vae-c16"
    torch.save(weights, tmp_path / "best.bin")
    assert load_official(tmp_path / "best.bin", name="titok-bl64-vae-c16").is_continuous
    assert not is_official_folder(tmp_path / "best.bin")
    with pytest.raises(ModelNotFound, match="does not say what it is"):
        load_official(tmp_path / "best.bin")
    with pytest.raises(ModelNotFound, match="unknown model"):
        load_official(tmp_path / "best.bin", name="titok-bl63")


def test_single_vqgan_file(tmp_path, monkeypatch):
    weights = load_file(CASES / "titok/stage1_train/maskgit_vqgan.safetensors")
    path = tmp_path / "maskgit-vqgan-imagenet-f16-256.bin"
    torch.save(weights, path)
    with pytest.raises(InvalidCheckpoint, match="do not fit the config"):  # the released sizes are larger
        load_official(path)


def test_file_names_of_all_releases(tmp_path):
    for entry in mt.models():
        if not entry.is_shipped:
            file = tmp_path / (entry.hub_file or f"tokenizer_{entry.name.replace('-', '_')}.bin")
            torch.save({"latent_tokens": torch.ones(1)}, file)
            assert is_official_folder(file)
            if entry.name in ("titok-s128", "maskgit-vqgan"):
                with pytest.raises(InvalidCheckpoint, match="missing"):
                    load_official(file)


# Refusals.


def test_folders_that_hold_nothing_to_load(tmp_path):
    config, weights = official("titok/single_stage_vq")
    (tmp_path / "empty").mkdir()
    assert not is_official_folder(tmp_path / "empty")
    assert not is_official_folder(tmp_path / "missing")
    for folder, reason in (("empty", "no weights"), ("missing", "does not exist")):
        with pytest.raises(ModelNotFound, match=reason):
            load_official(tmp_path / folder)
    folder = write_release(tmp_path / "r", config, weights)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no weights"):
        load_official(folder)


def test_generator_weights_are_named_as_such(tmp_path):
    config, _ = official("titok/single_stage_vq")
    folder = write_release(tmp_path / "g", config, {"model.lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(InvalidCheckpoint, match="generator"):
        load_official(folder)


def snapshot(folder):
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("loader", [load_official, mt.load])
@pytest.mark.parametrize("key", ["_target_", "class_path", "auto_map", "attn_implementation"])
@pytest.mark.parametrize("config_name", ["config.json", "config.yaml"])
def test_hostile_configs_are_refused_and_run_nothing(tmp_path, monkeypatch, loader, key, config_name):
    config, weights = official("titok/single_stage_vq")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for place in (config, config["model"], config["model"]["vq_model"]):
        place[key] = "evil.Evil"
        folder = write_release(tmp_path / "r", config, weights, config_name=config_name)
        before = snapshot(tmp_path)
        with pytest.raises(InvalidCheckpoint, match=f"{key}' names code"):
            loader(folder)
        with pytest.raises(InvalidCheckpoint):
            is_official_folder(folder)
        assert snapshot(tmp_path) == before
        del place[key]


@pytest.mark.parametrize("key", ["_target_", "class_path", "auto_map", "attn_implementation"])
def test_hostile_keys_in_our_own_layout_are_refused_too(tmp_path, key):
    load_official(write_release(tmp_path / "r", *official("titok/single_stage_vq"))).save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "os.system"}))
    with pytest.raises(InvalidCheckpoint, match="names code"):
        mt.load(tmp_path / "ours")


@pytest.mark.parametrize("layout", ["ema_model/pytorch_model.bin", "pytorch_model.bin", "tokenizer_titok_b64.bin"])
@pytest.mark.parametrize("loader", [load_official, mt.load])
def test_pickles_with_code_are_refused_and_run_nothing(tmp_path, loader, layout):
    config, weights = official("titok/single_stage_vq")
    folder = write_release(tmp_path / "r", config, weights | {"x": Payload(tmp_path / "was_run")}, layout)
    before = snapshot(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="mkdir"):
        loader(folder)
    with pytest.raises(InvalidCheckpoint, match="mkdir"):
        loader(folder / layout) if "titok" in layout else loader(folder)
    assert snapshot(tmp_path) == before


def test_links_out_of_the_folder_are_refused(tmp_path):
    config, weights = official("titok/single_stage_vq")
    outside = write_release(tmp_path / "outside", config, weights)
    for file in ("config.json", "model.safetensors"):
        folder = write_release(tmp_path / f"linked-{file}", config, weights)
        (folder / file).unlink()
        (folder / file).symlink_to(outside / file)
        with pytest.raises(InvalidCheckpoint, match="leaves its folder"):
            load_official(folder)
    folder = write_release(tmp_path / "linked-ema", config, weights, "ema_model/pytorch_model.bin")
    (folder / "ema_model").rename(tmp_path / "ema")
    (folder / "ema_model").symlink_to(tmp_path / "ema")
    with pytest.raises(InvalidCheckpoint, match="leaves its folder"):
        load_official(folder)


def test_two_configs_are_ambiguous(tmp_path):
    config, weights = official("titok/single_stage_vq")
    folder = write_release(tmp_path / "r", config, weights)
    write_release(folder, config, weights, config_name="config.yaml")
    with pytest.raises(InvalidCheckpoint, match="keep the one"):
        load_official(folder)
    (folder / "config.json").write_text('{"transformers_version": "5.0"}')
    assert load_official(folder).max_tokens == 6


def test_mutated_releases_never_crash(tmp_path):
    """Random bytes changed in config or weights: a model or a MediatokError."""
    config, weights = official("titok/tatitok_vae")
    folder = write_release(tmp_path / "r", config, weights, "pytorch_model.bin")
    draw = torch.Generator().manual_seed(0)
    for file in ("config.json", "pytorch_model.bin"):
        whole = (folder / file).read_bytes()
        for _ in range(60):
            mutated = bytearray(whole)
            for position in torch.randint(min(len(whole), 4000), (3,), generator=draw).tolist():
                mutated[position] = int(torch.randint(256, (1,), generator=draw))
            (folder / file).write_bytes(mutated)
            with contextlib.suppress(MediatokError):
                load_official(folder)
        (folder / file).write_bytes(whole)
    load_official(folder)
