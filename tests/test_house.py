"""The house rules that a machine can check: sizes, import arrows, lazy imports, names that must not be hidden."""

import ast
import subprocess
import sys
from pathlib import Path

import mediatok
import pytest

ROOT = Path(mediatok.__file__).parent
FLOORS = {
    "core": 0, "kernels": 1, "nn": 2, "tokenizers": 3, "generators": 4, "training": 5, "evaluation": 5, "convert": 5,
    "app": 6,
}  # fmt: skip
SOURCES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    floor = FLOORS[path.relative_to(ROOT).parts[0]]
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lazy = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0 or id(node) in lazy:
            continue
        package = path.relative_to(ROOT).parts[: -node.level]
        target = (*package, *(node.module or "").split("."))
        if target[0] in FLOORS:
            assert FLOORS[target[0]] <= floor, f"{path}:{node.lineno} imports from {target[0]}/, a floor above"


def test_files_stay_readable():
    sizes = sorted(len(path.read_text().splitlines()) for path in SOURCES if path.name != "__init__.py")
    assert sizes[-1] <= 600
    assert sizes[int(len(sizes) * 0.9)] <= 450
    assert sizes[len(sizes) // 2] <= 270
    tests = [path for path in (ROOT / "tests").rglob("*.py") if len(path.read_text().splitlines()) > 500]
    assert not tests


def test_the_checkout_hides_no_other_package():
    found = run("import transformers, tokenizers; print(tokenizers.__file__)", ROOT)
    assert "site-packages" in found
    assert not [
        name for name in ("tokenizers", "generators", "kernels", "app") if (ROOT / name / "__init__.py").exists()
    ]


def test_import_is_light(tmp_path):
    heavy = "('torch', 'diffusers', 'transformers', 'gradio', 'torchaudio', 'trimesh', 'torchmetrics', 'typer')"
    assert run(f"import mediatok, sys; print([m for m in {heavy} if m in sys.modules])", tmp_path) == "[]"


def test_every_public_name_exists():
    for name in mediatok.__all__:
        assert getattr(mediatok, name) is not None
    assert callable(mediatok.evaluate)
