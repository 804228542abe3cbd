"""Damaged and hostile audio files are refused in one sentence, before a decoder sees what could harm it."""

import io
import struct

import mediatok as mt
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mediatok.core.audio import open_audio, read_audio, write_audio


def wav(tag=1, channels=1, rate=16000, bits=16, data=b"\0\0" * 100, announced=None, extra=b"", frame_bytes=None):
    frame_bytes = channels * bits // 8 if frame_bytes is None else frame_bytes
    layout = struct.pack("<HHIIHH", tag, channels, rate, rate * frame_bytes & 0xFFFFFFFF, frame_bytes, bits) + extra
    chunks = b"fmt " + struct.pack("<I", len(layout)) + layout
    chunks += b"data" + struct.pack("<I", len(data) if announced is None else announced) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def flac(seconds=2.0):
    samples = torch.sin(torch.arange(round(16000 * seconds)) / 9)
    file = io.BytesIO()
    soundfile.write(file, samples.numpy(), 16000, format="FLAC")
    return file.getvalue()


def test_the_plain_file_is_read():
    assert read_audio(wav()).samples.shape == (1, 100)
    assert read_audio(wav(data=b"\0\x40")).samples.tolist() == [[0.5]]  # one sample


GUID_OF_ADPCM = struct.pack("<HHIH", 22, 16, 0, 2) + bytes.fromhex("000000001000800000aa00389b71")
HOSTILE = {
    "no samples": (wav(data=b""), "no samples"),
    "2^31 frames": (wav(announced=2**31), "announces 1,073,741,824 samples"),
    "2^32 - 1 bytes": (wav(announced=2**32 - 1), "truncated or its header is wrong"),
    "IMA ADPCM": (wav(tag=0x11, bits=4, frame_bytes=256, extra=b"\2\0\xff\xff"), "IMA ADPCM"),
    "IMA ADPCM of 50,000 channels": (wav(tag=0x11, channels=50000, bits=4, frame_bytes=50000), "IMA ADPCM"),
    "MP3 in WAV": (wav(tag=0x55), "MP3"),
    "A-law": (wav(tag=6, bits=8), "A-law"),
    "ADPCM in an extensible header": (wav(tag=0xFFFE, extra=GUID_OF_ADPCM), "Microsoft ADPCM"),
    "extensible without a format": (wav(tag=0xFFFE), "codec 0xfffe"),
    "9 channels": (wav(channels=9), "9 channels"),
    "no channels": (wav(channels=0, frame_bytes=2), "announces samples of 16 bits in 2 bytes for 0 channels"),
    "no rate": (wav(rate=0), "0 samples a second"),
    "4 GHz": (wav(rate=2**32 - 1), "4,294,967,295 samples a second"),
    "12 bits": (wav(bits=12), "12 bits"),
    "frames of 7 bytes": (wav(frame_bytes=7), "in 7 bytes"),
    "no format header": (b"RIFF\x20\0\0\0WAVEdata\4\0\0\0\0\0\0\0", "without samples"),
    "chunks that never end": (b"RIFF\x20\0\0\0WAVEjunk\xff\xff\xff\xff", "chunks are damaged"),
    "RIFF alone": (b"RIFF", "no audio file"),
    "MP3": (b"\xff\xfb\x90\x00" * 100, "no audio file"),
    "AIFF": (b"FORM\0\0\0\0AIFF", "no audio file"),
    "text": (b"hello world, I am no sound", "no audio file"),
    "empty": (b"", "no audio file"),
    "NaN": (wav(tag=3, bits=32, data=struct.pack("<3f", 0, float("nan"), 0)), "NaN or infinite"),
    "infinity": (wav(tag=3, bits=64, data=struct.pack("<2d", 0, float("inf"))), "NaN or infinite"),
    "truncated FLAC": (flac()[:-2000], "truncated|damaged"),
    "FLAC header": (flac()[:30], "damaged header"),
    "Ogg header": (b"OggS" + b"\0" * 60, "cannot be decoded"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(tmp_path, name):
    data, words = HOSTILE[name]
    with pytest.raises(mt.InvalidInput, match=words) as caught:
        read_audio(data)
    assert "\n" not in str(caught.value)
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    with pytest.raises(mt.InvalidInput, match=words):
        for _ in open_audio(path).blocks(1, 16000):
            pass


@pytest.mark.parametrize("source", [3, None, [1.0, 2.0], torch.zeros(100)])
def test_what_is_no_audio(source):
    with pytest.raises(mt.InvalidInput, match=r"mediatok\.Waveform"):
        read_audio(source)


def test_folders_pipes_and_missing_files(tmp_path):
    with pytest.raises(mt.InvalidInput, match="regular file"):
        read_audio(tmp_path)
    with pytest.raises(mt.InvalidInput, match="does not exist"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(mt.InvalidInput, match="cannot be read"):
        read_audio("a\0b.wav")


def test_too_long_for_memory_but_not_for_blocks(tmp_path, monkeypatch):
    path = tmp_path / "clip.wav"
    write_audio(mt.Waveform(torch.zeros(1, 20_000), 16000), path)
    monkeypatch.setattr("mediatok.core.audio.MAX_SAMPLES", 10_000)
    with pytest.raises(mt.LimitExceeded, match="20,000 samples"):
        read_audio(path)
    assert read_audio(path, 8000).samples.shape == (1, 10_000)
    assert sum(map(len, open_audio(path).blocks(0.1, 16000))) == 20_000


SEEDS = [wav(), wav(tag=3, bits=32, data=b"\0" * 400), flac(0.2)]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=8),
    st.integers(0, 400),
)
def test_damaged_headers_give_sound_or_a_message(data, changes, cut):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[min(position, len(damaged) - 1)] = value
    damaged = bytes(damaged[: len(damaged) - cut]) if cut < len(damaged) else bytes(damaged)
    try:
        clip = read_audio(damaged)
    except mt.MediatokError:
        return
    assert torch.isfinite(clip.samples).all()
