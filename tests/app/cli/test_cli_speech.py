"""encode, decode and reconstruct of audio; enhance, transcribe and speak."""

import json
import re

import mediatok as mt
import pytest
import soundfile
import torch
from mediatok.app import cli_media
from mediatok.core import audio, images, registry, speech_tokenizer
from mediatok.evaluation.speech import LogMelDistance


def names(folder, pattern="*"):
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file()}


def records(result):
    assert result.code == 0, result.err
    return json.loads(result.out)["results"]


def test_suffixes_are_those_that_are_read_and_written():
    assert cli_media.AUDIO.suffixes == audio.AUDIO_SUFFIXES
    assert set(cli_media.AUDIO.outputs) == set(audio.WRITERS)
    assert cli_media.PICTURES.suffixes == images.IMAGE_SUFFIXES
    assert set(cli_media.PICTURES.outputs) == set(images.WRITERS)


def test_encode_then_decode_one_file(run, sounds):
    result = run("encode", sounds / "a.wav")
    assert result.code == 0
    assert result.error_lines == []
    assert "1.30 s  65 tokens" in result.out
    tokens = mt.Tokens.load(sounds / "a.mtok")
    assert (tokens.modality, tokens.tokenizer) == ("speech", "simcodec-tiny")
    assert run("decode", sounds / "a.mtok").code == 0
    info = soundfile.info(sounds / "a.decoded.wav")
    assert (info.frames, info.samplerate, info.channels) == (20800, 16000, 1)


def test_files_equal_those_of_the_library(run, sounds, tmp_path):
    assert run("encode", sounds, "--out", "tokens").code == 0
    tokenizer = mt.load("simcodec-tiny")
    for name in ("a.wav", "b.flac", "more/c.ogg"):
        path = (tmp_path / "tokens" / name).with_suffix(".mtok")
        tokens = tokenizer.encode(sounds / name)
        assert path.read_bytes() == tokens.to_bytes()
        assert run("decode", path, "--out", "back.flac").code == 0
        decoded = mt.read_audio("back.flac")
        assert torch.allclose(decoded.samples, tokenizer.decode(tokens).samples, atol=2**-14)


def test_folder_keeps_its_structure(run, sounds, tmp_path):
    assert run("encode", sounds).code == 0
    assert names(tmp_path, "*.mtok") == {"sounds-tokens/a.mtok", "sounds-tokens/b.mtok", "sounds-tokens/more/c.mtok"}
    result = run("decode", "sounds-tokens", "--out", "back")
    assert result.code == 0
    assert names(tmp_path / "back") == {"a.wav", "b.wav", "more/c.wav"}
    assert "decoded 3 clips with simcodec-tiny: 3.1 s" in result.out
    assert run("reconstruct", sounds).code == 0
    assert names(tmp_path / "sounds-reconstructed") == {"a.wav", "b.wav", "more/c.wav"}


def test_reconstruct_tells_bits_and_distance(run, sounds, monkeypatch):
    (whole,) = records(run("reconstruct", sounds / "a.wav", "--json"))
    assert whole["bits_per_second"] == pytest.approx(8 * whole["bytes"] / 1.3, abs=0.1)
    tokenizer = mt.load("simcodec-tiny")
    original, decoded = mt.read_audio(sounds / "a.wav"), tokenizer.reconstruct(sounds / "a.wav")
    distance = LogMelDistance(16000)
    distance.add(original.samples[0], decoded.samples[0])
    assert whole["log_mel_distance"] == pytest.approx(distance.value, abs=1e-4)
    # In windows: the same file, and nearly the same distance.
    before = (sounds / "a.reconstructed.wav").read_bytes()
    monkeypatch.setattr(speech_tokenizer, "WINDOW_SECONDS", 0.5)
    (pieces,) = records(run("reconstruct", sounds / "a.wav", "--json"))
    assert pieces["log_mel_distance"] == pytest.approx(distance.value, rel=0.05)
    after, before = (mt.read_audio(data).samples for data in ((sounds / "a.reconstructed.wav").read_bytes(), before))
    assert torch.allclose(after, before, atol=2**-14)


def test_own_results_are_not_read_again(run, sounds):
    run("encode", sounds / "a.wav")
    run("decode", sounds / "a.mtok")
    run("reconstruct", sounds / "a.wav")
    run("enhance", sounds / "a.wav")
    assert names(sounds, "a.*") == {"a.wav", "a.mtok", "a.decoded.wav", "a.reconstructed.wav", "a.enhanced.wav"}
    assert len(records(run("encode", sounds, "--json"))) == 3


def test_file_with_several_clips(run, sounds, tmp_path):
    mt.load("simcodec-tiny").encode([sounds / "a.wav", sounds / "b.flac"]).save("both.mtok")
    assert run("decode", "both.mtok").code == 0
    assert names(tmp_path, "both.*") == {"both.mtok", "both.decoded-1.wav", "both.decoded-2.wav"}


