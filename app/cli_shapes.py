"""What `mediatok encode`, `decode`, `reconstruct` and `generate` do with meshes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidInput
from .cli_jobs import (
    BATCH_PIXELS,
    RECONSTRUCTED,
    TOKEN_SUFFIXES,
    Job,
    Outcome,
    make_folder,
    numbered,
    plan_jobs,
    run_batches,
    steps_bar,
)
from .cli_media import MESHES, only
from .cli_models import load_tokenizer

DEFAULT_MODEL = "vat-tiny"
RESOLUTION = 128
NUM_POINTS = 10_000  # on either surface, for the figures that `reconstruct` tells
BATCH_FACES = 2**20  # meshes of a batch together, so that a folder of scans does not fill the memory
F_SCORE = "F-score at 0.05"

Resolution = Annotated[
    int | None,
    typer.Option(min=2, max=512, help=f"Meshes: cells a side of the grid that they are made on; default {RESOLUTION}."),
]
UpToScale = Annotated[int | None, typer.Option(min=1, help="Meshes: the first scales alone, coarse ones come first.")]
PointSeed = Annotated[
    int | None, typer.Option(min=0, help="Meshes: of the points that are drawn on their surfaces; default 0.")
]


class EmptyShape(InvalidInput):
    """Tokens that stand for nothing: there is no surface to write."""


def shape_options(
    seed: int | None = None, resolution: int | None = None, up_to_scale: int | None = None
) -> dict[str, object]:
    """What only meshes have, by the names of the options."""
    return {"--seed": seed, "--resolution": resolution, "--up-to-scale": up_to_scale}


def encode_shapes(
    inputs: Sequence[Path], out: Path | None, name: str, outcome: Outcome, seed: int | None, up_to_scale: int | None,
    *, batch_size: int, **where: str,
) -> None:  # fmt: skip
    """Write a .mtok file for every mesh. `where`: device and dtype."""
    from ..core.meshes import read_mesh

    jobs = plan_jobs(
        inputs, out, outcome, suffixes=MESHES.suffixes, output_suffixes=TOKEN_SUFFIXES, folder_tag="-tokens"
    )
    jobs, tokenizer = _prepare(jobs, name, outcome, up_to_scale, where)

    def work(batch: list[Job], meshes: list) -> list[dict]:
        tokens = _first_scales(tokenizer.encode(meshes, seed=seed or 0, batch_size=batch_size), up_to_scale)
        records = []
        for one, job, mesh in zip(tokens, batch, meshes, strict=True):
            make_folder(job.output)
            one.save(job.output)
            records.append(_record(job, tokenizer, one, mesh))
        return records

    run_batches(jobs, outcome, read=read_mesh, work=work, weigh=_weight, batch_size=batch_size, label="encode")


def decode_shapes(
    jobs: Sequence[Job], outcome: Outcome, tokenizer_of: Callable, resolution: int | None, up_to_scale: int | None
) -> None:
    """Write a mesh for every item of the jobs' .mtok files; `tokenizer_of` finds the tokenizer of tokens."""
    from ..core.meshes import write_mesh
    from ..core.tokens import Tokens

    outputs, resolution = {job.source: job.output for job in jobs}, resolution or RESOLUTION

    def read(path: Path) -> Tokens:
        if outputs[path].suffix.lower() not in MESHES.outputs:
            raise InvalidInput(f"this holds meshes, and {outputs[path]} must end in {', '.join(MESHES.outputs)}")
        return Tokens.load(path)

    def work(batch: list[Job], items: list) -> list[dict]:
        ((job, tokens),) = zip(batch, items, strict=True)
        tokenizer = tokenizer_of(tokens)
        tokens = _first_scales(tokens, up_to_scale)
        with _bar(jobs, len(tokens), "decode") as on_step:
            decoded = tokenizer.decode(tokens, resolution=resolution, on_step=on_step)
        meshes = decoded if tokens.is_batch else [decoded]
        for mesh in meshes:
            _check_not_empty(mesh, resolution)
        make_folder(job.output)
        records = []
        for one, mesh, path in zip(tokens, meshes, numbered(job.output, len(tokens)), strict=True):
            write_mesh(mesh, path)
            records.append(_record(Job(job.source, path), tokenizer, one, mesh))
        return records

    run_batches(jobs, outcome, read=read, work=work, batch_size=1, label="decode")


def reconstruct_shapes(
    inputs: Sequence[Path], out: Path | None, name: str, outcome: Outcome, seed: int | None, resolution: int | None,
    up_to_scale: int | None, *, batch_size: int, **where: str,
) -> None:  # fmt: skip
    """Write what is left of every mesh after encoding and decoding, and tell how far its surface is from the first."""
    from ..core.meshes import read_mesh, restore, write_mesh

    jobs = plan_jobs(
        inputs, out, outcome, suffixes=MESHES.suffixes, output_suffixes=MESHES.outputs,
        tag=RECONSTRUCTED, folder_tag="-reconstructed",
    )  # fmt: skip
    jobs, tokenizer = _prepare(jobs, name, outcome, up_to_scale, where)
    seed, resolution = seed or 0, resolution or RESOLUTION

    def work(batch: list[Job], meshes: list) -> list[dict]:
        tokens = _first_scales(tokenizer.encode(meshes, seed=seed, batch_size=batch_size), up_to_scale)
        records = []
        for one, job, mesh in zip(tokens, batch, meshes, strict=True):
            (field,) = tokenizer.decode_fields(one)
            with _bar(jobs, 1, "reconstruct") as on_step:
                boxed = field.to_mesh(resolution, on_step=on_step)
            _check_not_empty(boxed, resolution)
            make_folder(job.output)
            write_mesh(restore(boxed, one.frames[0]), job.output)
            records.append(_record(job, tokenizer, one, boxed) | _figures(mesh, boxed, seed))
        return records

    run_batches(jobs, outcome, read=read_mesh, work=work, weigh=_weight, batch_size=batch_size, label="reconstruct")


