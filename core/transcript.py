"""What was said and when: the result of a recogniser, as text, subtitles or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import atomic_write

# A caption ends at a pause, at the end of a sentence, or when it would be too long to read.
CAPTION_PAUSE = 0.8  # seconds
CAPTION_SECONDS = 6.0
CAPTION_WIDTH = 42  # columns; an ideograph takes two
SENTENCE_ENDS = ("。", "！", "？", ".", "!", "?")


@dataclass(frozen=True)
class Word:
    """A word, or one character of a script without spaces, and its time in seconds from the start of the clip."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """The words of one clip, in order. seconds: length of the clip. An empty one means that nothing was heard."""

    words: tuple[Word, ...]
    seconds: float

    @property
    def text(self) -> str:
        """The words, with spaces between those that are written with spaces."""
        return join_words(word.text for word in self.words)

    def __str__(self) -> str:
        return self.text

    def json(self) -> str:
        """{"text", "seconds", "words": [{"text", "start", "end"}]} on one line."""
        words = [{"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in self.words]
        return json.dumps({"text": self.text, "seconds": round(self.seconds, 3), "words": words}, ensure_ascii=False)

    def srt(self) -> str:
        """SubRip subtitles; an empty text when nothing was heard."""
        blocks = []
        for number, caption in enumerate(self.captions(), start=1):
            text = join_words(word.text for word in caption)
            blocks.append(f"{number}\n{_clock(caption[0].start)} --> {_clock(caption[-1].end)}\n{text}\n")
        return "\n".join(blocks)

    def captions(self) -> list[list[Word]]:
        """The words in groups to be shown together."""
        captions: list[list[Word]] = []
        for word in self.words:
            last = captions[-1] if captions else None
            if last is None or _ends_before(last, word):
                captions.append([word])
            else:
                last.append(word)
        return captions

    def save(self, path: str | Path) -> None:
        """Write `.srt`, `.json`, or plain text under any other suffix."""
        suffix = Path(path).suffix.lower()
        content = self.srt() if suffix == ".srt" else self.json() if suffix == ".json" else self.text
        with atomic_write(path) as temporary:
            temporary.write_text(content if content.endswith("\n") else content + "\n", encoding="utf-8")


def _ends_before(caption: Sequence[Word], word: Word) -> bool:
    width = _columns(join_words([*(shown.text for shown in caption), word.text]))
    return (
        word.start - caption[-1].end > CAPTION_PAUSE
        or word.end - caption[0].start > CAPTION_SECONDS
        or width > CAPTION_WIDTH
        or caption[-1].text.endswith(SENTENCE_ENDS)
    )


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"


def is_spaced(character: str) -> bool:
    """Whether words of this character's script have spaces between them; ideographs and kana have none."""
    code = ord(character)
    return not (0x2E80 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0xFF00 <= code <= 0xFFEF or code >= 0x20000)


def _columns(text: str) -> int:
    return sum(1 if is_spaced(character) else 2 for character in text)


def join_words(words: Iterable[str]) -> str:
    """Words as running text: one space between two that are both written with spaces."""
    text = ""
    for word in words:
        if text and word and is_spaced(text[-1]) and is_spaced(word[0]):
            text += " "
        text += word
    return text
