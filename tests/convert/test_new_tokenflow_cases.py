"""New cases of TokenFlow, of sizes that no recorded case has, pass as well; and the keys of its files are checked."""

import hashlib
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
from mediatok.convert import parity, tokenflow_keys, tokenflow_t2i
from mediatok.convert.load import from_official
from mediatok.core.errors import InvalidCheckpoint
from mediatok.core.registry import constructor_arguments, find_entry, model_class
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("plain_tokenflow", Path(__file__).with_name("plain_tokenflow.py"))
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)

SMALL = {
    "teacher": "clipb_224", "enhanced_decoder": False, "infer_interpolate": True, "codebook_size": 23,
    "codebook_embed_dim": 3, "semantic_code_dim": 5, "ch": 32, "enhanced_ch": 64, "ch_mult": [1, 1], "z_channels": 9,
    "sem_width": 24, "sem_heads": 3, "sem_layers": 2, "sem_mlp": 40, "sem_patch": 4, "sem_image_size": 16,
    "sem_dec_width": 12, "sem_dec_heads": 2, "sem_dec_grid": 4, "sem_dec_depth": 1, "sem_dec_out": 7,
    "scales": [1, 2, 4], "image_size": 16,
}  # fmt: skip
SIGLIP = SMALL | {
    "teacher": "siglip_384", "sem_patch": 7, "sem_image_size": 24, "image_size": 24, "sem_dec_grid": 3, "sem_layers": 4,
    "scales": [1, 3], "ch_mult": [1, 2, 1, 1],
}  # fmt: skip


def replay(folder, config, weights, io):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in {"weights": weights, "io": io}.items():
        tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    lines = []
    assert parity.run([folder], lines.append), "\n".join(lines)
    return lines


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({}, 1),
        ({"image_size": 24, "scales": [1, 3, 5, 6], "enhanced_decoder": True, "sem_layers": 1}, 3),  # larger grids
        ({"image_size": 12, "scales": [2, 3]}, 2),  # smaller ones, and no scale of one token
        (SIGLIP, 2),
        (SIGLIP, 3),
    ],
    ids=["same grid", "enhanced", "small grid", "siglip", "siglip with its tail"],
)
@torch.no_grad()
def test_tokenizer(tmp_path, changes, batch):
    constructor = SMALL | changes
    weights = plain.random_weights(plain.tokenizer_shapes(constructor), seed=batch)
    side, sides = constructor["image_size"], constructor["scales"]
    rng = torch.Generator().manual_seed(3)
    io = {"image_u8": torch.randint(256, (batch, 3, side, side), generator=rng, dtype=torch.uint8)}
    h = plain.encode(weights, constructor, io["image_u8"], io)
    io["encode.indices"], total, small, _ = plain.quantize(weights, h, sides)
    io |= {f"encode.scale{k}.residual": z for k, z in zip(sides, small, strict=True)}
    io |= {"encode.quantized": total, "understanding_tokens": total.flatten(2).transpose(1, 2)}
    io["decode.semantic"], io["decode.image"] = plain.decode(weights, constructor, total)
    for k in range(1, len(sides)):
        ids = io["encode.indices"][:, : sum(side**2 for side in sides[:k])]
        io[f"decode_code.first{k}.image"] = plain.decode(weights, constructor, plain.lookup(weights, ids, sides))[1]
    config = {"system": "tokenflow", "kind": "tokenizer", "constructor": constructor}
    used = {"quantize.codebook_used": torch.zeros(8)} if batch == 2 else {}
    if constructor["teacher"] == "siglip_384" and batch == 3:  # what lies behind the layer that is read
        vision = "encoder_vqkd.vision_model."
        used = {f"{vision}{name}.weight": torch.ones(2) for name in ("post_layernorm", "encoder.layers.3.layer_norm1")}
    lines = replay(tmp_path / "tokenflow" / "new", config, weights | used, io)
    assert sum(line.endswith("ok") for line in lines) >= len(io)


