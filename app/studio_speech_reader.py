"""Uploaded sound, decoded in a process of its own with limits on time and memory, becomes a plain WAV file.

That process is this file, run as `python -m mediatok.app.studio_speech_reader SOURCE TARGET NAME`; it imports no torch,
so that it starts at once. What it writes is read like any other file; what crashes a decoder crashes it alone.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.audio_header import check_rate_and_channels, read_header
from ..core.errors import InvalidInput, LimitExceeded, MediatokError

log = logging.getLogger("mediatok.studio")

MAX_SECONDS = 600  # of a clip on the page; the library and the command line take hours
MEMORY_BYTES = 512 * 2**20  # address space of the process
CPU_SECONDS = 30
WALL_SECONDS = 120  # a busy machine gives less time than the clock shows
FILE_BYTES = 2**20 + MAX_SECONDS * 384_000 * 4  # of the WAV file: the longest clip at the highest rate
BLOCK_FRAMES = 2**16
REFUSED = 3  # exit status that goes with a message

_processes = threading.BoundedSemaphore(2)


@dataclass(frozen=True)
class Clip:
    """Sound that a page works on.

    name: of the file, as its owner calls it. path: a mono WAV file of ours with its samples.
    """

    name: str
    path: Path
    seconds: float
    sample_rate: int


def read_clip(source: Path, folder: Path, name: str | None = None) -> Clip:
    """Decode a file that somebody sent; `folder` gets a WAV file of it, mixed to mono, at its own rate.

    name: what to call it, if not by its file's name.

    Raises:
        InvalidInput: unreadable or damaged.
        LimitExceeded: longer than MAX_SECONDS, or more than the process may spend on it.
    """
    name = name or source.name
    target = folder / f"{Path(name).stem[:60]}.wav"
    command = [sys.executable, "-P", "-m", __spec__.name, str(source), str(target), name]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each would take its part of the memory
    with _processes:
        try:
            ended = subprocess.run(
                command, cwd=folder, env=os.environ | threads, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=WALL_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LimitExceeded(f"{name} takes too long to decode; convert it to a plain WAV file") from None
    told = ended.stdout.decode(errors="replace").strip()
    if ended.returncode == 0:
        facts = json.loads(told)
        return Clip(name, target, facts["frames"] / facts["sample_rate"], facts["sample_rate"])
    target.unlink(missing_ok=True)
    if ended.returncode == REFUSED:
        raise InvalidInput(told)
    log.warning("decoding ended with %d: %s", ended.returncode, ended.stderr[-2000:].decode(errors="replace"))
    raise InvalidInput(f"{name} cannot be decoded within the studio's limits of time and memory; it is damaged")


def main(arguments: list[str]) -> int:
    """The process: decode `SOURCE` to `TARGET` and print the rate and the number of samples, or what is wrong."""
    import numpy  # noqa: F401 - before the limits, which libraries would count against
    import soundfile  # noqa: F401

    _limit()
    try:
        print(json.dumps(_decode(Path(arguments[0]), Path(arguments[1]), arguments[2])))
    except MediatokError as error:
        print(error)
        return REFUSED
    except MemoryError:
        print(f"{arguments[2]} needs more memory than a clip may take here")
        return REFUSED
    return 0


def _limit() -> None:
    import resource

    limits = {"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_CPU": CPU_SECONDS, "RLIMIT_FSIZE": FILE_BYTES, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is there already
            resource.setrlimit(getattr(resource, name), (value, value))


def _decode(source: Path, target: Path, where: str) -> dict[str, int]:
    import numpy as np
    import soundfile

    with open(source, "rb") as file:
        read_header(file, source.stat().st_size, where)
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            check_rate_and_channels(rate, file.channels, where)
            total = 0
            with soundfile.SoundFile(target, "w", rate, 1, format="WAV", subtype="FLOAT") as written:
                while len(frames := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
                    total += len(frames)
                    if total > MAX_SECONDS * rate:
                        raise LimitExceeded(
                            f"{where} lasts more than {MAX_SECONDS // 60} minutes, the longest clip here; "
                            "the command line takes hours"
                        )
                    if not np.isfinite(frames).all():
                        raise InvalidInput(f"{where} holds samples that are NaN or infinite")
                    written.write(frames.mean(axis=1, dtype=np.float32))
            if total == 0:
                raise InvalidInput(f"{where} holds no samples")
            if total < file.frames < 2**62:  # an Ogg file without an end says a huge number
                raise InvalidInput(f"{where} is truncated: {total:,} of {file.frames:,} samples are there")
    except soundfile.LibsndfileError as error:
        raise InvalidInput(f"{where} is damaged: {error.error_string}") from None
    return {"sample_rate": rate, "frames": total}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
