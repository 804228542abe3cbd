"""Every recorded case passes, new cases of other sizes pass, and a case that differs in one value does not."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mediatok.convert import parity
from mediatok.core.errors import InvalidInput
from safetensors.torch import load_file, save_file

CASES = Path(__file__).parent.parent / "parity"
RECORDED = sorted(path.parent for path in CASES.glob("*/*/config.json"))
spec = importlib.util.spec_from_file_location("plain_titok", Path(__file__).with_name("plain_titok.py"))
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


def name_of(path):
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("case", RECORDED, ids=name_of)
def test_recorded_case(case):
    lines = []
    assert parity.run([case], lines.append), "\n".join(lines)


# Their recordings are left out, to keep the repository small; cases of these kinds are made below and in
# the files test_new_*_cases.py, and share most of their code with the kinds that are here.
LEFT_OUT = {
    ("titok", "losses_single_stage_vae"), ("one_d_piece", "stage1_train"),
    ("maskgit", "vit"), ("maskgit", "uvit"), ("maskgit", "vit_train"), ("maskgit", "uvit_train"),
    ("maskgit", "end_to_end"),
    ("xar", "training_loss"), ("xar", "sampling"), ("gense", "wavlm"), ("gense", "pipeline"),
    ("paraformer", "encoder"), ("paraformer", "decoder"), ("paraformer", "predictor"), ("paraformer", "train"),
    ("paraformer", "seaco"),
    ("seed", "tokenizer"), ("seed", "train_stage1_itc"), ("seed", "train_stage2"),
    ("flextok", "vae"), ("flextok", "resampler"), ("flextok", "full"), ("flextok", "ar_class"), ("flextok", "ar_text"),
    ("tokenflow", "tokenizer"), ("tokenflow", "msvq"), ("tokenflow", "t2i"),
}  # fmt: skip


def test_there_are_cases_of_every_kind():
    kinds = {(case.parent.name, json.loads((case / "config.json").read_text())["kind"]) for case in RECORDED}
    assert kinds == set(parity.KINDS) - LEFT_OUT


# The tool can fail.


def copy_case(source, folder, change=None, extra=None):
    """Copy a case; change(io, config) may alter both."""
    shutil.copytree(source, folder)
    io = load_file(folder / "io.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if change:
        change(io, config)
    save_file({key: value.contiguous() for key, value in (io | (extra or {})).items()}, folder / "io.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MUTATED = {
    "titok/two_stage_vq": [
        "recon", "enc.block1", "dec.block0", "pix.up2", "dec.soft_embedding", "vq.indices", "recon_uint8", "vq.margin"
    ],
    "titok/single_stage_vae": ["vae.kl", "vae.clamped_logvar", "recon_of_mode"],
    "titok/tatitok_vq": ["dec.out"],
    "titok/stage1_train": ["proxy.codes", "proxy.image", "loss.total", "grad.latent_tokens"],
    "titok/quantizer_clustering": ["step1.codebook_after", "step2.embed_prob_after"],
    "titok/quantizer_l2": ["soft_lookup.out", "step0.grad_codebook"],
    "titok/maskgit_vqgan": ["grid_codes.image", "soft_code", "indices"],
    "one_d_piece/lengths": ["len5.recon", "len2.dec.ln_post", "len8.decode_tokens"],
}  # fmt: skip


@pytest.mark.parametrize(("case", "tensor"), [(case, name) for case in MUTATED for name in MUTATED[case]])
def test_one_changed_value_fails(tmp_path, case, tensor):
    def change(io, config):
        values = io[tensor].flatten().clone()
        worst = values.abs().argmax()
        values[worst] += 2 if not values.is_floating_point() else max(0.01, 0.01 * float(values[worst].abs()))
        io[tensor] = values.view(io[tensor].shape)

    lines = []
    folder = copy_case(CASES / case, tmp_path / "system" / "case", change)
    assert not parity.run([folder], lines.append)
    assert any("FAIL" in line and tensor in line for line in lines)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_fails(tmp_path, value):
    def change(io, config):
        io["recon"][0, 0, 0, 0] = value

    assert not parity.run([copy_case(CASES / "titok/two_stage_vq", tmp_path / "c", change)], lambda line: None)


def test_unknown_tensor_is_a_failure(tmp_path):
    lines = []
    folder = copy_case(CASES / "titok/two_stage_vq", tmp_path / "c", extra={"enc.unheard_of": torch.ones(2)})
    assert not parity.run([folder], lines.append)
    assert any("enc.unheard_of" in line and "not replayed" in line for line in lines)


def test_other_shape_is_a_failure(tmp_path):
    def change(io, config):
        io["recon"] = io["recon"][:1]

    assert not parity.run([copy_case(CASES / "titok/two_stage_vq", tmp_path / "c", change)], lambda line: None)


def test_inputs_alone_are_not_enough(tmp_path):
    def change(io, config):
        for name in list(io):
            if name != "image":
                del io[name]

    lines = []
    assert not parity.run([copy_case(CASES / "titok/two_stage_vq", tmp_path / "c", change)], lines.append)
    assert "nothing was compared" in lines[-1]


def test_wrong_weight_fails(tmp_path):
    folder = copy_case(CASES / "titok/single_stage_vq", tmp_path / "c")
    weights = load_file(folder / "weights.safetensors")
    weights["decoder.ln_post.bias"][3] += 0.01
    save_file(weights, folder / "weights.safetensors")
    assert not parity.run([folder], lambda line: None)


# Cases it cannot replay.


def test_bad_cases_are_named(tmp_path):
    good = CASES / "titok/quantizer_l2"
    bad = {
        "kind": copy_case(good, tmp_path / "a", lambda io, config: config.update(kind="quantiser")),
        "system": copy_case(good, tmp_path / "b", lambda io, config: config.update(system="titak")),
        "names code": copy_case(good, tmp_path / "c", lambda io, config: config.update(_target_="os.system")),
        "lacks the input": copy_case(CASES / "titok/two_stage_vq", tmp_path / "d", lambda io, config: io.pop("image")),
        "cannot be replayed": copy_case(
            good, tmp_path / "e", lambda io, c: io.update({"step0.upstream": torch.ones(7)})
        ),
        "no parity case": tmp_path / "empty",
        "not a folder": tmp_path / "missing",
    }
    (tmp_path / "empty").mkdir()
    for reason, folder in bad.items():
        with pytest.raises(InvalidInput, match=reason):
            parity.run([folder], lambda line: None)
    lines = []
    with pytest.raises(InvalidInput):  # a bad case does not keep the others from running
        parity.run([bad["kind"], good], lines.append)
    assert any(line.startswith("ok") and "quantizer" in line for line in lines)


def test_system_comes_from_the_parent_folder(tmp_path):
    folder = copy_case(CASES / "one_d_piece/lengths", tmp_path / "one_d_piece" / "x", lambda io, c: c.pop("system"))
    assert parity.run([folder], lambda line: None)


def test_a_folder_of_cases(tmp_path):
    copy_case(CASES / "titok/quantizer_l2", tmp_path / "titok" / "a")
    copy_case(CASES / "titok/quantizer_plain", tmp_path / "titok" / "b")
    lines = []
    assert parity.run([tmp_path / "titok"], lines.append)
    assert lines[-1] == "2 of 2 cases pass"


def test_command_line(tmp_path, monkeypatch, capsys):
    from mediatok.convert.parity.__main__ import main

    bad = copy_case(CASES / "titok/quantizer_l2", tmp_path / "bad", lambda io, c: io["step0.indices"].add_(1))
    for folder, code in ((CASES / "titok/quantizer_l2", 0), (bad, 1), (tmp_path / "nowhere", 2)):
        monkeypatch.setattr(sys, "argv", ["parity", str(folder)])
        assert main() == code
        assert len(capsys.readouterr().err.splitlines()) == (1 if code == 2 else 0)
    command = [sys.executable, "-m", "mediatok.convert.parity", str(tmp_path / "nowhere")]
    assert subprocess.run(command, capture_output=True).returncode == 2


# New cases, recorded with the plain model: sizes that no recorded case has.

MODELS = {
    "legacy": {"token_size": 7, "codebook_size": 33, "use_l2_norm": True, "commitment_cost": 0.25},
    "vq": {"token_size": 9, "codebook_size": 50, "use_l2_norm": False, "commitment_cost": 0.25, "is_legacy": False,
           "finetune_decoder": False},
    "vae": {"token_size": 3, "quantize_mode": "vae", "is_legacy": False, "finetune_decoder": False},
}  # fmt: skip
TEXT = {"text_context_length": 4, "text_embed_dim": 6}
PIXEL = {"channel_mult": [1, 2], "hidden_channels": 32, "num_res_blocks": 3, "z_channels": 5, "num_resolutions": 2}


def new_config(kind, model, side=12, patches=(6, 4), tokens=5, encoder=(16, 1, 2), decoder=(24, 4, 3)):
    sizes = [dict(zip(("width", "num_layers", "num_heads"), size, strict=True)) for size in (encoder, decoder)]
    vq = model | {"num_latent_tokens": tokens, "vit_enc_model_size": "large", "vit_dec_model_size": "small"}
    vq |= {"vit_enc_patch_size": patches[0], "vit_dec_patch_size": patches[1]}
    return {
        "kind": kind,
        "official_config": {"model": {"vq_model": vq}, "dataset": {"preprocessing": {"crop_size": side}}},
        "size_overrides": {"encoder": sizes[0], "decoder": sizes[1], "pixel_vqgan": PIXEL},
    }


def save_case(folder, config, weights, io, **files):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in {"weights": weights, "io": io, **files}.items():
        tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    lines = []
    assert parity.run([folder], lines.append), "\n".join(lines)
    return lines


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("kind", "model", "sizes"),
    [
        ("two_stage_vq", MODELS["legacy"], {"side": 8, "patches": (4, 2), "tokens": 11}),
        ("two_stage_vq", MODELS["legacy"], {"side": 6, "patches": (3, 2), "tokens": 2, "encoder": (40, 5, 4)}),
        ("single_stage_vq", MODELS["vq"], {}),
        ("single_stage_vq", MODELS["vq"], {"tokens": 1, "side": 4, "patches": (4, 4)}),
        ("single_stage_vae", MODELS["vae"], {"decoder": (8, 12, 1)}),
        ("tatitok_vq", MODELS["vq"] | TEXT, {}),
        ("tatitok_vae", MODELS["vae"] | TEXT, {"tokens": 13}),
    ],
)
@torch.no_grad()
def test_new_reconstruction_cases(tmp_path, kind, model, sizes, batch):
    config = new_config(kind, model, **sizes)
    w, draw = plain.random_weights(plain.titok_shapes(config), seed=batch), torch.Generator().manual_seed(7)
    side, c, n = sizes.get("side", 12), model["token_size"], sizes.get("tokens", 5)
    io = {"image": torch.rand(batch, 3, side, side, generator=draw)}
    text = torch.randn(batch, 4, 6, generator=draw) if "text_embed_dim" in model else None
    if text is not None:
        io["text_guidance"] = text

    def to_pixels(zq, taps=None):
        out = plain.decode(w, config, zq, text, taps)
        return out if kind != "two_stage_vq" else plain.soft_decode(w, out, PIXEL, taps)

    z = plain.encode(w, config, io["image"], io)
    if "quantize_mode" in model:
        mean, logvar = z.chunk(2, 1)
        io["vae.noise"] = torch.randn(batch, c, 1, n, generator=draw)
        zq = io["vae.sample"] = mean + torch.exp(logvar.clamp(-30, 20) / 2) * io["vae.noise"]
        io["recon_of_mode"] = to_pixels(mean)
    else:
        zq, io["vq.indices"], *_, io["vq.margin"] = plain.quantize(w, z, model["use_l2_norm"])
        ids = io["decode_tokens.in"] = torch.randint(model["codebook_size"], (batch, 1, n), generator=draw)
        io["decode_tokens.out"] = to_pixels(plain.look_up(w, ids[:, 0], model["use_l2_norm"]))
    io["recon"] = to_pixels(zq, io)
    lines = save_case(tmp_path / "titok" / "new", config, w, io)
    assert sum("ok" in line for line in lines) > len(io) - 4


@pytest.mark.parametrize(("batch", "tokens", "lengths"), [(1, 7, (1, 3, 7)), (4, 3, (2,)), (2, 1, (1,))])
@torch.no_grad()
def test_new_length_cases(tmp_path, batch, tokens, lengths):
    config = new_config("lengths", MODELS["legacy"], side=8, patches=(2, 2), tokens=tokens)
    w = plain.random_weights(plain.titok_shapes(config), seed=tokens)
    io = {"image": torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    z = plain.encode(w, config, io["image"], io)
    io["vq.z_quantized"], io["vq.indices"], *_ = plain.quantize(w, z, True)
    for n in lengths:
        taps = {}
        io[f"len{n}.recon"] = plain.soft_decode(
            w, plain.decode(w, config, io["vq.z_quantized"][..., :n], taps=taps), PIXEL
        )
        io |= {f"len{n}.{name}": value for name, value in taps.items()}
        io[f"len{n}.decode_tokens"] = plain.soft_decode(
            w, plain.decode(w, config, plain.look_up(w, io["vq.indices"][:, 0, :n], True)), PIXEL
        )
    save_case(tmp_path / "one_d_piece" / "new", config, w, io)


@pytest.mark.parametrize("system", ["titok", "one_d_piece"])
def test_new_stage1_cases(tmp_path, system):
    model = MODELS["legacy"] | {"finetune_decoder": False, "commitment_cost": 0.25}
    config = new_config("stage1_train", model, side=6, patches=(3, 2), tokens=6)
    config["official_config"]["losses"] = {"quantizer_weight": 0.5}
    w = {k: v.requires_grad_() for k, v in plain.random_weights(plain.titok_shapes(config), seed=5).items()}
    io = {"image": torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(2))}
    vqgan_shapes = plain.vqgan_encoder_shapes("encoder", PIXEL) | plain.vqgan_decoder_shapes("decoder", PIXEL)
    vqgan = plain.random_weights(vqgan_shapes | {"quantize.embedding.weight": (plain.PROXY, 5)}, seed=8)
    codes = io["proxy.codes"] = plain.vqgan_encode(vqgan, io["image"], PIXEL)
    if system == "one_d_piece":  # 3 x 3 patches, whatever the codes stand for
        codes = io["proxy.codes"] = torch.randint(plain.PROXY, (3, 9), generator=torch.Generator().manual_seed(3))
        io |= {"draws.seed": torch.tensor(12), "draws.first7": torch.zeros(7, dtype=torch.int64)}
        torch.manual_seed(12)
        io["draws.first7"] = torch.cat([torch.randint(1, 7, (1,)) for _ in range(7)])
    kept_lengths = {"drop0.": 4, "drop1.": 6, "drop2.": 1} if system == "one_d_piece" else {"": 6}
    for prefix, kept in kept_lengths.items():
        zq, io["vq.indices"], commitment, codebook, _ = plain.quantize(
            w, plain.encode(w, config, io["image"], {}), True
        )
        logits = plain.decode(w, config, zq[..., :kept])
        cross_entropy = F.cross_entropy(logits.flatten(2), codes)
        total = cross_entropy + 0.5 * (commitment + codebook)
        for tensor in w.values():
            tensor.grad = None
        total.backward()
        losses = {"total": total, "reconstruction_loss": cross_entropy, "commitment_loss": commitment}
        io |= {f"{prefix}loss.{name}": loss for name, loss in losses.items()}
        io |= {f"{prefix}grad.{name}": w[name].grad for name in ("latent_tokens", "quantize.embedding.weight")}
        if prefix:
            io |= {f"{prefix}kept": torch.tensor([kept]), f"{prefix}logits": logits}
    save_case(tmp_path / system / "new", config, w, io, **({"maskgit_vqgan": vqgan} if system == "titok" else {}))
