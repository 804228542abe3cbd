"""The command as a process of its own: start-up cost, interruption, closed pipes."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
from PIL import Image

COMMAND = [sys.executable, "-m", "mediatok.app.cli"]
START_SECONDS = 400  # importing torch and diffusers takes 5 seconds, and much longer on a crowded machine
HEAVY = ("torch", "diffusers", "transformers", "gradio", "PIL", "numpy", "matplotlib", "tqdm")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mediatok.app import cli\n"
        "try: cli.main(['--help'])\n"
        f"except SystemExit: print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "heavy: []" in done.stdout
    assert done.stderr == ""


def test_interruption_leaves_whole_files_only(tmp_path, shipped):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)).save(folder / "0.png")
    for index in range(1, 1000):
        os.link(folder / "0.png", folder / f"{index}.png")
    options = ["--model", str(shipped / "titok-tiny"), "--tile", "--batch-size", "2", "--out", str(out)]
    # A parent that runs in the background of a shell ignores SIGINT, and so would its child.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [*COMMAND, "reconstruct", str(folder), *options]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, preexec_fn=listen) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not out.exists() or len(list(out.glob("[!.]*"))) < 3:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.rstrip().endswith("interrupted")
    assert "Traceback" not in errors
    names = [path.name for path in out.iterdir()]
    assert 3 <= len(names) < 1000
    assert not any(name.startswith(".") for name in names)
    for name in names:
        with Image.open(out / name) as picture:
            picture.load()


def test_closed_pipe_ends_quietly():
    with subprocess.Popen([*COMMAND, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=120)
    assert errors == b""
