"""FlexTok, TokenFlow, SEED and their generators through the commands: lengths, scales, decoders' options, prompts."""

import json
import shlex
import shutil

import mediatok as mt
import numpy as np
import pytest
from PIL import Image


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture).tolist()


def told(result) -> dict:
    """The record of the only result."""
    assert result.code == 0, result.err
    (record,) = json.loads(result.out)["results"]
    return record


def test_a_flow_decodes_as_it_is_told(run, picture_models, photos):
    model = ["--model", picture_models / "flextok"]
    record = told(run("encode", photos / "a.png", *model, "--out", "a.mtok", "--json"))
    assert record["tokens"] == 8
    settings = {"plain": [], "same": ["--steps", 4, "--seed", 0], "steps": ["--steps", 2], "seed": ["--seed", 5]}
    settings |= {"guided": ["--guidance", 6.5], "set": ["--guidance", 6.5, "--set", "norm_guidance=no"]}
    settings |= {"short": ["--num-tokens", 3]}
    for name, options in settings.items():
        record = told(run("decode", "a.mtok", *model, *options, "--out", f"{name}.png", "--json"))
        assert record["tokens"] == (3 if name == "short" else 8)
    made = {name: pixels(f"{name}.png") for name in settings}
    assert made["plain"] == made["same"]
    assert len({str(value) for value in made.values()}) == len(made) - 1
    tokenizer, tokens = mt.load(picture_models / "flextok"), mt.Tokens.load("a.mtok")
    assert np.array(tokenizer.decode(tokens, guidance=6.5, norm_guidance=False)).tolist() == made["set"]
    assert np.array(tokenizer.decode(tokens[:, :3])).tolist() == made["short"]
    both = ["--num-tokens", 3, "--steps", 2, "--seed", 5, "--json"]
    assert told(run("reconstruct", photos / "a.png", *model, *both))["tokens"] == 3


def test_scales_are_counted(run, picture_models, photos):
    model = ["--model", picture_models / "tokenflow"]
    assert told(run("encode", photos / "a.png", *model, "--up-to-scale", 2, "-o", "a.mtok", "--json"))["tokens"] == 5
    assert told(run("encode", photos / "a.png", *model, "-o", "whole.mtok", "--json"))["tokens"] == 21
    assert told(run("decode", "whole.mtok", *model, "--up-to-scale", 2, "-o", "cut.png", "--json"))["tokens"] == 5
    assert told(run("decode", "a.mtok", *model, "-o", "short.png", "--json"))["tokens"] == 5
    assert pixels("cut.png") == pixels("short.png")
    assert told(run("reconstruct", photos / "a.png", *model, "--up-to-scale", 1, "--json"))["tokens"] == 1


def test_seed_is_drawn(run, picture_models, photos):
    record = told(
        run("reconstruct", photos / "a.png", "--model", picture_models / "seed", "--steps", 2, "--seed", 1, "--json")
    )
    assert record["tokens"] == 4


