"""What all tabs share: the models, the device, the samples, and how a mistake becomes a message."""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import gradio as gr
from gradio import FileData
from PIL import Image

from ..core.errors import Cancelled, MediatokError
from ..core.images import list_images
from .studio_models import Catalogue
from .studio_views import title_bar
from .studio_worker import Device, device_name, resident_bytes

log = logging.getLogger("mediatok.studio")
SAMPLES = Path(__file__).parent.parent / "docs" / "samples"
CLIPS, SHAPES = SAMPLES.with_name("clips"), SAMPLES.with_name("shapes")
NUM_SAMPLES = 6
THUMBNAIL = 48  # px


@dataclass
class Studio:
    """One running studio."""

    catalogue: Catalogue
    folder: Path  # all of its temporary files
    public: bool = False
    device_name: str = "cpu"
    device: Device = field(default_factory=Device)

    def __post_init__(self):
        # Copies: Gradio shows files of its own folders only.
        shown = self.folder / "samples"
        shown.mkdir()
        self.samples = [Path(shutil.copy(path, shown)) for path in list_images(SAMPLES)[:NUM_SAMPLES]]
        self.clips = [Path(shutil.copy(path, shown)) for path in sorted(CLIPS.glob("*.flac"))[:NUM_SAMPLES]]
        self.shapes = [Path(shutil.copy(path, shown)) for path in sorted(SHAPES.glob("*.glb"))[:NUM_SAMPLES]]

    def first_source(self, kind: str) -> str | None:
        """The model of a kind that a sub-tab begins with; None where there is none."""
        return self.catalogue.default_source(kind) if self.catalogue.choices(kind) else None

    def model_updates(self, kinds: Iterable[str], chosen: Iterable[str | None]) -> list:
        """For each kind its notice, its controls and its list of models; `chosen` stay as long as they are here."""
        updates = []
        for kind, source in zip(kinds, chosen, strict=True):
            choices = self.catalogue.choices(kind)
            value = {} if source in [source for _, source in choices] else {"value": self.first_source(kind)}
            here = bool(choices)
            updates += [gr.HTML(visible=not here), gr.Row(visible=here), gr.Dropdown(choices=choices, **value)]
        return updates

    def title(self) -> str:
        """The title bar with the memory in use now."""
        return title_bar(device_name(self.device_name), self.catalogue.shelf.used_bytes, resident_bytes())


def html(value: str, **options) -> gr.HTML:
    """A piece of our own HTML, without Gradio's styles for text."""
    return gr.HTML(value, apply_default_css=False, **options)


def picture_input(value: Path | None = None, **options) -> gr.Image:
    """An image input that hands over the file as it came: our own reader, with its limits, is the first to open it."""
    image = gr.Image(None if value is None else str(value), type="filepath", **options)
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def clip_input(**options) -> gr.Audio:
    """An audio input that hands over the file as it came, and shows files of ours as they are: Gradio opens neither."""
    audio = gr.Audio(None, type="filepath", sources=["upload", "microphone"], **options)
    audio.preprocess = lambda payload: None if payload is None else payload.path
    audio.postprocess = lambda path: None if path is None else FileData(path=str(path), orig_name=Path(path).name)
    return audio


def mesh_input(**options) -> gr.File:
    """A file input that hands over the file as it came, whatever it is called: our own reader says what is wrong."""
    mesh = gr.File(None, type="filepath", **options)
    mesh.preprocess = lambda payload: None if payload is None else payload.path
    return mesh


def speaks(num_outputs: int) -> Callable:
    """Make a handler show what went wrong as a message and leave the page as it was: `gr.skip()` for all outputs."""

    def decorate(handler):
        @functools.wraps(handler)
        def wrapped(*args):
            with hold_back():
                return handler(*args)
            return skips(num_outputs)

        return wrapped

    return decorate


@contextmanager
def hold_back() -> Iterator[list]:
    """Turn an exception into a message to the user; the list that it gives is then not empty."""
    failed: list[Exception] = []
    try:
        yield failed
    except Cancelled:
        pass
    except MediatokError as error:
        failed.append(error)
        gr.Warning(escape(sentence(error)), title="That did not work", duration=10)
    except Exception as error:
        failed.append(error)
        gr.Warning(escape(report_bug()), title="An error of the studio", duration=10)


def skips(count: int):
    """`gr.skip()` for every output."""
    return gr.skip() if count == 1 else [gr.skip() for _ in range(count)]


def sentence(error: Exception) -> str:
    """An error's message as a sentence."""
    text = " ".join(str(error).split())
    # An upload's place on the server is nobody's business; its name says enough.
    served = os.environ.get("GRADIO_TEMP_DIR")
    text = re.sub(rf"{re.escape(served)}/\S*/", "", text) if served else text
    if text.split(" ", 1)[0].rstrip(",:;").isalpha():  # no file name, option or number
        text = text[:1].upper() + text[1:]
    return text + ("" if text.endswith((".", "!", "?")) else ".")


def report_bug() -> str:
    """Log the current exception under a number, and say that number: users get no traceback."""
    number = secrets.token_hex(3)
    log.exception("error %s", number)
    return f"Something went wrong in the studio (error {number}; its log says more). Your settings are unchanged."


def sample_strip(samples: list[Path]) -> str:
    """Thumbnails of the samples as buttons; `data-i` is the sample's number."""
    buttons = []
    for index, path in enumerate(samples):
        with Image.open(path) as image:
            thumbnail = image.convert("RGBA")
        thumbnail.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        white = Image.new("RGBA", thumbnail.size, "white")
        buffer = io.BytesIO()
        Image.alpha_composite(white, thumbnail).convert("RGB").save(buffer, "WEBP", quality=80)
        name = escape(path.stem.replace("-", " ").replace("_", " "))
        source = base64.b64encode(buffer.getvalue()).decode()
        buttons.append(
            f'<button type="button" data-i="{index}" title="{name}" aria-label="Sample {name}">'
            f'<img alt="" src="data:image/webp;base64,{source}"></button>'
        )
    return f'<div class="mt-samples" role="group" aria-label="Samples">{"".join(buttons)}</div>'


SAMPLE_SCRIPT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-i]');
  if (button) trigger('click', {index: Number(button.dataset.i)});
});
"""
