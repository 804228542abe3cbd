"""Draw the curves of runs: `python -m mediatok.training.curves RUN [RUN ...] --out curves.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..core.errors import InvalidInput, MediatokError
from ..core.files import atomic_write
from .tracker import LOG, read_log

# Title of a panel -> (logged names or their prefix, scale of its axis).
PANELS = {
    "reconstruction loss (training)": ("reconstruction_loss", "log"),
    "validation PSNR, dB": ("val_psnr", "linear"),
    "codes in use (validation)": ("val_codebook_usage", "linear"),
    "codebook perplexity (validation)": ("val_codebook_perplexity", "linear"),
    "quantizer loss (training)": ("quantizer_loss", "log"),
    "gradient norm": ("grad_norm", "log"),
}


def draw_curves(runs: list[Path], out: Path) -> Path:
    """Draw the logs of `runs` (run folders or log files), one colour a run, to the picture `out`.

    Raises:
        InvalidInput: no log there, or an empty one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {}
    for run in runs:
        path = run / LOG if run.is_dir() else run
        lines = read_log(path) if path.is_file() else []
        if not lines:
            raise InvalidInput(f"{path} is not the log of a run")
        logs[run.stem if path == run else run.name] = lines
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, (prefix, scale)) in zip(axes.flat, PANELS.items(), strict=True):
        for colour, (run_name, lines) in enumerate(logs.items()):
            names = sorted({name for line in lines for name in line if name.startswith(prefix)}, key=_by_number)
            for rank, name in enumerate(names):
                points = [(line["step"], line[name]) for line in lines if name in line]
                label = run_name + name.removeprefix(prefix).replace("_", " ")
                width = 1.5 if rank == 0 else 0.7
                axis.plot(
                    *zip(*points, strict=True), color=f"C{colour}", lw=width, alpha=1 / (1 + rank / 2), label=label
                )
        axis.set(title=title, yscale=scale, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    with atomic_write(out) as staged:
        figure.savefig(staged, dpi=100, format=out.suffix.lstrip(".") or "png")
    pyplot.close(figure)
    return out


def _by_number(name: str) -> tuple[int, str]:
    """Sort key: val_psnr, val_psnr_16_tokens, val_psnr_128_tokens."""
    return len(name), name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.curves", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or log.jsonl files")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args(argv)
    try:
        print(draw_curves(arguments.runs, arguments.out))
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
