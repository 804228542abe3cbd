"""SimCodec and HiFi-Codec: cases of sizes that no recorded case has pass, and releases load in all their layouts."""

import gzip
import importlib.util
import json
import os
from pathlib import Path

import mediatok as mt
import pytest
import torch
from mediatok.convert import from_official, is_official_folder, load_official, parity
from mediatok.convert.load import of_entry
from mediatok.core.errors import InvalidCheckpoint, ModelNotFound
from mediatok.core.registry import constructor_arguments, find_entry
from mediatok.tokenizers.speech.simcodec import SimCodec
from safetensors.torch import load_file, save_file

CASES = Path(__file__).parent.parent / "parity" / "simcodec"
spec = importlib.util.spec_from_file_location("plain_simcodec", Path(__file__).with_name("plain_simcodec.py"))
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)

SMALL = ([3, 2], [7, 4], [3, 5], [[1, 2], [3, 1]])
CONFIGS = {
    "one stage": plain.simcodec_config([4], [8], [5], [[1, 3, 5]], widths=(3, 5), vq_dim=7),
    "five stages": plain.simcodec_config([2, 1, 3, 2, 2], [4, 3, 5, 2, 6], [3], [[2]], widths=(3, 2)),
    "orders": plain.simcodec_config([5, 2, 3], [9, 4, 7], [3, 7, 5], [[1, 3], [2, 4], [5, 1]], widths=(2, 3)),
    "one dilation": plain.simcodec_config([4, 2], [8, 4], [3, 1], [[1], [1]]),
    "three groups": plain.simcodec_config(*SMALL, groups=3, codes=11),
    "four layers": plain.simcodec_config(*SMALL, layers=4, codes=30),
    "layers and groups": plain.simcodec_config(*SMALL, layers=3, groups=4, codes=9, vq_dim=20),
    "hifi": plain.hificodec_config([8, 5, 4, 2], [16, 11, 8, 4], [3, 7], [[1, 3], [2, 1]], widths=(1, 1)),
    "hifi, two stages": plain.hificodec_config(*SMALL, widths=(6, 3), groups=3, vq_dim=18, codes=13),
}


def frames_of(config, frames):
    return frames * torch.tensor(config["upsample_rates"]).prod().item()


def draw(config, seed, batch, samples):
    """Weights and a clip whose codes are clear choices: rounding decides none of them."""
    for attempt in range(50):
        weights = plain.random_weights(config, 100 * seed + attempt)
        wave = torch.rand(batch, 1, samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        io, lead = plain.record(weights, config, wave)
        if lead > 1e-3:
            return weights, io
    raise AssertionError("no clear choices")


def save(folder, config, weights, io):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"system": "simcodec", "kind": "codec", "config": config}))
    for name, tensors in (("weights", weights), ("io", io)):
        tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def replay(folder):
    lines = []
    assert parity.run([folder], lines.append), "\n".join(lines)
    return lines


@pytest.mark.parametrize("name", CONFIGS)
def test_new_cases(tmp_path, name):
    config, batch = CONFIGS[name], 1 + len(name) % 3
    weights, io = draw(config, batch, batch, frames_of(config, 7))
    trained = plain.training(weights, config, io["wav"])
    prefix = "" if name.startswith("hifi") else "even."
    recorded = {f"{prefix}{key}": value for key, value in io.items()}
    recorded |= {f"{prefix}train.{key}": value for key, value in trained.items()}
    for layers in range(1, config.get("n_q", 2) + 1):
        quantized, loss, codes, _ = plain.quantize(weights, config, io["latent"], layers)
        bandwidth = {"quantized": quantized, "q_loss": loss, "codes": codes}
        bandwidth["embed"] = plain.lookup(weights, config, codes)
        recorded |= {f"bw{layers}.{key}": value for key, value in bandwidth.items()}
    mask = torch.randint(config.get("n_q", 2), (batch, 7), generator=torch.Generator().manual_seed(3))
    quantized, loss, *_ = plain.quantize(weights, config, io["latent"], mask=mask)
    recorded |= {"mask.mask_id": mask, "mask.quantized": quantized, "mask.q_loss": loss}
    lines = replay(save(tmp_path / "simcodec" / "new", config, weights, recorded))
    assert sum("train.grad" in line for line in lines) >= len(trained) - 2


def test_a_length_that_is_no_multiple_of_the_hop(tmp_path):
    config = CONFIGS["orders"]
    weights, io = draw(config, 1, 2, frames_of(config, 5))
    odd = torch.rand(1, 1, frames_of(config, 6) + 17, generator=torch.Generator().manual_seed(2))
    odd_io, _ = plain.record(weights, config, odd)
    assert odd_io["codes"].shape[1] == 6
    recorded = {f"even.{key}": value for key, value in io.items()}
    recorded |= {f"odd.{key}": value for key, value in odd_io.items()}
    replay(save(tmp_path / "simcodec" / "new", config, weights, recorded))


