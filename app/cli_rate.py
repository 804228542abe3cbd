"""`mediatok rate`: quality over size, beside codecs that everybody has."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput
from .cli_codec import Model, Tile, choose_model
from .cli_jobs import RATE, Job, Outcome, collect_files, make_folder, reasons_first, run_batches, steps_bar
from .cli_media import AUDIO, MESHES, PICTURES, Files, check_options, find_medium, only
from .cli_models import AsJson, BatchSize, Device, DType, load_tokenizer
from .cli_shapes import RESOLUTION, PointSeed, Resolution, shape_options


def rate(
    inputs: Files,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The plot (PNG); default cat.rate.png or photos-rate.png.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Token counts, as 1,2,4,8; default powers of two.")] = None,
    tile: Tile = False,
    seed: PointSeed = None,
    resolution: Resolution = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Table and plot of quality over bytes.

    Pictures: PSNR at several token counts beside JPEG and WebP at equal bytes, on the square that the tokenizer reads;
    the default model is one-d-piece-tiny. Speech: the codec beside Opus and Vorbis at their lowest rates. Meshes: the
    tokenizer after each of its scales beside decimated meshes of as many bytes. Several inputs give the mean.
    """
    counts, outcome, medium = _parse_lengths(lengths), Outcome(), find_medium(inputs, model)
    files = collect_files(inputs, medium.suffixes, outcome)
    plot = out or _plot_path(inputs)
    if plot.suffix.lower() != ".png":
        raise InvalidInput(f"--out {plot} must end in .png")
    if plot.resolve() in {path.resolve() for path, _ in files}:
        raise InvalidInput(f"{plot} is an input and is not overwritten; choose another --out")
    check_options({"--lengths": lengths, "--tile": tile} | shape_options(seed, resolution), medium)
    name = choose_model(model, medium, {"num_tokens": counts})  # of pictures, one whose length can vary
    paths = only(medium, name, ((path, path) for path, _ in files), outcome)
    if paths:
        tokenizer = load_tokenizer(name, device, dtype, medium.modality)
        rate_files = {
            PICTURES: partial(_rate_pictures, counts=counts, tile=tile, batch_size=batch_size),
            AUDIO: partial(_rate_audio, batch_size=batch_size),
            MESHES: partial(_rate_shapes, seed=seed or 0, resolution=resolution or RESOLUTION),
        }[medium]
        rate_files(paths, tokenizer, outcome, plot, as_json)
    outcome.finish_failures()


def _rate_audio(paths: list[Path], tokenizer, outcome: Outcome, plot: Path, as_json: bool, *, batch_size: int) -> None:
    from ..evaluation.speech_rate import format_points, plot_speech_rate, rate_speech

    points, count = _measure(partial(rate_speech, batch_size=batch_size), paths, tokenizer, outcome)
    title = paths[0].name if len(paths) == 1 else f"{count} clips"
    make_folder(plot)
    plot_speech_rate(points, plot, title)
    about = "bytes are whole files, of a clip on average; Opus and Vorbis are libsndfile's, from their smallest on"
    _show(points, {"model": tokenizer.name, "clips": count}, [title, about, format_points(points)], plot, as_json)


def _rate_shapes(
    paths: list[Path], tokenizer, outcome: Outcome, plot: Path, as_json: bool, *, seed: int, resolution: int
) -> None:
    from ..evaluation.shape_rate import format_points, plot_shape_rate, rate_shapes

    points, count = _measure(partial(rate_shapes, seed=seed, resolution=resolution), paths, tokenizer, outcome)
    title = paths[0].name if len(paths) == 1 else f"{count} meshes"
    make_folder(plot)
    plot_shape_rate(points, plot, title)
    about = "bytes are whole files, of a mesh on average; decimated meshes: the nearest of those that fit"
    _show(points, {"model": tokenizer.name, "meshes": count}, [title, about, format_points(points)], plot, as_json)


def _measure(rate_files: Callable[..., list], paths: list[Path], tokenizer, outcome: Outcome) -> tuple[list, int]:
    """The points of the files that could be read, and how many those are; the others fail in `outcome`."""
    with reasons_first(outcome, len(paths)), steps_bar(len(paths), "rate") as on_step:
        points = rate_files(tokenizer, paths, on_step=on_step, on_error=outcome.fail)
    return points, len(paths) - sum(source in set(map(str, paths)) for source, _ in outcome.failures)


def _show(points: list, facts: dict, lines: list[str], plot: Path, as_json: bool) -> None:
    """Print points as JSON with `facts`, or as the title, the note and the table in `lines`."""
    if as_json:
        print(json.dumps(facts | {"points": [point.as_dict() for point in points]}, indent=2))
        return
    title, *others = lines
    print(f"{facts['model']}: {title}", *others, f"plot: {plot}", sep="\n")


