"""The 3D tab's pieces of HTML: numbers, notices, and viewers that share one camera.

A viewer's value is a dictionary: the GLB files that Gradio serves from its folder, by the name of the figure that shows
them; the frame that brings them into the box; and hints where there is nothing to show. Gradio's own Model3D has a
camera for each viewer and sets it back with every new file, so that a shape could not be watched while it sharpens.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from .studio_models import SHAPE_GENERATOR, SHAPE_TOKENIZER
from .studio_shapes_actions import Coded, Made, Preview
from .studio_shapes_reader import MeshFile
from .studio_speech_views import clip_strip, idle, progress, waiting
from .studio_views import file_size, number_strip, seconds

__all__ = ["clip_strip", "idle", "progress", "waiting"]  # the same in the Speech tab

VIEWER_SCRIPT = (Path(__file__).parent / "studio_shapes.js").read_text()
CODEC_NUMBERS = ("Tokens", "Bytes", "F-score", "Faces", "Time", "Device")
GENERATE_NUMBERS = ("Tokens", "Bytes", "Faces", "Seed", "Time", "Device")
RECIPES = {SHAPE_TOKENIZER: "recipes/vat-tiny.yaml", SHAPE_GENERATOR: "recipes/vat-gen-tiny.yaml"}
ABILITIES = {SHAPE_TOKENIZER: "turns shapes into tokens and back", SHAPE_GENERATOR: "makes new shapes"}
NOTHING = "Nothing is inside at this scale."
NOT_YET = "Choose a class and press Generate."
BOX = (0.0, 0.0, 0.0, 1.0)
HOW_TO_LOOK = "Drag to turn, wheel or + and − to zoom, double-click to set back."
FILE_TYPE = "gradio.FileData"
NAMES = {"before": "Original", "after": "Decoded", "made": "New shape"}


def viewer_template(*figures: str) -> str:
    """The viewers "before" and "after", or "made", side by side."""
    parts = "".join(
        f'<figure><figcaption>{NAMES[name]} <small></small></figcaption><canvas tabindex="0" role="img" '
        f'data-file="{name}" aria-label="{NAMES[name]}: nothing yet"></canvas><p class="mt-hint"></p></figure>'
        for name in figures
    )
    return f'<div class="mt-viewers">{parts}</div><p class="mt-hint mt-notes">&nbsp;</p>'


def viewers(files: dict[str, Path | None], frame=BOX, hints: dict[str, str] | None = None, notes: str = "") -> dict:
    """The value of viewers. hints: by figure, in place of a shape that is not there."""
    data = {
        name: None if path is None else {"path": str(path), "orig_name": path.name, "meta": {"_type": FILE_TYPE}}
        for name, path in files.items()
    }  # Gradio copies such files to its own folder and gives each an address
    return {"files": data, "frame": list(frame), "hints": hints or {}, "notes": f"{notes} {HOW_TO_LOOK}".strip()}


def no_shape(has_samples: bool) -> str:
    """What to do where there is no mesh yet."""
    return "Drop a mesh, or choose a sample." if has_samples else "Drop a mesh."


def missing(kind: str, public: bool) -> str:
    """What a sub-tab says when no model does its work."""
    train = f"Train one on an ordinary computer: <code>{RECIPES[kind]}</code> says how."
    way_out = (
        "Whoever runs this studio can then offer it with <code>--models</code> and a folder of models."
        if public
        else "Then load its folder in the Models tab, or start the studio with <code>--models</code> and the folder it "
        'lies in.</p><p><button type="button" data-tab="Models">Open the Models tab</button>'
    )
    return f'<div class="mt-missing"><p>No model that {ABILITIES[kind]} is here.</p><p>{train} {way_out}</p></div>'


def coded_viewers(coded: Coded, after: Path | None) -> dict:
    """A shape beside its original."""
    before, frame, notes, hints = None, coded.codes.frames[0], "", {}
    if isinstance(coded.subject, MeshFile):
        before, notes = coded.subject.view, notes_line(coded.subject)
    else:
        hints["before"] = "A .mtok file does not hold the original shape."
    if after is None:
        hints["after"] = NOTHING
    place = (frame.x, frame.y, frame.z, frame.scale)
    return viewers({"before": before, "after": after}, place, hints, notes)


def made_viewer(path: Path | None, *, is_empty: bool = False) -> dict:
    """A new shape, or what there is of it. is_empty: it was decoded, and has no faces."""
    return viewers({"made": path}, hints={"made": NOTHING if is_empty else NOT_YET})


def notes_line(subject: MeshFile) -> str:
    """What is odd about a mesh."""
    return f"{subject.name}: {'; '.join(subject.notes)}." if subject.notes else ""


def coded_numbers(coded: Coded) -> str:
    """The strip of an encoded shape."""
    tokens, figures = coded.tokens, coded.figures
    scales = f"{coded.num_scales} of {coded.max_scales} scales"
    score, remark = ("–", "no original") if figures is None else scores(figures)
    is_known = isinstance(coded.subject, MeshFile)
    original = f"original {coded.subject.num_faces:,}" if is_known else "no original"
    return number_strip([
        ("Tokens", f"{int(tokens.lengths[0]):,}", scales),
        ("Bytes", file_size(tokens.num_bytes), f"{tokens.bits_per_token} bits each"),
        ("F-score", score, remark),
        ("Faces", f"{len(coded.mesh.faces):,}", original),
        ("Time", seconds(coded.seconds), coded.done),
        ("Device", coded.device, ""),
    ])  # fmt: skip


def scores(figures: dict[str, float]) -> tuple[str, str]:
    """The F-score that people look at, and the stricter one."""
    return f"{figures['F-score at 0.05']:.3f}", f"at 0.05; {figures['F-score at 0.02']:.3f} at 0.02"


def made_numbers(made: Made) -> str:
    """The strip of a new shape."""
    return number_strip([
        ("Tokens", f"{int(made.tokens.lengths[0]):,}", f"{len(made.tokens.scales)} scales"),
        ("Bytes", file_size(made.tokens.num_bytes), f"{made.tokens.bits_per_token} bits each"),
        ("Faces", f"{len(made.mesh.faces):,}", f"on {made.resolution}³ cells"),
        ("Seed", str(made.seed), made.label_name),
        ("Time", seconds(made.seconds), f"guidance {made.guidance:g}"),
        ("Device", made.device, ""),
    ])  # fmt: skip


def making(preview: Preview) -> str:
    """The line of progress of a shape in the making."""
    done, total = preview.num_scales, preview.total_scales
    text = escape(f"scale {done} of {total}")
    return (
        f'<div class="mt-progress" role="progressbar" aria-label="{text}">'
        f'<span style="width:{100 * done / total:.0f}%"></span><em>{text}</em></div>'
    )
