"""TokenFlow: any number of scales, features, bad input, training passes, and files of its authors."""

import os

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import InvalidCheckpoint, InvalidInput
from mediatok.core.registry import constructor_arguments, find_entry
from mediatok.tokenizers.image.tokenflow import TokenFlow

SIZES = {
    "image_size": 32, "sides": (1, 2, 4), "codebook_size": 40, "semantic_code_width": 6, "pixel_code_width": 3,
    "tower_width": 24, "tower_depth": 2, "tower_heads": 2, "tower_hidden": 32, "tower_patch": 8, "tower_grid": 4,
    "semantic_width": 24, "semantic_depth": 1, "semantic_heads": 2, "semantic_grid": 4, "teacher_width": 5,
    "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "z_channels": 8, "decoder_channels": 32,
    "decoder_res_blocks": 1,
}  # fmt: skip


def build(**changes):
    torch.manual_seed(0)
    model = TokenFlow(**SIZES | changes).eval()
    with torch.no_grad():  # larger than training begins with, so that ids depend on the picture
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "quantize" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module")
def tok():
    return build()


def test_every_number_of_scales_decodes(tok, picture, tmp_path):
    tokens = tok.encode([picture, picture.flip(-1)])
    assert tokens.scales == (1, 4, 16)
    assert tokens.ids.shape == (2, 21)
    assert len(tokens.ids.unique()) > 5
    tokens.save(tmp_path / "a.mtok")
    assert mt.Tokens.load(tmp_path / "a.mtok") == tokens
    pictures = [tok.decode(tokens.up_to_scale(k), as_tensor=True)[0] for k in (1, 2, 3)]
    assert not torch.equal(pictures[0], pictures[1])
    torch.testing.assert_close(pictures[2], tok.decode(tokens, as_tensor=True)[0])
    assert [len(tok.encode(picture, num_tokens=n).ids[0]) for n in (1, 5, 21)] == [1, 5, 21]


def test_rows_of_unequal_length_are_what_they_are_alone(tok, picture):
    ids = tok.encode(picture).ids.expand(3, -1)
    together = tok.decode_ids(ids, torch.tensor([1, 5, 21]))
    for row, length in enumerate((1, 5, 21)):
        torch.testing.assert_close(together[row], tok.decode_ids(ids[:1, :length])[0], atol=1e-5, rtol=1e-5)


def test_lengths_are_whole_scales(tok, picture):
    with pytest.raises(InvalidInput, match=r"end within a scale.*1, 5, 21"):
        tok.encode(picture, num_tokens=4)
    with pytest.raises(InvalidInput, match="end within a scale"):
        tok.decode_ids(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="would cut a scale"):
        tok.encode(picture)[:, :3]
    assert len(tok.encode(picture, target_psnr=99.0).ids[0]) == 21
    sizes = {tok.encode(picture, num_tokens=n).num_bytes: n for n in tok.lengths}
    for size, length in sizes.items():
        assert len(tok.encode(picture, max_bytes=size).ids[0]) == length
    with pytest.raises(InvalidInput, match="too small"):
        tok.encode(picture, max_bytes=min(sizes) - 1)


def test_tiles(tok, picture):
    tokens = tok.encode(picture, tile=True, num_tokens=5)
    assert tok.decode(tokens).size == (70, 50)


def test_features_are_the_sum_of_the_codes(tok, picture):
    one, several = tok.features(picture), tok.features([picture, picture])
    assert one.shape == (16, 9)
    torch.testing.assert_close(several[1], one)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        total = tok.quantize.sum_of(tok.encode_pixels(pixels)).flatten(2).transpose(1, 2)
        assert torch.equal(tok.encode_features(pixels), total)
        norms = tok.quantize.codes(torch.arange(40)[None])[0].split((6, 3), dim=1)
    for part in norms:
        torch.testing.assert_close(part.norm(dim=1), torch.ones(40))


