"""A small vocabulary of texts for language models that are trained from scratch: words and pieces of them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.errors import InvalidInput

MAX_PIECES = 65_536
MAX_PIECE = 32  # characters
SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "<img>", "</img>")
PAD, BOS, EOS, UNKNOWN, OPEN, CLOSE = range(len(SPECIAL))
WORD = re.compile(r"\w+|[^\w\s]")


class Pieces:
    """A small vocabulary of words and characters, which a config can hold. Text is read in lower case.

    Words that it does not have are put together of the longest pieces that it has, from the left. A piece that begins
    within a word is written with "##" before it (as WordPiece has it, Wu et al. 2016).

    pieces: unique texts; the ids of `SPECIAL` come first.
    """

    def __init__(self, pieces: Sequence[str]):
        self.pieces = (*SPECIAL, *pieces)
        self.number = {piece: number for number, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without marks of its beginning and end."""
        return [number for word in words_of(text) for number in self._ids_of(word)]

    def _ids_of(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(min(len(word), start + MAX_PIECE), start, -1):
                number = self.number.get(mark + word[start:end])
                if number is not None:
                    break
            else:
                number, end = UNKNOWN, start + 1
            ids.append(number)
            start = end
        return ids


def words_of(text: str) -> list[str]:
    """Words and signs of a text, in lower case."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def pieces_of(texts: Iterable[str], min_count: int = 2) -> tuple[str, ...]:
    """Pieces for texts: their characters, alone and within words, and their words that occur `min_count` times."""
    counts = Counter(word for text in texts for word in words_of(text))
    characters = sorted({character for word in counts for character in word})
    words = [word for word, count in counts.most_common() if count >= min_count and 1 < len(word) <= MAX_PIECE]
    pieces = [*characters, *(f"##{character}" for character in characters), *words]
    return tuple(dict.fromkeys(pieces))[:MAX_PIECES]


def check_pieces(pieces: Any) -> None:
    """Raise InvalidInput unless a config's `pieces` are unique short texts."""
    if not isinstance(pieces, (list, tuple)) or not all(
        isinstance(p, str) and 0 < len(p) <= MAX_PIECE + 2 for p in pieces
    ):
        raise InvalidInput(f"text_pieces must be a list of texts of 1 to {MAX_PIECE} characters")
    if len(pieces) > MAX_PIECES or len(set(pieces)) < len(pieces):
        raise InvalidInput(f"text_pieces must be at most {MAX_PIECES} different texts, not {len(pieces)}")
