"""The `.mtok` file: a header of variable-length numbers, the ids packed bit by bit, a CRC. docs/mtok.md defines it.

One item takes at most 64 bytes beside its ids. The parser trusts no count: each is checked against the bytes that are
there before anything of its size is made, and only what the writer would have written is accepted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import torch

from .errors import InvalidTokens
from .tokens import MAX_LENGTH, MAX_NAME_BYTES, ImageFrame, Tokens

MAGIC = b"MTOK"
VERSION = 1
MAX_ITEMS = 2**16
MAX_IDS = 2**22  # of ids [B, L, Q] with their padding, so that a small file cannot ask for much memory
MAX_FILE_BYTES = 32 * 2**20  # more than the limits above can fill
CRC_BYTES = 4
CHUNK = 2**16  # ids packed at a time; a multiple of 8, so that chunks end on whole bytes

# Number in the file of each modality, and how its frames are written and read.
MODALITIES = {1: "image"}


def write_mtok(tokens: Tokens) -> bytes:
    """The bytes of a `.mtok` file; InvalidTokens if the tokens are more than one file may hold."""
    _check_limits(tokens.ids.shape, advice="; save parts of them: tokens[:n].save(...)")
    is_token_BL = torch.arange(tokens.ids.shape[1]) < tokens.lengths[:, None]
    content = _header(tokens) + _pack(tokens.ids[is_token_BL].numpy().reshape(-1), tokens.bits_per_token)
    return content + zlib.crc32(content).to_bytes(CRC_BYTES, "little")


def size_bytes(tokens: Tokens) -> int:
    """Length of `write_mtok(tokens)`, without packing."""
    codebooks = tokens.ids.shape[2] if tokens.ids.ndim == 3 else 1
    bits = int(tokens.lengths.sum()) * codebooks * tokens.bits_per_token
    return len(_header(tokens)) + (bits + 7) // 8 + CRC_BYTES


def read_mtok(data: bytes) -> Tokens:
    """Parse the bytes of a `.mtok` file.

    Raises:
        InvalidTokens: not a `.mtok` file, another version, damaged, or not exactly what `write_mtok` gives.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise InvalidTokens("this is not a .mtok file: it does not start with 'MTOK'")
    if len(data) < len(MAGIC) + 1 + CRC_BYTES:
        raise InvalidTokens(f"the .mtok file is truncated: {len(data)} bytes are left")
    if data[len(MAGIC)] != VERSION:
        raise InvalidTokens(f"the .mtok file has version {data[len(MAGIC)]}; this mediatok reads version {VERSION}")
    content, crc = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
    if zlib.crc32(content) != crc:
        raise InvalidTokens("the .mtok file is damaged or truncated: its checksum does not fit")
    return _parse(_Reader(content, position=len(MAGIC) + 1))


def _header(tokens: Tokens) -> bytes:
    """Everything before the ids."""
    name = tokens.tokenizer.encode()
    header = bytearray(MAGIC)
    header.append(VERSION)
    header.append(next(number for number, modality in MODALITIES.items() if modality == tokens.modality))
    header.append(tokens.ids.shape[2] if tokens.ids.ndim == 3 else 0)
    header += _varint(tokens.vocab_size - 1)
    header += bytes.fromhex(tokens.fingerprint)
    header += bytes([len(name)]) + name
    header += _varint(len(tokens) if tokens.is_batch else 0)
    for length, frame in zip(tokens.lengths.tolist(), tokens.frames, strict=True):
        header += _varint(length) + _frame_bytes(frame)
    return bytes(header)