def test_training_gives_every_part_a_gradient(tok):
    model = build().train()
    output = model(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(1))
    (output.decoded.mean() + output.semantic_BPT.square().mean() + output.vq.quantizer_loss).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    lengths = {model(torch.rand(1, 3, 32, 32), torch.Generator().manual_seed(s)).ids_BL.shape[1] for s in range(60)}
    assert lengths == {21, 17, 5}  # all scales, without the second, without the last
    model.freeze_encoder()
    names = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"decoder"}


def test_bfloat16_keeps_most_ids(tok, picture):
    half = build().cast(torch.bfloat16)
    assert half.quantize.embedding_vqkd.weight.dtype == torch.float32
    assert half.fingerprint == tok.fingerprint
    tokens = half.encode(picture)
    assert (tokens.ids == tok.encode(picture).ids).float().mean() > 0.5
    assert half.decode(tokens, as_tensor=True).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sides": (1, 4, 2)}, "must grow"),
        ({"sides": ()}, "sides must be"),
        ({"sides": (1, 2, 5)}, "the last scale is 5"),
        ({"tower": "dino"}, "tower must be one of"),
        ({"tower_heads": 5}, "not divisible"),
        ({"channels": 40}, "multiple of 32"),
        ({"codebook_size": 2**40}, "codebook_size"),
        ({"multipliers": (0,)}, "multipliers"),
        ({"tower_depth": True}, "tower_depth"),
    ],
)
def test_bad_sizes(changes, reason):
    with torch.device("meta"), pytest.raises(InvalidInput, match=reason):
        TokenFlow(**SIZES | changes)


def test_saved_and_loaded(tok, picture, tmp_path):
    tok.save_pretrained(tmp_path / "m")
    again = mt.load(tmp_path / "m")
    assert again.fingerprint == tok.fingerprint
    assert torch.equal(again.encode(picture).ids, tok.encode(picture).ids)


@pytest.mark.parametrize("name", ["tokenflow-b", "tokenflow-xl"])
def test_released_sizes(name):
    entry = find_entry(name)
    with torch.device("meta"):
        model = TokenFlow(**constructor_arguments(entry))
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
    assert model.max_tokens == {"tokenflow-b": 817, "tokenflow-xl": 2227}[name]


@pytest.mark.parametrize("k", [0, -1, 4, 10**30, 1.0, True, "2", None])
def test_numbers_of_scales_and_tokens_that_are_not_there(tok, picture, k):
    with pytest.raises(InvalidInput, match=r"1 to 3, not"):
        tok.encode(picture).up_to_scale(k)
    if k is not None:  # which means all tokens
        with pytest.raises(InvalidInput, match=r"num_tokens=.* 1 to 21|end within a scale"):
            tok.encode(picture, num_tokens=k)


class Hostile:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.mark.parametrize("file", ["tokenflow_clipb_32k_enhanced.pt", "renamed.pt"])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_file_with_code_is_refused_and_not_run(tmp_path, file, place):
    weights = {"quantize.embedding_vqkd.weight": torch.zeros(4, 3)}
    hostile = Hostile(tmp_path / "was_run")
    saved = {"model": weights, "args": hostile} if place == "beside" else {"model": weights | {"x": hostile}}
    torch.save(saved, tmp_path / file)
    for load in (mt.load, mt.convert.load_official):
        with pytest.raises(InvalidCheckpoint, match=r"names code \('\w+\.mkdir'\)\. It was not run"):
            load(tmp_path / file)
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("wrapping", ["ema", "model", "state_dict"])
def test_a_released_file_is_known_by_name_and_by_keys(tmp_path, wrapping):
    for file in ("tokenflow_clipb_32k_enhanced.pt", "renamed.pt"):
        weights = {
            "quantize.embedding_vqkd.weight": torch.zeros(4, 3),
            "decoder.conv_out.weight": torch.zeros(3, 256, 3, 3),
        }
        torch.save({wrapping: weights, "step": 3}, tmp_path / file)
        with pytest.raises(InvalidCheckpoint, match=r"missing encoder_vqkd\.conv1\.weight \[768, 3, 16, 16\]"):
            mt.convert.load_official(tmp_path / file) if file == "renamed.pt" else mt.load(tmp_path / file)