@pytest.mark.parametrize("tensor", ["even.codes", "bw2.quantized", "mask.q_loss", "even.decoded", "even.latent"])
def test_one_changed_value_fails(tmp_path, tensor):
    config = json.loads((CASES / "residual_group/config.json").read_text())["config"]
    weights, io = (load_file(CASES / f"residual_group/{name}.safetensors") for name in ("weights", "io"))
    values = io[tensor].flatten().clone()
    values[values.abs().argmax()] += 1 if not values.is_floating_point() else 0.01 * float(values.abs().max())
    folder = save(tmp_path / "simcodec" / "case", config, weights, io | {tensor: values.view(io[tensor].shape)})
    assert not parity.run([folder], lambda line: None)


# Layouts.


def new_weight_norm(weights):
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {f"{key[: key.rfind('.')]}.{names.get(end, end)}": value
            for key, value in weights.items() for end in [key[key.rfind(".") + 1 :]]}  # fmt: skip


def without_weight_norm(weights):
    layers = [key.removesuffix(".weight_v") for key in weights if key.endswith(".weight_v")]
    rest = {key: value for key, value in weights.items() if not key.endswith((".weight_g", ".weight_v"))}
    return rest | {f"{layer}.weight": plain.weight(weights, layer) for layer in layers}


def in_gense(weights):
    other = {
        "lm.transformer.wte.weight": torch.ones(4, 2),
        "xlsr.mask_emb": torch.ones(3),
        "km.emb.weight": torch.ones(2),
    }
    return {f"codec_tokenizer.{key}": value for key, value in weights.items()} | other


@pytest.mark.parametrize("name", ["orders", "hifi, two stages"])
@pytest.mark.parametrize("layout", [new_weight_norm, without_weight_norm, in_gense])
@torch.no_grad()
def test_layouts_give_the_same_model(name, layout):
    config = CONFIGS[name]
    weights, io = draw(config, 5, 1, frames_of(config, 6))
    model = from_official("simcodec", config, layout(weights))
    ids = model.encode_waveform(io["wav"][:, 0])
    assert torch.equal(ids if ids.ndim == 3 else ids[..., None], io["codes"])
    torch.testing.assert_close(model.decode_ids(ids)[:, None], io["decoded"], atol=2e-5, rtol=1e-4)


def parts(weights):
    names = ("encoder", "quantizer", "generator")
    return {name: {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(name)} for name in names}


def write_release(folder, config, **files):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        torch.save(content, folder / name.replace("_dot_", "."))
    return folder


def test_folders_and_files(tmp_path):
    config = CONFIGS["three groups"]
    weights, io = draw(config, 5, 1, frames_of(config, 6))
    other = plain.random_weights(config, 77)
    folders = {
        "newest": write_release(tmp_path / "a", config, g_00000100=parts(weights), g_00000020=parts(other),
                                do_00000100={"mpd": {}, "steps": 3}),
        "lightning": write_release(tmp_path / "b", config, s2s_dot_ckpt={"state_dict": in_gense(weights), "epoch": 3}),
        "flat": write_release(tmp_path / "c", config, codec_dot_pth=weights),
    }  # fmt: skip
    fingerprints = set()
    for name, folder in folders.items():
        assert is_official_folder(folder), name
        model = mt.load(folder)
        assert torch.equal(model.encode_waveform(io["wav"][:, 0]), io["codes"]), name
        fingerprints.add(model.fingerprint)
        model.save_pretrained(tmp_path / "ours" / name)
        assert not is_official_folder(tmp_path / "ours" / name)
        assert mt.load(tmp_path / "ours" / name).fingerprint == model.fingerprint
    assert len(fingerprints) == 1
    assert load_official(folders["newest"] / "g_00000020").fingerprint not in fingerprints
    assert mt.load(folders["newest"]).name == "a"


def test_releases_without_a_config(tmp_path, monkeypatch):
    """The file names of the hub tell the model; with other weights the differences are listed."""
    config = CONFIGS["hifi, two stages"]
    weights, io = draw(config, 5, 1, frames_of(config, 6))
    file = tmp_path / "HiFi-Codec-24k-240d"
    torch.save(parts(weights), file)
    assert is_official_folder(file)
    with pytest.raises(InvalidCheckpoint, match=r"missing encoder\.ups\.2\.weight"):
        mt.load(file)
    small = {key: value for key, value in from_official("simcodec", config, weights).config.items() if key[0] != "_"}
    monkeypatch.setattr("mediatok.convert.load.constructor_arguments", lambda entry: small)
    model = mt.load(file)
    assert model.name == "hifi-codec-24k-240d"
    assert torch.equal(model.encode_waveform(io["wav"][:, 0]), io["codes"])


@pytest.mark.parametrize("rate", [50, 100])
def test_every_tensor_of_the_full_size_has_its_place(rate):
    manifest = json.loads(gzip.decompress((CASES / f"manifests/assumed_{rate}hz_8192.json.gz").read_bytes()))
    weights = {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}
    from_config = from_official("simcodec", manifest["config"], weights)
    model = of_entry(find_entry(f"simcodec-{rate}hz"), weights)
    plain_config, ours = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (from_config, model))
    assert json.dumps(plain_config) == json.dumps(ours)
    assert sum(p.numel() for p in model.parameters()) == find_entry(f"simcodec-{rate}hz").parameters
    assert sum(w.numel() for w in weights.values()) == manifest["params"]


