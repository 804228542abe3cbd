"""What the Speech tab does when a control moves: one method an event, each giving what the page shows next."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr

from .. import Tokens
from ..core.errors import InvalidInput, LimitExceeded
from . import studio_speech_actions as actions
from . import studio_speech_code as code
from . import studio_speech_views as views
from .studio_code import safe_stem
from .studio_context import Studio, hold_back, sentence, skips, speaks
from .studio_generate import MAX_PAGE_SEED, NUM_SEEDS
from .studio_models import CODEC, ENHANCER, RECOGNISER, SPEAKER
from .studio_session import Session
from .studio_speech_reader import Clip, read_clip
from .studio_worker import Job, newest

KINDS = {"codec": CODEC, "enhance": ENHANCER, "transcribe": RECOGNISER, "speak": SPEAKER}  # of the sub-tabs' models
CLIP_TASKS = ("codec", "enhance", "transcribe")  # sub-tabs with an input for the clip, which they share
NUM_OUTPUTS = {"codec": 8, "enhance": 9, "transcribe": 8, "speak": 8}  # of a run; see the methods _show_...
NUM_CLIP_OUTPUTS = 2 * len(CLIP_TASKS) + 1
KEPT = 3  # folders of results: the page may still be fetching the previous ones
SAMPLE_NOISE, OWN_NOISE = "pink", "none"  # samples are clean; what people bring is as noisy as it is


class SpeechSession(Session):
    """Private data of one page's Speech tab: its clip, and what each sub-tab shows."""

    def __init__(self, root: Path):
        super().__init__(root, None)
        self.clip: Clip | None = None
        self.sample: int | None = None  # its number, where the clip is one
        self.mixed: actions.Mixed | None = None  # what the Enhance sub-tab shows as its noisy clip
        self.results: dict[str, object] = {}  # by sub-tab
        self.followed: dict[str, Clip | None] = {}  # by sub-tab: the clip when its last run began

    def is_followed(self, task: str) -> bool:
        """Whether a sub-tab has seen this clip: it shows it, works on it, or could not."""
        return self.clip is None or self.followed.get(task) is self.clip

    def __deepcopy__(self, memo) -> SpeechSession:
        return SpeechSession(self._root)

    def close(self) -> None:
        super().close()
        self.clip = self.mixed = None
        self.results = {}


