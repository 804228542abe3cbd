"""How the tokenizer decodes what a generator made: its options reach pictures and previews, and are checked."""

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.generators.next_token import NextToken
from mediatok.tokenizers.image.flextok import FlexTok

FLEXTOK = {
    "num_tokens": 6, "levels": (5, 3, 2), "grid": (4, 4), "patch_size": 1, "encoder_width": 32, "encoder_depth": 1,
    "encoder_head_width": 16, "decoder_width": 32, "decoder_depth": 1, "decoder_head_width": 16, "latent_channels": 3,
    "vae_channels": (8, 8), "vae_layers": 1, "vae_norm_groups": 4, "num_steps": 3, "guidance_scale": 2.0,
}  # fmt: skip
OWN = {"steps": 3, "guidance": 2.0, "norm_guidance": True, "seed": 0}


@pytest.fixture(scope="module")
def gen():
    """Next tokens over a flow, both with random weights under which tokens matter to pictures."""
    torch.manual_seed(0)
    tokenizer = FlexTok(**FLEXTOK).eval()
    model = NextToken(width=32, depth=2, num_heads=2, hidden=48, vocab_size=30, num_tokens=6, num_classes=3).eval()
    with torch.no_grad():
        for name, parameter in (*tokenizer.named_parameters(), *model.named_parameters()):
            if name.startswith(("encoder", "decoder", "transformer")) and parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.use_tokenizer(tokenizer)
    return model


def arrays(images):
    return [np.array(image).astype(int) for image in images]


def same(ours, theirs):
    return all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_options_change_pictures_and_nothing_else(gen):
    ways = [{}, {"steps": 2}, {"guidance": 5.0}, {"seed": 4}, {"guidance": 5.0, "norm_guidance": False}]
    made = [gen.sample([1, 2], seed=0, decoding=decoding) for decoding in ways]
    pictures = [arrays(one.images) for one in made]
    assert len({str([picture.tolist() for picture in one]) for one in pictures}) == len(ways)
    for decoding, one, shown in zip(ways, made, pictures, strict=True):
        assert torch.equal(one.content, made[0].content)
        assert same(arrays(gen.tokenizer.decode(gen.tokens(one.content), **decoding)), shown)
        assert same(arrays(gen.generate([1, 2], seed=0, decoding=decoding)), shown)


def test_defaults_are_the_tokenizers_own(gen):
    assert gen.decoding_option_names == ("steps", "guidance", "norm_guidance", "seed")
    assert gen.decoding_defaults() == OWN
    plain = arrays(gen.generate([1, 2], seed=0))
    for decoding in (None, {}, OWN, {"steps": None, "seed": 0}):
        assert same(arrays(gen.generate([1, 2], seed=0, decoding=decoding)), plain)


def test_the_seed_of_decoding_is_every_pictures(gen):
    """A picture depends on its label, its own seed and what is said of decoding, in any batch."""
    whole = arrays(gen.generate([1, 2, 1], seed=[5, 6, 5], decoding={"seed": 4}))
    assert np.array_equal(whole[0], whole[2])
    for batch_size in (1, 2):
        parts = arrays(gen.generate([1, 2, 1], seed=[5, 6, 5], decoding={"seed": 4}, batch_size=batch_size))
        assert max(np.abs(ours - theirs).max() for ours, theirs in zip(parts, whole, strict=True)) <= 1
    (alone,) = arrays(gen.generate(2, seed=6, decoding={"seed": 4}))
    assert np.abs(alone - whole[1]).max() <= 1


def test_previews_are_decoded_alike(gen):
    shown = {}

    def on_step(step, total, preview=None):
        if preview is not None:
            shown[step] = preview

    way = {"steps": 1, "seed": 3}
    made = gen.sample(0, seed=0, decoding=way, previews=True, on_step=on_step)
    assert sorted(shown) == [1, 2, 4, 6]
    for step, preview in shown.items():
        (by_tokenizer,) = gen.tokenizer.decode(gen.tokens(made.content[:, :step]), as_tensor=True, **way)
        torch.testing.assert_close(preview[0], by_tokenizer, atol=1e-5, rtol=0)


def test_a_run_stops_at_any_step_of_the_decoder(gen):
    seen = []

    def on_step(step, total, preview=None):
        assert preview is None
        seen.append((step, total))
        if len(seen) == 9:
            raise mt.Cancelled("enough")

    gen.sample(0, seed=0, steps=2, decoding={"steps": 4}, on_step=on_step)
    assert seen == [(1, 2), (2, 2), *[(2, 2)] * 4]
    seen.clear()
    with pytest.raises(mt.Cancelled):
        gen.sample(0, seed=0, steps=2, decoding={"steps": 1000}, on_step=on_step)
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("decoding", "words"),
    [
        ({"stepz": 3}, r"no option 'stepz' of decoding\. It has steps, guidance.*Did you mean 'steps'"),
        ({"self": 3}, "no option 'self' of decoding"),
        ({"steps": 0}, "steps=0 must be a whole number from 1 to 1000"),
        ({"steps": "many"}, "steps='many' must be"),
        ({"guidance": -1}, "guidance=-1 must be a number from 0 to 100"),
        ({"norm_guidance": 1}, "norm_guidance=1 must be True or False"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": [1, 2]}, "seed="),
        (3, "decoding must be names with values.*not 3"),
        (False, "decoding must be names with values"),
        ("steps=3", "decoding must be names with values"),
        ([("steps", 3)], "decoding must be names with values"),
        ({1: 2}, "decoding must be names with values"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(gen, monkeypatch, decoding, words):
    monkeypatch.setattr(gen, "generate_content", lambda *arguments: pytest.fail("worked"))
    for make in (gen.sample, gen.generate):
        with pytest.raises(mt.InvalidInput, match=words):
            make([0, 1], decoding=decoding)
