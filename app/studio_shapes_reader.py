"""Uploaded meshes, read in a process of its own with limits on time and memory, become plain arrays and a GLB file.

That process is this file, run as `python -m mediatok.app.studio_shapes_reader SOURCE FOLDER NAME`. What crashes a
reader, or takes too long in one, ends it alone.

Shape suffixes: V vertices, F triangles, 3 coordinates or corners.
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

import numpy as np

from ..core.errors import InvalidInput, LimitExceeded, MediatokError
from ..core.meshes import normalise, read_mesh, write_mesh

log = logging.getLogger("mediatok.studio")

MAX_FACES = 500_000  # of a mesh on the page, which a browser draws; the library and the command line take more
MAX_FACES_WITH_NOTES = 20_000  # finding out what is inside of more takes its time
MEMORY_BYTES = 2**30  # beyond what the process has before it reads
CPU_SECONDS = 60
WALL_SECONDS = 180  # a busy machine gives less time than the clock shows
FILE_BYTES = 2**27  # the most that MAX_FACES make
REFUSED = 3  # exit status that goes with a message
ARRAYS, VIEW, FACTS = "mesh.npz", "original.glb", "facts.json"

_processes = threading.BoundedSemaphore(2)


@dataclass(frozen=True)
class MeshFile:
    """A mesh that a page works on.

    name: of the file, as its owner calls it. folder: what is kept of it, in files of ours. frame: (x, y, z, scale) of
    its `ShapeFrame`. notes: what is odd about it, in short sentences.
    """

    name: str
    folder: Path
    num_faces: int
    frame: tuple[float, float, float, float]
    notes: tuple[str, ...]

    @property
    def view(self) -> Path:
        """A GLB file of the mesh, for the browser."""
        return self.folder / VIEW

    def mesh(self):
        """The `trimesh.Trimesh` that `read_mesh` makes of the owner's file."""
        with np.load(self.folder / ARRAYS, allow_pickle=False) as arrays:
            return read_mesh((arrays["vertices_V3"], arrays["faces_F3"]))


def read_mesh_file(source: Path, folder: Path, name: str | None = None, *, is_ours: bool = False) -> MeshFile:
    """Read a file that somebody sent; `folder`, an empty one, gets what is kept of it.

    name: what to call it, if not by its file's name. is_ours: trust it, and save the time that a process takes.

    Raises:
        InvalidInput: unreadable or damaged.
        LimitExceeded: more faces than MAX_FACES, or more than the process may spend on it.
    """
    name = name or source.name
    if is_ours:
        return _mesh_file(name, folder, convert(source, folder, name))
    command = [sys.executable, "-P", "-m", __spec__.name, str(source), str(folder), name]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each would take its part of the memory
    with _processes:
        try:
            ended = subprocess.run(
                command, cwd=folder, env=os.environ | threads, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=WALL_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LimitExceeded(f"{name} takes too long to read; simplify it, or convert it to GLB") from None
    if ended.returncode == 0:
        return _mesh_file(name, folder, json.loads((folder / FACTS).read_text()))
    if ended.returncode == REFUSED:
        raise InvalidInput(ended.stdout.decode(errors="replace").strip())
    log.warning("reading a mesh ended with %d: %s", ended.returncode, ended.stderr[-2000:].decode(errors="replace"))
    raise InvalidInput(f"{name} cannot be read within the studio's limits of time and memory; simplify it")


def convert(source: Path, folder: Path, name: str) -> dict:
    """Read `source`, write its arrays and its view to `folder`, and return its facts as plain values."""
    mesh = read_mesh(source)
    if len(mesh.faces) > MAX_FACES:
        raise LimitExceeded(
            f"{name} has {len(mesh.faces):,} faces; at most {MAX_FACES:,} are shown here. Simplify it, or use "
            "`mediatok encode`, which takes ten times as many."
        )
    _, frame = normalise(mesh)
    np.savez(folder / ARRAYS, vertices_V3=np.asarray(mesh.vertices), faces_F3=np.asarray(mesh.faces))
    write_mesh(mesh, folder / VIEW)
    return {
        "num_faces": len(mesh.faces), "frame": [frame.x, frame.y, frame.z, frame.scale], "notes": notes_on(mesh),
    }  # fmt: skip


def notes_on(mesh) -> list[str]:
    """What is odd about a mesh, where finding out is quick."""
    if len(mesh.faces) > MAX_FACES_WITH_NOTES:
        return []
    from ..core.solids import solid_of

    return list(solid_of(mesh).notes)


def _mesh_file(name: str, folder: Path, facts: dict) -> MeshFile:
    return MeshFile(name, folder, facts["num_faces"], tuple(facts["frame"]), tuple(facts["notes"]))


def main(arguments: list[str]) -> int:
    """The process: read `SOURCE` into `FOLDER`, or print what is wrong with it."""
    import scipy.spatial  # noqa: F401 - before the limits, which libraries would count against
    import trimesh  # noqa: F401

    _limit()
    source, folder, name = Path(arguments[0]), Path(arguments[1]), arguments[2]
    try:
        (folder / FACTS).write_text(json.dumps(convert(source, folder, name)))
    except MediatokError as error:
        print(error)
        return REFUSED
    except MemoryError:
        print(f"{name} needs more memory than a mesh may take here; simplify it")
        return REFUSED
    return 0


def _limit() -> None:
    import resource

    limits = {"RLIMIT_CPU": CPU_SECONDS, "RLIMIT_FSIZE": FILE_BYTES, "RLIMIT_CORE": 0}
    with suppress(OSError), open("/proc/self/statm") as file:  # only Linux tells
        limits["RLIMIT_AS"] = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    for name, value in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is there already
            resource.setrlimit(getattr(resource, name), (value, value))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
