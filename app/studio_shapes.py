"""What the 3D tab does when a control moves: one method an event, each giving what the page shows next."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr

from .. import Tokens
from ..core.errors import InvalidInput
from ..core.meshes import write_mesh
from . import studio_shapes_actions as actions
from . import studio_shapes_code as code
from . import studio_shapes_views as views
from .studio_code import safe_stem
from .studio_context import Studio, hold_back, skips, speaks
from .studio_models import SHAPE_GENERATOR, SHAPE_TOKENIZER
from .studio_session import Session
from .studio_shapes_reader import MeshFile, read_mesh_file
from .studio_speech import checked_seed, fresh_seed
from .studio_worker import Job, newest

KINDS = {"codec": SHAPE_TOKENIZER, "generate": SHAPE_GENERATOR}  # of the sub-tabs' models
NUM_OUTPUTS = {"codec": 10, "generate": 10}  # of a run; see the methods _show_...
NUM_TAKEN = 2  # outputs of a new mesh: the input, and the row of samples
SUFFIXES = (".glb", ".stl", ".mtok")  # of what can be downloaded
KEPT = 3  # folders of results: the page may still be fetching the previous ones
KEPT_PREVIEWS = 16


class ShapeSession(Session):
    """Private data of one page's 3D tab: what it works on, its tokens, and what each sub-tab shows."""

    def __init__(self, root: Path):
        super().__init__(root, None)
        self.subject: MeshFile | actions.TokensFile | None = None
        self.sample: int | None = None  # its number, where the subject is one
        self.codes: tuple[tuple, Tokens] | None = None  # of (subject, source of the tokenizer): its tokens
        self.results: dict[str, object] = {}  # by sub-tab
        self.made_view: Path | None = None  # the GLB file that the generator's sub-tab shows
        self.followed: object = None  # the subject when the last run of the codec began

    def __deepcopy__(self, memo) -> ShapeSession:
        return ShapeSession(self._root)

    def close(self) -> None:
        super().close()
        self.subject = self.codes = self.followed = None
        self.results = {}


