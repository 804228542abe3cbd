"""Next-scale generation: one pass a scale, the cache, draws, guidance, given scales, conditions, training, saving."""

import copy
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import mediatok as mt
import pytest
import torch
from mediatok.generators.next_scale import NextScale
from mediatok.generators.next_scale_condition import Features
from mediatok.generators.next_scale_sampling import NextScaleSettings, SeededDraws, probabilities
from mediatok.tokenizers.shape.vat import VAT

MODELS = SimpleNamespace(**run_path(Path(__file__).parent / "next_scale_models.py"))
ENDS = list(accumulate(MODELS.SCALES))
TOTAL = ENDS[-1]
PLAIN = NextScaleSettings(num_scales=3, guidance=3.0, temperature=1.0, top_k=0, top_p=1.0)
LABELS = torch.tensor([0, 1, 3])


@pytest.fixture
def gen():
    return MODELS.small()


def plain_generate(gen, labels, settings, chance_BS, features=None):
    """The textbook loop: for every scale the whole sequence, masked, twice."""
    none = None if features is None else Features(features.values_BFD, torch.zeros_like(features.counts_B))
    ids = torch.zeros(len(labels), TOTAL, dtype=torch.int64)
    for scale, end in enumerate(ENDS):
        places = slice(end - MODELS.SCALES[scale], end)
        conditional = gen.logits(ids, labels, features)[:, places]
        unconditional = gen.logits(ids, torch.full_like(labels, 3), none)[:, places]
        weight = settings.guidance * scale / (len(ENDS) - 1)
        shares = probabilities((1 + weight) * conditional - weight * unconditional, settings).double()
        ids[:, places] = (shares.cumsum(-1) < chance_BS[:, places, None]).sum(-1).clamp(max=shares.shape[-1] - 1)
    return ids


# The loop.


@pytest.mark.parametrize(
    "settings",
    [PLAIN, replace(PLAIN, guidance=0.0), replace(PLAIN, temperature=0.5, top_k=7, top_p=0.8)],
    ids=["plain", "no guidance", "cut"],
)
def test_the_cache_and_the_single_head_change_nothing(gen, settings):
    chance_BS = SeededDraws(MODELS.rngs(5, 6, 7), TOTAL, gen.device).chance_BS
    with torch.inference_mode():
        expected = plain_generate(gen, LABELS, settings, chance_BS)
    assert torch.equal(gen.generate_ids(LABELS, settings, MODELS.rngs(5, 6, 7)), expected)
    assert len(expected.unique()) > 5


def test_hidden_states_with_a_cache_are_those_without(gen):
    """Closer than ids can tell: rows of each scale, one call a scale, against one masked call of everything."""
    ids = torch.randint(20, (2, TOTAL), generator=torch.Generator().manual_seed(0))
    labels, cache, seen = torch.tensor([1, 2]), gen.transformer.new_cache(2), []
    with torch.inference_mode():
        expected = gen.logits(ids, labels)
        for scale, tokens in enumerate(MODELS.SCALES):
            if scale:
                x = gen.transformer.scale_rows(gen.views(ids)[scale - 1], scale)
            else:
                x = gen.transformer.first_rows(gen.transformer.prefix(labels))
            seen.append(gen.transformer.logits(gen.transformer(x, cache=cache)[:, -tokens:]))
    assert cache.length == gen.transformer.length == TOTAL + 1
    torch.testing.assert_close(torch.cat(seen, dim=1), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 3), (2.0, 6)])
def test_as_many_passes_as_scales_and_both_branches_in_one(gen, guidance, rows):
    calls = []
    handle = gen.transformer.register_forward_pre_hook(lambda module, args, kw: calls.append(args[0].shape[:2]),
                                                       with_kwargs=True)  # fmt: skip
    gen.generate_ids(LABELS, replace(PLAIN, guidance=guidance), MODELS.rngs(1, 2, 3))
    handle.remove()
    assert calls == [(rows, 1 + 1), (rows, 3), (rows, 6)]


def test_a_token_sees_no_finer_scale_and_all_of_its_own(gen):
    ids = torch.randint(20, (1, TOTAL), generator=torch.Generator().manual_seed(0))
    before = gen.logits(ids, LABELS[:1])
    for scale, end in enumerate(ENDS):
        changed = ids.clone()
        changed[:, end - MODELS.SCALES[scale] :] = (ids[:, end - MODELS.SCALES[scale] :] + 1) % 20
        after = gen.logits(changed, LABELS[:1])
        assert torch.equal(after[:, :end], before[:, :end])  # its own scale's ids are what it is to predict
        if end < TOTAL:
            is_other = (after[0, end:] - before[0, end:]).abs().amax(dim=-1) > 0
            assert bool(is_other.all())


