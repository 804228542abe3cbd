"""The Speech tab's parts without a server: reading what is sent, noise, results, code, drawings."""

import copy
import importlib.util
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import soundfile
import torch
from mediatok.app import cli, studio_speech_actions, studio_speech_reader, studio_speech_views
from mediatok.app import studio_speech_code as code
from mediatok.app.studio_context import Studio
from mediatok.app.studio_models import CODEC, ENHANCER, RECOGNISER, SPEAKER, TOKENIZER, Catalogue
from mediatok.app.studio_speech import NUM_OUTPUTS, SpeechEvents, SpeechSession, checked_seed, checked_temperature
from mediatok.app.studio_speech_actions import Mixed, code_clip, enhance_clip, mix, speak_text, transcribe_clip
from mediatok.app.studio_speech_plots import TOKEN_COLUMNS, sound_figure
from mediatok.app.studio_speech_reader import MAX_SECONDS, Clip, read_clip
from mediatok.app.studio_worker import Job
from mediatok.core.transcript import Transcript, Word


def load_beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


beside = load_beside("studio_speech_models")
RATE, vowels = beside.RATE, beside.vowels


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    beside.save_speech_models(folder)
    beside.save_voice(folder, folder / "random-codec")
    return folder


@pytest.fixture(scope="module")
def catalogue(models):
    return Catalogue(models, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A clip as it comes out of an upload called "my voice.flac"."""
    folder = tmp_path_factory.mktemp("clip")
    mt.Waveform(vowels(), RATE).save(folder / "my voice.flac")
    return read_clip(folder / "my voice.flac", folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch, clip):
    """A working folder with the clip's own file, to run the shown code in."""
    mt.Waveform(vowels(), RATE).save(tmp_path / "my voice.flac")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(text: str) -> None:
    exec(compile(text, "shown", "exec"), {})


def run_commands(text: str) -> None:
    for line in text.splitlines():
        if not line.startswith("#"):
            with pytest.raises(SystemExit) as ended:
                cli.main(shlex.split(line)[1:])
            assert not ended.value.code


def same(path, waveform: mt.Waveform) -> bool:
    """Whether a 16-bit file holds this sound; its last bit may differ, as the command line decodes block by block."""
    return torch.allclose(mt.read_audio(path).samples, waveform.samples.clamp(-1, 1), rtol=0, atol=2.5 / 2**15)


# Reading.


@pytest.mark.parametrize(
    ("suffix", "subtype", "channels", "rate"),
    [
        (".wav", "PCM_24", 2, 44100),
        (".flac", "PCM_16", 1, 8000),
        (".ogg", "VORBIS", 2, 48000),
        (".wav", "DOUBLE", 6, RATE),
    ],
)
def test_what_is_read_is_what_the_library_reads(suffix, subtype, channels, rate, tmp_path):
    source = tmp_path / f"clip{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * rate // 2, channels))
    soundfile.write(source, noise, rate, subtype=subtype)
    (tmp_path / "into").mkdir()
    clip = read_clip(source, tmp_path / "into")
    assert (clip.name, clip.sample_rate, clip.seconds) == (source.name, rate, 1.5)
    torch.testing.assert_close(mt.read_audio(clip.path).samples, mt.read_audio(source).samples, rtol=0, atol=2e-7)


def wav(rate=RATE, channels=1, tag=1, bits=16, announced=None, data=b"\0" * 64) -> bytes:
    """A WAV file whose header says what it is told to say."""
    layout = struct.pack("<HHIIHH", tag, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    size = len(data) if announced is None else announced
    return b"RIFF" + bytes(4) + b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", size) + data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no audio file"),
        (b"ID3 what people call audio", "no audio file"),
        (wav(announced=2**31), "announces"),
        (wav(tag=0x11, channels=50_000, bits=4), "IMA ADPCM"),
        (wav(data=b""), "no samples"),
        (wav(rate=192_000_000), "samples a second"),
        (wav(tag=3, bits=32, data=struct.pack("<f", float("nan")) * 16), "NaN"),
        (wav(rate=1000, data=bytes(2 * 1000 * (MAX_SECONDS + 1))), "more than 10 minutes"),
        (b"fLaC\0\0\0\x22" + bytes(40), "FLAC|samples|channels|damaged"),
        (b"OggS" + bytes(60), "damaged|cannot"),
    ],
    ids=["empty", "mp3", "too long a header", "adpcm", "no samples", "rate", "nan", "long", "flac", "ogg"],
)  # fmt: skip
def test_bad_sound_is_refused_with_its_name_and_leaves_nothing(data, reason, tmp_path):
    source = tmp_path / "speech.wav"
    source.write_bytes(data)
    (tmp_path / "into").mkdir()
    with pytest.raises(mt.InvalidInput, match=reason) as caught:
        read_clip(source, tmp_path / "into")
    assert str(caught.value).startswith("speech.wav")
    assert str(tmp_path) not in str(caught.value)
    assert not list((tmp_path / "into").iterdir())


