"""SEED-LLaMA: texts and pictures in, texts and pictures out; every picture whole, whatever the batch."""

import itertools
import json

import mediatok as mt
import pytest
import torch
from mediatok.generators.seed_llama import SeedLLaMA
from mediatok.generators.seed_llama_sampling import ImageVocabulary, Spans
from mediatok.generators.written_pictures import picture_generator
from mediatok.tokenizers.image.seed import Seed
from tokenizers.models import BPE

from tokenizers import Tokenizer, decoders

TEXT, CODES, LENGTH = 40, 12, 4
BEGIN, END = TEXT + CODES, TEXT + CODES + 1
SIZES = {
    "vocab_size": END + 1, "first_code": TEXT, "num_codes": CODES, "begin_image": BEGIN, "end_image": END,
    "image_tokens": LENGTH, "hidden_size": 24, "intermediate_size": 32, "num_layers": 2, "num_heads": 2,
    "max_positions": 200, "tokenizer": None,
}  # fmt: skip
ALPHABET = "abcdefghijklmnopqrstuvwxyz USERAITN:\n["


def build_tokenizer():
    torch.manual_seed(1)
    return Seed(
        image_size=8, patch_size=4, vision_width=8, vision_depth=1, vision_heads=1, vision_hidden=8,
        num_queries=LENGTH, qformer_width=8, qformer_depth=1, qformer_heads=1, qformer_hidden=8, codebook_size=CODES,
        token_size=3, decoder_depth=1, decoder_heads=1, head_widths=(4, 4, 4), embedding_size=8,
    ).eval()  # fmt: skip


class Painter:
    """An image decoder that shows which embedding it was given."""

    embedding_size, steps, guidance = 8, 2, 1.0
    negatives = None

    def to(self, device):
        return self

    def num_calls(self, steps):
        return steps

    def draw(self, embedding_BE, drawing, negative_BE=None, on_step=None):
        self.negatives = negative_BE
        return embedding_BE.sigmoid()[:, :3, None, None].expand(-1, 3, 8, 8).clone()


