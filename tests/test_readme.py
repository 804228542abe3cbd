"""The README's own Python example and commands run as they stand there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mediatok
import pytest

ROOT = Path(mediatok.__file__).parent
README = (ROOT / "README.md").read_text()
(BLOCK,) = re.findall(r"```\n(mediatok .*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0] for line in BLOCK.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that has what the examples name."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("samples", "clips", "shapes"):
        shutil.copytree(ROOT / "docs" / name, folder / "docs" / name)
    return folder


def test_python_examples(checkout):
    example = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    done = subprocess.run([sys.executable, "-c", example], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert mediatok.read_image(checkout / "tiger-32.png").size == (64, 64)
    assert int(mediatok.Tokens.load(checkout / "tiger.mtok").lengths[0]) == 32
    assert mediatok.read_image(checkout / "apple.png").size == (64, 64)
    assert mediatok.read_audio(checkout / "light-decoded.wav").samples.shape == (1, 100_000)
    assert len(mediatok.read_mesh(checkout / "chair.stl").faces) > 500
    assert len(mediatok.read_mesh(checkout / "table.glb").faces) > 500


def test_command_line_examples(checkout):
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        program = [sys.executable, "-m", "mediatok.app.cli", *shlex.split(command)[1:]]
        done = subprocess.run(program, cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert len(list((checkout / "pictures").rglob("*.png"))) == 8
    assert len(list((checkout / "smileys").glob("*.png"))) == 4


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
