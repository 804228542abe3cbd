"""The examples of docs/generation.md run as they stand there, where the models that they name ship."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import mediatok
import pytest

PAGE = (Path(mediatok.__file__).parent / "docs" / "generation.md").read_text()
SHIPPED = {entry.name for entry in mediatok.models() if entry.is_shipped}

pytestmark = pytest.mark.skipif(not {"maskgit-tiny", "xar-tiny"} <= SHIPPED, reason="the small generators do not ship")


def run(arguments, folder):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"


def test_python_examples(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) >= 5
    run(["-c", "\n".join(examples)], tmp_path)
    for name in ("food.png", "from-diffusers.png"):
        assert mediatok.read_image(tmp_path / name).size == (64, 64)


def test_command_line_examples(tmp_path):
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for command in block.splitlines():
        run(["-m", "mediatok.app.cli", *shlex.split(command)[1:]], tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"meal.png", "grid.png", "food.png", "edited.png"}
    assert (tmp_path / "generated" / "food-drink-7.png").is_file()
    assert mediatok.Tokens.load(tmp_path / "food.mtok").ids.shape == (1, 64)