def text_tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(dict.fromkeys(ALPHABET))}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def build(**changes):
    torch.manual_seed(0)
    model = SeedLLaMA(**SIZES | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
        model.llm.lm_head.weight[BEGIN] *= 2
    model.name = "small-seed-llama"
    tokenizer = build_tokenizer()
    tokenizer.image_decoder = Painter()
    model.use_tokenizer(tokenizer)
    model._text_tokenizer = text_tokenizer()
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_spans(ids, whole=True):
    """Codes stand in whole pictures only."""
    at = 0
    while at < len(ids):
        if ids[at] == BEGIN:
            codes = ids[at + 1 : at + 1 + LENGTH]
            assert len(codes) == LENGTH
            assert all(TEXT <= code < TEXT + CODES for code in codes)
            assert ids[at + 1 + LENGTH] == END
            at += LENGTH + 2
        else:
            assert not TEXT <= ids[at] < TEXT + CODES
            assert ids[at] != END
            at += 1


@pytest.mark.parametrize("temperature", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("starts", [False, True])
def test_pictures_are_always_whole(model, temperature, starts):
    seen = 0
    for tokens in (LENGTH + 2, 17, 60):
        settings = model.settings(tokens, temperature, 1.0, starts_with_image=starts)
        for reply in model.generate_ids([torch.tensor([1, 5, 9]), torch.tensor([1])], settings, rngs(tokens, 3)):
            check_spans(reply)
            assert len(reply) <= tokens
            assert not starts or reply[0] == BEGIN
            seen += reply.count(BEGIN)
    assert seen


def test_number_of_pictures(model):
    settings = model.settings(100, 3.0, 1.0, max_images=0)
    assert all(BEGIN not in reply for reply in model.generate_ids([torch.tensor([1])] * 3, settings, rngs(1, 2, 3)))
    settings = model.settings(100, 3.0, 1.0, max_images=1, starts_with_image=True)
    replies = model.generate_ids([torch.tensor([1])] * 3, settings, rngs(1, 2, 3))
    assert all(reply.count(BEGIN) == 1 for reply in replies)


def test_left_padding_changes_nothing(model):
    """Prompts of unequal length, one with a picture, give together what each gives alone."""
    prompts = [model.prompt_ids("a"), model.prompt_ids(("what is ", mt_tokens(model), " here")), torch.tensor([1])]
    settings = model.settings(30, 0.8, 0.9)
    together = model.generate_ids(prompts, settings, rngs(7, 8, 9))
    for prompt, seed, reply in zip(prompts, (7, 8, 9), together, strict=True):
        assert model.generate_ids([prompt], settings, rngs(seed)) == [reply]


def mt_tokens(model):
    return model.tokenizer.encode(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_cache_gives_what_no_cache_gives(model):
    prompt = model.prompt_ids("abc")
    (reply,) = model.generate_ids([prompt], model.settings(25, 0.0), rngs(0))
    spans = Spans(1, model.vocabulary, model.settings(25, 0.0))
    ids = prompt
    for token in reply:
        with torch.no_grad():
            logits = model.logits(model.hidden_states(ids[None], use_cache=False))[0, -1]
        assert token == (spans.forced(0) or int(spans.mask(0, logits).argmax()))
        spans.advance(0, token)
        ids = torch.cat([ids, torch.tensor([token])])


def test_prompts(model):
    picture = mt_tokens(model)
    ids = model.prompt_ids(("see ", picture, " and"))
    assert ids[0] == 1
    at = ids.tolist().index(BEGIN)
    assert (ids[at + 1 : at + 1 + LENGTH] - TEXT).tolist() == picture.ids[0].tolist()
    assert model.text_tokenizer.decode(ids[1:at].tolist()) == "USER: see "
    assert model.text_tokenizer.decode(ids[at + LENGTH + 2 :].tolist()) == " and\nASSISTANT:"
    plain = build(prompt="plain")
    assert plain.prompt_ids("ab").tolist() == [1, *plain.text_ids("ab")]


def test_replies(model):
    (reply,) = model.generate("ab", seed=4, max_tokens=40, temperature=2.0, top_p=1.0, starts_with_image=True)
    assert reply.images[0].size == (8, 8)
    assert isinstance(reply.parts[0], type(reply.images[0]))
    again = model.generate(["ab", ("a", mt_tokens(model))], seed=[4, 1], max_tokens=40, temperature=2.0, top_p=1.0,
                           starts_with_image=True, draw_images=False)  # fmt: skip
    assert again[0].ids == reply.ids
    assert again[0].text == reply.text
    assert isinstance(again[0].images[0], mt.Tokens)
    assert model.tokenizer.decode(again[0].images[0]).tobytes() == reply.images[0].tobytes()
    # A picture that is not whole is left out, as in texts of models that are not held to it.
    broken = model.reply([5, BEGIN, TEXT, TEXT + 1, END, 6])
    assert len(broken.parts) == 2


def test_progress_and_cancelling(model):
    seen = []
    model.generate(["a", "b", "c"], seed=0, max_tokens=10, batch_size=2, draw_images=False,
                   on_step=lambda step, total, preview=None: seen.append((step, total)))  # fmt: skip
    assert seen == sorted(seen)
    assert seen[0] == (1, 20)

    def stop(step, total, preview=None):
        raise mt.Cancelled("enough")

    with pytest.raises(mt.Cancelled):
        model.generate("a", max_tokens=10, on_step=stop)


def test_draw(model):
    generation = model.draw(["a cat", "a dog"], seed=3, top_p=1.0)
    assert len(generation.images) == 2
    assert generation.content.shape == (2, LENGTH)
    painter = model.tokenizer.picture_decoder()
    assert painter.negatives is not None
    assert generation.seeds == [3, 4]
    alone = model.draw("a dog", seed=4, top_p=1.0, negative=False)
    assert torch.equal(alone.content[0], generation.content[1])
    assert painter.negatives is None


def test_drawing_has_options_of_its_own(model):
    maker = picture_generator(model)
    assert maker.decoding_option_names == ()
    assert len(maker.sample("a cat", seed=3, top_p=1.0, decoding={}).images) == 1
    with pytest.raises(mt.InvalidInput, match="no options of decoding, so steps, seed cannot be chosen there"):
        maker.sample("a cat", decoding={"steps": 2, "seed": 1})
    with pytest.raises(mt.InvalidInput, match="decoding must be names with values"):
        maker.sample("a cat", decoding=3)


def log_chances(model, prompts):
    """Sums of log-probabilities of every possible picture behind each prompt, without cache or padding: [B, 12^4]."""
    pictures = torch.tensor([*itertools.product(range(CODES), repeat=LENGTH)])
    sums = []
    for prompt in prompts:
        known, chances = torch.cat([prompt, torch.tensor([BEGIN])]), torch.zeros(1)
        for place in range(LENGTH):
            prefixes = torch.tensor([*itertools.product(range(CODES), repeat=place)], dtype=torch.int64)
            ids = torch.cat([known.expand(len(prefixes), -1), prefixes + TEXT], dim=1)
            hidden = model.hidden_states(ids, use_cache=False)[:, -1]
            step = model.logits(hidden, model.vocabulary.codes).log_softmax(dim=-1)
            chances = (chances[:, None] + step).flatten()
        sums.append(chances)
    return pictures, torch.stack(sums)


@torch.no_grad()
def test_beams_find_the_likeliest_picture(model):
    prompts = [model.prompt_ids("a"), model.prompt_ids("what is here"), torch.tensor([1])]
    pictures, sums = log_chances(model, prompts)
    whole = model.likeliest_codes(prompts, CODES ** (LENGTH - 1))  # nothing is ever left out
    assert torch.equal(whole, pictures[sums.argmax(dim=1)])

    def chance(codes):
        places = (codes * CODES ** torch.arange(LENGTH - 1, -1, -1)).sum(dim=1)
        return sums.gather(1, places[:, None])[:, 0]

    found = {beams: model.likeliest_codes(prompts, beams) for beams in (1, 4)}
    for row, prompt in enumerate(prompts):  # left padding changes nothing
        for beams, codes in found.items():
            assert torch.equal(model.likeliest_codes([prompt], beams)[0], codes[row])
    assert bool((chance(found[1]) < chance(whole) + 1e-5).all())
    assert bool((chance(found[4]) >= chance(found[1]) - 1e-5).all())
    settings = model.settings(LENGTH + 2, 0.0, max_images=1, starts_with_image=True)
    greedy = [reply[1 : LENGTH + 1] for reply in model.generate_ids(prompts, settings, rngs(0, 0, 0))]
    assert (found[1] + TEXT).tolist() == greedy


def test_beams_draw(model):
    steps = []
    options = {"num_beams": 4, "batch_size": 2, "on_step": lambda *step, preview=None: steps.append(step)}
    made = model.draw(["a cat", "a dog", "here"], seed=3, **options)
    again = model.draw(["here"], seed=8, num_beams=4)
    assert torch.equal(again.content[0], made.content[2])
    assert again.images[0].tobytes() == made.images[2].tobytes()
    assert steps == [(number, 2 * LENGTH) for number in range(1, 2 * LENGTH + 1)]


def test_training_loss(model):
    batch = torch.randint(3, END + 1, (2, 9), generator=torch.Generator().manual_seed(0))
    batch[1, 6:] = 0
    loss = model(batch).loss
    with torch.no_grad():
        alone = [model(row[None]).loss for row in (batch[0], batch[1, :6])]
    torch.testing.assert_close(loss.detach(), (alone[0] * 8 + alone[1] * 5) / 13)
    loss.backward()
    assert model.llm.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"), ("  \n", "empty"), ((), "tuple"), (3, "a prompt is"), (("",), "empty"),
        ("a" * 200_000, "characters"), ("a" * 10_000, "10018 tokens and 60 more"), ("a" * 150, "200"),
        (("a", b"no picture"), "picture"), ("a\0b", r"control character '\\x00'"), ("a\x1b[0m", "control character"),
        (("a", "\ud800"), "control character"), (None, "a prompt is"), (b"a", "a prompt is"), (1.5, "a prompt is"),
    ],
)  # fmt: skip
def test_bad_prompts(model, prompt, message):
    for prompts in ([prompt], prompt):
        with pytest.raises(mt.InvalidInput, match=message):
            model.generate(prompts, max_tokens=60)


@pytest.mark.parametrize("text", ["", " ", None, 3, b"a", ["a", 3], [], "a" * 10_000, "a\0"])
def test_bad_texts_to_draw(model, text):
    with pytest.raises(mt.InvalidInput, match="prompt"):
        model.draw(text)


@pytest.mark.parametrize("num_beams", [0, -1, 1.5, True, "4", 65, 10**30])
def test_bad_beams(model, num_beams):
    with pytest.raises(mt.InvalidInput, match=r"num_beams=.* must be a whole number from 1 to 64"):
        model.draw("a", num_beams=num_beams)


def test_image_words_are_left_out(model):
    tokenizer = text_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(TEXT + 30)])
    own, model._text_tokenizer = model._text_tokenizer, tokenizer
    assert any(i >= TEXT for i in tokenizer.encode(f"<{TEXT}> a <{BEGIN}>").ids)
    assert all(i < TEXT for i in model.text_ids(f"<{TEXT}> a <{BEGIN}>"))
    model._text_tokenizer = own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"temperature": -1}, "temperature"), ({"top_p": 2}, "top_p"),
        ({"temprature": 1}, "temperature"), ({"starts_with_image": 1}, "True or False"), ({"seed": -1}, "seeds"),
        ({"starts_with_image": True, "max_tokens": 3}, "no room"), ({"batch_size": 0}, "batch_size"),
        ({"drawing": {"stepps": 2}}, "stepps"), ({"prompts": []}, "prompts"),
    ],
)  # fmt: skip
def test_bad_options(model, options, message):
    with pytest.raises(mt.MediatokError, match=message):
        model.generate(**{"prompts": "a"} | options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 45}, "no image vocabulary"), ({"begin_image": TEXT}, "no code"), ({"end_image": 10**6}, "ids"),
        ({"num_heads": 5}, "heads"), ({"prompt": "chatml"}, "vicuna"), ({"num_layers": 10**9}, "num_layers"),
        ({"hidden_size": -1}, "hidden_size"),
    ],
)  # fmt: skip
def test_bad_sizes(changes, message):
    with torch.device("meta"), pytest.raises(mt.InvalidInput, match=message):
        SeedLLaMA(**SIZES | changes)