class SpeechEvents:
    """The tab's event handlers. None of them raises: mistakes become messages, and the page stays as it was.

    Gradio calls events after their handlers: no handler may have the name of an endpoint.
    """

    def __init__(self, studio: Studio):
        self.studio = studio

    # The clip, which Codec, Enhance and Transcribe share. Outputs: their three inputs, their three rows of samples, and
    # the kind of noise. An input shows what its user brought; while a sample is the clip, it invites another one.

    def take(self, task: str, name: str | None = None) -> Callable:
        """A new file in the input of a sub-tab, or a recording, called `name`; back to what was there if it cannot be
        read.
        """

        def take(session: SpeechSession, path: str | None):
            if path is None:
                return skips(NUM_CLIP_OUTPUTS)
            with hold_back() as failed:
                return self._accept(session, self._read(session, Path(path), name), None, task)
            before = self._inputs(session) if failed else gr.skip()
            inputs = [before if task == other else gr.skip() for other in CLIP_TASKS]
            return inputs + skips(NUM_CLIP_OUTPUTS - len(inputs))

        return take

    def take_sample(self, session: SpeechSession, event: gr.EventData):
        """The sample that was clicked."""
        return self._take_sample(session, int(event.index))

    def open(self, session: SpeechSession):
        """The tab is opened: the first sample, where there is one and nothing else yet."""
        if session.clip is not None or not self.studio.clips:
            return skips(NUM_CLIP_OUTPUTS)
        return self._take_sample(session, 0)

    def _take_sample(self, session: SpeechSession, index: int) -> list:
        with hold_back():
            return self._accept(session, self._read(session, self.studio.clips[index]), index)
        return skips(NUM_CLIP_OUTPUTS)

    @staticmethod
    def _read(session: SpeechSession, path: Path, name: str | None = None) -> Clip:
        """Decode a file; a newer one that came meanwhile counts instead."""
        job, folder = session.start("clip"), session.new_folder("clip", KEPT)
        try:
            clip = read_clip(path, folder, name)
            job.check()
        except BaseException:
            shutil.rmtree(folder)  # else a few bad files would take the places of the good one
            raise
        finally:
            session.finish(job)
        return clip

    def use(self, task: str) -> Callable:
        """The result of a sub-tab becomes the clip."""

        @speaks(NUM_CLIP_OUTPUTS)
        def use(session: SpeechSession):
            result = session.results.get(task)
            if result is None:
                raise InvalidInput("There is no result yet.")
            clip = actions.clip_of(result.after, _file_name(result), session.new_folder("clip", KEPT))
            gr.Info("It is the clip of Codec, Enhance and Transcribe now.", duration=4)
            return self._accept(session, clip, None)

        return use

    def _accept(self, session: SpeechSession, clip: Clip, sample: int | None, task: str | None = None) -> list:
        """A clip that could be read; `task` is the sub-tab whose input shows it already."""
        session.clip, session.sample = clip, sample
        shown, strip = self._inputs(session), views.clip_strip(self.studio.clips, sample)
        noise = OWN_NOISE if sample is None else SAMPLE_NOISE
        return [gr.skip() if task == other else shown for other in CLIP_TASKS] + [strip] * len(CLIP_TASKS) + [noise]

    @staticmethod
    def _inputs(session: SpeechSession) -> str | None:
        """What the inputs show."""
        return None if session.clip is None or session.sample is not None else str(session.clip.path)

    # Codec.

    def run_codec(self, session: SpeechSession, model: str):
        """The clip, through the codec."""

        def work(codec, job: Job, emit) -> actions.Coded:
            return actions.code_clip(codec, model, clip, job, emit)

        clip = session.clip
        yield from self._run(session, "codec", model, work, self._show_coded, needs_clip=True)

    def follow_codec(self, session: SpeechSession, model: str):
        """The clip may have changed elsewhere: encode it unless the page shows that already."""
        if session.is_followed("codec"):
            yield skips(NUM_OUTPUTS["codec"])
        else:
            yield from self.run_codec(session, model)

    def open_tokens(self, session: SpeechSession, path: str):
        """Decode a .mtok file with the codec that it names; the first output is that codec."""
        with hold_back():
            tokens = Tokens.load(path)
            source = self.studio.catalogue.source_of(tokens.tokenizer, CODEC)

            def work(codec, job: Job, emit) -> actions.Coded:
                return actions.decode_tokens(codec, source, tokens, Path(path).name, job, emit)

            for shown in self._run(session, "codec", source, work, self._show_coded):
                yield [source, *shown]
            return
        yield skips(NUM_OUTPUTS["codec"] + 1)

    def _show_coded(self, session: SpeechSession, coded: actions.Coded) -> list:
        folder, stem = session.new_folder("codec", KEPT - 1), safe_stem(coded.name)
        after, mtok = folder / _file_name(coded), folder / f"{stem}.mtok"
        coded.after.save(after)
        coded.tokens.save(mtok)
        before = None
        if coded.before is not None:
            before = folder / f"{stem}-before.wav"
            coded.before.save(before)
        ids = coded.tokens.ids[0, : coded.num_frames]
        view = views.pair_view(
            coded.before, coded.after, {"before": before, "after": after}, ids=ids,
            hint="A .mtok file does not hold the original sound.",
        )  # fmt: skip
        files = [_download(after), _download(mtok)]
        return [
            views.idle(), views.codec_numbers(coded), view, *files, code.codec_python(coded),
            code.codec_command(coded), self.studio.title(),
        ]  # fmt: skip

    # Enhance.

    @speaks(4)
    def mix(self, session: SpeechSession, noise: str, snr: float):
        """The clip with noise, before anything is enhanced: numbers, players, and the noisy file."""
        if session.clip is None:
            return skips(4)
        if session.mixed is not None and session.mixed.key == (session.clip, noise, snr):
            return skips(4)
        session.stop("enhance")
        session.results.pop("enhance", None)
        no_file = gr.DownloadButton(value=None, interactive=False)
        try:
            mixed = session.mixed = actions.mix(session.clip, noise, snr)
        except LimitExceeded as error:  # said in place: the clip may be right for the other sub-tabs
            session.mixed = None
            view = views.pair_view(None, None, hint=sentence(error))
            return [views.no_numbers(views.ENHANCE_NUMBERS), view, no_file, no_file]
        folder = session.new_folder("noisy", KEPT - 1)
        view = views.pair_view(
            mixed.noisy, None, {"before": self._save_noisy(mixed, folder), "after": None}, hint="Press Enhance."
        )
        noisy = gr.DownloadButton(value=view["files"]["before"]["path"], interactive=True)
        return [views.enhance_numbers(mixed), view, noisy, no_file]

    def run_enhance(self, session: SpeechSession, model, noise, snr, seed, fresh, greedy, temperature):
        """The noisy clip, made clean."""
        with hold_back():
            seed = fresh_seed() if fresh and not greedy else checked_seed(seed)
            temperature = checked_temperature(temperature)

            def work(enhancer, job: Job, emit) -> actions.Enhanced:
                mixed = actions.mix(clip, noise, snr)
                return actions.enhance_clip(enhancer, model, mixed, seed, bool(greedy), temperature, job, emit)

            clip = session.clip
            if clip is not None:
                actions.check_enhancable(clip)
            yield from self._run(session, "enhance", model, work, self._show_enhanced, needs_clip=True, first={7: seed})
            return
        yield skips(NUM_OUTPUTS["enhance"])

    def _show_enhanced(self, session: SpeechSession, enhanced: actions.Enhanced) -> list:
        session.mixed = enhanced.mixed
        folder = session.new_folder("enhance", KEPT - 1)
        noisy, after = self._save_noisy(enhanced.mixed, folder), folder / _file_name(enhanced)
        enhanced.after.save(after)
        view = views.pair_view(enhanced.mixed.noisy, enhanced.after, {"before": noisy, "after": after})
        numbers = views.enhance_numbers(enhanced.mixed, enhanced, measuring=actions.has_dnsmos(enhanced))
        return [
            views.idle(), numbers, view, _download(noisy), _download(after), code.enhance_python(enhanced),
            code.enhance_command(enhanced), gr.skip(), self.studio.title(),
        ]  # fmt: skip

    @speaks(1)
    def measure(self, session: SpeechSession):
        """After a new result: its DNSMOS, which gives way to a newer result."""
        enhanced = session.results.get("enhance")
        if enhanced is None or enhanced.dnsmos is not None or not actions.has_dnsmos(enhanced):
            return gr.skip()
        job, measured = session.start("enhance", "dnsmos"), enhanced
        with hold_back(), self.studio.device.hold(job):
            measured = actions.with_dnsmos(enhanced, job)
        session.finish(job)
        if session.results.get("enhance") is not enhanced or session.is_replaced("enhance", job):
            return gr.skip()
        session.results["enhance"] = measured
        return views.enhance_numbers(measured.mixed, measured)

    @staticmethod
    def _save_noisy(mixed: actions.Mixed, folder: Path) -> Path:
        path = folder / f"{safe_stem(mixed.clip.name)}-noisy.wav"
        mixed.noisy.save(path)
        return path

    # Transcribe.

    def run_transcribe(self, session: SpeechSession, model: str, hotwords: str | None):
        """What is said in the clip."""
        with hold_back():
            words = actions.checked_hotwords(hotwords)

            def work(recogniser, job: Job, emit) -> actions.Transcribed:
                return actions.transcribe_clip(recogniser, model, clip, words, job, emit)

            clip = session.clip
            yield from self._run(session, "transcribe", model, work, self._show_transcribed, needs_clip=True)
            return
        yield skips(NUM_OUTPUTS["transcribe"])

    def follow_transcript(self, session: SpeechSession, model: str, hotwords: str | None):
        """The clip may have changed elsewhere: transcribe it unless the page shows that already."""
        if session.is_followed("transcribe"):
            yield skips(NUM_OUTPUTS["transcribe"])
        else:
            yield from self.run_transcribe(session, model, hotwords)

    def _show_transcribed(self, session: SpeechSession, heard: actions.Transcribed) -> list:
        folder, stem = session.new_folder("transcribe", KEPT - 1), safe_stem(heard.clip.name)
        files = [folder / f"{stem}{suffix}" for suffix in (".srt", ".json")]
        for file in files:
            heard.transcript.save(file)
        view = views.transcript_view(heard.transcript, heard.clip.path)
        return [
            views.idle(), views.transcribe_numbers(heard), view, *map(_download, files),
            code.transcribe_python(heard), code.transcribe_command(heard), self.studio.title(),
        ]  # fmt: skip

    @speaks(1)
    def adapt_hotwords(self, model: str):
        """Hotwords can be given to models that listen for them only."""
        recogniser = self.studio.catalogue.get(model, RECOGNISER)
        takes = actions.takes_hotwords(recogniser)
        value = {} if takes else {"value": ""}
        return gr.Textbox(interactive=takes, info=hotword_help(recogniser.name, takes), **value)

    # Speak.

    def run_speak(self, session: SpeechSession, model: str, text: str, seed, fresh):
        """A text becomes sound."""
        with hold_back():
            seed = fresh_seed() if fresh else checked_seed(seed)
            text = actions.checked_text(text)

            def work(speaker, job: Job, emit) -> actions.Spoken:
                return actions.speak_text(speaker, model, text, seed, job, emit)

            yield from self._run(session, "speak", model, work, self._show_spoken, first={6: seed})
            return
        yield skips(NUM_OUTPUTS["speak"])

    def _show_spoken(self, session: SpeechSession, spoken: actions.Spoken) -> list:
        path = session.new_folder("speak", KEPT - 1) / _file_name(spoken)
        spoken.after.save(path)
        view = views.single_view(spoken.after, path, "Spoken", "")
        return [
            views.idle(), views.speak_numbers(spoken), view, _download(path), code.speak_python(spoken),
            code.speak_command(spoken), gr.skip(), self.studio.title(),
        ]  # fmt: skip

    # All of them.

    def _run(
        self, session: SpeechSession, task: str, source: str, work: Callable, show: Callable, *,
        needs_clip: bool = False, first: dict[int, object] | None = None,
    ) -> Iterator[list]:  # fmt: skip
        """Run `work(model, job, emit)` on the device and yield the outputs: the line of progress, then `show`'s.

        first: outputs by number that are known at the start.
        """
        count, job = NUM_OUTPUTS[task], None
        with hold_back():
            if needs_clip and session.clip is None:
                raise InvalidInput(views.no_clip(bool(self.studio.clips)))
            session.followed[task] = session.clip
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
                    if isinstance(news, actions.Progress):
                        yield [views.progress(news), *skips(count - 1)]
                    else:
                        job.check()
                        session.results[task] = news
                        yield show(session, news)
                        return
            finally:
                job.stop()  # also when the page was closed
                session.finish(job)
        if job is None or session.is_replaced(task, job):
            yield skips(count)
        else:
            yield [views.idle(), *skips(count - 1)]

    def stop(self, task: str) -> Callable:
        """End a sub-tab's work; what is on screen stays."""

        def stop(session: SpeechSession) -> None:
            if not session.stop(task):
                gr.Info("Nothing is running.", duration=2)

        return stop

    def refresh(self, *chosen: str | None) -> list:
        """Models may have come or gone: for each sub-tab its notice, its controls and its list of models."""
        return self.studio.model_updates(KINDS.values(), chosen)


