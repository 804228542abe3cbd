"""The evaluation report of speech: figures against plain computations, error rates, clips that say nothing."""

import dataclasses
import math

import mediatok as mt
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from mediatok.core.speech_tokenizer import SpeechTokenizer
from mediatok.core.transcript import Transcript, Word
from mediatok.evaluation import error_rates, report, speech, speech_metrics, speech_rate
from mediatok.tokenizers.speech.simcodec import SimCodec

SIZES = {
    "en_filters": 2, "de_filters": 2, "vq_dim": 8, "resblock_kernel_sizes": (3,),
    "resblock_dilation_sizes": ((1, 1, 1),), "n_codes": 64,
}  # fmt: skip


def voice(seconds, rate=16000, seed=0):
    rng = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * rate)) / rate
    phase = 2 * torch.pi * torch.cumsum((120 + 30 * torch.sin(5 * time + seed)) / rate, dim=0)
    tone = sum(torch.sin(k * phase) / k for k in range(1, 20)) * torch.sin(13 * time).clamp(min=0)
    return mt.Waveform(0.2 * tone[None] + 0.01 * torch.randn(1, len(time), generator=rng), rate)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return SimCodec(**SIZES).eval()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    for index, seconds in enumerate((1.0, 1.5, 0.7)):
        voice(seconds, seed=index).save(path / f"clip.{index}.wav")
    return path


def test_figures_equal_a_plain_computation(tokenizer, folder):
    pesq = pytest.importorskip("pesq")
    import pystoi

    result = speech.evaluate_speech(tokenizer, folder)
    expected = {"STOI": [], "extended STOI": [], "PESQ (wide band)": [], "SI-SDR (dB)": []}
    num_bytes = num_tokens = seconds = 0
    for path in sorted(folder.iterdir()):
        clip = mt.read_audio(path)
        tokens = tokenizer.encode(path)
        x = clip.samples[0].double().numpy()
        y = (tokenizer.decode(tokens).samples[0] * 32767).round().div(32767).double().numpy()
        expected["STOI"].append(pystoi.stoi(x, y, 16000))
        expected["extended STOI"].append(pystoi.stoi(x, y, 16000, extended=True))
        expected["PESQ (wide band)"].append(pesq.pesq(16000, x.astype(np.float32), y.astype(np.float32), "wb"))
        x, y = x - x.mean(), y - y.mean()
        target = np.dot(x, y) / np.dot(x, x) * x
        expected["SI-SDR (dB)"].append(10 * np.log10(np.sum(target**2) / np.sum((y - target) ** 2)))
        num_bytes += len(tokens.to_bytes())
        num_tokens += int(tokens.lengths[0])
        seconds += clip.seconds
    for name, values in expected.items():
        assert result.figures[name] == pytest.approx(np.mean(values), abs=2e-3), name
    assert result.figures["bits per second (.mtok files)"] == pytest.approx(8 * num_bytes / seconds)
    assert result.figures["bits per second (ids alone)"] == pytest.approx(6 * num_tokens / seconds)
    assert result.num_tokens == pytest.approx(num_tokens / seconds)
    assert result.figures["seconds coded in a second"] > 0
    assert (result.protocol.modality, result.protocol.num_items, result.protocol.set_name) == ("speech", 3, "set")
    text = str(result)
    for words in ("set: 3 clips", "sha256", "mono, 16,000 samples a second", "rounded to 16 bit", "float32 on cpu"):
        assert words in text


def test_log_mel_distance_is_zero_for_equal_and_grows_with_loudness():
    clip = voice(1.0).samples[0]
    distances = []
    for gain in (1.0, 0.5, 0.25):
        distance = speech.LogMelDistance(16000)
        distance.add(clip, gain * clip)
        distances.append(distance.value)
    assert distances == pytest.approx([0, math.log(2), math.log(4)], abs=0.01)


def test_log_mel_distance_of_blocks_of_any_length():
    clip = voice(3.0).samples[0]
    decoded = clip + 0.01 * torch.randn(len(clip), generator=torch.Generator().manual_seed(1))
    whole, pieces = speech.LogMelDistance(16000), speech.LogMelDistance(16000)
    whole.add(clip, decoded)
    passed = list(pieces.watch(clip.split(7000), (block[None] for block in decoded.split(16000))))
    assert torch.equal(torch.cat(passed, dim=1)[0], decoded)
    assert pieces.value == pytest.approx(whole.value, rel=0.02)
    short = speech.LogMelDistance(16000)
    assert list(short.watch([torch.ones(1)], [torch.ones(1, 1)]))
    assert short.value == 0


