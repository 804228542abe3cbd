"""`mediatok enhance`, `transcribe` and `speak`: clean speech, written speech, speech from a text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput
from .cli_audio import run_clips, seconds_of
from .cli_jobs import ENHANCED, Job, Outcome, collect_files, make_folder, plan_jobs, steps_bar
from .cli_media import AUDIO, AudioFiles, Out, only
from .cli_models import AsJson, BatchSize, Device, DType, load_generator

MAX_TEXT_BYTES = 2**20
SPOKEN = Path("speech.wav")
PIECE = 200  # characters that are spoken at once, about
SHOWN_TEXT = 60  # characters of a text in a report

Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same sound; default random.")]


class Format(StrEnum):
    """How a transcript is written."""

    text = "text"
    json = "json"
    srt = "srt"


SUFFIXES = {Format.text: ".txt", Format.json: ".json", Format.srt: ".srt"}


def enhance(
    inputs: AudioFiles,
    out: Out = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Name, folder or hub id.")] = "gense-tiny",
    seed: Seed = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest tokens: no chance, no seed.")] = False,
    temperature: Annotated[float, typer.Option(help="Below 1, draws are more careful.")] = 1.0,
    batch_size: BatchSize = 4,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Make noisy speech clean.

    talk.wav becomes talk.enhanced.wav beside it; a folder talks becomes a folder talks-enhanced. Every file gets the
    same seed, so that each can be made again alone.
    """
    outcome = Outcome()
    jobs = plan_jobs(
        inputs, out, outcome,
        suffixes=AUDIO.suffixes, output_suffixes=AUDIO.outputs, tag=ENHANCED, folder_tag="-enhanced",
    )  # fmt: skip
    jobs = only(AUDIO, model, ((job.source, job) for job in jobs), outcome)
    if jobs:
        generator = load_generator(model, device, dtype, "enhance")
        seed = None if greedy else _seed(seed)

        def work(job: Job, on_step: Callable[..., None]) -> list[dict]:
            begin = time.perf_counter()
            sound = generator.enhance(
                job.source, seed=seed, greedy=greedy, temperature=temperature, batch_size=batch_size, on_step=on_step
            )
            make_folder(job.output)
            sound.save(job.output)
            return [_record(job, generator, sound, time.perf_counter() - begin) | {"seed": seed}]

        run_clips(jobs, outcome, seconds_of, work, "enhance")
    outcome.finish(as_json, _line, lambda records: _summary("enhanced", records))


