"""GenSE: the fast path writes what the plain one does, windows join without seams, and what cannot be is said."""

import math

import mediatok as mt
import pytest
import torch
from mediatok.core import memory
from mediatok.core.errors import Cancelled, InvalidInput, LimitExceeded, TokenizerMismatch
from mediatok.generators import gense, gense_windows
from mediatok.generators.gense import BEGIN, NEW_POSITION, ExponentialNoise, GenSE, official_length
from mediatok.generators.gense_windows import WindowPlan
from mediatok.nn.gpt2 import GPT2
from mediatok.tokenizers.speech.semantic import SemanticTokenizer
from mediatok.tokenizers.speech.simcodec import SimCodec

RATE = 16000
SEMANTIC, ACOUSTIC = 10, 12  # codes


def small_tokenizers():
    torch.manual_seed(1)
    semantic = SemanticTokenizer(
        layer=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7, pos_conv_kernel=8,
        pos_conv_groups=2, num_clusters=SEMANTIC,
    )  # fmt: skip
    codec = SimCodec(
        en_filters=2, de_filters=2, vq_dim=4, upsample_rates=(5, 4, 4, 2), upsample_kernel_sizes=(11, 8, 8, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),), n_codes=ACOUSTIC,
    )  # fmt: skip
    return semantic.eval(), codec.eval()


def model(with_tokenizers=False, **changes):
    torch.manual_seed(0)
    sizes = {"num_semantic": SEMANTIC, "num_acoustic": ACOUSTIC, "hidden_size": 16, "num_hidden_layers": 2}
    generator = GenSE(**(sizes | {"num_attention_heads": 2, "s2s_positions": 2100} | changes)).eval()
    for parameter in generator.parameters():  # freshly drawn ones hardly tell one token from another
        if parameter.ndim == 2:
            parameter.data *= 10
    if with_tokenizers:
        generator.use_tokenizers(*small_tokenizers())
    return generator


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noisy(batch=2, semantic=7, acoustic=14, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randint(SEMANTIC, (batch, semantic), generator=rng),
        torch.randint(ACOUSTIC, (batch, acoustic), generator=rng),
    )


def sound(seconds, rate=RATE):
    rng = torch.Generator().manual_seed(5)
    return mt.Waveform(0.1 * torch.randn(1, int(seconds * rate), generator=rng), rate)


def write_plainly(lm, ids, positions, new_positions, valid, choose):
    """The textbook loop: the whole sequence again for each token, and every logit of every position."""
    for step, position in enumerate(new_positions):
        hidden = lm(ids, torch.tensor(positions))
        logits = (hidden @ lm.wte.weight.T)[:, -1]
        masked = torch.full_like(logits, -1e5)
        masked[:, valid] = logits[:, valid]
        ids = torch.cat([ids, choose(step, masked)[:, None]], dim=1)
        positions = [*positions, position]
    return ids[:, -len(new_positions) :]


def enhance_plainly(generator, semantic, acoustic, settings, noise, count):
    def chooser(name, valid, num_ids):
        def choose(step, logits):
            if settings.greedy:
                return logits.argmax(-1)
            all_noise = torch.ones(len(logits), num_ids)
            all_noise[:, valid] = noise.draw(name, step, valid.stop - valid.start)
            return ((logits / settings.temperature).softmax(-1) / all_noise).argmax(-1)

        return choose

    begin = torch.full_like(semantic[:, :1], BEGIN)
    length, voice = semantic.shape[1], acoustic.shape[1]
    ids = slice(3, 3 + SEMANTIC)
    clean = write_plainly(
        generator.n2s, torch.cat([semantic + 3, begin], 1), list(range(length + 1)), range(length), ids,
        chooser("n2s", ids, 3 + SEMANTIC),
    )  # fmt: skip
    ids = slice(3 + SEMANTIC, 3 + SEMANTIC + ACOUSTIC)
    written = write_plainly(
        generator.s2s, torch.cat([semantic + 3, clean, begin, acoustic + ids.start], 1),
        [*range(2 * length + 1), *range(voice)], range(NEW_POSITION, NEW_POSITION + count), ids,
        chooser("s2s", ids, ids.stop),
    )  # fmt: skip
    return clean - 3, written - ids.start


