"""What a run tells about itself: TensorBoard, a JSONL log with the same numbers, and samples: pictures, sound, texts.

Shape suffixes: B batch, 3/H/W image.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..core.audio import Waveform, write_audio
from ..core.images import to_pil

logger = logging.getLogger(__name__)
LOG = "log.jsonl"


class Tracker:
    """Writes to `folder`. A resumed run drops what an earlier attempt logged behind its checkpoint."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1 if first_step else None)
        path = folder / LOG
        kept = [line for line in read_log(path) if line["step"] <= first_step] if path.exists() else []
        staged = path.with_suffix(".writing")
        staged.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(staged, path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  open for the length of the run

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def pairs(self, step: int, real_B3HW: Tensor, fake_B3HW: Tensor) -> None:
        """Originals in the upper row, reconstructions below."""
        self.grid(step, torch.stack([real_B3HW.cpu(), fake_B3HW.cpu()]))

    def grid(self, step: int, pictures_RC3HW: Tensor) -> None:
        """Pictures in R rows and C columns."""
        grid = rearrange(pictures_RC3HW.clamp(0, 1), "r c d h w -> d (r h) (c w)")
        self.writer.add_image("samples", grid, step)
        path = self.folder / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        to_pil(grid).save(path)

    def sounds(self, step: int, real: list[Waveform], fake: list[Waveform]) -> None:
        """Originals and their reconstructions, each in one file, the clips one after another."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        for name, clips in (("original", real), (f"step_{step:08d}", fake)):
            joined = Waveform(torch.cat([clip.samples for clip in clips], dim=1), clips[0].sample_rate)
            write_audio(joined, folder / f"{name}.wav")
            self.writer.add_audio(name.partition("_")[0], joined.samples, step, joined.sample_rate)

    def texts(self, step: int, texts: list[str]) -> None:
        """What a recogniser writes, each text on its own lines."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        (folder / f"step_{step:08d}.txt").write_text("\n".join(texts), encoding="utf-8")
        self.writer.add_text("samples", "\n\n".join(texts), step)

    def close(self) -> None:
        self.writer.close()
        self.file.close()


def read_log(path: Path) -> list[dict]:
    """The lines of a run's JSONL log; a line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