def transcribe(
    inputs: AudioFiles,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Result file for one input, or folder; default: print.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Name, folder or hub id.")] = "paraformer-tiny",
    style: Annotated[
        Format, typer.Option("--format", "-f", help="Text, JSON with times, or SRT subtitles.")
    ] = Format.text,
    hotwords: Annotated[
        str | None, typer.Option(help="Names and terms to expect, separated by commas (models with hotwords).")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Write down what is said, with times.

    Printed: the text; for several files a line "name <tab> text" each, which `evaluate --transcripts` reads; or a line
    of JSON each. With --out files are written: talk.txt, talk.json or talk.srt.
    """
    words = None if hotwords is None else [word.strip() for word in hotwords.split(",") if word.strip()]
    if words == []:
        raise InvalidInput(f"--hotwords {hotwords!r} has no word in it")
    outcome, suffix = Outcome(), SUFFIXES[style]
    if out is None:
        jobs = [Job(path, path.with_suffix(suffix)) for path, _ in collect_files(inputs, AUDIO.suffixes, outcome)]
    else:
        jobs = plan_jobs(
            inputs, out, outcome, suffixes=AUDIO.suffixes, output_suffixes=(suffix,), folder_tag="-transcripts"
        )
    jobs = only(AUDIO, model, ((job.source, job) for job in jobs), outcome)
    is_one = len(inputs) == 1 and not inputs[0].is_dir()
    if out is None and style is Format.srt and not is_one:
        raise InvalidInput("subtitles of several files go into a folder; name it with --out")
    if jobs:
        recogniser = load_generator(model, device, dtype, "transcribe")
        options = {} if words is None else {"hotwords": words}

        def work(job: Job, on_step: Callable[..., None]) -> list[dict]:
            transcript = recogniser.transcribe(job.source, batch_size=batch_size, on_step=on_step, **options)
            if out is None:
                _print_transcript(job.source, transcript, style, is_one)
            else:
                make_folder(job.output)
                transcript.save(job.output)
                print(f"{job.source} -> {job.output}")
            return [{"input": str(job.source)}]

        run_clips(jobs, outcome, seconds_of, work, "transcribe")
    outcome.finish_failures()


def speak(
    text: Annotated[str | None, typer.Argument(help="What to say.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file to read aloud instead, in UTF-8.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Sound file: .wav, .flac or .ogg.")] = SPOKEN,
    model: Annotated[str, typer.Option("--model", "-m", help="Name, folder or hub id.")] = "speak-tiny",
    seed: Seed = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest tokens; default the model's own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Read a text aloud."""
    if (text is None) == (file is None):
        raise InvalidInput("speak takes a text or --file, one of them")
    said = text if file is None else _read_text(file)
    if not said.strip():
        raise InvalidInput("there is nothing to say: the text is empty")
    if out.suffix.lower() not in AUDIO.outputs:
        raise InvalidInput(f"--out {out} must end in {', '.join(AUDIO.outputs)}")
    if out.exists() and not overwrite:
        raise InvalidInput(f"{out} exists; choose another --out, or add --overwrite")
    generator, seed = load_generator(model, device, dtype, "speak"), _seed(seed)
    options = {} if temperature is None else {"temperature": temperature}
    begin = time.perf_counter()
    with steps_bar(len(said) // PIECE, "speak", unit="piece") as on_step:
        sound = generator.speak(said, seed=seed, on_step=on_step, **options)
    make_folder(out)
    sound.save(out)
    record = _record(Job(file or Path(), out), generator, sound, time.perf_counter() - begin) | {"seed": seed}
    shown = said if len(said) <= SHOWN_TEXT else f"{said[:SHOWN_TEXT]}..."
    outcome = Outcome([record | {"input": str(file) if file else shown}])
    outcome.finish(as_json, _line, lambda records: _summary("spoke", records))


def _seed(seed: int | None) -> int:
    """The seed given, or a fresh one, so that what was made can be made again."""
    from ..core.generator import image_seeds

    return image_seeds(seed, 1)[0]


def _read_text(path: Path) -> str:
    from ..core.files import read_limited

    try:
        return read_limited(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is no text in UTF-8: {error}") from error


def _print_transcript(source: Path, transcript, style: Format, is_one: bool) -> None:
    from tqdm import tqdm

    if style is Format.json:
        text = json.dumps({"input": str(source)} | json.loads(transcript.json()), ensure_ascii=False)
    elif style is Format.srt:
        text = transcript.srt().rstrip()
    else:
        text = transcript.text if is_one else f"{source.stem}\t{transcript.text}"
    tqdm.write(text, file=sys.stdout)  # above the progress bar, where there is one


def _record(job: Job, generator, sound, seconds: float) -> dict:
    """What is told about one sound that was made in `seconds`."""
    return {
        "input": str(job.source),
        "output": str(job.output),
        "model": generator.name,
        "seconds": round(sound.seconds, 4),
        "sample_rate": sound.sample_rate,
        "compute_seconds": round(seconds, 4),
    }


def _line(record: dict) -> str:
    seed = "" if record["seed"] is None else f"  seed {record['seed']}"
    speed = f"{record['compute_seconds']:.2f} s for {record['seconds']:.2f} s of sound"
    return f"{record['input']} -> {record['output']}{seed}  {speed}"


def _summary(verb: str, records: list[dict]) -> str:
    seconds, compute = (sum(record[key] for record in records) for key in ("seconds", "compute_seconds"))
    return f"{verb} {len(records)} clips with {records[0]['model']}: {seconds:.1f} s of sound in {compute:.1f} s"
