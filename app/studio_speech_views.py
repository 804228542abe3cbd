"""The Speech tab's pieces of HTML: samples, numbers, players over a picture of the sound, a transcript with times.

A player's value is a dictionary: its HTML, and the files of its audio elements, which Gradio serves from its folder.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..core.transcript import Transcript, Word, is_spaced
from .studio_models import CODEC, ENHANCER, RECOGNISER, SPEAKER
from .studio_speech_actions import DNSMOS_SECONDS, Coded, Enhanced, Mixed, Progress, Spoken, Transcribed, has_dnsmos
from .studio_speech_plots import sound_figure
from .studio_views import file_size, number_strip, seconds

PLAYER_TEMPLATE = "${value.html}"
PLAYER_SCRIPT = (Path(__file__).parent / "studio_speech.js").read_text()
ABILITIES = {
    CODEC: "turns speech into tokens and back",
    ENHANCER: "makes noisy speech clean",
    RECOGNISER: "writes down what is said",
    SPEAKER: "speaks a text",
}
CODEC_NUMBERS = ("Tokens", "Bytes", "Bit rate", "STOI", "Time", "Device")
ENHANCE_NUMBERS = ("Noise", "DNSMOS", "STOI", "Seed", "Time", "Device")
TRANSCRIBE_NUMBERS = ("Words", "Captions", "Audio", "Speed", "Time", "Device")
SPEAK_NUMBERS = ("Text", "Audio", "Seed", "Speed", "Time", "Device")


def clip_strip(samples: list[Path], chosen: int | None = None) -> str:
    """The sample clips as buttons; `data-i` is the sample's number. Empty where there are none."""
    buttons = []
    for index, path in enumerate(samples):
        name = escape(path.stem.replace("-", " ").replace("_", " "))
        pressed = str(index == chosen).lower()
        buttons.append(
            f'<button type="button" data-i="{index}" aria-pressed="{pressed}" title="{name}" '
            f'aria-label="Sample {name}">{name}</button>'
        )
    if not buttons:
        return ""
    return f'<div class="mt-clips" role="group" aria-label="Samples">{"".join(buttons)}</div>'


def no_clip(has_samples: bool) -> str:
    """What to do where there is no clip yet."""
    return "Record a clip, drop one, or choose a sample." if has_samples else "Record a clip or drop one."


def missing(kind: str, public: bool) -> str:
    """What a sub-tab says when no model does its work."""
    way_out = (
        "Whoever runs this studio can offer one with <code>--models</code> and a folder of models."
        if public
        else "Load one in the Models tab, by its name or folder, or start the studio with <code>--models</code> and a "
        'folder of models.</p><p><button type="button" data-tab="Models">Open the Models tab</button>'
    )
    return f'<div class="mt-missing"><p>No model that {ABILITIES[kind]} is here.</p><p>{way_out}</p></div>'


# A button that opens another tab.
TAB_SCRIPT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-tab]');
  if (!button) return;
  for (const tab of document.querySelectorAll('#tabs [role=tab]'))
    if (tab.textContent.trim() === button.dataset.tab) tab.click();
});
"""


# Progress.


def idle() -> str:
    """The line of progress when nothing runs: as high as it always is."""
    return '<div class="mt-progress"></div>'


def waiting(num_jobs: int) -> str:
    """How many jobs of others come first."""
    before = max(num_jobs - 1, 0)
    return _line(f"waiting for {before} other job{'s' if before > 1 else ''}" if before else "starting", 0.0)


def progress(news: Progress) -> str:
    """How far the work is, in seconds of sound where these are known."""
    if news.seconds is None:
        return _line(f"{news.what}, {100 * news.share:.0f} %", news.share)
    return _line(f"{news.what}, {news.share * news.seconds:.1f} of {news.seconds:.1f} s", news.share)


def _line(text: str, share: float) -> str:
    return (
        f'<div class="mt-progress" role="progressbar" aria-label="{escape(text)}">'
        f'<span style="width:{100 * share:.0f}%"></span><em>{escape(text)}</em></div>'
    )


# Numbers: the same words and units as in the other tabs.


def no_numbers(names: tuple[str, ...]) -> str:
    """The strip before there is anything to measure."""
    return number_strip([(name, "–", "") for name in names])


def codec_numbers(coded: Coded) -> str:
    """The strip of an encoded clip."""
    books, audio = coded.num_codebooks, f"{coded.after.seconds:.1f} s"
    return number_strip([
        ("Tokens", f"{coded.num_frames * books:,}", f"{audio}, {coded.frame_rate * books:g} a second"),
        ("Bytes", file_size(coded.tokens.num_bytes), f"{coded.tokens.bits_per_token} bits each"),
        ("Bit rate", f"{coded.file_bit_rate:,.0f} bit/s", f"{coded.bit_rate:,.0f} without header"),
        ("STOI", ratio(coded.stoi), "no original" if coded.before is None else "1 is best"),
        ("Time", seconds(coded.seconds), "encode + decode"),
        ("Device", coded.device, ""),
    ])  # fmt: skip


def enhance_numbers(mixed: Mixed, enhanced: Enhanced | None = None, *, measuring: bool = False) -> str:
    """The strip of an enhanced clip; of a noisy one without it. measuring: its DNSMOS is still to come."""
    noise = ("Noise", "none", "added") if mixed.noise == "none" else ("Noise", f"{mixed.snr:g} dB", mixed.noise)
    if enhanced is None:
        return number_strip([noise, *((name, "–", "") for name in ENHANCE_NUMBERS[1:])])
    mos = "of 5, first 10 s" if enhanced.after.seconds > DNSMOS_SECONDS else "of 5"
    if enhanced.dnsmos is None:
        mos = "measuring …" if measuring else "not measured" if has_dnsmos(enhanced) else "not installed"
    return number_strip([
        noise,
        ("DNSMOS", _pair(enhanced.dnsmos), mos),
        ("STOI", _pair(enhanced.stoi), "before → after" if enhanced.stoi else "needs a clean original"),
        ("Seed", str(enhanced.seed), "not used" if enhanced.greedy else ""),
        ("Time", seconds(enhanced.seconds), f"for {enhanced.after.seconds:.1f} s"),
        ("Device", enhanced.device, ""),
    ])  # fmt: skip


def transcribe_numbers(heard: Transcribed) -> str:
    """The strip of a transcript."""
    words, text = heard.transcript.words, heard.transcript.text
    return number_strip([
        ("Words", str(len(words)), f"{len(text)} characters"),
        ("Captions", str(len(heard.transcript.captions())), "in the .srt"),
        ("Audio", f"{heard.clip.seconds:.1f} s", heard.clip.name),
        _speed(heard.clip.seconds, heard.seconds),
        ("Time", seconds(heard.seconds), ""),
        ("Device", heard.device, ""),
    ])  # fmt: skip


def speak_numbers(spoken: Spoken) -> str:
    """The strip of a spoken text."""
    return number_strip([
        ("Text", str(len(spoken.text)), "characters"),
        ("Audio", f"{spoken.after.seconds:.1f} s", f"{spoken.after.sample_rate / 1000:g} kHz"),
        ("Seed", str(spoken.seed), ""),
        _speed(spoken.after.seconds, spoken.seconds),
        ("Time", seconds(spoken.seconds), ""),
        ("Device", spoken.device, ""),
    ])  # fmt: skip


def ratio(value: float | None) -> str:
    """A number near 1, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def _pair(values: tuple[float, float] | None) -> str:
    return "–" if values is None else f"{values[0]:.2f} → {values[1]:.2f}"