def test_pictures_and_speech_decode_in_one_call(run, sounds, photos):
    for path in (photos / "a.png", sounds / "a.wav"):
        run("encode", path, "--out", f"t/{path.name}.mtok")
    result = run("decode", "t")
    assert result.code == 0
    assert names(photos.parent / "t-decoded") == {"a.png.png", "a.wav.wav"}
    assert "bits/pixel" in result.out
    assert "bits/s" in result.out
    assert run("decode", "t/a.png.mtok", "--out", "x.wav").code == 2
    assert run("decode", "t/a.wav.mtok", "--out", "x.png").code == 2
    assert run("decode", "t/a.wav.mtok", "--text", "hello").code == 2


def test_the_model_chooses_what_a_folder_means(run, sounds, photos):
    (photos / "a.png").rename(sounds / "picture.png")
    result = run("encode", sounds)
    assert result.code == 2
    assert "--model" in result.error_lines[0]
    assert len(records(run("encode", sounds, "--model", "simcodec-tiny", "--json"))) == 3
    assert len(records(run("encode", sounds, "--model", "titok-tiny", "--json"))) == 1


def test_other_media_are_refused(run, sounds, photos, shipped):
    cases = {
        ("encode", photos / "a.png", "--model", "simcodec-tiny"): "this is a picture, and simcodec-tiny reads audio",
        ("reconstruct", photos / "a.png", "--model", shipped / "simcodec-tiny"): "reads audio files",
        ("encode", sounds / "a.wav", "--model", "titok-tiny"): "this is audio, and titok-tiny reads pictures",
        ("encode", sounds / "a.wav", photos / "a.png"): "pictures and audio files; give them in two calls",
        ("encode", sounds / "a.wav", "--model", "paraformer-tiny"): "`mediatok transcribe` writes down speech",
        ("encode", sounds / "a.wav", "--model", "gense-tiny"): "`mediatok enhance` cleans speech",
        ("enhance", sounds / "a.wav", "--model", "simcodec-tiny"): "is a tokenizer",
        ("enhance", photos / "a.png"): "this is a picture, and gense-tiny reads audio files",
        ("transcribe", sounds / "a.wav", "--model", "gense-tiny"): "cleans speech (`mediatok enhance`)",
        ("generate", "gense-tiny"): "cleans speech",
        ("generate", "maskgit-tiny", "--tokenizer", "simcodec-tiny"): "",
        ("evaluate", sounds / "a.wav", "--model", "titok-tiny"): "reads pictures",
        ("rate", photos / "a.png", "--model", "simcodec-tiny"): "reads audio",
        ("reconstruct", sounds / "a.wav", "--model", shipped / "semantic"): "no sound of their own",
    }
    before = names(photos.parent)
    for arguments, words in cases.items():
        result = run(*arguments)
        assert result.code == 2, arguments
        assert len(result.error_lines) == 1, result.err
        assert words in result.error_lines[0]
    assert names(photos.parent) == before


@pytest.mark.parametrize(
    "option", [("--tile",), ("--num-tokens", "3"), ("--target-psnr", "20"), ("--max-bytes", "100"), ("--text", "a cat")]
)
@pytest.mark.parametrize("command", ["encode", "reconstruct", "evaluate", "rate"])
def test_options_of_pictures_are_refused(run, sounds, command, option):
    before = names(sounds.parent)
    result = run(command, sounds / "a.wav", *option)
    assert result.code == 2
    assert len(result.error_lines) == 1
    assert option[0] in result.error_lines[0]
    assert names(sounds.parent) == before


def test_continued_tokens_of_a_prefix_decode(run, sounds):
    mt.load("simcodec-tiny").encode(sounds / "a.wav")[:, :10].save("short.mtok")
    (record,) = records(run("decode", "short.mtok", "--json"))
    assert record["seconds"] == 0.2
    assert soundfile.info("short.decoded.wav").frames == 3200


def test_info_and_models(run, sounds):
    run("encode", sounds / "a.wav", "--out", "a.mtok")
    codec, recogniser, enhancer, file = records(
        run("info", "simcodec-tiny", "paraformer-tiny", "gense-tiny", "a.mtok", "--json")
    )
    assert (file["modality"], file["samples"], file["seconds"]) == ("speech", 20800, 1.3)
    assert file["fingerprint"] == codec["fingerprint"]
    assert (codec["sample_rate"], codec["tokens_per_second"], codec["bits_per_second"]) == (16000, 50, 300)
    assert codec["modality"] == recogniser["modality"] == enhancer["modality"] == "speech"
    assert "mediatok transcribe" in recogniser["does"]
    assert enhancer["codec"] == "simcodec-tiny"
    assert re.search(r"simcodec-tiny +speech +tokenizer", run("models").out)
    assert {row["name"] for row in json.loads(run("models", "--json").out) if row["modality"] == "speech"} >= {
        "simcodec-tiny", "gense-tiny", "paraformer-tiny",
    }  # fmt: skip


def test_released_speech_models_are_described_without_weights(run):
    for entry in registry.models():
        if entry.modality == "speech" and entry.status == "needs download":
            assert run("info", entry.name).code == 0