def test_hificodecs_rates():
    for name, hertz, kbps in (("16k-320d", 50, 2), ("24k-320d", 75, 3), ("24k-240d", 100, 4)):
        entry = find_entry(f"hifi-codec-{name}")
        with torch.device("meta"):
            model = SimCodec(**constructor_arguments(entry))
        assert entry.hub_file == f"HiFi-Codec-{name}"
        assert (model.frame_rate, model.bit_rate) == (hertz, kbps * 1000)


# Refusals.


def test_keys_are_checked_by_their_official_names():
    config = CONFIGS["layers and groups"]
    weights = plain.random_weights(config, 1)
    for key in ("generator.ups.1.bias", "quantizer.quantizer_modules.2.3.embedding.weight", "encoder.normalize.3.bias"):
        with pytest.raises(InvalidCheckpoint, match=f"1 differences.*missing {key}"):
            from_official("simcodec", config, {name: value for name, value in weights.items() if name != key})
    for key in ("encoder.norms.0.0.weight", "lm.head", "generator.ups.0.weight_g2"):
        with pytest.raises(InvalidCheckpoint, match=f"unknown {key}"):
            from_official("simcodec", config, weights | {key: torch.ones(3)})
    with pytest.raises(InvalidCheckpoint, match=r"unknown codec_tokenizer|unknown other"):
        from_official("simcodec", config, in_gense(weights) | {"other": torch.ones(1)})
    half = {name: value for name, value in weights.items() if name != "generator.ups.0.weight_g"}
    with pytest.raises(
        InvalidCheckpoint, match=r"missing generator\.ups\.0\.weight .*unknown generator\.ups\.0\.weight_v"
    ):
        from_official("simcodec", config, half)
    with pytest.raises(InvalidCheckpoint, match=r"unknown generator\.ups\.1\.weight_g"):  # it would broadcast
        from_official("simcodec", config, weights | {"generator.ups.1.weight_g": torch.ones(1, 1, 1)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"channel": 2}, "mono"),
        ({"resblock": "2"}, "resblock"),
        ({"upsample_rates": None}, "lacks"),
        ({"upsample_rates": [5, 2]}, "missing|impossible"),
        ({"upsample_rates": [5, 2, 2]}, "whole frames"),
        ({"upsample_rates": [5, 2, 0]}, "whole numbers"),
        ({"upsample_rates": [2] * 13}, "stages"),
        ({"upsample_kernel_sizes": [9, 4, 5]}, "shape"),
        ({"resblock_kernel_sizes": [3, 7, 4]}, "odd|lists"),
        ({"resblock_dilation_sizes": [[1, 3], [2, 4]]}, "3 lists"),
        ({"resblock_dilation_sizes": [[1, 3], [2, 4], [5, 1, 2]]}, "missing"),
        ({"resblock_dilation_sizes": [[1, 3], [2, 4], 3]}, "whole numbers"),
        ({"en_filters": 4}, "shape"),
        ({"n_q": 2}, "missing"),
        ({"n_q": 10**9}, "from 1 to"),
        ({"n_code_groups": 5}, "impossible"),
        ({"n_codes": "many"}, "n_codes"),
        ({"commitment_loss_lambda": "a"}, "must be a number"),
    ],
)
def test_configs_that_do_not_fit(change, reason):
    config = CONFIGS["orders"]
    with pytest.raises(InvalidCheckpoint, match=reason):
        from_official("simcodec", config | change, plain.random_weights(config, 1))


def test_weights_of_something_else():
    config = CONFIGS["orders"]
    for weights in (
        {"a.weight": torch.ones(2)},
        {"quantizer.quantizer_modules.0.0.embedding.weight": torch.ones(2, 2)},
    ):
        with pytest.raises(InvalidCheckpoint, match="no weights of a codec"):
            from_official("simcodec", config, weights)


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_folders_that_cannot_be_loaded(tmp_path):
    config, made = CONFIGS["orders"], tmp_path / "made"
    weights = plain.random_weights(config, 1)
    with pytest.raises(ModelNotFound, match="holds no weights"):
        mt.load(write_release(tmp_path / "none", config))
    with pytest.raises(InvalidCheckpoint, match="several weight files"):
        mt.load(write_release(tmp_path / "two", config, a_dot_ckpt=weights, b_dot_ckpt=weights))
    with pytest.raises(InvalidCheckpoint, match="names code"):
        mt.load(write_release(tmp_path / "code", config, g_00000001={"encoder": {"a": Payload(made)}}))
    with pytest.raises(InvalidCheckpoint, match="_target_"):
        mt.load(write_release(tmp_path / "config", config | {"_target_": "os.system"}, g_00000001=parts(weights)))
    with pytest.raises(InvalidCheckpoint, match=r"g_00000001.*missing"):
        mt.load(write_release(tmp_path / "other", CONFIGS["three groups"], g_00000001=parts(weights)))
    assert not made.exists()
