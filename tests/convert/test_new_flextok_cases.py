"""New cases of FlexTok and FlexAR, recorded with the plain models, of sizes that no recorded case has."""

import importlib.util
import json
import sys
from pathlib import Path

import mediatok as mt
import pytest
import torch
import torch.nn.functional as F
from mediatok.convert import from_official, is_official_folder, parity
from mediatok.convert.flextok import vae_shapes
from mediatok.core.errors import InvalidCheckpoint, ModelNotFound
from mediatok.nn.gaussian import DiagonalGaussian
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("plain_flextok", Path(__file__).with_name("plain_flextok.py"))
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


def replay(folder, config, weights, io):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in {"weights": weights, "io": io}.items():
        if tensors:
            tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
            save_file(tensors, folder / f"{name}.safetensors")
    lines = []
    assert parity.run([folder], lines.append), "\n".join(line for line in lines if not line.endswith(" ok"))


def without_ties(model, latents, rng):
    """Latents whose values are not near the middle between two levels, where rounding decides."""
    for _ in range(200):
        z = model.encode(latents)
        if model.quantize(z)[2] > 1e-4:
            return latents
        latents = torch.randn(latents.shape, generator=rng)
    raise AssertionError("no latents without ties")


SIZES = [
    # encoder, decoder (width, depth, head width), grid, registers, latents, batch, time unit, channels, patch
    ((32, 2, 16), (48, 3, 24), (4, 4), 5, (8, 8), 2, 1.0, 16, 2),
    ((64, 1, 64), (64, 1, 64), (3, 5), 12, (6, 8), 1, 1000.0, 4, 2),  # a grid that is not square, and a part of it
    ((24, 1, 8), (40, 2, 20), (4, 4), 33, (4, 3), 3, 100.0, 3, 1),
]


