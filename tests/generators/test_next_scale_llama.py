"""Text to image over scales: prompts, guidance, passes, edits, training, and folders of its authors."""

import json

import mediatok as mt
import pytest
import torch
from mediatok.convert import load_official, tokenflow_t2i
from mediatok.core.errors import InvalidCheckpoint, InvalidInput, LimitExceeded, ModelNotFound, TokenizerMismatch
from mediatok.core.registry import constructor_arguments, find_entry
from mediatok.generators.next_scale_llama import NextScaleLlama
from mediatok.generators.text_pieces import UNKNOWN, Pieces, pieces_of
from mediatok.tokenizers.image.tokenflow import TokenFlow
from safetensors.torch import save_file

TOKENIZER = {
    "image_size": 16, "sides": (1, 2, 4), "codebook_size": 40, "semantic_code_width": 6, "pixel_code_width": 3,
    "tower_width": 24, "tower_depth": 1, "tower_heads": 2, "tower_hidden": 32, "tower_patch": 4, "tower_grid": 4,
    "semantic_width": 24, "semantic_depth": 1, "semantic_heads": 2, "semantic_grid": 4, "teacher_width": 5,
    "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "z_channels": 8, "decoder_channels": 32,
    "decoder_res_blocks": 1,
}  # fmt: skip
TEXTS = ("red apple", "sad robot", "red robot", "green apple")
SIZES = {
    "sides": (1, 2, 4), "codebook_size": 40, "code_width": 9, "width": 32, "depth": 2, "num_heads": 4,
    "num_kv_heads": 4,
    "hidden": 48, "text_pieces": pieces_of(TEXTS), "prompt_length": 6, "negative_prompt": "", "guidance_scale": 3.0,
}  # fmt: skip


