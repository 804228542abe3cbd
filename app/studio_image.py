"""What the Image tab does when a control moves: one method an event, each returning what the page shows next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from .. import Tokens, write_image
from ..core.errors import Cancelled, InvalidInput
from . import studio_actions as actions
from . import studio_views as views
from .studio_code import command_code, picture_name, python_code, safe_stem
from .studio_context import Studio, hold_back, skips, speaks
from .studio_decoding import DECODING, decoding_updates, named_fields
from .studio_generation import first_gallery
from .studio_image_controls import budget_kinds, count_slider
from .studio_plots import rate_plot
from .studio_session import Session
from .studio_worker import newest

NUM_RESULT_OUTPUTS = 10
NUM_ADAPTED = 7 + len(DECODING)  # controls that another tokenizer changes
COUNTS = ("tokens", "scales")  # kinds of budget that are counted on the slider
PREVIEW_SECONDS = 0.3  # between two of a decoder that works in steps
KEPT_RESULTS = 3  # folders of results: the page may still be fetching the previous ones


@dataclass
class Shown:
    """What a result looks like on the page: files in the session's folder, and HTML."""

    result: actions.Result
    pair: tuple[str, str]  # paths of original and reconstruction
    png: str
    mtok: str | None
    python: str
    command: str
    plot: str

    @classmethod
    def of(cls, session: Session) -> Shown:
        result = session.result
        folder, stem = session.new_folder("image", KEPT_RESULTS - 1), safe_stem(result.picture_name)
        png = original = folder / f"{stem}-decoded.png"
        write_image(result.image, png)
        if result.reference is not None:
            original = folder / f"{stem}-original.png"
            write_image(result.reference, original)
        mtok = None if result.tokens is None else folder / f"{stem}.mtok"
        if mtok is not None:
            result.tokens.save(mtok)
        return cls(
            result, (str(original), str(png)), str(png), mtok and str(mtok), python_code(result), command_code(result),
            plot_of(session),
        )  # fmt: skip

    def outputs(self, studio: Studio, position: int = 0) -> list:
        """Values for the tab's result components, in the order of `result_outputs` in tab_image.py."""
        ids = self.result.ids()
        code = gr.Number(ids[position], label=f"Code of token {position + 1}") if ids else gr.skip()
        mtok = gr.DownloadButton(value=self.mtok, interactive=self.mtok is not None)
        return [
            views.numbers(self.result), self.pair, views.token_grid(self.result), code, self.png, mtok,
            self.python, self.command, self.plot, studio.title(),
        ]  # fmt: skip


def curves_key(result: actions.Result) -> tuple:
    """What rate-distortion curves depend on."""
    decoding = tuple(sorted(result.decoding.items()))
    return result.source, decoding, hash(result.reference.tobytes()), result.reference.size


def plot_of(session: Session) -> str:
    """The rate-distortion plot of what the page shows, with the curves if they are known."""
    result = session.result
    if result.reference is None:
        return rate_plot({}, result.model_name, None, "No curve: a .mtok file does not hold the original picture.")
    known = session.curves is not None and session.curves[0] == curves_key(result)
    mark = None if result.tokens is None else (result.tokens.num_bytes, result.psnr)
    return rate_plot(session.curves[1] if known else {}, result.model_name, mark, "" if known else "measuring …")


def first_session(studio: Studio) -> Session:
    """The session that every new page starts from: a sample, through the default model, fully measured."""
    session = Session(studio.folder, studio.samples[0])
    source = studio.catalogue.default_source()
    tokenizer = studio.catalogue.get(source)
    budget = actions.Budget("tokens", tokenizer.max_tokens)
    job = session.start("image")
    for _ in range(2):  # the first run also pays for memory and threads, and its time would be shown
        session.result = actions.encode_picture(tokenizer, source, session.picture, session.picture.name, budget, job)
    curves = actions.measure_curves(tokenizer, session.result.reference, job, tile=False, hold=studio.device.hold)
    curves = curves_key(session.result), curves
    return Session(studio.folder, session.picture, session.result, curves, first_gallery(studio.catalogue))


def first_effect(studio: Studio, session: Session):
    """Where the first token of the first result acts."""
    if session.result.tokens is None:
        return None
    tokenizer = studio.catalogue.get(session.result.source)
    return actions.token_effect(tokenizer, session.result, 0, session.start("image", "effect"))


