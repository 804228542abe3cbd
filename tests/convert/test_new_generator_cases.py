"""New cases of the generators and the KL autoencoder, of sizes that no recorded case has, pass as well."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from mediatok.convert import parity
from mediatok.convert.load import from_official
from mediatok.convert.parity.recipe_weights import recipe_tensor
from mediatok.core.errors import InvalidCheckpoint
from safetensors.torch import save_file


def load_beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = load_beside("plain_generators")
titok = load_beside("plain_titok")


def draw_weights(shapes, seed):
    """As the recorded cases have them: no bias, norm or table is trivial."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(*shape, generator=rng)
        if len(shape) == 1:
            weights[name] = 1 + 0.2 * x if name.endswith("weight") else 0.1 * x
        elif ("embed" in name and "mlp" not in name) or "class_emb" in name:
            weights[name] = 0.5 * x
        else:
            weights[name] = x / shape[-1] ** 0.5
    return weights


def replay(folder, config, weights, io, **files):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in {"weights": weights, "io": io, **files}.items():
        if tensors:
            tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
            save_file(tensors, folder / f"{name}.safetensors")
    lines = []
    assert parity.run([folder], lines.append), "\n".join(lines)
    return lines


@pytest.mark.parametrize(
    ("grid", "side", "width", "depths", "heads", "batch", "steps", "guidance", "is_sde"),
    [
        (12, 4, 48, (1, 3), 3, 1, 4, 3.5, True),  # nine cells
        (12, 4, 48, (2, 1), 4, 3, 3, 1.7, False),
        (6, 3, 72, (3, 1), 6, 2, 7, 0.5, True),  # less than no guidance
        (6, 2, 24, (1, 1), 1, 2, 3, 1.0, False),
        (4, 1, 16, (1, 1), 2, 1, 3, 5.0, True),  # cells of one token
        (16, 8, 160, (1, 1), 2, 1, 3, 2.2, True),  # head size 80
    ],
)
def test_xar_sampling(tmp_path, grid, side, width, depths, heads, batch, steps, guidance, is_sde):
    config = plain.xar_config("sampling", grid, side, width, depths, heads, num_steps=steps, cfg=guidance)
    config["sampler"] = "euler_maruyama_sampler" if is_sde else "euler_sampler"
    weights, rng = draw_weights(plain.xar_shapes(config), seed=grid), torch.Generator().manual_seed(3)
    cells, length = (grid // side) ** 2, side**2
    starts = torch.randn(cells, batch, length, 16, generator=rng)
    eps = torch.randn(cells, steps - 1, batch, length, 16, generator=rng) if is_sde else None
    labels = torch.randint(1000, (batch,), generator=rng)
    replay(tmp_path / "xar" / "new", config, weights, plain.xar_sampling(weights, config, labels, starts, eps))


@pytest.mark.parametrize(
    ("grid", "side", "width", "depths", "heads", "batch", "classes", "channels"),
    [(12, 4, 48, (1, 3), 3, 4, 1000, 16), (12, 2, 40, (3, 1), 2, 1, 7, 5), (16, 8, 32, (1, 1), 8, 2, 1000, 16)],
)
def test_xar_training(tmp_path, grid, side, width, depths, heads, batch, classes, channels):
    config = plain.xar_config("training_loss", grid, side, width, depths, heads, classes, channels)
    weights = {k: v.requires_grad_() for k, v in draw_weights(plain.xar_shapes(config), seed=grid).items()}
    rng, cells = torch.Generator().manual_seed(5), (grid // side) ** 2
    io = plain.xar_training(
        weights, config, torch.randn(batch, channels, grid, grid, generator=rng),
        torch.randint(classes, (batch,), generator=rng), torch.linspace(0.05, 0.9, batch),
        torch.randn(cells * batch, generator=rng), torch.randn(cells, batch, side**2, channels, generator=rng),
    )  # fmt: skip
    replay(tmp_path / "xar" / "new", config, weights, io)


def test_xar_without_stored_weights_and_with_little_recorded(tmp_path):
    config = plain.xar_config("sampling", 6, 3, 24, (1, 2), 3, classes=8, num_steps=3, cfg=2.0, weights_recipe_seed=4)
    weights = {name: recipe_tensor(name, shape, 4) for name, shape in plain.xar_shapes(config).items()}
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 1, 9, 16, generator=rng), torch.randn(4, 2, 1, 9, 16, generator=rng)
    io = plain.xar_sampling(weights, config, torch.tensor([5]), *noise)
    replay(tmp_path / "xar" / "a", config, {}, io)
    del config["geometry"]
    few = {name: value for name, value in io.items() if name.startswith("in.") or name == "out.latent_map"}
    replay(tmp_path / "xar" / "b", config, {}, few)
    lost = {name: value for name, value in io.items() if name not in ("mid.x", "out.cells")}
    replay(tmp_path / "xar" / "c", config, {}, lost)


def test_xar_with_stacks_of_other_heads_is_refused(tmp_path):
    config = plain.xar_config("sampling", 6, 3, 24, (1, 2), 3)
    config["constructor"]["decoder_num_heads"] = 2
    with pytest.raises(InvalidCheckpoint, match="same width and heads"):
        from_official("xar", config, draw_weights(plain.xar_shapes(config), seed=1))


def test_xar_keys_are_checked_by_their_official_names():
    config = plain.xar_config("sampling", 6, 3, 24, (1, 2), 3)
    weights = draw_weights(plain.xar_shapes(config), seed=1)
    for key in ("encoder_blocks.0.mlp.fc1_x.weight", "decoder_blocks.1.ada_lin.1.bias", "z_proj_ln.weight"):
        with pytest.raises(InvalidCheckpoint, match=f"1 differences.*missing {key}"):
            from_official("xar", config, {name: value for name, value in weights.items() if name != key})
    with pytest.raises(InvalidCheckpoint, match="unknown z_norm"):  # our own name is no official one
        from_official("xar", config, weights | {"z_norm": weights["z_proj_ln.weight"]})


SCHEDULES = {
    "a": {"guidance_scale": 2.0, "guidance_decay": "constant", "num_sample_steps": 3, "randomize_temperature": 1.5},
    "b": {"guidance_scale": 5.5, "guidance_decay": "linear", "num_sample_steps": 5, "randomize_temperature": 3.0},
    "c": {"guidance_scale": 4.0, "guidance_decay": "power-cosine", "guidance_scale_pow": 1.5, "num_sample_steps": 7,
          "softmax_temperature_annealing": True},
    "d": {"guidance_scale": 1.0, "guidance_decay": "power-cosine", "num_sample_steps": 2},
    "e": {"guidance_scale": 0.0, "guidance_decay": "linear", "num_sample_steps": 2, "randomize_temperature": 0.0},
    "f": {"guidance_decay": "linear", "num_sample_steps": 1},
    "g": {},
    "more steps than tokens": {"num_sample_steps": 20, "guidance_decay": "power-cosine"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "sizes", "batch"),
    [
        ("vit", (50, 9, 32, 1, 2, 40, 3), 1),
        ("vit", (33, 20, 60, 4, 5, 100, 25), 3),
        ("uvit", (40, 7, 24, 3, 3, 30, 5), 1),  # an odd depth
        ("uvit", (70, 24, 40, 6, 2, 64, 12), 3),
        ("uvit", (20, 1, 16, 1, 1, 16, 2), 2),  # one token, one block
    ],
)
@torch.no_grad()
def test_maskgit(tmp_path, kind, sizes, batch):
    config = plain.maskgit_config(kind, *sizes, generate=SCHEDULES)
    official, (codes, tokens, *_, classes) = config["official_config"], sizes
    weights = draw_weights(plain.maskgit_shapes(official), seed=tokens)
    rng, taps = torch.Generator().manual_seed(11), {}
    labels, ids = (
        torch.randint(classes, (batch,), generator=rng),
        torch.randint(codes + 1, (batch, tokens), generator=rng),
    )
    io = {"labels": labels, "forward.ids": ids, "forward.drop_u": torch.linspace(0.2, 0.8, batch)}
    none = torch.full_like(labels, classes)
    io["forward.logits_cond"] = plain.maskgit_logits(weights, official, ids, labels, taps)
    io["forward.logits_uncond"] = plain.maskgit_logits(weights, official, ids, none)
    dropped = torch.where(io["forward.drop_u"] < 0.5, none, labels)
    io["forward.logits_drop50"] = plain.maskgit_logits(weights, official, ids, dropped)
    io |= {f"forward.{name}": value for name, value in taps.items()}
    for name, arguments in SCHEDULES.items():
        made = plain.maskgit_sampling(weights, official, labels, rng, arguments)
        io |= {f"gen.{name}.{key}": value for key, value in made.items()}
    replay(tmp_path / "maskgit" / "new", config, weights, io)


PIXEL = {"channel_mult": [1, 2, 1], "hidden_channels": 32, "num_res_blocks": 1, "z_channels": 6, "num_resolutions": 3}


@pytest.mark.parametrize(
    ("network", "is_legacy", "side", "patch", "batch", "sampling"),
    [
        ("vit", True, 16, 4, 1, {"guidance_scale": 2.5, "guidance_decay": "power-cosine", "num_sample_steps": 5}),
        ("uvit", True, 12, 4, 3, {"guidance_scale": 7.0, "guidance_decay": "linear", "num_sample_steps": 3}),
        ("vit", False, 12, 6, 2, {"num_sample_steps": 4, "softmax_temperature_annealing": True}),
    ],
)
@torch.no_grad()
def test_end_to_end(tmp_path, network, is_legacy, side, patch, batch, sampling):
    generator = plain.maskgit_config(network, 37, 6, 30, 2, 3, 50, 9)["official_config"]
    vq = {"token_size": 8, "codebook_size": 37, "use_l2_norm": is_legacy, "is_legacy": is_legacy,
          "commitment_cost": 0.25, "finetune_decoder": is_legacy, "num_latent_tokens": 6, "vit_enc_model_size": "large",
          "vit_dec_model_size": "base", "vit_enc_patch_size": patch, "vit_dec_patch_size": patch}  # fmt: skip
    sizes = [{"width": 20, "num_layers": 1, "num_heads": 2}, {"width": 28, "num_layers": 3, "num_heads": 4}]
    tokenizer = {
        "official_config": {"model": {"vq_model": vq}, "dataset": {"preprocessing": {"crop_size": side}}},
        "size_overrides": {"encoder": sizes[0], "decoder": sizes[1], "pixel_vqgan": PIXEL},
    }
    config = {"system": "maskgit", "kind": "end_to_end", "generator": generator, "tokenizer": tokenizer}
    config["sample_fn"] = sampling
    w = draw_weights(plain.maskgit_shapes(generator), seed=side)
    kind = "two_stage_vq" if is_legacy else "single_stage_vq"
    v = titok.random_weights(titok.titok_shapes(tokenizer | {"kind": kind}), seed=2)
    rng = torch.Generator().manual_seed(4)
    labels = torch.randint(9, (batch,), generator=rng)
    made = plain.maskgit_sampling(w, generator, labels, rng, sampling)
    io = {"labels": labels} | {name: made[name] for name in ("u_tokens", "u_confidence", "ids")}
    image = titok.decode(v, tokenizer, titok.look_up(v, io["ids"], is_legacy))
    io["image"] = titok.soft_decode(v, image, PIXEL) if is_legacy else image
    io["image_uint8"] = (io["image"].clamp(0, 1) * 255).permute(0, 2, 3, 1).to(torch.uint8)
    replay(tmp_path / "maskgit" / "new", config, w, io, tokenizer=v)


@pytest.mark.parametrize("kind", ["vit_train", "uvit_train"])
@pytest.mark.parametrize(("sizes", "batch"), [((50, 9, 32, 1, 2, 40, 3), 1), ((33, 20, 60, 5, 5, 100, 25), 5)])
def test_maskgit_training(tmp_path, kind, sizes, batch):
    config = plain.maskgit_config(kind, *sizes)
    official, (codes, tokens, *_, classes) = config["official_config"], sizes
    official["losses"] = {"label_smoothing": 0.0, "loss_weight_unmasked_token": 0.3}
    weights = {k: v.requires_grad_() for k, v in draw_weights(plain.maskgit_shapes(official), seed=3).items()}
    rng = torch.Generator().manual_seed(12)
    io = plain.maskgit_training(
        weights, official, torch.randint(codes, (batch, tokens), generator=rng),
        torch.randint(classes, (batch,), generator=rng), torch.linspace(0.05, 0.9, batch),
        torch.linspace(0.03, 0.999, batch), torch.rand(batch, tokens, generator=rng),
    )  # fmt: skip
    replay(tmp_path / "maskgit" / "new", config, weights, io)


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        ((32, [1, 2, 3], 1, [8], 32, 5), [(1, 20, 12), (2, 16, 16), (3, 21, 9)]),
        ((64, [1, 1, 2], 3, [32], 32, 3), [(1, 8, 8)]),  # attention at the finest level alone
        ((32, [1, 2, 2, 1], 2, [16, 8], 64, 8), [(2, 16, 24)]),  # at two levels
        ((32, [1, 2], 1, [], 32, 4), [(1, 8, 8)]),  # at none
        ((32, [1, 2], 1, [128, 64], 256, 4), [(1, 8, 8)]),  # at sides that never occur
        ((32, [1], 2, [16], 16, 2), [(1, 6, 5)]),  # one level
        ((32, [1, 2, 1], 1, [7], 30, 2), [(1, 9, 14)]),  # a nominal side that is no multiple
    ],
)
def test_kl_autoencoder(tmp_path, architecture, shapes):
    config, rng = plain.kl_config(*architecture, scale=0.4), torch.Generator().manual_seed(9)
    images = [torch.rand(b, 3, h, w, generator=rng) * 2 - 1 for b, h, w in shapes]
    weights, io = plain.kl_case(config, images, rng)
    replay(tmp_path / "kl16_vae" / "new", config, weights, io)
