"""`mediatok generate` with small random generators: files, grids, edits, and every kind of bad input."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.app.cli_generate import parse_units, tile
from mediatok.app.cli_settings import parse_options
from mediatok.core import generator as base
from mediatok.core import registry
from mediatok.generators.maskgit import MaskGIT
from mediatok.generators.xar import XAR
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from PIL import Image

NAMES = ("animals & nature", "animal parts", "food")
COMMAND = [sys.executable, "-m", "mediatok.app.cli"]


@pytest.fixture(scope="session")
def made(shipped, tmp_path_factory):
    """A folder with the generators "maskgit" over the random titok-tiny and "xar" over a random KL autoencoder."""
    folder = tmp_path_factory.mktemp("generators")
    torch.manual_seed(0)
    vae = KLAutoencoder(
        image_size=16, latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    )
    vae.save_pretrained(folder / "vae")
    titok = mt.load(shipped / "titok-tiny")
    classes = {"num_classes": 3, "label_names": NAMES}
    MaskGIT(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, codebook_size=64,
        num_tokens=8, tokenizer=str(shipped / "titok-tiny"), tokenizer_fingerprint=titok.fingerprint, **classes,
    ).save_pretrained(folder / "maskgit")  # fmt: skip
    XAR(
        layout_size=4, grid=8, latent_channels=2, embed_dim=32, encoder_depth=1, decoder_depth=1, num_heads=2,
        tokenizer=str(folder / "vae"), num_steps=3, **classes,
    ).save_pretrained(folder / "xar")  # fmt: skip
    return folder


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture).tolist()


def test_files_are_named_by_label_and_seed_and_can_be_made_again(run, made, tmp_path):
    result = run("generate", made / "maskgit", "food", "0", "none", "-n", 2, "--seed", 5, "--steps", 3, "--out", "out")
    assert result.code == 0, result.err
    names = ["food-5", "food-6", "animals-nature-7", "animals-nature-8", "none-9", "none-10"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{name}.png" for name in names)
    assert "made 6 pictures with maskgit in out" in result.out
    assert "images/s" in result.out
    with Image.open(tmp_path / "out" / "animals-nature-8.png") as picture:
        text = dict(picture.text)
    assert text.pop("Software").startswith("mediatok ")
    command = shlex.split(text.pop("command"))
    assert text["label"] == "animals & nature"
    assert {name: text[name] for name in ("model", "seed", "steps", "guidance")} == {
        "model": "maskgit", "seed": "8", "steps": "3", "guidance": "3.0",
    }  # fmt: skip
    assert command[:3] == ["mediatok", "generate", "maskgit"]
    again = run("generate", made / "maskgit", *command[3:], "--out", "again.png")
    assert again.code == 0, again.err
    assert pixels("again.png") == pixels("out/animals-nature-8.png")


def test_default_folder_and_classes_in_turn(run, made, tmp_path):
    result = run("generate", made / "maskgit", "-n", 4, "--batch-size", 3, "--seed", 1, "--json")
    assert result.code == 0, result.err
    records = json.loads(result.out)["results"]
    assert [(record["class"], record["seed"]) for record in records] == [(0, 1), (1, 2), (2, 3), (0, 4)]
    assert records[0]["output"] == "generated/animals-nature-1.png"
    assert all((tmp_path / record["output"]).is_file() for record in records)


def test_latents_and_step_annealing(run, made):
    result = run("generate", made / "xar", "food", "--steps", "4,2", "--set", "sampler=ode", "--seed", 0, "--json")
    assert result.code == 0, result.err
    (record,) = json.loads(result.out)["results"]
    assert (record["steps"], record["sampler"]) == ([4, 2], "ode")
    with Image.open(record["output"]) as picture:
        command = shlex.split(picture.text["command"])
    assert run("generate", made / "xar", *command[3:], "--out", "again.png").code == 0
    assert pixels("again.png") == pixels(record["output"])


def test_grid(run, made):
    assert run("generate", made / "maskgit", 0, 1, "-n", 3, "--grid", "--seed", 4, "-o", "grid.png").code == 0
    assert run("generate", made / "maskgit", 0, 1, "-n", 3, "--seed", 4, "-o", "files").code == 0
    names = ["animals-nature-4", "animals-nature-5", "animals-nature-6", "animal-parts-7", "animal-parts-8"]
    with Image.open("grid.png") as grid:
        assert grid.size == (3 * 32 + 4, 2 * 32 + 2)
        assert shlex.split(grid.text["command"])[2:][1:5] == ["0", "1", "--count", "3"]
        last = np.array(grid.crop((34, 34, 66, 66))).tolist()
    assert pixels(f"files/{names[4]}.png") == last
    assert run("generate", made / "maskgit", "-n", 5, "--grid", "--seed", 4).code == 0
    with Image.open("generated/grid-4.png") as grid:
        assert grid.size == (3 * 32 + 4, 2 * 32 + 2)
    assert tile([Image.new("RGB", (4, 4))], 1).size == (4, 4)


def test_editing_a_token_file(run, made):
    assert run("generate", made / "maskgit", "food", "--seed", 1, "--tokens", "-o", "first.png").code == 0
    first = mt.Tokens.load("first.mtok")
    options = ["--edit", "first.mtok", "--keep", "0,2-4", "--seed", 2, "--tokens", "-o", "second.png"]
    result = run("generate", made / "maskgit", "food", *options)
    assert result.code == 0, result.err
    second = mt.Tokens.load("second.mtok")
    assert second.ids[0, [0, 2, 3, 4]].tolist() == first.ids[0, [0, 2, 3, 4]].tolist()
    assert second.ids.tolist() != first.ids.tolist()
    with Image.open("second.png") as picture:
        assert picture.text["keep"] == "0,2-4"
    result = run("decode", "second.mtok", "--model", made.parent / "nowhere")
    assert result.code == 2


def test_editing_a_picture(run, made, photos):
    result = run("generate", made / "xar", "food", 0, "--edit", photos / "a.png", "--keep", "0-2", "-o", "out")
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 3


def test_labels_are_listed(run, made):
    assert [line.split(maxsplit=1) for line in run("generate", made / "xar", "--list-labels").out.splitlines()] == [
        ["0", "animals & nature"], ["1", "animal parts"], ["2", "food"],
    ]  # fmt: skip
    listed = json.loads(run("generate", made / "xar", "--list-labels", "--json").out)
    assert listed == {"model": "xar", "num_classes": 3, "labels": list(NAMES)}


def test_nothing_is_overwritten_unasked(run, made):
    arguments = ("generate", made / "maskgit", "food", "--seed", 1, "-o", "out.png")
    assert run(*arguments).code == 0
    before = pixels("out.png")
    for changed in (arguments, (*arguments, "--steps", 1)):
        result = run(*changed)
        assert result.code == 2
        assert "out.png exists; choose another" in result.err
    assert pixels("out.png") == before
    assert run(*arguments, "--overwrite").code == 0
    result = run(*arguments, "--overwrite", "--edit", "out.png", "--keep", "0")
    assert "out.png is an input" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fod"], "Did you mean 'food'? maskgit knows animals & nature, animal parts, food."),
        (["animal"], "could be any of 'animals & nature' (0), 'animal parts' (1)"),
        (["3"], "label 3 is out of range; maskgit has classes 0 to 2"),
        (["food", "--steps", "0"], "must be a whole number from 1 to 1000"),
        (["food", "--steps", "100000000"], "must be a whole number from 1 to 1000"),
        (["food", "--steps", "many"], "--steps many must be a number of steps"),
        (["food", "--steps", "5,3"], "steps="),
        (["food", "--steps", "1,2,3"], "--steps 1,2,3 must be"),
        (["food", "--guidance", "nan"], "guidance=nan must be a number from 0 to 100"),
        (["food", "--guidance", "inf"], "guidance=inf must be"),
        (["food", "--guidance=-1"], "guidance=-1.0 must be"),
        (["food", "--seed=-1"], "seeds are whole numbers"),
        (["food", "--seed", str(2**63)], "seeds are whole numbers"),
        (["food", "--count", "0"], "--count"),
        (["food", "--count", "100000"], "at most 4096"),
        (["food", "--set", "temprature=1"], "no option 'temprature'. Did you mean 'temperature'?"),
        (["food", "--set", "temperature=NaN"], "temperature=nan must be"),
        (["food", "--set", "temperature"], "must be name=value"),
        (["food", "--set", "self=3"], "no option 'self'"),
        (["food", "--set", f"temperature={10**400}"], "must be a number from 0 to 100"),
        (["food", "--set", "temperature=" + "[" * 5000], "must be a number from 0 to 100"),
        (["food", "--set", "annealing=maybe"], "annealing='maybe' must be True or False"),
        (["food", "--set", "annealing=no", "--set", "annealing=yes"], "--set annealing is given twice"),
        (["food", "--guidance", "5", "--set", "guidance=3"], "--guidance and --set guidance say the same thing"),
        (["food", "--steps", "5", "--set", "steps=3"], "--steps and --set steps say the same thing"),
        (["food", "--out", "x.gif"], "--out x.gif must end in .png, .jpg, .jpeg, .webp, .bmp, or be a folder"),
        (["food", "--out", "x.mp4"], "--out x.mp4 must end in"),
        (["food", "--grid", "--out", "X.EXE"], "--out X.EXE must end in"),
        (["food", "--keep", "0"], "--edit and --keep go together"),
        (["food", "--edit", "gone.png", "--keep", "0"], "gone.png"),
        (["food", "--edit", "gone.png", "--keep", "5-1"], "'5-1' is neither a number nor a range"),
        (["food", "--edit", "photos/a.png", "--keep", "8"], "unit 8; maskgit has units 0 to 7"),
        (["food", "--tokens", "--grid"], "a grid has no tokens"),
        (["food", "-n", "2", "--out", "one.png"], "one file for 2 pictures; name a folder, or add --grid"),
        (["food", "--out", "photos/a.png/x"], "photos/a.png"),
        (["food", "--device", "tpu"], "--device tpu is unknown"),
        (["food", "--dtype", "float16"], "dtype must be one of"),
        (["food", "--tokenizer", "one-d-piece-tiny"], "was trained with"),
    ],
)
def test_bad_input(run, made, photos, tmp_path, arguments, words):
    before = sorted(tmp_path.rglob("*"))
    result = run("generate", made / "maskgit", *arguments)
    assert result.code == 2
    assert words in result.err
    assert len(result.error_lines) == 1, result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_batch_that_does_not_fit(run, made, monkeypatch):
    model = mt.load(made / "maskgit")
    per_image = model.bytes_per_image(model.settings())
    monkeypatch.setattr(base, "available_memory", lambda device: 3 * per_image)
    result = run("generate", made / "maskgit", "food", "-n", 8)
    assert result.code == 2
    assert "use batch_size=3" in result.err
    assert run("generate", made / "maskgit", "food", "-n", 4, "--batch-size", 2).code == 0


def test_generators_and_tokenizers_are_told_apart(run, made, photos, shipped, monkeypatch):
    known = mt.ModelEntry("maskgit-titok-l32", "MaskGIT", "Apache-2.0", 1, "", hub_id="a/b", kind="generator")
    monkeypatch.setitem(registry.ENTRIES, known.name, known)
    for command in ("encode", "reconstruct", "rate"):
        result = run(command, photos / "a.png", "--model", made / "maskgit")
        assert result.code == 2
        assert "is a generator, and this takes a tokenizer" in result.err
    assert "is a generator" in run("encode", photos / "a.png", "--model", "maskgit-titok-l32").err
    result = run("generate", "titok-l32", "food")
    assert result.code == 2
    assert (
        "titok-l32 is a tokenizer, and this takes a generator that makes pictures. Did you mean 'maskgit-titok-l32'"
        in result.err
    )
    assert "is a tokenizer" in run("generate", shipped / "another").err
    assert "Did you mean 'maskgit-titok-l32'" in run("generate", "maskgit-titok-l3").err
    assert "kind" in run("models").out.splitlines()[0]
    assert {row["kind"] for row in json.loads(run("models", "--json").out)} == {"generator", "tokenizer"}
    told = run("info", made / "maskgit", made / "vae").out
    assert "classes" in told
    assert "MaskGIT" in told
    assert "KLAutoencoder" in told


def test_other_tokenizers_are_refused(run, made, shipped):
    result = run("generate", made / "maskgit", "food", "--tokenizer", shipped / "another")
    assert result.code == 0 or "trained with" in result.err  # equal codebooks and sizes have equal fingerprints
    result = run("generate", made / "xar", "food", "--tokenizer", shipped / "titok-tiny")
    assert result.code == 2
    assert len(result.error_lines) == 1


def test_interrupting_leaves_whole_files_only(made, tmp_path):
    out = tmp_path / "out"
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [*COMMAND, "generate", str(made / "xar"), "-n", "4000", "--batch-size", "1", "--out", str(out)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, preexec_fn=listen) as process:
        try:
            deadline = time.monotonic() + 240
            while not out.exists() or len(list(out.glob("[!.]*"))) < 3:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.rstrip().endswith("interrupted")
    assert "images/s" in errors
    names = os.listdir(out)
    assert 3 <= len(names) < 4000
    assert all(name.endswith(".png") and not name.startswith(".") for name in names)
    for name in names:
        pixels(out / name)


def test_units_and_options_are_parsed():
    assert parse_units("0,1,5-9") == [0, 1, 5, 6, 7, 8, 9]
    for text in ("", "a", "1-", "-1", "3,,4", "9" * 50):
        with pytest.raises(mt.InvalidInput, match="--keep"):
            parse_units(text)
    options = parse_options(["a=1", "b=2.5", "c=linear", "d=true", "e=False", "f=No", "g= yes"])
    assert options == {"a": 1, "b": 2.5, "c": "linear", "d": True, "e": False, "f": False, "g": True}


def test_folders_may_have_dots_in_their_names(run, made, tmp_path):
    (tmp_path / "old.gif").mkdir()
    for out in ("old.gif", "run.2"):
        assert run("generate", made / "maskgit", "food", "--seed", 1, "--out", out).code == 0
        assert (tmp_path / out / "food-1.png").is_file()
