"""What the Generate tab does when a control moves: one method an event, each giving what the page shows next."""

from __future__ import annotations

import secrets
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gradio as gr

from .. import write_image
from ..core.errors import InvalidInput
from ..core.generator import MAX_GUIDANCE, MAX_STEPS
from . import studio_gallery as views
from .studio_actions import changed_options
from .studio_code import generation_command, generation_python, picture_name
from .studio_context import Studio, hold_back, skips, speaks
from .studio_decoding import DECODING, decoding_updates, named_fields
from .studio_generation import MAX_PICTURES, Gallery, Made, Progress, make_pictures, own_settings
from .studio_models import GENERATOR
from .studio_session import Session
from .studio_worker import newest

NUM_OUTPUTS = 9
NUM_ADAPTED = 8 + len(DECODING)  # controls that another generator changes
KEPT_GALLERIES = 3  # folders of files: the page may still be fetching the previous ones
NUM_SEEDS = 1_000_000  # that are drawn: short enough to read out
MAX_PAGE_SEED = 2**53 - 1  # browsers round larger numbers
MAX_OF_EACH = 16  # pictures of one label


@dataclass
class Shown:
    """What a gallery looks like on the page besides its pictures: files in the session's folder, and code."""

    png: str
    zip: str
    python: str
    command: str

    @classmethod
    def of(cls, session: Session) -> Shown:
        gallery, folder = session.gallery, session.new_folder("generate", KEPT_GALLERIES - 1)
        command = generation_command(gallery)
        files = []
        for picture in gallery.shown:
            path = folder / picture_name(gallery, picture)
            write_image(picture.image, path, text=_text(gallery, picture))
            files.append(path)
        archive = folder / f"{gallery.model_name}-{gallery.pictures[0].recipe.seed}.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:  # PNG is compressed already
            for path in dict.fromkeys(files):
                file.write(path, path.name)
            file.writestr("how.txt", f"{command}\n\n{generation_python(gallery)}\n")
        return cls(str(files[session.chosen]), str(archive), generation_python(gallery), command)


@dataclass(frozen=True)
class Numbers:
    """The tab's number fields as they were typed: None where one is empty."""

    count: float | None
    seed: float | None
    fresh: bool
    steps: float | None
    guidance: float | None

    def checked(self) -> tuple[int, int, int, float]:
        """Count, seed (a new one if that is asked for), steps and guidance.

        Raises:
            InvalidInput: one makes no sense; the message names the field.
        """
        return (
            _whole("Pictures of each", self.count, 1, MAX_OF_EACH),
            secrets.randbelow(NUM_SEEDS) if self.fresh else _whole("Seed", self.seed, 0, MAX_PAGE_SEED),
            _whole("Steps", self.steps, 1, MAX_STEPS),
            _in_range("Guidance", self.guidance, 0, MAX_GUIDANCE),
        )


def _whole(field: str, value, smallest: int, largest: int) -> int:
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(_in_range(field, value if is_whole else None, smallest, largest, "a whole number"))


def _in_range(field: str, value, smallest: float, largest: float, what: str = "a number") -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not smallest <= value <= largest:
        raise InvalidInput(f"{field} must be {what} from {smallest:g} to {largest:,.0f}.")
    return value


def _decoding(generator, fields: dict) -> dict:
    """What the fields under "Decoder" ask for, as far as it is not what the tokenizer does anyway.

    Raises:
        InvalidInput: a value makes no sense; the message names the group, since other fields are called the same.
    """
    try:
        return changed_options(generator, fields)
    except InvalidInput as error:
        raise InvalidInput(f"Decoder: {error}") from None