def _parse(reader: _Reader) -> Tokens:
    """The inverse of `_header` and `_pack`, from the byte after the version to the end."""
    modality = MODALITIES.get(number := reader.byte())
    if modality is None:
        raise InvalidTokens(f"the .mtok file holds modality {number}, which this mediatok does not know")
    codebooks = reader.byte()
    vocab_size = reader.varint() + 1
    fingerprint = reader.bytes(8).hex()
    name = reader.text(limit=MAX_NAME_BYTES)
    count = reader.varint()
    num_items = count or 1
    if num_items > reader.bytes_left:  # an item takes several bytes
        raise InvalidTokens(f"the .mtok file announces {num_items} items in {reader.bytes_left} bytes")
    lengths, frames = [], []
    for _ in range(num_items):
        lengths.append(reader.varint())
        frames.append(_read_frame(reader, modality))
    if not 1 <= min(lengths) <= max(lengths) <= MAX_LENGTH:
        raise InvalidTokens(f"the .mtok file announces items of {min(lengths)} to {max(lengths)} tokens")
    if vocab_size < 2:
        raise InvalidTokens("the .mtok file announces a vocabulary of one code")
    bits = (vocab_size - 1).bit_length()
    num_ids = sum(lengths) * max(codebooks, 1)
    if (num_ids * bits + 7) // 8 != reader.bytes_left:
        raise InvalidTokens(f"the .mtok file announces {num_ids} ids of {bits} bits in {reader.bytes_left} bytes")
    shape = (num_items, max(lengths), codebooks) if codebooks else (num_items, max(lengths))
    _check_limits(shape)
    ids = torch.zeros(shape, dtype=torch.int64)
    lengths_B = torch.tensor(lengths)
    packed = torch.from_numpy(_unpack(reader.bytes(reader.bytes_left), num_ids, bits))
    ids[torch.arange(shape[1]) < lengths_B[:, None]] = packed.view(-1, *shape[2:])
    return Tokens(
        ids=ids, lengths=lengths_B, tokenizer=name, fingerprint=fingerprint, vocab_size=vocab_size,
        modality=modality, frames=tuple(frames), is_batch=count > 0,
    )  # fmt: skip


def _check_limits(shape: tuple[int, ...], advice: str = "") -> None:
    if shape[0] > MAX_ITEMS:
        raise InvalidTokens(f"{shape[0]} items are more than the {MAX_ITEMS} of a .mtok file{advice}")
    if int(np.prod(shape, dtype=object)) > MAX_IDS:
        raise InvalidTokens(f"ids {list(shape)} are more than the {MAX_IDS} of a .mtok file{advice}")


def _frame_bytes(frame: ImageFrame) -> bytes:
    return b"".join(map(_varint, (frame.width, frame.height, frame.rows, frame.cols)))


def _read_frame(reader: _Reader, modality: str) -> ImageFrame:
    return ImageFrame(reader.varint(), reader.varint(), reader.varint(), reader.varint())


def _varint(value: int) -> bytes:
    """Unsigned LEB128: seven bits a byte, the lowest first, the top bit set on all but the last byte."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class _Reader:
    """Takes values off the front of the file; InvalidTokens where it ends too early."""

    def __init__(self, content: bytes, position: int):
        self.content, self.position = content, position

    @property
    def bytes_left(self) -> int:
        return len(self.content) - self.position

    def bytes(self, count: int) -> bytes:
        if count > self.bytes_left:
            raise InvalidTokens(f"the .mtok file is truncated: {count} bytes are needed, {self.bytes_left} are left")
        self.position += count
        return self.content[self.position - count : self.position]

    def byte(self) -> int:
        return self.bytes(1)[0]

    def varint(self) -> int:
        """At most five bytes; one spelling a number: a last byte of zero would be a longer spelling."""
        value = 0
        for index in range(5):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if byte == 0 and index > 0:
                    break
                return value
        raise InvalidTokens("the .mtok file holds a malformed number")

    def text(self, limit: int) -> str:
        if (length := self.byte()) > limit:
            raise InvalidTokens(f"the .mtok file holds a name of {length} bytes; the limit is {limit}")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise InvalidTokens("the .mtok file holds a name that is not UTF-8") from error


def _pack(ids: np.ndarray, bits: int) -> bytes:
    """Ids int64 [N] in [0, 2**bits) as N*bits bits, the highest bit first; the last byte is filled up with zeros."""
    return b"".join(_pack_chunk(chunk, bits) for chunk in _chunks(ids))


def _pack_chunk(ids: np.ndarray, bits: int) -> bytes:
    as_bits = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.packbits(as_bits[:, 32 - bits :]).tobytes()


def _unpack(packed: bytes, count: int, bits: int) -> np.ndarray:
    """Inverse of `_pack`: ids int64 [count]."""
    ids = np.empty(count, dtype=np.int64)
    source = np.frombuffer(packed, dtype=np.uint8)
    for start, chunk in enumerate(_chunks(ids)):
        first = start * CHUNK * bits // 8
        unpacked = np.unpackbits(source[first : first + (len(chunk) * bits + 7) // 8])
        if unpacked[len(chunk) * bits :].any():
            raise InvalidTokens("the .mtok file has set bits after its last id")
        padded = np.zeros((len(chunk), 32), dtype=np.uint8)
        padded[:, 32 - bits :] = unpacked[: len(chunk) * bits].reshape(-1, bits)
        chunk[:] = np.packbits(padded, axis=1).view(">u4")[:, 0]
    return ids


def _chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
