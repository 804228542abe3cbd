"""Hostile and broken files are refused with a reason; nothing runs and nothing is written."""

import argparse
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from mediatok.core.errors import InvalidCheckpoint, MediatokError, ModelNotFound
from mediatok.core.weights import MAX_CONFIG_BYTES, inside, read_config, read_state_dict
from safetensors.torch import save_file


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
def test_plain_weights_are_read(tmp_path, suffix):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(1, dtype=torch.float16)}
    path = tmp_path / f"model{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(OrderedDict(tensors), path)
    loaded = read_state_dict(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_parameters_in_a_pickle_are_read_as_tensors(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "m.bin")
    assert not read_state_dict(tmp_path / "m.bin")["w"].requires_grad


@pytest.mark.parametrize("form", ["zip", "legacy", "raw"])
def test_pickle_with_code_is_refused_and_runs_nothing(tmp_path, form):
    path, marker = tmp_path / "model.bin", tmp_path / "was_run"
    if form == "raw":
        path.write_bytes(pickle.dumps({"w": Payload(marker)}))
    else:
        torch.save({"w": torch.ones(2), "x": Payload(marker)}, path, _use_new_zipfile_serialization=form == "zip")
    before = tree(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="not run") as caught:
        read_state_dict(path)
    assert tree(tmp_path) == before
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # no advice to load it unsafely
    assert form == "raw" or "mkdir" in str(caught.value)


def test_environment_cannot_switch_unsafe_loading_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": Payload(tmp_path / "was_run")}, tmp_path / "model.bin")
    with pytest.raises(InvalidCheckpoint):
        read_state_dict(tmp_path / "model.bin")
    assert tree(tmp_path) == ["model.bin"]


def test_compressed_pickle_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1000, 1000)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(InvalidCheckpoint, match="compressed"):
        read_state_dict(tmp_path / "bomb.bin")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"weights": {"w": torch.ones(2)}}, "'weights' is a dict"),
        ({"w": 3}, "'w' is a int"),
        ({3: torch.ones(2)}, "key '3' is not text"),
        ([torch.ones(2)], "holds a list"),
        ({"w": torch.ones(1).expand(10**6, 10**6)}, "over less data"),
        ({"w": torch.eye(3).to_sparse()}, "not a plain dense tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "weights are float or integer"),
        ({}, "holds no tensors"),
    ],
)
def test_other_pickles_are_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(InvalidCheckpoint, match=reason):
        read_state_dict(tmp_path / "m.bin")


def test_training_outputs_give_their_averaged_weights(tmp_path):
    arguments = argparse.Namespace(lr=1e-4, name="run")
    content = {"model": {"w": torch.zeros(2)}, "model_ema": {"w": torch.ones(2)}, "epoch": 3, "args": arguments}
    torch.save(content, tmp_path / "last.pth")
    assert torch.equal(read_state_dict(tmp_path / "last.pth")["w"], torch.ones(2))
    torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / "kl16.ckpt")
    assert torch.equal(read_state_dict(tmp_path / "kl16.ckpt")["w"], torch.zeros(2))