class ImageEvents:
    """The tab's event handlers. None of them raises: mistakes become messages, and the page stays as it was."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def encode(self, session: Session, *controls):
        """The picture on the page, with the controls as they are now."""
        with hold_back():
            yield from self._encode(session, session.picture, *controls)
            return
        yield skips(NUM_RESULT_OUTPUTS)

    def encode_upload(self, session: Session, path: str | None, *controls):
        """A new picture. If it cannot be read, the input goes back to the one before."""
        if path is None:
            yield skips(NUM_RESULT_OUTPUTS + 1)
            return
        session.pictures["image"] = Path(path)  # at once: a control that moves meanwhile means this picture
        with hold_back() as failed:
            for shown in self._encode(session, Path(path), *controls):
                yield [gr.skip(), *shown]
            return
        yield [str(session.revert("image")) if failed else gr.skip(), *skips(NUM_RESULT_OUTPUTS)]

    def take(self, session: Session, *controls):
        """The chosen picture of the Generate tab."""
        with hold_back():
            made = session.gallery.shown[session.chosen]
            path = session.new_folder("taken", KEPT_RESULTS) / picture_name(session.gallery, made)
            write_image(made.image, path)
            session.pictures["image"] = path
            for shown in self._encode(session, path, *controls):
                yield [str(path), *shown]
            return
        yield skips(NUM_RESULT_OUTPUTS + 1)

    def encode_sample(self, session: Session, event: gr.EventData, *controls):
        """The sample that was clicked."""
        picture = session.pictures["image"] = self.studio.samples[int(event.index)]
        with hold_back():
            for shown in self._encode(session, picture, *controls):
                yield [str(picture), *shown]
            return
        yield [str(picture), *skips(NUM_RESULT_OUTPUTS)]

    def _encode(
        self, session: Session, picture: Path, model, kind, count, quality, size, tile, caption, *decoding
    ) -> Iterator[list]:
        """What the page shows: previews where the decoder works in steps, then the result."""
        job = session.start("image")
        budget = actions.Budget(kind, {"tokens": count, "scales": count, "quality": quality, "bytes": size}[kind])
        tokenizer = self.studio.catalogue.get(model)

        def work(emit) -> actions.Result:
            with self.studio.device.hold(job):
                return actions.encode_picture(
                    tokenizer, model, picture, picture.name, budget, job, tile=tile, caption=caption,
                    decoding=named_fields(decoding), emit=emit if tokenizer.shows_steps else None,
                )  # fmt: skip

        begun = shown_at = time.monotonic()
        folder = None
        try:
            for news in newest(work):
                if isinstance(news, actions.Result):
                    session.accept("image", picture)
                    yield self._show(session, job, news)
                elif time.monotonic() - shown_at > PREVIEW_SECONDS:
                    shown_at = time.monotonic()
                    folder = folder or session.new_folder("previews", KEPT_RESULTS)
                    yield self._preview(news, picture, tokenizer, tile, folder / f"making-{shown_at - begun:.1f}.png")
        except Cancelled:
            if folder is not None and not session.is_replaced("image", job):
                yield self._pair(Shown.of(session).pair)  # back from the preview to the last result
            raise
        finally:
            job.stop()  # also when the page was closed
            session.finish(job)

    def _preview(self, image, picture: Path, tokenizer, tile: bool, path: Path) -> list:
        """The picture as far as it has come, in the place of the result."""
        write_image(image, path)
        original = path.with_name("original.png")
        if not original.exists():
            write_image(actions.reference_image(tokenizer, picture, tile=tile), original)
        return self._pair((str(original), str(path)))

    def _pair(self, pair: tuple[str, str]) -> list:
        """The pictures alone."""
        return [gr.skip(), pair, *skips(NUM_RESULT_OUTPUTS - 2)]

    def _show(self, session: Session, job, result: actions.Result, position: int = 0) -> list:
        job.check()
        session.finish(job)
        session.result, session.position = result, position
        return Shown.of(session).outputs(self.studio, position)

    def adapt(self, session: Session, model: str, kind: str, count: int):
        """Fit the controls to another tokenizer; back to the one before if it cannot be loaded."""
        with hold_back() as failed:
            tokenizer = self.studio.catalogue.get(model)
            # Only what must change is set: the user may move another control while this answer is under way.
            count_options, kinds = count_slider(tokenizer), budget_kinds(tokenizer)
            rest = gr.Textbox(visible=tokenizer.accepts_text), *decoding_updates(tokenizer)
            counted, top = kinds[0][1], count_options["maximum"]
            if tokenizer.is_variable_length:
                chosen = {"value": counted} if kind in COUNTS and kind != counted else {}
                value = {"value": top} if count > top or chosen else {}
                slider = gr.Slider(**count_options, **value)
                radio = gr.Radio(choices=kinds, interactive=True, **chosen)
                return gr.skip(), radio, slider, gr.skip(), gr.skip(), *rest
            slider = gr.Slider(**count_options, value=top, visible=True)
            hidden = gr.Slider(visible=False), gr.Number(visible=False)
            radio = gr.Radio(choices=kinds, value=counted, interactive=False)
            return gr.skip(), radio, slider, *hidden, *rest
        back = gr.Dropdown(value=session.result.source) if failed else gr.skip()
        return back, *skips(NUM_ADAPTED - 1)

    def show_kind(self, kind: str):
        """One slider at a time: what the user fixes."""
        return (
            gr.Slider(visible=kind in COUNTS),
            gr.Slider(visible=kind == "quality"),
            gr.Number(visible=kind == "bytes"),
        )

    @speaks(NUM_RESULT_OUTPUTS + 1)
    def open_tokens(self, session: Session, path: str, caption: str):
        """Decode a .mtok file with the tokenizer that it names."""
        job = session.start("image")
        tokens = Tokens.load(path)
        source = self.studio.catalogue.source_of(tokens.tokenizer)
        tokenizer = self.studio.catalogue.get(source)
        with self.studio.device.hold(job):
            result = actions.decode_tokens(tokenizer, source, tokens, Path(path).name, job, caption=caption)
        return [source, *self._show(session, job, result)]

    @speaks(2)
    def choose(self, session: Session, event: gr.EventData):
        """A click on a token: its code, and where it acts."""
        position = int(event.position)
        actions.check_position(session.result, position)
        session.position = position
        return gr.Number(session.result.ids()[position], label=f"Code of token {position + 1}"), self._effect(session)

    @speaks(1)
    def effect(self, session: Session):
        """Where the chosen token acts in a new result."""
        return self._effect(session)

    def _effect(self, session: Session):
        result, position = session.result, session.position
        if result.tokens is None:
            return gr.Image(None, label="No tokens")
        job = session.start("image", "effect")
        tokenizer = self.studio.catalogue.get(result.source)
        with self.studio.device.hold(job):
            picture = actions.token_effect(tokenizer, result, position, job)
        job.check()
        return gr.Image(picture, label=f"Where token {position + 1} acts")

    @speaks(1)
    def curves(self, session: Session):
        """Measure the curves of a new picture or model; the plot has them already otherwise."""
        result = session.result
        if result.reference is None or (session.curves and session.curves[0] == curves_key(result)):
            return gr.skip()
        job = session.start("image", "curves")
        tokenizer = self.studio.catalogue.get(result.source)
        curves = actions.measure_curves(
            tokenizer, result.reference, job, tile=result.num_tiles > 1, hold=self.studio.device.hold,
            decoding=result.decoding,
        )  # fmt: skip
        job.check()
        session.curves = (curves_key(result), curves)
        return plot_of(session)

    @speaks(NUM_RESULT_OUTPUTS)
    def change(self, session: Session, code: float | None):
        """Put the given code at the chosen position."""
        if code is None:
            raise InvalidInput("Give a code: a whole number.")
        return self._edit(session, lambda *args: actions.change_token(*args[:2], session.position, int(code), args[2]))

    @speaks(NUM_RESULT_OUTPUTS)
    def undo(self, session: Session):
        """Back to the encoder's own tokens."""
        return self._edit(session, lambda tokenizer, result, job: actions.with_edits(tokenizer, result, {}, job))

    def _edit(self, session: Session, edit: Callable) -> list:
        result = session.result
        actions.check_position(result, session.position)
        job = session.start("image")
        tokenizer = self.studio.catalogue.get(result.source)
        with self.studio.device.hold(job):
            edited = edit(tokenizer, result, job)
        return self._show(session, job, edited, session.position)

    def stop(self, session: Session) -> None:
        """End this page's work; what is on screen stays."""
        if not session.stop("image"):
            gr.Info("Nothing is running.", duration=2)
