"""What is said in training speech: transcripts, and a vocabulary of characters made of them.

A transcript file has one clip a line, its file's stem, a tab and the text. For recognition texts are reduced to what
can be heard: lower-case words of letters and digits, with single spaces between them.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ..core.errors import InvalidInput
from ..core.files import read_limited
from ..core.transcript import is_spaced
from ..generators.paraformer_text import GOES_ON, SPECIAL, UNKNOWN
from .speech_data import SpeechFolder

logger = logging.getLogger(__name__)
TRANSCRIPTS_FILE = "transcripts.tsv"
MAX_TRANSCRIPTS_BYTES = 1024 * 2**20
APOSTROPHES = "'’"
PUNCTUATION = "'.,?!-:;"


class SpokenFolder(SpeechFolder):
    """The clips of a folder (see `SpeechFolder`) that have a transcript, and their texts, written and spoken.

    transcripts: the file; `transcripts.tsv` in the folder when None.

    Raises:
        InvalidInput: no clip has one.
    """

    def __init__(self, folder: str | Path, split: str | None = None, transcripts: Path | None = None):
        super().__init__(folder, split)
        source = Path(folder) / TRANSCRIPTS_FILE if transcripts is None else transcripts
        written, num_clips = read_transcripts(source), len(self.paths)
        self.paths = [path for path in self.paths if spoken(written.get(path.stem, ""))]
        self.written = [written[path.stem] for path in self.paths]
        self.texts = [spoken(text) for text in self.written]
        if not self.paths:
            raise InvalidInput(f"{source} has a text for none of the {num_clips} clips in {folder}")
        if num_clips > len(self.paths):
            logger.warning("left out %d of %d clips, which have no transcript", num_clips - len(self.paths), num_clips)


def read_transcripts(path: str | Path) -> dict[str, str]:
    """Text of each clip as it is written, by the stem of its file.

    Raises:
        InvalidInput: missing, not UTF-8, or a line without a tab.
    """
    texts: dict[str, str] = {}
    try:
        lines = read_limited(path, MAX_TRANSCRIPTS_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        stem, tab, text = line.partition("\t")
        if not tab and line.strip():
            raise InvalidInput(f"{path}, line {number}: {line!r:.60} should be a file's stem, a tab and what is said")
        texts[stem] = text.strip()
    return texts


def spoken(text: str) -> str:
    """The words of a text: lower case, letters, digits and apostrophes within a word; all else parts words."""
    letters = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c if c.isalnum() or c in APOSTROPHES or unicodedata.combining(c) else " " for c in letters)
    return " ".join(word for part in kept.split() if (word := part.strip(APOSTROPHES)))


def character_tokens(texts: Iterable[str]) -> tuple[str, ...]:
    """A vocabulary of the characters in `texts`, in Paraformer's order: three special tokens, characters, <unk>.

    Where words have spaces between them, a character comes in two forms: "a@@" goes on, "a" ends the word.
    """
    characters = sorted({character for text in texts for character in text} - {" "})
    forms = [form for c in characters for form in ((c, c + GOES_ON) if is_spaced(c) else (c,))]
    return (*SPECIAL[:-1], *forms, UNKNOWN)


def alphabet_of(texts: Iterable[str]) -> str:
    """A space, then the letters, digits and common punctuation in `texts`, in lower case."""
    characters = {c for text in texts for c in unicodedata.normalize("NFKC", text).lower()}
    return " " + "".join(sorted(c for c in characters if c.isalnum() or c in PUNCTUATION))