def _speed(audio: float, work: float) -> tuple[str, str, str]:
    return "Speed", f"{audio / max(work, 1e-6):.1f} ×", "real time"


# Players.


def pair_view(before, after, files: dict[str, Path | None] | None = None, ids=None, hint: str = "") -> dict:
    """Two players over a picture of both sounds.

    before, after: Waveforms, or None. files: of "before" and "after". hint: in place of the first sound that is not
    there.
    """
    files = files or {"before": None, "after": None}
    figure = sound_figure([("Before", before), ("After", after)], ids, hint)
    players = _player("before", "Before", files["before"]) + _player("after", "After", files["after"])
    return {"html": f'<div class="mt-players">{players}</div>{figure}', "files": _served(files)}


def single_view(sound, file: Path | None, name: str, hint: str) -> dict:
    """One player over a picture of its sound."""
    html = f'<div class="mt-players">{_player("after", name, file)}</div>{sound_figure([(name, sound)], hint=hint)}'
    return {"html": html, "files": _served({"after": file})}


def transcript_view(transcript: Transcript | None, file: Path | None, hint: str = "") -> dict:
    """A player, and below it what is said, caption by caption; the word of the moment is marked while it plays.

    hint: in place of a transcript that is not there.
    """
    if transcript is None:
        body = f'<p class="mt-hint">{escape(hint)}</p>'
    elif not transcript.words:
        body = '<p class="mt-hint">Nothing was heard in this clip.</p>'
    else:
        body = "".join(_caption(words) for words in transcript.captions())
    html = (
        f'<div class="mt-players">{_player("before", "Clip", file)}</div>'
        f'<div class="mt-transcript" tabindex="0" aria-label="Transcript">{body}</div>'
    )
    return {"html": html, "files": _served({"before": file})}


def _caption(words: list[Word]) -> str:
    text, previous = "", None
    for word in words:
        gap = previous is not None and is_spaced(previous.text[-1:] or " ") and is_spaced(word.text[:1] or " ")
        text += (" " if gap else "") + (
            f'<span class="mt-word" data-start="{word.start:.3f}" data-end="{word.end:.3f}" '
            f'title="{word.start:.2f} to {word.end:.2f} s">{escape(word.text)}</span>'
        )
        previous = word
    start = words[0].start
    return (
        f'<p class="mt-caption"><button type="button" class="mt-time" data-start="{start:.3f}" '
        f'aria-label="Play from {clock(start)}">{clock(start)}</button><span>{text}</span></p>'
    )


def clock(value: float) -> str:
    """Minutes, seconds and tenths."""
    tenths = round(value * 10)
    return f"{tenths // 600}:{tenths % 600 // 10:02d}.{tenths % 10}"


def _player(key: str, name: str, file: Path | None) -> str:
    disabled = "" if file is not None else ' class="none"'
    return (
        f"<figure{disabled}><figcaption>{escape(name)}</figcaption>"
        f'<audio controls preload="metadata" data-file="{key}" aria-label="{escape(name)}"></audio></figure>'
    )


def _served(files: dict[str, Path | None]) -> dict:
    """Files in the form that Gradio copies to its own folder and gives an address."""
    return {
        key: None if path is None else {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}
        for key, path in files.items()
    }