class ShapeEvents:
    """The tab's event handlers. None of them raises: mistakes become messages, and the page stays as it was.

    Gradio calls events after their handlers: no handler may have the name of an endpoint.
    """

    def __init__(self, studio: Studio):
        self.studio = studio

    # The mesh. Outputs: the input and the row of samples. The input shows what its user brought; while a sample is the
    # subject, it invites another mesh.

    def take(self, session: ShapeSession, path: str | None):
        """A new file in the input; back to what was there if it cannot be read."""
        if path is None:
            return skips(NUM_TAKEN)
        with hold_back() as failed:
            self._accept(session, self._read(session, Path(path)), None)
            return [gr.skip(), self._strip(session)]
        return [gr.File(value=None) if failed else gr.skip(), gr.skip()]

    def take_sample(self, session: ShapeSession, event: gr.EventData):
        """The sample that was clicked."""
        return self._take_sample(session, int(event.index))

    def open(self, session: ShapeSession):
        """The tab is opened: the first sample, where there is one and nothing else yet."""
        if session.subject is not None or not self.studio.shapes or not self.studio.first_source(SHAPE_TOKENIZER):
            return skips(NUM_TAKEN)
        return self._take_sample(session, 0)

    @speaks(NUM_TAKEN)
    def use(self, session: ShapeSession):
        """The shape that was made becomes the one to encode."""
        made = session.results.get("generate")
        if made is None or not len(made.mesh.faces):
            raise InvalidInput("There is no shape yet.")
        path = session.new_folder("use", KEPT) / f"{code.made_stem(made)}.glb"
        write_mesh(made.mesh, path)
        self._accept(session, self._read(session, path, is_ours=True), None)
        gr.Info("It is the shape of Codec now.", duration=4)
        return [gr.File(value=None), self._strip(session)]

    def _take_sample(self, session: ShapeSession, index: int) -> list:
        with hold_back():
            self._accept(session, self._read(session, self.studio.shapes[index], is_ours=True), index)
            return [gr.File(value=None), self._strip(session)]
        return skips(NUM_TAKEN)

    @staticmethod
    def _read(session: ShapeSession, path: Path, is_ours: bool = False) -> MeshFile:
        """Read a file; a newer one that came meanwhile counts instead."""
        job, folder = session.start("mesh"), session.new_folder("mesh", KEPT)
        try:
            mesh = read_mesh_file(path, folder, is_ours=is_ours)
            job.check()
        except BaseException:
            shutil.rmtree(folder)  # else a few bad files would take the places of the good one
            raise
        finally:
            session.finish(job)
        return mesh

    @staticmethod
    def _accept(session: ShapeSession, subject, sample: int | None) -> None:
        session.subject, session.sample = subject, sample

    def _strip(self, session: ShapeSession) -> str:
        return views.clip_strip(self.studio.shapes, session.sample)

    # Codec.

    def run_codec(self, session: ShapeSession, model: str, resolution: int):
        """The shape through the tokenizer, with all scales."""
        yield from self._code(session, model, None, resolution)

    def show_scales(self, session: ShapeSession, model: str, num_scales: int, resolution: int):
        """The first scales of the same tokens, or another resolution."""
        if session.subject is None:
            yield skips(NUM_OUTPUTS["codec"])
        else:
            yield from self._code(session, model, num_scales, resolution)

    def follow_codec(self, session: ShapeSession, model: str, resolution: int):
        """The shape may have changed elsewhere: encode it unless the page shows that already."""
        if session.subject is None or session.followed is session.subject:
            yield skips(NUM_OUTPUTS["codec"])
        else:
            yield from self.run_codec(session, model, resolution)

    def open_tokens(self, session: ShapeSession, path: str, resolution: int):
        """Decode a .mtok file with the tokenizer that it names; the first outputs are that, and those of `take`."""
        with hold_back():
            subject = actions.tokens_file(Tokens.load(path), Path(path).name)
            source = self.studio.catalogue.source_of(subject.tokens.tokenizer, SHAPE_TOKENIZER)
            self._accept(session, subject, None)
            first = [source, gr.File(value=None), self._strip(session)]
            for shown in self._code(session, source, None, resolution):
                yield [*first, *shown]
                first = skips(len(first))
            return
        yield skips(NUM_OUTPUTS["codec"] + 1 + NUM_TAKEN)

    def _code(self, session: ShapeSession, model: str, num_scales: int | None, resolution: int) -> Iterator[list]:
        subject = session.subject

        def work(tokenizer, job: Job, emit) -> actions.Coded:
            key, codes = session.codes or (None, None)
            codes = codes if key == (subject, model) else None
            coded = actions.code_shape(tokenizer, model, subject, num_scales, resolution, job, emit, codes)
            session.codes = (subject, model), coded.codes
            return coded

        def show(coded: actions.Coded) -> list:
            return self._show_coded(session, coded, is_new=num_scales is None)

        with hold_back():
            if subject is None:
                raise InvalidInput(views.no_shape(bool(self.studio.shapes)))
            session.followed = subject
            yield from self._run(session, "codec", model, work, show)
            return
        yield skips(NUM_OUTPUTS["codec"])

    def _show_coded(self, session: ShapeSession, coded: actions.Coded, is_new: bool) -> list:
        stem = safe_stem(coded.subject.name)
        files = self._save(session, "codec", coded.mesh, coded.tokens, f"{stem}-decoded", stem)
        value = {"value": coded.num_scales} if is_new else {}  # else the user may be moving the slider right now
        slider = gr.Slider(maximum=coded.max_scales, **value)
        return [
            views.idle(), views.coded_numbers(coded), views.coded_viewers(coded, files[0]), *map(_download, files),
            code.coded_python(coded), code.coded_command(coded), slider, self.studio.title(),
        ]  # fmt: skip

    # Generate.

    def run_generate(self, session: ShapeSession, model: str, label, seed, fresh, guidance, resolution: int):
        """Make a shape; every scale shows what there is so far."""
        with hold_back():
            seed = fresh_seed() if fresh else checked_seed(seed)
            guidance = actions.checked_guidance(guidance)

            def work(generator, job: Job, emit) -> actions.Made:
                number = actions.checked_label(generator, label)
                return actions.make_shape(generator, model, number, seed, guidance, resolution, job, emit)

            def show(made: actions.Made) -> list:
                return self._show_made(session, made)

            yield from self._run(session, "generate", model, work, show, first={8: seed})
            return
        yield skips(NUM_OUTPUTS["generate"])

    def _show_made(self, session: ShapeSession, made: actions.Made) -> list:
        stem = code.made_stem(made)
        files = self._save(session, "generate", made.mesh, made.tokens, stem, stem)
        session.made_view = files[0]
        return [
            views.idle(), views.made_numbers(made), views.made_viewer(files[0], is_empty=not files[0]),
            *map(_download, files), code.made_python(made), code.made_command(made), gr.skip(), self.studio.title(),
        ]  # fmt: skip

    @staticmethod
    def _show_preview(session: ShapeSession, preview: actions.Preview) -> list:
        path = None
        if len(preview.mesh.faces):
            path = session.new_folder("preview", KEPT_PREVIEWS) / f"scale-{preview.num_scales}.glb"
            write_mesh(preview.mesh, path)
        return [views.making(preview), gr.skip(), views.made_viewer(path, is_empty=path is None)]

    @speaks(4)
    def adapt(self, model: str | None, label, last_model: str | None):
        """The classes and the guidance of another generator; the class of the same name, where it has one."""
        if model is None or model == last_model:
            return skips(4)
        get = self.studio.catalogue.get
        choices = actions.class_choices(generator := get(model, SHAPE_GENERATOR))
        before = (
            {}
            if last_model is None
            else {n: name for name, n in actions.class_choices(get(last_model, SHAPE_GENERATOR))}
        )
        value = dict(choices).get(before.get(label), -1)
        return model, gr.Dropdown(choices=choices, value=value), generator.config.guidance_scale, self.studio.title()

    # Both.

    def _run(
        self, session: ShapeSession, task: str, source: str, work: Callable, show: Callable,
        first: dict[int, object] | None = None,
    ) -> Iterator[list]:  # fmt: skip
        """Run `work(model, job, emit)` on the device and yield the outputs: progress and previews, then `show`'s.

        first: outputs by number that are known at the start.
        """
        count, job = NUM_OUTPUTS[task], None
        with hold_back():
            model = self.studio.catalogue.get(source, KINDS[task])
            job = session.start(task)
            line = views.waiting(self.studio.device.num_jobs + 1)
            yield [line, *((first or {}).get(number, gr.skip()) for number in range(1, count))]

            def held(emit):
                with self.studio.device.hold(job):
                    return work(model, job, emit)

            try:
                for news in newest(held):
                    if session.is_replaced(task, job):
                        continue
                    if isinstance(news, actions.Preview):
                        shown = self._show_preview(session, news)
                        yield [*shown, *skips(count - len(shown))]
                    elif isinstance(news, actions.Progress):
                        yield [views.progress(news), *skips(count - 1)]
                    else:
                        job.check()
                        session.results[task] = news
                        yield show(news)
                        return
            finally:
                job.stop()  # also when the page was closed
                session.finish(job)
        if job is None or session.is_replaced(task, job):
            yield skips(count)
        else:
            # In place of the previews, what was there before.
            back = [gr.skip(), views.made_viewer(session.made_view)] if task == "generate" else []
            yield [views.idle(), *back, *skips(count - 1 - len(back))]

    def stop(self, task: str) -> Callable:
        """End a sub-tab's work; what is on screen stays."""

        def stop(session: ShapeSession) -> None:
            if not session.stop(task):
                gr.Info("Nothing is running.", duration=2)

        return stop

    @staticmethod
    def _save(session: ShapeSession, task: str, mesh, tokens: Tokens, stem: str, tokens_stem: str) -> list[Path | None]:
        """The files to download; None for those of a mesh that is empty."""
        folder = session.new_folder(task, KEPT - 1)
        glb, stl, mtok = (folder / f"{stem}.glb", folder / f"{stem}.stl", folder / f"{tokens_stem}.mtok")
        tokens.save(mtok)
        if not len(mesh.faces):
            return [None, None, mtok]
        for path in (glb, stl):
            write_mesh(mesh, path)
        return [glb, stl, mtok]

    def refresh(self, *chosen: str | None) -> list:
        """Models may have come or gone: for each sub-tab its notice, its controls and its list of models."""
        return self.studio.model_updates(KINDS.values(), chosen)


def _download(path: Path | None) -> gr.DownloadButton:
    return gr.DownloadButton(value=None if path is None else str(path), interactive=path is not None)