def test_clips_that_say_nothing_do_not_count(tokenizer, folder):
    pytest.importorskip("pesq")
    alone = speech.evaluate_speech(tokenizer, folder)
    mt.Waveform(torch.zeros(1, 16000), 16000).save(folder / "silence.wav")
    mt.Waveform(torch.full((1, 1), 0.5), 16000).save(folder / "one_sample.wav")
    result = speech.evaluate_speech(tokenizer, folder)
    for name in ("STOI", "PESQ (wide band)", "SI-SDR (dB)"):
        assert result.figures[name] == pytest.approx(alone.figures[name])
    assert all(math.isfinite(value) for value in result.figures.values())
    assert any("without 2 of 5 clips" in note and "STOI" in note for note in result.notes)
    only_silence = speech.evaluate_speech(tokenizer, [folder / "silence.wav"])
    assert "STOI" not in only_silence.figures
    assert "log-mel distance" in only_silence.figures


def test_missing_packages_are_noted(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(speech_metrics, "is_available", lambda metric: metric == "stoi")
    result = speech.evaluate_speech(tokenizer, folder)
    assert "STOI" in result.figures
    assert not any("PESQ" in name for name in result.figures)
    assert "no PESQ: pip install 'mediatok[pesq]'" in result.notes


def test_dnsmos_on_demand(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(
        speech_metrics, "dnsmos", lambda clip: {"dnsmos_ovrl": 4.0 if clip.samples.abs().max() > 0.3 else 1.0}
    )
    result = speech.evaluate_speech(Quiet(), folder, with_dnsmos=True)
    assert (result.figures["DNSMOS"], result.figures["DNSMOS of the originals"]) == (1.0, 4.0)
    assert "DNSMOS" not in speech.evaluate_speech(tokenizer, folder).figures


@pytest.mark.skipif(not speech_metrics.is_available("dnsmos"), reason="needs the package speechmos")
def test_dnsmos_itself(tokenizer, folder):
    result = speech.evaluate_speech(tokenizer, [folder / "clip.2.wav"], with_dnsmos=True)
    assert 1 <= result.figures["DNSMOS"] <= 5
    assert 1 <= result.figures["DNSMOS of the originals"] <= 5


def test_unreadable_and_long_clips_raise_or_are_left_out(tokenizer, folder, monkeypatch):
    (folder / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(mt.InvalidInput, match=r"bad\.wav"):
        speech.evaluate_speech(tokenizer, folder)
    monkeypatch.setattr(speech, "MAX_CLIP_SECONDS", 1.2)
    failed = {}
    result = speech.evaluate_speech(tokenizer, folder, on_error=lambda path, error: failed.update({path.name: error}))
    assert set(failed) == {"bad.wav", "clip.1.wav"}
    assert "are measured: split it" in str(failed["clip.1.wav"])
    assert result.protocol.num_items == 2
    with pytest.raises(mt.InvalidInput, match="none of the 1"):
        speech.evaluate_speech(tokenizer, [folder / "bad.wav"], on_error=lambda *args: None)


def test_reports_are_compared_only_when_measured_alike(tokenizer, folder, tmp_path):
    result = speech.evaluate_speech(tokenizer, folder)
    result.save(tmp_path / "report.json")
    loaded = report.Report.load(tmp_path / "report.json")
    assert loaded == result
    assert "SI-SDR (dB)" in report.compare(result, loaded)
    other = dataclasses.replace(result, protocol=dataclasses.replace(result.protocol, modality="image"))
    with pytest.raises(mt.InvalidInput, match="modality"):
        report.compare(result, other)


def test_image_and_speech_evaluation_name_each_other(tokenizer, folder):
    with pytest.raises(mt.InvalidInput, match="evaluate_speech"):
        mt.evaluate(tokenizer, folder)
    torch.manual_seed(0)
    picture_tokenizer = mt.KLAutoencoder(64, 2, (8, 8), 1, 4)
    with pytest.raises(mt.InvalidInput, match="no speech tokenizer"):
        speech.evaluate_speech(picture_tokenizer, folder)


class Recogniser(torch.nn.Module):
    """Hears loud clips without a fault, and of others the first word only."""

    name = "by ear"

    def __init__(self, texts):
        super().__init__()
        self.texts, self.threshold = texts, torch.nn.Parameter(torch.tensor(0.05))

    def transcribe(self, clip):
        text = self.texts[clip.samples.shape[1]].upper() + "!"
        loud = clip.samples.abs().max() > self.threshold
        words = text.split() if loud else text.split()[:1]
        return Transcript(tuple(Word(word, 0.0, 1.0) for word in words), clip.seconds)


class Quiet(SpeechTokenizer):
    """Loses what is loud: everything decodes to a whisper."""

    hop_length, vocab_size, context_frames = 320, 4, 1

    @register_to_config
    def __init__(self, sample_rate: int = 16000):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def encode_waveform(self, wave_BT, lengths_B=None):
        return torch.ones(len(wave_BT), wave_BT.shape[1] // 320, dtype=torch.int64)

    def decode_ids(self, ids):
        return 0.001 * torch.sin(torch.arange(ids.shape[1] * 320) * 0.1).expand(len(ids), -1)


def test_error_rates(folder):
    texts = {"clip.0": "the cat, sat", "clip.1": "A dog ran away", "clip.2": "no"}
    (folder / "transcripts.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in texts.items()))
    heard = {16000: texts["clip.0"], 24000: texts["clip.1"], 11200: texts["clip.2"]}
    result = speech.evaluate_speech(Quiet(), folder, recogniser=Recogniser(heard))
    assert result.figures["word error rate (originals)"] == 0
    assert result.figures["word error rate (decoded)"] == pytest.approx(5 / 8)
    # " cat sat" of 11 characters, " dog ran away" of 14, nothing of 2
    assert result.figures["character error rate (decoded)"] == pytest.approx((8 + 13) / (11 + 14 + 2))
    assert set(result.protocol.feature_nets) == {"by ear"}
    assert "transcripts" in result.protocol.settings
    (folder / "transcripts.tsv").write_text("clip.1.wav\ta dog ran away\n")
    result = speech.evaluate_speech(Quiet(), folder, recogniser=Recogniser(heard))
    assert result.figures["word error rate (decoded)"] == pytest.approx(3 / 4)
    assert any("without 2 clips that have no transcript" in note for note in result.notes)


def test_error_rates_need_transcripts(tokenizer, folder, tmp_path):
    ear = Recogniser({})
    with pytest.raises(mt.InvalidInput, match="error rates need what is said"):
        speech.evaluate_speech(tokenizer, folder, recogniser=ear)
    with pytest.raises(mt.InvalidInput, match="none of the clips has a transcript"):
        speech.evaluate_speech(tokenizer, folder, recogniser=ear, transcripts={"other": "text"})
    for content in (b"name without a tab\n", b"a\tb\tc\n", b"caf\xe9\tx\n"):
        (tmp_path / "bad.tsv").write_bytes(content)
        with pytest.raises(mt.InvalidInput, match=r"bad\.tsv"):
            speech.evaluate_speech(tokenizer, folder, recogniser=ear, transcripts=tmp_path / "bad.tsv")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  cat, sat.", "the cat sat"),
        ("«Привет!» — сказал он", "привет сказал он"),
        ("приве\u0301т", "привет"),
        ("don't stop", "dont stop"),
        ("我们，好。", "我们 好"),
        ("", ""),
    ],
)
def test_plain_text(text, plain):
    assert error_rates.plain_text(text) == plain


def test_progress_and_cancel(tokenizer, folder):
    steps = []
    speech.evaluate_speech(tokenizer, folder, on_step=lambda step, total, preview=None: steps.append((step, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]

    def stop(step, total, preview=None):
        raise mt.Cancelled("enough")

    with pytest.raises(mt.Cancelled):
        speech.evaluate_speech(tokenizer, folder, on_step=stop)


def test_rate_beside_opus_and_vorbis(tokenizer, tmp_path):
    clips = [voice(1.0), voice(0.8, rate=44100, seed=1)]
    points = speech_rate.rate_speech(tokenizer, clips)
    rates = [point.bits_per_second for point in points]
    assert rates == sorted(rates)
    assert points[0].codec == "simcodec"
    sizes = [tokenizer.encode(clip).num_bytes for clip in clips]
    assert points[0].bits_per_second == pytest.approx(8 * sum(sizes) / 1.8)
    opus = [point for point in points if point.codec == "Opus"]
    assert len(opus) == len(speech_rate.LEVELS["Opus"])
    assert opus[-1].figures["STOI"] > max(0.8, points[0].figures["STOI"])
    assert opus[-1].figures["log-mel distance"] < opus[0].figures["log-mel distance"]
    table = speech_rate.format_points(points)
    assert len(table.splitlines()) == 1 + len(points)
    speech_rate.plot_speech_rate(points, tmp_path / "plot.png")
    assert mt.read_image(tmp_path / "plot.png").width > 300


def test_rate_with_fewer_codebooks():
    torch.manual_seed(0)
    hificodec = SimCodec(
        **SIZES | {"n_q": 2, "n_code_groups": 2, "architecture": "hificodec", "norm_groups": (1, 1, 1, 1)}
    )
    points = [point for point in speech_rate.rate_speech(hificodec.eval(), [voice(0.6)]) if point.codec == "simcodec"]
    assert [point.setting for point in points] == ["2 codebooks", "4 codebooks"]
    assert points[0].bits_per_second < points[1].bits_per_second


def test_opus_at_a_rate_that_it_does_not_have():
    clip = voice(0.5, rate=44100)
    data = speech_rate.write_ogg(clip, "Opus", 0.9)
    back = speech_rate.fit(mt.read_audio(data), clip)
    assert (back.samples.shape, back.sample_rate) == (clip.samples.shape, 44100)
