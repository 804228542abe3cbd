"""Damaged and hostile `.mtok` files give a value or a MediatokError, fast and in little memory."""

import random
import resource
import statistics
import struct
import time
import zlib

import mediatok as mt
import pytest
from mediatok.core.mtok import MAX_IDS, _varint


def with_crc(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def header(vocab_size=4096, count=0, codebooks=0, modality=1, name=b"a") -> bytes:
    head = b"MTOK\x01" + bytes([modality, codebooks]) + _varint(vocab_size - 1) + bytes(8)
    return head + bytes([len(name)]) + name + _varint(count)


def item(length: int, *frame: int) -> bytes:
    return b"".join(map(_varint, (length, *(frame or (1, 1, 0, 0)))))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four of: flipped bits, changed, removed, added, repeated or blown-up bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice([1, 1, 2, 4, 16])
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + length] = rng.randbytes(length)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = rng.randbytes(length)
            case 4:
                changed[at:at] = changed[max(at - length, 0) : at]
            case 5:
                changed[at : at + 1] = _varint(rng.choice([2**7, 2**14, 2**28 - 1, 2**32 - 1, 2**35 - 1]))
    return bytes(changed)


def test_10_000_mutated_files(make_tokens):
    rng = random.Random(0)
    originals = [
        make_tokens([32], is_batch=False).to_bytes(),
        make_tokens([5, 1, 7], vocab_size=1000, codebooks=2).to_bytes(),
        make_tokens([8], vocab_size=2**32, frame=mt.ImageFrame(99, 50, 2, 2), name="").to_bytes(),
        make_tokens([64] * 20, vocab_size=2, name="x" * 24).to_bytes(),
        make_tokens([14, 5], modality="shape", frame=mt.ShapeFrame(1.5, -2, 3, 0.1), scales=(1, 4, 9)).to_bytes(),
    ]
    before, seconds, accepted = peak_mib(), [], 0
    for number in range(10_000):
        data = mutate(rng.choice(originals), rng)
        if number % 4:  # most of them with a checksum that fits, so that the rest of the parser sees them
            data = with_crc(data[:-4])
        start = time.thread_time()  # work, not waiting: the machine may be busy
        try:
            tokens = mt.Tokens.from_bytes(data)
        except mt.MediatokError:
            tokens = None
        seconds.append(time.thread_time() - start)
        if tokens is not None:
            accepted += 1
            assert tokens.to_bytes() == data  # only the one spelling is read
    assert accepted > 100  # the mutations do reach the end of the parser
    assert statistics.median(seconds) < 0.01
    assert max(seconds) < 0.1
    assert peak_mib() - before < 64


def test_truncated_at_every_byte(make_tokens):
    data = make_tokens([5, 1, 7], vocab_size=1000).to_bytes()
    for length in range(len(data)):
        with pytest.raises(mt.InvalidTokens):
            mt.Tokens.from_bytes(data[:length])
        if length != len(data) - 4:  # there the checksum itself would be put back
            with pytest.raises(mt.InvalidTokens):
                mt.Tokens.from_bytes(with_crc(data[:length]))


@pytest.mark.parametrize("extra", [b"\0", b"\xff", bytes(100)])
def test_trailing_bytes(make_tokens, extra):
    data = make_tokens([5]).to_bytes()
    for longer in (data + extra, with_crc(data[:-4] + extra), with_crc(data + extra)):
        with pytest.raises(mt.InvalidTokens):
            mt.Tokens.from_bytes(longer)


def test_every_flipped_bit_is_noticed(make_tokens):
    data = make_tokens([5]).to_bytes()
    for position in range(len(data) * 8):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(mt.InvalidTokens):
            mt.Tokens.from_bytes(bytes(changed))