@pytest.mark.parametrize(
    ("command", "model", "options", "message"),
    [
        ("reconstruct", "flextok", ["--steps", 2000], "steps=2000"),
        ("reconstruct", "flextok", ["--set", "norm=no"], "norm_guidance"),
        ("reconstruct", "flextok", ["--steps", 2, "--set", "steps=3"], "say the same"),
        ("reconstruct", "flextok", ["--up-to-scale", 1], "have no scales"),
        ("reconstruct", "flextok", ["--num-tokens", 9], "num_tokens=9"),
        ("reconstruct", "tokenflow", ["--up-to-scale", 4], "the number of scales=4"),
        ("reconstruct", "tokenflow", ["--num-tokens", 4], "end at 1, 5, 21"),
        ("reconstruct", "tokenflow", ["--num-tokens", 5, "--up-to-scale", 2], "fixes the length"),
        ("reconstruct", "tokenflow", ["--steps", 3], "no option 'steps'"),
        ("reconstruct", "seed", ["--num-tokens", 2], "always uses 4"),
        ("encode", "flextok", ["--seed", 3], "--seed cannot be used with pictures"),
    ],
)
def test_options_that_make_no_sense(run, picture_models, photos, command, model, options, message):
    result = run(command, photos / "a.png", "--model", picture_models / model, *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_options_of_pictures_are_not_for_meshes(run, solids):
    for options in (["--steps", 3], ["--guidance", 2], ["--set", "a=1"], ["--num-tokens", 4]):
        result = run("reconstruct", solids / "a.obj", *options)
        assert result.code == 2
        assert "cannot be used with meshes" in result.err
    assert run("encode", solids / "a.obj", "--out", "a.mtok").code == 0
    result = run("decode", "a.mtok", "--seed", 3)
    assert result.code == 2
    assert "without chance" in result.err


@pytest.mark.parametrize("model", ["writer", "storyteller"])
def test_prompts_become_pictures_that_can_be_made_again(run, picture_models, tmp_path, model):
    folder = picture_models / model
    options = ["--seed", 4, "--steps", 2, "--guidance", 2, "--tokens", "--out", "out"]
    result = run("generate", folder, "--prompt", "red apple", "-p", "a sad -- robot!", "-n", 2, *options)
    assert result.code == 0, result.err
    names = ["a-sad-robot-6", "a-sad-robot-7", "red-apple-4", "red-apple-5"]
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == names
    assert len(list((tmp_path / "out").glob("*.mtok"))) == 4
    with Image.open("out/a-sad-robot-7.png") as picture:
        text = dict(picture.text)
    assert text["label"] == "a sad -- robot!"
    command = shlex.split(text["command"])
    assert command[:4] == ["mediatok", "generate", model, "--prompt=a sad -- robot!"]
    again = run("generate", folder, *command[3:], "--out", "again.png")
    assert again.code == 0, again.err
    assert pixels("again.png") == pixels("out/a-sad-robot-7.png")
    record = told(run("generate", folder, "red apple", "--seed", 4, "--steps", 2, "--guidance", 2, "--json"))
    assert record["prompt"] == "red apple"  # a label's place is a prompt's, too
    difference = np.abs(np.array(pixels(record["output"])) - np.array(pixels("out/red-apple-4.png")))
    assert difference.max() <= 2  # of another batch


def test_nothing_asked_is_anything_where_a_model_can(run, picture_models):
    record = told(run("generate", picture_models / "writer", "--seed", 4, "--json"))
    assert (record["prompt"], record["output"]) == (None, "generated/none-4.png")
    assert run("generate", picture_models / "writer", "-n", 3, "--grid", "--seed", 4, "-o", "grid.png").code == 0
    result = run("generate", picture_models / "storyteller")
    assert result.code == 2
    assert "needs a prompt" in result.err


def test_next_tokens_of_classes(run, picture_models):
    folder = picture_models / "classes"
    record = told(run("generate", folder, "robot", "--steps", 3, "--seed", 2, "--tokens", "--json"))
    assert (record["label"], record["class"], record["steps"]) == ("robot", 1, 3)
    assert mt.Tokens.load("generated/robot-2.mtok").ids.shape == (1, 3)
    with Image.open(record["output"]) as picture:
        command = shlex.split(picture.text["command"])
    assert run("generate", folder, *command[3:], "--out", "again.png").code == 0
    assert pixels("again.png") == pixels(record["output"])
    edit = ["--edit", "generated/robot-2.mtok", "--keep", "0-1", "--tokens", "--seed", 9]
    assert run("generate", folder, "apple", *edit).code == 0
    assert mt.Tokens.load("generated/apple-9.mtok").ids[0, :2].tolist() == (
        mt.Tokens.load("generated/robot-2.mtok").ids[0, :2].tolist()
    )


def test_generated_tokens_are_decoded_as_it_is_told(run, picture_models):
    folder, options = picture_models / "classes", ["robot", "--seed", 2, "--json"]
    ways = {"plain": [], "same": ["steps=4", "norm_guidance=true"], "steps": ["steps=2"]}
    ways |= {"all": ["steps=2", "guidance=5.5", "norm_guidance=no", "seed=7"]}
    for name, pairs in ways.items():
        words = [word for pair in pairs for word in ("--decoding", pair)]
        record = told(run("generate", folder, *options, *words, "--out", f"{name}.png"))
        assert ("decoding" in record) == bool(pairs)
    assert record["decoding"] == {"steps": 2, "guidance": 5.5, "norm_guidance": False, "seed": 7}
    made = {name: pixels(f"{name}.png") for name in ways}
    assert made["plain"] == made["same"]
    assert len({str(picture) for picture in made.values()}) == 3
    (own,) = mt.load(folder).generate("robot", seed=2, decoding=record["decoding"])
    assert np.abs(np.array(own, dtype=int) - np.array(made["all"])).max() <= 2  # the command packs the weights
    with Image.open("all.png") as picture:
        text = dict(picture.text)
    assert text["decoding"] == "steps=2, guidance=5.5, norm_guidance=false, seed=7"
    again = run("generate", folder, *shlex.split(text["command"])[3:], "--out", "again.png")
    assert again.code == 0, again.err
    assert pixels("again.png") == made["all"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("classes", ["apple", "--decoding", "stepz=2"], "Did you mean 'steps'?"),
        ("classes", ["apple", "--decoding", "steps=0"], "steps=0 must be a whole number from 1 to 1000"),
        ("classes", ["apple", "--decoding", "guidance=NaN"], "guidance=nan must be a number"),
        ("classes", ["apple", "--decoding", "steps"], "--decoding steps must be name=value"),
        ("classes", ["apple", "--decoding", "steps=2", "--decoding", "steps=3"], "--decoding steps is given twice"),
        ("writer", ["-p", "a", "--decoding", "steps=2"], "no option 'steps' of decoding. It has none."),
        ("storyteller", ["-p", "a", "--decoding", "steps=2"], "has no options of decoding, so steps cannot be chosen"),
        ("classes", ["apple", "--set", "decoding=2"], "no option 'decoding'"),
        ("classes", ["--prompt", "a cat"], "reads no text"), ("writer", ["--prompt", " "], "is empty"),
        ("writer", ["--prompt", "x" * 10_000], "10000 characters"), ("writer", ["-p", "a\x07b"], "control character"),
        ("storyteller", ["-p", "x" * 10_000], "10000 characters"), ("storyteller", ["-p", "a", "--steps", 0], "steps"),
        ("storyteller", ["-p", "a", "--set", "beams=3"], "num_beams"), ("writer", ["-p", "a", "--steps", 4], "steps=4"),
        ("storyteller", ["-p", "a", "--edit", "a.png", "--keep", "0"], "whole pictures"),
        ("classes", ["apple", "--steps", 9], "steps=9"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(run, picture_models, model, options, message):
    Image.new("RGB", (16, 16)).save("a.png")
    result = run("generate", picture_models / model, *options)
    assert result.code == 2, result.out
    assert message in " ".join(result.err.split())


def test_models_say_what_they_take(run, picture_models):
    names = ("flextok", "tokenflow", "classes", "writer", "storyteller")
    result = run("info", *(picture_models / name for name in names), "--json")
    assert result.code == 0, result.err
    flextok, tokenflow, classes, writer, storyteller = json.loads(result.out)["results"]
    assert flextok["decoding_options"] == ["steps", "guidance", "norm_guidance", "seed"]
    assert tokenflow["tokens_of_scales"] == [1, 4, 16]
    assert classes["classes"] == 3
    assert writer["takes"] == storyteller["takes"] == "prompts"
    result = run("generate", picture_models / "writer", "--list-labels")
    assert "reads prompts" in result.out


def test_a_tokenizer_beside_its_generator_is_found_by_name(picture_models, tmp_path):
    assert mt.load(picture_models / "writer").tokenizer.name == "tokenflow"
    for name in ("../tokenflow", "no-such-tokenizer", ""):
        folder = tmp_path / "writer"
        shutil.copytree(picture_models / "writer", folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tokenizer": name}))
        with pytest.raises(mt.InvalidInput, match="neither a known model nor a folder"):
            mt.load(folder).generate("red apple")
