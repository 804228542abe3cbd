"""encode, decode and reconstruct on good input: names, formats, equality with the library."""

import json

import mediatok as mt
import pytest
import torch
from PIL import Image


def test_encode_then_decode_one_file(run, photos):
    result = run("encode", photos / "a.png")
    assert result.code == 0
    assert result.error_lines == []
    assert "8 tokens" in result.out
    assert (photos / "a.mtok").is_file()
    result = run("decode", photos / "a.mtok")
    assert result.code == 0
    assert Image.open(photos / "a.decoded.png").size == (32, 32)


def test_files_equal_those_of_the_library(run, photos, tmp_path):
    assert run("encode", photos, "--out", "tokens").code == 0
    tokenizer = mt.load("titok-tiny")
    for name in ("a.png", "b.jpg", "more/c.webp"):
        written = (tmp_path / "tokens" / name).with_suffix(".mtok").read_bytes()
        assert written == tokenizer.encode(photos / name).to_bytes()


def test_folder_keeps_its_structure(run, photos, tmp_path):
    assert run("encode", photos).code == 0
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mtok")}
    assert names == {"photos-tokens/a.mtok", "photos-tokens/b.mtok", "photos-tokens/more/c.mtok"}
    result = run("decode", "photos-tokens", "--out", "back")
    assert result.code == 0
    assert {path.name for path in (tmp_path / "back").rglob("*.png")} == {"a.png", "b.png", "c.png"}
    assert "decoded 3 pictures" in result.out


def test_list_of_files(run, photos, tmp_path):
    assert run("encode", photos / "a.png", photos / "b.jpg", "--out", "x/y").code == 0
    assert sorted(path.name for path in (tmp_path / "x/y").iterdir()) == ["a.mtok", "b.mtok"]


def test_length_options_choose_the_variable_model(run, photos):
    result = run("encode", photos, "--num-tokens", "3", "--json")
    assert result.code == 0
    records = json.loads(result.out)["results"]
    assert [record["tokens"] for record in records] == [3, 3, 3]
    assert {record["model"] for record in records} == {"one-d-piece-tiny"}
    assert all(record["bytes"] <= 64 + 3 for record in records)


def test_max_bytes_is_kept(run, photos):
    full = mt.load("one-d-piece-tiny").encode(photos / "a.png").num_bytes
    result = run("encode", photos / "a.png", "--max-bytes", full - 2, "--json")
    record = json.loads(result.out)["results"][0]
    assert record["bytes"] <= full - 2
    assert 1 <= record["tokens"] < 8


def test_target_psnr(run, photos):
    easy = json.loads(run("encode", photos / "a.png", "--target-psnr", "0.1", "--json").out)["results"][0]
    hard = json.loads(run("encode", photos / "a.png", "--target-psnr", "60", "--json").out)["results"][0]
    assert (easy["tokens"], hard["tokens"]) == (1, 8)


def test_tiles_keep_the_size(run, photos):
    assert run("encode", photos / "more/c.webp", "--tile", "--out", "c.mtok").code == 0
    assert run("decode", "c.mtok", "--out", "c.webp").code == 0
    with Image.open("c.webp") as picture:
        assert (picture.size, picture.format) == ((50, 90), "WEBP")


def test_output_format_follows_the_suffix(run, photos):
    run("encode", photos / "a.png")
    assert run("decode", photos / "a.mtok", "--out", "a.jpg").code == 0
    with Image.open("a.jpg") as picture:
        assert picture.format == "JPEG"


def test_reconstruct_tells_psnr(run, photos, tmp_path):
    result = run("reconstruct", photos, "--json")
    assert result.code == 0
    records = json.loads(result.out)["results"]
    assert len(records) == 3
    assert all(0 < record["psnr"] < 100 and record["bytes"] > 0 for record in records)
    assert (tmp_path / "photos-reconstructed/more/c.png").is_file()


def test_reconstruct_with_a_model_that_draws_larger(run, photos, monkeypatch):
    monkeypatch.setattr(
        mt.TiTok, "decode_ids", lambda self, ids, lengths_B=None: torch.full((len(ids), 3, 96, 96), 0.5)
    )
    result = run("reconstruct", photos / "a.png", "--json")
    assert result.code == 0
    with Image.open(photos / "a.reconstructed.png") as picture:
        assert picture.size == (96, 96)
    assert json.loads(result.out)["results"][0]["psnr"] > 0


def test_reconstruct_with_continuous_latents(run, photos, shipped):
    result = run("reconstruct", photos / "a.png", "--model", shipped / "continuous", "--json")
    assert result.code == 0
    record = json.loads(result.out)["results"][0]
    assert "tokens" not in record
    assert (photos / "a.reconstructed.png").is_file()


def test_same_stem_keeps_both_results(run, photos):
    Image.new("RGB", (32, 32)).save(photos / "a.bmp")
    assert run("encode", photos, "--out", "t").code == 0
    assert (photos.parent / "t/a.png.mtok").is_file()
    assert (photos.parent / "t/a.bmp.mtok").is_file()
    assert (photos.parent / "t/b.mtok").is_file()


def test_own_results_are_not_read_again(run, photos):
    run("encode", photos / "a.png")
    run("decode", photos / "a.mtok")
    run("reconstruct", photos / "a.png")
    assert len(json.loads(run("encode", photos, "--json").out)["results"]) == 3


def test_file_with_several_pictures(run, photos, tmp_path):
    tokenizer = mt.load("titok-tiny")
    tokenizer.encode([photos / "a.png", photos / "b.jpg"]).save("both.mtok")
    assert run("decode", "both.mtok").code == 0
    assert (tmp_path / "both.decoded-1.png").is_file()
    assert (tmp_path / "both.decoded-2.png").is_file()


def test_files_of_several_models_in_one_call(run, photos):
    assert run("encode", photos / "a.png", "--out", "t/").code == 0
    assert run("encode", photos / "b.jpg", "--num-tokens", "2", "--out", "t/").code == 0
    result = run("decode", "t", "--json")
    assert result.code == 0
    assert {record["model"] for record in json.loads(result.out)["results"]} == {"titok-tiny", "one-d-piece-tiny"}


def test_batches_do_not_change_tokens(run, photos, tmp_path):
    for batch_size in (1, 2):
        assert run("encode", photos, "--out", f"t{batch_size}", "--batch-size", batch_size).code == 0
    assert (tmp_path / "t1/a.mtok").read_bytes() == (tmp_path / "t2/a.mtok").read_bytes()


@pytest.mark.parametrize("name", ["encode", "decode", "reconstruct", "evaluate", "rate", "train", "studio", "info"])
def test_every_command_has_help(run, name):
    result = run(name, "--help")
    assert result.code == 0
    assert result.out.startswith("Usage: mediatok")


def test_no_arguments_show_help(run):
    result = run()
    assert result.code == 0
    assert "encode" in result.out