def test_enhance(run, sounds, tmp_path):
    first = records(run("enhance", sounds, "--seed", "5", "--json"))
    assert names(tmp_path / "sounds-enhanced") == {"a.wav", "b.wav", "more/c.wav"}
    assert [record["seconds"] for record in first] == [1.3, 0.8, 1.0]
    enhancer = mt.load("gense-tiny")
    expected = enhancer.enhance(sounds / "b.flac", seed=5)
    assert torch.allclose(mt.read_audio("sounds-enhanced/b.wav").samples, expected.samples, atol=2**-14)
    (drawn,) = records(run("enhance", sounds / "a.wav", "--out", "x.flac", "--json"))
    assert run("enhance", sounds / "a.wav", "--out", "y.flac", "--seed", drawn["seed"]).code == 0
    assert (tmp_path / "x.flac").read_bytes() == (tmp_path / "y.flac").read_bytes()
    (greedy,) = records(run("enhance", sounds / "a.wav", "--greedy", "--out", "z.ogg", "--json"))
    assert greedy["seed"] is None
    for option in (("--temperature", "0"), ("--temperature", "nan"), ("--seed", "-1"), ("--out", "a.txt")):
        assert len(run("enhance", sounds / "a.wav", *option).error_lines) == 1


def test_transcribe_prints(run, sounds):
    expected = mt.load("paraformer-tiny").transcribe(sounds / "a.wav")
    assert len(expected.words) > 2
    result = run("transcribe", sounds / "a.wav")
    assert (result.code, result.out) == (0, expected.text + "\n")
    assert run("transcribe", sounds / "a.wav", "--format", "srt").out.strip() == expected.srt().strip()
    line = json.loads(run("transcribe", sounds / "a.wav", "--format", "json").out)
    assert line == {"input": str(sounds / "a.wav")} | json.loads(expected.json())
    lines = run("transcribe", sounds).out.splitlines()
    assert lines[0] == f"a\t{expected.text}"
    assert [line.split("\t")[0] for line in lines] == ["a", "b", "c"]
    assert len(run("transcribe", sounds, "--format", "json").out.splitlines()) == 3


@pytest.mark.parametrize(("style", "suffix"), [("text", "txt"), ("json", "json"), ("srt", "srt")])
def test_transcribe_writes(run, sounds, tmp_path, style, suffix):
    assert run("transcribe", sounds, "--format", style, "--out", "said").code == 0
    assert names(tmp_path / "said") == {f"a.{suffix}", f"b.{suffix}", f"more/c.{suffix}"}
    assert run("transcribe", sounds / "a.wav", "--format", style, "--out", f"x.{suffix}").code == 0
    assert (tmp_path / f"x.{suffix}").read_bytes() == (tmp_path / f"said/a.{suffix}").read_bytes()


def test_transcribe_refuses(run, sounds):
    for arguments in (
        (sounds, "--format", "srt"),
        (sounds / "a.wav", "--format", "pdf"),
        (sounds / "a.wav", "--hotwords", " , "),
        (sounds / "a.wav", "--hotwords", "cat"),  # this model has no head for them
        (sounds / "a.wav", "--out", "a.pdf"),
        (sounds / "missing.wav",),
    ):
        result = run("transcribe", *arguments)
        assert result.code == 2, arguments
        assert len(result.error_lines) == 1, result.err
        assert result.out == ""


def test_speak(run, tmp_path):
    (record,) = records(run("speak", "Hello, there.", "--seed", "3", "--json"))
    sound = mt.read_audio("speech.wav")
    assert (record["output"], record["seed"], record["seconds"]) == ("speech.wav", 3, round(sound.seconds, 4))
    expected = mt.load("speak-tiny").speak("Hello, there.", seed=3)
    assert torch.allclose(sound.samples, expected.samples, atol=2**-14)
    (tmp_path / "text.txt").write_text("Hello, there.", encoding="utf-8")
    assert run("speak", "--file", "text.txt", "--seed", "3", "--out", "x.wav").code == 0
    assert (tmp_path / "x.wav").read_bytes() == (tmp_path / "speech.wav").read_bytes()
    assert run("speak", "there", "--overwrite", "--temperature", "0").code == 0
    assert run("info", "speak-tiny").code == 0


def test_speak_refuses(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "there.wav").write_bytes(b"x")
    before = names(tmp_path)
    for arguments in (
        (),
        ("text", "--file", "blank.txt"),
        ("",),
        ("--file", "blank.txt"),
        ("--file", "latin.txt"),
        ("--file", "missing.txt"),
        ("text", "--out", "x.mp3"),
        ("text", "--out", "there.wav"),
        ("there", "--temperature", "nan"),
        ("there", "--temperature", "11"),
        ("there 世界",),  # characters that this model does not know
        ("...",),
    ):
        result = run("speak", *arguments)
        assert result.code == 2, arguments
        assert len(result.error_lines) == 1, result.err
    assert names(tmp_path) == before
