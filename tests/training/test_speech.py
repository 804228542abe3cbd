"""Speech models train through the same loop: exact resume, masks and noise that repeat, vocabularies, export."""

import copy
import json
import math
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.core.audio import Waveform, write_audio
from mediatok.core.errors import InvalidInput, InvalidRecipe
from mediatok.generators.paraformer import Paraformer
from mediatok.tokenizers.speech.semantic import SemanticTokenizer
from mediatok.tokenizers.speech.simcodec import SimCodec
from mediatok.training import speech
from mediatok.training.alignment import token_ends
from mediatok.training.checkpoint import load_checkpoint, whole_checkpoints
from mediatok.training.clusters import fit_clusters
from mediatok.training.export import export_run
from mediatok.training.noise import NoiseRecipe
from mediatok.training.noisy_speech import NoisySpeech
from mediatok.training.paraformer_training import alignment_loss, measure_features, scaled_within
from mediatok.training.recipe import check_recipe
from mediatok.training.semantic_training import CepstralTargets, masked_spans
from mediatok.training.speak_training import character_durations
from mediatok.training.speech_data import SpeechDataRecipe, SpeechFolder, TrainingSpeech
from mediatok.training.speech_recipe import SCHEMAS, is_speech_recipe, load_speech_recipe
from mediatok.training.text import SpokenFolder, alphabet_of, character_tokens, read_transcripts, spoken
from mediatok.training.utterances import ByLength, TrainingUtterances, UtteranceDataRecipe, padded_batch

RATE = 16000
TEXTS = ("Да.", "Нет!", "Кто-то, да?", "Ёж — не еж", "О, да", "Там")
SEMANTIC = {
    "layer": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (8,) * 7,
    "pos_conv_kernel": 4, "pos_conv_groups": 2, "num_buckets": 8, "max_distance": 16,
}  # fmt: skip
CODEC = {"en_filters": 2, "de_filters": 2, "vq_dim": 8, "n_codes": 16, "resblock_kernel_sizes": (3,),
         "resblock_dilation_sizes": ((1,),)}  # fmt: skip
SIZES = {
    "SemanticTokenizer": SEMANTIC,
    "GenSE": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "s2s_positions": 1064},
    "Paraformer": {
        "width": 16, "encoder_depth": 1, "encoder_heads": 2, "encoder_mlp_width": 16, "decoder_depth": 1,
        "decoder_heads": 2, "decoder_mlp_width": 16, "num_mels": 20, "stack": 3, "stride": 2, "ctc_weight": 0.1,
        "timestamp_times": 3,
    },
    "Speak": {
        "width": 16, "encoder_depth": 1, "encoder_heads": 2, "encoder_mlp_width": 16, "decoder_depth": 1,
        "decoder_heads": 2, "decoder_mlp_width": 16,
    },
}  # fmt: skip


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Fourteen noisy tones of 0.3 to 0.6 s, with texts: ten to train on, four to validate."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    lines, names = [], [f"c{number:02d}" for number in range(14)]
    for number, name in enumerate(names):
        time_T = np.arange(4800 + 350 * number) / RATE
        wave_T = 0.3 * np.sin(2 * np.pi * (150 + 40 * number) * time_T) + 0.05 * rng.standard_normal(len(time_T))
        write_audio(Waveform(torch.from_numpy(wave_T.astype(np.float32)), RATE), folder / f"{name}.wav")
        lines.append(f"{name}\t{TEXTS[number % len(TEXTS)]}")
    (folder / "transcripts.tsv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "splits.json").write_text(json.dumps({"train": names[:10], "val": names[10:], "test": []}))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of a small semantic tokenizer, codec and recogniser with random weights."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    SemanticTokenizer(**SEMANTIC, num_clusters=12).save_pretrained(folder / "semantic")
    SimCodec(**CODEC).save_pretrained(folder / "codec")
    tokens = character_tokens([spoken(text) for text in TEXTS])
    recogniser = Paraformer(tokens=tokens, vocab_size=len(tokens), **SIZES["Paraformer"])
    recogniser.save_pretrained(folder / "recogniser")
    return folder


@pytest.fixture
def make_values(clips, tokenizers, tmp_path):
    def values(class_name, **changes):
        recipe = {
            "name": "tiny",
            "output": str(tmp_path / "run"),
            "model": {"class_name": class_name, "config": SIZES[class_name]},
            "data": {"train": str(clips)},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2, "muon": True},
            "run": {
                "steps": 8, "batch_size": 4, "log_every": 1, "validate_every": 0, "sample_every": 0,
                "checkpoint_every": 4, "num_samples": 2,
            },
        }  # fmt: skip
        if class_name in ("SemanticTokenizer", "GenSE"):
            recipe["data"] |= {"seconds": 0.4, "min_gain": 0.5}
        if class_name == "SemanticTokenizer":
            recipe |= {"targets": {"num_targets": 8}}
        if class_name == "GenSE":
            recipe |= {"semantic": str(tokenizers / "semantic")}
        if class_name in ("GenSE", "Speak"):
            recipe |= {"codec": str(tokenizers / "codec")}
        if class_name == "Speak":
            recipe |= {"recogniser": str(tokenizers / "recogniser")}
        for section, change in changes.items():
            recipe[section] = recipe[section] | change if isinstance(change, dict) else change
        return recipe

    return values


