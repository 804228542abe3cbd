"""Text tokenizers from SentencePiece's files, without its library."""

import struct

import mediatok as mt
import pytest
from mediatok.core.text_tokenizer import of_pieces, read_pieces, read_text_tokenizer

BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = ["\u2581a", "ca", "\u2581ca", "at", "\u2581cat", "\u2581", "a", "c", "t", "s", "\u2581cats"]


def varint(value):
    out = b""
    while True:
        value, low = value >> 7, value & 127
        out += bytes([low | (128 if value else 0)])
        if not value:
            return out


def message(field, data):
    return varint(field << 3 | 2) + varint(len(data)) + data


def model_file(pieces, kind=2):
    data = b""
    for piece, score in pieces:
        data += message(1, message(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score))
    return data + message(2, varint(3 << 3) + varint(kind)) + message(3, message(1, b"identity"))


PIECES = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((byte, 0.0) for byte in BYTES)]
PIECES += [(word, -float(number)) for number, word in enumerate(WORDS)]


def test_a_model_is_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file(PIECES))
    assert read_pieces(tmp_path / "tokenizer.model") == PIECES
    tokenizer = read_text_tokenizer(tmp_path)
    ids = {piece: number for number, (piece, _) in enumerate(PIECES)}
    assert tokenizer.encode("cats a").ids == [ids["\u2581cats"], ids["\u2581a"]]
    # Bytes where there is no piece; text comes back as it was.
    snow = tokenizer.encode("cat \u2603").ids
    assert snow == [ids["\u2581cat"], ids["\u2581"], *(3 + byte for byte in "\u2603".encode())]
    for text in ("cats a", "cat \u2603", "  a  c", "x\ny"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_best_merges_come_first():
    tokenizer = of_pieces([("<unk>", 0.0), ("\u2581", -9.0), *((c, -9.0) for c in "abc"), ("bc", -1.0), ("ab", -2.0)])
    assert tokenizer.encode("abc").tokens == ["\u2581", "a", "bc"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds 0 pieces"), (b"\xff" * 40, "no SentencePiece"), (model_file(PIECES)[:-9], "no SentencePiece"),
        (model_file(PIECES, kind=1), "no byte-pair encoding"), (message(1, message(1, b"\xff")), "no SentencePiece"),
        (message(1, message(2, b"1234")), "no SentencePiece"), (model_file([("a" * 100, 0.0)]), "far too long"),
    ],
)  # fmt: skip
def test_bad_models(tmp_path, data, message):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(mt.InvalidCheckpoint, match=message):
        read_text_tokenizer(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(mt.ModelNotFound, match=r"tokenizer\.model of SentencePiece"):
        read_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Magic"}}')
    with pytest.raises(mt.InvalidCheckpoint, match="no tokenizer"):
        read_text_tokenizer(tmp_path)
