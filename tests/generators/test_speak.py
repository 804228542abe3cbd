"""Text to speech in parallel: texts, places within characters, seeds and batches, training, the codec."""

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import Cancelled, InvalidInput, LimitExceeded, TokenizerMismatch
from mediatok.generators.speak import LONGEST, Speak, places, split_text
from mediatok.kernels.cif import integrate_and_fire
from mediatok.tokenizers.speech.simcodec import SimCodec

CODES, HOP = 30, 40
SIZES = {
    "vocab_size": CODES, "width": 16, "encoder_depth": 1, "encoder_heads": 2, "encoder_mlp_width": 24,
    "decoder_depth": 2, "decoder_heads": 2, "decoder_mlp_width": 24, "decoder_taps": 5, "tokens_per_character": 2.5,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def codec(n_codes=CODES, **changes):
    torch.manual_seed(0)
    made = SimCodec(
        en_filters=2, de_filters=3, vq_dim=12, upsample_rates=(5, 4, 2), upsample_kernel_sizes=(11, 8, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),), n_codes=n_codes, **changes,
    ).eval()  # fmt: skip
    made.name = "small-codec"
    return made


def model(with_codec=True, **changes):
    torch.manual_seed(0)
    made = Speak(**(SIZES | changes)).eval()
    torch.nn.init.normal_(made.predictor.out.weight, std=1.0)
    if with_codec:
        made.use_codec(codec())
    return made


def texts(speaker, *given):
    rows = [torch.tensor(speaker.encode_text(text)) for text in given]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_texts_become_characters():
    speaker = model()
    alphabet = speaker.config.alphabet

    def shown(text):
        return "".join(alphabet[number] for number in speaker.encode_text(text))

    assert shown("Hello,  World!") == " hello, world! "
    assert shown("(It’s) fine…") == " it s fine... "
    assert shown("a\nb") == " a b "
    assert shown("") == "  "
    for text in ("héllo wörld 3", "5 €", "你好"):
        with pytest.raises(InvalidInput, match="cannot say"):
            speaker.encode_text(text)


def test_long_texts_are_cut_between_sentences():
    text = " ".join(f"This is sentence number {word}, and it is long enough." for word in ["one", "two", "three"] * 5)
    pieces = split_text(text)
    assert len(pieces) > 3
    assert all(len(piece) <= LONGEST and piece.endswith("enough.") for piece in pieces)
    assert " ".join(pieces) == text
    assert [len(piece) for piece in split_text("x" * 450)] == [200, 200, 50]
    assert split_text("One. ... Two?") == ["One. ... Two?"]
    assert split_text("?! ...") == []


def test_places_tell_the_tokens_of_a_character_apart():
    rates = torch.tensor([[2.0, 0.5, 0.5, 3.0]])
    found = places(rates, 6)[0]
    over = torch.arccos(found[:, 0]) / torch.pi
    torch.testing.assert_close(over, torch.tensor([0.25, 0.75, 1.0, 1 / 6, 0.5, 5 / 6]), atol=2e-3, rtol=0)
    torch.testing.assert_close(found[:, -1].expm1(), torch.tensor([2.0, 2.0, 0.5, 3.0, 3.0, 3.0]))
    vectors, _ = integrate_and_fire(torch.eye(4)[None], rates)
    assert torch.equal(vectors[0].argmax(dim=1), torch.tensor([0, 0, 1, 3, 3, 3]))
    assert torch.isfinite(places(torch.zeros(1, 3), 2)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_is_the_same_alone_and_in_any_batch(temperature):
    speaker = model()
    text, lengths = texts(speaker, "hello there", "a", "something quite a bit longer than that")
    ids, counts = speaker.generate_ids(text, lengths, rngs(1, 2, 3), temperature)
    assert ids.shape == (3, counts.max())
    assert counts.min() >= 1
    assert 0 <= ids.min() <= ids.max() < CODES
    for row in range(3):
        alone, count = speaker.generate_ids(
            text[row : row + 1, : lengths[row]], lengths[row : row + 1], rngs(row + 1), temperature
        )
        assert count == counts[row]
        assert torch.equal(alone[0], ids[row, :count])
        assert not ids[row, count:].any()


def test_speaking():
    speaker = model()
    steps = []
    text = "Hello there. " + "And now a longer sentence, which goes on. " * 6
    wave = speaker.speak(text, seed=3, on_step=lambda step, total, preview=None: steps.append((step, total)))
    assert wave.sample_rate == 16000
    assert wave.samples.shape[0] == 1
    assert steps == [(number + 1, len(steps)) for number in range(len(steps))]
    assert len(steps) > 1
    assert torch.equal(speaker.speak(text, seed=3).samples, wave.samples)
    other = speaker.speak(text, seed=4).samples
    assert other.shape != wave.samples.shape or not torch.equal(other, wave.samples)
    calm = [speaker.speak("a short one", seed=seed, temperature=0).samples for seed in (1, 2)]
    assert torch.equal(*calm)

    def stop(*args, preview=None):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        speaker.speak(text, on_step=stop)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}), ("?!", {}), (3, {}), ("a" * 20_000, {}), ("日本", {}), ("a", {"temperature": -1}),
        ("a", {"temperature": "hot"}), ("a", {"seed": -1}), ("a", {"seed": 1.5}), ("a", {"on_step": 3}),
    ],
)  # fmt: skip
def test_bad_input(text, options):
    with pytest.raises(InvalidInput):
        model().speak(text, **options)


