"""`mediatok train`: check the recipe here, then hand it to `accelerate launch`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..core.errors import InvalidInput, InvalidRecipe, nearest_names

RECIPES = Path(__file__).parent.parent / "recipes"


def run_training(recipe: str, changes: list[str], num_processes: int, accelerate_config: Path | None) -> int:
    """Launch the training and return its exit code. Recipes and changes are checked before anything heavy starts."""
    path = find_recipe(recipe)
    module = check_recipe(path, changes)
    command = launch_command(module, path, changes, num_processes, accelerate_config)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C reaches the child, too: let it write its checkpoint and end
        process.wait()
        raise
    return 130 if code in (130, -2) else 2 if code else 0


def check_recipe(path: Path, changes: list[str]) -> str:
    """The module that trains what the recipe at `path` describes; InvalidRecipe when it is wrong."""
    from ..training.codec_recipe import is_codec_recipe, load_codec_recipe
    from ..training.flextok_recipe import is_flextok_recipe, load_flextok_recipe
    from ..training.generator_recipe import is_generator_recipe, load_generator_recipe
    from ..training.kmeans_recipe import is_kmeans_recipe, load_kmeans_recipe
    from ..training.recipe import load_recipe
    from ..training.seed_recipe import is_seed_recipe, load_seed_recipe
    from ..training.shape_recipe import is_shape_recipe, load_shape_recipe
    from ..training.speech_recipe import is_speech_recipe, load_speech_recipe
    from ..training.tokenflow_recipe import is_tokenflow_recipe, load_tokenflow_recipe

    kinds = (
        ("generator", is_generator_recipe, load_generator_recipe),
        ("codec", is_codec_recipe, load_codec_recipe),
        ("speech", is_speech_recipe, load_speech_recipe),
        ("kmeans", is_kmeans_recipe, load_kmeans_recipe),
        ("shape", is_shape_recipe, load_shape_recipe),
        ("flextok", is_flextok_recipe, load_flextok_recipe),
        ("seed", is_seed_recipe, load_seed_recipe),
        ("tokenflow", is_tokenflow_recipe, load_tokenflow_recipe),
        ("tokenizer", lambda path: True, load_recipe),  # of images
    )
    name, _, load = next(kind for kind in kinds if kind[1](path))
    load(path, changes)
    return f"mediatok.training.{name}"


def find_recipe(recipe: str) -> Path:
    """A recipe file, or the one that ships under that name."""
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if path.name.removesuffix(".yaml") not in shipped or path.parent != Path():
        hint = nearest_names(path.stem, shipped) or f" Recipes that ship: {', '.join(shipped)}."
        raise InvalidRecipe(f"recipe {recipe} does not exist.{hint}")
    return shipped[path.name.removesuffix(".yaml")]


def launch_command(
    module: str, recipe: Path, changes: list[str], num_processes: int, accelerate_config: Path | None
) -> list[str]:
    """The `accelerate launch` call, with this Python."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    if accelerate_config is not None:
        if not accelerate_config.is_file():
            raise InvalidInput(
                f"--accelerate-config {accelerate_config} does not exist; make one with `accelerate config`"
            )
        command += ["--config_file", str(accelerate_config)]
    else:
        import torch

        # Said in full, so that a configuration of other work on this machine does not creep in.
        command += ["--num_processes", str(num_processes), "--num_machines", "1", "--dynamo_backend", "no"]
        command += ["--mixed_precision", "no"]  # the recipe's own value goes above this
        if not torch.cuda.is_available():
            command.append("--cpu")
        elif num_processes > 1:
            command.append("--multi_gpu")
    return [*command, "-m", module, str(recipe), *changes]
