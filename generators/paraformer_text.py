"""Paraformer's vocabulary: ids, tokens, words. Characters are tokens; Latin words are pieces, all but the last with @@.

Shape suffixes: none; these are lists of a clip's tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..core.errors import InvalidInput
from ..core.transcript import Word, is_spaced

BLANK, SOS, EOS = 0, 1, 2  # ids in every release
SPECIAL = ("<blank>", "<s>", "</s>", "<unk>")
UNKNOWN = "<unk>"
GOES_ON = "@@"  # ends a piece that the next one continues


class Vocabulary:
    """The tokens of a model by id."""

    def __init__(self, tokens: Sequence[str]):
        self.tokens = tuple(tokens)
        self.ids = {token: number for number, token in reversed(list(enumerate(self.tokens)))}
        self.longest = max((len(token) for token in self.tokens), default=0)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, unknown: bool = False) -> list[int]:
        """Ids of a text: Latin words in the longest pieces that there are, other scripts character by character.

        unknown: write <unk> for what no token stands for, as training does.

        Raises:
            InvalidInput: a character that no token stands for.
        """
        ids: list[int] = []
        for word in split_words(unicodedata.normalize("NFKC", text).lower()):
            pieces = self._pieces(word)
            if pieces is None and not unknown:
                raise InvalidInput(f"{word!r} in {text!r} cannot be written with this model's tokens")
            ids += pieces if pieces is not None else [self.ids.get(UNKNOWN, len(self) - 1)]
        return ids

    def _pieces(self, word: str) -> list[int] | None:
        """The word as the fewest tokens that taking the longest one first gives."""
        ids: list[int] = []
        while word:
            for size in range(min(len(word), self.longest), 0, -1):
                token = word if size == len(word) else word[:size] + GOES_ON
                if token in self.ids:
                    break
            else:
                return None
            ids.append(self.ids[token])
            word = word[size:]
        return ids

    def words(self, ids: Sequence[int], spans: Sequence[tuple[float, float]]) -> list[Word]:
        """Words of ids, and the time of each from its first piece to its last. Special tokens are left out.

        Single Latin letters one after the other are an abbreviation: they become one word in capitals.
        """
        words: list[Word] = []
        begun: Word | None = None
        for number, (start, end) in zip(ids, spans, strict=True):
            token = self.tokens[number]
            if token in SPECIAL:
                continue
            text, start = (token, start) if begun is None else (begun.text + token, begun.start)
            goes_on = text.endswith(GOES_ON)
            word = Word(text.removesuffix(GOES_ON), start, end)
            if goes_on:
                begun = word
            else:
                begun = None
                words.append(word)
        if begun is not None:  # the last piece promised another
            words.append(begun)
        return _join_letters(words)


def split_words(text: str) -> list[str]:
    """Words between spaces; each character of a script without spaces is one."""
    words: list[str] = []
    for part in text.split():
        begins = True
        for character in part:
            if begins or not is_spaced(character) or not is_spaced(words[-1][-1]):
                words.append(character)
            else:
                words[-1] += character
            begins = False
    return words


def _join_letters(words: list[Word]) -> list[Word]:
    joined: list[Word] = []
    run: list[Word] = []

    def end_run() -> None:
        if len(run) > 1:
            joined.append(Word("".join(word.text for word in run).upper(), run[0].start, run[-1].end))
        else:
            joined.extend(run)
        run.clear()

    for word in words:
        if len(word.text) == 1 and word.text.isascii() and word.text.isalpha():
            run.append(word)
        else:
            end_run()
            joined.append(word)
    end_run()
    return joined
