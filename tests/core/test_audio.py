"""Sound is read at any rate, block by block as at once, and written whole or not at all."""

import subprocess
import sys

import mediatok as mt
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from mediatok.core.audio import list_audio, open_audio, read_audio, write_audio, write_blocks

RATES = [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000]


def tone(rate, seconds=1.7, channels=1, hz=440.0):
    time = torch.arange(round(rate * seconds)) / rate
    return mt.Waveform(0.5 * torch.sin(2 * torch.pi * hz * time).repeat(channels, 1), rate)


def noise(rate, samples, channels=1):
    return mt.Waveform(0.1 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(0)), rate)


@pytest.mark.parametrize("rate", RATES)
def test_resampling_is_torchaudios_however_it_is_cut(rate):
    clip = noise(rate, 200_003)
    expected = torchaudio.functional.resample(clip.samples, rate, 16000)
    assert torch.allclose(clip.resample(16000).samples, expected, atol=1e-5)
    assert clip.resample(16000).samples.shape == expected.shape


@pytest.mark.parametrize("rate", [44101, 15999, 191_999])
def test_rates_without_a_common_measure(rate):
    clip = tone(rate).resample(16000)
    assert clip.seconds == pytest.approx(1.7, rel=1e-3)
    middle = slice(8000, 16000)
    spectrum = torch.fft.rfft(clip.samples[0, middle] * torch.hann_window(8000)).abs()
    assert int(spectrum.argmax()) * 2 == pytest.approx(440, abs=2)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_blocks_join_to_the_whole(tmp_path, suffix, rate):
    path = tmp_path / f"clip.{suffix}"
    write_audio(noise(rate, 150_001), path)
    whole = read_audio(path, 16000).samples[0]
    for seconds in (0.3, 1.0, 100):
        blocks = list(open_audio(path).blocks(seconds, 16000))
        assert torch.equal(torch.cat(blocks), whole)
        assert all(len(block) == round(seconds * 16000) for block in blocks[:-1])
    assert torch.equal(read_audio(path.read_bytes(), 16000).samples[0], whole)


@pytest.mark.parametrize(
    ("subtype", "tolerance"),
    [("PCM_U8", 1e-2), ("PCM_16", 1e-4), ("PCM_24", 1e-6), ("PCM_32", 1e-7), ("FLOAT", 0), ("DOUBLE", 1e-7)],
)
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
def test_every_wav_sample_format(tmp_path, subtype, tolerance, container):
    clip = noise(16000, 1000, channels=2)
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip.samples.T.numpy(), 16000, subtype=subtype, format=container)
    read = read_audio(path, mono=False)
    assert read.sample_rate == 16000
    assert torch.allclose(read.samples, clip.samples, atol=tolerance, rtol=0)
    assert torch.allclose(read_audio(path).samples[0], read.samples.mean(0))


def test_eight_channels_at_192_khz(tmp_path):
    path = tmp_path / "clip.flac"
    write_audio(tone(192000, 0.5, channels=8), path)
    read = read_audio(path, 16000)
    assert read.samples.shape == (1, 8000)
    assert read.samples.abs().max() == pytest.approx(0.5, abs=0.02)


def test_writing_clips_and_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "clip.wav"
    write_audio(mt.Waveform(torch.tensor([0.5, 3.0, -3.0]), 16000), path)
    assert read_audio(path).samples[0].tolist() == pytest.approx([0.5, 1, -1], abs=1e-4)
    before = path.read_bytes()

    def broken():
        yield torch.zeros(1, 100)
        raise mt.Cancelled("stopped")

    with pytest.raises(mt.Cancelled):
        write_blocks(broken(), 16000, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["clip.wav"]
    with pytest.raises(mt.InvalidInput, match=r"\.mp3.*\.wav"):
        write_audio(tone(16000), tmp_path / "clip.mp3")


def test_hours_are_read_in_flat_memory(tmp_path):
    path = tmp_path / "long.flac"

    def hour():
        for minute in range(60):
            yield noise(16000, 960_000).samples * (minute % 7) / 7

    write_blocks(hour(), 16000, path)
    program = (
        "import resource, sys, torch, soundfile\nfrom mediatok.core.audio import open_audio\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stream = open_audio(sys.argv[1])\nblocks = stream.blocks(10, 24000)\n"
        "for _ in range(6): next(blocks)\n"
        "first, total = peak(), 6 * 240_000\n"
        "for block in blocks: total += len(block)\n"
        "print(total, (peak() - first) / first)\n"
    )
    out = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True).stdout
    total, growth = out.split()
    assert int(total) == 3600 * 24000
    assert float(growth) < 0.1


def test_listing_a_folder(tmp_path):
    for name in ("b.wav", "a.flac", "notes.txt", ".hidden.wav", "sub/c.ogg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_audio(tmp_path)] == ["a.flac", "b.wav", "c.ogg"]
    with pytest.raises(mt.InvalidInput, match="holds no audio"):
        list_audio([])


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (torch.zeros(0), 16000, "no samples"),
        (torch.zeros(1, 2, 3), 16000, "channels, time"),
        (torch.zeros(9, 10), 16000, "9 channels"),
        (torch.zeros(10, dtype=torch.int16), 16000, "floating-point"),
        (torch.tensor([0.0, float("nan")]), 16000, "NaN"),
        (torch.tensor([0.0, float("inf")]), 16000, "infinite"),
        (torch.zeros(10), 0, "0 samples a second"),
        (torch.zeros(10), 16000.0, "whole number"),
    ],
)
def test_impossible_waveforms(samples, rate, words):
    with pytest.raises(mt.InvalidInput, match=words):
        mt.Waveform(samples, rate)


def test_numpy_arrays_are_waveforms():
    assert mt.Waveform(np.zeros(100, dtype=np.float64), 8000).samples.dtype == torch.float32
