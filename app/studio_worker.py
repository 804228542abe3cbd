"""The studio's device and the models on it: one job at a time, each with its own Stop, models kept while memory lasts.

Gradio's own queue is not enough here: REST calls pass it by, and cancelling an event does not stop the function that
runs. So a first-come-first-served lock of our own guards the device, and every job has a flag that `on_step` checks.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import Cancelled, LimitExceeded

GIB = 2**30


class Job:
    """One piece of work for one user. `stop()` may come from any thread; the work ends at its next `on_step`."""

    def __init__(self):
        self._stopped = threading.Event()
        self.seconds = 0.0  # time on the device, without the wait

    def stop(self) -> None:
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if somebody stopped this job."""
        if self.is_stopped:
            raise Cancelled("Stopped.")

    def on_step(self, step: int, total: int, preview=None) -> None:
        """The `on_step` callback of this job."""
        self.check()


class Device:
    """First come, first served access to the accelerator, or to the processor where there is none."""

    def __init__(self, max_waiting: int = 16):
        self.max_waiting = max_waiting
        self._turn = threading.Condition()
        self._queue: deque[Job] = deque()  # the job at the head holds the device

    @property
    def num_jobs(self) -> int:
        """Jobs that run or wait."""
        return len(self._queue)

    @contextmanager
    def hold(self, job: Job) -> Iterator[Job]:
        """Wait for the device and hold it.

        Raises:
            LimitExceeded: too many jobs wait already.
            Cancelled: the job was stopped while it waited.
        """
        with self._turn:
            if len(self._queue) > self.max_waiting:
                raise LimitExceeded(f"The studio is busy: {len(self._queue)} jobs are waiting. Try again in a moment.")
            self._queue.append(job)
            try:
                while self._queue[0] is not job:
                    job.check()
                    self._turn.wait(timeout=0.05)  # the timeout is for Stop, which does not know this condition
                job.check()
            except BaseException:
                self._leave(job)
                raise
        started = time.perf_counter()
        try:
            yield job
        finally:
            job.seconds += time.perf_counter() - started
            with self._turn:
                self._leave(job)

    def _leave(self, job: Job) -> None:
        self._queue.remove(job)
        self._turn.notify_all()


def newest(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """Run `work(emit)` in a thread and yield what it emits; of what came while nobody looked, only the newest.

    What `work` returns is yielded last; what it raises is raised here. A generator that is closed lets `work` end.
    """
    turn, slot = threading.Condition(), {}

    def put(key: str, value) -> None:
        with turn:
            slot[key] = value
            turn.notify_all()

    def run() -> None:
        try:
            put("result", work(lambda value: put("news", value)))
        except BaseException as error:
            put("error", error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        with turn:
            turn.wait_for(lambda: slot)
            taken = dict(slot)
            slot.clear()
        if "error" in taken:
            raise taken["error"]
        yield from (taken[key] for key in ("news", "result") if key in taken)
        if "result" in taken:
            return


class ModelShelf:
    """Models in memory, shared by all users and read-only; the least recently used go first when memory is short."""

    def __init__(self, load: Callable[[str], object], max_bytes: int | None = None):
        self.max_bytes = default_model_memory() if max_bytes is None else max_bytes
        self._load = load
        self._models: OrderedDict[str, object] = OrderedDict()
        self._lock = threading.RLock()
        self._loading: dict[str, threading.Lock] = {}

    def get(self, source: str):
        """The model of a name, folder or hub id; loaded on first use, and waited for if another user loads it."""
        with self._lock:
            if source in self._models:
                self._models.move_to_end(source)
                return self._models[source]
            gate = self._loading.setdefault(source, threading.Lock())
        with gate:
            with self._lock:
                if source in self._models:
                    return self._models[source]
            model = self._load(source)
            with self._lock:
                self._models[source] = model
                self._loading.pop(source, None)
                self._evict(keep=source)
            return model

    def unload(self, source: str) -> bool:
        """Drop a model; a job that uses it right now keeps it until it ends. False if it was not loaded."""
        with self._lock:
            return self._models.pop(source, None) is not None

    def loaded(self) -> dict[str, int]:
        """Source -> bytes of its parameters and buffers, least recently used first."""
        with self._lock:
            return {source: model_bytes(model) for source, model in self._models.items()}

    @property
    def used_bytes(self) -> int:
        return sum(self.loaded().values())

    def _evict(self, keep: str) -> None:
        while self.used_bytes > self.max_bytes and len(self._models) > 1:
            oldest = next(source for source in self._models if source != keep)
            del self._models[oldest]


def model_bytes(model) -> int:
    """Bytes of a model's parameters and buffers, packed ones included."""
    tensors = [*model.parameters(), *model.buffers()]
    packed = sum(getattr(module, "packed_bytes", 0) for module in model.modules())
    return packed + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def default_model_memory() -> int:
    """What models may use: half of the accelerator's memory, or of this machine's; between 1 and 64 GiB."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        total = memory_limit()
    return min(max(total // 2, GIB), 64 * GIB)


def memory_limit() -> int:
    """Memory of this machine in bytes, or the container's limit if that is lower."""
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(total, int(file.read()))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return total


def resident_bytes() -> int:
    """Memory this process holds now, in bytes (0 where the system does not say)."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def device_name(device: str) -> str:
    """A device as people call it: the name of the accelerator, or "CPU"."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return device.upper()
