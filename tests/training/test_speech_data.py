"""Speech for training: which crop comes when, without any state."""

import json

import numpy as np
import pytest
import torch
from mediatok.core.audio import Waveform, write_audio
from mediatok.core.errors import InvalidInput
from mediatok.training.data import is_held_out
from mediatok.training.speech_data import (
    SpeechDataRecipe,
    SpeechFolder,
    TrainingSpeech,
    speech_batches,
    validation_clips,
)

RATE = 8000


@pytest.fixture
def clips(tmp_path):
    """Clips whose samples say where they come from: clip number in the thousands, then a ramp."""
    folder = tmp_path / "speech"
    (folder / "deep").mkdir(parents=True)
    for number in range(12):
        ramp_T = number * 1000 + torch.arange(400 + 50 * number)
        where = folder / "deep" if number % 2 else folder
        write_audio(Waveform(ramp_T / 2**15, RATE), where / f"c{number:02d}.wav")
    return folder


def speech(folder, seed=0, num_samples=300, **changes):
    recipe = SpeechDataRecipe(train=str(folder), **changes)
    return TrainingSpeech(SpeechFolder(folder), recipe, RATE, num_samples, seed)


def test_each_clip_comes_once_an_epoch_and_crops_differ(clips):
    data = speech(clips)
    numbers, starts = [], []
    for position in range(36):
        crop_T = (data[position] * 2**15).round().int()
        assert crop_T.shape == (300,)
        assert torch.equal(crop_T, crop_T[0] + torch.arange(300))
        numbers.append(int(crop_T[0]) // 1000)
        starts.append(int(crop_T[0]) % 1000)
    for epoch in range(3):
        assert sorted(numbers[epoch * 12 : epoch * 12 + 12]) == list(range(12))
    assert numbers[:12] != numbers[12:24]
    assert len(set(starts)) > 20


def test_a_place_has_one_crop_whatever_came_before(clips):
    one, other = speech(clips), speech(clips, in_memory=False)
    other[31]
    assert torch.equal(one[17], other[17])
    assert not torch.equal(one[17], speech(clips, seed=1)[17])


def test_batches_go_on_anywhere_and_processes_share_them(clips):
    data = speech(clips)
    whole = speech_batches(data, 0, 6)
    batches = [next(whole) for _ in range(4)]
    assert torch.equal(next(speech_batches(data, 3, 6)), batches[3])
    halves = [next(speech_batches(data, 1, 3, process, 2)) for process in (0, 1)]
    assert torch.equal(torch.cat(halves), batches[1])
    workers = speech(clips, num_workers=2)
    loader = speech_batches(workers, 1, 6)
    assert torch.equal(next(loader), batches[1])


def test_short_clips_are_padded_and_gain_is_drawn(clips):
    data = speech(clips, num_samples=700, min_gain=0.25)
    plain = speech(clips, num_samples=700)
    gains = []
    for position in range(12):
        crop_T, plain_T = data[position], plain[position]
        gains.append(float(crop_T.abs().max() / plain_T.abs().max()))
        assert torch.allclose(crop_T, plain_T * gains[-1], atol=1e-6)
    assert 0.25 <= min(gains) < 0.6 < max(gains) <= 1
    short = min(int((plain[position] != 0).sum()) for position in range(12))
    assert short in (399, 400)


def test_splits_by_hash_and_by_manifest(clips):
    parts = {split: {path.stem for path in SpeechFolder(clips, split).paths} for split in ("train", "val")}
    assert parts["val"] == {f"c{number:02d}" for number in range(12) if is_held_out(f"c{number:02d}")}
    assert parts["train"] | parts["val"] == {f"c{number:02d}" for number in range(12)}
    assert not parts["train"] & parts["val"]
    (clips / "splits.json").write_text(json.dumps({"train": ["c00", "c05"], "val": ["c07"], "test": ["c01"]}))
    assert [path.stem for path in SpeechFolder(clips, "train").paths] == ["c00", "c05"]
    assert [path.stem for path in SpeechFolder(clips, "test").paths] == ["c01"]
    assert len(SpeechFolder(clips)) == 12
    (clips / "deep" / "splits.json").write_text(json.dumps({"train": ["c01", "c09"], "val": ["c00"]}))
    assert [path.stem for path in SpeechFolder(clips, "train").paths] == ["c00", "c01", "c09"]  # the nearest one counts
    with pytest.raises(InvalidInput, match="val split"):
        SpeechFolder(clips / "deep", "val")


@pytest.mark.parametrize("text", ["[]", '{"train": [1]}', "{", '{"train": 3}'])
def test_a_bad_manifest_is_named(clips, text):
    (clips / "splits.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"splits\.json"):
        SpeechFolder(clips, "train")


def test_broken_clips_are_skipped(clips, caplog):
    (clips / "c00.wav").write_bytes(b"RIFF")
    data = speech(clips)
    seen = {int((data[position] * 2**15).round()[0]) // 1000 for position in range(12)}
    assert seen == set(range(1, 12))
    assert "c00.wav" in caplog.text
    for path in clips.rglob("*.wav"):
        path.write_bytes(b"RIFF")
    with pytest.raises(InvalidInput, match="in a row"):
        speech(clips, in_memory=True)


def test_no_audio(tmp_path):
    with pytest.raises(InvalidInput, match="not a folder"):
        SpeechFolder(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match="no audio"):
        SpeechFolder(tmp_path)


def test_validation_clips_are_whole_and_resampled(clips):
    found = validation_clips(SpeechFolder(clips), 2 * RATE, 3)
    assert [wave.samples.shape[1] for wave in found] == [2 * (400 + 50 * number) for number in (0, 2, 4)]
    assert found[0].sample_rate == 2 * RATE
    assert np.isclose(float(found[1].samples.mean()), (2000 + 250) / 2**15, rtol=0.05)
