"""What the benchmarks share: alternating timings, peak memory in a process of its own, and the record of a run.

Timings of two ways alternate within one run, so that other load on the machine meets both alike. "cpu" is the processor
time of all threads, which is steadier than the wall clock on a busy machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
from mediatok.kernels import attention, linear

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.Namespace:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each way (default 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME_DATE.md")
    parser.add_argument("--peak", metavar="WAY", help=argparse.SUPPRESS)  # the child process of `peak_mib`
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def alternate(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Run all `ways` in turn, `repeats` times; return for each the medians {"wall": seconds, "cpu": seconds}."""
    walls, cpus = ({name: [] for name in ways} for _ in range(2))
    with torch.inference_mode():
        for run in range(repeats + 1):  # the first is a warm-up
            for name, way in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                way()
                if run:
                    walls[name].append(time.perf_counter() - wall)
                    cpus[name].append(time.process_time() - cpu)
    return {name: {"wall": statistics.median(walls[name]), "cpu": statistics.median(cpus[name])} for name in ways}


def with_torchs_kernels(call: Callable) -> Callable:
    """`call` with the products and the attention that torch picks, in the place of `kernels/`: for the plain ways."""

    @wraps(call)
    def plain(*args, **kwargs):
        with patch.object(linear, "can_pack", lambda: False), \
             patch.object(attention, "_products_are_faster", lambda *tensors: False):  # fmt: skip
            return call(*args, **kwargs)

    return plain


def peak_mib(way: str, threads: int) -> dict[str, dict[str, float]]:
    """Run this script again with `--peak WAY` and return what `report_peaks` found there."""
    command = [sys.executable, sys.argv[0], "--threads", str(threads), "--peak", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_peaks(calls: dict[str, Callable[[], object]]) -> None:
    """Print for each call its peak resident memory, and how much of that it added, in MiB (Linux)."""
    peaks = {}
    with torch.inference_mode():
        for name, call in calls.items():
            Path("/proc/self/clear_refs").write_text("5")  # forget the peaks before
            before = _status_mib("VmRSS")
            call()
            peak = _status_mib("VmHWM")
            peaks[name] = {"peak": peak, "added": peak - before}
    print(json.dumps(peaks))


def _status_mib(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def machine(threads: int) -> str:
    """One line that says where the figures were measured."""
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    units = [unit for unit in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16") if capabilities.get(unit)]
    load = os.getloadavg()[0]
    return (
        f"{name} ({', '.join(units)}), {threads} of {os.cpu_count()} cores, load {load:.1f} at the end of the run, "
        f"torch {torch.__version__}"
    )


def record(name: str, lines: list[str], options: argparse.Namespace) -> None:
    """Print `lines` with the machine and the command; with `--save`, also write them to a dated file."""
    today = datetime.date.today().isoformat()
    command = f"python benchmarks/{name}.py --threads {options.threads} --repeats {options.repeats}"
    text = "\n".join([f"# {name}, {today}", "", f"`{command}`  ", machine(options.threads), "", *lines, ""])
    print(text)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}_{today}.md").write_text(text)
