"""Clips of any length and in any company give the tokens and samples of one pass over each alone."""

import mediatok as mt
import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from mediatok.core import speech_tokenizer
from mediatok.core.speech_tokenizer import SpeechTokenizer

HOP = 160
LENGTHS = [1, HOP, HOP + 1, 5000, 3 * 16000 + 7, 160_000, 16_000, 16_640]


class Average(SpeechTokenizer):
    """Frames are averages over 5 frames of loudness in 256 steps; decoding smooths over 7."""

    hop_length = HOP
    vocab_size = 256

    @register_to_config
    def __init__(self, sample_rate: int = 16000, context: int | None = 3):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    @property
    def context_frames(self):
        return self.config.context

    def encode_waveform(self, wave_BT, lengths_B=None):
        return self.by_length(wave_BT, lengths_B, self._encode)

    def _encode(self, wave_BT):
        loudness_BL = wave_BT.abs().unflatten(1, (-1, HOP)).mean(-1)
        smooth_BL = F.avg_pool1d(F.pad(loudness_BL, (2, 2))[:, None], 5, 1)[:, 0]
        return (smooth_BL * 255 * self.gain).long().clamp(0, 255)

    def decode_ids(self, ids):
        ids_BL = self.check_ids(ids).double() / 255
        return F.avg_pool1d(F.pad(ids_BL, (3, 3))[:, None], 7, 1)[:, 0].float().repeat_interleave(HOP, dim=1)


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(speech_tokenizer, "WINDOW_SECONDS", 0.5)
    return Average().requires_grad_(False)


@pytest.fixture(scope="module")
def clips():
    rng = torch.Generator().manual_seed(0)
    return [mt.Waveform(torch.rand(1, length, generator=rng), 16000) for length in LENGTHS]


def padded(clip):
    return F.pad(clip.samples, (0, -clip.samples.shape[1] % HOP))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_batch_gives_what_each_clip_gives_alone(tokenizer, clips, batch_size):
    tokens = tokenizer.encode(clips, batch_size=batch_size)
    assert [frame.num_samples for frame in tokens.frames] == LENGTHS
    decoded = tokenizer.decode(tokens, batch_size=batch_size)
    for clip, item, sound in zip(clips, tokens, decoded, strict=True):
        one_pass = tokenizer.encode_waveform(padded(clip))
        assert torch.equal(item.ids, one_pass)
        assert item == tokenizer.encode(clip)
        whole = tokenizer.decode_ids(one_pass)[:, : clip.samples.shape[1]]
        assert torch.allclose(sound.samples, whole, atol=1e-6)
        assert sound.samples.shape == clip.samples.shape
        assert torch.allclose(torch.cat(list(tokenizer.decode_blocks(item)), dim=1), whole, atol=1e-6)


def test_rows_of_a_padded_batch(tokenizer, clips):
    rows = clips[:4]
    wave_BT = torch.cat([F.pad(clip.samples, (0, 5120 - clip.samples.shape[1]), value=9.0) for clip in rows])
    for row, clip in enumerate(rows):  # what lies within the last hop of a row is zero
        wave_BT[row, clip.samples.shape[1] : padded(clip).shape[1]] = 0
    ids_BL = tokenizer.encode_waveform(wave_BT, torch.tensor([clip.samples.shape[1] for clip in rows]))
    for ids_L, clip in zip(ids_BL, rows, strict=True):
        alone_L = tokenizer.encode_waveform(padded(clip))[0]
        assert torch.equal(ids_L[: len(alone_L)], alone_L)
        assert not ids_L[len(alone_L) :].any()


def test_any_rate_and_channels(tokenizer, clips):
    stereo = mt.Waveform(torch.rand(2, 44100, generator=torch.Generator().manual_seed(1)), 44100)
    assert tokenizer.encode(stereo) == tokenizer.encode(stereo.mono().resample(16000))


def test_tokens_through_a_file_and_prefixes(tokenizer, clips, tmp_path):
    tokens = tokenizer.encode(clips[4])
    tokens.save(tmp_path / "a.mtok")
    assert mt.Tokens.load(tmp_path / "a.mtok") == tokens
    assert (tmp_path / "a.mtok").stat().st_size == tokens.num_bytes < 64 + tokens.ids.numel()
    prefix = tokenizer.decode(tokens[:, :10])
    assert prefix.samples.shape == (1, 10 * HOP)
    assert tokenizer.bit_rate == 800


def test_progress_is_in_seconds_and_stops_the_work(tokenizer, clips):
    seen = []
    tokenizer.encode(clips, on_step=lambda step, total, preview=None: seen.append((step, total)))
    assert seen[-1] == (round(sum(LENGTHS) / 16000), round(sum(LENGTHS) / 16000))
    assert seen == sorted(seen)

    def stop(step, total, preview=None):
        raise mt.Cancelled("enough")

    with pytest.raises(mt.Cancelled):
        tokenizer.encode(clips, on_step=stop)


def test_a_clip_that_cannot_be_split(monkeypatch, clips):
    whole = Average(context=None).requires_grad_(False)
    assert torch.equal(whole.encode(clips[5]).ids, whole.encode_waveform(padded(clips[5])))
    monkeypatch.setattr(speech_tokenizer, "MAX_WHOLE_SECONDS", 2.0)
    with pytest.raises(mt.LimitExceeded, match="more than 2 s"):
        whole.encode(clips[5])


def test_bad_input(tokenizer, clips):
    with pytest.raises(mt.InvalidInput, match="no multiple of 160"):
        tokenizer.encode_waveform(torch.zeros(1, 161))
    with pytest.raises(mt.InvalidInput, match=r"float samples \[B, T\]"):
        tokenizer.encode_waveform(torch.zeros(160))
    with pytest.raises(mt.InvalidInput, match="lengths"):
        tokenizer.encode_waveform(torch.zeros(1, 160), torch.tensor([161]))
    with pytest.raises(mt.InvalidInput, match="256"):
        tokenizer.decode_ids(torch.full((1, 3), 256))
    with pytest.raises(mt.InvalidInput, match="int64"):
        tokenizer.decode_ids(torch.zeros(1, 3, 2, dtype=torch.int64))
    with pytest.raises(mt.InvalidInput, match="empty"):
        tokenizer.encode([])
    other = tokenizer.encode(clips[0])
    with pytest.raises(mt.TokenizerMismatch):
        Average(context=9).decode(other)
    with pytest.raises(mt.InvalidInput, match="to call"):
        tokenizer.encode(clips[0], on_step=3)