@pytest.mark.parametrize(("batch", "semantic", "acoustic"), [(1, 1, 1), (2, 7, 14), (3, 9, 9), (1, 6, 13)])
@pytest.mark.parametrize("way", [{"greedy": True}, {"temperature": 1.0}, {"temperature": 0.3}])
def test_the_cache_changes_nothing(batch, semantic, acoustic, way):
    generator, settings = model(), model().settings(**way)
    tokens = noisy(batch, semantic, acoustic)
    seeds = range(batch)
    with torch.inference_mode():
        expected = enhance_plainly(generator, *tokens, settings, ExponentialNoise(rngs(*seeds)), acoustic)
    clean, written = generator.generate_ids(*tokens, settings, rngs(*seeds))
    assert torch.equal(clean, expected[0])
    assert torch.equal(written, expected[1])
    assert written.min() >= 0
    assert written.max() < ACOUSTIC
    assert len(clean.unique()) > 1 or clean.numel() < 9  # the small model tells tokens apart


def test_the_official_length_is_written_when_asked_for():
    generator = model()
    assert [official_length(t, a) for t, a in ((10, 20), (15, 15), (15, 31))] == [20, 22, 30]
    tokens = noisy(1, 5, 5)
    _, usual = generator.generate_ids(*tokens, generator.settings(greedy=True))
    _, longer = generator.generate_ids(*tokens, generator.settings(greedy=True), num_acoustic=official_length(5, 5))
    assert longer.shape == (1, 7)
    assert torch.equal(longer[:, :5], usual)


def test_a_clip_does_not_depend_on_its_batch():
    generator, tokens = model(), noisy(3)
    settings = generator.settings()
    together = generator.generate_ids(*tokens, settings, rngs(7, 8, 9))
    alone = generator.generate_ids(*(ids[1, None] for ids in tokens), settings, rngs(8))
    assert torch.equal(together[0][1], alone[0][0])
    assert torch.equal(together[1][1], alone[1][0])


def test_draws_follow_the_probabilities():
    """argmax(p / noise) over many draws."""
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    for temperature in (1.0, 0.5):
        noise = ExponentialNoise([torch.Generator().manual_seed(i) for i in range(4000)])
        drawn = (torch.softmax(logits / temperature, -1) / noise.draw("n2s", 0, 3)).argmax(-1)
        share = torch.bincount(drawn, minlength=3) / 4000
        assert (share - torch.softmax(logits[0] / temperature, -1)).abs().max() < 0.03


