"""evaluate, rate, parity, models, info and train on good input."""

import json
import subprocess
from pathlib import Path

import mediatok as mt
import pytest
from mediatok.app import cli_train
from mediatok.core import registry
from PIL import Image

CASES = Path(__file__).parents[2] / "parity"


def test_evaluate_prints_the_protocol(run, photos):
    result = run("evaluate", photos, "--out", "report.json")
    assert result.code == 0
    for words in (
        "photos: 3 pictures",
        "sha256",
        "shorter side to 32 px",
        "centre crop",
        "PSNR (dB)",
        "SSIM",
        "bits per",
    ):
        assert words in result.out
    report = json.loads(Path("report.json").read_text())
    assert report["protocol"]["num_items"] == 3
    assert json.loads(run("evaluate", photos, "--json").out)["figures"] == report["figures"]


def test_evaluate_compares_like_with_like_only(run, photos):
    run("evaluate", photos, "--out", "report.json")
    result = run("evaluate", photos, "--num-tokens", "2", "--against", "report.json")
    assert result.code == 0
    assert "difference" in result.out
    result = run("evaluate", photos / "a.png", "--against", "report.json")
    assert result.code == 2
    assert "num_items" in result.error_lines[0]


def test_evaluate_in_bfloat16(run, photos):
    result = run("evaluate", photos / "a.png", "--dtype", "bfloat16")
    assert result.code == 0
    assert "bfloat16 on cpu" in result.out


def test_rate_of_one_picture(run, photos):
    result = run("rate", photos / "a.png")
    assert result.code == 0
    assert "as the 32x32 input" in result.out
    assert [line.split()[0] for line in result.out.splitlines()[3:7]] == ["1", "2", "4", "8"]
    with Image.open(photos / "a.rate.png") as plot:
        assert plot.width > 300


def test_rate_of_a_folder(run, photos):
    result = run("rate", photos, "--lengths", "2,8", "--out", "plots/r.png", "--json")
    assert result.code == 0
    table = json.loads(result.out)
    assert table["pictures"] == 3
    assert [point["num_tokens"] for point in table["tokens"]] == [2, 8]
    assert table["jpeg"]
    assert Path("plots/r.png").is_file()


def test_rate_with_tiles_and_with_fixed_length(run, photos):
    assert "at its own size" in run("rate", photos / "a.png", "--tile", "--lengths", "1").out
    assert run("rate", photos / "a.png", "--model", "titok-tiny").code == 0


def test_models_lists_all(run):
    table = run("models")
    assert table.code == 0
    names = [row["name"] for row in json.loads(run("models", "--json").out)]
    assert names == [entry.name for entry in registry.models()]
    assert all(name in table.out for name in names)


def test_info_of_tokens_and_models(run, photos, shipped):
    run("encode", photos / "a.png", "--out", "a.mtok")
    result = run("info", "a.mtok", "titok-tiny", shipped / "another", "titok-s128", "--json")
    assert result.code == 0
    named = {record.get("file") or record["model"]: record for record in json.loads(result.out)["results"]}
    assert named["a.mtok"]["tokens"] == 8
    assert named["a.mtok"]["picture"] == "60x40"
    assert named["a.mtok"]["fingerprint"] == named["titok-tiny"]["fingerprint"]
    assert named["titok-tiny"]["class"] == "TiTok"
    assert named["titok-s128"]["config"]["num_latent_tokens"] == 128
    assert "fingerprint" in run("info", "a.mtok").out


def test_info_of_a_folder_of_tokens(run, photos):
    run("encode", photos, "--out", "t")
    assert len(json.loads(run("info", "t", "--json").out)["results"]) == 3


def test_parity_exit_codes(run, tmp_path):
    case = next(iter(sorted(CASES.glob("titok/*/io.safetensors")))).parent
    assert run("parity", case).code == 0


def test_train_checks_then_launches(run, monkeypatch, tmp_path):
    seen = []

    class Process:
        def __init__(self, command):
            seen.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert run("train", "titok-tiny", "run.steps=5000", "--num-processes", "2").code == 0
    (command,) = seen
    assert command[-4:-2] == ["-m", "mediatok.training.tokenizer"]
    assert command[-1] == "run.steps=5000"
    assert Path(command[-2]) == cli_train.RECIPES / "titok-tiny.yaml"
    assert command[command.index("--num_processes") + 1] == "2"


