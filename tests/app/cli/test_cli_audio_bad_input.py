"""Odd audio works, bad audio is refused in one line with nothing written, and hours take the memory of minutes."""

import io
import json
import os
import struct
import subprocess
import sys

import mediatok as mt
import pytest
import soundfile
import torch
from mediatok.core import mtok
from mediatok.tokenizers.speech.simcodec import SimCodec

COMMANDS = ["encode", "reconstruct", "enhance", "transcribe", "evaluate", "rate"]


def wav(samples=b"\0\0" * 1600, tag=1, bits=16, channels=1, rate=16000, frame_bytes=None, announced=None) -> bytes:
    frame_bytes = channels * bits // 8 if frame_bytes is None else frame_bytes
    layout = struct.pack("<HHIIHH", tag, channels, rate, rate * frame_bytes, frame_bytes, bits)
    length = len(samples) if announced is None else announced
    chunks = b"fmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", length) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def flac(seconds=2.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, torch.sin(torch.arange(round(16000 * seconds)) / 9).numpy(), 16000, format="FLAC")
    return file.getvalue()


BAD = {
    "empty.wav": b"",
    "text.wav": b"this is no sound",
    "no-samples.wav": wav(b""),
    "lying.wav": wav(announced=2**31),
    "adpcm.wav": wav(tag=0x11, bits=4, channels=50000, frame_bytes=50000),
    "nan.wav": wav(struct.pack("<3f", 0, float("nan"), 0), tag=3, bits=32),
    "nine-channels.wav": wav(channels=9),
    "truncated.flac": flac()[:-3000],
    "header.flac": flac()[:30],
    "header.ogg": b"OggS" + bytes(60),
    "mp3.mp3": b"\xff\xfb\x90\x00" * 100,
}


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def check_refused(result, name):
    assert result.code == 2
    assert len(result.error_lines) == 1, result.err
    assert result.error_lines[0].startswith("error: ")
    assert name in result.error_lines[0]
    assert result.out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_one_bad_clip(run, tmp_path, command):
    for name, data in BAD.items():
        (tmp_path / name).write_bytes(data)
    before = listing(tmp_path)
    for name in (*BAD, "missing.wav"):
        check_refused(run(command, name), name)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", ["encode", "reconstruct", "enhance"])
def test_folder_goes_on_past_bad_files(run, sounds, command):
    for name, data in BAD.items():
        (sounds / name).write_bytes(data)
    result = run(command, sounds, "--out", "out")
    assert result.code == 2
    assert len([path for path in (sounds.parent / "out").rglob("*") if path.is_file()]) == 3
    in_folder = [name for name in BAD if not name.endswith(".mp3")]  # which is nothing to look for
    assert result.error_lines[-1] == f"{len(in_folder)} of {len(in_folder) + 3} inputs failed"
    for name in in_folder:
        assert any(name in line for line in result.error_lines)


@pytest.mark.parametrize("command", ["transcribe", "evaluate", "rate"])
def test_figures_and_text_of_the_good_ones(run, sounds, command):
    (sounds / "text.wav").write_bytes(BAD["text.wav"])
    result = run(command, sounds)
    assert result.code == 2
    assert "text.wav" in result.error_lines[0]
    assert {"transcribe": "c\t", "evaluate": "3 clips", "rate": "3 clips"}[command] in result.out


