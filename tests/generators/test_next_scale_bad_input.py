"""What a user can get wrong with next-scale generators: one clear error each, and the way out."""

import json
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.generators import next_scale
from mediatok.generators.next_scale import NextScale

MODELS = SimpleNamespace(**run_path(Path(__file__).parent / "next_scale_models.py"))
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def gen():
    return MODELS.small()


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("char", "Did you mean 'chair'.*knows chair, table, lamp"), (3, "out of range.*classes 0 to 2"),
        ([], "give 1 to"), (1.0, "not 1.0"), ("", "unknown label"),
    ],
)  # fmt: skip
def test_unknown_labels(gen, label, words):
    with pytest.raises(mt.InvalidInput, match=words):
        gen.generate(label)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"guidance": value}, "guidance=.* from 0 to 100") for value in (NAN, INF, -1, 101, "3", True)),
        *(({"temperature": value}, "temperature=.* from 0 to 10") for value in (NAN, -0.1, 11)),
        *(({"top_p": value}, "top_p=.* from 0 to 1") for value in (NAN, -0.1, 1.1, "1")),
        *(({"top_k": value}, "top_k=.* whole number from 0") for value in (-1, 2.0, True, 10**12)),
        *(({"resolution": value}, "resolution") for value in (0, 1, 10**6, 8.0, "8")),
        *(({"batch_size": value}, "batch_size") for value in (0, 1.5, True, "2")),
        *(({"seed": value}, "seed") for value in (-1, 1.5, [1, 2], True)),
        ({"on_step": "progress"}, "on_step must be a function"),
        ({"steps": 8}, "no option 'steps'.*guidance, temperature, top_k, top_p"),
        ({"temprature": 1}, "Did you mean 'temperature'"),
        ({"self": 1}, "no option 'self'"),
        ({"images": "x.png"}, "has no image encoder; it makes shapes of labels"),
        ({"texts": torch.zeros(1, 1)}, "reads no texts"),
    ],
)
def test_wrong_options(gen, options, words):
    with pytest.raises(mt.InvalidInput, match=words):
        gen.generate(0, **options)


def test_options_of_numpy_and_beyond_the_codebook(gen):
    expected = gen.sample(0, seed=1, resolution=8, top_k=0).tokens
    assert gen.sample(0, seed=1, resolution=8, top_k=np.int64(900), batch_size=10**30).tokens == expected


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("tokens.mtok", "start must be Tokens, their ids or a ShapeGeneration, not str"),
        (torch.zeros(1, 2, dtype=torch.int64), "2 ids end within a scale"),
        (torch.zeros(1, 4), "int64"),
        (torch.full((1, 4), 20), r"must lie in \[0, 20\)"),
        (torch.zeros(3, 4, dtype=torch.int64), "3 shapes for 2"),
    ],
)
def test_wrong_starts(gen, start, words):
    with pytest.raises(mt.InvalidInput, match=words):
        gen.generate([0, 1], start=start)


def test_starts_of_others_and_of_different_lengths(gen):
    tokens = gen.tokenizer.tokens_of(torch.zeros(2, 10, dtype=torch.int64))
    ragged = mt.Tokens.cat([tokens[:1], tokens[1:].up_to_scale(1)])
    with pytest.raises(mt.InvalidInput, match="different numbers of scales"):
        gen.generate([0, 1], start=ragged)
    with pytest.raises(mt.TokenizerMismatch):
        gen.generate(0, start=MODELS.BallTokenizer(seed=1).tokens_of(torch.zeros(1, 1, dtype=torch.int64)))


