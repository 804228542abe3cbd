"""Generators train through the same loop: exact resume, labels and their weights, cached and fresh content, export."""

import copy
import json
from pathlib import Path

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import InvalidRecipe
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from mediatok.tokenizers.image.titok import TiTok
from mediatok.training.checkpoint import load_checkpoint, whole_checkpoints
from mediatok.training.export import export_run
from mediatok.training.generator import GeneratorTrainer
from mediatok.training.generator_data import LabelledFolder
from mediatok.training.generator_recipe import GeneratorDataRecipe, GeneratorRecipe
from mediatok.training.recipe import check_recipe
from mediatok.training.schedule import cosine_lr, set_lr

CASES = Path(__file__).parent.parent / "parity"
SIZES = {
    "MaskGIT": {
        "network": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "num_steps": 2,
    },
    "XAR": {
        "layout_size": 4, "embed_dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "num_steps": 2,
    },
}  # fmt: skip


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of a small TiTok and a small KL autoencoder with random weights."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    titok = TiTok(
        image_size=16, encoder_patch_size=8, decoder_patch_size=8, num_latent_tokens=4, token_size=4, codebook_size=32,
        is_legacy=False, has_pixel_decoder=False, encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    kl = KLAutoencoder(
        image_size=16, latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    )
    titok.save_pretrained(folder / "MaskGIT")
    kl.save_pretrained(folder / "XAR")
    return folder


@pytest.fixture
def labels(pictures, tmp_path):
    """Two categories and three kinds; the last picture has no label."""
    table = {
        path.stem: {"category": ["Food", "Animals"][i % 2], "kind": f"kind {i % 3}"}
        for i, path in enumerate(sorted(pictures.iterdir())[:-1])
    }
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(table))
    return path


@pytest.fixture
def make_values(pictures, labels, tokenizers, tmp_path):
    def values(class_name, **changes):
        recipe = {
            "name": "tiny",
            "output": str(tmp_path / "run"),
            "tokenizer": str(tokenizers / class_name),
            "model": {"class_name": class_name, "config": SIZES[class_name]},
            "data": {
                "train": str(pictures), "labels": str(labels), "label_fields": ["category", "kind"],
                "label_weights": {"food": 0.25},
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 4},
            "run": {
                "steps": 20, "batch_size": 4, "log_every": 1, "validate_every": 0, "sample_every": 0,
                "checkpoint_every": 10,
            },
        }  # fmt: skip
        for section, change in changes.items():
            recipe[section] = recipe[section] | change if isinstance(change, dict) else change
        return recipe

    return values


def run(values, output, stop_at=None):
    """Train to the end, or until the checkpoint of step `stop_at`; the last checkpoint's contents."""
    trainer = GeneratorTrainer(check_recipe(copy.deepcopy(values) | {"output": str(output)}, GeneratorRecipe))
    save = trainer.save

    def save_and_stop():
        save()
        if trainer.step == stop_at:
            raise Interrupted

    trainer.save = save_and_stop
    if stop_at is None:
        trainer.run()
    else:
        with pytest.raises(Interrupted):
            trainer.run()
    return load_checkpoint(whole_checkpoints(Path(output) / "checkpoints")[-1])


@pytest.mark.parametrize("encode", ["pretokenize", "on_the_fly"])
@pytest.mark.parametrize("class_name", SIZES)
def test_ten_and_ten_steps_equal_twenty(make_values, tmp_path, class_name, encode):
    values = make_values(class_name, data={"encode": encode})
    values["data"] = make_values(class_name)["data"] | {"encode": encode}
    if class_name == "MaskGIT":
        values["model"] |= {"near_codes": 0.3}  # its draws are part of the state, too
    tensors, state = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at=10)
    again, state_again = run(values, tmp_path / "parts")
    for file, content in tensors.items():
        for name, value in content.items():
            assert torch.equal(value, again[file][name]), f"{file}: {name}"
    assert state["samples_seen"] == state_again["samples_seen"] == 80


