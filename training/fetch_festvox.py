"""Prepare the festvox-ru recordings: `python -m mediatok.training.fetch_festvox --out data/festvox-ru`.

620 sentences of one male speaker in a studio, 99.5 minutes at 16 kHz, with transcripts and phone times (Debian's
`festvox-ru` 0.5, Nickolay V. Shmyrev, BSD-like licence):

    OUT/wav/ru_0001.wav        16-bit mono
    OUT/transcripts.tsv        ru_0001 <tab> text, without the signs that mark stress
    OUT/phones/ru_0001.tsv     start <tab> end <tab> phone, in seconds
    OUT/splits.json            {"train": ["ru_0001", ...], "val": [...], "test": [...]}: 557, 30 and 33 names
    OUT/LICENCE

The split is by number, modulo 20: 0 is val, 10 is test, the rest train.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import InvalidInput, MediatokError, ModelNotFound
from .speech_data import SPLITS_FILE

# name=version as apt knows it, file, bytes, SHA-256, where Debian's mirrors have it.
PACKAGE = (
    "festvox-ru=0.5+dfsg-6", "festvox-ru_0.5+dfsg-6_all.deb", 178_728_512,
    "21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4",
    "https://deb.debian.org/debian/pool/main/f/festvox-ru/festvox-ru_0.5%2bdfsg-6_all.deb",
)  # fmt: skip
NUM_CLIPS = {"train": 557, "val": 30, "test": 33}
VOICE = "./usr/share/festival/voices/russian/msu_ru_nsh_clunits/"
COPYRIGHT = "./usr/share/doc/festvox-ru/copyright"
MEMBER = re.compile(re.escape(VOICE) + r"(wav|lab)/(ru_\d{4})\.(?:wav|lab)")
SENTENCE = re.compile(r'\( (ru_\d{4}) "(.*)" \)')
MAX_MEMBER_BYTES = 8 * 2**20
TIMEOUT = 60  # seconds without an answer
Package = tuple[str, str, int, str, str]


def prepare(out: Path, packages: Path | None = None) -> dict[str, int]:
    """Make the data set in `out`; counts of its splits.

    packages: folder that already holds the package file; without it apt or a Debian mirror gives it.

    Raises:
        ModelNotFound: the package cannot be fetched. InvalidInput: it is not what it should be.
    """
    if (out / SPLITS_FILE).is_file():
        return {split: len(names) for split, names in json.loads((out / SPLITS_FILE).read_text()).items()}
    with tempfile.TemporaryDirectory() as scratch:
        package = fetch_deb(PACKAGE, packages or Path(scratch), download=packages is None)
        staged = out.with_name(out.name + ".writing")
        shutil.rmtree(staged, ignore_errors=True)
        try:
            splits = _lay_out(package, staged)
            counts = {split: len(names) for split, names in splits.items()}
            if counts != NUM_CLIPS:
                raise InvalidInput(f"{package.name} holds {counts} clips, expected {NUM_CLIPS}")
            shutil.rmtree(out, ignore_errors=True)
            os.replace(staged, out)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return counts


def split_of(name: str) -> str:
    """The split of a clip "ru_NNNN"."""
    return {0: "val", 10: "test"}.get(int(name.removeprefix("ru_")) % 20, "train")


def fetch_deb(package: Package, folder: Path, download: bool) -> Path:
    """The package's file in `folder`, whole and unchanged; `download` gets it by apt, or from a mirror without apt."""
    name, file_name, size, digest, url = package
    path = folder / file_name
    if download and not _apt_download(name, folder, path):
        _http_download(url, path, size)
    if not path.is_file():
        raise ModelNotFound(f"{path} is missing")
    with path.open("rb") as file:
        same = path.stat().st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == digest
    if not same:
        raise InvalidInput(f"{path} is not {name}: {path.stat().st_size} bytes instead of {size}, or other contents")
    return path


