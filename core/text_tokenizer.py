"""Text tokenizers of language models from their files, as data: `tokenizer.json`, or SentencePiece's `tokenizer.model`.

A `tokenizer.model` is a protocol buffer whose first field lists the pieces with their scores. From these alone follows
how LLaMA cuts text: pairs are merged as long as what they make is a piece, the best score first; what is no piece falls
to bytes. Field numbers: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InvalidCheckpoint, ModelNotFound
from .weights import inside, read_json

MAX_MODEL_BYTES = 16 * 2**20
MAX_JSON_BYTES = 64 * 2**20
MAX_PIECES, MAX_PIECE_CHARACTERS = 500_000, 64
PIECES, TRAINER = 1, 2  # fields of the model
PIECE, SCORE, KIND = 1, 2, 3  # of a piece
MODEL_TYPE = 3  # of the trainer
BPE = 2
SPACE = "\u2581"


def read_text_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder.

    Raises:
        ModelNotFound: neither file is there. InvalidCheckpoint: it is not what it should be.
    """
    if (folder / "tokenizer.json").exists():
        return _of_json(inside(folder, "tokenizer.json"))
    if (folder / "tokenizer.model").exists():
        return of_pieces(read_pieces(inside(folder, "tokenizer.model")))
    raise ModelNotFound(f"{folder} holds no text tokenizer (tokenizer.json, or the tokenizer.model of SentencePiece)")


def _of_json(path: Path) -> Any:
    from tokenizers import Tokenizer

    read_json(path, MAX_JSON_BYTES)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise InvalidCheckpoint(f"{path} is no tokenizer of the library `tokenizers`: {reason}") from None


def read_pieces(path: Path) -> list[tuple[str, float]]:
    """Pieces and their scores of a `tokenizer.model`, in order of their ids.

    Raises:
        InvalidCheckpoint: it is damaged, or of another kind than byte-pair encoding.
    """
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise InvalidCheckpoint(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_MODEL_BYTES:,} are read")
    pieces = []
    try:
        for field, value in _fields(path.read_bytes()):
            if field == PIECES:
                known = dict(_fields(value))
                score = struct.unpack("<f", known[SCORE])[0] if SCORE in known else 0.0
                pieces.append((known[PIECE].decode(), score))
            elif field == TRAINER and dict(_fields(value)).get(MODEL_TYPE) != BPE:
                raise InvalidCheckpoint(f"{path} is no byte-pair encoding, which LLaMA's is")
    except (KeyError, IndexError, UnicodeDecodeError, struct.error, TypeError) as error:
        raise InvalidCheckpoint(f"{path} is no SentencePiece model ({error.__class__.__name__})") from None
    if not pieces or len(pieces) > MAX_PIECES or any(len(piece) > MAX_PIECE_CHARACTERS for piece, _ in pieces):
        raise InvalidCheckpoint(f"{path} holds {len(pieces)} pieces, or far too long ones")
    return pieces


def of_pieces(pieces: list[tuple[str, float]]) -> Any:
    """The `tokenizers.Tokenizer` that cuts text as LLaMA's does, with a space in front of every text."""
    from tokenizers.models import BPE as Model

    from tokenizers import Tokenizer, decoders, normalizers

    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(score, ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    unknown = next((piece for piece in ("<unk>",) if piece in ids), None)
    model = Model(ids, [merge[3:] for merge in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer message: numbers, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            else:
                size = {1: 8, 5: 4}[wire]
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise IndexError
        yield field, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError
