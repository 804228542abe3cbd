"""Agreement of tokens with phones."""

import math

import mediatok as mt
import pytest
import torch
from mediatok.evaluation.phones import agreement, main, measure_phones, read_segments


def test_tokens_that_tell_the_phone():
    figures = agreement([3, 3, 1, 2, 2], ["a", "a", "b", "c", "c"])
    assert figures["phone_purity"] == 1
    assert figures["pnmi"] == pytest.approx(1)
    assert (figures["frames"], figures["phones"], figures["tokens_used"]) == (5, 3, 3)


def test_tokens_that_tell_nothing():
    figures = agreement([0, 0, 1, 1], ["a", "b", "a", "b"])
    assert figures["pnmi"] == pytest.approx(0)
    assert figures["phone_purity"] == figures["commonest_phone"] == 0.5


def test_half_of_the_information():
    figures = agreement([0, 0, 1, 1], ["a", "b", "c", "d"])
    assert figures["pnmi"] == pytest.approx(math.log(2) / math.log(4))


def test_nothing_to_tell_apart():
    with pytest.raises(mt.InvalidInput, match="1 phones in 2 frames"):
        agreement([0, 1], ["a", "a"])


class Loudness:
    """Token 1 where a frame is loud."""

    frame_rate, name, num_codebooks = 50.0, "loudness", 1

    def encode(self, path):
        samples = mt.read_audio(path).samples[0]
        frames = samples[: len(samples) // 320 * 320].view(-1, 320)
        ids = (frames.abs().amax(dim=1) > 0.1).long()
        return type("Encoded", (), {"ids": ids[None]})


@pytest.fixture
def folder(tmp_path):
    wave = torch.zeros(16000)
    wave[4000:12000] = 0.5
    mt.Waveform(wave, 16000).save(tmp_path / "wav.wav")
    (tmp_path / "phones").mkdir()
    (tmp_path / "phones" / "wav.tsv").write_text("0\t0.25\tpau\n0.25\t0.75\ta\n0.75\t0.9\tpau\n")
    return tmp_path


def test_frames_are_compared_with_the_phone_in_their_middle(folder):
    figures = measure_phones(Loudness(), folder)
    assert figures["frames"] == 45  # those past the last phone do not count
    assert figures["phone_purity"] > 0.95


def test_bad_files(folder, capsys):
    (folder / "phones" / "wav.tsv").write_text("0\t0.25\n")
    with pytest.raises(mt.InvalidInput, match="does not tell the phones"):
        read_segments(folder / "phones" / "wav.tsv")
    (folder / "phones" / "wav.tsv").unlink()
    with pytest.raises(mt.InvalidInput, match="does not tell the phones"):
        measure_phones(Loudness(), folder)
    assert main(["titok-tiny", str(folder)]) == 2
    assert "no speech tokenizer" in capsys.readouterr().err
