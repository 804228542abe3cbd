"""Reading whole files under a size limit, and writing files that are complete or absent."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InvalidInput, LimitExceeded, MediatokError


def read_limited(path: str | Path, limit_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        InvalidInput: missing, unreadable, empty, or not a regular file (a folder, a pipe, a device).
        LimitExceeded: larger than `limit_bytes`; no more than that is ever read.
    """
    try:
        # Asked before opening: opening a pipe would wait for its writer.
        mode = os.stat(path).st_mode
        data = b""
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                data = file.read(limit_bytes + 1)
    except FileNotFoundError as error:
        raise InvalidInput(f"{shown(path)} does not exist; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise InvalidInput(f"{shown(path)} cannot be read: {_reason(error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InvalidInput(f"{shown(path)} is {kind}; a file is needed")
    if not data:
        raise InvalidInput(f"{shown(path)} is empty (0 bytes)")
    if len(data) > limit_bytes:
        raise LimitExceeded(f"{shown(path)} has more than {limit_bytes:,} bytes, the limit for this kind of file")
    return data


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; the file written there replaces `path` when the block ends.

    If the block raises or the process dies, `path` keeps what it had before. The temporary name is hidden and ends
    with the suffix of `path`, for writers that choose the format by the suffix. A link is followed: its target is
    replaced, not the link.

    Raises:
        MediatokError: the folder is missing or not writable, the disk is full, or `path` is not a regular file.
    """
    target = _writable(path)
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise MediatokError(f"{shown(path)} could not be written: {_reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def shown(path: str | Path) -> str:
    """A path for a message: on one line, whatever characters it has."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _writable(path: str | Path) -> Path:
    """The file that `path` stands for once links are followed, if it can be created or replaced."""
    try:
        target = Path(os.path.realpath(path))
        is_taken = target.exists() and not target.is_file()
        has_folder = target.parent.is_dir()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{shown(path)} cannot be written: {_reason(error)}") from error
    if is_taken:  # renaming over a device such as /dev/null would remove the device
        raise InvalidInput(f"{shown(path)} exists and is not a regular file; choose another name")
    if not has_folder:
        raise InvalidInput(f"the folder of {shown(path)} does not exist; create it first")
    return target


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
