"""Bad input of every kind: exit code 2, one line that names the file and the reason, nothing written."""

import os
import struct
import zlib
from dataclasses import replace

import mediatok as mt
import pytest
from PIL import Image


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def bad_files(photos, tmp_path):
    """Name -> path of files that no command may take for a picture."""
    good = (photos / "b.jpg").read_bytes()
    contents = {
        "empty.png": b"",
        "truncated.jpg": good[: len(good) // 2],
        "huge.png": png_claiming(20_000, 20_000),
        "text.png": b"this is not a picture",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("command", ["encode", "reconstruct", "evaluate", "rate"])
@pytest.mark.parametrize("name", ["empty.png", "truncated.jpg", "huge.png", "text.png", "missing.png"])
def test_one_bad_picture(run, bad_files, tmp_path, command, name):
    before = listing(tmp_path)
    result = run(command, bad_files / name)
    assert result.code == 2
    assert len(result.error_lines) == 1, result.err
    assert result.error_lines[0].startswith("error: ")
    assert result.out == ""
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_folder_goes_on_past_bad_files(run, photos, bad_files, command):
    for path in bad_files.iterdir():
        path.rename(photos / path.name)
    result = run(command, photos, "--out", "out")
    assert result.code == 2
    assert len(listing(photos.parent / "out")) == 4  # three results and the subfolder
    for name in ("empty.png", "truncated.jpg", "huge.png", "text.png", "postscript.png"):
        assert any(name in line for line in result.error_lines)
    assert result.error_lines[-1] == "5 of 8 inputs failed"


def test_evaluate_and_rate_go_on_past_bad_files(run, photos, bad_files):
    (bad_files / "text.png").rename(photos / "text.png")
    result = run("evaluate", photos)
    assert result.code == 2
    assert "3 pictures" in result.out
    assert "text.png" in result.error_lines[0]
    result = run("rate", photos)
    assert result.code == 2
    assert "3 pictures" in result.out
    assert "text.png" in result.error_lines[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("empty", lambda data: b""),
        ("truncated", lambda data: data[:-1]),
        ("trailing", lambda data: data + b"\0"),
        ("flipped", lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:]),
        ("other format", lambda data: b"\x89PNG\r\n\x1a\n" + data),
    ],
)
def test_bad_token_files(run, photos, tmp_path, name, change):
    run("encode", photos / "a.png", "--out", "a.mtok")
    path = tmp_path / "a.mtok"
    path.write_bytes(change(path.read_bytes()))
    before = listing(tmp_path)
    for command in ("decode", "info"):
        result = run(command, "a.mtok")
        assert result.code == 2
        assert len(result.error_lines) == 1, result.err
        assert "a.mtok" in result.error_lines[0]
    assert listing(tmp_path) == before


def test_tokens_of_another_model(run, photos, shipped, tmp_path):
    run("encode", photos / "a.png", "--out", "a.mtok")
    before = listing(tmp_path)
    result = run("decode", "a.mtok", "--model", shipped / "another")
    assert result.code == 2
    assert len(result.error_lines) == 1
    assert "titok-tiny" in result.error_lines[0]
    assert listing(tmp_path) == before


def test_model_named_in_a_file_is_never_a_path_or_repository(run, photos, shipped, tmp_path):
    tokens = mt.load(str(shipped / "another")).encode(photos / "a.png")
    for number, name in enumerate([str(shipped / "x")[:20], "somebody/model", "another"]):
        path = tmp_path / f"{number}.mtok"
        replace(tokens, tokenizer=name).save(path)
        result = run("decode", path)
        assert result.code == 2
        assert "--model" in result.error_lines[0]
    assert run("decode", path, "--model", shipped / "another").code == 0


