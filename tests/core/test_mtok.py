"""The `.mtok` file: round trips, its size, saving and loading."""

import math

import mediatok as mt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mediatok.core import mtok

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)
vocab_sizes = st.one_of(st.integers(2, 2**32), st.integers(1, 32).map(lambda bits: 2**bits))
frames = st.builds(mt.ImageFrame, st.integers(1, 65535), st.integers(1, 65535))
places = st.floats(-(2.0**60), 2.0**60, width=32)
shape_frames = st.builds(mt.ShapeFrame, places, places, places, st.floats(2.0**-60, 2.0**60, width=32))
names = st.text(st.sampled_from("ab-é漢🙂"), max_size=30)


@settings(max_examples=100, deadline=None)
@given(lengths, vocab_sizes, st.sampled_from([None, 1, 2, 7]), names, frames, st.integers(0, 99))
def test_round_trip(make_tokens, lengths, vocab_size, codebooks, name, frame, seed):
    tokens = make_tokens(lengths, vocab_size, codebooks, name=name, frame=frame, seed=seed)
    data = tokens.to_bytes()
    assert mt.Tokens.from_bytes(data) == tokens
    assert len(data) == tokens.num_bytes
    assert tokens.to_bytes() == data


@settings(max_examples=50, deadline=None)
@given(shape_frames, st.lists(st.integers(1, 200), min_size=1, max_size=12), st.data())
def test_round_trip_of_a_shape_with_scales(make_tokens, frame, scales, data):
    kept = data.draw(st.integers(1, len(scales)))
    tokens = make_tokens([sum(scales)], modality="shape", frame=frame, scales=tuple(scales), is_batch=False)
    again = mt.Tokens.from_bytes(tokens.to_bytes())
    assert again == tokens
    assert again.frames == (frame,)
    part = again.up_to_scale(kept)
    assert part.lengths.tolist() == [sum(scales[:kept])]
    assert part.scales == tuple(scales)
    assert mt.Tokens.from_bytes(part.to_bytes()) == part


@pytest.mark.parametrize("bits", range(1, 33))
def test_lowest_and_highest_ids_of_every_width(make_tokens, bits):
    tokens = make_tokens([5], vocab_size=2**bits, is_batch=False)
    tokens.ids[0] = torch.tensor([0, 2**bits - 1, 1, 2 ** (bits - 1), 0])
    assert mt.Tokens.from_bytes(tokens.to_bytes()) == tokens


@pytest.mark.parametrize("num_ids", [mtok.CHUNK - 1, mtok.CHUNK, mtok.CHUNK + 1, 2 * mtok.CHUNK + 3])
@pytest.mark.parametrize("vocab_size", [2, 4096, 2**13 - 5])
def test_round_trip_across_chunks(make_tokens, num_ids, vocab_size):
    tokens = make_tokens([num_ids], vocab_size)
    assert mt.Tokens.from_bytes(tokens.to_bytes()) == tokens


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), vocab_sizes, names, frames)
def test_one_item_takes_64_bytes_beside_its_ids(make_tokens, length, vocab_size, name, frame):
    tokens = make_tokens([length], vocab_size, is_batch=False, name=name, frame=frame)
    assert tokens.num_bytes <= 64 + math.ceil(length * tokens.bits_per_token / 8)


def test_the_largest_header_has_70_bytes():
    """Every part of the header at its longest; too many ids to make, so the parts are added up."""
    longest = [mtok._varint(value) for value in (2**32 - 1, 2**28 - 1)]
    fixed = len(mtok.MAGIC) + 3 + 8 + 1 + mt.core.tokens.MAX_NAME_BYTES + 1 + mtok.CRC_BYTES
    image_frame = [mtok._varint(value) for value in (65535, 65535, 2**14 - 1, 2**14 - 1)]
    assert fixed + sum(map(len, longest + image_frame)) == 64
    assert fixed + sum(map(len, longest)) + 4 * 4 == 70  # of a shape


def test_titok_l32_fits_its_48_bytes_and_a_small_header(make_tokens):
    tokens = make_tokens([32], name="titok-l32", frame=mt.ImageFrame(256, 256), is_batch=False)
    assert tokens.num_bytes == 48 + 39


def test_single_and_list_are_told_apart(make_tokens):
    for is_batch in (True, False):
        tokens = make_tokens([3], is_batch=is_batch)
        assert mt.Tokens.from_bytes(tokens.to_bytes()).is_batch is is_batch


def test_save_and_load(make_tokens, tmp_path):
    tokens = make_tokens([3, 5])
    tokens.save(tmp_path / "a.mtok")
    assert mt.Tokens.load(tmp_path / "a.mtok") == tokens
    assert (tmp_path / "a.mtok").stat().st_size == tokens.num_bytes
    assert [file.name for file in tmp_path.iterdir()] == ["a.mtok"]


def test_load_names_the_file(tmp_path):
    path = tmp_path / "bad.mtok"
    path.write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(mt.InvalidTokens, match=r"bad\.mtok: this is not a \.mtok file"):
        mt.Tokens.load(path)
    with pytest.raises(mt.InvalidInput, match="does not exist"):
        mt.Tokens.load(tmp_path / "missing.mtok")
    path.write_bytes(b"")
    with pytest.raises(mt.InvalidInput, match="empty"):
        mt.Tokens.load(path)
    with pytest.raises(mt.InvalidInput, match="folder"):
        mt.Tokens.load(tmp_path)


def test_a_file_has_limits(make_tokens):
    tokens = make_tokens([mtok.MAX_IDS // 4, 1, 1, 1], vocab_size=2)
    assert mt.Tokens.from_bytes(tokens.to_bytes()) == tokens
    with pytest.raises(mt.InvalidTokens, match="split it"):
        make_tokens([mtok.MAX_IDS // 4, 1, 1, 1, 1], vocab_size=2).to_bytes()