@pytest.mark.parametrize("left_out", [None, 1, 2])
def test_training(tmp_path, left_out):
    weights = plain.random_weights(plain.tokenizer_shapes(SMALL), seed=2)
    w = {name: value.clone().requires_grad_() for name, value in weights.items()}
    io = {"image_u8": torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)}
    h = plain.encode(w, SMALL, io["image_u8"], {})
    io["train.a.indices"], total, _, losses = plain.quantize(w, h, SMALL["scales"], left_out)
    io["train.a.quantized"] = total
    semantic, image = plain.decode(w, SMALL, total)
    io["train.a.total"] = losses.sum() + image.square().mean() + semantic.square().mean()
    io["train.a.total"].backward()
    io |= {"train.a.vq_loss": losses[0], "train.a.commit_loss": losses[1]}
    names = ("encoder.conv_in.weight", "quantize.embedding_vqkd.weight", "decoder_vqkd.blocks.0.mlp.fc1.weight")
    io |= {f"train.a.grad.{name}": w[name].grad for name in names}
    config = {"system": "tokenflow", "kind": "tokenizer", "constructor": SMALL, "train": {"drops": {"a": left_out}}}
    replay(tmp_path / "tokenflow" / "new", config, weights, io)


def test_scales(tmp_path):
    sets = {"a": {"scales": [1, 2, 3, 6]}, "b": {"scales": [5]}}
    weights, io, rng = {}, {}, torch.Generator().manual_seed(0)
    for name, settings in sets.items():
        for part, width in (("vqkd", 6), ("vqgan", 2)):
            weights[f"{name}.quantize.embedding_{part}.weight"] = torch.randn(19, width, generator=rng)
        side = settings["scales"][-1]
        io[f"{name}.h"] = torch.randn(2, 8, side, side, generator=rng)
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items()}
        ids, io[f"{name}.quantized"], *_ = plain.quantize(own, io[f"{name}.h"], settings["scales"])
        io[f"{name}.indices"] = ids.int()
    replay(tmp_path / "tokenflow" / "new", {"system": "tokenflow", "kind": "msvq", "sets": sets}, weights, io)


LANGUAGE = {
    "hidden": 24, "mlp": 20, "layers": 3, "heads": 3, "kv_heads": 3, "text_vocab": 11, "text_len": 5, "vocab_size": 35,
    "bos": 1, "pad": 11, "image_token_start": 12, "image_token_end": 34, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "img_tokens": [4, 5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "batch", "lists"),
    [
        ({}, 1, {"topk_list": [9], "topp_list": [0.7]}),
        ({"kv_heads": 1, "rope_theta": 500.0, "layers": 1}, 3, {"topk_list": [40, 1], "topp_list": [0, 0]}),
        ({"hidden": 48, "heads": 4, "kv_heads": 2}, 2, {"topk_list": [12, 5, 1], "topp_list": [0.9, 0.5, 0]}),
    ],
    ids=["one pass", "two passes", "three passes"],
)
@torch.no_grad()
def test_text_to_image(tmp_path, changes, batch, lists):
    language, sides = LANGUAGE | changes, SMALL["scales"]
    given = {
        "width": language["hidden"], "hidden": language["mlp"], "sides": sides, "num_heads": language["heads"],
        "num_kv_heads": language["kv_heads"], "depth": language["layers"], "text_vocab_size": 12, "codebook_size": 23,
        "code_width": 8,
    }  # fmt: skip
    w = plain.random_weights(tokenflow_t2i.official_shapes(given), seed=batch)
    tokenizer = plain.random_weights(plain.tokenizer_shapes(SMALL), seed=7)
    prefix = torch.randint(6, 11, (batch, 7), generator=torch.Generator().manual_seed(1))
    for row, pads in enumerate((2, 0, 3)[:batch]):  # of two, four and one words; the last also pads its beginning
        prefix[row, :pads], prefix[row, pads] = language["pad"], language["bos"]
    prefix[:, 5:] = torch.tensor(language["img_tokens"])
    negative = prefix[0].clone()
    negative[:3], negative[3] = language["pad"], language["bos"]
    io = {"prefix.conditional": prefix, "prefix.unconditional": negative}
    both, rng = torch.cat([prefix, negative.expand_as(prefix)]), torch.Generator().manual_seed(5)
    io |= plain.generate(w, language, tokenizer, sides, both, lists, 3.0, rng, "loop")
    image = plain.decode(tokenizer, SMALL, plain.lookup(tokenizer, io["loop.codes"], sides))[1]
    io["loop.images_u8_bhwc"] = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    config = {
        "system": "tokenflow", "kind": "t2i", "tokenizer_constructor": SMALL, "language_model": language, "cfg": 3.0,
        "sampling": {"loop": lists},
    }  # fmt: skip
    replay(tmp_path / "tokenflow" / "new", config, w | {f"tokenizer.{key}": x for key, x in tokenizer.items()}, io)