def test_one_mismatch_in_a_batch_fails_alone(run, photos, shipped):
    run("encode", photos / "a.png", photos / "b.jpg", "--out", "t")
    run("encode", photos / "more/c.webp", "--out", "t/", "--model", shipped / "another")
    result = run("decode", "t", "--model", "titok-tiny", "--out", "back")
    assert result.code == 2
    assert len(listing(photos.parent / "back")) == 2
    assert "c.mtok" in result.error_lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode", "a.png", "--model", "titok-tinny"),
        ("encode", "a.png", "--num-tokens", "9"),
        ("encode", "a.png", "--num-tokens", "0"),
        ("encode", "a.png", "--num-tokens", "4", "--model", "titok-tiny"),
        ("encode", "a.png", "--target-psnr", "20", "--model", "titok-tiny"),
        ("encode", "a.png", "--target-psnr", "nan"),
        ("encode", "a.png", "--max-bytes", "5"),
        ("encode", "a.png", "--num-tokens", "4", "--target-psnr", "20"),
        ("encode", "a.png", "--device", "abacus"),
        ("encode", "a.png", "--device", "cuda:99"),
        ("encode", "a.png", "--dtype", "float7"),
        ("encode", "a.png", "--out", "a.png"),
        ("encode", "a.png", "--out", "a.txt"),
        ("encode", "a.png", "--nonsense"),
        ("encode",),
        ("encod", "a.png"),
        ("reconstruct", "a.png", "--out", "a.png"),
        ("reconstruct", "a.png", "--out", "."),
        ("reconstruct", "a.png", "--text", "a cat"),
        ("decode", "a.png"),
        ("info", "titok-tinny"),
        ("info", "a.png"),
        ("evaluate", "a.png", "--out", "a.png"),
        ("evaluate", "a.png", "--lpips-weights", "missing.pth"),
        ("evaluate", "a.png", "--against", "missing.json"),
        ("evaluate", "a.png", "--against", "a.png"),
        ("rate", "a.png", "--out", "a.png"),
        ("rate", "a.png", "--lengths", "1,x"),
        ("rate", "a.png", "--lengths", "99"),
        ("parity", "missing"),
        ("train", "missing.yaml"),
        ("train", "titok-tini"),
        ("train", "titok-tiny", "run.stepz=3"),
    ],
    ids=" ".join,
)
def test_wrong_arguments(run, tmp_path, arguments):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    original = (tmp_path / "a.png").read_bytes()
    result = run(*arguments)
    assert result.code == 2
    assert len(result.error_lines) == 1, result.err
    assert result.error_lines[0].startswith("error: ")
    assert listing(tmp_path) == [str(tmp_path / "a.png")]
    assert (tmp_path / "a.png").read_bytes() == original


def test_unknown_names_suggest_the_nearest(run, photos):
    assert "titok-tiny" in run("encode", photos / "a.png", "--model", "titok-tinny").err
    assert "titok-tiny" in run("info", "titok-tinny").err
    assert "titok-tiny" in run("train", "titok-tini").err


def test_folder_without_pictures(run, tmp_path):
    (tmp_path / "nothing").mkdir()
    for command in ("encode", "decode", "reconstruct", "evaluate", "rate"):
        result = run(command, "nothing")
        assert result.code == 2
        assert len(result.error_lines) == 1


def test_out_must_be_a_folder_for_several(run, photos, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in ("all.mtok", "file"):
        result = run("encode", photos, "--out", out)
        assert result.code == 2
        assert "folder" in result.err
    assert (tmp_path / "file").read_text() == "x"


def test_out_below_a_file(run, photos, tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("encode", photos / "a.png", "--out", "file/a.mtok")
    assert result.code == 2
    assert len(result.error_lines) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("out", ["/proc/self", "/proc/self/a.mtok", "/proc/new"])
def test_read_only_output(run, photos, out):
    result = run("encode", photos / "a.png", "--out", out)
    assert result.code == 2
    assert len(result.error_lines) == 1


def test_unwritable_output(run, photos, monkeypatch, tmp_path):
    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    before = listing(tmp_path)
    for command in ("encode", "reconstruct"):
        result = run(command, photos / "a.png")
        assert result.code == 2
        assert "No space left" in result.error_lines[0]
    assert listing(tmp_path) == before


def test_link_to_an_input_is_not_overwritten(run, photos, tmp_path):
    (tmp_path / "link.png").symlink_to(photos / "a.png")
    original = (photos / "a.png").read_bytes()
    result = run("reconstruct", photos / "a.png", "--out", "link.png")
    assert result.code == 2
    assert (photos / "a.png").read_bytes() == original


def test_internal_errors_are_one_line(run, photos, monkeypatch):
    monkeypatch.setattr(mt.TiTok, "encode_pixels", lambda *args: 1 / 0)
    result = run("encode", photos / "a.png")
    assert result.code == 1
    assert len(result.error_lines) == 1
    assert "internal error" in result.err
