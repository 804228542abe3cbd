"""What every image tokenizer does for its users: batches, lengths, budgets, tiles, `.mtok`, and clear refusals."""

import re

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.core.tiles import TileGrid
from PIL import Image


def test_one_picture_or_a_list_in_every_form(one_d_piece, picture, tmp_path):
    image = Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    image.save(tmp_path / "p.png")
    forms = [tmp_path / "p.png", str(tmp_path / "p.png"), (tmp_path / "p.png").read_bytes(), image, np.asarray(image)]
    tokens = one_d_piece.encode(forms)
    assert len(tokens) == 5
    assert tokens.is_batch
    assert all(torch.equal(row, tokens.ids[0]) for row in tokens.ids)
    alone = one_d_piece.encode(image)
    assert not alone.is_batch
    assert torch.equal(alone.ids[0], tokens.ids[0])
    assert isinstance(one_d_piece.decode(alone), Image.Image)
    assert len(one_d_piece.decode(tokens)) == 5


def test_a_picture_does_not_depend_on_its_batch(one_d_piece):
    pixels = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    together = one_d_piece.encode(list(pixels), batch_size=3)
    for index, one in enumerate(pixels):
        assert torch.equal(one_d_piece.encode(one).ids[0], together.ids[index])


def test_mixed_lengths_in_one_batch_equal_each_alone(one_d_piece):
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([1, 5, 16, 9])
    together = one_d_piece.decode_ids(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = one_d_piece.decode_ids(ids[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[1], one_d_piece.decode_ids(ids[1:2])[0], atol=1e-3)


def test_prefixes_by_argument_and_by_slice_agree(one_d_piece, picture):
    tokens = one_d_piece.encode([picture, picture.flip(2)])
    assert one_d_piece.encode([picture, picture.flip(2)], num_tokens=5) == tokens[:, :5]
    short, full = one_d_piece.decode(tokens[:, :5], as_tensor=True), one_d_piece.decode(tokens, as_tensor=True)
    assert not torch.allclose(short[0], full[0], atol=1e-3)


def test_max_bytes_is_the_size_of_the_file(one_d_piece, picture, tmp_path):
    full = one_d_piece.encode(picture).num_bytes
    for budget in range(full - 11, full + 3):
        tokens = one_d_piece.encode(picture, max_bytes=budget)
        tokens.save(tmp_path / "t.mtok")
        assert (tmp_path / "t.mtok").stat().st_size <= budget
        longer = one_d_piece.encode(picture, num_tokens=min(int(tokens.lengths[0]) + 1, 16))
        assert longer.num_bytes > budget or longer == tokens
    with pytest.raises(mt.InvalidInput, match="at least"):
        one_d_piece.encode(picture, max_bytes=20)


def test_target_psnr_takes_the_bisected_length(one_d_piece, picture):
    pixels = one_d_piece._prepare(mt.read_image(picture), tile=False)[0]
    ids = one_d_piece.encode_pixels(pixels)
    with torch.no_grad():
        curve = [mt.psnr(one_d_piece.decode_ids(ids[:, :k]).clamp(0, 1), pixels) for k in range(1, 17)]
    for target in (min(curve) - 1, max(curve) + 5):
        length = int(one_d_piece.encode(picture, target_psnr=target).lengths[0])
        assert length == (1 if target < min(curve) else 16)
    # The quality of random weights is not monotonic: the length found reaches the target unless it is the longest.
    for target in curve:
        length = int(one_d_piece.encode(picture, target_psnr=target - 1e-6).lengths[0])
        assert length == 16 or curve[length - 1] >= target - 1e-6


def test_target_psnr_is_chosen_per_picture_and_respects_max_bytes(one_d_piece, picture):
    far = one_d_piece.encode([picture, torch.zeros(3, 32, 32)], target_psnr=60, max_bytes=60)
    assert all(mt.Tokens.num_bytes.fget(one) <= 60 for one in (far[0], far[1]))


@pytest.mark.parametrize("size", [(32, 32), (20, 15), (33, 32), (100, 31), (257, 190)])
def test_tiles_give_back_the_picture_size(one_d_piece, size):
    width, height = size
    tokens = one_d_piece.encode(torch.rand(3, height, width), tile=True, num_tokens=4)
    assert one_d_piece.decode(tokens).size == size
    assert mt.Tokens.from_bytes(tokens.to_bytes()) == tokens


@pytest.mark.parametrize("size", [(32, 32), (20, 15), (33, 90), (4096, 32), (100, 31), (257, 190)])
def test_tiles_blend_without_seams(size):
    width, height = size
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pixels = torch.stack([x, y, x * y])
    grid = TileGrid.cover(width, height, 32)
    tiles = grid.split(pixels)
    canvas = grid.canvas()
    canvas.paste(list(range(grid.num_tiles)), tiles)
    torch.testing.assert_close(canvas.picture(), pixels, atol=1e-5, rtol=0)
    # A brightness error of one tile fades out over the overlap instead of ending at an edge.
    if grid.cols > 2:
        tiles[1] += 0.5
        canvas = grid.canvas()
        canvas.paste(list(range(grid.num_tiles)), tiles)
        step = (canvas.picture() - pixels)[0].diff(dim=1).abs().max()
        assert step < 0.2


def test_too_large_for_tiles_is_refused(one_d_piece):
    with pytest.raises(mt.LimitExceeded, match="4096"):
        one_d_piece.encode(torch.zeros(3, 8, 4097), tile=True)


def test_tokens_of_another_model_are_refused(one_d_piece, build_tokenizer, picture):
    other = build_tokenizer(seed=5)
    assert other.fingerprint != one_d_piece.fingerprint
    with pytest.raises(mt.TokenizerMismatch, match="cannot be decoded"):
        one_d_piece.decode(other.encode(picture))


def test_fixed_length_tokenizers_say_so(titok, picture):
    for options in ({"num_tokens": 4}, {"target_psnr": 20}):
        with pytest.raises(mt.InvalidInput, match="always uses 16 tokens"):
            titok.encode(picture, **options)
    with pytest.raises(mt.InvalidInput, match="always uses 16"):
        titok.decode(titok.encode(picture)[:, :4])
    assert titok.encode(picture, num_tokens=16, tile=True).lengths[0] % 16 == 0


WRONG = {
    "num_tokens": [0, -1, 17, 10**30, 2.5, 4.0, True, "4", [4]], "max_bytes": [1, 0, -3, 60.0, True, "60"],
    "target_psnr": [-1, 0, 100, float("nan"), True, "20"], "batch_size": [0, -1, 1.5, True, "2"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_options_out_of_range_are_refused(one_d_piece, picture, name, value):
    with pytest.raises(mt.InvalidInput, match=re.escape(f"{name}={value!r}")):
        one_d_piece.encode(picture, **{name: value})


def test_numbers_of_numpy_are_numbers(one_d_piece, picture):
    assert one_d_piece.encode(picture, num_tokens=np.int64(3), batch_size=np.int32(2)).ids.shape == (1, 3)
    with pytest.raises(mt.InvalidInput, match="batch_size=0"):
        one_d_piece.decode(one_d_piece.encode(picture), batch_size=0)
    with pytest.raises(mt.InvalidInput, match="alone"):
        one_d_piece.encode(picture, num_tokens=3, target_psnr=20)


def test_tensor_level_names_what_is_wrong(one_d_piece):
    for pixels in (torch.zeros(1, 3, 31, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(mt.InvalidInput, match=r"\[B, 3, 32, 32\]"):
            one_d_piece.encode_pixels(pixels)
    for ids in (
        torch.full((1, 4), 64),
        torch.full((1, 4), -1),
        torch.zeros(1, 17, dtype=torch.long),
        torch.zeros(1, 4),
    ):
        with pytest.raises(mt.InvalidInput):
            one_d_piece.decode_ids(ids)
    with pytest.raises(mt.InvalidInput, match="lengths"):
        one_d_piece.decode_ids(torch.zeros(2, 4, dtype=torch.long), torch.tensor([0, 4]))


def test_progress_counts_pictures_and_can_cancel(one_d_piece, picture):
    seen = []
    one_d_piece.encode(
        [picture] * 5, batch_size=2, on_step=lambda step, total, preview=None: seen.append((step, total))
    )
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)

    def stop(step, total, preview=None):
        if step >= 2:
            raise mt.Cancelled("stopped")

    with pytest.raises(mt.Cancelled):
        one_d_piece.decode(one_d_piece.encode([picture] * 5), batch_size=2, on_step=stop)


def test_bfloat16_keeps_fingerprint_and_nearly_the_picture(one_d_piece, picture, tmp_path):
    one_d_piece.save_pretrained(tmp_path / "piece")
    half = mt.load(tmp_path / "piece", dtype="bfloat16")
    assert half.fingerprint == one_d_piece.fingerprint
    assert half.quantize.embedding.weight.dtype == torch.float32
    tokens = one_d_piece.encode(picture)
    assert half.encode(picture).ids.shape == tokens.ids.shape
    full, low = one_d_piece.decode(tokens, as_tensor=True), half.decode(tokens, as_tensor=True)
    assert mt.psnr(full, low) > 30
