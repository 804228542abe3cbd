"""The preparation of Asterisk's prompts, on packages made here; nothing is fetched and nothing decodes G.722."""

import gzip
import hashlib
import io
import json
import sys
import tarfile

import pytest
from mediatok.core.audio import read_audio
from mediatok.core.errors import InvalidInput, MissingDependency
from mediatok.training import fetch_asterisk

TEXTS = """\ufeff; Core sounds

activated: Attivato.
digits/7: sette
beep: [tono]
silence/1: (1 secondo di silenzio)
letters/exclaim: [!] punto  esclamativo
missing: non c'è
a line without a colon
"""


class EveryByteTwice:
    """Stands for the codec: two samples a byte."""

    def __init__(self, rate, bit_rate):
        assert (rate, bit_rate) == (16000, 64000)

    def decode(self, data):
        return [sample for byte in data for sample in (byte * 100, byte * 100)]


def write_deb(path, contents):
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w:xz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with path.open("wb") as file:
        data = tar_bytes.getvalue()
        file.write(b"!<arch>\n" + f"{'data.tar.xz':16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode() + data)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.stem, path.name, path.stat().st_size, digest, "https://localhost:1/nothing"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder, found = tmp_path / "packages", {}
    folder.mkdir()
    for language in ("it", "ru"):
        names = ("activated", "digits/7", "beep", "silence/1", "letters/exclaim", "unknown")
        where = f"./usr/share/asterisk/sounds/{language}_XX_m_Name"
        sounds = {f"{where}/{name}.g722": bytes(range(100)) * 20 for name in names}
        doc = f"./usr/share/doc/asterisk-core-sounds-{language}"
        texts = {f"{doc}/core-sounds-{language}.txt.gz": gzip.compress(TEXTS.encode()), f"{doc}/copyright": b"CC-BY"}
        found[language] = (
            write_deb(folder / f"{language}-s.deb", sounds),
            write_deb(folder / f"{language}.deb", texts),
        )
    monkeypatch.setattr(fetch_asterisk, "PACKAGES", found)
    monkeypatch.setattr(fetch_asterisk, "NUM_CLIPS", 6)
    monkeypatch.setitem(sys.modules, "G722", type(sys)("G722"))
    monkeypatch.setattr(sys.modules["G722"], "G722", EveryByteTwice, raising=False)
    return folder


def test_prepare(packages, tmp_path):
    out = tmp_path / "asterisk"
    counts = fetch_asterisk.prepare(out, packages)
    keys = [f"{language}-{name}" for language in ("it", "ru") for name in ("activated", "digits_7", "letters_exclaim")]
    assert sum(counts.values()) == 6
    splits = json.loads((out / "splits.json").read_text())
    assert sorted(name for names in splits.values() for name in names) == keys
    for split, names in splits.items():
        places = {int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 for name in names}
        assert places <= {"val": {0}, "test": {10}, "train": set(range(20)) - {0, 10}}[split]
    lines = (out / "transcripts.tsv").read_text().splitlines()
    assert lines[:3] == ["it-activated\tAttivato.", "it-digits_7\tsette", "it-letters_exclaim\tpunto esclamativo"]
    wave = read_audio(out / "wav" / "ru-digits_7.wav")
    assert (wave.sample_rate, wave.samples.shape) == (16000, (1, 4000))
    assert float(wave.samples[0, 21]) == 1000 / 2**15
    assert (out / "LICENCE").read_text() == "CC-BY"
    assert fetch_asterisk.prepare(out, packages) == counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asterisk", "packages"]


def test_wrong_counts_write_nothing(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_asterisk, "NUM_CLIPS", 1136)
    with pytest.raises(InvalidInput, match="6 spoken clips, expected 1136"):
        fetch_asterisk.prepare(tmp_path / "asterisk", packages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages"]


def test_without_the_decoder(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "G722", None)
    with pytest.raises(MissingDependency, match="pip install G722"):
        fetch_asterisk.prepare(tmp_path / "asterisk", packages)
    assert fetch_asterisk.main(["--out", str(tmp_path / "a"), "--packages", str(packages)]) == 2
    assert "error: " in capsys.readouterr().err