def test_the_training_pass_counts_what_is_to_be_written():
    generator = model(dropout=0.0)
    semantic, acoustic = noisy(2, 6, 12)
    clean_semantic, clean_acoustic = noisy(2, 6, 12, seed=3)
    output = generator(semantic, clean_semantic, acoustic, clean_acoustic)
    begin = torch.full_like(semantic[:, :1], BEGIN)
    first = 3 + SEMANTIC
    n2s_ids = torch.cat([semantic + 3, begin, clean_semantic + 3], 1)
    n2s_positions = torch.tensor([*range(7), *range(6)])
    s2s_ids = torch.cat([semantic + 3, clean_semantic + 3, begin, acoustic + first, clean_acoustic + first], 1)
    s2s_positions = torch.tensor([*range(13), *range(12), *range(1000, 1012)])
    losses = {}
    for name, lm, ids, positions, count in (
        ("n2s", generator.n2s, n2s_ids, n2s_positions, 6),
        ("s2s", generator.s2s, s2s_ids, s2s_positions, 12),
    ):
        log_p = (lm(ids, positions) @ lm.wte.weight.T).log_softmax(-1)
        target = ids[:, -count:]
        losses[name] = -log_p[:, -count - 1 : -1].gather(2, target[..., None]).mean()
        accuracy = (log_p[:, -count - 1 : -1].argmax(-1) == target).float().mean()
        assert output.metrics[f"{name}_accuracy"] == accuracy
    torch.testing.assert_close(output.n2s_loss, losses["n2s"])
    torch.testing.assert_close(output.s2s_loss, losses["s2s"])
    torch.testing.assert_close(output.loss, losses["n2s"] + losses["s2s"])
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_it_learns():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0}
    generator = GenSE(num_semantic=SEMANTIC, num_acoustic=ACOUSTIC, **sizes).train()
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    semantic, acoustic = noisy(4, 6, 12)
    batch = semantic, (semantic + 1) % SEMANTIC, acoustic, (acoustic + 1) % ACOUSTIC
    for _ in range(60):
        output = generator(*batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss < 0.3
    settings = generator.eval().settings(greedy=True)
    clean, written = generator.generate_ids(batch[0], batch[2], settings)
    assert (clean == batch[1]).float().mean() > 0.9
    assert (written == batch[3]).float().mean() > 0.9


def test_only_matrices_decay():
    generator = model()
    decayed = {
        name.split(".", 1)[1] for name, value in generator.named_parameters() if generator.is_decayed(name, value)
    }
    assert "blocks.0.attn.qkv.weight" in decayed
    assert not [name for name in decayed if name.endswith("bias") or "ln_" in name or name.startswith(("wte", "wpe"))]


# Sound.


@pytest.mark.parametrize("num_samples", [1, 319, 320, 1600, 3200, 3201, 3520, 5000, 12345, 100_000])
def test_windows_cover_a_clip_and_join_to_it(monkeypatch, num_samples):
    monkeypatch.setattr(gense_windows, "WINDOW_SECONDS", 0.2)
    monkeypatch.setattr(gense_windows, "OVERLAP_SECONDS", 0.02)
    plan = WindowPlan.make(num_samples, RATE, 320, 10**6)
    samples = torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))
    windows = plan.windows(samples)
    assert windows.shape == (len(plan.starts), plan.size)
    assert plan.size % 320 == 0
    assert plan.size <= 3200
    assert all(b - a <= plan.size - 320 for a, b in zip(plan.starts, plan.starts[1:], strict=False))
    torch.testing.assert_close(plan.join(windows)[:num_samples], samples, atol=1e-6, rtol=0)
    assert len(plan.join(windows)) - num_samples < 320
    if num_samples > plan.size:
        assert plan.starts[-1] + plan.size == num_samples


def test_windows_fade_into_each_other(monkeypatch):
    monkeypatch.setattr(gense_windows, "WINDOW_SECONDS", 0.2)
    monkeypatch.setattr(gense_windows, "OVERLAP_SECONDS", 0.02)
    plan = WindowPlan.make(6000, RATE, 320, 10**6)
    assert plan.starts == (0, 2800)
    joined = plan.join(torch.stack([torch.zeros(3200), torch.ones(3200)]))
    assert joined[:2840].max() == 0  # the fade of 320 samples is in the middle of the overlap of 400
    assert joined[3160:].min() == 1
    assert (joined.diff() >= 0).all()
    assert joined.diff().max() < 1 / 300


@pytest.fixture(scope="module")
def enhancer():
    return model(with_tokenizers=True)


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(gense_windows, "WINDOW_SECONDS", 0.2)
    monkeypatch.setattr(gense_windows, "OVERLAP_SECONDS", 0.02)


