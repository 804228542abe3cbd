"""Next-token generators: caches, batches and kept tokens change nothing; classes and texts condition; any length."""

import copy

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import InvalidCheckpoint, InvalidInput, LimitExceeded, ModelNotFound, TokenizerMismatch
from mediatok.generators.next_token import NextToken, NextTokenSettings
from mediatok.generators.next_token_text import Prompts
from mediatok.tokenizers.image.one_d_piece import OneDPiece

SIZES = {
    "width": 32, "depth": 2, "num_heads": 2, "hidden": 48, "vocab_size": 30, "num_tokens": 6, "num_classes": 3,
}  # fmt: skip
TEXT = {"num_classes": 0, "text_width": 12}


def build(**changes):
    torch.manual_seed(0)
    model = NextToken(**SIZES | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.name = "tiny"
    return model


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def settings(num_tokens=6, guidance=2.0, temperature=1.0, top_k=0, top_p=1.0):
    return NextTokenSettings(num_tokens, guidance, temperature, top_k, top_p)


def prompts(number=2, length=5):
    rng = torch.Generator().manual_seed(3)
    is_text = torch.arange(length) < torch.tensor([[2], [length], [1]])[:number]
    states = torch.randn(number, length, 12, generator=rng)
    texts = ("a", "b", "c")[:number]
    return Prompts(texts, states, is_text, torch.randn(length, 12, generator=rng), torch.arange(length) < 1)


class Greedy:
    """Takes the likeliest, and keeps what it saw."""

    def __init__(self):
        self.logits = []

    def draw(self, places, logits, settings):
        self.logits.append(logits[:, 0])
        return logits.argmax(dim=-1)


VARIANTS = [{}, {"norm": "layer", "bias": True, "head_norm": True, "last_norm": False, "qk_norm": False}, TEXT]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_the_cache_changes_nothing(changes, guidance):
    model, greedy = build(**changes), Greedy()
    condition = prompts() if changes is TEXT else torch.tensor([2, 0])
    ids = model.generate_ids(condition, settings(guidance=guidance), [], draws=greedy)
    _, logits = model.token_loss(ids, condition)
    if guidance != 1:
        nothing = condition.without(torch.ones(2, dtype=torch.bool)) if changes is TEXT else torch.tensor([3, 3])
        _, other = model.token_loss(ids, nothing)
        logits = other + guidance * (logits - other)
    torch.testing.assert_close(torch.stack(greedy.logits, dim=1), logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(ids, logits.argmax(dim=-1))


@pytest.mark.parametrize("changes", [{}, TEXT])
def test_a_picture_depends_on_its_seed_and_condition_alone(changes):
    model = build(**changes)
    condition = prompts(3) if changes is TEXT else torch.tensor([2, 0, 2])
    together = model.generate_ids(condition, settings(), rngs(1, 2, 1))
    for row, seed in enumerate((1, 2, 1)):
        one = condition[torch.tensor([row])]
        assert torch.equal(model.generate_ids(one, settings(), rngs(seed))[0], together[row])
    assert not torch.equal(together[0], model.generate_ids(condition, settings(), rngs(7, 8, 9))[0])


def test_conditions_matter():
    model = build()
    ids = [model.generate_ids(torch.tensor([label]), settings(temperature=0.0), rngs(0)) for label in (0, 1, 3)]
    assert len({tuple(row[0].tolist()) for row in ids}) == 3


def test_fewer_tokens_are_the_first_ones():
    model, label = build(), torch.tensor([1])
    whole = model.generate_ids(label, settings(temperature=0.0), rngs(0))
    assert torch.equal(model.generate_ids(label, settings(2, temperature=0.0), rngs(0)), whole[:, :2])


def test_kept_tokens_stay_and_are_context():
    model, labels = build(), torch.tensor([0, 1])
    start = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(4))
    keep = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 0]]).bool()
    made = model.generate_ids(labels, settings(), rngs(1, 2), start, keep)
    assert torch.equal(made[keep], start[keep])
    for row in range(2):
        alone = model.generate_ids(labels[row, None], settings(), rngs(row + 1), start[row, None], keep[row, None])
        assert torch.equal(alone[0], made[row])
    greedy, other = settings(temperature=0.0), (start + 1) % 30
    ours, others = (model.generate_ids(labels, greedy, rngs(1, 2), given, keep) for given in (start, other))
    assert not torch.equal(ours[~keep], others[~keep])
    assert torch.equal(model.generate_ids(labels, settings(), rngs(1, 2), start, torch.ones_like(keep)), start)


def test_top_k_and_top_p_leave_the_likeliest():
    model, label = build(), torch.tensor([1])
    greedy = model.generate_ids(label, settings(temperature=0.0), rngs(0))
    for chosen in (settings(top_k=1), settings(top_p=0.0)):
        assert torch.equal(model.generate_ids(label, chosen, rngs(5)), greedy)


# With a tokenizer.


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return OneDPiece(
        image_size=16, encoder_patch_size=8, decoder_patch_size=8, num_latent_tokens=6, token_size=4,
        codebook_size=30, is_legacy=False, has_pixel_decoder=False, encoder_width=32, encoder_depth=1,
        encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2,
    ).eval()  # fmt: skip


@pytest.fixture
def generator(tokenizer):
    model = build(tokenizer_fingerprint=tokenizer.fingerprint, label_names=("cat", "dog", "owl"))
    model.use_tokenizer(tokenizer)
    return model


