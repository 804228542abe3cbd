"""What the Generate tab does when a control moves: one method an event, each giving what the page shows next."""

from __future__ import annotations

import secrets
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gradio as gr

from .. import write_image
from ..core.errors import InvalidInput
from . import studio_gallery as views
from .studio_code import generation_command, generation_python, picture_name
from .studio_context import Studio, hold_back, skips, speaks
from .studio_generation import MAX_PICTURES, Gallery, Made, Progress, make_pictures
from .studio_models import GENERATOR
from .studio_session import Session
from .studio_worker import newest

NUM_OUTPUTS = 9
KEPT_GALLERIES = 3  # folders of files: the page may still be fetching the previous ones
NUM_SEEDS = 1_000_000  # that are drawn: short enough to read out


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


class GenerateEvents:
    """The tab's event handlers. None of them raises: mistakes become messages, and the page stays as it was."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def make(self, session: Session, model: str, labels: list, count: int, seed, fresh, steps, guidance):
        """Make `count` pictures of each label."""
        wanted = [label for label in (labels or [None]) for _ in range(int(count))]
        yield from self._run(session, model, wanted, seed, fresh, steps, guidance)

    def vary(self, session: Session, count: int, seed, fresh, steps, guidance, event: gr.EventData):
        """Keep the marked units of the chosen picture and make the rest of it anew, `count` times."""
        gallery, keep = session.gallery, tuple(int(unit) for unit in event.keep)
        origin = gallery.shown[session.chosen]
        wanted = [origin.recipe.label] * int(count)
        yield from self._run(session, gallery.source, wanted, seed, fresh, steps, guidance, origin, keep)

    def _run(
        self, session: Session, model: str, labels: list, seed, fresh: bool, steps, guidance,
        origin: Made | None = None, keep: tuple[int, ...] = (),
    ) -> Iterator[list]:  # fmt: skip
        with hold_back():
            if origin is not None and len(keep) == session.gallery.num_units:
                raise InvalidInput("Everything is kept, so there is nothing to redo: click what should change.")
            if len(labels) > MAX_PICTURES:
                raise InvalidInput(f"That would be {len(labels)} pictures; a run makes at most {MAX_PICTURES}.")
            seed = secrets.randbelow(NUM_SEEDS) if fresh else seed
            if seed is None or steps is None or guidance is None:
                raise InvalidInput("Seed, steps and guidance must be numbers.")
            job = session.start("generate")
            yield [views.waiting_grid(len(labels), self.studio.device.num_jobs + 1), gr.skip(), seed, *skips(6)]

            def work(emit) -> Gallery:
                generator = self.studio.catalogue.get(model, GENERATOR)
                with self.studio.device.hold(job):
                    return make_pictures(
                        generator, model, labels, seed, int(steps), float(guidance), job, emit, origin, keep
                    )

            try:
                for news in newest(work):
                    if isinstance(news, Progress):
                        yield [views.progress_grid(news), *skips(NUM_OUTPUTS - 1)]
                    elif news.pictures:
                        session.gallery, session.chosen = news, 0 if origin is None else 1
                        yield self._show(session, stopped=job.is_stopped)
                        return
            finally:
                job.stop()  # also when the page was closed
                session.finish(job)
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
        with hold_back():
            generator = self.studio.catalogue.get(model, GENERATOR)
            choices, before = label_choices(generator), label_choices(self.studio.catalogue.get(last_model, GENERATOR))
            # The same classes, where this model has them.
            names = {name for name, number in before if number in (labels or [])}
            labels = [number for name, number in choices if name in names] or [0]
            steps, guidance = generator.config.num_steps, generator.config.guidance_scale
            return gr.skip(), model, gr.Dropdown(choices, value=labels), steps, guidance, self.studio.title()
        return last_model, *skips(5)

    def stop(self, session: Session) -> None:
        """End this page's run; finished pictures stay."""
        if not session.stop("generate"):
            gr.Info("Nothing is running.", duration=2)


def label_choices(generator) -> list[tuple[str, int]]:
    """(name, class number) of all classes."""
    names = generator.label_names or [f"class {number}" for number in range(generator.config.num_classes)]
    return [(name, number) for number, name in enumerate(names)]


def _text(gallery: Gallery, picture: Made) -> dict[str, str]:
    """Text fields of a PNG: what it is and how to make it again."""
    alone = replace(gallery, pictures=(picture,), origin=None)
    return {
        "model": gallery.model_name, "label": gallery.label(picture), "seed": str(picture.recipe.seed),
        "command": generation_command(alone),
    }  # fmt: skip
