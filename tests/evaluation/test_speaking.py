"""What is understood of texts that are read aloud."""

from types import SimpleNamespace

import mediatok as mt
import pytest
import torch
from mediatok.evaluation.speaking import main, measure_speaking

RATE = 16000


class Mumbler:
    """Says a text as silence as long as the text; the listener below hears all but its last letter."""

    def speak(self, text, seed):
        assert seed in (5, 6)
        return mt.Waveform(torch.zeros(len(text) * 100), RATE)


class Listener:
    texts = {1000: "abcdefghij", 500: "klmno"}  # noqa: RUF012

    def transcribe(self, clips):
        assert all(isinstance(clip, mt.Waveform) for clip in clips)
        return [SimpleNamespace(text=self.texts[clip.samples.shape[1]][: -1 if clip.samples.any() == 0 else None])
                for clip in clips]  # fmt: skip


def test_clips_and_speech_are_measured_alike():
    clips = [mt.Waveform(torch.ones(1000), RATE), mt.Waveform(torch.ones(500), RATE)]
    figures = measure_speaking(Mumbler(), clips, ["Abcdefghij", "klmno!"[:5]], Listener(), seed=5)
    assert figures["recorded"] == {"seconds": pytest.approx(1500 / RATE), "cer": 0}
    assert figures["spoken"] == {"seconds": pytest.approx(1500 / RATE), "cer": pytest.approx(2 / 15)}


def test_what_does_not_speak_is_refused(tmp_path, capsys):
    assert main(["titok-tiny", str(tmp_path), "--recogniser", "paraformer-tiny"]) == 2
    assert "reads nothing aloud" in capsys.readouterr().err


def test_a_folder_without_texts(tmp_path, capsys):
    mt.Waveform(torch.ones(RATE) * 0.1, RATE).save(tmp_path / "a.wav")
    (tmp_path / "transcripts.tsv").write_text("b\tno such clip\n")
    assert main(["speak-tiny", str(tmp_path), "--recogniser", "paraformer-tiny"]) == 2
    assert "no clip of" in capsys.readouterr().err
