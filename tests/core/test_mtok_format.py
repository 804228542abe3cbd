"""docs/mtok.md is enough to write a second parser: here is one, and the page's example."""

import re
import zlib
from pathlib import Path

import mediatok as mt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE = Path(__file__).parents[2] / "docs" / "mtok.md"


def parse(data: bytes) -> dict:
    """Read a `.mtok` file as docs/mtok.md says, with whole numbers only; ValueError for what it says to refuse."""
    position = 0

    def take(count):
        nonlocal position
        position += count
        if position > len(data) - 4:
            raise ValueError("too short")
        return data[position - count : position]

    def varint(low, high):
        value = shift = 0
        while True:
            byte = take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if (byte == 0 and shift > 7) or not low <= value <= high:
            raise ValueError("varint")
        return value

    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:] or take(6) != b"MTOK\x01\x01":
        raise ValueError("not a .mtok file of version 1 with pictures")
    codebooks, vocab_size = take(1)[0], varint(1, 2**32 - 1) + 1
    fingerprint, name = take(8).hex(), take(take(1)[0]).decode()
    count = varint(0, 65536)
    items = [
        (varint(1, 2**28 - 1), [varint(1, 65535), varint(1, 65535), varint(0, 2**14 - 1), varint(0, 2**14 - 1)])
        for _ in range(count or 1)
    ]
    bits, width = (vocab_size - 1).bit_length(), max(codebooks, 1)
    num_ids = width * sum(length for length, _ in items)
    packed = data[position:-4]
    fill = len(packed) * 8 - num_ids * bits
    number = int.from_bytes(packed, "big")
    if not 0 <= fill < 8 or number & ((1 << fill) - 1) or not name.isprintable() or len(name.encode()) > 24:
        raise ValueError("ids or name")
    ids = [number >> (len(packed) * 8 - bits * (i + 1)) & ((1 << bits) - 1) for i in range(num_ids)]
    if max(ids) >= vocab_size or not all(fits_tiles(length, *frame[2:]) for length, frame in items):
        raise ValueError("id or tiles")
    longest = max(length for length, _ in items)
    if len(items) * longest * width > 2**21:
        raise ValueError("too many ids")
    return {
        "ids": ids, "items": items, "count": count, "codebooks": codebooks,
        "vocab_size": vocab_size, "name": name, "fingerprint": fingerprint,
    }  # fmt: skip


def fits_tiles(length: int, rows: int, cols: int) -> bool:
    return (rows, cols) == (0, 0) or (rows > 0 and cols > 0 and length % (rows * cols) == 0)


def agrees(parsed: dict, tokens: mt.Tokens) -> bool:
    flat = [
        id for row, length in zip(tokens.ids, tokens.lengths, strict=True) for id in row[:length].reshape(-1).tolist()
    ]
    frames = [[frame.width, frame.height, frame.rows, frame.cols] for frame in tokens.frames]
    return parsed == {
        "ids": flat,
        "items": list(zip(tokens.lengths.tolist(), frames, strict=True)),
        "count": len(tokens) if tokens.is_batch else 0,
        "codebooks": tokens.ids.shape[2] if tokens.ids.ndim == 3 else 0,
        "vocab_size": tokens.vocab_size,
        "name": tokens.tokenizer,
        "fingerprint": tokens.fingerprint,
    }


def test_example_of_the_page():
    block = re.search(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    data = bytes.fromhex("".join(line[:32] for line in block.splitlines()))
    tokens = mt.Tokens.from_bytes(data)
    assert tokens.ids.tolist() == [[5, 4095, 0, 1027]]
    assert (tokens.tokenizer, tokens.fingerprint) == ("titok-tiny", "0123456789abcdef")
    assert tokens.frames == (mt.ImageFrame(640, 480),)
    assert tokens.to_bytes() == data
    assert len(data) == 46


def test_example_with_several_items_and_codebooks():
    """Pins the bytes: files that were written once must stay readable."""
    data = bytes.fromhex("4d544f4b01010206ffffffffffffffff02c3a9020201ffff030101016464010129cb805293384a")
    tokens = mt.Tokens.from_bytes(data)
    assert tokens.ids.tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert tokens.lengths.tolist() == [2, 1]
    assert tokens.to_bytes() == data


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(2, 2**32),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 99),
)
def test_second_parser_agrees(make_tokens, lengths, vocab_size, codebooks, seed):
    tokens = make_tokens(lengths, vocab_size, codebooks, seed=seed)
    assert agrees(parse(tokens.to_bytes()), tokens)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_second_parser_refuses_the_same_files(make_tokens, data):
    """One byte of a valid file is changed and the checksum made to fit: both parsers read the same, or both refuse."""
    content = bytearray(
        make_tokens([4, 2], vocab_size=data.draw(st.sampled_from([5, 4096])), codebooks=2).to_bytes()[:-4]
    )
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    changed = bytes(content) + zlib.crc32(content).to_bytes(4, "little")
    try:
        parsed = parse(changed)
    except ValueError:
        with pytest.raises(mt.MediatokError):
            mt.Tokens.from_bytes(changed)
    else:
        assert agrees(parsed, mt.Tokens.from_bytes(changed))