def test_wrong_pictures_and_texts():
    gen = MODELS.small(image_encoder=MODELS.ENCODER)
    with pytest.raises(mt.InvalidInput, match=r"no/such\.png"):
        gen.generate(0, images="no/such.png")
    with pytest.raises(mt.InvalidInput, match="2 images for 3 shapes"):
        gen.generate([0, 1, 2], images=[torch.zeros(3, 9, 9)] * 2)
    with pytest.raises(mt.InvalidInput, match="makes shapes of labels and pictures"):
        gen.generate(texts=torch.zeros(1, 5))
    with pytest.raises(mt.InvalidInput, match="0 images"):
        gen.generate(images=[])
    gen = MODELS.small(text_tokens=2, text_width=5)
    for wrong in (torch.zeros(3, 5), torch.zeros(0, 5), torch.zeros(2, 4), torch.zeros(5), torch.ones(1, 5).long()):
        with pytest.raises(mt.InvalidInput, match=r"embedded text must be float \[1 to 2, 5\]"):
            gen.generate(texts=wrong)
    with pytest.raises(mt.InvalidInput, match="got str"):
        gen.generate(texts="a chair")
    with pytest.raises(mt.InvalidInput, match="finite"):
        gen.generate(texts=torch.full((1, 5), NAN))


def test_another_tokenizer_is_refused(gen):
    right, wrong = gen.tokenizer, MODELS.BallTokenizer(seed=1)
    with pytest.raises(mt.TokenizerMismatch, match=f"{right.fingerprint}.*{wrong.fingerprint}"):
        gen.use_tokenizer(wrong)
    assert gen.tokenizer is right
    with pytest.raises(mt.InvalidInput, match="needs a shape tokenizer, not TiTok"):
        gen.use_tokenizer(mt.create("titok-tiny"))
    free = MODELS.small(tokenizer_fingerprint=None)
    for sizes in ({"scales": (1, 3, 7)}, {"codebook_size": 21}, {"code_width": 5}):
        with pytest.raises(mt.TokenizerMismatch, match="makes scales of"):
            free.use_tokenizer(MODELS.BallTokenizer(**sizes))
    with pytest.raises(mt.InvalidInput, match="names no tokenizer; give it one"):
        NextScale(scales=(1, 2), codebook_size=4, code_width=2, width=8, depth=1, num_heads=1).generate()


def test_configs_of_strangers(tmp_path):
    """A wrong config is told as such, before it costs memory, and not by what breaks later."""
    MODELS.small(image_encoder=MODELS.ENCODER).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    right = json.loads(path.read_text())
    assert isinstance(mt.load(tmp_path), NextScale)
    sizes = ("codebook_size", "code_width", "width", "depth", "num_heads")
    wrong = [(name, value) for name in sizes for value in (0, -3, 2.0, True, None, 10**9)]
    wrong += [("num_classes", value) for value in (-3, 2.0, True, False, None, 10**9)]
    wrong += [("scales", value) for value in (5, [], [0, 1], [1, 2.0], "abc", None, [1, 10**9])]
    wrong += [("label_names", names) for names in (5, "abc", None, ["a"], [1, 2, 3])]
    wrong += [("num_heads", 5), ("text_tokens", 2), ("text_tokens", -1)]
    wrong += [("image_encoder", value) for value in (5, {}, [1], MODELS.ENCODER | {"attn_implementation": "x"})]
    wrong += [
        ("image_encoder", MODELS.ENCODER | {name: value})
        for name in MODELS.ENCODER for value in (0, None, 2.0, "8", 10**9)
    ]  # fmt: skip
    wrong += [("image_encoder", MODELS.ENCODER | {"num_attention_heads": 3})]
    for name, value in wrong:
        path.write_text(json.dumps(right | {name: value}))
        with pytest.raises(mt.InvalidCheckpoint):
            mt.load(tmp_path)


def test_a_batch_that_does_not_fit(gen, monkeypatch):
    per_shape = gen.bytes_per_shape(gen.settings())
    monkeypatch.setattr(next_scale, "available_memory", lambda device: 5 * per_shape)
    with pytest.raises(mt.LimitExceeded, match=r"a batch of 8 shapes .* use batch_size=5"):
        gen.generate([0] * 8)
    assert len(gen.generate([0] * 6, batch_size=5, resolution=8)) == 6
    monkeypatch.setattr(next_scale, "available_memory", lambda device: per_shape - 1)
    with pytest.raises(mt.LimitExceeded, match="not even one shape fits"):
        gen.generate(0)


def test_running_out_of_memory_after_all(gen, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(gen.transformer, "new_cache", fail)
    with pytest.raises(mt.LimitExceeded, match="use batch_size=2"):
        gen.generate([0] * 5)