@pytest.mark.parametrize(("seconds", "rate"), [(0.01, RATE), (0.1, RATE), (0.15, 8000), (0.9, 44100), (0.7, RATE)])
def test_enhanced_sound_is_as_long_as_the_noisy_one(enhancer, short_windows, seconds, rate):
    audio = sound(seconds, rate)
    clean = enhancer.enhance(audio, seed=0)
    assert clean.sample_rate == RATE
    assert clean.samples.shape == audio.resample(RATE).samples.shape
    assert clean.samples.abs().max() <= 1
    assert clean.samples.std() > 0


def test_a_seed_makes_it_again(enhancer):
    audio = sound(0.1)
    first, again, other = (enhancer.enhance(audio, seed=seed).samples for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    greedy = [enhancer.enhance(audio, seed=seed, greedy=True).samples for seed in (1, 2)]
    assert torch.equal(*greedy)


def test_batches_of_windows_change_nothing(enhancer, short_windows):
    audio = sound(0.75)
    one, three = (enhancer.enhance(audio, seed=1, batch_size=size).samples for size in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-4)


def test_a_window_is_what_the_tokens_say(enhancer):
    """Enhancing is encoding, writing and decoding."""
    audio = sound(0.1)
    semantic = enhancer.semantic_tokenizer.encode_waveform(audio.samples)
    acoustic = enhancer.codec.encode_waveform(audio.samples)
    _, written = enhancer.generate_ids(semantic, acoustic, enhancer.settings(), rngs(6))
    expected = enhancer.codec.decode_ids(written)
    torch.testing.assert_close(enhancer.enhance(audio, seed=6).samples, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", [{"n2s_positions": 9}, {"s2s_positions": 1015}])
def test_windows_are_as_short_as_the_positions(enhancer, positions):
    """8 semantic tokens, or 16 acoustic ones: 2560 samples."""
    generator = model(**positions)
    generator.use_tokenizers(enhancer.semantic_tokenizer, enhancer.codec)
    assert generator.window_plan(10 * RATE).size == 2560
    # They know no shorter ones: a short clip is enhanced with the silence behind it.
    padded = mt.Waveform(torch.nn.functional.pad(sound(0.1).samples, (0, 960)), RATE)
    expected = generator.enhance(padded, seed=0).samples[:, :1600]
    assert torch.equal(generator.enhance(sound(0.1), seed=0).samples, expected)
    assert generator.enhance(sound(0.4), seed=0).samples.shape == (1, 6400)
    with pytest.raises(LimitExceeded, match="any sound"):
        model(with_tokenizers=True, s2s_positions=1000).enhance(sound(0.1))


def test_progress_is_told_and_can_be_stopped(enhancer, short_windows):
    steps = []
    audio = sound(0.5)
    enhancer.enhance(audio, seed=0, batch_size=2, on_step=lambda *step, preview=None: steps.append(step))
    assert [step for step, _ in steps] == sorted(step for step, _ in steps)
    assert steps[-1][0] == steps[-1][1] == 3 * (10 + 20)
    assert len({total for _, total in steps}) == 1

    def stop(step, total, preview=None):
        if step > 10:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        enhancer.enhance(audio, on_step=stop)


def test_packed_weights_write_the_same():
    tokens = noisy()
    settings = model().settings()
    expected = model().generate_ids(*tokens, settings, rngs(1, 2))
    packed = model()
    packed.pack_network()
    assert torch.equal(packed.generate_ids(*tokens, settings, rngs(1, 2))[1], expected[1])


def test_save_and_load(tmp_path, enhancer):
    enhancer.save_pretrained(tmp_path / "m")
    loaded = mt.load(tmp_path / "m")
    tokens, settings = noisy(), enhancer.settings(greedy=True)
    assert torch.equal(loaded.generate_ids(*tokens, settings)[1], enhancer.generate_ids(*tokens, settings)[1])
    half = mt.load(tmp_path / "m", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    _, written = half.generate_ids(*tokens, settings)
    assert written.shape == (2, 14)
    assert written.max() < ACOUSTIC
    ids, positions = half.n2s_prompt(tokens[0])
    with torch.inference_mode():
        logits, exact = (lm.logits(lm(ids, positions)) for lm in (half.n2s, enhancer.n2s))
    assert (logits - exact).abs().mean() < 0.05 * exact.std()


# The tokenizers.


def test_tokenizers_are_found_by_name_and_checked(tmp_path):
    semantic, codec = small_tokenizers()
    semantic.save_pretrained(tmp_path / "semantic")
    codec.save_pretrained(tmp_path / "codec")
    names = {"semantic_tokenizer": str(tmp_path / "semantic"), "codec": str(tmp_path / "codec")}
    prints = {"semantic_fingerprint": semantic.fingerprint, "codec_fingerprint": codec.fingerprint}
    found = model(**names, **prints)
    given = model(with_tokenizers=True)
    audio = sound(0.1)
    assert torch.equal(found.enhance(audio, seed=0).samples, given.enhance(audio, seed=0).samples)
    with pytest.raises(TokenizerMismatch, match="was trained with"):
        model(**names, **prints | {"codec_fingerprint": "0" * 16}).enhance(audio)


def test_wrong_tokenizers_are_refused():
    generator = model()
    semantic, codec = small_tokenizers()
    with pytest.raises(InvalidInput, match="names no semantic tokenizer"):
        generator.enhance(sound(0.1))
    generator.use_tokenizers(semantic=semantic)
    with pytest.raises(InvalidInput, match="names no codec"):
        generator.enhance(sound(0.1))
    with pytest.raises(TokenizerMismatch, match="10 of them"):
        generator.use_tokenizers(codec=semantic)
    with pytest.raises(InvalidInput, match="speech tokenizers"):
        generator.use_tokenizers(codec=mt.load("titok-tiny"))
    with pytest.raises(InvalidInput, match="neither a known model nor a folder"):
        model(semantic_tokenizer="somebody/else").enhance(sound(0.1))
    slow = SimCodec(**{key: value for key, value in codec.config.items() if key[0] != "_"} | {"sample_rate": 8000})
    with pytest.raises(TokenizerMismatch, match="samples a second"):
        generator.use_tokenizers(codec=slow.eval())


# What cannot be is said.


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0}, {"temperature": math.nan}, {"temperature": "1"}, {"greedy": "no"}, {"batch_size": 0},
        {"batch_size": True}, {"seed": -1}, {"seed": 1.5}, {"on_step": 3},
    ],
)  # fmt: skip
def test_bad_values_are_named(enhancer, bad):
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        enhancer.enhance(sound(0.1), **bad)