def trainer_of(values):
    return speech.speech_trainer(check_recipe(copy.deepcopy(values), SCHEMAS[values["model"]["class_name"]]))


def run(values, output, stop_at=None):
    """Train to the end, or until the checkpoint of step `stop_at`; the last checkpoint's contents."""
    trainer = trainer_of(values | {"output": str(output)})
    save = trainer.save

    def save_and_stop():
        save()
        if trainer.step == stop_at:
            raise Interrupted

    trainer.save = save_and_stop
    if stop_at is None:
        trainer.run()
    else:
        with pytest.raises(Interrupted):
            trainer.run()
    return load_checkpoint(whole_checkpoints(Path(output) / "checkpoints")[-1])


@pytest.mark.parametrize("class_name", [*SIZES, "GenSE, aligned, with crops that come again"])
def test_four_and_four_steps_equal_eight(make_values, tmp_path, class_name):
    values = make_values(class_name.split(",")[0])
    if "," in class_name:
        config = SIZES["GenSE"] | {"hidden_size": 32, "num_attention_heads": 4}
        values |= {"crops": 6, "model": {"class_name": "GenSE", "config": config, "aligned_start": True}}
    tensors, state = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at=4)
    again, state_again = run(values, tmp_path / "parts")
    for file, content in tensors.items():
        assert content.keys() == again[file].keys()
        for name, value in content.items():
            assert torch.equal(value, again[file][name]), f"{file}: {name}"
    assert any(name.endswith("/momentum_buffer") for name in tensors["optimizer"])
    assert state["samples_seen"] == state_again["samples_seen"] == 32
    first, second = (mt.load(tmp_path / name / "model").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("class_name", SIZES)
def test_what_is_exported_works(make_values, clips, tmp_path, class_name):
    values = make_values(class_name, run={"steps": 4, "validate_every": 4, "sample_every": 4})
    run(values, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    figures = next(line for line in log if any(name.startswith("val_") for name in line))
    assert all(math.isfinite(value) for value in figures.values())
    model = mt.load(tmp_path / "run" / "model")
    exported = mt.load(export_run(tmp_path / "run", tmp_path / "exported"))
    assert model.state_dict().keys() == exported.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in exported.state_dict().items())
    clip = clips / "c12.wav"
    if class_name == "SemanticTokenizer":
        assert model.vocab_size == 0
        assert model.features(torch.zeros(1, 640)).shape == (1, 2, 16)
        assert "val_clean_masked_accuracy" in figures
    elif class_name == "GenSE":
        assert model.enhance(clip, seed=0).samples.shape[1] == 4800 + 350 * 12
        assert (tmp_path / "run" / "samples" / "step_00000004.wav").is_file()
    elif class_name == "Speak":
        assert model.speak("Да, ёж!", seed=0).sample_rate == RATE
        assert figures["val_cer"] >= 0
        assert (tmp_path / "run" / "samples" / "step_00000004.wav").is_file()
    else:
        assert set(model.transcribe(clip).text.replace(" ", "")) <= set("данеткожмё")
        assert figures["val_cer"] >= 0
        assert (tmp_path / "run" / "samples" / "step_00000004.txt").is_file()


@pytest.mark.parametrize("class_name", ["Paraformer", "SemanticTokenizer"])
def test_a_run_may_start_from_a_model(make_values, tmp_path, class_name):
    run(make_values(class_name, run={"steps": 4}), tmp_path / "run")
    values = make_values(class_name) | {
        "model": {"class_name": class_name, "init_from": str(tmp_path / "run" / "model")}, "output": str(tmp_path / "b")
    }  # fmt: skip
    trainer = trainer_of(values)
    ours = trainer.raw_model.get_submodule(trainer.exported_part).state_dict()
    assert all(
        torch.equal(value, ours[name]) for name, value in mt.load(tmp_path / "run" / "model").state_dict().items()
    )


def test_the_loss_of_paraformer_falls(make_values, tmp_path):
    values = make_values("Paraformer", run={"steps": 60}, optimizer={"lr": 1e-2}, data={"speeds": []})
    run(values, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["total_loss"] for line in log]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("trains", ["n2s", "s2s"])
def test_one_language_model_is_trained_alone(make_values, trains):
    trainer = trainer_of(
        make_values("GenSE", model={"trains": trains, "class_name": "GenSE", "config": SIZES["GenSE"]})
    )
    before = copy.deepcopy(trainer.raw_model.state_dict())
    batches = trainer.open_batches(0)
    trainer.step = 2  # the first step's rate is 0
    trainer._step(batches)
    for name, value in trainer.raw_model.state_dict().items():
        is_trained = name.startswith(f"model.{trains}.")
        assert is_trained or torch.equal(value, before[name])
        assert not is_trained or value.ndim < 2 or not torch.equal(value, before[name])


def test_noise_is_a_function_of_the_position(clips):
    recipe = SpeechDataRecipe(train=str(clips), seconds=0.3)
    data = [
        NoisySpeech(TrainingSpeech(SpeechFolder(clips), recipe, RATE, 4800, seed=3), NoiseRecipe(), share=0.5)
        for _ in range(2)
    ]
    data[0][5]
    pairs = [data[0][position] for position in range(20)]
    for position, (clean_T, noisy_T) in reversed(list(enumerate(pairs))):
        again = data[1][position]
        assert torch.equal(clean_T, again[0])
        assert torch.equal(noisy_T, again[1])
    assert 2 < sum(torch.equal(*pair) for pair in pairs) < 18


def test_masked_spans_have_their_length_and_every_row_has_one():
    rng = torch.Generator().manual_seed(0)
    masked = masked_spans(200, 100, 0.08, 10, rng)
    assert masked.any(dim=1).all()
    assert 0.45 < float(masked.float().mean()) < 0.6  # 1 - 0.92^10, a little less at the beginning
    rare = masked_spans(50, 40, 1e-9, 10, rng)
    for row in rare.int().tolist():
        first, count = row.index(1), sum(row)
        assert row[first : first + count] == [1] * count
        assert count == 10 or first + count == 40


def test_targets_are_one_a_frame_and_tell_sounds_apart():
    targets = CepstralTargets(RATE, 320, 4)
    rng = torch.Generator().manual_seed(0)
    tone = torch.sin(torch.arange(16000) * 0.3) * 0.3
    noise = 0.1 * torch.randn(16000, generator=rng)
    wave = torch.stack([tone, noise])
    targets.fit(targets.features(wave).flatten(0, 1), rng)
    ids = targets(wave)
    assert ids.shape == (2, 50)
    assert not set(ids[0, 3:-3].tolist()) & set(ids[1, 3:-3].tolist())


def test_clusters_find_separate_heaps():
    rng = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = torch.cat([centre + 0.1 * torch.randn(50, 2, generator=rng) for centre in centres])
    found = fit_clusters(points, 3, rng)
    assert float(torch.cdist(centres, found).min(dim=1).values.max()) < 0.1
    assert fit_clusters(torch.zeros(5, 2), 3, rng).isfinite().all()
    with pytest.raises(InvalidInput, match="too few"):
        fit_clusters(points[:2], 3, rng)


def test_features_are_normalized_by_the_training_set(make_values):
    trainer = trainer_of(make_values("Paraformer", data={"speeds": []}))
    frontend, data = trainer.raw_model.model.frontend, trainer.data
    features = torch.cat([frontend(data.clip(index)[0][None])[0][0] for index in range(len(data))])
    assert float(features.mean(dim=0).abs().max()) < 1e-3
    assert float((features.std(dim=0, unbiased=False) - 1).abs().max()) < 1e-2
    before = frontend.cmvn.clone()
    measure_features(frontend, data)
    assert torch.equal(frontend.cmvn, before)


def test_texts_become_words_and_tokens(tmp_path):
    assert spoken("«Кто-то» сказал: Don't 'go', 42!") == "кто то сказал don't go 42"
    tokens = character_tokens(["да ёж", "字"])
    assert tokens == ("<blank>", "<s>", "</s>", "а", "а@@", "д", "д@@", "ж", "ж@@", "ё", "ё@@", "字", "<unk>")
    path = tmp_path / "transcripts.tsv"
    path.write_text("a\tДа.\n\nb\t...\n", encoding="utf-8")
    assert read_transcripts(path) == {"a": "Да.", "": "", "b": "..."}
    assert alphabet_of(["Да. (нет)!", "Ёж"]) == " !.адежнтё"
    path.write_text("a да\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"line 1.*a tab"):
        read_transcripts(path)
    path.write_bytes(b"a\t\xff\n")
    with pytest.raises(InvalidInput, match="UTF-8"):
        read_transcripts(path)


def test_the_vocabulary_writes_what_it_was_made_of(make_values):
    trainer = trainer_of(make_values("Paraformer"))
    vocabulary = trainer.raw_model.model.vocabulary
    for text in trainer.source.texts:
        ids = vocabulary.encode(text)
        assert len(ids) == len(text.replace(" ", ""))
        assert " ".join(word.text for word in vocabulary.words(ids, [(0, 0)] * len(ids))) == text


def test_batches_hold_clips_of_about_one_length():
    lengths = np.random.default_rng(0).uniform(1, 20, 500)
    source = ByLength(lengths, 8)
    order = source.order(np.random.default_rng(1))
    assert len(order) == len(source) == 496
    assert len(set(order.tolist())) == 496
    spread = np.ptp(lengths[order.reshape(-1, 8)], axis=1).mean()
    assert spread < 0.25 * np.ptp(lengths[np.arange(496).reshape(-1, 8)], axis=1).mean()
    means = lengths[order.reshape(-1, 8)].mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # and the batches come in no order
    with pytest.raises(InvalidRecipe, match="more than there are"):
        ByLength(lengths[:3], 4)


def test_utterances_change_speed_and_leave_out_what_is_too_long(clips):
    source = SpokenFolder(clips, "train")
    recipe = UtteranceDataRecipe(train=str(clips), max_seconds=0.45, speeds=(0.8, 1.25))
    data = TrainingUtterances(source, recipe, RATE, 2, seed=0)
    assert 0 < len(data) < len(source)
    items = [data[position] for position in range(2 * (len(data) // 2 * 2))]
    ratios = {round(len(wave) / len(data.clip(data.order.index(i))[0]), 2) for i, (wave, _) in enumerate(items)}
    assert ratios == {0.8, 1.25}
    rows, (lengths, texts) = padded_batch(items[:2])
    assert rows.shape == (2, int(lengths.max()))
    assert texts == [items[0][1], items[1][1]]


def test_a_broken_clip_gives_way_to_a_whole_one_with_its_text(tmp_path, clips):
    for path in sorted(clips.glob("*.wav"))[:4]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "transcripts.tsv").write_text("c00\tа\nc01\tб\nc02\tв\nc03\tг\n", encoding="utf-8")
    source = SpokenFolder(tmp_path)
    data = TrainingUtterances(source, UtteranceDataRecipe(train=str(tmp_path), in_memory=False), RATE, 1, 0)
    (tmp_path / "c01.wav").write_bytes(b"RIFF")
    assert data.clip(1)[1] == "в"
    assert torch.equal(data.clip(1)[0], data.clip(2)[0])


def test_rates_are_led_to_where_ctc_hears_the_tokens():
    log_probs = torch.full((2, 9, 4), -9.0)
    heard = [0, 0, 3, 3, 0, 2, 0, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]
    for row, ids in enumerate(heard):
        log_probs[row, torch.arange(9), torch.tensor(ids)] = -0.1
    ids, counts = torch.tensor([[3, 2, 2], [1, 1, 1]]), torch.tensor([3, 3])
    ends, sure = token_ends(log_probs, torch.tensor([9, 4]), ids, counts, ends_with_eos=False)
    assert ends[0].nonzero()[:, 0].tolist() == [2, 5, 7]
    assert float(sure[0]) == pytest.approx(math.exp(-0.1))
    assert not ends[1].any()
    assert float(sure[1]) == 0
    rates = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    scaled = scaled_within(rates, ends, sure > 0)
    assert scaled[0].cumsum(0)[[2, 5, 7, 8]].tolist() == pytest.approx([1, 2, 3, 3])
    assert torch.equal(scaled[1], rates[1])
    sharp = ends.float()
    assert float(alignment_loss(sharp, ends, torch.tensor([9, 4]), sure)) < 1e-2
    assert float(alignment_loss(rates, ends, torch.tensor([9, 4]), sure)) > 0.5
    with_end, _ = token_ends(log_probs, torch.tensor([9, 4]), ids, counts, ends_with_eos=True)
    assert with_end[0].nonzero()[:, 0].tolist() == [2, 5, 7, 8]


def test_paraformer_learns_its_rates_from_ctc(make_values, tmp_path):
    values = make_values(
        "Paraformer", run={"steps": 80, "validate_every": 80}, optimizer={"lr": 1e-2}, data={"speeds": []},
        model={"class_name": "Paraformer", "config": SIZES["Paraformer"], "alignment_weight": 1.0},
    )  # fmt: skip
    run(values, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    figures = {name: [line[name] for line in log if name in line] for name in ("alignment", "counts", "total_loss")}
    assert figures["counts"][-1] < 0.5 * figures["counts"][0]
    assert min(figures["alignment"]) >= 0
    assert sum(figures["total_loss"][-10:]) < 0.6 * sum(figures["total_loss"][:10])


def test_paraformer_learns_from_the_errors_of_its_samples(make_values, tmp_path):
    plain = make_values("Paraformer")
    run(plain, tmp_path / "run")
    tuned = {"class_name": "Paraformer", "init_from": str(tmp_path / "run" / "model"), "error_weight": 1.0}
    trainer = trainer_of(plain | {"model": tuned, "output": str(tmp_path / "tuned")})
    features, *rest = trainer._inputs(next(trainer.open_batches(0)))
    model = trainer.raw_model.eval()
    torch.nn.init.normal_(model.model.decoder.head.weight)  # so that its samples differ in their errors
    losses = model(features, *rest, torch.Generator().manual_seed(0))
    trainer.raw_model.error_weight = 0.0
    without = model(features, *rest, torch.Generator().manual_seed(0))
    assert "errors" not in without.metrics
    assert float(losses.metrics["loss"] - without.metrics["loss"]) == pytest.approx(
        float(losses.metrics["errors"]), abs=1e-4
    )
    assert float(losses.metrics["errors"]) != 0


def test_characters_last_until_the_next_and_pauses_stand_between_words():
    starts = torch.tensor([2.0, 4.0, 5.0, 30.0])
    durations = character_durations([" ", "a", "b", "c", ",", " ", "d", " "], starts, 40, 50.0)
    assert durations.tolist() == pytest.approx([2, 2, 1, 7.5, 8.75, 8.75, 7.5, 2.5])
    assert not character_durations([" ", "a", " "], starts, 40, 50.0).any()
    assert float(character_durations(["a", " "], torch.tensor([0.0]), 3, 50.0).sum()) == 3


def test_letters_are_found_in_clips_and_kept_in_a_file(make_values, tokenizers, clips, tmp_path):
    values = make_values("Speak")
    trainer = trainer_of(values)
    for clip in trainer.clips:
        letters = sum(c.isalnum() for c in clip.spoken)
        assert len(clip.starts_N) in (0, letters)
        assert (clip.starts_N.diff() > 0).all()
    assert sum(len(clip.starts_N) > 0 for clip in trainer.clips) > 5
    assert [bool(durations.any()) for _, _, durations in trainer.data.items] == [
        len(clip.starts_N) > 0 for clip in trainer.clips
    ]
    for ids, text, durations in trainer.data.items:
        assert len(text) == len(durations)
        assert float(durations.sum()) in (0, pytest.approx(len(ids)))
    before = (tmp_path / "run" / "train_tokens.safetensors").stat().st_mtime_ns
    again = trainer_of(values)
    assert (tmp_path / "run" / "train_tokens.safetensors").stat().st_mtime_ns == before
    assert all(torch.equal(one.ids_K, other.ids_K) for one, other in zip(trainer.clips, again.clips, strict=True))
    without = trainer_of(make_values("Speak", recogniser=None))  # another key: made anew
    assert not any(len(clip.starts_N) for clip in without.clips)
    loss, metrics = without.train_on(next(without.open_batches(0)), 0)
    assert math.isfinite(float(loss))
    assert float(metrics["durations"]) == 0


BAD = [
    ("Paraformer", {"model": {"class_name": "Paraformer", "config": {"widht": 3}}}, "'width'"),
    ("Paraformer", {"model": {"class_name": "Paraformer", "config": {"vocab_size": 3}}}, "vocab_size is 3"),
    ("Paraformer", {"data": {"speed": [1.0]}}, "'speeds'"),
    ("Paraformer", {"data": {"speeds": [0.1]}}, "0.5"),
    ("Paraformer", {"data": {"max_seconds": 0.2}}, "no clip"),
    ("Paraformer", {"run": {"batch_size": 40}}, "more than there are"),
    ("Paraformer", {"model": {"class_name": "Paraformer", "like": "paraformer-tny"}}, "not a known Paraformer"),
    ("Paraformer", {"optimizer": {"warmup_steps": 99}}, "must be below"),
    ("SemanticTokenizer", {"data": {"seconds": 0.1}}, "targets.length"),
    ("SemanticTokenizer", {"targets": {"num_targets": 1}}, "greater than or equal to 2"),
    ("SemanticTokenizer", {"noise": {"kinds": ["wite"]}}, "wite"),
    ("Paraformer", {"model": {"class_name": "Paraformer", "alignment_weight": 1.0}}, "set config.ctc_weight"),
    ("Speak", {"recogniser": "CODEC"}, "holds a SimCodec"),
    ("Speak", {"codec": "RECOGNISER"}, "no codec"),
    ("Speak", {"model": {"class_name": "Speak", "config": {"vocab_size": 5}}}, "the data say 16"),
    ("GenSE", {"codec": "nothing-there"}, "nothing-there"),
    ("GenSE", {"model": {"class_name": "GenSE", "config": {"num_acoustic": 5}}}, "the data say 16"),
    ("GenSE", {"model": {"class_name": "GenSE", "config": SIZES["GenSE"] | {"n2s_positions": 8}}}, "positions"),
]  # fmt: skip


@pytest.mark.parametrize(("class_name", "change", "message"), BAD)
def test_what_does_not_fit_is_said(make_values, tokenizers, class_name, change, message):
    values = make_values(class_name)
    for key, value in change.items():
        if value in ("CODEC", "RECOGNISER"):
            value = str(tokenizers / value.lower())
        values[key] = values.get(key, {}) | value if isinstance(value, dict) and key != "model" else value
    with pytest.raises(mt.MediatokError, match=message):
        trainer_of(values)


def test_an_encoder_without_clusters_has_no_tokens_to_learn(make_values, tmp_path):
    SemanticTokenizer(**SEMANTIC, num_clusters=0).save_pretrained(tmp_path / "bare")
    with pytest.raises(InvalidRecipe, match="kmeans"):
        trainer_of(make_values("GenSE", semantic=str(tmp_path / "bare")))


def test_the_class_of_a_recipe_is_checked_first(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {class_name: Parafomer}\n")
    with pytest.raises(InvalidRecipe, match="'Paraformer'"):
        load_speech_recipe(path)
    assert speech.main([str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_our_recipes_are_right():
    recipes = [path for path in (Path(mt.__file__).parent / "recipes").glob("*.yaml") if is_speech_recipe(path)]
    assert recipes
    for path in recipes:
        assert load_speech_recipe(path).name == path.stem