ODD = {
    "one-sample": mt.Waveform(torch.full((1, 1), 0.5), 16000),
    "silence": mt.Waveform(torch.zeros(1, 20000), 16000),
    "clipped": mt.Waveform((5 * torch.sin(torch.arange(20000) / 9)).clamp(-1, 1)[None], 16000),
    "8-khz": mt.Waveform(0.3 * torch.sin(torch.arange(8000) / 9)[None], 8000),
    "192-khz-8-channels": mt.Waveform(0.3 * torch.sin(torch.arange(96000) / 50).repeat(8, 1), 192000),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_clips_work(run, tmp_path, name):
    clip = ODD[name]
    clip.save(tmp_path / "a.wav")
    length = round(clip.seconds * 16000)
    for command in ("encode", "reconstruct", "enhance"):
        assert run(command, "a.wav").code == 0
    assert run("decode", "a.mtok").code == 0
    for result in ("a.decoded.wav", "a.reconstructed.wav", "a.enhanced.wav"):
        assert soundfile.info(result).frames == length
    said = run("transcribe", "a.wav", "--format", "json")
    assert said.code == 0
    assert json.loads(said.out)["seconds"] == pytest.approx(clip.seconds, abs=1e-3)
    report = run("evaluate", "a.wav", "--json")
    assert report.code == 0
    figures = json.loads(report.out)["figures"]
    assert all(abs(value) < 1e9 for value in figures.values())
    assert ("STOI" in figures) == (name not in ("one-sample", "silence"))
    assert run("rate", "a.wav").code == 0


@pytest.mark.parametrize("change", [b"", lambda data: data[:-1], lambda data: data[:9] + b"x" + data[10:]])
def test_bad_token_files_of_speech(run, sounds, tmp_path, change):
    run("encode", sounds / "a.wav", "--out", "a.mtok")
    path = tmp_path / "a.mtok"
    path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    before = listing(tmp_path)
    check_refused(run("decode", "a.mtok"), "a.mtok")
    assert listing(tmp_path) == before


def test_tokens_of_another_codec(run, sounds, shipped, tmp_path):
    torch.manual_seed(7)
    config = {key: value for key, value in mt.load(shipped / "simcodec-tiny").config.items() if key[0] != "_"}
    SimCodec(**config).save_pretrained(tmp_path / "other")
    run("encode", sounds / "a.wav", "--model", "other", "--out", "a.mtok")
    check_refused(run("decode", "a.mtok"), "'other'")
    check_refused(run("decode", "a.mtok", "--model", "simcodec-tiny"), "a.mtok")
    check_refused(run("decode", "a.mtok", "--model", "titok-tiny"), "titok-tiny")
    assert run("decode", "a.mtok", "--model", "other").code == 0


def test_clips_longer_than_a_token_file_are_refused_before_the_work(run, sounds, monkeypatch):
    monkeypatch.setattr(mtok, "MAX_IDS", 60)
    before = listing(sounds)
    for command in ("encode", "reconstruct"):
        check_refused(run(command, sounds / "a.wav"), "a.wav")
    assert listing(sounds) == before
    assert run("encode", sounds / "b.flac").code == 0


@pytest.mark.parametrize("command", ["encode", "reconstruct", "enhance", "transcribe"])
def test_full_disk(run, sounds, monkeypatch, tmp_path, command):
    def full(*arguments):
        raise soundfile.LibsndfileError(2)

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    monkeypatch.setattr(os, "replace", refuse)
    before = listing(tmp_path)
    check_refused(
        run(command, sounds / "a.wav", *(("--out", "a.txt") if command == "transcribe" else ())), "could not be"
    )
    assert listing(tmp_path) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_read_only_output(run, sounds):
    for command in ("reconstruct", "enhance"):
        for out in ("/proc/self/a.wav", "/proc/new"):
            check_refused(run(command, sounds / "a.wav", "--out", out), out.split("/")[-1])


TWO_HOURS = """
import json, resource, sys
import soundfile, torch
from diffusers.configuration_utils import register_to_config
from mediatok.app import cli
from mediatok.core import registry
from mediatok.core.speech_tokenizer import SpeechTokenizer

class Loudness(SpeechTokenizer):
    hop_length, vocab_size, context_frames = 320, 256, 2

    @register_to_config
    def __init__(self, sample_rate: int = 16000):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def encode_waveform(self, wave_BT, lengths_B=None):
        return (wave_BT.unflatten(1, (-1, 320)).abs().mean(-1) * 255 * self.gain).long()

    def decode_ids(self, ids):
        return (ids / 255).repeat_interleave(320, dim=1)

registry.load = lambda *args, **options: Loudness().requires_grad_(False)
def run(*arguments):
    try:
        cli.main([*arguments, "--model", "folder/loudness"])
    except SystemExit as end:
        assert end.code == 0, arguments

def write(name, minutes):
    with soundfile.SoundFile(name, "w", 16000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(minutes):
            file.write(torch.zeros(60 * 16000).numpy())

for name, minutes, part in (("short", 1, 1), ("long", 120, 30)):
    write(f"{name}.flac", minutes)
    write("part.flac", part)
    run("encode", f"{name}.flac")
    run("decode", f"{name}.mtok", "--out", f"{name}-back.flac")
    run("reconstruct", "part.flac", "--out", f"{name}-part.flac")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("measured", soundfile.info(f"{name}-back.flac").frames, peak)
"""


def test_two_hours_take_the_memory_of_one_minute(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_HOURS], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured")]
    (frames, short), (long_frames, long) = lines
    assert (int(frames), int(long_frames)) == (60 * 16000, 7200 * 16000)
    assert float(long) < 1.1 * float(short)
