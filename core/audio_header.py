"""What the first bytes of an audio file announce, read by ourselves before any decoder sees the file.

Decoders have crashed on headers that lie (libsndfile's IMA ADPCM, CVE-2026-37555). Only PCM and float WAV, FLAC and Ogg
get through, and only when what they announce can be in the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from .errors import InvalidInput, LimitExceeded

MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 1_000, 384_000
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")  # what follows the format number in an extensible header
BITS = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
FORMATS = {2: "Microsoft ADPCM", 6: "A-law", 7: "mu-law", 0x11: "IMA ADPCM", 0x50: "MPEG", 0x55: "MP3", 0x92: "AC-3"}
ACCEPTED = "PCM or float WAV, FLAC and Ogg are read"


@dataclass(frozen=True)
class AudioHeader:
    """kind: "WAV", "FLAC" or "Ogg". num_frames: as announced; None where only decoding tells."""

    kind: str
    sample_rate: int | None
    channels: int | None
    num_frames: int | None


def read_header(file: BinaryIO, size: int, where: str) -> AudioHeader:
    """Check the first bytes of `file` (of `size` bytes, at its start); `where` names it in messages.

    Raises:
        InvalidInput: another format or codec, or a header that cannot be true.
        LimitExceeded: more channels or a higher rate than is read.
    """
    magic = file.read(12)
    if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
        header = _read_wav(file, size, where)
    elif magic[:4] == b"fLaC":
        file.seek(4)
        header = _read_flac(file, where)
    elif magic[:4] == b"OggS":
        header = AudioHeader("Ogg", None, None, None)
    else:
        raise InvalidInput(f"{where} is no audio file that is read here; {ACCEPTED}: convert it first")
    if header.sample_rate is not None and header.channels is not None:
        check_rate_and_channels(header.sample_rate, header.channels, where)
    if header.num_frames == 0:
        raise InvalidInput(f"{where} holds no samples")
    return header


def check_rate_and_channels(sample_rate: int, channels: int, where: str) -> None:
    """Refuse rates and channel counts that no microphone gives."""
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise LimitExceeded(f"{where} has {sample_rate:,} samples a second; {MIN_RATE:,} to {MAX_RATE:,} are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise LimitExceeded(f"{where} has {channels} channels; 1 to {MAX_CHANNELS} are read")


def _read_wav(file: BinaryIO, size: int, where: str) -> AudioHeader:
    """Walk the chunks of a RIFF file up to its samples."""
    layout = None
    while len(head := file.read(8)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], "little")
        at = file.tell()
        if name == b"fmt ":
            if layout is not None:
                raise InvalidInput(f"{where} has two format headers")
            layout = _wav_layout(file.read(min(length, 40)), where)
        elif name == b"data":
            if layout is None:
                break
            sample_rate, channels, frame_bytes = layout
            if length > size - at:
                raise InvalidInput(
                    f"{where} announces {length // frame_bytes:,} samples a channel but holds at most "
                    f"{(size - at) // frame_bytes:,}: it is truncated or its header is wrong"
                )
            return AudioHeader("WAV", sample_rate, channels, length // frame_bytes)
        if at + length > size:
            break
        file.seek(at + length + length % 2)  # chunks start at even places
    raise InvalidInput(f"{where} is a WAV file without samples, or its chunks are damaged")


def _wav_layout(chunk: bytes, where: str) -> tuple[int, int, int]:
    """(sample rate, channels, bytes of one sample of all channels) of a format chunk."""
    if len(chunk) < 16:
        raise InvalidInput(f"{where} has a format header of {len(chunk)} bytes; 16 are needed")
    tag, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == EXTENSIBLE and len(chunk) == 40 and chunk[26:] == GUID_TAIL:
        tag = int.from_bytes(chunk[24:26], "little")
    if tag not in BITS:
        raise InvalidInput(f"{where} is a WAV file of {FORMATS.get(tag, f'codec {tag:#x}')}; {ACCEPTED}: convert it")
    if bits not in BITS[tag] or frame_bytes != channels * bits // 8:
        raise InvalidInput(f"{where} announces samples of {bits} bits in {frame_bytes} bytes for {channels} channels")
    check_rate_and_channels(rate, channels, where)
    return rate, channels, frame_bytes


def _read_flac(file: BinaryIO, where: str) -> AudioHeader:
    """The STREAMINFO block, which comes first."""
    block = file.read(38)
    if len(block) < 38 or block[0] & 0x7F != 0 or int.from_bytes(block[1:4], "big") != 34:
        raise InvalidInput(f"{where} is a FLAC file with a damaged header")
    packed = int.from_bytes(block[14:22], "big")  # 20 bits rate, 3 channels - 1, 5 bits - 1, 36 samples
    num_frames = packed & (2**36 - 1)
    return AudioHeader("FLAC", packed >> 44, (packed >> 41 & 7) + 1, num_frames or None)  # 0 stands for unknown