def write_generated(result, index: int, path: Path, text: dict[str, str]) -> dict:
    """Write one mesh of a batch that was made; what is told about it besides. `text` has no place in these files."""
    from ..core.meshes import write_mesh

    mesh = result.meshes[index]
    if not len(mesh.faces):
        raise EmptyShape("this shape came out empty; another --seed makes another one")
    make_folder(path)
    write_mesh(mesh, path)
    return {"faces": len(mesh.faces)}


def _check_not_empty(mesh, resolution: int) -> None:
    if not len(mesh.faces):
        raise EmptyShape(
            f"the decoded shape is empty at --resolution {resolution}: its tokens stand for nothing, or for something "
            "finer than a cell"
        )


def _prepare(jobs: list[Job], name: str, outcome: Outcome, up_to_scale: int | None, where: dict[str, str]):
    """The jobs whose sources may be meshes, and the tokenizer for them, which is not loaded for none."""
    jobs = only(MESHES, name, ((job.source, job) for job in jobs), outcome)
    tokenizer = load_tokenizer(name, modality=MESHES.modality, **where) if jobs else None
    if tokenizer is not None:
        _check_scale(up_to_scale, tokenizer.name, tokenizer.scales)
    return jobs, tokenizer


def _first_scales(tokens, up_to_scale: int | None):
    if up_to_scale is None:
        return tokens
    _check_scale(up_to_scale, tokens.tokenizer, tokens.scales)
    return tokens.up_to_scale(up_to_scale)


def _check_scale(up_to_scale: int | None, name: str, scales: tuple[int, ...]) -> None:
    if up_to_scale is not None and up_to_scale > len(scales):
        raise InvalidInput(f"--up-to-scale {up_to_scale} is more than the {len(scales)} scales of {name}")


def _bar(jobs: Sequence[Job], count: int, label: str):
    """A progress bar over the steps of one file, where there is none over files; gives its `on_step`."""
    return steps_bar(2 * count if len(jobs) == 1 else 0, label, unit="step")


def _weight(mesh) -> int:
    """Share of a batch that a mesh fills, in the unit of pictures."""
    return len(mesh.faces) * (BATCH_PIXELS // BATCH_FACES)


def _figures(original, boxed, seed: int) -> dict[str, float]:
    """How far the surface of a mesh and that of a decoded one in the box are from each other, measured in the box."""
    from ..core.meshes import normalise
    from ..evaluation.shape_distances import SurfacePoints, surface_figures

    before = SurfacePoints.of(normalise(original)[0], NUM_POINTS, seed)
    figures = surface_figures(before, SurfacePoints.of(boxed, NUM_POINTS, seed + 2))  # as `mediatok evaluate` draws
    return {"chamfer_l1": round(figures["Chamfer L1"], 5), "f_score": round(figures[F_SCORE], 4)}


def _record(job: Job, tokenizer, tokens, mesh) -> dict:
    """What is told about one mesh: that which was read, or that which was written."""
    length = int(tokens.lengths[0])
    return {
        "input": str(job.source),
        "output": str(job.output),
        "model": tokenizer.name,
        "faces": len(mesh.faces),
        "scales": list(accumulate(tokenizer.scales)).index(length) + 1,
        "tokens": length,
        "bytes": tokens.num_bytes,
    }


def line(record: dict) -> str:
    """One mesh in words."""
    scales = f"{record['scales']} scale{'s' if record['scales'] > 1 else ''}"
    parts = [f"{record['input']} -> {record['output']}", f"{record['faces']:,} faces"]
    parts += [f"{record['tokens']} tokens in {scales}", f"{record['bytes']} bytes"]
    if "f_score" in record:
        parts += [f"Chamfer L1 {record['chamfer_l1']:.4f}", f"{F_SCORE} {record['f_score']:.3f}"]
    return "  ".join(parts)


def summary(verb: str, records: Sequence[dict]) -> str:
    """Several meshes in words."""
    faces, tokens, total = (sum(record[key] for record in records) for key in ("faces", "tokens", "bytes"))
    what = f"{verb} {len(records)} meshes with {', '.join(sorted({record['model'] for record in records}))}"
    parts = [f"{faces:,} faces", f"{tokens} tokens", f"{total} bytes"]
    if "f_score" in records[0]:
        mean = {key: sum(record[key] for record in records) / len(records) for key in ("chamfer_l1", "f_score")}
        parts.append(f"mean Chamfer L1 {mean['chamfer_l1']:.4f}, mean {F_SCORE} {mean['f_score']:.3f}")
    return f"{what}: {', '.join(parts)}"