def _rate_pictures(
    paths: list[Path], tokenizer, outcome: Outcome, plot: Path, as_json: bool,
    *, counts: list[int] | None, tile: bool, batch_size: int,
) -> None:  # fmt: skip
    from ..core.images import read_image
    from ..evaluation import rate as rates

    for count in counts or ():
        tokenizer.check_num_tokens(count)
    size = None if tile else tokenizer.image_size

    def work(batch: list[Job], pictures: list) -> list[dict]:
        references = [rates.reference_image(tokenizer, picture, tile=tile) for picture in pictures]
        return [
            {
                "input": str(job.source),
                "tokens": rates.rate_curve(tokenizer, reference, counts, tile=tile, batch_size=batch_size),
                "jpeg": rates.codec_curve(reference, "jpeg"),
                "webp": rates.codec_curve(reference, "webp"),
            }
            for job, reference in zip(batch, references, strict=True)
        ]

    jobs = [Job(path, plot) for path in paths]
    run_batches(jobs, outcome, read=read_image, work=work, batch_size=1, label="rate")
    if outcome.records:
        _show_rates(outcome.records, tokenizer, size, plot, as_json)


def _show_rates(records: list[dict], tokenizer, size: int | None, plot: Path, as_json: bool) -> None:
    from ..evaluation.rate import mean_points, mean_within, plot_rate

    points = mean_points([record["tokens"] for record in records])
    curves = {codec: [record[codec] for record in records] for codec in ("jpeg", "webp")}
    drawn = {}
    for codec, of_pictures in curves.items():
        budgets = sorted({point.bytes for curve in of_pictures for point in curve})[:: max(1, len(records) // 2)]
        drawn[codec] = of_pictures[0] if len(records) == 1 else mean_within(of_pictures, budgets)
    what = f"{len(records)} pictures" if len(records) > 1 else Path(records[0]["input"]).name
    title = f"{what}, {'at its own size' if size is None else f'as the {size}x{size} input of the model'}"
    make_folder(plot)
    plot_rate({tokenizer.name: points, "JPEG": drawn["jpeg"], "WebP": drawn["webp"]}, plot, title)
    if as_json:
        rows = {name: [p.as_dict() for p in curve] for name, curve in {"tokens": points, **drawn}.items()}
        print(json.dumps({"model": tokenizer.name, "pictures": len(records), "reference": title, **rows}, indent=2))
        return
    print(f"{tokenizer.name}: {title}")
    print("bytes are whole files; JPEG and WebP at equal bytes, and the bytes that they need for equal PSNR")
    print(" tokens   bytes  bits/pixel      PSNR      JPEG      WebP   JPEG needs   WebP needs")
    for index, point in enumerate(points):
        cells = [_cell(next(iter(mean_within(curves[codec], [point.bytes])), None), "psnr") for codec in curves]
        cells += [_cell(_mean_needed(records, codec, index), "bytes") for codec in curves]
        print(
            f"{point.num_tokens:>7}{point.bytes:>8}{point.bits_per_pixel:>12.3f}{point.psnr:>7.2f} dB"
            f"{cells[0]:>10}{cells[1]:>10}{cells[2]:>13}{cells[3]:>13}"
        )
    smallest = {codec: max(curve[0].bytes for curve in curves[codec]) for codec in curves}
    print(
        f"-: not possible; the smallest JPEG has {smallest['jpeg']} bytes, the smallest WebP {smallest['webp']}, "
        "both also tried at reduced size"
    )
    print(f"plot: {plot}")


def _mean_needed(records: list[dict], codec: str, index: int):
    from ..evaluation.rate import mean_points, smallest_reaching

    needed = [smallest_reaching(record[codec], record["tokens"][index].psnr) for record in records]
    return mean_points([[point] for point in needed])[0] if all(needed) else None


def _cell(point, what: str) -> str:
    if point is None:
        return "-"
    return f"{point.psnr:.2f} dB" if what == "psnr" else f"{point.bytes} bytes"


def _parse_lengths(lengths: str | None) -> list[int] | None:
    if lengths is None:
        return None
    try:
        counts = [int(part) for part in lengths.split(",") if part.strip()]
    except ValueError:
        counts = []
    if not counts:
        raise InvalidInput(f"--lengths {lengths} must be token counts separated by commas, as 1,2,4,8")
    return counts


def _plot_path(inputs: list[Path]) -> Path:
    first = inputs[0]
    if first.is_dir():
        named = first if first.name not in ("", "..") else first.resolve()
        return named.with_name(f"{named.name}-rate.png")
    return first.with_name(f"{first.stem}{RATE}.png")
