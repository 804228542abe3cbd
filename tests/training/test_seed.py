"""SEED's three stages, one after the other, at the size of tests; resuming; recipes that do not fit."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from mediatok.core.errors import InvalidRecipe
from mediatok.generators.text_pieces import PAD
from mediatok.nn.efficientnet_lite import EfficientNetLite0
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from mediatok.tokenizers.image.seed_contrast import SeedContrast
from mediatok.training import teachers
from mediatok.training.export import export_run
from mediatok.training.recipe import check_recipe
from mediatok.training.seed import build_seed, seed_trainer
from mediatok.training.seed_data import CaptionPairs, Captions, NamedFolder
from mediatok.training.seed_recipe import SeedDataRecipe, SeedModelRecipe, SeedRecipe, load_seed_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {
    "image_size": 16, "patch_size": 4, "vision_width": 16, "vision_depth": 1, "vision_heads": 2, "vision_hidden": 16,
    "num_queries": 4, "qformer_width": 16, "qformer_depth": 2, "qformer_heads": 2, "qformer_hidden": 16,
    "codebook_size": 12, "token_size": 4, "decoder_depth": 1, "decoder_heads": 2, "head_widths": [8, 6, 4],
    "embedding_size": 16,
}  # fmt: skip


@pytest.fixture
def values(pictures, tmp_path):
    names = {
        path.stem: {"name": f"{['red', 'blue', 'tall'][i % 3]} box {i}"}
        for i, path in enumerate(sorted(pictures.iterdir()))
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    return {
        "name": "seed", "output": str(tmp_path / "contrast"),
        "model": {"class_name": "Seed", "stage": "contrast", "train_tower": True, "config": SIZES},
        "data": {"train": str(pictures), "names": str(tmp_path / "names.json"), "min_scale": 0.8},
        "text": {"max_tokens": 6, "feature_size": 8},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
        "run": {"steps": 6, "batch_size": 6, "log_every": 1, "validate_every": 3, "sample_every": 0,
                "checkpoint_every": 3},
    }  # fmt: skip


def train(values, **changes):
    trainer = seed_trainer(check_recipe(values | changes, SeedRecipe))
    before = {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}
    trainer.run()
    return trainer, before


def moved(trainer, before):
    return {name for name, value in trainer.raw_model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.fixture
def autoencoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "latent_channels": 2, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    model = KLAutoencoder(**sizes, layers_per_block=1, encoder_attention=False, scaling_factor=1.0)
    model.save_pretrained(tmp_path / "kl")
    return str(tmp_path / "kl")


def test_all_stages(values, tmp_path, autoencoder):
    trainer, before = train(values)
    changed = moved(trainer, before)
    assert {"seed.queries", "temperature", "text.words.weight", "seed.qformer.cross_kv.weight"} <= changed
    assert any(name.startswith("seed.vision.network.encoder") for name in changed)
    assert not any(name.startswith(("seed.quantize", "seed.image_blocks")) for name in changed)
    contrast = tmp_path / "contrast" / "model"
    assert mt.load(contrast).config.num_queries == 4

    model = {"class_name": "Seed", "stage": "codebook", "init_from": str(contrast), "config": {"clustering": True}}
    trainer, before = train(values, output=str(tmp_path / "codebook"), model=model)
    changed = moved(trainer, before)
    assert {"quantize.embedding.weight", "to_code.0.weight", "to_embedding.proj.bias"} <= changed
    assert not any(name.startswith(("vision", "qformer", "queries")) for name in changed)
    log = (tmp_path / "codebook" / "log.jsonl").read_text() if (tmp_path / "codebook" / "log.jsonl").exists() else ""
    assert not log or "val_embedding_cosine" in log
    codebook = mt.load(tmp_path / "codebook" / "model")
    assert codebook.config.clustering is False

    sizes = {"latent_channels": 2, "grid": 4, "width": 8, "depth": 1, "num_heads": 2, "autoencoder": autoencoder}
    model = {"class_name": "Seed", "stage": "drawing", "init_from": str(tmp_path / "codebook" / "model"),
             "config": {"drawing_sizes": sizes}}  # fmt: skip
    run = values["run"] | {"sample_every": 6, "num_samples": 2}
    trainer, before = train(values, output=str(tmp_path / "drawing"), model=model, run=run)
    assert all(name.startswith("drawing.") for name in moved(trainer, before))
    drawn = mt.load(tmp_path / "drawing" / "model")
    picture = torch.rand(3, 16, 16)
    assert drawn.decode(drawn.encode(picture), steps=2).size == (16, 16)
    assert torch.equal(drawn.encode_pixels(picture[None]), codebook.encode_pixels(picture[None]))
    exported = export_run(tmp_path / "drawing", tmp_path / "again")
    assert mt.load(exported).fingerprint == drawn.fingerprint
    assert mt.load(export_run(tmp_path / "contrast", tmp_path / "first")).drawing is None


def test_resume_is_exact(values, tmp_path):
    whole, _ = train(values)
    half = values | {"output": str(tmp_path / "half")}
    train(half, run=values["run"] | {"steps": 3})
    resumed = seed_trainer(check_recipe(half, SeedRecipe))
    assert resumed.step == 3
    # The rate's schedule is that of the longer run, so only what was drawn must agree: the data and the first steps.
    assert resumed.samples_seen == 18
    assert len(list(resumed.open_batches(3).__next__()[1])) == 6
    assert whole.step == 6


def test_captions(tmp_path):
    captions = Captions(["a red box", "a red ball", "Red!"], 5)
    ids, is_token = captions(["red box", "a red ball and more of it", ""])
    assert ids.shape == is_token.shape == (3, 5)
    assert is_token.sum(dim=1).tolist() == [len([i for i in row if i != PAD]) for row in ids.tolist()]
    assert is_token[2].tolist() == [True, False, False, False, False]
    assert ids[0, 1] == captions(["RED"])[0][0, 1]
    with pytest.raises(mt.ModelNotFound, match="text tokenizer"):
        Captions([], 5, tmp_path)


def test_names(pictures, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('{"p00": {"name": "first", "kind": "noise"}}')
    (pictures / "p01.txt").write_text("own text")
    recipe = SeedDataRecipe(train=str(pictures), names=names)
    folder = NamedFolder([pictures], None, recipe)
    assert [folder.read(i)[1] for i in range(3)] == ["first", "own text", ""]
    both = recipe.model_copy(update={"caption_fields": ("name", "kind")})
    assert NamedFolder([pictures], None, both).captions()[0] == "first, noise"
    with pytest.raises(InvalidRecipe, match="colour"):
        NamedFolder([pictures], None, recipe.model_copy(update={"caption_fields": ("colour",)}))
    for text in ("[]", "{", '{"p00": "first"}'):
        names.write_text(text)
        with pytest.raises(InvalidRecipe, match=r"data\.names"):
            NamedFolder([pictures], None, recipe)


@pytest.fixture
def styles(values, pictures, tmp_path):
    """Two more folders that draw some of the same, and the data section that names them."""
    for style, kept in (("flat", 9), ("line", 3)):
        (tmp_path / style).mkdir()
        for path in sorted(pictures.iterdir())[:kept]:
            shutil.copy(path, tmp_path / style / path.name)
    return values["data"] | {"styles": [str(tmp_path / "flat"), str(tmp_path / "line")]}


def test_pictures_of_a_caption_come_in_pairs(styles):
    recipe = SeedDataRecipe(**styles)
    pairs = CaptionPairs([recipe.train, *recipe.styles], None, recipe)
    captions = pairs.captions()
    order = pairs.order(np.random.default_rng(0))
    assert len(order) == len(pairs) == len(list(Path(recipe.train).iterdir())) + 12
    told = [captions[index] for index in order]
    assert told[::2][: len(told) // 2] == told[1::2]
    alone = {caption for caption in captions if captions.count(caption) == 1}
    assert all((a != b) == (captions[a] not in alone) for a, b in zip(order[::2], order[1::2], strict=False))
    turns, pictures_of = Counter(), Counter(captions)
    for seed in range(40):
        turns.update(captions[index] for index in pairs.order(np.random.default_rng(seed)))
    mean = {n: np.mean([turns[c] for c, count in pictures_of.items() if count == n]) for n in (1, 3)}
    assert mean[3] == pytest.approx(mean[1], rel=0.25)  # three pictures have no more turns than one


def test_styles_are_pulled_together(values, styles):
    trainer, before = train(values, data=styles)
    assert trainer.raw_model.between_pictures
    assert "seed.queries" in moved(trainer, before)
    with pytest.raises(InvalidRecipe, match="names="):
        check_recipe(values | {"data": {key: styles[key] for key in ("train", "styles")}}, SeedRecipe)


def test_tower_learns_from_a_teacher(values, tmp_path, monkeypatch):
    torch.manual_seed(0)
    EfficientNetLite0().save_file(tmp_path / "lite0.safetensors")
    monkeypatch.setattr(teachers, "DEFAULT_EFFICIENTNET", tmp_path / "lite0.safetensors")
    taught = values | {"loss": {"tower_teacher": "efficientnet_lite0"}}
    trainer, before = train(taught)
    assert {"places_proj.weight", "picture_proj.weight", "seed.queries"} <= moved(trainer, before)
    log = (Path(values["output"]) / "log.jsonl").read_text()
    first, *_, last = [row["teaching_loss"] for row in map(json.loads, log.splitlines()) if "teaching_loss" in row]
    assert 0 < last < first < 3
    with pytest.raises(InvalidRecipe, match="train_tower"):
        check_recipe(taught | {"model": values["model"] | {"train_tower": False}}, SeedRecipe)


def test_contrast_of_pictures(values):
    contrast = SeedContrast(build_seed(SeedModelRecipe(**values["model"])), 10, 4, 3, between_pictures=True)
    image_BE = F.normalize(torch.randn(5, 3), dim=-1).requires_grad_()
    ids_BL = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 2], [4, 0]])  # one caption three times, two alone
    loss = contrast.contrast_of_pictures(image_BE, ids_BL)
    expected = []
    for row, others in {0: (2, 3), 2: (0, 3), 3: (0, 2)}.items():
        scores = [
            float((image_BE[row] @ image_BE[other] / contrast.temperature).detach())
            for other in range(5)
            if other != row
        ]
        total = math.log(sum(math.exp(score) for score in scores))
        right = [float((image_BE[row] @ image_BE[other] / contrast.temperature).detach()) for other in others]
        expected.append(total - sum(right) / 2)
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=1e-5)
    loss.backward()
    assert image_BE.grad[0].abs().sum() > 0
    alone = contrast.contrast_of_pictures(image_BE[[0, 1, 4]], ids_BL[[0, 1, 4]])
    assert float(alone) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"class_name": "Seed", "stage": "codebook"}}, "needs init_from"),
        ({"model": {"class_name": "Seed", "stage": "paint"}}, "contrast"),
        ({"model": {"class_name": "Seed", "stage": "contrast", "config": {"image_sise": 3}}}, "image_size"),
        ({"model": {"class_name": "Seed", "stage": "contrast", "like": "seed-3"}}, "seed-2"),
        ({"model": {"class_name": "Seed", "stage": "contrast", "init_from": "x", "config": SIZES}}, "its own sizes"),
        ({"loss": {"teachr": "x"}}, "teacher"), ({"optimizer": {"warmup_steps": 6}}, "warmup_steps"),
    ],
)  # fmt: skip
def test_bad_recipes(values, change, message):
    with pytest.raises(InvalidRecipe, match=message):
        seed_trainer(check_recipe(values | change, SeedRecipe))


def test_pictures_without_captions(values):
    data = {key: value for key, value in values["data"].items() if key != "names"}
    with pytest.raises(InvalidRecipe, match="no captions"):
        seed_trainer(check_recipe(values | {"data": data}, SeedRecipe))


def test_shipped_recipes_are_right():
    for name in ("seed-tiny", "seed-tiny-codebook", "seed-tiny-drawing", "seed-2-stage1", "seed-2-stage2"):
        assert load_seed_recipe(RECIPES / f"{name}.yaml").name == name
    model = build_seed(load_seed_recipe(RECIPES / "seed-tiny.yaml").model)
    drawing = yaml.safe_load((RECIPES / "seed-tiny-drawing.yaml").read_text())["model"]["config"]["drawing_sizes"]
    assert drawing["grid"] * 8 == model.image_size
    assert sum(parameter.numel() for parameter in model.parameters()) < 6e6