def test_too_much_at_once_is_refused(enhancer, monkeypatch):
    with pytest.raises(LimitExceeded, match="positions"):
        enhancer.generate_ids(*noisy(1, 7, 1102), enhancer.settings(greedy=True))
    enhancer.check_positions(7, 1101, 1101)  # the last token's place is never read
    with pytest.raises(LimitExceeded, match="positions"):
        model(n2s_positions=7).check_positions(7, 7, 7)
    monkeypatch.setattr(gense, "available_memory", lambda device: 1000)
    with pytest.raises(LimitExceeded, match="not even one fits"):
        enhancer.enhance(sound(0.1))
    assert memory.available_memory(torch.device("cpu")) > 1000


def test_impossible_sizes():
    with pytest.raises(InvalidInput, match="heads"):
        model(num_attention_heads=3)


def test_gpt2_reads_several_tokens_only_into_an_empty_cache():
    lm = GPT2(9, 20, 16, 2, 2).eval()
    cache = lm.new_cache(1, 8)
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        whole = lm(ids, torch.arange(6))
        parts = [
            lm(ids[:, :4], torch.arange(4), cache),
            *(lm(ids[:, i, None], torch.tensor([i]), cache) for i in (4, 5)),
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="one by one"):
        lm(ids[:, :2], torch.arange(2), cache)
