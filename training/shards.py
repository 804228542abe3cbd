"""Webdataset shards (uncompressed tar files) as a numbered collection of pictures.

A shard is indexed once by reading its headers, and pictures are then read by offset: nothing is extracted, memory stays
at a few numbers a picture, and any place in the run can be reached at once. Members that are not plain files, or whose
name, kind or size is not what a picture or caption has, are ignored.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from glob import glob
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.errors import InvalidInput
from ..core.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, read_image

MAX_CAPTION_BYTES = 64 * 1024
MAX_NAME_LENGTH = 1024
SHUFFLE_WINDOW = 16_384  # pictures shuffled together; whole shards are shuffled first, so reading stays sequential
NO_CAPTION = -1


def expand_shards(pattern: str) -> list[Path]:
    """Existing files of "data/{000..127}.tar", "data/*.tar" or a plain path, in order."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InvalidInput(f"{pattern!r}: shards are read from local or mounted files; download them first")
    names = [pattern]
    while match := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
        first, last = match.groups()
        if int(last) - int(first) > 100_000:
            raise InvalidInput(f"{pattern!r} names more than 100,000 shards")
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        names = [re.sub(r"\{\d+\.\.\d+\}", number, name, count=1) for name in names for number in numbers]
    paths = [Path(path) for name in names for path in (sorted(glob(name)) if "*" in name else [name])]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise InvalidInput(f"shard {missing[0] if missing else pattern} does not exist")
    return paths


class ShardSet:
    """Pictures of several shards. `keep(key)` chooses members by their key, the name up to the first dot."""

    def __init__(self, paths: list[Path], keep: Callable[[str], bool] | None = None):
        self.paths = paths
        parts = []
        for number, path in enumerate(paths):
            members = [(number, *member) for member in index_shard(path, keep)]
            parts.append(np.asarray(members, dtype=np.int64).reshape(-1, 5))
        self._rows = np.concatenate(parts)  # shard, offset, bytes, caption offset, caption bytes
        if not len(self._rows):
            raise InvalidInput(f"{paths[0]} and {len(paths) - 1} more shards hold no pictures")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[Image.Image, str]:
        shard, offset, size, caption_offset, caption_size = (int(value) for value in self._rows[index])
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            data = file.read(size)
            caption = b""
            if caption_offset != NO_CAPTION:
                file.seek(caption_offset)
                caption = file.read(caption_size)
        return read_image(data), caption.decode("utf-8", "replace").strip()

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All indices once: shards in random order, their pictures shuffled within windows."""
        shard_of = self._rows[:, 0]
        rank = rng.permutation(len(self.paths))[shard_of]
        order = np.argsort(rank, kind="stable")
        for start in range(0, len(order), SHUFFLE_WINDOW):
            rng.shuffle(order[start : start + SHUFFLE_WINDOW])
        return order


def index_shard(path: Path, keep: Callable[[str], bool] | None = None) -> list[tuple[int, int, int, int]]:
    """Offset and size of each picture and of its caption (-1, 0 without one), in the order of the file.

    Raises:
        InvalidInput: not an uncompressed tar file, or one that ends early.
    """
    pictures: dict[str, tuple[int, int]] = {}
    captions: dict[str, tuple[int, int]] = {}
    file_size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # the reader would keep every header
                if not _is_usable(member, file_size):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, place = f"{folder}/{stem}", (member.offset_data, member.size)
                if keep is not None and not keep(stem):
                    continue
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    pictures.setdefault(key, place)
                elif suffix.lower() == "txt" and member.size <= MAX_CAPTION_BYTES:
                    captions.setdefault(key, place)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InvalidInput(f"shard {path} is not a whole, uncompressed tar file: {error}") from error
    return [(*place, *captions.get(key, (NO_CAPTION, 0))) for key, place in pictures.items()]


def _is_usable(member: tarfile.TarInfo, file_size: int) -> bool:
    parts = member.name.split("/")
    return (
        member.isreg()
        and not member.issparse()
        and len(member.name) <= MAX_NAME_LENGTH
        and not member.name.startswith(("/", "."))
        and ".." not in parts
        and 0 < member.size <= MAX_IMAGE_BYTES
        and member.offset_data + member.size <= file_size
    )
