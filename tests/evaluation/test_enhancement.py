"""Enhancement measured before and after, and whose voice it is."""

import mediatok as mt
import pytest
import torch
from mediatok.evaluation.enhancement import STATES, main, measure_enhancement, noisy_clips
from mediatok.evaluation.speaker import MELS, SpeakerEncoder, load_speaker_encoder, mel_energies
from mediatok.training.noise import NoiseRecipe

RATE = 16000
WHITE = NoiseRecipe(snr=(0.0, 0.0), second_noise=0.0, reverb=0.0, clip=0.0, kinds=("white",))


def syllables(seconds, pitch):
    """Something like a voice: harmonics that come and go."""
    time_T = torch.arange(int(seconds * RATE)) / RATE
    tone_T = sum(torch.sin(2 * torch.pi * pitch * k * time_T) / k for k in range(1, 12))
    return mt.Waveform(0.1 * tone_T * torch.sin(2 * torch.pi * 3 * time_T).clamp(min=0), RATE)


class Lossless:
    sample_rate = RATE

    def reconstruct(self, clips):
        return clips


class Oracle:
    """Gives the clean clips back, one after the other."""

    codec = Lossless()

    def __init__(self, clean):
        self.clean = iter(clean)

    def enhance(self, clip, seed):
        return next(self.clean)


def test_an_oracle_gives_what_the_clean_clips_are():
    clean = [syllables(2, 110), syllables(1.5, 180)]
    speaker = SpeakerEncoder(32).eval()
    steps = []
    figures = measure_enhancement(
        Oracle(clean), clean, WHITE, speaker=speaker, on_step=lambda step, total: steps.append((step, total))
    )
    assert tuple(figures) == STATES
    assert steps == [(1, 2), (2, 2)]
    assert figures["enhanced"] == figures["clean"] == figures["codec"]
    assert figures["clean"]["stoi"] == pytest.approx(1, abs=1e-3)
    assert figures["noisy"]["stoi"] < 0.98
    assert figures["clean"]["speaker_similarity"] == pytest.approx(1, abs=1e-5)
    assert abs(figures["noisy"]["si_sdr"]) < 1  # as loud as the noise


def test_noise_is_decided_by_the_seed():
    clean = [syllables(1, 110), syllables(1, 180)]
    first, same, other = (noisy_clips(clean, WHITE, seed) for seed in (0, 0, 1))
    assert torch.equal(first[1].samples, same[1].samples)
    assert not torch.equal(first[1].samples, other[1].samples)


def test_embeddings_are_unit_vectors_whatever_the_length_and_the_loudness():
    torch.manual_seed(0)
    encoder = SpeakerEncoder().eval()
    long = syllables(5, 120)
    for clip in (long, syllables(0.5, 120), mt.Waveform(long.samples * 1e-3, RATE), long.resample(44100)):
        embedded = encoder.embed(clip)
        assert float(embedded.norm()) == pytest.approx(1, abs=1e-5)
    assert encoder.similarity(long, mt.Waveform(long.samples * 1e-3, RATE)) > 0.99
    with pytest.raises(mt.InvalidInput, match="no speaker"):
        encoder.embed(mt.Waveform(torch.zeros(RATE), RATE))


def test_mel_energies_are_those_of_librosa():
    librosa = pytest.importorskip("librosa")
    wave_T = syllables(1, 140).samples[0]
    expected = librosa.feature.melspectrogram(y=wave_T.numpy(), sr=RATE, n_fft=400, hop_length=160, n_mels=MELS)
    assert torch.allclose(mel_energies(wave_T).T, torch.from_numpy(expected), atol=1e-3, rtol=1e-3)


def test_weights_are_read_as_data(tmp_path):
    encoder = SpeakerEncoder()
    torch.save({"step": 1, "model_state": encoder.state_dict(), "optimizer_state": {}}, tmp_path / "pretrained.pt")
    loaded = load_speaker_encoder(tmp_path / "pretrained.pt")
    assert torch.equal(loaded.linear.weight, encoder.linear.weight)
    torch.save({"model_state": {"x": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(mt.InvalidCheckpoint, match="no speaker encoder"):
        load_speaker_encoder(tmp_path / "other.pt")


def test_what_enhances_nothing_is_refused(tmp_path, capsys):
    assert main(["titok-tiny", str(tmp_path)]) == 2
    assert "enhances nothing" in capsys.readouterr().err
