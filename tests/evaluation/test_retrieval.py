"""Retrieval by ids: ranks, similarities that are known beforehand, and the command."""

import json

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.evaluation import retrieval
from mediatok.tokenizers.image.tokenflow import TokenFlow
from PIL import Image

SIZES = {
    "image_size": 32, "encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 8, "token_size": 4,
    "codebook_size": 64, "is_legacy": False, "has_pixel_decoder": False, "encoder_width": 64, "encoder_depth": 1,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
FLOW_SIZES = {
    "image_size": 32, "sides": (1, 2, 4), "codebook_size": 40, "semantic_code_width": 6, "pixel_code_width": 3,
    "tower_width": 24, "tower_depth": 1, "tower_heads": 2, "tower_hidden": 32, "tower_patch": 8, "tower_grid": 4,
    "semantic_width": 24, "semantic_depth": 1, "semantic_heads": 2, "semantic_grid": 4, "teacher_width": 10,
    "channels": 32, "multipliers": (1, 1, 1, 1), "res_blocks": 1, "z_channels": 32, "decoder_channels": 32,
    "decoder_res_blocks": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = mt.TiTok(**SIZES).eval()
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Queries that are the gallery's pictures, a little brighter; one without a partner, and skin-tone variants."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name in ("1f34e", "1f3fb", "1f44b", "1f44b-1f3fb", "26a7-fe0f"):
        pixels = rng.integers(0, 200, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for folder, shift in (("gallery", 0), ("queries", 3)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels + np.uint8(shift)).save(root / folder / f"{name}.png")
    Image.new("RGB", (32, 32)).save(root / "queries" / "alone.png")
    return root


def test_ranks_of_known_similarities():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.4, 0.4, 0.4], [0.2, 0.3, 0.1], [0.7, 0.7, 0.1]])
    ranks = retrieval.ranks_of_right(similarity, torch.tensor([0, 1, 2, 1]))
    assert ranks.tolist() == [1, 2, 3, 1.5]
    found = retrieval.Retrieval.of("x", "codes", ranks)
    assert (found.recall_at_1, found.recall_at_5, found.median_rank) == (0.25, 1.0, 1.75)


def test_without_any_knowledge_the_rank_is_that_of_chance():
    ranks = retrieval.ranks_of_right(torch.zeros(7, 20), torch.arange(7))
    assert retrieval.Retrieval.of("x", "", ranks).median_rank == retrieval.chance(20).median_rank == 10.5
    assert retrieval.chance(20).recall_at_5 == 0.25
    assert retrieval.chance(4).recall_at_10 == 1.0


def test_the_nearest_other_picture_is_of_the_same_kind():
    kinds, right = ["fruit", "face", "fruit", "face", "flag"], torch.tensor([0, 1, 4, 2])
    similarity = torch.tensor([
        [0.9, 0.1, 0.8, 0.2, 0.3],  # finds the other fruit behind itself
        [0.1, 0.2, 0.9, 0.8, 0.3],  # finds a fruit before the other face
        [0.0, 0.0, 0.0, 0.0, 1.0],  # no other flag: left out
        [0.5, 0.5, 0.1, 0.2, 0.1],  # a fruit and a face are equally near
    ])  # fmt: skip
    assert retrieval.share_of_same_kind(similarity, right, kinds) == pytest.approx((1 + 0 + 0.5) / 3)
    assert retrieval.share_of_same_kind(torch.zeros(4, 5), right, kinds) == pytest.approx(1 / 4)


def test_equal_ids_and_cosines(monkeypatch):
    a, b = torch.randint(3, (5, 6)), torch.randint(3, (7, 6))
    expected = torch.tensor([[float((x == y).float().mean()) for y in b] for x in a])
    assert torch.equal(retrieval.equal_ids(a, b), expected)
    monkeypatch.setattr(retrieval, "PAIRS_AT_ONCE", 50)  # one query at a time
    assert torch.equal(retrieval.equal_ids(a, b), expected)
    x, y = torch.randn(5, 6, 4), torch.randn(7, 6, 4)
    cosines = torch.cosine_similarity(x[:, None], y[None], dim=-1).mean(dim=-1)
    torch.testing.assert_close(retrieval.mean_cosine(x, y), cosines)


