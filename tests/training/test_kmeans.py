"""Clusters of semantic tokens: found where they are, the same for a seed, written whole."""

import logging

import mediatok as mt
import pytest
import torch
import yaml
from mediatok.core.audio import write_audio
from mediatok.core.errors import InvalidRecipe
from mediatok.kernels.nearest import nearest_code
from mediatok.tokenizers.speech.semantic import SemanticTokenizer
from mediatok.training import kmeans
from mediatok.training.kmeans_recipe import KMeansRecipe, load_kmeans_recipe
from mediatok.training.recipe import check_recipe
from mediatok.training.speech_data import SpeechFolder

RATE = 16000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(per_blob=60, spread=0.1):
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0], [5.0, 5.0]])
    noise = spread * torch.randn(5 * per_blob, 2, generator=rng(1))
    return centres, centres.repeat(per_blob, 1) + noise


@pytest.mark.parametrize("batch_size", [7, 100, 10_000])
def test_clusters_are_found(batch_size):
    centres, points = blobs()
    found = kmeans.fit_by_batches(points, 5, batch_size, 8, rng())
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.1
    assert nearest_code(points, found).bincount().tolist() == [60] * 5


def test_one_whole_batch_at_a_time_is_the_mean_of_what_was_visited():
    """With all features in one batch and centres that nothing changes sides of, a centre is its cluster's mean."""
    _, points = blobs()
    found = kmeans.fit_by_batches(points, 5, len(points), 3, rng())
    nearest = nearest_code(points, found)
    means = torch.stack([points[nearest == k].mean(dim=0) for k in range(5)])
    torch.testing.assert_close(found, means, atol=1e-4, rtol=0)


def test_a_random_start_ends_well_too():
    _, points = blobs()
    spread, random = (kmeans.fit_by_batches(points, 12, 50, 30, rng(), start) for start in ("k-means++", "random"))
    for found in (spread, random):
        assert len(nearest_code(points, found).unique()) == 12  # no cluster is left without features
        distances = (points - found[nearest_code(points, found)]).square().sum(dim=1)
        assert distances.mean() < 0.05 * points.var(dim=0).sum()
    again = kmeans.fit_by_batches(points, 12, 50, 30, rng(), "random")
    assert torch.equal(again, random)
    assert not torch.equal(kmeans.fit_by_batches(points, 12, 50, 30, rng(1), "random"), random)


@pytest.fixture
def speech(tmp_path):
    """Six clips, one of which is broken."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for index in range(6):
        pitch = torch.linspace(0.02, 0.4, RATE // 2) * (1 + index / 3)
        samples = 0.4 * torch.sin(pitch.cumsum(0)) + 0.02 * torch.randn(RATE // 2, generator=rng(index))
        write_audio(mt.Waveform(samples[None], RATE), folder / f"clip{index}.wav")
    (folder / "clip1.wav").write_bytes(b"RIFF but no more")
    return folder


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    model = SemanticTokenizer(
        layer=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7, pos_conv_kernel=4,
        pos_conv_groups=2, num_buckets=8, max_distance=16, num_clusters=0,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def values(speech, encoder, tmp_path, **changes):
    clusters = {"num_clusters": 6, "batch_size": 20, "passes": 5}
    own = {"name": "c", "output": str(tmp_path / "run"), "encoder": str(encoder), "data": {"train": str(speech)}}
    return own | {"clusters": clusters} | changes


def test_features_are_drawn_over_all_clips(speech, encoder, caplog):
    tokenizer, source = mt.load(encoder), SpeechFolder(speech)
    with caplog.at_level(logging.WARNING):
        everything = kmeans.gather_features(tokenizer, source, 1000, rng())
    assert "skipped a broken clip" in caplog.text
    clips = [mt.read_audio(path, RATE).samples for path in source.paths if path.stem != "clip1"]
    expected = torch.cat([tokenizer.features(clip)[0] for clip in clips])
    assert everything.shape == expected.shape == (5 * 25, 16)
    assert nearest_code(everything, expected).sort().values.tolist() == list(range(125))
    some = kmeans.gather_features(tokenizer, source, 40, rng())
    assert 30 <= len(some) <= 40
    assert len(set((nearest_code(some, expected) // 25).tolist())) == 5  # of every clip


def test_the_command_writes_a_tokenizer(speech, encoder, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values(speech, encoder, tmp_path)))
    assert kmeans.main([str(path), "clusters.num_clusters=7"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "model")
    tokenizer = mt.load(tmp_path / "run" / "model")
    assert tokenizer.vocab_size == 7
    clip = mt.read_audio(speech / "clip0.wav")
    ids = tokenizer.encode(clip).ids
    assert ids.shape == (1, 25)
    assert len(ids.unique()) > 2
    torch.testing.assert_close(tokenizer.features(clip.samples), mt.load(encoder).features(clip.samples))
    again = kmeans.fit(load_kmeans_recipe(path, ["clusters.num_clusters=7"]))
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster": {}}, "unknown key cluster. Did you mean 'clusters'"),
        ({"clusters": {"num_cluster": 3}}, "unknown key clusters.num_cluster. Did you mean 'num_clusters'"),
        ({"clusters": {"num_clusters": 1}}, "clusters.num_clusters"),
        ({"clusters": {"start": "best"}}, "clusters.start"),
        ({"encoder": ""}, "encoder"),
    ],
)
def test_bad_recipes(speech, encoder, tmp_path, changes, words):
    with pytest.raises(InvalidRecipe, match=words):
        check_recipe(values(speech, encoder, tmp_path) | changes, KMeansRecipe)


def test_what_cannot_be_is_said(speech, encoder, tmp_path, capsys):
    recipe = check_recipe(values(speech, encoder, tmp_path, clusters={"num_clusters": 200}), KMeansRecipe)
    with pytest.raises(InvalidRecipe, match="200 are more than the 100 frames"):
        kmeans.fit(recipe)
    with pytest.raises(InvalidRecipe, match="TiTok"):
        kmeans.fit(check_recipe(values(speech, "titok-tiny", tmp_path), KMeansRecipe))
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "nowhere", encoder, tmp_path)))
    assert kmeans.main([str(path)]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert kmeans.main([]) == 2
    assert not (tmp_path / "run").exists()
