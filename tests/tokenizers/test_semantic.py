"""Semantic tokens: the libraries' hidden states, one frame a hop, any length, no sound."""

import mediatok as mt
import pytest
import torch
import torch.nn.functional as F
from mediatok.convert import from_official
from mediatok.core.errors import InvalidCheckpoint, InvalidInput, TokenizerMismatch
from mediatok.core.registry import constructor_arguments, find_entry
from mediatok.tokenizers.speech import semantic
from mediatok.tokenizers.speech.semantic import SemanticTokenizer, windows
from transformers import Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

SIZES = {
    "layer": 2, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "conv_dim": (8,) * 7,
    "pos_conv_kernel": 10, "pos_conv_groups": 3, "num_buckets": 16, "max_distance": 20, "num_clusters": 9,
}  # fmt: skip
HOP = 320


def library_model(architecture, depth=7):
    """The model of `transformers`, deeper than the tokenizer, with weights that make every part count."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 24, "num_hidden_layers": depth, "num_attention_heads": 3, "intermediate_size": 40,
        "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 10, "num_conv_pos_embedding_groups": 3,
        "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": architecture == "wav2vec2",
        "layerdrop": 0.0,
    }  # fmt: skip
    if architecture == "wavlm":
        model = WavLMModel(WavLMConfig(**config, num_buckets=16, max_bucket_distance=20))
    else:
        model = Wav2Vec2Model(Wav2Vec2Config(**config))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def official_config(architecture):
    return {"model_type": architecture, "num_attention_heads": 3, "max_bucket_distance": 20}


def tokenizer(architecture="wavlm", layer=2, clusters=9):
    """Of the library's weights, with centres among the features."""
    from mediatok.convert import semantic as convert

    weights = dict(library_model(architecture).state_dict())
    bare = convert.from_official(official_config(architecture), weights, layer)
    if not clusters:
        return bare
    with torch.no_grad():
        features = bare.features(waves(1, 40, seed=9))[0]
    picked = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:clusters]
    return convert.from_official(official_config(architecture), weights | {"km.emb.weight": features[picked]}, layer)


def waves(batch, frames, seed=0):
    rng = torch.Generator().manual_seed(seed)
    pitch = torch.linspace(0.01, 0.3, frames * HOP) * (1 + torch.arange(batch)[:, None])
    return 0.3 * torch.sin(pitch.cumsum(1)) + 0.1 * torch.randn(batch, frames * HOP, generator=rng)


@pytest.mark.parametrize("architecture", ["wavlm", "wav2vec2"])
@pytest.mark.parametrize("layer", [1, 3])
def test_features_are_the_librarys_hidden_states(architecture, layer):
    library, wave = library_model(architecture), waves(2, 30)
    ours = tokenizer(architecture, layer)
    with torch.no_grad():
        states = library(F.pad(wave, (0, 100)), output_hidden_states=True).hidden_states
        features = ours.features(wave)
    assert features.shape == (2, 30, 24)
    torch.testing.assert_close(features, states[layer], atol=2e-5, rtol=1e-4)
    centers = ours.quantize.embedding.weight
    assert torch.equal(ours.encode_waveform(wave), torch.cdist(features, centers[None]).argmin(-1))
    assert len(ours.encode_waveform(wave).unique()) > 3


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_one_token_a_hop(frames):
    assert tokenizer().encode_waveform(waves(2, frames)).shape == (2, frames)


@pytest.mark.parametrize("architecture", ["wavlm", "wav2vec2"])
def test_rows_of_a_batch_give_what_they_give_alone(architecture):
    ours, wave = tokenizer(architecture), waves(4, 30)
    lengths = torch.tensor([30 * HOP, 11 * HOP, 10 * HOP + 1, 1])
    wave = torch.where(torch.arange(30 * HOP) < lengths[:, None], wave, 0.0)
    ids = ours.encode_waveform(wave, lengths)
    for row, frames in enumerate([30, 11, 11, 1]):
        alone = ours.encode_waveform(wave[row : row + 1, : frames * HOP])
        assert torch.equal(ids[row, :frames], alone[0])
        assert not ids[row, frames:].any()


def test_files_go_through_as_tensors_do(tmp_path):
    ours, wave = tokenizer(), waves(1, 20)[:, : 20 * HOP - 5]
    clip = mt.Waveform(wave, 16000)
    tokens = ours.encode([clip, mt.Waveform(wave[:, :1000], 16000)])
    padded = F.pad(wave, (0, 5))
    assert torch.equal(tokens.ids[0, None], ours.encode_waveform(padded))
    assert tokens.lengths.tolist() == [20, 4]
    assert tokens.frames[0].num_samples == 20 * HOP - 5
    tokens.save(tmp_path / "t.mtok")
    assert mt.Tokens.load(tmp_path / "t.mtok") == tokens


# Windows.


@pytest.mark.parametrize("frames", [1, 1499, 1500, 1501, 2000, 2500, 2501, 12345])
def test_windows_cover_every_frame_once(frames):
    done = 0
    for start, stop, end in windows(frames, 50.0):
        assert 0 <= start <= done < end <= stop <= frames
        assert stop - start <= 1500
        assert start == 0 or done - start == 250
        assert stop == frames or stop - end == 250
        done = end
    assert done == frames


