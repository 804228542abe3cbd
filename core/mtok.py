"""The `.mtok` file: a header of variable-length numbers, the ids packed bit by bit, a CRC. docs/mtok.md defines it.

One item takes at most 70 bytes beside its ids and its scales. The parser trusts no count: each is checked against the
bytes that are there before anything of its size is made, and only what the writer would have written is accepted.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch

from .errors import InvalidTokens
from .tokens import FRAMES, MAX_LENGTH, MAX_NAME_BYTES, MAX_VOCAB_SIZE, Frame, Tokens

MAGIC = b"MTOK"
VERSION = 1
MODALITIES = {"image": 1, "speech": 2, "shape": 3}  # number of each modality in the file
HAS_SCALES = 0x80  # set in that number: the sizes of the scales follow the name
MAX_ITEMS = 2**16
MAX_IDS = 2**21  # of ids [B, L, Q] with their padding, so that a small file cannot ask for much memory
MAX_FILE_BYTES = 16 * 2**20  # more than the limits above can fill
CRC_BYTES = 4
CHUNK = 2**16  # ids packed at a time; a multiple of 8, so that chunks end on whole bytes


def write_mtok(tokens: Tokens) -> bytes:
    """The bytes of a `.mtok` file; InvalidTokens if there are more items or ids than a file may hold."""
    _check_num_items(len(tokens))
    _check_num_ids(tuple(tokens.ids.shape))
    is_token_BL = torch.arange(tokens.ids.shape[1]) < tokens.lengths[:, None]
    content = _header(tokens) + _pack(tokens.ids[is_token_BL].view(-1).numpy(), tokens.bits_per_token)
    return content + zlib.crc32(content).to_bytes(CRC_BYTES, "little")


def size_bytes(tokens: Tokens) -> int:
    """Length of `write_mtok(tokens)`, without packing."""
    num_ids = int(tokens.lengths.sum()) * math.prod(tokens.ids.shape[2:])
    return len(_header(tokens)) + _packed_bytes(num_ids, tokens.bits_per_token) + CRC_BYTES


def read_mtok(data: bytes) -> Tokens:
    """Parse the bytes of a `.mtok` file.

    Raises:
        InvalidTokens: not a `.mtok` file, another version, damaged, or not exactly what `write_mtok` gives.
    """
    if data[:4] != MAGIC:
        raise InvalidTokens("this is not a .mtok file: it does not start with 'MTOK'")
    if len(data) < len(MAGIC) + 1 + CRC_BYTES:
        raise InvalidTokens(f"the .mtok file is truncated after {len(data)} bytes")
    if data[4] != VERSION:
        raise InvalidTokens(f"the .mtok file has version {data[4]}; this mediatok reads version {VERSION}")
    content, crc = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
    if zlib.crc32(content) != crc:
        raise InvalidTokens("the .mtok file is damaged or truncated: its checksum does not fit")
    return _parse(_Reader(content, position=5))


def _header(tokens: Tokens) -> bytes:
    """Everything before the ids."""
    name = tokens.tokenizer.encode()
    num_codebooks = tokens.ids.shape[2] if tokens.ids.ndim == 3 else 0
    header = [
        MAGIC,
        bytes([VERSION, MODALITIES[tokens.modality] | (HAS_SCALES if tokens.scales else 0), num_codebooks]),
        _varint(tokens.vocab_size - 1),
        bytes.fromhex(tokens.fingerprint),
        bytes([len(name)]),
        name,
    ]
    if tokens.scales:
        header += [bytes([len(tokens.scales)]), *map(_varint, tokens.scales)]
    header.append(_varint(len(tokens) if tokens.is_batch else 0))
    for length, frame in zip(tokens.lengths.tolist(), tokens.frames, strict=True):
        header.append(_varint(length))
        for field in fields(frame):
            value = getattr(frame, field.name)
            header.append(struct.pack("<f", value) if field.type == "float" else _varint(value))
    return b"".join(header)


def _parse(reader: _Reader) -> Tokens:
    """What follows the version: the rest of the header, then the ids to the last byte."""
    modality_number, num_codebooks = reader.byte(), reader.byte()
    has_scales, modality_number = modality_number & HAS_SCALES, modality_number & ~HAS_SCALES
    modality = next((name for name, number in MODALITIES.items() if number == modality_number), None)
    if modality is None:
        raise InvalidTokens(f"the .mtok file holds modality {modality_number}, unknown to this mediatok")
    vocab_size = reader.varint() + 1
    if not 2 <= vocab_size <= MAX_VOCAB_SIZE:
        raise InvalidTokens(f"the .mtok file announces a vocabulary of {vocab_size} codes")
    fingerprint = reader.bytes(8).hex()
    name = reader.text(MAX_NAME_BYTES)
    scales = tuple(reader.varint() for _ in range(reader.byte())) if has_scales else ()
    if has_scales and not scales:
        raise InvalidTokens("the .mtok file announces scales and holds none")

    count = reader.varint()  # 0: one item that was given alone, not in a list
    num_items = max(count, 1)
    _check_num_items(num_items)
    lengths, frames = [], []
    for _ in range(num_items):
        lengths.append(reader.length())
        frames.append(reader.frame(FRAMES[modality]))

    shape_BLQ = (num_items, max(lengths), *([num_codebooks] if num_codebooks else []))
    num_ids, bits = sum(lengths) * max(num_codebooks, 1), (vocab_size - 1).bit_length()
    if _packed_bytes(num_ids, bits) != reader.bytes_left:
        raise InvalidTokens(f"the .mtok file announces {num_ids} ids of {bits} bits in {reader.bytes_left} bytes")
    _check_num_ids(shape_BLQ)
    lengths_B = torch.tensor(lengths)
    ids = torch.zeros(shape_BLQ, dtype=torch.int64)
    is_token_BL = torch.arange(shape_BLQ[1]) < lengths_B[:, None]
    packed_ids = torch.from_numpy(_unpack(reader.bytes(reader.bytes_left), num_ids, bits))
    ids[is_token_BL] = packed_ids.view(-1, *shape_BLQ[2:])
    return Tokens(
        ids=ids, lengths=lengths_B, tokenizer=name, fingerprint=fingerprint, vocab_size=vocab_size,
        modality=modality, frames=tuple(frames), is_batch=count > 0, scales=scales,
    )  # fmt: skip


class _Reader:
    """Takes values off the front of the content; InvalidTokens where it ends too early or a value is malformed."""

    def __init__(self, content: bytes, position: int):
        self.content, self.position = content, position

    @property
    def bytes_left(self) -> int:
        return len(self.content) - self.position

    def bytes(self, count: int) -> bytes:
        if count > self.bytes_left:
            raise InvalidTokens(f"the .mtok file ends too early: {count} bytes needed, {self.bytes_left} left")
        self.position += count
        return self.content[self.position - count : self.position]

    def byte(self) -> int:
        if self.position == len(self.content):
            raise InvalidTokens("the .mtok file ends too early")
        self.position += 1
        return self.content[self.position - 1]

    def varint(self) -> int:
        """Inverse of `_varint`, up to five bytes. A last byte of 0 would be a second spelling of the same number."""
        value = 0
        for index in range(5):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte == 0 and index > 0:
                break
            if byte < 0x80:
                return value
        raise InvalidTokens("the .mtok file holds a malformed number")

    def text(self, limit: int) -> str:
        if (length := self.byte()) > limit:
            raise InvalidTokens(f"the .mtok file holds a name of {length} bytes; the limit is {limit}")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise InvalidTokens("the .mtok file holds a name that is not UTF-8") from error

    def length(self) -> int:
        if not 1 <= (length := self.varint()) <= MAX_LENGTH:
            raise InvalidTokens(f"the .mtok file announces an item of {length} tokens")
        return length

    def float(self) -> float:
        (value,) = struct.unpack("<f", self.bytes(4))
        if struct.pack("<f", value + 0.0) != struct.pack("<f", value):
            raise InvalidTokens("the .mtok file holds a negative zero")
        return value

    def frame(self, frame_class: type[Frame]) -> Frame:
        """Whole numbers as varints, others in fp32; a field's type is text, as annotations are not evaluated here."""
        return frame_class(*(self.float() if field.type == "float" else self.varint() for field in fields(frame_class)))


