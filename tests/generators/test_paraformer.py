"""Paraformer: clips do not change each other, recordings of any length, words and times, hotwords, training."""

import json
import math
from itertools import pairwise

import mediatok as mt
import pytest
import torch
from mediatok.convert.load import load_official
from mediatok.convert.paraformer import official_names, read_cmvn
from mediatok.core.audio import Waveform, write_audio
from mediatok.core.errors import Cancelled, InvalidCheckpoint, InvalidInput, ModelNotFound
from mediatok.core.transcript import Transcript, Word
from mediatok.generators.paraformer import Paraformer
from mediatok.generators.paraformer_frontend import Frontend
from mediatok.generators.paraformer_segments import LONGEST, quietest, segments
from mediatok.generators.paraformer_text import Vocabulary
from mediatok.generators.paraformer_timestamps import completions, levels, token_seconds
from mediatok.generators.paraformer_training import edit_distance, error_loss, masked_features
from mediatok.nn.parallel import GlancingSampler

RATE = 16000
TOKENS = ("<blank>", "<s>", "</s>", "一", "二", "三", "he@@", "llo", "wor@@", "ld", "a", "b", "四", "<unk>")
SIZES = {
    "vocab_size": len(TOKENS), "tokens": TOKENS, "width": 16, "encoder_depth": 2, "encoder_heads": 2,
    "encoder_mlp_width": 24, "decoder_depth": 2, "decoder_heads": 2, "decoder_mlp_width": 24, "num_mels": 8,
}  # fmt: skip
STAMPED = {"timestamp_times": 3}
WITH_HOTWORDS = STAMPED | {"hotword_depth": 6, "hotword_mlp_width": 16, "hotword_taps": 5, "no_hotword_id": 12}
VARIANTS = {"plain": {}, "stamped": STAMPED, "hotwords": WITH_HOTWORDS}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(variant="plain", **changes):
    torch.manual_seed(1)
    made = Paraformer(**(SIZES | VARIANTS[variant] | changes)).eval()
    rng = torch.Generator().manual_seed(0)
    made.requires_grad_(False)
    # Features, rates and tokens that differ from frame to frame.
    made.frontend.cmvn.copy_(torch.tensor([[-23.6], [1.0]]).expand(2, 56))
    torch.nn.init.normal_(made.predictor.conv.weight, std=0.3, generator=rng)
    torch.nn.init.normal_(made.predictor.out.weight, std=0.5, generator=rng)
    torch.nn.init.normal_(made.decoder.head.weight, std=3.0, generator=rng)
    torch.nn.init.zeros_(made.decoder.head.bias)[[0, 1, 2, 13]] = -100.0
    return made.requires_grad_(True)


def sound(seconds, seed=0):
    rng = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * RATE)) / RATE
    return (torch.randn(len(time), generator=rng) * 0.1 * (1.2 + torch.sin(5 * time))).float()


def clip(seconds, seed=0):
    return Waveform(sound(seconds, seed), RATE)


# Clips and batches.


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_clip_is_the_same_alone_and_in_any_batch(variant):
    recogniser = model(variant)
    clips = [clip(seconds, seed) for seed, seconds in enumerate((2.3, 0.4, 1.1, 3.0))]
    hotwords = {"hotwords": ["一二"]} if variant == "hotwords" else {}
    together = recogniser.transcribe(clips, batch_size=4, **hotwords)
    assert sum(len(transcript.words) for transcript in together) > 10
    for alone, transcript in zip(clips, together, strict=True):
        single = recogniser.transcribe(alone, **hotwords)
        assert single.text == transcript.text
        for ours, theirs in zip(single.words, transcript.words, strict=True):
            assert (ours.start, ours.end) == pytest.approx((theirs.start, theirs.end), abs=1e-6)


def test_the_authors_padding_differs():
    """What `encode` is for: without its zeros the predictor reads what the encoder makes of the padding."""
    recogniser = model()
    features, lengths = recogniser.frontend(torch.stack([sound(2.0), sound(2.0, 1)]), torch.tensor([32000, 9000]))
    clean, inside = recogniser.encode(features, lengths)
    assert not clean[1, lengths[1] :].any()
    theirs = recogniser.encoder(features, inside)
    ours, other = recogniser.hear(clean, lengths), recogniser.hear(theirs, lengths)
    assert torch.equal(ours.rates_BT[0], other.rates_BT[0])
    assert not torch.equal(ours.rates_BT[1], other.rates_BT[1])