def test_long_clips_are_read_in_windows(monkeypatch):
    """20 frames at once, 8 of them shared with the next window: of each overlap the earlier half is the earlier's."""
    monkeypatch.setattr(semantic, "WINDOW_SECONDS", 0.4)
    monkeypatch.setattr(semantic, "OVERLAP_SECONDS", 0.16)
    ours, wave = tokenizer(), waves(2, 33)
    with torch.no_grad():
        features = ours.features(wave)
        first = ours.hidden_states(wave[:, : 20 * HOP + 100])
        second = ours.hidden_states(wave[:, 12 * HOP : 32 * HOP + 100])
        last = ours.hidden_states(F.pad(wave[:, 24 * HOP :], (0, 100)))
    expected = torch.cat([first[:, :16], second[:, 4:16], last[:, 4:]], dim=1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.encode_waveform(wave), ours.quantize.nearest(expected))


# Saving, precision, names.


@pytest.mark.parametrize("architecture", ["wavlm", "wav2vec2"])
def test_save_and_load(tmp_path, architecture):
    ours, wave = tokenizer(architecture), waves(2, 12)
    ours.save_pretrained(tmp_path / "t")
    expected = ours.encode_waveform(wave)
    for dtype in ("float32", "bfloat16"):  # the encoder and the centres stay in fp32
        loaded = mt.load(tmp_path / "t", dtype=dtype)
        assert torch.equal(loaded.encode_waveform(wave), expected)
        assert loaded.fingerprint == ours.fingerprint
    again = SemanticTokenizer.from_pretrained(tmp_path / "t")
    assert torch.equal(again.eval().encode_waveform(wave), expected)


def test_the_librarys_folder_is_read(tmp_path):
    """As on the hub: the model of `transformers`, which has no clusters."""
    library_model("wavlm").save_pretrained(tmp_path / "hub")
    loaded = mt.load(tmp_path / "hub")
    assert (loaded.vocab_size, loaded.config.layer, loaded.name) == (0, 6, "hub")
    with pytest.raises(InvalidInput, match=r"mediatok\.training\.kmeans"):
        loaded.encode_waveform(waves(1, 3))
    with torch.no_grad():
        torch.testing.assert_close(loaded.features(waves(1, 9)), tokenizer(layer=6).features(waves(1, 9)))


def test_released_names():
    for name, architecture in (("semantic-wavlm-large", "wavlm"), ("semantic-xls-r-300m", "wav2vec2")):
        entry = find_entry(name)
        with torch.device("meta"):
            model = SemanticTokenizer(**constructor_arguments(entry))
        assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
        assert (model.config.architecture, model.hop_length, model.frame_rate, model.bit_rate) == (
            architecture, 320, 50.0, 500.0,
        )  # fmt: skip


# What cannot be is said.


def test_tokens_have_no_sound():
    ours = tokenizer()
    tokens = ours.encode(mt.Waveform(waves(1, 5), 16000))
    for decode in (lambda: ours.decode(tokens), lambda: ours.decode_ids(tokens.ids)):
        with pytest.raises(InvalidInput, match="no sound of their own"):
            decode()
    with pytest.raises(TokenizerMismatch):
        tokenizer("wav2vec2").decode(tokens)
    with pytest.raises(InvalidInput, match="must lie in"):
        ours.decode_ids(tokens.ids + 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hubert"}, "wavlm, wav2vec2"),
        ({"conv_stride": (5, 2, 2)}, "7, 7 and 3"),
        ({"conv_kernel": (10, 3, 3, 3, 3, 2, 3)}, "one frame a hop"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(InvalidInput, match=message):
        SemanticTokenizer(**SIZES | changes)


@pytest.mark.parametrize("wave", [torch.zeros(1, 321), torch.zeros(320), torch.zeros(1, 320, dtype=torch.int16)])
def test_wrong_samples(wave):
    with pytest.raises(InvalidInput):
        tokenizer().encode_waveform(wave)


def test_foreign_weights_are_refused():
    weights = dict(library_model("wavlm").state_dict())
    with pytest.raises(InvalidCheckpoint, match="no weights of a WavLM"):
        from_official("semantic", {}, {"a": torch.zeros(1)})
    with pytest.raises(InvalidCheckpoint, match=r"unknown encoder\.encoder\.extra"):
        from_official("semantic", official_config("wavlm"), weights | {"encoder.extra": torch.zeros(1)})
    del weights["encoder.layers.1.feed_forward.output_dense.bias"]
    with pytest.raises(InvalidCheckpoint, match=r"missing encoder.*output_dense"):
        from_official("semantic", official_config("wavlm"), weights)
    with pytest.raises(InvalidCheckpoint, match="do_stable_layer_norm"):
        from_official("semantic", {"do_stable_layer_norm": False}, weights)
    for text in ("[(8,10,5)] + __import__('os')", "[(8, 10, 5)] * 99", 7):
        with pytest.raises(InvalidCheckpoint, match="conv"):
            from_official("semantic", {"conv_feature_layers": text}, weights)