@pytest.mark.parametrize(
    ("encoder", "decoder", "grid", "registers", "size", "batch", "unit", "channels", "patch"), SIZES
)
def test_resampler(tmp_path, encoder, decoder, grid, registers, size, batch, unit, channels, patch):
    config = plain.config(encoder, decoder, grid, registers, channels, patch, unit)
    w = plain.random_weights(plain.shapes(encoder, decoder, grid, registers, channels, patch), seed=registers)
    model = plain.Plain(w, (encoder[2], decoder[2]), patch, unit)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        latents = without_ties(model, torch.randn(batch, channels, *size, generator=rng), rng)
        noise, z = torch.randn(latents.shape, generator=rng), model.encode(latents)
        codes, ids, _ = model.quantize(z)
        t = torch.linspace(0.1, 0.9, batch)
        xt = t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * latents
        io = {"latents": latents, "noise": noise, "encode.z": z, "encode.quant": codes, "encode.tokens": ids,
              "dec.timesteps": t, "dec.xt": xt}  # fmt: skip
        kept, none = torch.full((batch,), registers), torch.zeros(batch, dtype=torch.bool)
        io |= {"dec_full.v": model.decode(xt, t, codes, kept, none)}
        io |= {"dec_uncond.v": model.decode(xt, t, codes, kept, ~none)}
        for k in (1, registers // 2, registers - 1):
            io[f"encode_k{k}.tokens"] = ids[:, :k]
            io[f"dec_k{k}.v"] = model.decode(xt, t, codes, torch.full((batch,), k), none)
        mixed = torch.arange(batch) % registers + 1
        io |= {"encode_mixed.register_sizes": mixed}
        io |= {f"encode_mixed.tokens.{row}": ids[row, None, :k] for row, k in enumerate(mixed.tolist())}
        io |= {"pipe.keep_k": mixed, "pipe.timesteps": torch.tensor(3)}
        for name, scale, projected in (("plain", 1.0, False), ("cfg", 3.0, False), ("apg", 7.5, True),
                                       ("cfg_sched", lambda t: 1 + 4 * t, False)):  # fmt: skip
            io[f"pipe_{name}.latents"] = model.flow(noise, codes, mixed, 3, scale, projected)
    for tensor in w.values():
        tensor.requires_grad_()
    null = torch.arange(batch) % 2 == 1
    codes, *_ = model.quantize(model.encode(latents))
    v = model.decode(xt, t, codes, mixed, null)
    losses = (v - (noise - latents)).square().mean((1, 2, 3))
    losses.mean().backward()
    io |= {"train.noise": noise, "train.sigmas": t, "train.keep_k": mixed, "train.null": null, "train.v": v}
    io |= {"train.loss": losses.mean(), "train.loss_per_sample": losses}
    for name in ("decoder.module_dict.dec_nested_dropout.dropout_mask_token",
                 "encoder.module_dict.enc_transformer.blocks.0.attn.wv.weight",
                 "decoder.module_dict.dec_transformer.blocks.0.mlp.fc3.weight",
                 "decoder.module_dict.dec_registers_posemb_module.posembs",
                 "decoder.module_dict.dec_transformer.blocks.0.adaLN_modulation.1.bias"):  # fmt: skip
        io[f"train.grad.{name}"] = torch.zeros_like(w[name]) if w[name].grad is None else w[name].grad
    case = {"system": "flextok", "kind": "resampler", "config": config}
    replay(tmp_path / "flextok" / "new", case, {k: v.detach() for k, v in w.items()}, io)


def vae_weights(channels=16, seed=3):
    arguments = {"latent_channels": channels, "vae_channels": tuple(plain.VAE["block_out_channels"]), "vae_layers": 1,
                 "vae_norm_groups": 4}  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in vae_shapes(arguments).items():
        x = torch.randn(shape, generator=rng)
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = 1 + 0.1 * x if is_norm else x * (0.7 * x[0].numel() ** -0.5 if x.ndim > 1 else 0.1)
    return weights


ENCODER, DECODER, GRID, REGISTERS = (32, 1, 16), (32, 2, 32), (2, 2), 6
CONFIG = plain.config(ENCODER, DECODER, GRID, REGISTERS)
WEIGHTS = plain.random_weights(plain.shapes(ENCODER, DECODER, GRID, REGISTERS), seed=1) | vae_weights()


def test_full(tmp_path):
    from mediatok.convert.flextok import from_official

    model, rng = plain.Plain(WEIGHTS, (16, 32)), torch.Generator().manual_seed(2)
    vae = from_official(CONFIG, WEIGHTS).vae
    with torch.no_grad():
        for _ in range(100):
            images = torch.rand(2, 3, 32, 32, generator=rng) * 2 - 1
            posterior = DiagonalGaussian(vae.encode_moments((images + 1) / 2))
            noise = torch.randn(posterior.mean.shape, generator=rng)
            latents = (posterior.mean + posterior.std * noise) * 0.5
            codes, ids, margin = model.quantize(model.encode(latents))
            if margin > 1e-3:
                break
        lengths = torch.tensor([6, 2])
        padded = torch.where(torch.arange(6) < lengths[:, None], ids, 0)
        codes = from_official(CONFIG, WEIGHTS).quantize.lookup(padded)
        start = torch.randn(latents.shape, generator=rng)
        io = {"images": images, "vae.posterior_noise": noise, "vae.latents": latents, "tokens": ids,
              "encode.z": model.encode(latents), "detok.lengths": lengths, "detok.quant_padded": codes,
              "detok.noise": start, "detok.timesteps": torch.tensor(3)}  # fmt: skip
        for name, scale, projected in (("plain", 1.0, False), ("apg", 7.5, True)):
            decoded = vae.decode_latents(model.flow(start, codes, lengths, 3, scale, projected))
            io[f"detok_{name}.images"] = decoded * 2 - 1
    replay(tmp_path / "flextok" / "full", {"system": "flextok", "kind": "full", "config": CONFIG}, WEIGHTS, io)


def test_vae(tmp_path):
    weights = vae_weights()
    vae = from_official("flextok", CONFIG, WEIGHTS).vae
    images = torch.rand(1, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        posterior = DiagonalGaussian(vae.encode_moments((images + 1) / 2))
        noise = torch.randn(posterior.mean.shape)
        kl = 0.5 * (0.25 * posterior.mean.square() + posterior.std.square() - 1 - posterior.logvar).sum((1, 2, 3))
        io = {"images": images, "posterior_noise": noise, "latents_mode": posterior.mean * 0.5, "kl": kl,
              "latents_sampled": (posterior.mean + posterior.std * noise) * 0.5,
              "reconstruction": vae.decode_latents(posterior.mean * 0.5) * 2 - 1}  # fmt: skip
    config = {"latent_channels": 16, "scaling_factor": 0.5, "base_config_overrides": plain.VAE}
    weights = {key.removeprefix("vae."): value for key, value in weights.items()}
    replay(tmp_path / "flextok" / "vae", {"kind": "vae", "config": config}, weights, io)


AR = {
    "text": {"embed_dim": 24, "num_heads": 2, "num_blocks": 3, "codebook_size": 50, "num_tokens": 9, "norm": "rms",
             "qk_norm": False, "use_bias": False, "post_trunk_norm": False, "head_norm": True, "text_dim": 10},
    "class": {"embed_dim": 32, "num_heads": 4, "num_blocks": 1, "codebook_size": 40, "num_tokens": 7, "norm": "layer",
              "qk_norm": True, "use_bias": True, "post_trunk_norm": True, "head_norm": False, "num_classes": 5},
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["text", "class"])
@torch.no_grad()
def test_flexar(tmp_path, kind, batch):
    config, rng = AR[kind], torch.Generator().manual_seed(batch)
    w = plain.random_weights(plain.ar_shapes(config), seed=batch)
    model, n = plain.PlainAR(w, config), config["num_tokens"]
    ids = torch.randint(config["codebook_size"], (batch, n), generator=rng)
    labels, given, nothing, io = None, {}, {}, {}
    if kind == "text":
        mask = (torch.arange(6) < torch.randint(1, 7, (batch, 1), generator=rng)).long()
        states, null = torch.randn(batch, 6, 10, generator=rng), torch.randn(6, 10, generator=rng)
        null_mask = (torch.arange(6) < 1).long()
        io = {"text_states": states, "text_mask": mask, "null_text_states": null, "null_text_mask": null_mask}
        given = {"text": states, "mask": mask}
        nothing = {"text": null.expand(batch, -1, -1), "mask": null_mask.expand(batch, -1)}
    else:
        labels = torch.randint(5, (batch,), generator=rng)
        io = {"labels": labels}
        given, nothing = {"labels": labels}, {"labels": torch.full_like(labels, -1)}
    logits = model.logits(ids[:, :-1], **given)
    io |= {"ids": ids, "logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), ids.flatten())}
    runs = {"greedy": {}, "greedy_cfg": {"cfg": 2.5}, "sample_k": {"top_k": 5, "temperature": 0.7, "cfg": 1.5},
            "sample_p": {"top_p": 0.6}}  # fmt: skip
    for name, options in runs.items():
        draws, made, steps = torch.Generator().manual_seed(8), torch.zeros(batch, 0, dtype=torch.long), []
        other = dict(nothing)
        for _ in range(5):
            row = model.logits(made, **given)[:, -1]
            recorded = [row]
            if "cfg" in options:
                u = model.logits(made, **other)[:, -1]
                recorded.append(u)
                row = u + options["cfg"] * (row - u)
                if kind == "class":
                    other = {"labels": torch.zeros_like(labels)}  # the official code's slip
            steps.append(torch.cat(recorded))
            row = row / options.get("temperature", 1.0)
            if "top_k" in options:
                row = row.masked_fill(row < row.topk(options["top_k"]).values[:, -1:], float("-inf"))
            if "top_p" in options:
                low, order = row.sort()
                low = low.masked_fill(low.softmax(-1).cumsum(-1) <= 1 - options["top_p"], float("-inf"))
                row = torch.empty_like(row).scatter(1, order, low)
            drawn = row.argmax(-1, True) if "greedy" in name else torch.multinomial(row.softmax(-1), 1, generator=draws)
            made = torch.cat([made, drawn], 1)
        io |= {f"gen_{name}.ids": made, f"gen_{name}.step_logits": torch.stack(steps, 1)}
    case = {"system": "flextok", "kind": f"ar_{kind}", "config": config}
    replay(tmp_path / "flextok" / "ar", case | {"notes": {"generator_seed": 8, "generation": runs}}, w, io)


# Releases.


def header(config):
    return {name: repr(section) for name, section in config.items()}


@pytest.mark.parametrize("layout", ["config.json", "below config", "header", "file"])
def test_released_layouts(tmp_path, layout):
    save_file(WEIGHTS, tmp_path / "model.safetensors", header(CONFIG) if layout in ("header", "file") else None)
    if layout in ("config.json", "below config"):
        config = {"config": CONFIG} if layout == "below config" else CONFIG
        (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors" if layout == "file" else tmp_path
    assert is_official_folder(path)
    tokenizer = mt.load(path)
    assert (type(tokenizer).__name__, tokenizer.max_tokens, tokenizer.image_size) == ("FlexTok", 6, 32)
    tokenizer.save_pretrained(tmp_path / "ours")
    assert mt.load(tmp_path / "ours").fingerprint == tokenizer.fingerprint


def test_released_generator(tmp_path):
    config = AR["class"]
    w = plain.random_weights(plain.ar_shapes(config), seed=1)
    save_file(w | {"models.image_tokenizer.x": torch.ones(1)}, tmp_path / "model.safetensors")
    target = {"_target_": "l3m.model.meta_models.MetaModel", "num_heads": 4}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"meta_model": target}, "generation": {}}))
    model = mt.load(tmp_path)
    assert (type(model).__name__, model.num_units, model.config.num_heads) == ("NextToken", 7, 4)
    with pytest.raises(InvalidCheckpoint, match="missing"):
        from_official("flextok", {}, {k: v for k, v in w.items() if "fc2" not in k})
    with pytest.raises(InvalidCheckpoint, match="unknown"):
        from_official("flextok", {}, w | {plain.AR + "trunk.extra.weight": torch.ones(1)})