def entry(begin, end, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE_SAFETENSORS = {
    "header of 100 MB claimed": struct.pack("<Q", 100 * 2**20) + b"{}",
    "header of 2^63 claimed": struct.pack("<Q", 2**63) + b"{}",
    "overlapping offsets": safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "a gap between tensors": safetensors_bytes({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20),
    "shape larger than its data": safetensors_bytes({"a": entry(0, 8, (1000, 1000))}, b"\0" * 8),
    "shape that overflows": safetensors_bytes({"a": entry(0, 8, (2**62, 2**62))}, b"\0" * 8),
    "offsets beyond the file": safetensors_bytes({"a": entry(0, 4_000_000, (1_000_000,))}, b"\0" * 8),
    "trailing bytes": safetensors_bytes({"a": entry(0, 8)}, b"\0" * 8 + b"PK\x03\x04"),
    "unknown dtype": safetensors_bytes({"a": {"dtype": "PY", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "no JSON": safetensors_bytes(b"cos\nsystem\n(S'true'\ntR."),
    "empty": b"",
    "three bytes": b"\1\0\0",
    "negative shape": safetensors_bytes({"a": entry(0, 8, (-2,))}, b"\0" * 8),
    "duplicate keys": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        b"\0" * 16,
    ),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE_SAFETENSORS[name])
    with pytest.raises(InvalidCheckpoint):
        read_state_dict(path)
    assert tree(tmp_path) == ["model.safetensors"]


def test_every_truncation_is_refused(tmp_path):
    for suffix in (".safetensors", ".bin"):
        path = tmp_path / f"m{suffix}"
        tensors = {"a": torch.randn(3, 5), "b": torch.randn(7)}
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
        whole = path.read_bytes()
        for length in range(0, len(whole), 29):
            path.write_bytes(whole[:length])
            with pytest.raises(MediatokError):
                read_state_dict(path)


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "weights.npz").write_bytes(b"PK")
    for name in ("pipe.bin", "folder.safetensors", "weights.npz"):
        with pytest.raises(InvalidCheckpoint):
            read_state_dict(tmp_path / name)
    with pytest.raises(ModelNotFound):
        read_state_dict(tmp_path / "missing.bin")


# Shards


def write_shards(folder, weight_map=None):
    save_file({"a": torch.ones(2)}, folder / "s-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "s-2.safetensors")
    weight_map = weight_map or {"a": "s-1.safetensors", "b": "s-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_joined(tmp_path):
    loaded = read_state_dict(write_shards(tmp_path))
    assert {key: tuple(value.shape) for key, value in loaded.items()} == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("s-3.safetensors", "'s-3.safetensors', which is missing"),
        ("../outside.safetensors", "plain file names"),
        ("/etc/passwd", "plain file names"),
        ("..", "plain file names"),
        ("sub/s-2.safetensors", "plain file names"),
        ("sub\\s-2.safetensors", "plain file names"),
        ("s-1.safetensors", "disagree about 'b'"),
        ("link.safetensors", "leaves its folder"),
        (7, "weight_map"),
    ],
)
def test_bad_shard_names_are_refused(tmp_path, file, reason):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b": torch.zeros(3)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = write_shards(folder, {"a": "s-1.safetensors", "b": file})
    with pytest.raises(InvalidCheckpoint, match=reason):
        read_state_dict(index)


def test_hub_cache_links_are_followed_and_others_are_not(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "123")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    assert "a" in read_state_dict(inside(snapshot, "model.safetensors"))
    (tmp_path / "secret").write_text("x")
    (snapshot / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidCheckpoint, match="leaves its folder"):
        inside(snapshot, "config.json")


# Configs

HOSTILE_KEYS = [
    "_target_", "_partial_", "_recursive_", "_convert_", "_args_", "_call_", "class_path", "init_args", "auto_map",
    "trust_remote_code", "custom_pipeline", "__reduce__", "__class__", "py/object", "_attn_implementation",
    "attn_implementation", "_attn_implementation_internal", "attention_backend", "attn_processor", "kernel_repo",
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE_KEYS)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_keys_that_name_code_are_refused_with_their_path(tmp_path, key, suffix):
    path = tmp_path / f"config{suffix}"
    path.write_text(json.dumps({"model": {"layers": [{"width": 3}, {key: "os.system"}]}}))  # JSON is YAML
    with pytest.raises(InvalidCheckpoint, match="names code") as caught:
        read_config(path)
    assert f"model.layers[1].{key}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "!!map {a: 1}",
        "a: &x [1, 2]\nb: [*x, *x]",
        "a: &x {k: 1}\nb:\n  <<: *x",
        "a: 1\na: 2",
        "a: 2020-01-01",
        "1: a",
        "- 1",
        "a: [",
        "a: 1\n---\nb: 2",
        "",
        "a: " + "[" * 1200 + "]" * 1200,
    ],
)
def test_yaml_beyond_plain_data_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InvalidCheckpoint):
        read_config(path)


def test_alias_bomb_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(InvalidCheckpoint, match="aliases are refused"):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '{"m": {"a": 1, "a": 2}}', '{"a": NaN}', "[1]", "{", "", '{"a": ' + "[" * 9000, "\xff",
     '{"a": ' + "1" * 6000 + "}", '{"a": ' * 60 + "1" + "}" * 60],
)  # fmt: skip
def test_json_beyond_plain_data_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidCheckpoint):
        read_config(path)


def test_large_and_odd_config_files_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "' + "x" * MAX_CONFIG_BYTES + '"}')
    with pytest.raises(InvalidCheckpoint, match="at most"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.py").write_text("raise SystemExit")
    with pytest.raises(InvalidCheckpoint, match="no config"):
        read_config(tmp_path / "config.py")
    with pytest.raises(ModelNotFound):
        read_config(tmp_path / "none.json")


def test_official_yaml_is_read_as_data(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model:\n  vq_model:\n    token_size: 12\n    use_l2_norm: True\n"
        "lr_scheduler:\n  params:\n    learning_rate: ${optimizer.params.learning_rate}\n    warmup_steps: 10_000\n"
    )
    config = read_config(tmp_path / "config.yaml")
    assert config["model"]["vq_model"] == {"token_size": 12, "use_l2_norm": True}
    assert config["lr_scheduler"]["params"]["learning_rate"] == "${optimizer.params.learning_rate}"