def test_guidance_grows_from_scale_to_scale():
    settings = replace(PLAIN, num_scales=4, guidance=6.0)
    assert [settings.guidance_weight(scale) for scale in range(4)] == [0, 2, 4, 6]
    assert replace(settings, num_scales=1).guidance_weight(0) == 6


# Draws.


def test_probabilities_are_cut_first_to_top_k_then_to_top_p():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2, 0.0]).clamp(min=1e-9).log()

    def kept(**changes):
        return probabilities(logits, replace(PLAIN, **changes)).nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 2]
    assert kept(top_p=0.69) == [0, 2]
    assert kept(top_p=0.71) == [0, 2, 3]
    assert kept(top_k=2, top_p=0.5) == [0]  # 0.4 of the 0.7 that are left
    assert kept(top_p=0.0) == [0]
    assert kept(top_k=1, top_p=0.5) == [0]
    torch.testing.assert_close(probabilities(logits, replace(PLAIN, top_k=2))[[0, 2]], torch.tensor([4 / 7, 3 / 7]))
    hot = probabilities(logits, replace(PLAIN, temperature=2.0))
    torch.testing.assert_close(hot, logits.div(2).softmax(-1))
    assert probabilities(torch.zeros(2, 3, 5), replace(PLAIN, top_k=2)).gt(0).all()  # ties stay


def test_draws_follow_the_probabilities():
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = SeededDraws(MODELS.rngs(0), 20_000, torch.device("cpu"))
    drawn = draws.draw(slice(None), shares.log().expand(1, 20_000, -1), PLAIN)
    torch.testing.assert_close(torch.bincount(drawn[0], minlength=4) / 20_000, shares, rtol=0, atol=0.015)
    greedy = draws.draw(slice(0, 5), shares.log().expand(1, 5, -1), replace(PLAIN, temperature=0.0))
    assert greedy.tolist() == [[0] * 5]


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_a_shape_does_not_depend_on_its_batch(gen, guidance):
    settings = replace(PLAIN, guidance=guidance)
    together = gen.generate_ids(LABELS, settings, MODELS.rngs(5, 6, 7))
    for row in range(3):
        alone = gen.generate_ids(LABELS[row : row + 1], settings, MODELS.rngs(5 + row))
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together[0], together[1])


def test_given_scales_stay_and_the_same_seed_makes_the_same_of_them(gen):
    whole = gen.generate_ids(LABELS, PLAIN, MODELS.rngs(5, 6, 7))
    for end in ENDS:
        again = gen.generate_ids(LABELS, PLAIN, MODELS.rngs(5, 6, 7), start_BL=whole[:, :end])
        assert torch.equal(again, whole)
    other = gen.generate_ids(LABELS, PLAIN, MODELS.rngs(8, 9, 10), start_BL=whole[:, : ENDS[1]])
    assert torch.equal(other[:, : ENDS[1]], whole[:, : ENDS[1]])
    assert not torch.equal(other, whole)


# The user's level.


def test_sampling_makes_meshes_tokens_and_how_to_make_them_again(gen):
    made = gen.sample(["chair", 1, None], seed=5, resolution=16, batch_size=2)
    assert (made.labels, made.seeds) == ([0, 1, 3], [5, 6, 7])
    assert made.tokens.scales == MODELS.SCALES
    assert made.tokens.fingerprint == gen.tokenizer.fingerprint
    assert [mesh.is_watertight for mesh in made.meshes] == [True] * 3
    decoded = gen.tokenizer.decode(made.tokens, resolution=16)
    assert all((one.vertices == other.vertices).all() for one, other in zip(decoded, made.meshes, strict=True))
    again = gen.sample([None, "tab"], seed=[7, 6], resolution=16)
    assert torch.equal(again.tokens.ids, made.tokens.ids[[2, 1]])
    assert len(gen.generate(2, seed=0, resolution=8)) == 1
    assert gen.sample(resolution=8).labels == [3]


def test_label_and_guidance_decide(gen):
    plain = gen.sample(0, seed=7, resolution=8).tokens
    assert gen.sample(1, seed=7, resolution=8).tokens != plain
    assert gen.sample(0, seed=7, guidance=9.0, resolution=8).tokens != plain


def test_coarse_scales_are_continued_in_their_place(gen):
    first = gen.sample([0, 1], seed=1, resolution=8)
    frames = (mt.core.tokens.ShapeFrame(5, 6, 7, 2), mt.core.tokens.ShapeFrame(0, 0, 0, 9))
    start = replace(first.tokens, frames=frames)
    coarse = start.up_to_scale(2)
    other = gen.sample([0, 1], seed=8, start=coarse, resolution=8)
    assert other.tokens.up_to_scale(2) == coarse
    assert other.tokens != start
    assert other.meshes[0].centroid == pytest.approx([5, 6, 7], abs=1e-3)
    assert gen.sample([0, 1], seed=1, start=coarse, resolution=8).tokens == start
    assert gen.sample([0, 1], seed=9, start=start, resolution=8).tokens == start
    for one in (coarse[0], coarse.ids[0], coarse.ids[:1], replace(first, tokens=coarse[:1])):
        several = gen.sample([0, 1, 2], seed=8, start=one, resolution=8).tokens
        assert several.ids[:, : ENDS[1]].tolist() == [coarse.ids[0].tolist()] * 3