def build(**changes):
    torch.manual_seed(0)
    tokenizer = TokenFlow(**TOKENIZER).eval()
    model = NextScaleLlama(**SIZES | changes | {"tokenizer_fingerprint": tokenizer.fingerprint}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    model.use_tokenizer(tokenizer)
    return model


@pytest.fixture(scope="module")
def gen():
    return build()


def test_prompts_decide(gen):
    made = gen.sample(["red apple", "sad robot", None], seed=[4, 4, 4])
    assert made.labels == ["red apple", "sad robot", ""]
    assert made.content.shape == (3, 21)
    assert not torch.equal(made.content[0], made.content[1])
    assert made.images[0].size == (16, 16)
    assert gen.tokens(made.content).scales == (1, 4, 16)
    assert torch.equal(gen.sample("red apple", seed=4).content, made.content[:1])
    assert not torch.equal(gen.sample("red apple", seed=4, guidance=0.0).content, made.content[:1])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_alone_and_in_a_batch(gen, steps):
    """Prompts of other lengths pad the batch; a picture does not notice."""
    prompts = ["red apple", "sad", "green red sad robot apple robot"]
    together = gen.sample(prompts, seed=3, steps=steps, batch_size=3).content
    for row, prompt in enumerate(prompts):
        assert torch.equal(gen.sample(prompt, seed=3 + row, steps=steps).content[0], together[row])


def test_each_pass_is_seen(gen):
    calls = []
    gen.sample(
        "red apple", seed=1, steps=3, previews=True, on_step=lambda *step, preview: calls.append((step, preview))
    )
    assert [step for step, _ in calls] == [(n, 7) for n in range(1, 8)]
    assert all(preview.shape == (1, 3, 16, 16) for _, preview in calls)


def test_the_first_scales_can_stay(gen):
    made = gen.sample(["red apple", "sad robot"], seed=1)
    again = gen.sample(["red apple", "sad robot"], seed=9, start=made, keep=range(2))
    assert torch.equal(again.content[:, :5], made.content[:, :5])
    assert not torch.equal(again.content, made.content)
    prefix = gen.tokens(made.content).up_to_scale(2)
    assert torch.equal(gen.sample(["red apple", "sad robot"], seed=9, start=prefix, keep=[0, 1]).content, again.content)
    assert torch.equal(
        gen.sample(["red apple"], seed=9, start=made.content[:1], keep=range(3)).content, made.content[:1]
    )
    with pytest.raises(InvalidInput, match="keeps the first scales"):
        gen.sample("red apple", start=made.content[:1], keep=[1])
    with pytest.raises(InvalidInput, match="keep asks for 21"):
        gen.sample("red apple", start=prefix[0], keep=range(3))


@pytest.mark.parametrize(
    ("prompt", "error", "reason"),
    [
        ("", InvalidInput, "empty"), ("  \n ", InvalidInput, "empty"), ("a" * 10_000, LimitExceeded, "characters"),
        ("a\x00b", InvalidInput, "control character"), (7, InvalidInput, "prompt is"), ([], InvalidInput, "prompts"),
        (b"a", InvalidInput, "prompt is"), (["a", 1.5], InvalidInput, "prompt is"), ("\ud800", InvalidInput, "control"),
    ],
)  # fmt: skip
def test_bad_prompts(gen, prompt, error, reason):
    with pytest.raises(error, match=reason):
        gen.sample(prompt)


@pytest.mark.parametrize(
    "options",
    [
        *({"steps": steps} for steps in (0, -1, 4, 10**30, 2.0, True, "3")),
        {"guidance": -1},
        {"top_k": -1},
        {"top_p": 2.0},
        {"temperature": -1.0},
    ],
)
def test_bad_options(gen, options):
    with pytest.raises(InvalidInput, match=next(iter(options))):
        gen.sample("red apple", **options)


def test_unknown_option_and_foreign_tokenizer(gen):
    with pytest.raises(InvalidInput, match="Did you mean 'top_k'"):
        gen.sample("red apple", topk=3)
    with pytest.raises(TokenizerMismatch):
        gen.use_tokenizer(TokenFlow(**TOKENIZER | {"codebook_size": 41}))


def test_words_become_pieces():
    pieces = Pieces(pieces_of(TEXTS))
    assert [pieces.pieces[i] for i in pieces.encode("Red  robots!")] == ["red", "robot", "##s", "[UNK]"]
    assert pieces.encode("\u2603") == [UNKNOWN]


def test_the_likeliest_codes_need_no_seed(gen):
    first, second = (gen.sample("red apple", seed=seed, temperature=0, guidance=0).content for seed in (1, 2))
    assert torch.equal(first, second)


def test_packing_changes_nothing(gen):
    expected = gen.sample("red apple", seed=2).content
    packed = build()
    packed.pack_network()
    assert torch.equal(packed.sample("red apple", seed=2).content, expected)


def test_training():
    gen = build(prompt_drop_prob=0.5).train()
    ids = torch.randint(40, (3, 21))
    output = gen(ids, gen.label_ids(["red apple", "sad robot", None]), torch.Generator().manual_seed(0))
    output.loss.backward()
    assert not [name for name, parameter in gen.named_parameters() if parameter.grad is None]
    assert 0 <= float(output.metrics["accuracy"]) <= 1


def test_saved_and_loaded(gen, tmp_path):
    gen.save_pretrained(tmp_path / "m")
    again = mt.load(tmp_path / "m")
    again.use_tokenizer(gen.tokenizer)
    assert torch.equal(again.sample("sad robot", seed=2).content, gen.sample("sad robot", seed=2).content)


def test_released_size():
    entry = find_entry("tokenflow-t2i")
    with torch.device("meta"):
        model = NextScaleLlama(**constructor_arguments(entry))
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


@pytest.fixture
def release(tmp_path):
    """A folder as the hub's, with tiny weights over the 224-pixel schedule, in two shards."""
    config = {
        "model_type": "llava_llama", "mm_vision_vq_type": "TOKEN_FLOW", "hidden_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vq_codebook_size": 30,
        "mm_hidden_size": 9, "tokenizer_model_max_length": 2048,
    }  # fmt: skip
    given = {
        "width": 16, "hidden": 24, "sides": (1, 2, 4, 6, 8, 10, 12, 14), "num_heads": 2, "num_kv_heads": 2, "depth": 1,
        "text_vocab_size": 32001, "codebook_size": 30, "code_width": 9,
    }  # fmt: skip
    weights = {name: torch.randn(shape) * 0.02 for name, shape in tokenflow_t2i.official_shapes(given).items()}
    weights |= {"image_token_start": torch.tensor(32001), "image_token_end": torch.tensor(32030)}
    weights = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    folder, names = tmp_path / "TokenFlow-t2i", sorted(weights)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_released_folder(release):
    model = mt.load(release)
    assert isinstance(model, NextScaleLlama)
    assert model.config.sides[-1] == 14
    assert model.ids.pad == 32000
    with pytest.raises(ModelNotFound, match=r"tokenizer\.model"):
        model.label_ids("a red apple")
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps(config | {"vq_codebook_size": 29}))
    with pytest.raises(InvalidCheckpoint, match="image_token_start is 32001"):
        load_official(release)
    (release / "config.json").write_text(json.dumps(config | {"vq_codebook_size": 32031}))
    with pytest.raises(InvalidCheckpoint, match=r"leaves no room|image_token_start"):
        load_official(release)
    (release / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.y"}}))
    with pytest.raises(InvalidCheckpoint, match="names code"):
        load_official(release)
