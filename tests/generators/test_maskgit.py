"""MaskGIT: schedules, batches, kept tokens, the skipped work, and saving."""

import math
from itertools import pairwise

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import InvalidInput, TokenizerMismatch
from mediatok.generators.maskgit import GumbelNoise, MaskGIT, MaskGITSettings

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "codebook_size": 40,
    "num_tokens": 9, "num_classes": 3,
}  # fmt: skip
DECAYS = ("constant", "linear", "power-cosine")


def model(network="uvit", **changes):
    torch.manual_seed(0)
    generator = MaskGIT(network=network, **SIZES, **changes).eval()
    for parameter in generator.parameters():  # with the weights that training begins with only the noise decides
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return generator


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def settings(steps=5, guidance=3.0, decay="linear", temperature=2.0, annealing=True):
    return MaskGITSettings(steps, guidance, decay, 3.0, temperature, annealing)


@pytest.mark.parametrize("network", ["vit", "uvit"])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_picture_does_not_depend_on_its_batch(network, decay):
    generator = model(network)
    together = generator.generate_ids(torch.tensor([0, 1, 3]), settings(decay=decay), rngs(5, 6, 7))
    for row, label in enumerate((0, 1, 3)):
        alone = generator.generate_ids(torch.tensor([label]), settings(decay=decay), rngs(5 + row))
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together[0], together[1])
    assert 0 <= int(together.min()) <= int(together.max()) < 40


@pytest.mark.parametrize("network", ["vit", "uvit"])
def test_kept_tokens_stay_and_each_picture_has_its_own_count(network):
    generator = model(network)
    labels = torch.tensor([0, 1, 2])
    start = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(3, 9, dtype=torch.bool)
    keep[0, :7], keep[1, ::2], keep[2] = True, True, True
    calls = []
    made = generator.generate_ids(labels, settings(), rngs(1, 2, 3), start, keep, lambda *args: calls.append(args))
    assert torch.equal(made[keep], start[keep])
    assert not torch.equal(made[0], start[0])
    assert [step for step, _ in calls] == [1, 2, 3, 4, 5]
    assert all(int(ids.max()) < 40 for _, ids in calls)  # whole ids: nothing masked
    for row in range(2):
        alone = generator.generate_ids(
            labels[row : row + 1], settings(), rngs(row + 1), start[row, None], keep[row, None]
        )
        assert torch.equal(alone[0], made[row])


def plain_generate(generator, labels, how, noise):
    """The textbook loop: two passes, all positions, all logits."""
    batch, num_tokens = len(labels), generator.config.num_tokens
    ids = torch.full((batch, num_tokens), generator.mask_id)
    for step in range(how.steps):
        masked = ids == generator.mask_id
        conditional = generator.logits(ids, labels)
        unconditional = generator.logits(ids, torch.full_like(labels, generator.config.num_classes))
        logits = conditional + how.guidance_weight(step) * (conditional - unconditional)
        logits = logits / how.logit_divisor(step)
        places = torch.arange(num_tokens).expand(batch, -1)
        counts = [num_tokens] * batch
        heat = how.noise_temperature(step)
        drawn = (logits + heat * noise.tokens(step, places, counts, generator.config.codebook_size)).argmax(-1)
        drawn = torch.where(masked, drawn, ids)
        sure = logits.gather(2, drawn[:, :, None])[:, :, 0] + heat * noise.confidence(step, places, counts)
        sure = sure.masked_fill(~masked, math.inf)
        ratio = math.acos((step + 1) / how.steps) / (math.pi / 2)
        count = max(1, min(int(masked[0].sum()) - 1, math.floor(num_tokens * ratio)))
        again = sure <= sure.sort(dim=1).values[:, count - 1 : count]
        ids = drawn if step + 1 == how.steps else torch.where(again, generator.mask_id, drawn)
    return ids