def test_pictures_of_any_number_of_tokens(generator):
    made = generator.sample(["dog", 0], steps=3, seed=0)
    assert made.content.shape == (2, 3)
    assert [picture.size for picture in made.images] == [(16, 16)] * 2
    again = generator.sample("dog", steps=6, seed=0, start=generator.sample("dog", seed=0), keep=range(6))
    assert torch.equal(again.content, generator.sample("dog", seed=0).content)
    assert generator.tokens(made.content).ids.shape == (2, 3)


def test_previews_show_the_prefix_so_far(generator):
    shown = {}

    def on_step(step, total, preview=None):
        shown[step] = None if preview is None else preview.shape

    generator.sample(["cat"], seed=0, previews=True, on_step=on_step)
    assert [step for step in shown if shown[step] is not None] == [1, 2, 4, 6]
    assert shown[4] == (1, 3, 16, 16)
    assert list(shown) == [1, 2, 3, 4, 5, 6]


def test_editing_the_beginning_of_a_picture(generator):
    first = generator.sample("owl", seed=3)
    edited = generator.sample("owl", seed=4, start=first, keep=[0, 1])
    assert torch.equal(edited.content[:, :2], first.content[:, :2])


def test_training_pass(generator):
    generator.train()
    ids, labels = torch.randint(30, (4, 6)), torch.tensor([0, 1, 2, 3])
    output = generator(ids, labels, torch.Generator().manual_seed(0))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
    text = build(**TEXT)
    text(torch.randint(30, (2, 6)), prompts(), torch.Generator().manual_seed(0)).loss.backward()
    assert text.transformer.text_proj[0].weight.grad.any()


def test_save_load_and_other_precisions(generator, tmp_path):
    generator.eval().save_pretrained(tmp_path / "m")
    loaded = mt.load(tmp_path / "m")
    label = torch.tensor([1])
    expected = generator.generate_ids(label, settings(temperature=0.0), rngs(0))
    assert torch.equal(loaded.generate_ids(label, settings(temperature=0.0), rngs(0)), expected)
    assert mt.load(tmp_path / "m", dtype="bfloat16").generate_ids(label, settings(), rngs(0)).shape == (1, 6)
    loaded.pack_network()
    assert torch.equal(loaded.generate_ids(label, settings(temperature=0.0), rngs(0)), expected)


def test_text_goes_through_a_t5_encoder(tmp_path):
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "red": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(tmp_path)
    T5EncoderModel(T5Config(vocab_size=5, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    model = build(**TEXT)
    model.text_encoder = str(tmp_path)
    encoded = model.label_ids(["red cat", "cat"])
    assert encoded.tolist() == ["red cat", "cat"]
    assert encoded.states_NME.shape == (2, 2, 12)
    copied = copy.deepcopy(model)
    assert copied._text_features is model._text_features  # copies share it
    for wrong in (str(tmp_path / "nowhere"), "somebody/t5", "/etc/passwd"):
        model.text_encoder = wrong
        with pytest.raises(ModelNotFound, match="neither a folder nor a Flan-T5"):
            model.label_ids("cat")
    model.save_pretrained(tmp_path / "m")
    again = mt.load(tmp_path / "m")
    assert again.text_encoder == "google/flan-t5-xl"
    again.text_encoder = str(tmp_path)
    assert torch.equal(again.label_ids(["red cat", "cat"]).states_NME, encoded.states_NME)
    other = build(**TEXT | {"text_width": 16, "text_encoder": str(tmp_path)})
    with pytest.raises(InvalidInput, match=r"texts of 16 channels.*gives 12"):
        other.label_ids("cat")
    again._text_features = None
    T5Config(vocab_size=5, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=r"lacks \d+ weights, such as encoder\.block\.1"):
        again.label_ids("cat")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelNotFound, match="could not be loaded"):
        again.label_ids("cat")


@pytest.mark.parametrize("bad", ["", "  ", "a\x07b", 3, ["x", b"y"], []])
def test_prompts_are_checked(bad):
    with pytest.raises(InvalidInput):
        build(**TEXT).label_ids(bad)
    with pytest.raises(LimitExceeded, match="10000 characters"):
        build(**TEXT).label_ids("x" * 10_000)


def test_what_cannot_be_is_said(generator):
    for bad in ({"num_heads": 3}, {"depth": 0}, {"norm": "batch"}, {"num_classes": 0}, {"text_width": 8},
                {"width": 10**9}, {"hidden": 0}, {"text_encoder": 3}):  # fmt: skip
        with pytest.raises(InvalidInput):
            build(**bad)
    for steps in (0, -1, 7, 10**30, 2.0, True, "3"):
        with pytest.raises(InvalidInput, match=r"steps=.* must be a whole number from 1 to 6"):
            generator.sample("cat", steps=steps)
    for bad in ({"guidance": -1.0}, {"temperature": 99}, {"top_k": -1}, {"top_p": 2.0},
                {"sampler": "ode"}):  # fmt: skip
        with pytest.raises(InvalidInput):
            generator.sample("cat", **bad)
    with pytest.raises(TokenizerMismatch):
        build().use_tokenizer(mt.load("titok-tiny"))
    with pytest.raises(InvalidInput, match="lie in"):
        generator.check_content(torch.tensor([[99] * 6]))