def deb_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the plain files in a Debian package; nothing is written to the disk.

    Raises:
        InvalidInput: not a Debian package.
    """
    with path.open("rb") as file:
        data = _ar_member(file, "data.tar", path.name)
        try:
            with tarfile.open(fileobj=data) as tar:
                for member in tar:
                    if member.isreg() and member.size <= MAX_MEMBER_BYTES:
                        yield member.name, tar.extractfile(member).read()
        except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
            raise InvalidInput(f"{path.name} is damaged: {error}") from error


def _apt_download(name: str, folder: Path, path: Path) -> bool:
    apt = shutil.which("apt-get")
    if apt is None:
        return False
    command = [apt, "--quiet", "download", name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode == 0 and path.is_file()


def _http_download(url: str, path: Path, size: int) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, path.open("wb") as file:
            left = size + 1  # one more than it should be tells too long a file from the right one
            while left and (block := answer.read(min(left, 2**20))):
                file.write(block)
                left -= len(block)
    except (urllib.error.URLError, OSError) as error:
        raise ModelNotFound(
            f"{path.name} could not be fetched by apt-get nor from {url} ({getattr(error, 'reason', error)}); "
            "download it elsewhere and pass its folder with --packages"
        ) from error


def _ar_member(file, prefix: str, where: str) -> io.BytesIO:
    """The member of an `ar` archive whose name begins with `prefix` (60-byte headers, members at even offsets)."""
    if file.read(8) != b"!<arch>\n":
        raise InvalidInput(f"{where} is not a Debian package")
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode("ascii", "replace").strip(), header[48:58].strip()
        if not size.isdigit():
            break
        if name.startswith(prefix):
            return io.BytesIO(file.read(int(size)))
        file.seek(int(size) + int(size) % 2, os.SEEK_CUR)
    raise InvalidInput(f"{where} has no member {prefix}*; it is not a Debian package, or damaged")


def _lay_out(package: Path, out: Path) -> dict[str, list[str]]:
    """Write the data set to `out`; the names of each split."""
    for folder in ("wav", "phones"):
        (out / folder).mkdir(parents=True)
    names, labelled, sentences = [], set(), {}
    for path, data in deb_members(package):
        match = MEMBER.fullmatch(path)
        if match is not None and match[1] == "wav":
            names.append(match[2])
            (out / "wav" / f"{match[2]}.wav").write_bytes(data)
        elif match is not None:
            labelled.add(match[2])
            (out / "phones" / f"{match[2]}.tsv").write_text(_phones(data.decode()))
        elif path == f"{VOICE}etc/txt.done.data":
            lines = map(SENTENCE.fullmatch, data.decode().splitlines())
            sentences = {line[1]: line[2].replace("+", "") for line in lines if line}
        elif path == COPYRIGHT:
            (out / "LICENCE").write_bytes(data)
    if set(names) != set(sentences) or set(names) != labelled:
        raise InvalidInput(
            f"{package.name}: {len(names)} clips, {len(labelled)} phone files and {len(sentences)} texts do not match"
        )
    (out / "transcripts.tsv").write_text("".join(f"{name}\t{sentences[name]}\n" for name in sorted(names)))
    splits: dict[str, list[str]] = {split: [] for split in NUM_CLIPS}
    for name in sorted(names):
        splits[split_of(name)].append(name)
    (out / SPLITS_FILE).write_text(json.dumps(splits, indent=0))
    return splits


def _phones(label_file: str) -> str:
    """Lines "end 125 phone" after a "#" line -> lines "start <tab> end <tab> phone"."""
    lines, start = [], 0.0
    for line in label_file.partition("#")[2].splitlines():
        if line.strip():
            end, _, phone = line.split()
            lines.append(f"{start:g}\t{float(end):g}\t{phone}\n")
            start = float(end)
    return "".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.fetch_festvox", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/festvox-ru"))
    parser.add_argument("--packages", type=Path, help=f"folder that already holds {PACKAGE[1]}")
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
