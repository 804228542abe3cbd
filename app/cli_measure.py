"""`mediatok evaluate`, `rate` and `parity`: figures with the protocol behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput
from .cli_codec import (
    PICTURE_SUFFIXES,
    VARIABLE_MODEL,
    MaxBytes,
    Model,
    NumTokens,
    Pictures,
    TargetPsnr,
    Text,
    Tile,
    default_model,
    length_options,
)  # fmt: skip
from .cli_jobs import RATE, Job, Outcome, collect_files, make_folder, run_batches
from .cli_models import AsJson, BatchSize, Device, DType, load_generator, load_tokenizer


def evaluate(
    inputs: Pictures,
    model: Model = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report here as JSON.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="A report to compare with; refused if measured otherwise.")
    ] = None,
    num_tokens: NumTokens = None,
    target_psnr: TargetPsnr = None,
    max_bytes: MaxBytes = None,
    text: Text = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="torchvision's AlexNet or VGG-16 weights: adds LPIPS.")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights: adds rFID.")
    ] = None,
    lite0_weights: Annotated[
        Path | None, typer.Option(help="EfficientNet-Lite0 weights: adds FD-Lite0 (default: those of `make data`).")
    ] = None,
    set_name: Annotated[
        str | None, typer.Option(help="What the report calls the set; default the folder's name.")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure PSNR, SSIM, bits per pixel and more.

    The figures come with their protocol: set and its hash, crop, resize, networks and their hashes. LPIPS and rFID
    need the weights of their networks, given by path.
    """
    from ..evaluation.evaluate import Report, compare
    from ..evaluation.evaluate import evaluate as run_evaluation

    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes)
    if out is not None and out.resolve() in {given.resolve() for given in inputs}:
        raise InvalidInput(f"{out} is an input and is not overwritten; choose another --out")
    other = Report.load(against) if against else None
    sources = [path for path, _ in collect_files(inputs, PICTURE_SUFFIXES, outcome)]
    if sources:
        tokenizer = load_tokenizer(model or default_model(options), device, dtype)
        with _bar(len(sources), "evaluate") as bar:
            report = run_evaluation(
                tokenizer, sources,
                set_name=set_name or "+".join(given.resolve().name for given in inputs[:3]),
                text=text, lpips_weights=lpips_weights, inception_weights=inception_weights,
                lite0_weights=lite0_weights,
                batch_size=batch_size, on_step=_advance(bar), on_error=outcome.fail, **options,
            )  # fmt: skip
        comparison = compare(report, other) if other else None
        if out is not None:
            make_folder(out)
            report.save(out)
        print(report.to_json().rstrip() if as_json else report)
        if comparison and not as_json:
            print(f"\n{comparison}")
    outcome.finish_failures()


def evaluate_generator(
    model: Annotated[str, typer.Argument(help="Generator: a name or a folder.")],
    train: Annotated[Path, typer.Option(help="Folder of the pictures that it was trained on.")],
    val: Annotated[Path, typer.Option(help="Folder of held-out pictures.")],
    labels: Annotated[Path | None, typer.Option(help="JSON of each file's class; default the folders' names.")] = None,
    label_field: Annotated[
        str, typer.Option(help="Field of --labels to take the classes from, as category or name.")
    ] = "category",
    num_images: Annotated[int, typer.Option(min=1, help="Pictures to make.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture, and of the choice of real ones.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance; default the model's own.")] = None,
    lite0_weights: Annotated[Path | None, typer.Option(help="EfficientNet-Lite0 weights.")] = None,
    batch_size: BatchSize = 16,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure a generator: Frechet distance against a floor of real pictures, and how near it is to its training set.

    The pictures are made with the classes of real ones. FD-Lite0 is no FID and cannot be compared with one.
    """
    from ..evaluation.generation import evaluate_generator as run_evaluation

    generator = load_generator(model, device, dtype)
    options = {"steps": steps, "guidance": guidance}
    with _bar(num_images, "generate") as bar:
        report = run_evaluation(
            generator, train, val, labels=labels, label_field=label_field, num_images=num_images, seed=seed,
            lite0_weights=lite0_weights, batch_size=batch_size, on_step=_advance(bar), **options,
        )  # fmt: skip
    print(report.to_json().rstrip() if as_json else report)


def rate(
    inputs: Pictures,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The plot (PNG); default cat.rate.png or photos-rate.png.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Token counts, as 1,2,4,8; default powers of two.")] = None,
    tile: Tile = False,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Table and plot of PSNR over bytes.

    Several token counts beside JPEG and WebP at equal bytes.
    All are measured on the square that the tokenizer reads; several pictures give the mean. The default model is
    one-d-piece-tiny.
    """
    from ..core.images import read_image
    from ..evaluation import rate as rates

    counts = _parse_lengths(lengths)
    outcome = Outcome()
    files = collect_files(inputs, PICTURE_SUFFIXES, outcome)
    plot = out or _plot_path(inputs)
    if plot.suffix.lower() != ".png":
        raise InvalidInput(f"--out {plot} must end in .png")
    if plot.resolve() in {path.resolve() for path, _ in files}:
        raise InvalidInput(f"{plot} is an input and is not overwritten; choose another --out")
    if files:
        tokenizer = load_tokenizer(model or VARIABLE_MODEL, device, dtype)
        for count in counts or ():
            tokenizer.check_num_tokens(count)
        size = None if tile else tokenizer.image_size

        def work(batch: list[Job], pictures: list) -> list[dict]:
            return [
                {
                    "input": str(job.source),
                    "tokens": rates.rate_curve(tokenizer, picture, counts, tile=tile, batch_size=batch_size),
                    "jpeg": rates.codec_curve(picture, "jpeg", size=size),
                    "webp": rates.codec_curve(picture, "webp", size=size),
                }
                for job, picture in zip(batch, pictures, strict=True)
            ]

        run_batches(
            [Job(path, plot) for path, _ in files], outcome, read=read_image, work=work, batch_size=1, label="rate"
        )
    if outcome.records:
        _show_rates(outcome.records, tokenizer, size, plot, as_json)
    outcome.finish_failures()


def parity(
    cases: Annotated[list[Path], typer.Argument(help="Case folders, or folders of them.")],
) -> None:
    """Compare with recordings of the authors' code.

    Every tensor of every case is replayed; the exit code is 1 if one differs.
    """
    from ..convert.parity import run

    if not run(cases):
        raise typer.Exit(1)


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


def _bar(total: int, label: str):
    import sys

    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit="file", file=sys.stderr, disable=total < 2, leave=False)


def _advance(bar):
    def on_step(step: int, total: int, preview=None) -> None:
        bar.total = total
        bar.update(step - bar.n)

    return on_step