def test_every_scale_and_mesh_is_reported_and_previews_decode(gen):
    seen = []
    made = gen.sample([0, 1, 2], seed=0, batch_size=2, resolution=8,
                      on_step=lambda *step, preview: seen.append((*step, preview)))  # fmt: skip
    assert [step[:2] for step in seen] == [(step, 9) for step in range(1, 10)]
    previews = [step[2] for step in seen]
    assert [None if tokens is None else tuple(tokens.ids.shape) for tokens in previews] == [
        (2, 1), (2, 4), (2, 10), (1, 1), (1, 4), (1, 10), None, None, None,
    ]  # fmt: skip
    assert previews[1] == made.tokens[:2].up_to_scale(2)
    assert len(gen.tokenizer.decode(previews[1], resolution=8)) == 2


@pytest.mark.parametrize("error", [mt.Cancelled("stop"), ValueError("theirs")], ids=repr)
@pytest.mark.parametrize("stop", [2, 5])
def test_whatever_a_callback_raises_comes_out_and_the_model_works_on(gen, error, stop):
    before = gen.sample(0, seed=3, resolution=8).tokens

    def fail(step, total, preview=None):
        if step == stop:
            raise error

    with pytest.raises(type(error)):
        gen.sample([0, 1], seed=1, resolution=8, on_step=fail)
    assert gen.sample(0, seed=3, resolution=8).tokens == before


def test_a_seed_decides_also_amid_training():
    gen = MODELS.small(dropout=0.5)
    expected = gen.sample([0, 1], seed=3, resolution=8).tokens
    assert gen.train().sample([0, 1], seed=3, resolution=8).tokens == expected
    assert gen.training


def test_packed_weights_make_the_same_shapes(gen):
    before = gen.sample([0, 1], seed=3, resolution=8).tokens
    gen.pack_network()
    assert gen.sample([0, 1], seed=3, resolution=8).tokens == before


def test_saved_and_loaded_it_makes_the_same(gen, tmp_path):
    gen.tokenizer.save_pretrained(tmp_path / "balls")
    gen.save_pretrained(tmp_path / "gen")
    twin = NextScale.from_pretrained(tmp_path / "gen")
    twin.use_tokenizer(gen.tokenizer)
    assert twin.sample("lamp", seed=1, resolution=8).tokens == gen.sample("lamp", seed=1, resolution=8).tokens
    assert not any(name.startswith(("visible", "_tokenizer")) for name in gen.state_dict())
    assert copy.deepcopy(gen).tokenizer is gen.tokenizer


def test_in_bfloat16(gen):
    low = copy.deepcopy(gen).cast(torch.bfloat16)
    assert low.transformer.head.weight.dtype == torch.bfloat16
    ids = torch.randint(20, (1, TOTAL))
    torch.testing.assert_close(low.logits(ids, LABELS[:1]), gen.logits(ids, LABELS[:1]), rtol=0.2, atol=2.0)
    assert len(low.generate(0, seed=0, resolution=8)) == 1


# Training.


def test_it_learns_what_the_label_says():
    torch.manual_seed(0)
    tokenizer = MODELS.BallTokenizer().eval()
    gen = NextScale(
        scales=MODELS.SCALES, codebook_size=20, code_width=4, width=32, depth=2, num_heads=2, num_classes=3
    ).train()  # fmt: skip
    gen.use_tokenizer(tokenizer)
    gen.enable_gradient_checkpointing()
    ids = torch.randint(20, (3, TOTAL), generator=torch.Generator().manual_seed(1))
    optimizer, rng = torch.optim.Adam(gen.parameters(), 3e-3), torch.Generator().manual_seed(0)
    first = None
    for _ in range(150):
        output = gen(ids, torch.arange(3), rng)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = output.loss.item() if first is None else first
    assert abs(first - torch.tensor(20.0).log()) < 0.4
    assert output.loss.item() < 0.6
    made = gen.generate_ids(torch.arange(3), replace(PLAIN, guidance=1.0, temperature=0.0), MODELS.rngs(0, 1, 2))
    assert torch.equal(made, ids)


