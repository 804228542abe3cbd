"""`Tokens`: what it accepts, how it is cut and joined."""

import math
from dataclasses import FrozenInstanceError, replace

import mediatok as mt
import pytest
import torch


def test_fields_and_size(make_tokens):
    tokens = make_tokens([3, 5])
    assert len(tokens) == 2
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert tokens.bits_per_token == 12
    assert tokens.num_bytes == len(tokens.to_bytes())


@pytest.mark.parametrize(("vocab_size", "bits"), [(2, 1), (3, 2), (4096, 12), (4097, 13), (2**31, 31), (2**32, 32)])
def test_bits_per_token(make_tokens, vocab_size, bits):
    assert make_tokens([2], vocab_size=vocab_size).bits_per_token == bits


def test_repr_says_what_it_is(make_tokens):
    one = repr(make_tokens([32], is_batch=False))
    assert one == "Tokens(image, 32 tokens of 12 bits, 88 bytes, titok-tiny 0123456789abcdef)"
    assert "2 x image, 3 to 5 x 4 tokens of 12 bits" in repr(make_tokens([3, 5], codebooks=4))


def test_is_immutable_and_owns_its_ids(make_tokens):
    ids = torch.tensor([[1, 2, 3]])
    tokens = replace(make_tokens([3]), ids=ids)
    ids[0, 0] = 9
    assert tokens.ids.tolist() == [[1, 2, 3]]
    with pytest.raises(FrozenInstanceError):
        tokens.ids = ids


def test_ids_made_in_inference_mode_can_index_where_gradients_are_needed(make_tokens):
    with torch.inference_mode():
        tokens = make_tokens([4, 2])
        part = tokens[:, :1]
    embedding = torch.nn.Embedding(4096, 2)
    (embedding(tokens.ids).sum() + embedding(part.ids).sum()).backward()
    tokens.ids[0, 0] = 1


def test_equality(make_tokens):
    tokens = make_tokens([3, 5])
    assert tokens == make_tokens([3, 5])
    assert tokens != make_tokens([3, 5], seed=1)
    assert tokens != make_tokens([3, 4])
    assert tokens != make_tokens([3, 5], name="other")
    assert tokens != "tokens"
    with pytest.raises(TypeError):
        hash(tokens)


def test_items(make_tokens):
    tokens = make_tokens([3, 5, 1])
    one = tokens[0]
    assert not one.is_batch
    assert one.ids.tolist() == [tokens.ids[0, :3].tolist()]  # without the padding that the longer item needed
    assert tokens[-1].lengths.tolist() == [1]
    assert tokens[1:].lengths.tolist() == [5, 1]
    assert tokens[1:2].is_batch
    assert tokens[::-1].lengths.tolist() == [1, 5, 3]
    assert [item.ids.shape[1] for item in tokens] == [3, 5, 1]
    assert mt.Tokens.cat(list(tokens)) == tokens


@pytest.mark.parametrize("index", [3, -4])
def test_items_beyond_the_last(make_tokens, index):
    with pytest.raises(IndexError):
        make_tokens([3, 5, 1])[index]


@pytest.mark.parametrize("key", [slice(3, 3), "a", (slice(None), 2), (slice(None), slice(1, 2)), 1.5])
def test_keys_that_make_no_sense(make_tokens, key):
    with pytest.raises(mt.InvalidInput):
        make_tokens([3, 5, 1])[key]


def test_prefix(make_tokens):
    tokens = make_tokens([3, 5, 1])
    short = tokens[:, :2]
    assert short.lengths.tolist() == [2, 2, 1]
    assert torch.equal(short.ids, tokens.ids[:, :2])
    assert tokens[:, :99] == tokens == tokens[:, :]
    assert tokens[0, :2].lengths.tolist() == [2]
    alone = make_tokens([4], is_batch=False)
    assert not alone[:, :2].is_batch
    assert make_tokens([4], codebooks=3)[:, :2].ids.shape == (1, 2, 3)


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "2"])
def test_prefix_keeps_a_token(make_tokens, count):
    with pytest.raises(mt.InvalidInput, match="at least 1"):
        make_tokens([3])[:, :count]


def test_prefix_of_tiles_names_the_way_out(make_tokens):
    with pytest.raises(mt.InvalidInput, match="num_tokens=2"):
        make_tokens([6], frame=mt.ImageFrame(100, 50, 1, 2))[:, :2]


def test_cat_pads(make_tokens):
    a, b = make_tokens([3], is_batch=False), make_tokens([5, 2], seed=1)
    joined = mt.Tokens.cat([a, b])
    assert joined.is_batch
    assert joined.lengths.tolist() == [3, 5, 2]
    assert joined[0] == a
    assert joined[1:] == b


def test_cat_refuses_strangers(make_tokens):
    tokens = make_tokens([3])
    with pytest.raises(mt.TokenizerMismatch):
        mt.Tokens.cat([tokens, replace(tokens, fingerprint="f" * 16)])
    with pytest.raises(mt.InvalidTokens, match="cannot be joined"):
        mt.Tokens.cat([tokens, make_tokens([3], codebooks=2)])
    with pytest.raises(mt.InvalidInput):
        mt.Tokens.cat([])


