"""The fluent-emoji preparation, on packages made here; nothing is fetched."""

import hashlib
import io
import json
import tarfile

import pytest
from mediatok.core.errors import InvalidInput, MissingDependency, ModelNotFound
from mediatok.training import fetch_emoji, fetch_features, npm_package
from PIL import Image

EMOJI = [
    {"unified": "1F34E", "name": "RED APPLE", "short_name": "apple", "category": "Food", "subcategory": "fruit"}
    | {"image": "1f34e.png"},
    {"unified": "0023-FE0F-20E3", "non_qualified": "0023-20E3", "name": "HASH KEY", "short_name": "hash"}
    | {"category": "Symbols", "subcategory": "keycap", "image": "0023-fe0f-20e3.png"},
    {"unified": "1F44B", "name": "WAVING HAND SIGN", "short_name": "wave", "category": "People", "subcategory": "hand"}
    | {
        "image": "1f44b.png",
        "skin_variations": {
            "1F3FB": {"unified": "1F44B-1F3FB", "image": "1f44b-1f3fb.png"},
            "1F3FF": {"unified": "1F44B-1F3FF", "image": "../../escape.png"},
        },
    },
]
FILES = ("1f34e", "23-20e3", "1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "1fae9")
BASES = ("1F34E", "0023-FE0F-20E3", "1F44B", "1F44B", "1F44B", "1fae9")
DRAWN = {"1f34e": "1f34e.png", "23-20e3": "0023-fe0f-20e3.png", "1f44b": "1f44b.png", "1f44b-1f3fb": "1f44b-1f3fb.png"}


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
    for number, name in enumerate((*DRAWN.values(), "1f600.png", "../../../../escape.png")):
        drawing = io.BytesIO()
        Image.new("RGBA", (64, 64), (0, 0, 40 * number, 255)).save(drawing, "PNG")
        labels[f"package/img/google/64/{name}"] = drawing.getvalue()
    monkeypatch.setattr(fetch_emoji, "PICTURES", ("pictures@1", *package(folder / "p.tgz", members)))
    monkeypatch.setattr(fetch_emoji, "LABELS", ("labels@1", *package(folder / "l.tgz", labels)))
    return folder


def prepare(out, packages):
    with npm_package.npm_packages(packages) as get:
        return fetch_emoji.prepare(out, get)


def base_is_held_out(base):
    return int(hashlib.sha1(base.encode()).hexdigest(), 16) % 10 == 0


def counts(monkeypatch, train, val):
    monkeypatch.setattr(fetch_emoji, "NUM_TRAIN", train)
    monkeypatch.setattr(fetch_emoji, "NUM_VAL", val)


def test_prepare(packages, tmp_path, monkeypatch):
    in_val = [base_is_held_out(base) for base in BASES]
    counts(monkeypatch, in_val.count(False), in_val.count(True))
    out = tmp_path / "data" / "emoji"
    out.parent.mkdir()
    assert prepare(out, packages) == {"train": in_val.count(False), "val": in_val.count(True)}
    labels = json.loads((out / "labels.json").read_text())
    assert [labels[name]["base"] for name in FILES] == list(BASES)
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


def test_google_drawings_have_the_names_and_splits_of_the_others(packages, tmp_path, monkeypatch):
    in_val = dict(zip(FILES, (base_is_held_out(base) for base in BASES), strict=True))
    counts(monkeypatch, list(in_val.values()).count(False), list(in_val.values()).count(True))
    num_val = sum(in_val[name] for name in DRAWN)
    monkeypatch.setattr(fetch_emoji, "NUM_GOOGLE_TRAIN", len(DRAWN) - num_val)
    monkeypatch.setattr(fetch_emoji, "NUM_GOOGLE_VAL", num_val)
    fluent, google = tmp_path / "data" / "fluent", tmp_path / "data" / "google"
    arguments = ["--out", str(fluent), "--google", str(google), "--packages", str(packages)]
    assert fetch_emoji.main(arguments) == 0
    found = {path.stem: path for path in google.glob("64/*/*.png")}
    assert set(found) == set(DRAWN)
    for number, name in enumerate(DRAWN):
        assert found[name].parent.name == ("val" if in_val[name] else "train")
        assert Image.open(found[name]).getpixel((0, 0)) == (0, 0, 40 * number)
    assert "Apache License 2.0" in (google / "LICENCE").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "packages"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["fluent", "google"]
    assert fetch_emoji.main([*arguments[:4], "--packages", str(tmp_path / "gone")]) == 0  # both are there already


def test_wrong_counts_write_nothing(packages, tmp_path, monkeypatch):
    counts(monkeypatch, 1, 1)
    with pytest.raises(InvalidInput, match="expected 1 train"):
        prepare(tmp_path / "emoji", packages)
    assert not (tmp_path / "emoji").exists()


def test_changed_package_is_refused(packages, tmp_path):
    path = packages / "p.tgz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidInput, match="pictures@1"):
        prepare(tmp_path / "emoji", packages)


def test_no_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(npm_package.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="npm"):
        prepare(tmp_path / "emoji", None)


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