def hotword_help(name: str, takes: bool) -> str:
    """The line below the hotwords."""
    if takes:
        return "Names and terms to expect, separated by commas; press Enter."
    return f"{name} takes none."


def fresh_seed() -> int:
    """A seed that is short enough to read out."""
    return secrets.randbelow(NUM_SEEDS)


def checked_seed(seed) -> int:
    """A typed seed."""
    is_whole = isinstance(seed, int) or (isinstance(seed, float) and seed.is_integer())
    if not is_whole or isinstance(seed, bool) or not 0 <= seed <= MAX_PAGE_SEED:
        raise InvalidInput(f"Seed must be a whole number from 0 to {MAX_PAGE_SEED:,}.")
    return int(seed)


def checked_temperature(value) -> float:
    """A typed temperature."""
    low, high = actions.TEMPERATURES
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInput(f"Temperature must be a number from {low:g} to {high:g}.")
    return float(value)


def _file_name(result) -> str:
    """File name of a result's sound; the shown code writes the same."""
    if isinstance(result, actions.Spoken):
        return f"spoken-{result.seed}.wav"
    if isinstance(result, actions.Enhanced):
        return f"{safe_stem(result.mixed.clip.name)}-enhanced.wav"
    return f"{safe_stem(result.name)}-decoded.wav"


def _download(path: Path) -> gr.DownloadButton:
    return gr.DownloadButton(value=str(path), interactive=True)
