"""Packages of the npm registry as files: fetched at a pinned version, checked, and read without unpacking them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import InvalidInput, MissingDependency, ModelNotFound

MAX_MEMBER_BYTES = 8 * 2**20
Package = tuple[str, str, int, str]  # name@version, file that `npm pack` writes, bytes, SHA-256


@contextmanager
def npm_packages(folder: Path | None) -> Iterator[Callable[[Package], Path]]:
    """A function from a package to its checked file, which lies in `folder`; without one, npm fetches each package
    once, into a folder that goes away at the end.

    The function raises MissingDependency: npm is not installed. ModelNotFound: a package cannot be fetched, or is not
    in `folder`. InvalidInput: it is not what it should be.
    """
    if folder is not None:
        yield lambda package: _checked(package, folder)
        return
    with tempfile.TemporaryDirectory() as scratch:

        def fetched(package: Package) -> Path:
            if not Path(scratch, package[1]).is_file():
                _fetch(package, scratch)
            return _checked(package, Path(scratch))

        yield fetched


def package_members(package_file: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the plain files of a package that are wanted; nothing is written to the disk."""
    with tarfile.open(package_file, "r:gz") as tar:
        for member in tar:
            if member.isreg() and is_wanted(member.name) and member.size <= MAX_MEMBER_BYTES:
                yield member.name, tar.extractfile(member).read()


def _fetch(package: Package, folder: str) -> None:
    name, file_name, _, _ = package
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependency(f"npm is needed to fetch {name}; install it, or pass --packages with {file_name}")
    done = subprocess.run([npm, "pack", "--silent", name], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[-300:]
        raise ModelNotFound(f"npm could not fetch {name}: {reason}")


def _checked(package: Package, folder: Path) -> Path:
    name, file_name, size, digest = package
    path = folder / file_name
    if not path.is_file():
        raise ModelNotFound(f"{path} is missing")
    if path.stat().st_size != size or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise InvalidInput(f"{path} is not {name}: {path.stat().st_size} bytes instead of {size}, or other contents")
    return path
