"""`mediatok evaluate`, `evaluate-generator` and `parity`: figures with the protocol behind them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput
from .cli_codec import MaxBytes, Model, NumTokens, TargetPsnr, Text, choose_model, length_options, picture_options
from .cli_jobs import Outcome, collect_files, make_folder, reasons_first, steps_bar
from .cli_media import AUDIO, MESHES, PICTURES, Files, check_options, find_medium, only
from .cli_models import AsJson, BatchSize, Device, DType, load_generator, load_tokenizer
from .cli_shapes import RESOLUTION, PointSeed, Resolution, shape_options


def evaluate(
    inputs: Files,
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
    recogniser: Annotated[
        str | None, typer.Option(help="Speech recogniser, as paraformer-tiny: adds word and character error rates.")
    ] = None,
    transcripts: Annotated[
        Path | None,
        typer.Option(help="What is said: lines of name <tab> text (default: transcripts.tsv in the folder)."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Only the clips of this split of the folder's splits.json: train, val or test.")
    ] = None,
    dnsmos: Annotated[bool, typer.Option("--dnsmos", help="Adds DNSMOS of speech: seconds for each clip.")] = False,
    seed: PointSeed = None,
    resolution: Resolution = None,
    set_name: Annotated[
        str | None, typer.Option(help="What the report calls the set; default the folder's name.")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure how much a tokenizer loses, and at what rate.

    Pictures: PSNR, SSIM, bits per pixel; LPIPS and rFID with the weights of their networks. Speech: log-mel distance,
    STOI, PESQ, SI-SDR, bits per second; error rates with a recogniser. Meshes: IoU, Chamfer distances, F-scores,
    bytes. The figures come with their protocol: set and its hash, preprocessing, networks and their hashes.
    """
    from ..evaluation.error_rates import find_transcripts
    from ..evaluation.evaluate import evaluate as evaluate_pictures
    from ..evaluation.report import Report, compare
    from ..evaluation.shapes import evaluate_shapes
    from ..evaluation.speech import evaluate_speech

    outcome, options = Outcome(), length_options(num_tokens, target_psnr, max_bytes)
    if out is not None and out.resolve() in {given.resolve() for given in inputs}:
        raise InvalidInput(f"{out} is an input and is not overwritten; choose another --out")
    weights = {
        "lpips_weights": lpips_weights, "inception_weights": inception_weights, "lite0_weights": lite0_weights,
    }  # fmt: skip
    medium = find_medium(inputs, model)
    of_pictures = picture_options(num_tokens, target_psnr, max_bytes, text=text)
    of_pictures |= {f"--{name.replace('_', '-')}": value for name, value in weights.items()}
    of_speech = {"--recogniser": recogniser, "--transcripts": transcripts, "--dnsmos": dnsmos, "--split": split}
    check_options(of_pictures | of_speech | shape_options(seed, resolution), medium)
    if transcripts is not None and recogniser is None:
        raise InvalidInput("--transcripts needs a --recogniser, whose transcripts are compared with them")
    other = Report.load(against) if against else None
    name = choose_model(model, medium, options)
    files = collect_files(inputs, medium.suffixes, outcome)
    if split is not None:
        files = _of_split(files, split)
    sources = only(medium, name, ((path, path) for path, _ in files), outcome)
    if sources:
        tokenizer = load_tokenizer(name, device, dtype, medium.modality)
        listener = load_generator(recogniser, device, dtype, "transcribe", packed=False) if recogniser else None
        with reasons_first(outcome, len(sources)), steps_bar(len(sources), "evaluate") as on_step:
            named = "+".join(given.resolve().name for given in inputs[:3]) + (f" {split}" if split else "")
            texts = (transcripts or find_transcripts(inputs)) if medium is AUDIO else None
            measure = {
                PICTURES: partial(evaluate_pictures, text=text, batch_size=batch_size, **weights, **options),
                AUDIO: partial(
                    evaluate_speech, recogniser=listener, transcripts=texts, with_dnsmos=dnsmos, batch_size=batch_size
                ),
                MESHES: partial(evaluate_shapes, seed=seed or 0, resolution=resolution or RESOLUTION),
            }[medium]
            report = measure(
                tokenizer, sources, set_name=set_name or named, on_step=on_step, on_error=outcome.fail
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
    if generator.modality != PICTURES.modality:
        raise InvalidInput(f"{model} makes {generator.modality}s; evaluate-generator measures pictures alone")
    options = {"steps": steps, "guidance": guidance}
    with steps_bar(num_images, "generate") as on_step:
        report = run_evaluation(
            generator, train, val, labels=labels, label_field=label_field, num_images=num_images, seed=seed,
            lite0_weights=lite0_weights, batch_size=batch_size, on_step=on_step, **options,
        )  # fmt: skip
    print(report.to_json().rstrip() if as_json else report)


def parity(
    cases: Annotated[list[Path], typer.Argument(help="Case folders, or folders of them.")],
) -> None:
    """Compare with recordings of the authors' code.

    Every tensor of every case is replayed; the exit code is 1 if one differs.
    """
    from ..convert.parity import run

    if not run(cases):
        raise typer.Exit(1)


def _of_split(files: list[tuple[Path, Path | None]], split: str) -> list[tuple[Path, Path | None]]:
    """The files whose folder's `splits.json` counts them to `split`."""
    from ..training.speech_data import SPLITS, SPLITS_FILE, read_splits

    if split not in SPLITS:
        raise InvalidInput(f"--split {split} is none of {', '.join(SPLITS)}")
    splits = {folder: read_splits(folder) if folder else None for _, folder in files}
    for path, folder in files:
        if splits[folder] is None:
            raise InvalidInput(f"--split {split} needs folders with a {SPLITS_FILE}; {folder or path} has none")
    kept = [(path, folder) for path, folder in files if path.stem in splits[folder][split]]
    if files and not kept:
        raise InvalidInput(f"--split {split} holds none of the {len(files)} clips")
    return kept