def test_pairs_are_found_by_name(folders):
    queries, gallery, right = retrieval.paired(*(sorted((folders / name).iterdir()) for name in ("queries", "gallery")))
    names = ["1f34e", "1f3fb", "1f44b", "26a7-fe0f"]  # a skin tone by itself is an emoji
    assert [path.stem for path in queries] == names
    assert [gallery[place].stem for place in right] == names
    with pytest.raises(mt.InvalidInput, match="none of the 2"):
        retrieval.paired([folders / "a.png", folders / "b.png"], gallery)
    with pytest.raises(mt.InvalidInput, match="one size"):
        retrieval.paired(queries, [*gallery, folders / "other" / "1f34e.png"])


def test_similarities_depend_on_ids_alone(tokenizer, folders):
    pictures = sorted((folders / "gallery").iterdir())
    found = retrieval.similarities(tokenizer, pictures[:2], pictures)
    assert set(found) == {"equal ids", "codes"}
    ids = tokenizer.encode(pictures).ids
    torch.testing.assert_close(found["equal ids"], retrieval.equal_ids(ids[:2], ids))
    for similarity in found.values():
        assert similarity.shape == (2, len(pictures))
        torch.testing.assert_close(similarity.diagonal(), torch.ones(2))


def test_tokenflow_is_compared_by_its_embedding_too(folders):
    torch.manual_seed(0)
    model, pictures = TokenFlow(**FLOW_SIZES).eval(), sorted((folders / "gallery").iterdir())
    found = retrieval.similarities(model, pictures, pictures)
    assert set(found) == {"equal ids", "codes", "embedding"}
    ids = model.encode(pictures).ids
    with torch.inference_mode():
        features = model.decode_semantic(model.quantize.sum_of(ids)).mean(dim=1)
        assert model.code_vectors(ids).shape == (len(pictures), 21, 9)
    torch.testing.assert_close(found["embedding"], retrieval.mean_cosine(features[:, None], features[:, None]))


def test_command(tokenizer, folders, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "small")
    where = ["--gallery", str(folders / "gallery"), "--queries", str(folders / "queries")]
    assert retrieval.main([str(tmp_path / "small"), *where]) == 0
    about, blank, head, _, *rows = capsys.readouterr().out.splitlines()
    assert about.startswith("4 queries of ")
    assert "in the 4 pictures of" in about
    assert blank == ""
    assert [line.split("|")[1].strip() for line in rows][:2] == ["chance", "pixels at 32x32"]
    assert len(rows) == 4
    assert {line.count("|") for line in (head, *rows)} == {7}
    assert retrieval.main([str(tmp_path / "small"), *where, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[1]["recall_at_1"] == 1.0  # a little brighter is still the nearest
    assert [row["similarity"] for row in found] == ["", "", "equal ids", "codes"]
    assert found[1]["same_kind"] is None

    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({path.stem: {"subcategory": "x"} for path in (folders / "gallery").iterdir()}))
    assert retrieval.main([str(tmp_path / "small"), *where, "--labels", str(labels)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()[2:]
    assert "other of its subcategory" in head
    assert all(line.split("|")[-2].strip() == "100.0 %" for line in rows)
    for text in ("[]", '{"1f34e": {}}', "{"):
        labels.write_text(text)
        assert retrieval.main([str(tmp_path / "small"), *where, "--labels", str(labels)]) == 2
        assert "kind of every picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "gallery", "message"),
    [
        ("kl-tiny", "gallery", "continuous"),
        ("simcodec-tiny", "gallery", "no image tokenizer"),
        ("titok-tinny", "gallery", "titok-tiny"),
        ("titok-tiny", "gone", "not a folder"),
    ],
)
def test_bad_input_exits_2(folders, capsys, model, gallery, message):
    assert retrieval.main([model, "--gallery", str(folders / gallery), "--queries", str(folders / "queries")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