@pytest.mark.parametrize("class_name", SIZES)
def test_muon_resumes_exactly_and_obeys_the_rate(make_values, tmp_path, class_name):
    values = make_values(class_name)
    values["optimizer"] |= {"muon": True}
    whole, _ = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at=10)
    again, _ = run(values, tmp_path / "parts")
    assert any(name.endswith("/momentum_buffer") for name in whole["optimizer"])
    assert any(name.endswith("/exp_avg") for name in whole["optimizer"])
    for file, content in whole.items():
        for name, value in content.items():
            assert torch.equal(value, again[file][name]), f"{file}: {name}"
    trainer = GeneratorTrainer(check_recipe(values | {"output": str(tmp_path / "still")}, GeneratorRecipe))
    before = copy.deepcopy(trainer.raw_model.state_dict())
    for parameter in trainer.raw_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(trainer.optimizer, 0.0)
    trainer.optimizer.step()
    for name, value in trainer.raw_model.state_dict().items():
        assert torch.equal(value, before[name])


def test_classes_are_taken_over_by_name(make_values, tmp_path, labels):
    values = make_values("XAR")
    values["run"] |= {"steps": 5}
    run(values, tmp_path / "run")
    source = mt.load(tmp_path / "run" / "model")
    values["model"] = {"class_name": "XAR", "init_from": str(tmp_path / "run" / "model")}
    fields_of = json.loads(labels.read_text().replace("Animals", "Birds"))
    for fields in fields_of.values():
        fields["name"] = {"Food": "pie"}.get(fields["category"], "wren" if fields["kind"] == "kind 1" else "")
    labels.write_text(json.dumps(fields_of))
    values["data"] |= {"label_fields": ["kind", "category", "name"], "label_weights": {}}
    model = GeneratorTrainer(check_recipe(values | {"output": str(tmp_path / "b")}, GeneratorRecipe)).raw_model
    rows = {name: row for row, name in enumerate(source.label_names)}
    table, old = model.transformer.class_emb.weight, source.transformer.class_emb.weight
    assert model.label_names == ("kind 0", "kind 1", "kind 2", "birds", "food", "pie", "wren")
    begins = {"pie": "food", "wren": "kind 1"}  # the source does not know wren's category
    for row, name in enumerate([*model.label_names, "no class"]):
        if name == "birds":
            assert any(torch.equal(table[row], old[rows[f"kind {kind}"]]) for kind in range(3))
        else:
            assert torch.equal(table[row], old[rows.get(begins.get(name, name), len(rows))])
    others = dict(source.named_parameters())
    for name, value in model.named_parameters():
        assert name == "transformer.class_emb.weight" or torch.equal(value, others[name])