def _varint(value: int) -> bytes:
    """Unsigned LEB128: seven bits a byte, the lowest first; the top bit is set on all bytes but the last."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _check_num_items(num_items: int) -> None:
    if num_items > MAX_ITEMS:
        raise InvalidTokens(f"a .mtok file holds at most {MAX_ITEMS:,} items, not {num_items:,}; split it: tokens[:n]")


def _check_num_ids(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MAX_IDS:
        raise InvalidTokens(f"a .mtok file holds at most {MAX_IDS:,} ids, not {list(shape)}; split it: tokens[:n]")


# Packing: ids of a few bits each, one after the other without gaps, the highest bit first.


def _packed_bytes(num_ids: int, bits: int) -> int:
    return (num_ids * bits + 7) // 8


def _pack(ids: np.ndarray, bits: int) -> bytes:
    """Ids int64 [N] in [0, 2**bits), bits 1 to 32, as N*bits bits; the last byte is filled up with zeros."""
    return b"".join(_pack_chunk(chunk, bits) for chunk in _chunks(ids))


def _pack_chunk(ids: np.ndarray, bits: int) -> bytes:
    bits_N32 = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.packbits(bits_N32[:, 32 - bits :]).tobytes()


def _unpack(packed: bytes, num_ids: int, bits: int) -> np.ndarray:
    """Inverse of `_pack`: ids int64 [num_ids]. InvalidTokens if the bits that fill up the last byte are not zero."""
    ids = np.empty(num_ids, dtype=np.int64)
    for index, chunk in enumerate(_chunks(ids)):
        start = index * _packed_bytes(CHUNK, bits)
        source = np.frombuffer(packed[start : start + _packed_bytes(len(chunk), bits)], dtype=np.uint8)
        flat = np.unpackbits(source)
        if flat[len(chunk) * bits :].any():
            raise InvalidTokens("the .mtok file has bits set after its last id")
        bits_N32 = np.zeros((len(chunk), 32), dtype=np.uint8)
        bits_N32[:, 32 - bits :] = flat[: len(chunk) * bits].reshape(-1, bits)
        chunk[:] = np.packbits(bits_N32, axis=1).view(">u4")[:, 0]
    return ids


def _chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Views of consecutive parts of `ids`."""
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