def changed(path, value):
    config = json.loads(json.dumps(CONFIG))
    *parents, last = path.split("/")
    section = config
    for name in parents:
        section = section[name]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return config


BAD = {
    "names code": ("encoder/module_dict/enc_transformer/_target_", "os.system"),
    "a FlexTransformer can be converted": ("encoder/module_dict/enc_transformer/_target_", "flextok.model.Other"),
    "max_timestep": ("decoder/module_dict/dec_time_embedder/max_timestep", None),
    "scaling_factor": ("vae/scaling_factor", None),
    "mask_mode": ("encoder/module_dict/enc_seq_packer/mask_mode", "causal"),
    "use_mup_readout": ("decoder/module_dict/dec_to_patches/use_mup_readout", True),
    "not known here": ("encoder/module_dict/enc_extra", {"_target_": "flextok.model.Extra"}),
    "the weights do not fit": ("decoder/module_dict/dec_transformer/depth", 3),
    "levels": ("regularizer/levels", [1, 8, 8, 5, 5, 5]),
    "must be a whole number": ("encoder/module_dict/enc_transformer/dim", 10**9),
    "differ within the config": ("decoder/module_dict/dec_registers_posemb_module/max_sizes", [7]),
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("place", ["config.json", "header"])
def test_bad_configs_are_named(tmp_path, reason, place):
    config = changed(*BAD[reason])
    save_file(WEIGHTS, tmp_path / "model.safetensors", header(config) if place == "header" else None)
    if place == "config.json":
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((InvalidCheckpoint, mt.InvalidInput), match=reason):
        mt.load(tmp_path)


@pytest.mark.parametrize("place", ["config.json", "header"])
@pytest.mark.parametrize("at", ["encoder", "vae", "regularizer", "decoder/module_dict/dec_transformer"])
@pytest.mark.parametrize("key", ["_target_", "_partial_", "_args_", "__class__"])
def test_named_code_is_not_imported(tmp_path, monkeypatch, place, at, key):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    config = changed(f"{at}/{key}", "evil.Evil")
    save_file(WEIGHTS, tmp_path / "model.safetensors", header(config) if place == "header" else None)
    if place == "config.json":
        (tmp_path / "config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidCheckpoint, match=rf"{at.replace('/', '.')}\.{key}' names code.*evil.*read as data only"):
        mt.load(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert "evil" not in sys.modules


def test_bad_weights_are_named(tmp_path):
    lost = {key: value for key, value in WEIGHTS.items() if not key.endswith("attn.wk.weight")}
    with pytest.raises(InvalidCheckpoint, match=r"missing encoder.module_dict.enc_transformer.blocks.0.attn.wk.weight"):
        from_official("flextok", CONFIG, lost)
    with pytest.raises(InvalidCheckpoint, match=r"unknown encoder.registers"):
        from_official("flextok", CONFIG, WEIGHTS | {"encoder.registers": torch.ones(1)})
    from_official("flextok", CONFIG, WEIGHTS | {"decoder.module_dict.dec_repa_head.weight": torch.ones(1)})
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFound, match=r"no config"):
        mt.load(tmp_path)
    save_file(WEIGHTS, tmp_path / "model.safetensors", header(CONFIG) | {"vae": "__import__('os').mkdir('x')"})
    with pytest.raises(InvalidCheckpoint, match="no plain value"):
        mt.load(tmp_path)
