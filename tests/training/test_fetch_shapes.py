"""The preparation of furniture and of random solids, on packages made here; nothing is fetched."""

import hashlib
import io
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import trimesh
from mediatok.core.errors import InvalidInput, ModelNotFound
from mediatok.core.meshes import read_mesh
from mediatok.training import fetch_furniture, fetch_pybullet
from mediatok.training.shape_sets import read_catalogue

BOX = trimesh.creation.box((1, 2, 3)).export(file_type="obj").encode()
SHEET = b"v 0 0 0\nv 1 0 0\nv 1 0 1\nv 0 0 1\nf 1 2 3\nf 1 3 4\n"  # nothing is inside it


def catalogue(folder, models, **extra):
    """A Sweet Home 3D catalogue file with `models`: {stem: (name, category, OBJ bytes)}."""
    lines = ["# comment", "name=Test", "license=as always"]
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for number, (stem, (name, category, mesh)) in enumerate(models.items(), 1):
            path = f"{folder}/{stem}/{stem}.obj"
            archive.writestr(path, mesh)
            lines += [f"name#{number}={name}", f"category#{number}={category}", f"model#{number}=/{path}"]
            lines += [f"{key}#{number}={value}" for key, value in extra.items()]
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin-1"))
    return data.getvalue()


def write_deb(path, contents):
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w:xz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, data in {"debian-binary": b"2.0\n", "data.tar.xz": tar_bytes.getvalue()}.items():
            file.write(f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))
    return path


@pytest.fixture
def furniture(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    chairs = {f"chair{n}": (f"Oak chair {n}" if n else "Café chair", "Office", BOX) for n in range(12)}
    members = {
        f"{fetch_furniture.FOLDER}{source}.sh3f": catalogue(
            source.lower(), {"stairs": ("Stairs", "Staircases", BOX)}, creator="Ann"
        )
        for source in fetch_furniture.SOURCES
    }
    members[f"{fetch_furniture.FOLDER}Scopia.sh3f"] = catalogue(
        "scopia", chairs | {"poster": ("Poster", "Bedroom", SHEET)}, modelRotation="1 0 0 0 0 1 0 -1 0"
    )
    members[fetch_furniture.COPYRIGHT] = b"all of it"
    path = write_deb(folder / "furniture.deb", members)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = ("furniture=0", path.name, path.stat().st_size, digest, "https://localhost:1/nothing")
    monkeypatch.setattr(fetch_furniture, "PACKAGE", package)
    monkeypatch.setattr(fetch_furniture, "NUM_MODELS", 17)
    return folder


def test_furniture(furniture, tmp_path):
    out = tmp_path / "furniture"
    counts = fetch_furniture.prepare(out, furniture, say=lambda text: None)
    assert counts["left out"] == 1  # the poster
    assert counts["train"] + counts["val"] == 16
    entries = read_catalogue(out)
    assert entries["scopia-chair0"] | {"faces": 12} == entries["scopia-chair0"]
    chair = entries["scopia-chair0"]
    assert (chair["name"], chair["category"], chair["object"]) == ("Café chair", "Office", "chair")
    assert (chair["licence"], chair["creator"]) == ("CC-BY 3.0", "Scopia Visual Interfaces Systems")
    assert entries["reallusion-stairs"]["category"] == "Miscellaneous"
    assert entries["reallusion-stairs"]["creator"] == "Ann"
    for key, entry in entries.items():
        held = int(hashlib.sha1(entry["source"].encode()).hexdigest(), 16) % 10 == 0
        assert entry["split"] == ("val" if held else "train")
        assert (out / entry["split"] / f"{key}.ply").is_file()
    turned = read_mesh(out / chair["split"] / "scopia-chair0.ply")
    assert np.allclose(turned.extents, (1, 3, 2))  # y becomes -z, and z becomes y
    assert (out / "LICENCE").read_bytes() == b"all of it"
    credits_file = (out / "ATTRIBUTION.md").read_text()
    assert "| scopia-chair0 | Café chair | Scopia" in credits_file
    assert "creativecommons.org/licenses/by/3.0/us/" in credits_file
    shutil.rmtree(furniture)
    again = fetch_furniture.prepare(out, furniture)  # already there
    assert again == {"train": counts["train"], "val": counts["val"]}


def test_wrong_number_of_models_writes_nothing(furniture, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_furniture, "NUM_MODELS", 820)
    with pytest.raises(InvalidInput, match="17 models, expected 820"):
        fetch_furniture.prepare(tmp_path / "out", furniture)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", catalogue("scopia", {})[:-30]])
def test_damaged_catalogues(data):
    with pytest.raises(InvalidInput, match=r"Scopia\.sh3f is damaged"):
        list(fetch_furniture.read_sh3f("Scopia", data))


def test_properties():
    text = "name#1=A=B\n# name#2=no\nname=none\ncategory#1 = Office\nname#3=it\\'s"
    assert fetch_furniture.read_properties(text) == {"name": {"1": "A=B", "3": "it's"}, "category": {"1": "Office"}}


def test_pybullet(tmp_path, monkeypatch):
    wheel = tmp_path / fetch_pybullet.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for number in range(3):
            archive.writestr(f"pybullet_data/random_urdfs/{number:03d}/{number:03d}.obj", BOX)
        archive.writestr("pybullet_data/random_urdfs/003/004.obj", BOX)
        archive.writestr("pybullet_data/plane.obj", SHEET)
        archive.writestr(fetch_pybullet.LICENCE, b"zlib licence")
    monkeypatch.setattr(fetch_pybullet, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(InvalidInput, match="3 shapes, expected 1000"):
        fetch_pybullet.prepare(tmp_path / "solids", tmp_path)
    monkeypatch.setattr(fetch_pybullet, "NUM_SHAPES", 3)
    counts = fetch_pybullet.prepare(tmp_path / "solids", tmp_path)
    assert counts["train"] + counts["val"] == 3
    assert (tmp_path / "solids" / "LICENCE").read_bytes() == b"zlib licence"
    assert set(read_catalogue(tmp_path / "solids")) == {"pybullet-000", "pybullet-001", "pybullet-002"}
    wheel.write_bytes(b"other")
    with pytest.raises(InvalidInput, match="SHA-256"):
        fetch_pybullet.prepare(tmp_path / "more", tmp_path)
    with pytest.raises(ModelNotFound, match="missing"):
        fetch_pybullet.prepare(tmp_path / "more", tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", '{"a": {}}', '{"a": {"split": "test"}}', "\xff"])
def test_what_is_no_catalogue(tmp_path, text):
    (tmp_path / "catalogue.json").write_text(text)
    with pytest.raises(InvalidInput, match="catalogue"):
        read_catalogue(tmp_path)
