"""What the studio keeps for one open page: the picture, its tokens, the running jobs and a private folder.

Gradio copies the `State` value for every new page, and an hour after the page closes it calls `close`; nothing of a
user outlives that.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from .studio_worker import Job


class Session:
    """Private data of one page. The server makes one prototype; a copy of it is a fresh session."""

    def __init__(self, root: Path, picture: Path, first_result=None, first_curves=None, first_gallery=None):
        self._first = (root, picture, first_result, first_curves, first_gallery)
        self._root = root
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._jobs: dict[tuple[str, str], Job] = {}
        self.pictures = {"image": picture, "compare": picture}  # what each tab works on
        self._sound = dict(self.pictures)  # of each tab: the last picture that could be read
        self.result = first_result  # what the Image tab shows (studio_actions.Result); replaced whole, never changed
        self.position = 0  # of the chosen token
        self.curves: tuple | None = first_curves  # (what they were measured on, curves by name)
        self.gallery = first_gallery  # what the Generate tab shows (studio_generation.Gallery); replaced whole
        self.chosen = 0  # number of its chosen picture

    def __deepcopy__(self, memo) -> Session:
        return Session(*self._first)

    @property
    def folder(self) -> Path:
        """The session's own folder, made on first use."""
        with self._lock:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="session-", dir=self._root))
            return self._folder

    def new_folder(self, tab: str, kept: int) -> Path:
        """A fresh folder for a tab's files; of its earlier ones `kept` stay, as the page may still be fetching them."""
        shelf = self.folder / tab
        shelf.mkdir(exist_ok=True)
        folders = sorted(shelf.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for old in folders[: len(folders) - kept]:
            shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=shelf))

    @property
    def picture(self) -> Path:
        """The Image tab's picture."""
        return self.pictures["image"]

    def accept(self, tab: str, picture: Path) -> None:
        """The picture could be read; it is what the tab goes back to."""
        self._sound[tab] = picture

    def revert(self, tab: str) -> Path:
        """Back to the last picture of the tab that could be read; returns it."""
        self.pictures[tab] = self._sound[tab]
        return self._sound[tab]

    def start(self, tab: str, part: str = "main") -> Job:
        """Begin a job in a tab. What runs there for the same part is out of date and stops; with "main", all parts."""
        with self._lock:
            for key in [key for key in self._jobs if key == (tab, part) or (part == "main" and key[0] == tab)]:
                self._jobs.pop(key).stop()
            job = self._jobs[tab, part] = Job()
            return job

    def stop(self, tab: str) -> bool:
        """Stop this page's jobs in a tab; no other page notices. False if there were none."""
        with self._lock:
            keys = [key for key in self._jobs if key[0] == tab]
            jobs = [self._jobs.pop(key) for key in keys]
        for job in jobs:
            job.stop()
        return bool(jobs)

    def is_replaced(self, tab: str, job: Job | None) -> bool:
        """Whether another job works in the tab now: what this one shows is out of date."""
        with self._lock:
            return any(key[0] == tab and other is not job for key, other in self._jobs.items())

    def finish(self, job: Job) -> None:
        """Forget a job that has ended."""
        with self._lock:
            for key in [key for key, other in self._jobs.items() if other is job]:
                del self._jobs[key]

    def close(self) -> None:
        """Stop all jobs and delete the folder."""
        with self._lock:
            for job in self._jobs.values():
                job.stop()
            self._jobs.clear()
            folder, self._folder = self._folder, None
            self.result = self.curves = self.gallery = None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
