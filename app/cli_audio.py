"""What `mediatok encode`, `decode` and `reconstruct` do with audio: clips of any length, in flat memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..core.errors import InvalidInput, LimitExceeded, MediatokError
from .cli_jobs import RECONSTRUCTED, TOKEN_SUFFIXES, Job, Outcome, make_folder, numbered, plan_jobs
from .cli_media import AUDIO, only
from .cli_models import load_tokenizer

DEFAULT_MODEL = "simcodec-tiny"
QUICK_SECONDS = 20  # of audio; a single clip below this gets no progress bar
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
OnStep = Callable[..., None]


def encode_audio(
    inputs: Sequence[Path], out: Path | None, model: str | None, outcome: Outcome, *, batch_size: int, **where: str
) -> None:
    """Write a .mtok file for every clip. `where`: device and dtype."""
    jobs = plan_jobs(
        inputs, out, outcome, suffixes=AUDIO.suffixes, output_suffixes=TOKEN_SUFFIXES, folder_tag="-tokens"
    )
    jobs, tokenizer = _prepare(jobs, model, outcome, where)

    def work(job: Job, on_step: OnStep) -> list[dict]:
        tokens = _encode(tokenizer, job.source, batch_size, on_step)
        make_folder(job.output)
        tokens.save(job.output)
        return [_record(job, tokenizer, tokens)]

    run_clips(jobs, outcome, seconds_of, work, "encode")


def decode_audio(jobs: Sequence[Job], outcome: Outcome, tokenizer_of: Callable) -> None:
    """Write an audio file for every clip in the jobs' .mtok files; `tokenizer_of` finds the tokenizer of tokens."""
    from ..core.tokens import Tokens

    def measure(path: Path) -> float:
        tokens = Tokens.load(path)
        return sum(frame.num_samples for frame in tokens.frames) / tokenizer_of(tokens).sample_rate

    def work(job: Job, on_step: OnStep) -> list[dict]:
        if job.output.suffix.lower() not in AUDIO.outputs:
            raise InvalidInput(f"this holds speech, and {job.output} must end in {', '.join(AUDIO.outputs)}")
        tokens, records = Tokens.load(job.source), []
        tokenizer = tokenizer_of(tokens)
        make_folder(job.output)
        for number, path in enumerate(numbered(job.output, len(tokens))):
            part = _part(on_step, number, len(tokens))
            _write(tokenizer, tokenizer.decode_blocks(tokens[number], on_step=part), path)
            records.append(_record(Job(job.source, path), tokenizer, tokens[number]))
        return records

    run_clips(jobs, outcome, measure, work, "decode")


def reconstruct_audio(
    inputs: Sequence[Path], out: Path | None, model: str | None, outcome: Outcome, *, batch_size: int, **where: str
) -> None:
    """Write what is left of every clip after encoding and decoding, and tell the log-mel distance."""
    from ..core.audio import open_audio
    from ..core.speech_tokenizer import WINDOW_SECONDS
    from ..evaluation.speech import LogMelDistance

    jobs = plan_jobs(
        inputs, out, outcome, suffixes=AUDIO.suffixes, output_suffixes=AUDIO.outputs,
        tag=RECONSTRUCTED, folder_tag="-reconstructed",
    )  # fmt: skip
    jobs, tokenizer = _prepare(jobs, model, outcome, where)

    def work(job: Job, on_step: OnStep) -> list[dict]:
        tokens = _encode(tokenizer, job.source, batch_size, _part(on_step, 0, 2))
        distance = LogMelDistance(tokenizer.sample_rate)
        original = open_audio(job.source).blocks(WINDOW_SECONDS, tokenizer.sample_rate)
        decoded = tokenizer.decode_blocks(tokens, on_step=_part(on_step, 1, 2))
        make_folder(job.output)
        _write(tokenizer, distance.watch(original, decoded), job.output)
        return [_record(job, tokenizer, tokens) | {"log_mel_distance": round(distance.value, 4)}]

    run_clips(jobs, outcome, seconds_of, work, "reconstruct")