@pytest.mark.parametrize("ending", ["kill -SEGV $$", "exit 1", "exec sleep 60"])
def test_decoder_that_dies_or_hangs_is_a_message(ending, tmp_path, monkeypatch):
    decoder = tmp_path / "decoder"
    decoder.write_text(f"#!/bin/sh\n{ending}\n")
    decoder.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(decoder))
    monkeypatch.setattr(studio_speech_reader, "WALL_SECONDS", 0.5)
    with pytest.raises(mt.InvalidInput, match=r"speech\.wav (cannot be decoded|takes too long)"):
        read_clip(tmp_path / "speech.wav", tmp_path)


def test_decoder_has_limits():
    program = (
        "import resource; from mediatok.app import studio_speech_reader as reader; reader._limit()\n"
        "assert 0 < resource.getrlimit(resource.RLIMIT_CPU)[0] <= reader.CPU_SECONDS\n"
        "try: bytearray(reader.MEMORY_BYTES)\n"
        "except MemoryError: print('held')"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "held"


# Models.


def test_models_are_sorted_by_what_they_do(catalogue, models):
    names = {kind: [label for label, _ in catalogue.choices(kind)] for kind in (CODEC, ENHANCER, RECOGNISER, TOKENIZER)}
    assert "random-codec (local)" in names[CODEC]
    assert "random-enhancer (local)" in names[ENHANCER]
    assert {"random-listener (local)", "random-recogniser (local)"} <= set(names[RECOGNISER])
    assert not [name for name in names[TOKENIZER] if name.startswith("random-")]
    assert catalogue.source_of("random-codec", CODEC) == str(models / "random-codec")
    with pytest.raises(mt.InvalidInput, match="is a speech codec, not a tokenizer"):
        catalogue.get("random-codec (local)")
    with pytest.raises(mt.ModelNotFound):
        catalogue.source_of("random-codec")


# What is done with a clip.


def test_shown_code_gives_the_codec_result(catalogue, models, clip, workplace):
    source, seen = str(models / "random-codec"), []
    coded = code_clip(catalogue.get(source, CODEC), source, clip, Job(), seen.append)
    assert coded.num_frames == 100
    assert coded.file_bit_rate == 8 * coded.tokens.num_bytes / 2
    assert {news.what for news in seen} == {"encoding", "decoding"}
    assert seen[-1].share == 1.0
    for repeat, text in ((run_python, code.codec_python(coded)), (run_commands, code.codec_command(coded))):
        repeat(text)
        assert (workplace / "my_voice.mtok").read_bytes() == coded.tokens.to_bytes()
        assert same(workplace / "my_voice-decoded.wav", coded.after)
        (workplace / "my_voice-decoded.wav").unlink()


def test_stop_ends_the_work_at_the_next_step(catalogue, models, tmp_path):
    mt.Waveform(vowels(90), RATE).save(tmp_path / "long.wav")
    clip, job, seen = read_clip(tmp_path / "long.wav", tmp_path, "other.wav"), Job(), []
    source = str(models / "random-codec")

    def stop_at_first(news):
        seen.append(news)
        job.stop()

    with pytest.raises(mt.Cancelled):
        code_clip(catalogue.get(source, CODEC), source, clip, job, stop_at_first)
    assert len(seen) == 1
    assert 0 < seen[0].share < 0.5


def test_noise_is_as_loud_as_asked_and_the_same_each_time(clip):
    mixed = mix(clip, "pink", 5)
    clean, noisy = mixed.clean.samples, mixed.noisy.samples
    ratio = 10 * (clean.square().mean() / (noisy - clean).square().mean()).log10()
    assert float(ratio) == pytest.approx(5, abs=0.05)
    assert torch.equal(mix(clip, "pink", 5).noisy.samples, noisy)
    assert torch.equal(mix(clip, "none", 5).noisy.samples, clean)
    for noise, snr in (("thunder", 5), ("pink", 99), ("pink", None)):
        with pytest.raises(mt.InvalidInput):
            mix(clip, noise, snr)
    with pytest.raises(mt.LimitExceeded, match="mediatok enhance"):
        mix(Clip("long.wav", clip.path, 61, RATE), "none", 0)


@pytest.mark.parametrize("noise", ["pink", "none"])
def test_shown_code_gives_the_enhanced_clip(noise, catalogue, models, clip, workplace):
    source = str(models / "random-enhancer")
    mixed = mix(clip, noise, 3)
    enhanced = enhance_clip(catalogue.get(source, ENHANCER), source, mixed, 11, False, 0.8, Job())
    assert (enhanced.stoi is None) == (noise == "none")
    run_python(code.enhance_python(enhanced))
    assert same(workplace / "my_voice-enhanced.wav", enhanced.after)
    if noise == "pink":
        assert same(workplace / "my_voice-noisy.wav", mixed.noisy)
    (workplace / "my_voice-enhanced.wav").unlink()
    assert "--seed 11 --temperature 0.8" in code.enhance_command(enhanced)
    run_commands(code.enhance_command(enhanced))
    assert same(workplace / "my_voice-enhanced.wav", enhanced.after)


@pytest.mark.parametrize(("name", "hotwords"), [("random-recogniser", ()), ("random-listener", ("cedar", "ember"))])
def test_shown_code_gives_the_transcript(name, hotwords, catalogue, models, clip, workplace):
    source = str(models / name)
    heard = transcribe_clip(catalogue.get(source, RECOGNISER), source, clip, hotwords, Job())
    assert heard.transcript.words
    for repeat, text in ((run_python, code.transcribe_python(heard)), (run_commands, code.transcribe_command(heard))):
        repeat(text)
        assert (workplace / "my_voice.srt").read_text().strip() == heard.transcript.srt().strip()
        (workplace / "my_voice.srt").unlink()


def test_shown_code_speaks_the_same(catalogue, models, workplace):
    source, seen = str(models / "random-voice"), []
    text = "It's raining. " * 30
    spoken = speak_text(catalogue.get(source, SPEAKER), source, text, 5, Job(), seen.append)
    assert len(seen) == 3  # pieces
    assert spoken.text == text.strip()
    for repeat, shown in ((run_python, code.speak_python(spoken)), (run_commands, code.speak_command(spoken))):
        repeat(shown)
        assert same(workplace / "spoken-5.wav", spoken.after)
        (workplace / "spoken-5.wav").unlink()


def test_result_becomes_the_clip_and_mistakes_change_nothing(catalogue, models, tmp_path, recwarn):
    events, session, source = SpeechEvents(Studio(catalogue, tmp_path)), SpeechSession(tmp_path), "random-voice (local)"
    shown = list(events.run_speak(session, source, "  what  is said ", 5, False))
    assert all(len(outputs) == NUM_OUTPUTS["speak"] for outputs in shown)
    assert "progressbar" in shown[0][0]
    assert shown[0][6] == 5
    assert "progressbar" not in shown[-1][0]
    assert "what is said" in shown[-1][4]
    before = dict(session.results)
    for text, seed in (("", 5), ("a" * 501, 5), ("a", -1), ("a", None)):
        assert len(list(events.run_speak(session, source, text, seed, False))) == 1
    assert session.results == before
    assert {str(message.message)[:9] for message in recwarn} == {"Type what", "The text ", "Seed must"}
    clip_outputs = events.use("speak")(session)
    assert session.clip.name == "spoken-5.wav"
    assert clip_outputs[0] == str(session.clip.path)
    assert same(session.clip.path, before["speak"].after)
    folder = session.folder
    session.close()
    assert not folder.exists()


def test_pages_are_apart(tmp_path, clip):
    prototype = SpeechSession(tmp_path)
    one, two = copy.deepcopy(prototype), copy.deepcopy(prototype)
    one.clip = clip
    one.start("codec")
    assert two.clip is None
    assert not two.stop("codec")
    assert not one.is_followed("codec")
    assert two.is_followed("codec")  # nothing to follow
    one.close()
    assert one.clip is None


def test_number_fields_are_checked():
    nan = float("nan")
    for seed in (-1, 2**53, 0.5, nan, None, "3", True):
        with pytest.raises(mt.InvalidInput, match="Seed must be a whole number"):
            checked_seed(seed)
    for temperature in (0, 11, nan, None, "1", True):
        with pytest.raises(mt.InvalidInput, match="Temperature must be a number"):
            checked_temperature(temperature)
    assert (checked_seed(7.0), checked_temperature(1)) == (7, 1.0)
    assert studio_speech_actions.checked_hotwords("a b, c\nc,,") == ("a b", "c")


# Drawings.


def test_figure_draws_any_sound():
    voice, silence = mt.Waveform(vowels(1), RATE), mt.Waveform(torch.zeros(1, 3), 8000)
    for lanes in ([("Before", voice), ("After", None)], [("Before", silence), ("After", voice)], [("Spoken", None)]):
        figure = sound_figure(lanes, hint="Press <b>.")
        assert "nan" not in figure.split("base64")[0].lower()
        assert ("Press &lt;b&gt;." in figure) == (lanes[-1][1] is None)
    ids = torch.arange(3 * TOKEN_COLUMNS)[:, None] * torch.tensor([[1, 7]])
    assert figure.count("mt-lane") == 1
    assert sound_figure([("Before", voice), ("After", voice)], ids).count('class="codes"') == 1


def test_views_escape_and_say_what_is_missing(clip):
    words = (Word("<img onerror=x>", 0.0, 0.4), Word("there", 0.5, 0.9), Word("你", 1.0, 1.2), Word("好", 1.2, 1.4))
    view = studio_speech_views.transcript_view(Transcript(words, 2.0), clip.path)
    assert "<img" not in view["html"]
    assert 'data-start="0.500" data-end="0.900"' in view["html"]
    assert ">你</span><span" in view["html"]  # no space between characters
    assert "Nothing was heard" in studio_speech_views.transcript_view(Transcript((), 2.0), clip.path)["html"]
    assert studio_speech_views.clock(59.96) == "1:00.0"
    noisy = Mixed(clip, "<i>", 5.0, mt.Waveform(vowels(1), RATE), mt.Waveform(vowels(1), RATE))
    assert "<i>" not in studio_speech_views.enhance_numbers(noisy)
    for kind in (CODEC, ENHANCER, RECOGNISER, SPEAKER):
        assert "Models tab" in studio_speech_views.missing(kind, public=False)
        assert "Models tab" not in studio_speech_views.missing(kind, public=True)
    assert studio_speech_views.clip_strip([]) == ""
