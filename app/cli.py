"""The `mediatok` command: what it offers, and how every failure becomes one line and an exit code.

Exit codes: 0 done; 1 a parity case differs or an internal error; 2 bad input or usage (one line on stderr, nothing
half-written); 130 interrupted. Nothing heavy is imported here, nor by what is imported here: `--help` must be quick.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import MediatokError
from . import cli_codec, cli_generate, cli_measure, cli_models, cli_rate, cli_speech
from .cli_jobs import one_line

DEBUG_VARIABLE = "MEDIATOK_DEBUG"  # set it to see the traceback behind an error line

app = typer.Typer(
    name="mediatok",
    help="Images, speech and 3D shapes as short token sequences, and back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    cli_codec.encode,
    cli_codec.decode,
    cli_codec.reconstruct,
    cli_generate.generate,
    cli_speech.enhance,
    cli_speech.transcribe,
    cli_speech.speak,
    cli_models.info,
    cli_models.models,
    cli_measure.evaluate,
    cli_measure.evaluate_generator,
    cli_rate.rate,
    cli_measure.parity,
):
    app.command()(command)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships (see recipes/).")],
    changes: Annotated[list[str] | None, typer.Argument(help="Values to change: section.key=value ...")] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU.")] = 1,
    accelerate_config: Annotated[
        Path | None, typer.Option(help="A file of `accelerate config`: several hosts, FSDP, mixed precision.")
    ] = None,
) -> None:
    """Train a model from a recipe.

    The recipe is checked, then `accelerate launch -m mediatok.training.KIND RECIPE section.key=value ...` runs, with
    the kind of its model: tokenizer, generator, codec, speech, kmeans or shape.
    """
    from .cli_train import run_training

    raise typer.Exit(run_training(recipe, changes or [], num_processes, accelerate_config))


@app.command()
def studio(
    host: Annotated[str, typer.Option(help="Address to listen on; other than local ones need --auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    auth: Annotated[str | None, typer.Option(help="user:password that visitors must give.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen beyond this machine without a password.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Serve others: no models by path or name.")] = False,
    models: Annotated[Path | None, typer.Option(help="Folder of model folders to offer beside the shipped.")] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, max=4096, help="Largest upload in MiB.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; default the accelerator if any.")] = None,
) -> None:
    """Serve the studio, a web page to try tokenizers."""
    if device is not None:
        cli_models.check_device(device)
    from .studio import launch

    options = {"auth": auth, "no_auth": no_auth, "public": public, "max_upload_mb": max_upload_mb, "device": device}
    launch(host, port, models_dir=models, **options)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line with `arguments` (default: the process's) and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if DEBUG_VARIABLE not in os.environ:
        warnings.simplefilter("ignore")
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files are removed
    try:
        code = app(args=arguments or ["--help"], prog_name="mediatok", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # `mediatok models | head`; typer ends the same way when a command meets it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if DEBUG_VARIABLE in os.environ:
            raise
        message, code = describe(error)
        print(f"error: {message}", file=sys.stderr)
    if code == 130:  # typer turns Ctrl-C within a command into this code
        print("interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def describe(error: Exception) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    if isinstance(error, MediatokError):
        return one_line(error), 2
    if hasattr(error, "format_message"):  # typer's usage errors
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mediatok"
        return f"{one_line(error.format_message())} (see `{command} --help`)", 2
    if isinstance(error, OSError):
        return one_line(error), 2
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return f"out of memory; try a smaller --batch-size ({one_line(error)[:200]})", 2
    return f"internal error, please report it ({DEBUG_VARIABLE}=1 shows where): {one_line(repr(error))}", 1


if __name__ == "__main__":
    main()