class GenerateEvents:
    """The tab's event handlers. None of them raises: mistakes become messages, and the page stays as it was."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def make(
        self, session: Session, model: str, labels: list | None, prompt: str, count, seed, fresh, steps, guidance,
        *decoding,
    ) -> Iterator[list]:  # fmt: skip
        """Make `count` pictures of each label, or of the prompt where the generator reads one."""
        numbers = Numbers(count, seed, fresh, steps, guidance)
        wanted = labels or [None], [(prompt or "").strip() or None]
        yield from self._run(session, model, wanted, numbers, named_fields(decoding))

    def vary(
        self, session: Session, event: gr.EventData, model: str, count, seed, fresh, steps, guidance, *decoding
    ) -> Iterator[list]:
        """Keep the marked units of the chosen picture and make the rest of it anew, `count` times."""
        gallery = session.gallery
        origin = gallery.shown[session.chosen]
        numbers = Numbers(count, seed, fresh, steps, guidance)
        # Once another generator is chosen the fields are about that one.
        ways = named_fields(decoding) if model == gallery.source else origin.recipe.decoding
        wanted = ([origin.recipe.label],) * 2
        yield from self._run(session, gallery.source, wanted, numbers, ways, origin, event.keep)

    def _run(
        self, session: Session, model: str, wanted: tuple[list, list], numbers: Numbers, decoding: dict,
        origin: Made | None = None, keep=(),
    ) -> Iterator[list]:  # fmt: skip
        """wanted: labels, and prompts; one or the other, as the generator reads them."""
        job = None
        with hold_back():
            keep = tuple(int(unit) for unit in keep)
            if origin is not None and len(keep) == session.gallery.units_of(origin):
                raise InvalidInput("Everything is kept, so there is nothing to redo: click what should change.")
            count, seed, steps, guidance = numbers.checked()
            generator = self.studio.catalogue.get(model, GENERATOR)
            labels = wanted[generator.accepts_text]
            if len(labels) * count > MAX_PICTURES:
                raise InvalidInput(f"That would be {len(labels) * count} pictures; a run makes at most {MAX_PICTURES}.")
            labels = [label for label in labels for _ in range(count)]
            # A mistake is told at once, and does not end the run under way.
            generator.requests(labels)
            generator.checked_settings(steps, guidance)
            ways = _decoding(generator, decoding)
            job = session.start("generate")
            yield [views.waiting_grid(len(labels), self.studio.device.num_jobs + 1), gr.skip(), seed, *skips(6)]

            def work(emit) -> Gallery:
                with self.studio.device.hold(job):
                    return make_pictures(generator, model, labels, seed, steps, guidance, job, emit, origin, keep, ways)

            try:
                for news in newest(work):
                    if session.is_replaced("generate", job):
                        continue
                    if isinstance(news, Progress):
                        yield [views.progress_grid(news), *skips(NUM_OUTPUTS - 1)]
                    elif news.pictures:
                        session.gallery, session.chosen = news, 0 if origin is None else 1
                        yield self._show(session, stopped=job.is_stopped)
                        return
            finally:
                job.stop()  # also when the page was closed
                session.finish(job)
        if session.is_replaced("generate", job):
            yield skips(NUM_OUTPUTS)
        else:
            yield [views.gallery_grid(session.gallery, session.chosen), *skips(NUM_OUTPUTS - 1)]

    def _show(self, session: Session, stopped: bool) -> list:
        gallery, shown = session.gallery, Shown.of(session)
        return [
            views.gallery_grid(gallery, session.chosen), views.gallery_numbers(gallery, stopped=stopped), gr.skip(),
            views.chosen_panel(gallery, session.chosen), shown.png, shown.zip, shown.python, shown.command,
            self.studio.title(),
        ]  # fmt: skip

    @speaks(2)
    def choose(self, session: Session, event: gr.EventData):
        """A click on a picture."""
        index, gallery = int(event.index), session.gallery
        if not 0 <= index < len(gallery.shown):
            raise InvalidInput(f"there is no picture {index + 1} in the gallery")
        session.chosen = index
        picture = gallery.shown[index]
        path = session.new_folder("chosen", KEPT_GALLERIES) / picture_name(gallery, picture)
        write_image(picture.image, path, text=_text(gallery, picture))
        return views.chosen_panel(gallery, index), str(path)

    def adapt(self, session: Session, model: str, labels: list | None, last_model: str):
        """Fit the controls to another generator; back to the one before if it cannot be loaded."""
        if model == last_model:  # Gradio tells some choices twice
            return skips(NUM_ADAPTED)
        with hold_back():
            generator = self.studio.catalogue.get(model, GENERATOR)
            names, before = label_names(generator), label_names(self.studio.catalogue.get(last_model, GENERATOR))
            # The same labels, where this model has them.
            by_number = dict(enumerate(before))
            wanted = [by_number.get(label, label) for label in labels or []]
            labels = [names.index(name) for name in dict.fromkeys(wanted) if name in names]
            picker = gr.HTML(value=labels, names=names, visible=not generator.accepts_text)
            prompt = gr.Textbox(visible=generator.accepts_text)
            own = *own_settings(generator), *decoding_updates(generator)
            return model, model, picker, prompt, *own, self.studio.title()
        return last_model, *skips(NUM_ADAPTED - 1)

    def stop(self, session: Session) -> None:
        """End this page's run; finished pictures stay."""
        if not session.stop("generate"):
            gr.Info("Nothing is running.", duration=2)


def label_names(generator) -> list[str]:
    """Name of every class, by number."""
    if generator.accepts_text or generator.label_names:
        return list(generator.label_names)
    return [f"class {number}" for number in range(generator.config.num_classes)]


def _text(gallery: Gallery, picture: Made) -> dict[str, str]:
    """Text fields of a PNG: what it is and how to make it again."""
    alone = replace(gallery, pictures=(picture,), origin=None)
    return {
        "model": gallery.model_name, "label": gallery.label(picture), "seed": str(picture.recipe.seed),
        "command": generation_command(alone),
    }  # fmt: skip
