"""Plumbing of the commands: which files a call means, where results go, and going on past bad files.

A file's result is written beside it (`cat.png` -> `cat.mtok`), a folder's results in a new folder beside it
(`photos` -> `photos-tokens`); `--out` names another file or folder. Inputs are never overwritten.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from ..core.errors import InvalidInput, MediatokError

TOKEN_SUFFIXES = (".mtok",)
# Results that lie beside their inputs, as cat.decoded.png, and are no inputs of later calls.
DECODED, RECONSTRUCTED, ENHANCED, RATE = ".decoded", ".reconstructed", ".enhanced", ".rate"
RESULTS = (DECODED, RECONSTRUCTED, ENHANCED, RATE)
BATCH_PIXELS = 2**25  # pictures of a batch together, so that a folder of large ones does not fill the memory
MAX_LINES = 20  # results listed one by one up to here; beyond, only their sum


@dataclass(frozen=True)
class Job:
    """One input file and where its result goes."""

    source: Path
    output: Path


@dataclass
class Outcome:
    """What became of the inputs: one record (a flat dict) for each that worked, one reason for each that did not."""

    records: list[dict] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, source: object, error: object) -> None:
        """Note that `source` could not be processed; the run goes on."""
        reason = one_line(error).removeprefix(str(source)).lstrip(": ")
        self.failures.append((str(source), reason))

    def finish(self, as_json: bool, line: Callable[[dict], str], summary: Callable[[list[dict]], str]) -> None:
        """Print the results, then the failures on stderr; exit code 2 when there are any."""
        if as_json:
            failed = [{"input": source, "error": reason} for source, reason in self.failures]
            print(json.dumps({"results": self.records, "failed": failed}, indent=2))
        elif self.records:
            for record in self.records if len(self.records) <= MAX_LINES else ():
                print(line(record))
            if len(self.records) > 1:
                print(summary(self.records))
        self.finish_failures()

    def finish_failures(self) -> None:
        """List what failed, files with the same reason on one line, and exit with 2; nothing when all went well."""
        if not self.failures:
            return
        sys.stdout.flush()
        by_reason = defaultdict(list)
        for source, reason in self.failures:
            by_reason[reason].append(source)
        for reason, sources in by_reason.items():
            more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
            print(f"error: {', '.join(sources[:3])}{more}: {reason}", file=sys.stderr)
        total = len(self.failures) + len(self.records)
        if total > 1:
            print(f"{len(self.failures)} of {total} inputs failed", file=sys.stderr)
        raise typer.Exit(2)


def one_line(error: object) -> str:
    """The message without line breaks; OSErrors as "path: reason"."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, MediatokError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def collect_files(
    inputs: Sequence[Path], suffixes: tuple[str, ...], outcome: Outcome, skip: Path | None = None
) -> list[tuple[Path, Path | None]]:
    """Files meant by `inputs`, each with the folder that it was found in (None: named itself).

    Folders are searched to their depths for `suffixes`, without hidden files, earlier results of these commands and
    what lies in `skip`. Inputs that do not exist and folders without such files are noted in `outcome`.
    """
    files: list[tuple[Path, Path | None]] = []
    for given in inputs:
        if given.is_dir():
            found = sorted(
                path
                for path in given.rglob("*")
                if path.suffix.lower() in suffixes
                and Path(path.stem).suffix not in RESULTS
                and not any(part.startswith(".") for part in path.relative_to(given).parts)
                and path.is_file()
                and not (skip and skip != given and path.is_relative_to(skip))
            )
            files += [(path, given) for path in found]
            if not found:
                outcome.fail(given, f"this folder has no {', '.join(suffixes)} files")
        elif given.exists():
            files.append((given, None))
        else:
            outcome.fail(given, "no such file or folder")
    seen: set[Path] = set()
    unique = []
    for path, folder in files:
        if path.absolute() not in seen:
            seen.add(path.absolute())
            unique.append((path, folder))
    return unique


