"""What a user can get wrong, with both generators: one clear error each, and the way out."""

import json

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.core import generator as base

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["maskgit", "xar"])
def gen(request, make_small):
    return make_small(request.param)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("fod", "Did you mean .food."),
        ("f", "could be any of"),
        ("", "unknown label"),
        (1.0, "not 1.0"),
        ([], "give 1 to"),
    ],
)
def test_unknown_labels(gen, label, words):
    with pytest.raises(mt.InvalidInput, match=words):
        gen.generate(label)


@pytest.mark.parametrize("label", [-1, 3, 4, "3", "-1", torch.tensor([0, 3])])
def test_labels_out_of_range(gen, label):
    with pytest.raises(mt.InvalidInput, match=r"out of range; .* has classes 0 to 2"):
        gen.generate(label)


@pytest.mark.parametrize("steps", [0, -3, 10**9, 2.5, NAN, "8", True, [1, 2, 3], (0, 5), (5, 0)])
def test_absurd_steps(gen, steps):
    with pytest.raises(mt.InvalidInput, match=r"steps=.* must be"):
        gen.generate(0, steps=steps)


@pytest.mark.parametrize("guidance", [NAN, INF, -INF, -1, 1e9, "3", torch.tensor(3.0), True])
def test_absurd_guidance(gen, guidance):
    with pytest.raises(mt.InvalidInput, match=r"guidance=.* must be a number from 0 to 100"):
        gen.generate(0, guidance=guidance)


def test_other_options_are_checked(make_small):
    with pytest.raises(mt.InvalidInput, match="temperature=nan"):
        make_small("maskgit").generate(0, temperature=NAN)
    for annealing in ("no", "maybe", 1):
        with pytest.raises(mt.InvalidInput, match=r"annealing=.* must be True or False"):
            make_small("maskgit").generate(0, annealing=annealing)
    with pytest.raises(mt.InvalidInput, match="guidance_decay='cosine' must be one of"):
        make_small("maskgit").generate(0, guidance_decay="cosine")
    with pytest.raises(mt.InvalidInput, match="sampler='euler' must be one of"):
        make_small("xar").generate(0, sampler="euler")
    for words in (["ode"], np.array(["ode", "sde"]), torch.zeros(2)):
        with pytest.raises(mt.InvalidInput, match=r"sampler=.* must be one of"):
            make_small("xar").generate(0, sampler=words)
        with pytest.raises(mt.InvalidInput, match=r"guidance_decay=.* must be one of"):
            make_small("maskgit").generate(0, guidance_decay=words)
    with pytest.raises(mt.InvalidInput, match="no option 'temperature'"):
        make_small("xar").generate(0, temperature=1)


def test_decoders_without_options_take_none(gen):
    assert gen.decoding_option_names == ()
    assert len(gen.generate(0, decoding={})) == 1
    with pytest.raises(mt.InvalidInput, match=r"no option 'steps' of decoding. It has none"):
        gen.generate(0, decoding={"steps": 3})


def test_configs_of_strangers(gen, tmp_path):
    """A wrong config is told as such, before it costs memory, and not by what breaks later."""
    gen.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    right = json.loads(path.read_text())
    sizes = [name for name in right if name.startswith(("num_", "grid", "codebook", "embed")) or "depth" in name]
    assert len(sizes) >= 6
    wrong = [(name, value) for name in sizes if name != "num_steps" for value in (0, -3, 2.0, True, None, 10**9)]
    wrong += [("label_names", names) for names in (5, "abc", None, ["a"], list("abcde"), [1, 2, 3])]
    if "grid" in right:
        wrong += [("layout", value) for value in ([1], {}, "ring")]
    for name, value in wrong:
        path.write_text(json.dumps(right | {name: value}))
        with pytest.raises(mt.InvalidCheckpoint):
            mt.load(tmp_path)


def test_a_batch_that_does_not_fit(gen, monkeypatch):
    monkeypatch.setattr(base, "available_memory", lambda device: 5 * gen.bytes_per_image(gen.settings()))
    with pytest.raises(mt.LimitExceeded, match=r"a batch of 8 pictures needs about .* use batch_size=5"):
        gen.generate([0] * 8)
    assert len(gen.generate([0] * 6, batch_size=5)) == 6


def test_a_tokenizer_of_another_fingerprint(gen):
    right = gen.tokenizer
    wrong = type(right)(**{key: value for key, value in dict(right.config).items() if not key.startswith("_")})
    if right.is_continuous:  # autoencoders of equal sizes are told apart by their configs
        wrong = type(right)(**dict(wrong.config) | {"scaling_factor": 0.5})
    assert wrong.fingerprint != right.fingerprint
    with pytest.raises(mt.TokenizerMismatch, match=f"{right.fingerprint}.*{wrong.fingerprint}"):
        gen.use_tokenizer(wrong)
    assert gen.tokenizer is right


def test_content_that_is_not_this_model_s(gen):
    content = gen.sample(0, seed=0).content
    for wrong in (content[:, :1], content.bool(), torch.zeros(2, 2), content.new_zeros(1, 7, 7, 7)):
        with pytest.raises(mt.InvalidInput):
            gen.sample(0, start=wrong, keep=[0])
    if content.is_floating_point():
        for wrong in (content * NAN, torch.full_like(content.double(), 1e300)):
            with pytest.raises(mt.InvalidInput, match="must be finite"):
                gen.sample(0, start=wrong, keep=[0])
    with pytest.raises(mt.InvalidInput, match="unit"):
        gen.sample(0, start=content, keep=[gen.num_units])
    everything = gen.sample(0, start=content, keep=range(gen.num_units)).content
    assert torch.allclose(everything.float(), content.float())