def test_every_parameter_learns_and_conditions_are_dropped():
    gen = MODELS.small(text_tokens=2, text_width=5).train()
    ids = torch.randint(20, (8, TOTAL))
    features = Features(torch.randn(8, 2, 5), torch.tensor([0, 1, 2, 2, 2, 2, 2, 2]))
    output = gen(ids, torch.arange(8) % 3, torch.Generator().manual_seed(0), features)
    output.loss.backward()
    assert not [name for name, parameter in gen.named_parameters() if parameter.grad is None]
    assert set(output.metrics) == {"last_scale_loss", "accuracy"}
    dropped = MODELS.small(text_tokens=2, text_width=5, label_drop_prob=1.0)
    one, other = (dropped(ids, torch.full((8,), label), None, features).loss for label in (0, 1))
    assert one == other
    table, rows = gen.class_rows()
    assert gen.get_parameter(table)[rows].shape == (4, 32)


# Conditions.


def test_texts_begin_the_sequence():
    gen = MODELS.small(num_classes=0, label_names=(), text_tokens=3, text_width=5)
    texts = [torch.randn(length, 5, generator=torch.Generator().manual_seed(length)) for length in (3, 2)]
    made = gen.sample(texts=texts, seed=[1, 1], resolution=8)
    assert made.labels == [0, 0]
    assert made.tokens[0] != made.tokens[1]
    assert gen.sample(texts=texts[1], seed=1, resolution=8).tokens.ids.tolist() == made.tokens.ids[1:].tolist()
    assert gen.sample(seed=1, resolution=8).tokens.ids.tolist() != made.tokens.ids[:1].tolist()
    chance_BS = SeededDraws(MODELS.rngs(1, 1), TOTAL, gen.device).chance_BS
    padded = torch.zeros(2, 3, 5)
    padded[0], padded[1, :2], padded[1, 2] = texts[0], texts[1], 1e6  # what lies past a text's end means nothing
    features, labels = Features(padded, torch.tensor([3, 2])), torch.tensor([0, 0])
    with torch.inference_mode():
        none = Features(padded, torch.zeros(2, dtype=torch.int64))
        assert torch.equal(gen.logits(made.tokens.ids, labels, none), gen.logits(made.tokens.ids, labels))
    settings = gen.settings()
    ids = gen.generate_ids(labels, settings, MODELS.rngs(1, 1), features=features)
    assert torch.equal(ids, made.tokens.ids)
    assert chance_BS[0].equal(chance_BS[1])


def test_pictures_begin_the_sequence(tmp_path):
    gen = MODELS.small(image_encoder=MODELS.ENCODER)
    assert gen.transformer.prefix.length == 1 + 4 * 4 + 1  # the class, patches of 224 pixels, the encoder's own token
    grey, noise = torch.full((3, 30, 40), 0.5), torch.rand(3, 50, 50, generator=torch.Generator().manual_seed(0))
    made = gen.sample("chair", images=[grey, noise], seed=[1, 1], resolution=8)
    assert made.labels == [0, 0]
    assert made.tokens[0] != made.tokens[1]
    assert gen.sample("chair", images=noise, seed=1, resolution=8).tokens.ids.tolist() == made.tokens.ids[1:].tolist()
    assert not any(parameter.requires_grad for parameter in gen.vision.parameters())
    gen.save_pretrained(tmp_path / "gen")
    twin = mt.load(tmp_path / "gen")
    twin.use_tokenizer(gen.tokenizer)
    assert twin.sample(0, images=[grey, noise], seed=[1, 1], resolution=8).tokens == made.tokens
    gen.vision.network.save_pretrained(tmp_path / "encoder")
    other = MODELS.small(image_encoder=MODELS.ENCODER)
    torch.nn.init.zeros_(other.vision.network.layernorm.weight)
    other.vision.load_released(tmp_path / "encoder")
    pixels = torch.rand(1, 3, 224, 224)
    assert torch.equal(other.vision(pixels).values_BFD, gen.vision(pixels).values_BFD)
    with pytest.raises(mt.InvalidCheckpoint, match="does not fit"):
        MODELS.small(image_encoder=MODELS.ENCODER | {"hidden_size": 32}).vision.load_released(tmp_path / "encoder")


# With the tokenizer that it is for.


def test_over_vat():
    torch.manual_seed(0)
    vat = VAT(
        num_points=64, num_features=16, width=32, num_heads=2, encoder_depth=1, decoder_depth=1, scales=(1, 2, 4),
        codebook_size=16, code_width=4, plane_size=4, plane_channels=(16, 8), head_width=16,
    ).eval()  # fmt: skip
    gen = MODELS.small(vat)
    made = gen.sample(["chair", "lamp"], seed=0, resolution=8)
    assert made.tokens.ids.shape == (2, 7)
    assert len(made.meshes) == 2
    finer = gen.sample("chair", seed=0, start=made.tokens[:1].up_to_scale(1), resolution=8)
    assert torch.equal(finer.tokens.ids, made.tokens.ids[:1])