def test_features_do_not_depend_on_the_batch_and_short_clips_have_one_frame():
    frontend = Frontend()
    waves = [sound(1.0), sound(0.3, 1), sound(0.01, 2)]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    features, lengths = frontend(padded, torch.tensor([len(wave) for wave in waves]))
    assert lengths.tolist() == [17, 5, 1]
    for row, wave in enumerate(waves):
        alone, _ = frontend(wave[None])
        torch.testing.assert_close(features[row, : lengths[row]], alone[0], atol=2e-3, rtol=0)
        assert not features[row, lengths[row] :].any()
    for wave, length in ((torch.zeros(1, 1), 1), (torch.zeros(1, 50), 60)):
        with pytest.raises(InvalidInput, match="do not fit"):
            frontend(wave, torch.tensor([length]))


# Recordings.


def test_long_recordings_are_cut_at_quiet_places_in_flat_memory():
    wave = sound(70)
    for second in (17, 33, 50):
        wave[second * RATE : second * RATE + RATE // 2] *= 1e-4
    blocks = wave.split(RATE // 3)
    found = list(segments(blocks, RATE))
    assert torch.equal(torch.cat([piece.samples for piece in found]), wave)
    assert [piece.start for piece in found] == pytest.approx([0, 17.25, 33.25, 50.25], abs=0.2)
    assert all(len(piece.samples) <= LONGEST * RATE for piece in found)


def test_the_quietest_place_is_a_pause():
    wave = torch.ones(10 * RATE)
    wave[7 * RATE : 7 * RATE + RATE // 2] = 0.01  # half a second
    wave[6 * RATE : 6 * RATE + 50] = 0.0  # shorter than a pause
    assert 7 * RATE < quietest(wave, RATE) < 7.5 * RATE
    assert 9 * RATE < quietest(torch.zeros(10 * RATE), RATE) <= 10 * RATE


def test_silence_is_an_empty_transcript():
    recogniser = model("stamped")
    steps = []
    silence = Waveform(torch.zeros(50 * RATE), RATE)
    transcript = recogniser.transcribe(silence, on_step=lambda *args, preview=None: steps.append(args))
    assert (transcript.text, transcript.srt(), transcript.words, transcript.seconds) == ("", "", (), 50)
    assert steps[-1] == (50, 50)
    assert json.loads(transcript.json())["words"] == []
    for samples in (1, 100, 400):
        assert recogniser.transcribe(Waveform(torch.zeros(samples), RATE)).text == ""


def test_no_token_at_all_is_an_empty_transcript():
    recogniser = model("stamped", tail=0.0)
    torch.nn.init.constant_(recogniser.predictor.out.bias, -50.0)
    transcripts = recogniser.transcribe([clip(1.0), clip(2.0)])
    assert [transcript.words for transcript in transcripts] == [(), ()]


def test_recordings_of_any_kind_and_length(tmp_path):
    recogniser = model("stamped")
    long = sound(47)
    write_audio(Waveform(torch.stack([long, long]), RATE), tmp_path / "a.flac")
    steps = []
    transcript = recogniser.transcribe(
        tmp_path / "a.flac", batch_size=2, on_step=lambda step, total, preview: steps.append((step, total, preview))
    )
    assert transcript.seconds == 47
    assert [step for step, _, _ in steps] == sorted(step for step, _, _ in steps)
    assert steps[-1][:2] == (47, 47)
    assert transcript.text.endswith(steps[-1][2])
    times = [(word.start, word.end) for word in transcript.words]
    assert all(0 <= start <= end <= 47 for start, end in times)
    assert all(first[0] <= second[0] for first, second in pairwise(times))
    assert times[-1][1] > 40
    resampled = recogniser.transcribe(Waveform(long, RATE).resample(8000))
    assert resampled.seconds == pytest.approx(47)

    def stop(*args, preview=None):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        recogniser.transcribe(tmp_path / "a.flac", on_step=stop)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": True}, {"on_step": 3}, {"hotwords": ["一"]}, {"hotword_weight": 2.0}],
)
def test_bad_options(options):
    with pytest.raises(InvalidInput):
        model().transcribe(clip(1.0), **options)


def test_a_model_without_tokens_says_so():
    with pytest.raises(InvalidInput, match="no token texts"):
        model(tokens=()).transcribe(clip(1.0))
    with pytest.raises(InvalidInput, match="13 tokens for a vocabulary of 14"):
        model(tokens=TOKENS[1:])


def test_bfloat16_and_packed_weights_hear_the_same():
    recogniser, spoken = model("hotwords"), clip(4.0)
    expected = recogniser.transcribe(spoken, hotwords=["一二"])
    assert recogniser.cast(torch.bfloat16).frontend.cmvn.dtype == torch.float32
    assert recogniser.predictor.out.weight.dtype == torch.float32
    low = recogniser.transcribe(spoken, hotwords=["一二"])
    assert abs(len(low.words) - len(expected.words)) <= 2
    packed = model("hotwords")
    packed.pack_network()
    assert packed.transcribe(spoken, hotwords=["一二"]) == expected


def test_saved_and_loaded_it_is_the_same(tmp_path):
    recogniser = model("hotwords")
    recogniser.frontend.cmvn.normal_()
    recogniser.save_pretrained(tmp_path / "m")
    loaded = mt.load(tmp_path / "m")
    assert loaded.transcribe(clip(2.0)) == recogniser.transcribe(clip(2.0))


# Released folders.


def test_a_released_folder_loads(tmp_path):
    recogniser = model("stamped", rate_neighbours=(1, 1))
    features = 7 * 8
    names = official_names(Paraformer, dict(recogniser.config))
    state = recogniser.state_dict()
    weights = {official: state[ours] for official, (ours, _) in names.items()}
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3}, tmp_path / "model.pt"
    )
    (tmp_path / "tokens.json").write_text(json.dumps(TOKENS, ensure_ascii=False))
    statistics = [torch.randn(features), torch.rand(features) + 0.5]
    shift, scale = (" ".join(map(repr, row.tolist())) for row in statistics)
    (tmp_path / "am.mvn").write_text(
        f"<Nnet>\n<Splice> {features} {features}\n[ 0 ]\n<AddShift> {features} {features}\n"
        f"<LearnRateCoef> 0 [ {shift} ]\n<Rescale> {features} {features}\n<LearnRateCoef> 0 [ {scale} ]\n</Nnet>\n"
    )
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 2, "kernel_size": 11, "sanm_shfit": 0}
    config = {
        "model": "BiCifParaformer", "model_conf": {"ctc_weight": 0.0, "predictor_bias": 1, "sampling_ratio": 0.75},
        "encoder": "SANMEncoder", "encoder_conf": sizes | {"output_size": 16, "input_layer": "pe"},
        "decoder": "ParaformerSANMDecoder", "decoder_conf": sizes | {"att_layer_num": 2},
        "predictor": "CifPredictorV3",
        "predictor_conf": {
            "idim": 16, "threshold": 1.0, "tail_threshold": 0.45, "smooth_factor2": 0.25, "noise_threshold2": 0.01,
            "upsample_times": 3, "use_cif1_cnn": False, "upsample_type": "cnn_blstm",
        },
        "frontend": "WavFrontend", "frontend_conf": {"n_mels": 8, "lfr_m": 7, "lfr_n": 6},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, too
    loaded = mt.load(tmp_path)
    assert loaded.name == tmp_path.name
    torch.testing.assert_close(loaded.frontend.cmvn, torch.stack(statistics))
    recogniser.frontend.cmvn.copy_(torch.stack(statistics))
    assert loaded.transcribe(clip(2.0)) == recogniser.transcribe(clip(2.0))
    (tmp_path / "am.mvn").unlink()
    with pytest.raises(ModelNotFound, match="lacks am"):
        load_official(tmp_path)
    (tmp_path / "am.mvn").write_text(
        "<AddShift> 1 1\n<LearnRateCoef> 0 [ 1 x ]\n<Rescale> 1 1\n<LearnRateCoef> 0 [ 1 2 ]\n"
    )
    with pytest.raises(InvalidCheckpoint, match="not all numbers"):
        read_cmvn(tmp_path / "am.mvn")
    (tmp_path / "model.pt").unlink()
    with pytest.raises(ModelNotFound, match="holds no weights"):
        load_official(tmp_path)


# Words and times.


def test_words_of_tokens():
    vocabulary, ids = Vocabulary(TOKENS), {token: number for number, token in enumerate(TOKENS)}
    said = ["一", "he@@", "llo", "wor@@", "ld", "<unk>", "二", "a", "b", "三", "a", "he@@"]
    spans = [(float(i), i + 1.0) for i in range(len(said))]
    words = vocabulary.words([ids[token] for token in said], spans)
    assert [(word.text, word.start, word.end) for word in words] == [
        ("一", 0, 1), ("hello", 1, 3), ("world", 3, 5), ("二", 6, 7), ("AB", 7, 9), ("三", 9, 10), ("a", 10, 11),
        ("he", 11, 12),
    ]  # fmt: skip
    assert Transcript(tuple(words), 12.0).text == "一hello world二AB三a he"


def test_texts_are_written_in_tokens():
    vocabulary = Vocabulary(TOKENS)
    text = [vocabulary.tokens[number] for number in vocabulary.encode("一Hello world二a")]
    assert text == ["一", "he@@", "llo", "wor@@", "ld", "二", "a"]
    with pytest.raises(InvalidInput, match="'五' in"):
        vocabulary.encode("一五")
    assert vocabulary.encode("五", unknown=True) == [13]


def test_levels_complete_what_completions_say():
    rng = torch.Generator().manual_seed(0)
    for tokens in (1, 4, 30):
        rates = torch.rand(200, generator=rng)
        rates = rates * ((tokens + 1) / rates.sum())
        from_levels = (levels(rates[None])[0] >= 1 - 1e-4).nonzero()[:, 0].tolist()
        assert completions(rates, tokens) == from_levels
        assert len(completions(rates * 0.37, tokens)) == tokens + 1  # of another number of tokens


@pytest.mark.parametrize("rates", [torch.zeros(30), torch.rand(30), torch.rand(3), torch.tensor([9.0])])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_every_token_has_a_time_in_order(rates, tokens):
    spans = token_seconds(rates, tokens, 0.02, len(rates) * 0.02)
    assert len(spans) == tokens
    flat = [time for span in spans for time in span]
    assert flat == sorted(flat)
    assert all(0 <= time <= len(rates) * 0.02 for time in flat)


def test_subtitles(tmp_path):
    words = [Word("hello", 0.5, 0.9), Word("world.", 1.0, 1.4), Word("again", 1.5, 2.0), Word("一", 3661.2, 3661.5)]
    transcript = Transcript(tuple(words), 4000.0)
    assert transcript.srt() == (
        "1\n00:00:00,500 --> 00:00:01,400\nhello world.\n\n2\n00:00:01,500 --> 00:00:02,000\nagain\n\n"
        "3\n01:01:01,200 --> 01:01:01,500\n一\n"
    )
    many = Transcript(tuple(Word("一", i * 0.2, i * 0.2 + 0.2) for i in range(90)), 18.0)
    assert all(len(caption) <= 21 and caption[-1].end - caption[0].start <= 6 for caption in many.captions())
    transcript.save(tmp_path / "a.srt")
    assert (tmp_path / "a.srt").read_text() == transcript.srt()
    transcript.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["words"][3]["text"] == "一"


# Hotwords.


def test_hotwords_may_change_what_is_heard_and_nothing_else_does():
    recogniser = model("hotwords")
    torch.nn.init.normal_(recogniser.hotwords.head.weight, std=3.0)
    spoken = clip(4.0)
    without = recogniser.transcribe(spoken)
    assert recogniser.transcribe(spoken, hotwords=[]) == without
    changed = recogniser.transcribe(spoken, hotwords=["一二", "hello"])
    assert changed.text != without.text
    assert recogniser.transcribe(spoken, hotwords=["一二", "hello"], hotword_weight=0.0).text == without.text
    torch.nn.init.zeros_(recogniser.hotwords.head.weight)
    recogniser.hotwords.head.bias.data[12] = 100.0  # "no hotword" everywhere
    assert recogniser.transcribe(spoken, hotwords="一二").text == without.text


def test_many_hotwords_are_filtered_for_each_clip_by_itself():
    recogniser = model("hotwords")
    clips = [clip(2.0, 3), clip(3.0, 4)]
    words = [f"{a}{b}{c}" for a in "一二三四" for b in "一二三四" for c in "一二三四"]
    together = recogniser.transcribe(clips, hotwords=words)
    assert [transcript.text for transcript in together] == [
        recogniser.transcribe(c, hotwords=words).text for c in clips
    ]
    vectors = recogniser.embed_hotwords(words)
    kept = recogniser.hotwords.most_attended(torch.randn(1, 4, 16), None, vectors[None])
    assert len(kept) == 51
    assert kept[-1] == 64


@pytest.mark.parametrize("hotwords", [["五"], [""], [3], ["一"] * 20_000])
def test_bad_hotwords(hotwords):
    with pytest.raises(InvalidInput):
        model("hotwords").embed_hotwords(hotwords)


# Training.


def batch(recogniser, seed=0):
    waves = torch.stack([sound(2.0, seed), sound(2.0, seed + 1)])
    features, lengths = recogniser.frontend(waves, torch.tensor([32000, 20000]))
    return features, lengths, torch.tensor([[3, 4, 6, 7], [5, 3, 0, 0]]), torch.tensor([4, 2])


@pytest.mark.parametrize("variant", ["plain", "stamped"])
def test_every_weight_trains(variant):
    recogniser = model(variant, ctc_weight=0.3).train()
    output = recogniser(*batch(recogniser), rng=torch.Generator().manual_seed(0))
    output.loss.backward()
    missing = [name for name, parameter in recogniser.named_parameters() if parameter.grad is None]
    assert not missing
    expected = 0.7 * output.metrics["tokens"] + 0.3 * output.metrics["ctc"] + output.metrics["counts"]
    expected = expected + 0.5 * output.metrics.get("fine_counts", 0.0)
    torch.testing.assert_close(output.loss.detach(), expected)


def test_it_learns_two_clips():
    recogniser = model(encoder_depth=1, decoder_depth=1, dropout=0.0, attention_dropout=0.0, glancing_ratio=0.5).train()
    data, rng = batch(recogniser), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(recogniser.parameters(), lr=5e-3)
    for _ in range(300):
        frames, _ = recogniser.encode(*data[:2])
        losses = recogniser.training_pass(frames, *data[1:], rng).losses
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    heard = recogniser.eval().recognize(*data[:2])
    assert [result.ids for result in heard] == [[3, 4, 6, 7], [5, 3]]


def test_the_target_is_read_only_where_it_counts():
    recogniser = model()
    features, lengths, ids, counts = batch(recogniser)
    rng = torch.Generator().manual_seed(0)
    expected = recogniser(features, lengths, ids, counts, rng).loss
    ids[1, 2:] = 9
    torch.testing.assert_close(recogniser(features, lengths, ids, counts, rng.manual_seed(0)).loss, expected)


def test_glancing_shows_a_share_of_what_is_wrong():
    target = torch.arange(10).repeat(3, 1)
    draft = target.clone()
    draft[0, :8] = 99  # eight wrong
    draft[1, 0] = 99
    inside = torch.ones(3, 10, dtype=torch.bool)
    inside[2, 4:] = False
    draft[2] = 99
    vectors, true = torch.zeros(3, 10, 2), torch.ones(3, 10, 2)
    vectors[2, 4:] = 7.0
    mixed, shown = GlancingSampler(0.75)(vectors, true, draft, target, inside, torch.Generator().manual_seed(0))
    assert shown.sum(dim=1).tolist() == [6, 0, 3]
    assert torch.equal(mixed[..., 0], shown.float())
    again = GlancingSampler(0.75)(vectors, true, draft, target, inside, torch.Generator().manual_seed(0))[1]
    assert torch.equal(again, shown)


def test_masked_features_hide_a_band_and_a_stretch():
    features = torch.ones(3, 40, 7 * 80)
    masked = masked_features(features, rng=torch.Generator().manual_seed(3))
    hidden = (masked == 0).view(3, 40, 7, 80)
    rows = hidden.all(dim=(2, 3))
    assert (rows.sum(dim=1) < 12).all()
    for row in range(3):
        bands = hidden[row, ~rows[row]]
        assert (bands == bands[:1, :1]).all()
        assert bands[0, 0].sum() < 30
    assert hidden.any()


def test_error_loss_prefers_the_samples_with_fewer_errors():
    logits = torch.tensor([[[2.0, 1.9, 0.0], [0.0, 3.0, 2.0]]], requires_grad=True)
    rng = torch.Generator().manual_seed(0)
    counts = torch.tensor([2])
    loss = error_loss(logits, counts, [[1, 1]], num_samples=16, rng=rng, blocked_share=0.5)
    loss.backward()
    assert logits.grad[0, 0, 1] < 0 < logits.grad[0, 0, 0]  # the first place should be 1
    same = error_loss(logits, counts, [[0, 1]], num_samples=3, blocked_share=0.0)
    assert same.item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "", 2)]
)
def test_edit_distance(ours, theirs, expected):
    assert edit_distance(ours, theirs) == expected


def test_positions_and_depths_of_impossible_models():
    with pytest.raises(ValueError, match="multiple of 3 heads"):
        model(encoder_heads=3)
    with pytest.raises(InvalidInput, match="hotwords go with time stamps"):
        model(hotword_depth=6)
    assert math.isclose(model().frontend.seconds_per_frame, 0.06)