def test_other_tokenizers_are_refused(model):
    other = build_tokenizer()
    bare = SeedLLaMA(**SIZES)
    bare.use_tokenizer(other)
    with pytest.raises(mt.TokenizerMismatch, match=r"5 tokens of 12 codes.*has 4 of 12"):
        SeedLLaMA(**SIZES | {"image_tokens": 5}).use_tokenizer(other)
    with pytest.raises(mt.InvalidInput, match="names no tokenizer"):
        _ = SeedLLaMA(**SIZES).tokenizer
    with pytest.raises(mt.ModelNotFound, match="use_text"):
        SeedLLaMA(**SIZES).text_ids("a")


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = mt.load(tmp_path / "model")
    again.use_tokenizer(model.tokenizer)
    options = {"seed": 1, "max_tokens": 30, "draw_images": False}
    assert again.generate("ab", **options)[0].ids == model.generate("ab", **options)[0].ids


def released_folder(folder, model, codes=CODES):
    """As the hub has it: transformers' config and keys, and the names of the added tokens."""
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 2,
              "max_position_embeddings": 200, "rms_norm_eps": 1e-6}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    added = {f"<img_{number:05d}>": TEXT + number for number in range(codes)} | {"<img>": BEGIN, "</img>": END}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    weights = {key.removeprefix("llm."): value for key, value in model.state_dict().items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save(weights, folder / "pytorch_model.bin")
    model.text_tokenizer.save(str(folder / "tokenizer.json"))


def test_released_folder(model, tmp_path):
    released_folder(tmp_path / "seed-llama", model)
    loaded = mt.load(tmp_path / "seed-llama")
    assert isinstance(loaded, SeedLLaMA)
    assert loaded.vocabulary == ImageVocabulary(slice(TEXT, TEXT + CODES), BEGIN, END, 32)
    assert loaded.text_ids("abc") == model.text_ids("abc")
    ids = torch.tensor([[1, 4, BEGIN, TEXT]])
    with torch.no_grad():
        ours, theirs = (m.logits(m.hidden_states(ids, use_cache=False)) for m in (loaded, model))
    torch.testing.assert_close(ours, theirs)


def test_language_model_without_image_vocabulary(model, tmp_path):
    released_folder(tmp_path / "plain", model)
    file = tmp_path / "plain" / "added_tokens.json"
    added = json.loads(file.read_text())
    file.unlink()
    with pytest.raises(mt.InvalidCheckpoint, match=r"54 ids and not the image vocabulary.*take a SEED-LLaMA"):
        mt.load(tmp_path / "plain")
    without = {name: number for name, number in added.items() if name.startswith("<img_")}
    for wrong, reason in (
        ({"<pad>": 50}, "lacks <img_00000>, <img>, </img>.*take a SEED-LLaMA"),
        (without, "lacks <img>, </img>"),
        (added | {"<img_00003>": 7}, "in a row, and <img_00003> is 7"),
        ({name: number for name, number in added.items() if name != "<img_00003>"}, "<img_00003> is None"),
        (added | {"<img_00000>": "40"}, "must be a whole number"),
        (added | {"</img>": END + 1}, "54 ids and not the image vocabulary"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(mt.InvalidCheckpoint, match=reason):
            mt.load(tmp_path / "plain")