@pytest.mark.parametrize("class_name", SIZES)
def test_a_trained_model_generates(make_values, tmp_path, class_name):
    values = make_values(class_name, run={"sample_every": 20, "validate_every": 20, "num_samples": 2})
    values["run"] = make_values(class_name)["run"] | {"sample_every": 20, "validate_every": 20, "num_samples": 2}
    run(values, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("val_loss" in line for line in log)
    assert (tmp_path / "run" / "samples" / "step_00000020.png").is_file()
    model = mt.load(tmp_path / "run" / "model")
    assert model.label_names == ("animals", "food", "kind 0", "kind 1", "kind 2")
    (image,) = model.generate("food", seed=1)
    assert image.size == (16, 16)
    exported = mt.load(export_run(tmp_path / "run", tmp_path / "exported"))
    for name, value in exported.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_loss_falls(make_values, tmp_path):
    values = make_values("MaskGIT")
    values["run"] |= {"steps": 120}
    values["optimizer"] |= {"lr": 5e-3}
    run(values, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["total_loss"] for line in log]
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 0.3


def test_labels_are_drawn_among_the_fields_and_by_weight(pictures, labels):
    recipe = GeneratorDataRecipe(
        train=str(pictures), labels=labels, label_fields=("category", "kind"), label_weights={"Food": 0.25}
    )
    folder = LabelledFolder(recipe.train, None, recipe)
    assert folder.labels.names == ["animals", "food", "kind 0", "kind 1", "kind 2"]
    no_class = len(folder.labels.names)
    assert folder.labels_NF[-1].tolist() == [no_class, no_class]
    drawn = {folder.label_at(0, position, seed=0) for position in range(40)}
    assert drawn == set(folder.labels_NF[0].tolist())
    import numpy as np

    visits = np.concatenate([folder.order(np.random.default_rng(seed)) for seed in range(50)])
    food = folder.labels_NF[visits][:, 0] == 1
    assert food.mean() == pytest.approx(24 * 0.25 / (24 * 0.25 + 24), abs=0.03)


def test_folders_name_classes_where_there_is_no_table(tmp_path, pictures):
    for i, path in enumerate(sorted(pictures.iterdir())):
        target = tmp_path / "classes" / ["Cat", "dog"][i % 2] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    recipe = GeneratorDataRecipe(train=str(tmp_path / "classes"))
    folder = LabelledFolder(recipe.train, None, recipe)
    assert folder.labels.names == ["cat", "dog"]
    assert folder.shares_N is None


def test_a_stale_cache_is_not_used(make_values, tmp_path, tokenizers):
    values = make_values("MaskGIT")
    values["run"] |= {"steps": 5}
    run(values, tmp_path / "run")
    before = (tmp_path / "run" / "content.safetensors").read_bytes()
    other = mt.load(tokenizers / "MaskGIT")
    torch.nn.init.normal_(other.quantize.embedding.weight, generator=torch.Generator().manual_seed(1))
    other.save_pretrained(tmp_path / "other")
    trainer = GeneratorTrainer(
        check_recipe(values | {"tokenizer": str(tmp_path / "other"), "output": str(tmp_path / "b")}, GeneratorRecipe)
    )
    (tmp_path / "b" / "content.safetensors").write_bytes(before)
    trainer.build_data()
    assert (tmp_path / "b" / "content.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"class_name": "XAR", "config": SIZES["XAR"]}, "no latent map"),
        ("model", {"class_name": "MaskGIT", "config": {"num_tokens": 5}}, "num_tokens is 5, but the data say 4"),
        ("model", {"class_name": "MaskGIT", "config": {"hiden_size": 5}}, "hidden_size"),
        ("model", {"class_name": "XAR", "near_codes": 0.1}, "near_codes is for MaskGIT"),
        ("model", {"class_name": "MaskGIT", "near_codes": 0}, "greater than 0"),
        ("model", {"class_name": "MaskGIT", "like": "maskgit-titok-l23"}, "maskgit-titok-l32"),
    ],
)
def test_what_does_not_fit_is_said(make_values, section, change, message):
    values = make_values("MaskGIT") | {section: change}
    with pytest.raises(InvalidRecipe, match=message):
        GeneratorTrainer(check_recipe(values, GeneratorRecipe))


def test_unknown_weights_name_the_nearest_class(make_values):
    values = make_values("MaskGIT")
    values["data"] |= {"label_weights": {"foods": 1.0}}
    with pytest.raises(InvalidRecipe, match="'food'"):
        GeneratorTrainer(check_recipe(values, GeneratorRecipe))


def test_a_wrong_key_names_the_right_one(make_values):
    values = make_values("MaskGIT")
    values["data"] |= {"label_field": ["category"]}
    with pytest.raises(InvalidRecipe, match="label_fields"):
        check_recipe(values, GeneratorRecipe)


def test_the_rate_is_that_of_the_authors():
    recorded = json.loads((CASES / "xar" / "schedules.json").read_text())["lr"]
    settings = recorded["args"]
    per_epoch = 20
    for epoch, rate in zip(recorded["epochs"], recorded["lr"], strict=True):
        step = round(epoch * per_epoch)
        warmup, hold, total = (n * per_epoch for n in (settings["warmup_epochs"], 600, 800))
        ours = cosine_lr(step, settings["lr"], settings["min_lr"], warmup, total, hold)
        assert ours == pytest.approx(rate, rel=1e-9)
