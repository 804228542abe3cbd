"""Word and character error rates: how much of what was said a recogniser still understands."""

from __future__ import annotations

import csv
import hashlib
import io
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..core.audio import AUDIO_SUFFIXES, Waveform
from ..core.errors import InvalidInput
from ..core.files import read_limited, shown

MAX_TRANSCRIPTS_BYTES = 64 * 2**20
TRANSCRIPTS_FILE = "transcripts.tsv"  # of a folder: name <tab> text
INAUDIBLE = "'\u2019\u0301"  # within a word: apostrophes, the mark of stress


class Listener:
    """Word and character error rates of a recogniser's transcripts, of the originals and of what was decoded."""

    def __init__(self, recogniser, texts: Mapping[str, str]):
        self.recogniser, self.texts = recogniser, texts
        self.said: list[str] = []
        self.heard: dict[str, list[str]] = {"originals": [], "decoded": []}

    def hear(self, source, original: Waveform, decoded: Waveform) -> None:
        """Transcribe both clips, if it is known what is said in `source`."""
        text = plain_text(self.texts.get(Path(source).stem, "")) if isinstance(source, (str, Path)) else ""
        if text:
            self.said.append(text)
            for name, clip in (("originals", original), ("decoded", decoded)):
                self.heard[name].append(plain_text(self.recogniser.transcribe(clip).text))

    @property
    def texts_sha256(self) -> str:
        """Over the texts that were compared with."""
        return hashlib.sha256("\n".join(sorted(self.said)).encode()).hexdigest()

    def figures(self, num_clips: int) -> tuple[dict[str, float], list[str]]:
        """Error rates over all clips together, 0 to 1 or more, and notes.

        Raises:
            InvalidInput: not one clip has a transcript.
        """
        import jiwer

        if not self.said:
            raise InvalidInput("none of the clips has a transcript; their names are file names without suffix")
        figures = {}
        for name, heard in self.heard.items():
            figures[f"word error rate ({name})"] = float(jiwer.wer(self.said, heard))
            figures[f"character error rate ({name})"] = float(jiwer.cer(self.said, heard))
        missing = num_clips - len(self.said)
        return figures, [f"error rates: without {missing} clips that have no transcript"] if missing else []


def plain_text(text: str) -> str:
    """Lower case, without punctuation and symbols, words parted by single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.translate(dict.fromkeys(map(ord, INAUDIBLE)))
    return " ".join("".join(sign if unicodedata.category(sign)[0] not in "PSC" else " " for sign in text).split())


def read_transcripts(path: str | Path) -> dict[str, str]:
    """Texts by name from a file of lines "name <tab> text" in UTF-8.

    Raises:
        InvalidInput: the file is something else.
    """
    data = read_limited(path, MAX_TRANSCRIPTS_BYTES)
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig")), delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{shown(path)} is no text in UTF-8: {error}") from error
    rows = [row for row in rows if row]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise InvalidInput(f"{shown(path)} has the line {chr(9).join(wrong)[:60]!r}; lines are: name <tab> text")
    return {Path(name).stem if name.lower().endswith(AUDIO_SUFFIXES) else name: text for name, text in rows}


def find_transcripts(folders: Iterable[Path]) -> dict[str, str] | None:
    """The texts of all `transcripts.tsv` in these folders; None where there is no such file."""
    files = [folder / TRANSCRIPTS_FILE for folder in folders if (folder / TRANSCRIPTS_FILE).is_file()]
    return {name: text for file in files for name, text in read_transcripts(file).items()} if files else None


def texts_of(transcripts: str | Path | Mapping[str, str] | None, folder: Path | None) -> Mapping[str, str]:
    """Texts by name: as given, from a file, or from the folder's own file.

    Raises:
        InvalidInput: there are none.
    """
    if isinstance(transcripts, (str, Path)):
        return read_transcripts(transcripts)
    texts = transcripts if transcripts is not None else find_transcripts([folder] if folder is not None else [])
    if not texts:
        raise InvalidInput(
            f"error rates need what is said: a file of lines name <tab> text, or {TRANSCRIPTS_FILE} beside the clips"
        )
    return texts