@pytest.mark.parametrize(
    ("recipe", "module"),
    [("simcodec-tiny", "codec"), ("paraformer-tiny", "speech"), ("xar-tiny", "generator"), ("kl-tiny", "tokenizer")],
)
def test_every_kind_of_recipe_has_its_module(recipe, module):
    path = cli_train.find_recipe(recipe)
    assert cli_train.check_recipe(path, ["run.steps=50000"]) == f"mediatok.training.{module}"
    with pytest.raises(mt.InvalidRecipe, match="run"):
        cli_train.check_recipe(path, ["run.stepz=7"])


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 2), (-2, 130), (130, 130)])
def test_train_exit_codes(run, monkeypatch, code, expected):
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, command: None)
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda self: None)
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self: code)
    assert run("train", "titok-tiny").code == expected


def test_evaluate_speech(run, sounds):
    (sounds / "transcripts.tsv").write_text("a\tthe cat sat\nb\ton the mat\nc\tnow\n")
    result = run("evaluate", sounds, "--recogniser", "paraformer-tiny", "--out", "report.json")
    assert result.code == 0, result.err
    for words in (
        "sounds: 3 clips", "sha256", "mono, 16,000 samples a second", "STOI", "SI-SDR (dB)", "log-mel distance",
        "bits per second (ids alone)", "tokens per second", "seconds coded in a second", "word error rate (originals)",
        "character error rate (decoded)", "paraformer-tiny, sha256",
    ):  # fmt: skip
        assert words in result.out
    report = json.loads(Path("report.json").read_text())
    assert report["protocol"]["num_items"] == 3
    assert report["figures"]["bits per second (ids alone)"] == pytest.approx(50 * 6, rel=0.02)
    other = run("evaluate", sounds, "--recogniser", "paraformer-tiny", "--against", "report.json")
    assert other.code == 0
    assert "difference" in other.out
    result = run("evaluate", sounds, "--against", "report.json")
    assert result.code == 2
    assert "feature_nets" in result.error_lines[0]


def test_evaluate_a_split(run, sounds):
    (sounds / "splits.json").write_text('{"train": ["a", "c"], "val": ["b"]}')
    assert "sounds val: 1 clips" in run("evaluate", sounds, "--split", "val").out
    assert "sounds train: 2 clips" in run("evaluate", sounds, "--split", "train").out
    for arguments, words in {
        (sounds, "--split", "test"): "none of the 3 clips",
        (sounds, "--split", "dev"): "none of train, val, test",
        (sounds / "a.wav", "--split", "val"): "splits.json",
        (sounds / "more", "--split", "val"): "splits.json",
    }.items():
        result = run("evaluate", *arguments)
        assert result.code == 2
        assert len(result.error_lines) == 1
        assert words in result.error_lines[0]


def test_evaluate_speech_refuses(run, sounds, photos):
    clip, picture = sounds / "a.wav", photos / "a.png"
    for arguments, words in {
        (clip, "--transcripts", "x.tsv"): "--recogniser",
        (clip, "--recogniser", "paraformer-tiny"): "error rates need what is said",
        (clip, "--recogniser", "paraformer-tiny", "--transcripts", "missing.tsv"): "missing.tsv",
        (clip, "--recogniser", "gense-tiny"): "cleans speech",
        (clip, "--recogniser", "simcodec-tiny"): "is a tokenizer",
        (clip, "--lpips-weights", "x.pth"): "--lpips-weights",
        (clip, "--against", "missing.json"): "missing.json",
        (picture, "--recogniser", "paraformer-tiny"): "--recogniser cannot be used with pictures",
        (picture, "--dnsmos"): "--dnsmos",
    }.items():
        result = run("evaluate", *arguments)
        assert result.code == 2, arguments
        assert len(result.error_lines) == 1, result.err
        assert words in result.error_lines[0]


def test_rate_of_speech(run, sounds):
    result = run("rate", sounds)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "simcodec-tiny: 3 clips"
    assert [line.split()[0] for line in lines[3:6]] == ["simcodec-tiny", "Opus", "Opus"]
    with Image.open("sounds-rate.png") as plot:
        assert plot.width > 300
    table = json.loads(run("rate", sounds / "a.wav", "--json").out)
    assert table["clips"] == 1
    assert {point["codec"] for point in table["points"]} == {"simcodec-tiny", "Opus", "Vorbis"}
    assert (sounds / "a.rate.png").is_file()
    assert run("rate", sounds / "a.wav", "--lengths", "1,2").code == 2
