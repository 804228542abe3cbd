"""Prepare Asterisk's Italian and Russian prompts: `python -m mediatok.training.fetch_asterisk --out data/asterisk`.

1,136 prompts of a telephone exchange by a man (it, Carlo Flora) and a woman (ru, IvrvoiceRU), 46 minutes at 16 kHz,
with their texts; Debian's `asterisk-core-sounds-{it,ru}-g722` 1.6.1, CC-BY 3.0. The package `G722` decodes them.

    OUT/wav/it-digits_7.wav    16-bit mono
    OUT/transcripts.tsv        it-digits_7 <tab> text
    OUT/splits.json            {"train": [names], "val": [names], "test": [names]}
    OUT/LICENCE

The split is by a hash of the name, modulo 20: 0 is val, 10 is test, the rest train. Tones and silence are left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from ..core.audio import Waveform, write_audio
from ..core.errors import InvalidInput, MediatokError, MissingDependency
from .fetch_festvox import Package, deb_members, fetch_deb
from .speech_data import SPLITS_FILE

RATE = 16000
BIT_RATE = 64000
NUM_CLIPS = 1136
ASIDE = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")  # notes on what is heard, which nobody says
MAX_TEXT_BYTES = 2**20


def _package(language: str, suffix: str, size: int, digest: str) -> Package:
    name = f"asterisk-core-sounds-{language}{suffix}"
    file_name = f"{name}_1.6.1-1_all.deb"
    url = f"https://deb.debian.org/debian/pool/main/a/asterisk-core-sounds/{file_name}"
    return (f"{name}=1.6.1-1", file_name, size, digest, url)


# Language -> sounds, texts.
PACKAGES = {
    "it": (
        _package("it", "-g722", 10_087_176, "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016"),
        _package("it", "", 23_972, "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b"),
    ),
    "ru": (
        _package("ru", "-g722", 10_579_440, "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b"),
        _package("ru", "", 25_592, "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab"),
    ),
}


def prepare(out: Path, packages: Path | None = None) -> dict[str, int]:
    """Make the data set in `out`; counts of its splits.

    packages: folder that already holds the four package files; without it apt or a Debian mirror gives them.

    Raises:
        ModelNotFound: a package cannot be fetched. InvalidInput: it is not what it should be.
        MissingDependency: G722 is not installed.
    """
    if not (out / SPLITS_FILE).is_file():
        decode = _decoder()
        staged = out.with_name(out.name + ".writing")
        shutil.rmtree(staged, ignore_errors=True)
        try:
            _lay_out(staged, packages, decode)
            shutil.rmtree(out, ignore_errors=True)
            os.replace(staged, out)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return {split: len(names) for split, names in json.loads((out / SPLITS_FILE).read_text()).items()}


def split_of(name: str) -> str:
    """The split of a clip, by its name alone."""
    return {0: "val", 10: "test"}.get(int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20, "train")


def spoken_texts(lines: str) -> dict[str, str]:
    """Clip -> what is said in it, of lines "name: text"; ";" begins a comment. Clips without a word are left out."""
    texts = {}
    for line in lines.splitlines():
        name, colon, text = line.partition(":")
        text = " ".join(ASIDE.sub(" ", text).split())
        if colon and not line.lstrip("\ufeff").startswith(";") and any(map(str.isalnum, text)):
            texts[name.strip()] = text
    return texts


def _decoder():
    try:
        from G722 import G722
    except ImportError as error:
        raise MissingDependency("the package G722 is needed to decode Asterisk's sounds: pip install G722") from error
    return lambda data: torch.tensor(G722(RATE, BIT_RATE).decode(data), dtype=torch.int16)


def _lay_out(out: Path, packages: Path | None, decode) -> None:
    (out / "wav").mkdir(parents=True)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    transcripts = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages or Path(scratch)
        for language, pair in PACKAGES.items():
            sounds, texts_package = (fetch_deb(package, folder, download=packages is None) for package in pair)
            texts = _texts(texts_package, language, out)
            for path, data in deb_members(sounds):
                _, found, name = path.partition(f"/sounds/{language}_")
                name = name.partition("/")[2].removesuffix(".g722")
                if not found or not path.endswith(".g722") or name not in texts:
                    continue
                key = f"{language}-{name.replace('/', '_')}"
                write_audio(Waveform(decode(data)[None].float() / 2**15, RATE), out / "wav" / f"{key}.wav")
                transcripts.append(f"{key}\t{texts[name]}\n")
                splits[split_of(key)].append(key)
    if len(transcripts) != NUM_CLIPS:
        raise InvalidInput(f"the packages hold {len(transcripts)} spoken clips, expected {NUM_CLIPS}")
    (out / "transcripts.tsv").write_text("".join(sorted(transcripts)))
    (out / SPLITS_FILE).write_text(json.dumps({split: sorted(names) for split, names in splits.items()}, indent=0))


def _texts(package: Path, language: str, out: Path) -> dict[str, str]:
    """The package's texts; its licence goes to `out`."""
    texts: dict[str, str] = {}
    for path, data in deb_members(package):
        if path.endswith(f"/core-sounds-{language}.txt.gz"):
            with gzip.open(io.BytesIO(data)) as file:
                texts = spoken_texts(file.read(MAX_TEXT_BYTES).decode())
        elif path.endswith("/copyright"):
            (out / "LICENCE").write_bytes(data)
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.fetch_asterisk", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/asterisk"))
    parser.add_argument("--packages", type=Path, help="folder that already holds the four .deb files")
    arguments = parser.parse_args(argv)
    try:
        counts = prepare(arguments.out, arguments.packages)
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {', '.join(f'{count} {split}' for split, count in counts.items())} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