# How many keys of the released files count, and a digest of them and their shapes.
MANIFESTS = {
    "tokenflow-b": (648, "4cacd23f269bd0fd"),
    "tokenflow-xl": (818, "86eab1368f3c053b"),
    "tokenflow-t2i": (361, "e2ba2215693f5105"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_released_key_has_its_place(name):
    entry = find_entry(name)
    cls = model_class(entry.class_name)
    given = {key: item.default for key, item in inspect.signature(cls.__init__).parameters.items()}
    given |= constructor_arguments(entry)
    module = tokenflow_t2i if name == "tokenflow-t2i" else tokenflow_keys
    shapes = module.official_shapes(given)
    listing = json.dumps(sorted([key, list(shape)] for key, shape in shapes.items()))
    assert (len(shapes), hashlib.sha256(listing.encode()).hexdigest()[:16]) == MANIFESTS[name]
    if name != "tokenflow-t2i":
        with torch.device("meta"):
            ours = {key: value.shape for key, value in cls(**constructor_arguments(entry)).state_dict().items()}
        weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        assert {key: value.shape for key, value in tokenflow_keys.our_weights(weights).items()} == ours


def test_keys_are_checked_by_their_official_names():
    config = {"constructor": SMALL}
    weights = plain.random_weights(plain.tokenizer_shapes(SMALL), seed=1)
    for key in ("encoder_vqkd.transformer.resblocks.1.attn.in_proj_bias", "decoder.conv_blocks.0.upsample.conv.weight"):
        with pytest.raises(InvalidCheckpoint, match=f"1 differences.*missing {key}"):
            from_official("tokenflow", config, {name: value for name, value in weights.items() if name != key})
    with pytest.raises(InvalidCheckpoint, match=r"unknown encoder\.mystery"):
        from_official("tokenflow", config, weights | {"encoder.mystery": torch.zeros(2)})
    with pytest.raises(InvalidCheckpoint, match="teacher must be one of"):
        from_official("tokenflow", {"constructor": SMALL | {"teacher": "dino"}}, weights)
    with pytest.raises(InvalidCheckpoint, match="no weights of TokenFlow"):
        from_official("tokenflow", {}, {"encoder.conv_in.weight": torch.zeros(2, 3, 3, 3)})


def test_pixels_of_siglip_must_be_scaled_as_known():
    weights = plain.random_weights(plain.tokenizer_shapes(SIGLIP), seed=1)
    weights["scaling_layer.shift"] = torch.full((1, 3, 1, 1), 0.4)
    with pytest.raises(InvalidCheckpoint, match="scaled in an unknown way"):
        from_official("tokenflow", {"constructor": SIGLIP}, weights)


def test_towers_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from mediatok.convert.vision_towers import tower_of

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "patch_size": 4,
    }
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=16)).eval()
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=16)).eval()
    with torch.no_grad():
        hidden = clip(x).last_hidden_state[:, 1:]
        norm = next(module for name, module in clip.named_modules() if name.endswith("post_layernorm"))
        ours = tower_of("clip", sizes, clip.state_dict())(x)
        torch.testing.assert_close(ours, norm(hidden), atol=1e-5, rtol=1e-5)
        expected = siglip(x, output_hidden_states=True).hidden_states[-2]
        state_dict = {key: value for key, value in siglip.state_dict().items() if ".head." not in f".{key}"}
        torch.testing.assert_close(tower_of("siglip", sizes, state_dict)(x), expected, atol=1e-5, rtol=1e-5)