def test_too_many_tokens_are_cut():
    speaker = model(tokens_per_character=40.0)
    text, lengths = texts(speaker, "a" * 180)
    _, counts = speaker.generate_ids(text, lengths, rngs(0))
    assert counts.item() == 4096
    with pytest.raises(LimitExceeded):
        speaker.speak("a" * 10_001)


def test_the_codec_must_be_the_right_one(tmp_path):
    with pytest.raises(InvalidInput, match="names no codec"):
        model(with_codec=False).speak("a")
    with pytest.raises(TokenizerMismatch, match="says 30 tokens"):
        model(with_codec=False).use_codec(codec(n_codes=31))
    with pytest.raises(TokenizerMismatch, match="2 at a time"):
        model(with_codec=False).use_codec(codec(n_code_groups=2))
    with pytest.raises(InvalidInput, match="needs a speech tokenizer"):
        model(with_codec=False).use_codec(3)
    right = codec()
    right.save_pretrained(tmp_path / "codec")
    named = {"codec": str(tmp_path / "codec"), "codec_fingerprint": right.fingerprint}
    speaker = model(with_codec=False, **named)
    expected = speaker.speak("hello", seed=0)
    speaker.save_pretrained(tmp_path / "speaker")
    loaded = mt.load(tmp_path / "speaker")
    assert torch.equal(loaded.speak("hello", seed=0).samples, expected.samples)
    with pytest.raises(TokenizerMismatch, match="is another one"):
        model(with_codec=False, **(named | {"codec_fingerprint": "0" * 16})).speak("hello")


def test_bfloat16_and_packed():
    speaker = model()
    packed = model()
    packed.pack_network()
    assert torch.equal(packed.speak("hello", seed=1).samples, speaker.speak("hello", seed=1).samples)
    low = model().cast(torch.bfloat16)
    assert low.predictor.out.weight.dtype == torch.float32
    assert low.speak("hello", seed=1).samples.shape[1] % HOP == 0


# Training.


def batch(speaker):
    text, lengths = texts(speaker, "abc", "hello")
    tokens = torch.randint(CODES, (2, 14), generator=torch.Generator().manual_seed(0))
    return text, lengths, tokens, torch.tensor([9, 14])


def test_every_weight_trains():
    speaker = model().train()
    output = speaker(*batch(speaker), rng=torch.Generator().manual_seed(0))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in speaker.parameters())
    torch.testing.assert_close(output.loss.detach(), output.metrics["tokens"] + output.metrics["counts"])


def test_padding_does_not_train():
    speaker = model()
    text, lengths, tokens, counts = batch(speaker)
    expected = speaker(text, lengths, tokens, counts, torch.Generator().manual_seed(0)).loss
    text[0, lengths[0] :], tokens[0, 9:] = 5, 7
    ours = speaker(text, lengths, tokens, counts, torch.Generator().manual_seed(0)).loss
    torch.testing.assert_close(ours, expected)


def test_it_learns_two_texts():
    speaker = model(dropout=0.0, attention_dropout=0.0, smoothing=0.0).train()
    data, rng = batch(speaker), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(speaker.parameters(), lr=5e-3)
    for _ in range(300):
        loss = speaker(*data, rng=rng).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, counts = speaker.eval().generate_ids(*data[:2], rngs(0, 1), temperature=0)
    assert counts.tolist() == [9, 14]
    assert (ids == data[2])[0, :9].float().mean() > 0.8
    assert (ids == data[2])[1].float().mean() > 0.8