HOSTILE = {
    "an item of 2^28 tokens in 100 bytes": (header(2) + item(2**28 - 1) + bytes(100), "268435455 ids of 1 bits"),
    "2^32 items in 100 bytes": (header(2, count=2**32 - 1) + bytes(100), "at most 65,536 items"),
    "60,000 items in 100 bytes": (header(2, count=60_000) + bytes(100), "ends too early|item of 0 tokens"),
    "too much padding": (
        header(2, count=1000) + item(MAX_IDS) + item(1) * 999 + bytes((MAX_IDS + 999 + 7) // 8),
        "at most 2,097,152 ids",
    ),
    "a length of 0": (header() + item(0), "item of 0 tokens"),
    "a length of 2^28": (header() + item(2**28) + bytes(9), "item of 268435456 tokens"),
    "no pixels": (header() + item(1, 0, 1, 1, 1) + bytes(2), "width"),
    "tiles that do not divide": (header() + item(3, 9, 9, 2, 1) + bytes(5), "do not divide"),
    "an id beyond the vocabulary": (header(5) + item(1) + b"\xa0", r"\[0, 5\), got 5"),
    "a fill bit": (header(4096) + item(1) + b"\0\1", "bits set after"),
    "a longer spelling of 1": (header() + b"\x81\x00" + item(1)[1:] + bytes(2), "malformed number"),
    "a number of six bytes": (header() + b"\xff" * 6 + bytes(9), "malformed number"),
    "a vocabulary of 1": (header(1) + item(1) + b"\0", "vocabulary of 1 codes"),
    "a vocabulary of 2^35": (header(2**35) + item(1) + bytes(5), "vocabulary of"),
    "another modality": (header(modality=9) + item(1) + bytes(2), "modality 9"),
    "a name too long": (header(name=b"x" * 25) + item(1) + bytes(2), "25 bytes"),
    "a name that is not UTF-8": (header(name=b"\xff") + item(1) + bytes(2), "UTF-8"),
    "a name with a terminal's escape": (header(name=b"\x1b[2J") + item(1) + bytes(2), "printable"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind):
    content, message = HOSTILE[kind]
    before = peak_mib()
    with pytest.raises(mt.InvalidTokens, match=message) as caught:
        mt.Tokens.from_bytes(with_crc(content))
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert peak_mib() - before < 16


def test_a_small_file_cannot_ask_for_much_memory():
    """The most that a few kilobytes may unpack to: one long item pads a thousand short ones."""
    length = MAX_IDS // 1000
    content = header(2, count=1000) + item(length) + item(1) * 999 + bytes((length + 999 + 7) // 8)
    before = peak_mib()
    assert mt.Tokens.from_bytes(with_crc(content)).ids.shape == (1000, length)
    assert peak_mib() - before < 64


def test_other_versions_and_files():
    with pytest.raises(mt.InvalidTokens, match="version 2; this mediatok reads version 1"):
        mt.Tokens.from_bytes(with_crc(b"MTOK\x02" + bytes(40)))
    for data in (b"", b"M", b"MTOK", b"MTOK\x01", b"\x89PNG\r\n\x1a\n" + bytes(40)):
        with pytest.raises(mt.InvalidTokens):
            mt.Tokens.from_bytes(data)


SHAPE = 3 | 0x80  # with scales


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (b"\0", "holds none"),
        (b"\2\1\0", "scales must be"),
        (b"\2\1\5", "no whole number of scales"),
        (b"\x05\1\4", "announces|ends too early|unknown|malformed"),
    ],
)
def test_scales_that_are_not_sound(scales, message):
    start = b"MTOK\x01" + bytes([SHAPE, 0]) + _varint(255) + bytes(8) + b"\1a"
    content = start + scales + _varint(0) + _varint(5) + struct.pack("<4f", 0, 0, 0, 1) + bytes(5)
    with pytest.raises(mt.InvalidTokens, match=message):
        mt.Tokens.from_bytes(with_crc(content))


@pytest.mark.parametrize("place", [(-0.0, 0, 0, 1), (0, 0, 0, -0.0), (float("nan"), 0, 0, 1), (0, float("inf"), 0, 1)])
def test_places_that_are_not_sound(place):
    content = header(vocab_size=256, modality=3) + _varint(1) + struct.pack("<4f", *place) + bytes(1)
    with pytest.raises(mt.InvalidTokens):
        mt.Tokens.from_bytes(with_crc(content))