def plan_jobs(
    inputs: Sequence[Path],
    out: Path | None,
    outcome: Outcome,
    *,
    suffixes: tuple[str, ...],
    output_suffixes: tuple[str, ...],
    tag: str = "",
    folder_tag: str,
    default_suffix: Callable[[Path], str] | None = None,
) -> list[Job]:
    """Pair every input file with its output, in the first of `output_suffixes` or what `default_suffix` says of it.

    `tag` goes between stem and suffix of results that lie beside their inputs, `folder_tag` behind a folder's name.
    """
    is_single = len(inputs) == 1 and not inputs[0].is_dir()
    names_file = out is not None and is_single and not out.is_dir() and out.suffix != ""
    if names_file and out.suffix.lower() not in output_suffixes:
        raise InvalidInput(f"--out {out} must end in {', '.join(output_suffixes)}, or be a folder")
    if out is not None and not names_file and (out.is_file() or out.suffix.lower() in output_suffixes):
        raise InvalidInput(
            f"--out {out} must be a folder here, or end in {', '.join(output_suffixes)} for a single file"
        )

    files = collect_files(inputs, suffixes, outcome, skip=None if names_file else out)
    if names_file:
        return _without_clashes([Job(path, out) for path, _ in files], outcome)
    several = len({folder for _, folder in files if folder}) > 1
    targets = []
    for path, folder in files:
        stem = path.stem + (tag if folder is None and out is None else "")
        suffix = output_suffixes[0] if default_suffix is None else default_suffix(path)
        targets.append(_target_folder(path, folder, out, folder_tag, several) / (stem + suffix))
    counts = Counter(targets)
    # cat.png and cat.jpg in one folder: keep the whole names, so that neither result replaces the other.
    targets = [
        target if counts[target] == 1 else target.with_name(path.name + target.suffix)
        for (path, _), target in zip(files, targets, strict=True)
    ]
    return _without_clashes([Job(path, target) for (path, _), target in zip(files, targets, strict=True)], outcome)


def _target_folder(path: Path, folder: Path | None, out: Path | None, folder_tag: str, several: bool) -> Path:
    if folder is None:
        return path.parent if out is None else out
    inner = path.parent.relative_to(folder)
    if out is None:
        named = folder if folder.name not in ("", "..") else folder.resolve()
        return named.with_name(named.name + folder_tag) / inner
    return out / (folder.resolve().name if several else "") / inner


def _without_clashes(jobs: list[Job], outcome: Outcome) -> list[Job]:
    sources = {job.source.resolve() for job in jobs}
    taken: dict[Path, Path] = {}
    kept = []
    for job in jobs:
        target = job.output.resolve()
        if target in sources:
            outcome.fail(job.source, f"{job.output} is an input and is not overwritten; choose another --out")
        elif target in taken:
            outcome.fail(
                job.source, f"{job.output} is already the result of {taken[target]}; rename one, or use two --out"
            )
        else:
            taken[target] = job.source
            kept.append(job)
    return kept


def run_batches(
    jobs: Sequence[Job],
    outcome: Outcome,
    *,
    read: Callable[[Path], Any],
    work: Callable[[list[Job], list[Any]], list[dict]],
    weigh: Callable[[Any], int] = lambda item: 0,
    batch_size: int = 8,
    label: str = "",
) -> None:
    """Read the jobs' sources and work on them in batches, with a progress bar when there are several.

    `work` writes the outputs and returns one record a job. When a batch fails its jobs are tried one by one, so that
    only the culprits fail. `weigh` gives the pixels of an item; a batch holds at most `BATCH_PIXELS` of them.
    """
    from tqdm import tqdm

    batch: list[tuple[Job, Any]] = []
    weight = 0
    with tqdm(total=len(jobs), desc=label, unit="file", file=sys.stderr, disable=len(jobs) < 2, leave=False) as bar:

        def flush() -> None:
            nonlocal weight
            _work_or_split(batch, work, outcome)
            bar.update(len(batch))
            batch.clear()
            weight = 0

        for job in jobs:
            try:
                item = read(job.source)
            except (MediatokError, OSError) as error:
                outcome.fail(job.source, error)
                bar.update()
                continue
            if batch and weight + weigh(item) > BATCH_PIXELS:
                flush()
            batch.append((job, item))
            weight += weigh(item)
            if len(batch) == batch_size:
                flush()
        flush()


def _work_or_split(batch: Sequence[tuple[Job, Any]], work, outcome: Outcome) -> None:
    if not batch:
        return
    try:
        outcome.records += work([job for job, _ in batch], [item for _, item in batch])
    except (MediatokError, OSError) as error:
        if len(batch) == 1:
            outcome.fail(batch[0][0].source, error)
            return
        for pair in batch:
            _work_or_split([pair], work, outcome)


@contextmanager
def reasons_first(outcome: Outcome, count: int) -> Iterator[None]:
    """Where the block raises because all `count` inputs failed one by one, list the reasons of each instead."""
    before = len(outcome.failures)
    try:
        yield
    except InvalidInput:
        if len(outcome.failures) - before < count:
            raise
        outcome.finish_failures()


@contextmanager
def steps_bar(total: int, label: str, unit: str = "file") -> Iterator[Callable[..., None]]:
    """A progress bar, where there is more than one thing to do; gives the `on_step` that moves it."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, file=sys.stderr, disable=total < 2, leave=False) as bar:

        def on_step(step: int, total: int, preview=None) -> None:
            bar.total = total
            bar.update(step - bar.n)

        yield on_step


def numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one result; cat-1.png, cat-2.png ... for a file that holds several."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]


def make_folder(path: Path) -> None:
    """Make the folder that `path` will lie in; InvalidInput with the reason when that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot make the folder {path.parent}: {error.strerror}") from error