class FixedNoise(GumbelNoise):
    """Noise by place, so that any order of asking gets the same."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.for_tokens = torch.randn(8, 2, 10, 40, generator=generator)
        self.for_confidence = torch.randn(8, 2, 10, generator=generator)

    def tokens(self, step, masked_BK, counts, num_codes):
        return self.for_tokens[step].gather(1, masked_BK[:, :, None].expand(-1, -1, num_codes))

    def confidence(self, step, masked_BK, counts):
        return self.for_confidence[step].gather(1, masked_BK)


@pytest.mark.parametrize("network", ["vit", "uvit"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_the_skipped_work_changes_nothing(network, decay, steps):
    generator, labels = model(network), torch.tensor([0, 2])
    how = settings(steps=steps, decay=decay)
    with torch.inference_mode():
        expected = plain_generate(generator, labels, how, FixedNoise())
    assert torch.equal(generator.generate_ids(labels, how, [], noise=FixedNoise()), expected)


def test_schedules():
    how = settings(steps=4, guidance=6.0)
    assert [how.guidance_weight(step) for step in range(4)] == [0, 1.5, 3, 4.5]
    rising = settings(steps=2, guidance=7.0, decay="power-cosine")
    assert rising.guidance_weight(0) == 0
    assert rising.guidance_weight(1) == pytest.approx(3 * (1 - math.cos(math.pi / 8)))
    assert [how.logit_divisor(step) for step in (0, 3)] == pytest.approx([1.1, 0.5])
    assert settings(annealing=False).logit_divisor(0) == 1
    assert [how.noise_temperature(step) for step in range(4)] == [1.5, 1.0, 0.5, 0.0]
    counts = settings(steps=8).masked_counts(32)
    assert counts[0] == 32
    assert counts[-1] == 0
    assert all(a > b for a, b in pairwise(counts))
    assert settings(steps=20).masked_counts(3)[-2] == 1  # more steps than tokens


def test_training_pass_gives_every_parameter_a_gradient():
    generator = model("uvit").train()
    ids = torch.randint(40, (4, 9))
    output = generator(ids, torch.tensor([0, 1, 2, 3]), torch.Generator().manual_seed(0))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
    assert 0 <= float(output.metrics["masked_accuracy"]) <= 1


@pytest.mark.parametrize("network", ["vit", "uvit"])
def test_save_and_load(network, tmp_path):
    generator = model(network)
    generator.save_pretrained(tmp_path / "m")
    loaded = mt.load(tmp_path / "m")
    labels = torch.tensor([1])
    assert torch.equal(
        loaded.generate_ids(labels, settings(), rngs(0)), generator.generate_ids(labels, settings(), rngs(0))
    )


def test_bfloat16_is_close(tmp_path):
    model("vit").save_pretrained(tmp_path / "m")
    half, whole = mt.load(tmp_path / "m", dtype="bfloat16"), mt.load(tmp_path / "m")
    ids, labels = torch.full((1, 9), 40), torch.tensor([1])
    with torch.inference_mode():
        error = (half.logits(ids, labels).float() - whole.logits(ids, labels)).abs().max()
        assert error < 0.05 * whole.logits(ids, labels).abs().max()


def test_near_codes_count_as_right_and_are_read():
    generator, labels = model("uvit", label_smoothing=0.0), torch.tensor([0, 1, 2, 0])
    ids, codebook = torch.randint(0, 40, (4, 9)), torch.randn(40, 5)
    forward = lambda: generator(ids, labels, torch.Generator().manual_seed(3)).loss  # noqa: E731
    expected = forward()
    generator.train_with_near_codes(codebook, 1e-4)  # so cold that every code stands for itself
    torch.testing.assert_close(generator.train()(ids, labels, torch.Generator().manual_seed(3)).loss, expected)
    generator.train_with_near_codes(codebook, 5.0)
    read, logits = [], generator.logits
    generator.logits = lambda ids_BN, labels_B: read.append(ids_BN) or logits(ids_BN, labels_B)
    assert generator.train()(ids, labels, torch.Generator().manual_seed(3)).loss != expected
    seen = read[0] != generator.mask_id
    assert seen.any()
    assert (read[0] != ids)[seen].any()
    generator.eval()
    torch.testing.assert_close(forward(), expected)  # validation is as before

    # The loss is the cross entropy with the softmax of the distances.
    target = torch.softmax(-torch.cdist(codebook, codebook).square() / 5.0, dim=-1)[ids]
    mask = torch.ones(4, 9, dtype=torch.bool)
    output, values = generator.masked_token_loss(ids, mask, labels, ids, target)
    torch.testing.assert_close(output.loss, -(target * values.log_softmax(-1)).sum(-1).mean())


def test_the_compiled_network_gives_the_same_ids():
    generator, labels = model("uvit"), torch.tensor([0, 1])
    expected = generator.generate_ids(labels, settings(), rngs(0, 1))
    generator.compile_network(backend="eager", mode=None)
    assert torch.equal(generator.generate_ids(labels, settings(), rngs(0, 1)), expected)
    assert list(generator.state_dict()) == list(model("uvit").state_dict())


def test_what_cannot_be_is_said():
    for bad in ({"network": "gpt"}, {"num_attention_heads": 5}, {"num_hidden_layers": 0}, {"label_names": ("a",)}):
        with pytest.raises(InvalidInput):
            MaskGIT(**(SIZES | bad))
    generator = model()
    for bad in ({"steps": 0}, {"steps": 2.5}, {"guidance": math.nan}, {"guidance": -1}, {"guidance_decay": "cosine"}):
        with pytest.raises(InvalidInput):
            generator.settings(**bad)
    with pytest.raises(TokenizerMismatch, match="9 tokens of 40 codes, titok-tiny has 64 tokens of 4096"):
        generator.use_tokenizer(mt.load("titok-tiny"))
    with pytest.raises(InvalidInput, match=r"\[0, 40\)"):
        generator.check_content(torch.full((1, 9), 40))