def run_clips(
    jobs: Sequence[Job],
    outcome: Outcome,
    measure: Callable[[Path], float],
    work: Callable[[Job, OnStep], list[dict]],
    label: str,
) -> None:
    """Work on one clip after the other, with a progress bar in seconds of audio.

    `measure` gives the seconds of a source before the work begins; `work` writes the output and returns its records.
    What either refuses is noted in `outcome`, and the run goes on.
    """
    from tqdm import tqdm

    lengths: list[tuple[Job, float]] = []
    for job in jobs:
        try:
            lengths.append((job, measure(job.source)))
        except (MediatokError, OSError) as error:
            outcome.fail(job.source, error)
    total = sum(seconds for _, seconds in lengths)
    is_quick = len(lengths) < 2 and total < QUICK_SECONDS
    with tqdm(
        total=total, desc=label, bar_format=BAR_FORMAT, file=sys.stderr, disable=is_quick, leave=False
    ) as bar:  # fmt: skip
        done = 0.0
        for job, seconds in lengths:

            def advance(step: int, steps: int, preview=None, done: float = done, seconds: float = seconds) -> None:
                bar.update(done + seconds * min(step / max(steps, 1), 1) - bar.n)

            try:
                outcome.records += work(job, advance)
            except (MediatokError, OSError) as error:
                outcome.fail(job.source, error)
            done += seconds
            bar.update(done - bar.n)


def seconds_of(path: Path) -> float:
    """Length of a clip by its header, which is checked; 0 where it does not say."""
    from ..core.audio import open_audio

    return open_audio(path).seconds or 0.0


def line(record: dict) -> str:
    """One clip in words."""
    parts = [f"{record['input']} -> {record['output']}", f"{record['seconds']:.2f} s", f"{record['tokens']} tokens"]
    parts += [f"{record['bytes']} bytes", f"{record['bits_per_second']:.0f} bits/s"]
    if "log_mel_distance" in record:
        parts.append(f"log-mel distance {record['log_mel_distance']:.3f}")
    return "  ".join(parts)


def summary(verb: str, records: Sequence[dict]) -> str:
    """Several clips in words."""
    seconds, total = (sum(record[key] for record in records) for key in ("seconds", "bytes"))
    parts = [f"{verb} {len(records)} clips with {', '.join(sorted({record['model'] for record in records}))}"]
    parts.append(f"{seconds:.1f} s, {sum(record['tokens'] for record in records)} tokens, {total} bytes")
    parts.append(f"{8 * total / seconds:.0f} bits/s")
    if "log_mel_distance" in records[0]:
        mean = sum(record["log_mel_distance"] for record in records) / len(records)
        parts.append(f"mean log-mel distance {mean:.3f}")
    return f"{parts[0]}: {', '.join(parts[1:])}"


def _prepare(jobs: list[Job], model: str | None, outcome: Outcome, where: dict[str, str]):
    """The jobs whose sources may be audio, and the tokenizer for them, which is not loaded for none."""
    name = model or DEFAULT_MODEL
    jobs = only(AUDIO, name, ((job.source, job) for job in jobs), outcome)
    return jobs, load_tokenizer(name, modality=AUDIO.modality, **where) if jobs else None


def _encode(tokenizer, path: Path, batch_size: int, on_step: OnStep):
    """The tokens of one clip; refused before the work where a .mtok file could not hold them."""
    from ..core.mtok import MAX_IDS

    per_second = tokenizer.frame_rate * tokenizer.num_codebooks
    if seconds_of(path) * per_second > MAX_IDS:
        hours = MAX_IDS / per_second / 3600
        raise LimitExceeded(f"this lasts {seconds_of(path) / 3600:.1f} hours; a .mtok file holds {hours:.1f}: split it")
    return tokenizer.encode(path, batch_size=batch_size, on_step=on_step)


def _write(tokenizer, blocks_1T: Iterator, path: Path) -> None:
    from ..core.audio import write_blocks

    write_blocks(blocks_1T, tokenizer.sample_rate, path)


def _part(on_step: OnStep, number: int, count: int) -> OnStep:
    """Progress of part `number` of `count` equal parts, as progress of the whole."""

    def advance(step: int, total: int, preview=None) -> None:
        on_step(number * total + step, count * total, preview)

    return advance


def _record(job: Job, tokenizer, tokens) -> dict:
    """What is told about one clip."""
    length = int(tokens.lengths[0])  # a prefix may stand for less than the whole clip
    seconds = min(tokens.frames[0].num_samples, length * tokenizer.hop_length) / tokenizer.sample_rate
    return {
        "input": str(job.source),
        "output": str(job.output),
        "model": tokenizer.name,
        "seconds": round(seconds, 4),
        "tokens": length,
        "bytes": tokens.num_bytes,
        "bits_per_second": round(8 * tokens.num_bytes / seconds, 1),
    }
