"""The festvox-ru preparation, on a package made here; nothing is fetched."""

import hashlib
import io
import json
import shutil
import tarfile
import urllib.error

import pytest
from mediatok.core.audio import read_audio
from mediatok.core.errors import InvalidInput, ModelNotFound
from mediatok.training import fetch_festvox

NUMBERS = (1, 2, 10, 20, 30, 40, 41)
SENTENCE = "Прядь вол+ос, з+а ухо."
LABELS = "separator ;\n#\n0.34200 125 pau\n0.5 125 k\n0.64200 125 s\n"


def wav_bytes(seconds=0.1):
    data = b"\x10\x00" * int(seconds * 16000)
    header = b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    header += (1).to_bytes(2, "little") * 2 + (16000).to_bytes(4, "little") + (32000).to_bytes(4, "little")
    header += (2).to_bytes(2, "little") + (16).to_bytes(2, "little")
    return header + b"data" + len(data).to_bytes(4, "little") + data


def members(numbers=NUMBERS):
    voice = fetch_festvox.VOICE
    found = {f"{voice}wav/ru_{number:04d}.wav": wav_bytes() for number in numbers}
    found |= {f"{voice}lab/ru_{number:04d}.lab": LABELS.encode() for number in numbers}
    lines = [f'( ru_{number:04d} "{SENTENCE}" )' for number in numbers]
    found[f"{voice}etc/txt.done.data"] = "\n".join(lines).encode()
    found[fetch_festvox.COPYRIGHT] = b"BSD-like"
    found[f"{voice}wav/../../escape.wav"] = b"evil"
    found["../../outside.wav"] = b"evil"
    return found


def write_deb(path, contents):
    """A Debian package: an `ar` archive of which one member is a tar."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w:xz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo(f"{fetch_festvox.VOICE}wav/ru_0099.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        parts = {"debian-binary": b"2.0\n!", "control.tar.xz": b"x", "data.tar.xz": tar_bytes.getvalue()}
        for name, data in parts.items():
            file.write(f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))
    return path


def pin(monkeypatch, path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = ("festvox-ru=0", path.name, path.stat().st_size, digest, "https://localhost:1/nothing")
    monkeypatch.setattr(fetch_festvox, "PACKAGE", package)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    pin(monkeypatch, write_deb(folder / "festvox.deb", members()))
    monkeypatch.setattr(fetch_festvox, "NUM_CLIPS", {"train": 3, "val": 2, "test": 2})
    return folder


def test_prepare(packages, tmp_path):
    out = tmp_path / "data" / "festvox"
    out.parent.mkdir()
    assert fetch_festvox.prepare(out, packages) == {"train": 3, "val": 2, "test": 2}
    assert json.loads((out / "splits.json").read_text()) == {
        "train": ["ru_0001", "ru_0002", "ru_0041"], "val": ["ru_0020", "ru_0040"], "test": ["ru_0010", "ru_0030"]
    }  # fmt: skip
    transcripts = (out / "transcripts.tsv").read_text().splitlines()
    assert transcripts[0] == "ru_0001\tПрядь волос, за ухо."
    assert len(transcripts) == len(NUMBERS)
    assert (out / "phones" / "ru_0001.tsv").read_text() == "0\t0.342\tpau\n0.342\t0.5\tk\n0.5\t0.642\ts\n"
    assert (out / "LICENCE").read_text() == "BSD-like"
    assert read_audio(out / "wav" / "ru_0041.wav").sample_rate == 16000
    assert len(list((out / "wav").iterdir())) == len(NUMBERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "packages"]
    shutil.rmtree(packages)
    assert fetch_festvox.prepare(out, packages) == {"train": 3, "val": 2, "test": 2}  # already there


def test_wrong_counts_write_nothing(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_festvox, "NUM_CLIPS", {"train": 557, "val": 30, "test": 33})
    with pytest.raises(InvalidInput, match="expected"):
        fetch_festvox.prepare(tmp_path / "festvox", packages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages"]


def test_clips_without_text_are_refused(packages, tmp_path, monkeypatch):
    contents = members() | {f"{fetch_festvox.VOICE}wav/ru_0061.wav": wav_bytes()}
    pin(monkeypatch, write_deb(packages / "festvox.deb", contents))
    with pytest.raises(InvalidInput, match="8 clips, 7 phone files and 7 texts"):
        fetch_festvox.prepare(tmp_path / "festvox", packages)


def test_changed_package_is_refused(packages, tmp_path):
    path = packages / "festvox.deb"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidInput, match="festvox-ru=0"):
        fetch_festvox.prepare(tmp_path / "festvox", packages)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"!<arch>\n" + b" " * 60, b"!<arch>\n"])
def test_what_is_no_package(tmp_path, data):
    path = tmp_path / "p.deb"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"p\.deb"):
        list(fetch_festvox.deb_members(path))


def test_a_damaged_package(packages):
    path = packages / "festvox.deb"
    data = bytearray(path.read_bytes())
    data[-400:-200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match="damaged"):
        list(fetch_festvox.deb_members(path))


def test_download_without_apt(tmp_path, monkeypatch):
    """The mirror is asked, and what it gives is checked; a longer file than expected is not read to its end."""
    deb = write_deb(tmp_path / "right.deb", members())
    pin(monkeypatch, deb)
    asked = []
    answers = {"right": deb.read_bytes(), "long": deb.read_bytes() + bytes(10**6)}

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(answers[name])

    monkeypatch.setattr(fetch_festvox.shutil, "which", lambda program: None)
    monkeypatch.setattr(fetch_festvox.urllib.request, "urlopen", urlopen)
    for name in answers:
        folder = tmp_path / name
        folder.mkdir()
        if name == "right":
            path = fetch_festvox.fetch_deb(fetch_festvox.PACKAGE, folder, download=True)
            assert path.read_bytes() == deb.read_bytes()
        else:
            with pytest.raises(InvalidInput):
                fetch_festvox.fetch_deb(fetch_festvox.PACKAGE, folder, download=True)
            assert (folder / "right.deb").stat().st_size == deb.stat().st_size + 1
    assert asked == ["https://localhost:1/nothing"] * 2


def test_nothing_to_download_from(tmp_path, monkeypatch, capsys):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(fetch_festvox.shutil, "which", lambda program: None)
    monkeypatch.setattr(fetch_festvox.urllib.request, "urlopen", urlopen)
    with pytest.raises(ModelNotFound, match="--packages"):
        fetch_festvox.prepare(tmp_path / "festvox")
    assert fetch_festvox.main(["--out", str(tmp_path / "f"), "--packages", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