def test_check_names_both_tokenizers(make_tokens):
    tokens = make_tokens([3])
    tokens.check("a new name", tokens.fingerprint)
    with pytest.raises(mt.TokenizerMismatch, match=r"titok-tiny \(0123456789abcdef\).*other \(f{16}\)"):
        tokens.check("other", "f" * 16)


def test_long_names_are_cut_between_characters(make_tokens):
    assert make_tokens([1], name="x" * 40).tokenizer == "x" * 24
    assert make_tokens([1], name="x" * 23 + "é").tokenizer == "x" * 23


BAD_FIELDS = [
    {"ids": torch.tensor([[1, 2, 4096]])},
    {"ids": torch.tensor([[1, 2, -1]])},
    {"ids": torch.tensor([[1.0, 2.0, 3.0]])},
    {"ids": torch.tensor([[True, False, True]])},
    {"ids": torch.tensor([1, 2, 3])},
    {"ids": torch.tensor([[1, 2]])},
    {"ids": torch.tensor([[1, 2, 3]] * 2)},
    {"ids": torch.zeros(1, 3, 0, dtype=torch.int64)},
    {"ids": torch.zeros(1, 3, 256, dtype=torch.int64)},
    {"ids": [[1, 2, 3]]},
    {"lengths": torch.tensor([2])},  # leaves an id in the padding
    {"lengths": torch.tensor([0])},
    {"lengths": torch.tensor([-1])},
    {"lengths": torch.tensor([], dtype=torch.int64)},
    {"lengths": torch.tensor([3.0])},
    {"tokenizer": "two\nlines"},
    {"tokenizer": "\x1b[31m"},
    {"tokenizer": 3},
    {"fingerprint": "0123"},
    {"fingerprint": "0123456789ABCDEF"},
    {"fingerprint": "0123456789abcdef\n"},
    {"vocab_size": 1},
    {"vocab_size": 2**32 + 1},
    {"vocab_size": 4096.0},
    {"modality": "smell"},
    {"frames": ()},
    {"frames": (mt.ImageFrame(1, 1),) * 2},
    {"frames": ((1, 1),)},
    {"frames": (mt.ImageFrame(100, 100, 2, 1),)},  # three tokens, two tiles
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda fields: str(next(iter(fields.items())))[:50])
def test_refuses_what_does_not_hold(make_tokens, fields):
    tokens = replace(make_tokens([3]), ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(mt.InvalidTokens) as caught:
        replace(tokens, **fields)
    assert "\n" not in str(caught.value)


def test_one_item_only_when_not_a_batch(make_tokens):
    with pytest.raises(mt.InvalidTokens, match="is_batch"):
        make_tokens([3, 5], is_batch=False)


@pytest.mark.parametrize(
    "size", [(0, 1), (1, 0), (65536, 1), (1, 1, 0, 1), (1, 1, 1, 0), (1, 1, 1, 16384), (1.0, 1), (-5, 1)]
)
def test_frames_have_limits(size):
    with pytest.raises(mt.InvalidTokens):
        mt.ImageFrame(*size)


# Scales.


def test_up_to_scale(make_tokens):
    tokens = make_tokens([14, 5], scales=(1, 4, 9))
    assert tokens.up_to_scale(1).lengths.tolist() == [1, 1]
    assert tokens.up_to_scale(3) == tokens
    assert tokens.up_to_scale(2) == tokens[:, :5]
    assert torch.equal(tokens.up_to_scale(2).ids, tokens.ids[:, :5])


@pytest.mark.parametrize("k", [0, 4, -1, 10**30, 1.0, True, "2", None])
def test_scales_that_are_not_there(make_tokens, k):
    with pytest.raises(mt.InvalidInput, match="1 to 3"):
        make_tokens([14], scales=(1, 4, 9)).up_to_scale(k)


def test_tokens_without_scales_have_none_to_take(make_tokens):
    with pytest.raises(mt.InvalidInput, match="no scales"):
        make_tokens([14]).up_to_scale(1)


def test_a_prefix_ends_with_a_scale(make_tokens):
    with pytest.raises(mt.InvalidInput, match="would cut a scale; they end at 1, 5, 14"):
        make_tokens([14], scales=(1, 4, 9))[:, :6]


@pytest.mark.parametrize("scales", [(1, 4), (0, 14), (14.0,), (1,) * 256, (20,)])
def test_scales_that_do_not_fit(make_tokens, scales):
    with pytest.raises(mt.InvalidTokens, match="scales"):
        make_tokens([14], scales=scales)


def test_tokens_of_other_scales_are_not_joined(make_tokens):
    with pytest.raises(mt.InvalidTokens, match="cannot be joined"):
        mt.Tokens.cat([make_tokens([5], scales=(1, 4)), make_tokens([5], scales=(5,))])


@pytest.mark.parametrize(
    "numbers", [(0, 0, 0, 0), (0, 0, 0, -1), (math.nan, 0, 0, 1), (0, math.inf, 0, 1), (0, 0, 1e39, 1), ("0", 0, 0, 1)]
)
def test_places_that_a_shape_cannot_have(numbers):
    with pytest.raises(mt.InvalidTokens, match="fp32"):
        mt.ShapeFrame(*numbers)


def test_places_are_kept_in_fp32():
    frame = mt.ShapeFrame(0.1, -0.0, 3, 1e-3)
    assert frame.x == torch.tensor(0.1).item()
    assert math.copysign(1, frame.y) == 1
