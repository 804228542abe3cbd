"""SEED's release: a folder as the hub has it, the vision tower beside it or in a BLIP-2 checkpoint."""

import importlib.util
import json
from pathlib import Path

import mediatok as mt
import pytest
import torch
from mediatok.convert import is_official_folder, seed
from mediatok.core.errors import InvalidCheckpoint, ModelNotFound
from mediatok.core.registry import find_entry
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("plain_seed", Path(__file__).with_name("plain_seed.py"))
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)

# Widths of which heads follow as in the release: 88 and 64 a head, 12 heads behind the codes.
ARCH = plain.arch(hidden=192, heads=3, layers=2, vit_dim=88, vit_heads=1, vit_depth=1)


@pytest.fixture(scope="module")
def weights():
    return plain.random_weights(plain.tokenizer_shapes(ARCH), 4)


def split(weights):
    tower = {key: value for key, value in weights.items() if key.startswith("visual_encoder.")}
    return {key: value for key, value in weights.items() if key not in tower}, tower


def write_release(folder, weights, **extra):
    own, _ = split(weights)
    position_ids = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save(own | position_ids | extra, folder / "seed_quantizer.pt")


def write_tower(folder, weights):
    """In half precision, with the last block and the head of EVA, which BLIP-2 leaves out."""
    tower = {key.removeprefix("visual_encoder."): value.half() for key, value in split(weights)[1].items()}
    rest = {"blocks.39.norm1.weight": torch.ones(88).half(), "norm.weight": torch.ones(88).half()}
    torch.save(tower | rest, folder / "eva_vit_g.pth")


def test_release(tmp_path, weights):
    left_over = {"blocks_text.0.norm1.weight": torch.ones(3), "distill_text_proj.bias": torch.ones(2)}
    write_release(tmp_path, weights, **left_over)
    write_tower(tmp_path, weights)
    assert is_official_folder(tmp_path)
    ours = seed.from_official({"arch": ARCH}, weights)
    pixels = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for path in (tmp_path, tmp_path / "seed_quantizer.pt"):
        model = mt.load(path)
        assert model.name == "seed-2"
        assert dict(model.config)["vision_heads"] == 1
        ids = model.encode_pixels(pixels)
        assert (ids == ours.encode_pixels(pixels)).float().mean() > 0.8  # the tower is rounded
        torch.testing.assert_close(model.decode_embedding(ids), ours.decode_embedding(ids))


def test_tower_of_a_blip2_checkpoint(tmp_path, weights):
    write_release(tmp_path, weights)
    names = {"attn.proj": "self_attn.projection", "attn.qkv": "self_attn.qkv", "norm1": "layer_norm1",
             "norm2": "layer_norm2", "patch_embed.proj": "embeddings.patch_embedding",
             "cls_token": "embeddings.class_embedding", "blocks": "encoder.layers"}  # fmt: skip
    tower = {}
    for key, value in split(weights)[1].items():
        name = key.removeprefix("visual_encoder.").replace("pos_embed", "embeddings.position_embedding")
        for old, new in names.items():
            name = name.replace(old, new)
        tower[f"vision_model.{name}"] = value
    bias = [tower.pop(f"vision_model.encoder.layers.0.attn.{part}_bias") for part in "qv"]
    tower["vision_model.encoder.layers.0.self_attn.qkv.bias"] = torch.cat([bias[0], torch.zeros(88), bias[1]])
    tower |= {"vision_model.post_layernorm.weight": torch.zeros(88), "language_model.x": torch.ones(1)}
    (tmp_path / "blip2").mkdir()
    save_file({key: value.contiguous() for key, value in tower.items()}, tmp_path / "blip2" / "model.safetensors")
    model, ours = mt.load(tmp_path), seed.from_official({"arch": ARCH}, weights)
    for name, value in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_missing_tower_says_which_file(tmp_path, weights):
    write_release(tmp_path, weights)
    with pytest.raises(ModelNotFound, match=r"eva_vit_g\.pth.*storage\.googleapis\.com.*blip2"):
        mt.load(tmp_path)


def test_bad_release(tmp_path, weights):
    write_tower(tmp_path, weights)
    own, _ = split(weights)
    del own["image_down.2.weight"]
    write_release(tmp_path, own)
    with pytest.raises(InvalidCheckpoint, match=r"image_down\.2\.weight"):
        mt.load(tmp_path)
    torch.save({"weights": [1, 2]}, tmp_path / "seed_quantizer.pt")
    with pytest.raises(InvalidCheckpoint):
        mt.load(tmp_path)


def test_entries():
    with torch.device("meta"):
        model = mt.Seed()
    assert sum(parameter.numel() for parameter in model.parameters()) == find_entry("seed-2").parameters
    names = [entry.name for entry in mt.models() if entry.class_name == "SeedLLaMA"]
    assert len(names) == 4
    assert json.dumps(names).count("14b") == 2
