"""xAR: every X trains and samples; caches, skips and batches change nothing; kept entities stay."""

import math
from itertools import pairwise

import mediatok as mt
import pytest
import torch
from mediatok.convert import from_official
from mediatok.core.errors import InvalidCheckpoint, InvalidInput, TokenizerMismatch
from mediatok.generators.xar import XAR, SeededNoise, time_index
from mediatok.generators.xar_layout import Layout

LAYOUTS = [("patch", None), ("cell", 2), ("subsample", 2), ("scale", (1, 2, 4)), ("image", None)]
SIZES = {
    "grid": 4, "latent_channels": 3, "embed_dim": 32, "encoder_depth": 1, "decoder_depth": 2, "num_heads": 2,
    "num_classes": 3,
}  # fmt: skip


def model(layout="cell", size=2, **changes):
    torch.manual_seed(0)
    return XAR(layout=layout, layout_size=size, **(SIZES | changes)).eval()


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("kind", "size"), LAYOUTS)
def test_layouts_are_whole(kind, size):
    layout = Layout.make(kind, 4, size)
    latents = torch.randn(2, 3, 4, 4)
    sequence = layout.to_sequence(latents)
    assert sequence.shape == (2, layout.num_tokens, 3)
    assert torch.equal(layout.to_latents(sequence), latents)
    assert layout.coordinates_T2.shape == (layout.num_tokens, 2)
    spans = [layout.tokens_of(entity) for entity in range(layout.num_entities)]
    assert [span.stop - span.start for span in spans] == list(layout.sizes)
    assert spans[-1].stop == layout.num_tokens
    visible = layout.visible()
    for entity, span in enumerate(spans):
        assert visible[span].sum(dim=1).unique().tolist() == [sum(layout.sizes[: entity + 1])]


def test_cells_and_subsamples_are_what_they_are_called():
    numbers = torch.arange(16.0).view(1, 1, 4, 4)
    assert Layout.make("cell", 4, 2).to_sequence(numbers)[0, :4, 0].tolist() == [0, 1, 4, 5]
    assert Layout.make("subsample", 4, 2).to_sequence(numbers)[0, :4, 0].tolist() == [0, 2, 8, 10]
    scales = Layout.make("scale", 4, (1, 4)).to_sequence(numbers)[0, :, 0]
    assert scales[0] == numbers.mean()
    assert Layout.make("scale", 4, (2, 4)).coordinates_T2[:4].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("cell", 3),
        ("cell", 0),
        ("scale", (1, 2)),
        ("scale", (2, 2, 4)),
        ("scale", (1.5, 4)),
        ("scale", ()),
        ("ring", 1),
    ],
)
def test_impossible_layouts(kind, size):
    with pytest.raises(InvalidInput):
        Layout.make(kind, 4, size)


def test_layouts_that_are_too_large():
    for kind, grid, size in (("patch", 10**6, None), ("cell", 129, 1), ("scale", 128, (64, 128))):
        with pytest.raises(InvalidInput, match="128"):
            Layout.make(kind, grid, size)


@pytest.mark.parametrize(("kind", "size"), LAYOUTS)
@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_every_x_trains_and_samples(kind, size, sampler):
    generator = model(kind, size)
    output = generator(torch.randn(2, 3, 4, 4), torch.tensor([0, 3]), torch.Generator().manual_seed(0))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
    settings = generator.settings(3, 2.5, sampler=sampler)
    together = generator.generate_latents(torch.tensor([0, 1]), settings, rngs(5, 6))
    alone = generator.generate_latents(torch.tensor([1]), settings, rngs(6))
    assert together.shape == (2, 3, 4, 4)
    torch.testing.assert_close(alone[0], together[1], atol=2e-5, rtol=1e-4)


def plain_latents(generator, labels, settings, noise):
    """The textbook loop: the whole sequence again in each call, always both branches, nothing cached."""
    layout, batch = generator.entities, len(labels)
    both = torch.cat([labels, torch.full_like(labels, generator.config.num_classes)])
    finished = torch.zeros(batch, layout.num_tokens, generator.config.latent_channels)
    for entity in range(layout.num_entities):
        tokens = layout.tokens_of(entity)
        shape = (layout.sizes[entity], generator.config.latent_channels)
        x = noise.start(entity, shape).double()
        times = settings.times(entity)
        for step, (now, then) in enumerate(pairwise(times)):
            sequence = finished.clone()
            sequence[:, tokens] = x.float()
            index = torch.zeros(2 * batch, layout.num_entities, dtype=torch.long)
            index[:, entity] = time_index(torch.tensor(now))
            v = generator.velocities(sequence.repeat(2, 1, 1), index, both)[:, tokens].double()
            drift = v if settings.sampler == "ode" else v - now * -((1 - now) * v + x.repeat(2, 1, 1)) / now
            conditional, unconditional = drift.chunk(2)
            weight = settings.guidance_of(entity)
            x = x + (then - now) * (unconditional + weight * (conditional - unconditional))
            if settings.sampler == "sde" and then > 0:
                x = x + math.sqrt(2 * now) * math.sqrt(now - then) * noise.step(entity, step, shape)
        finished[:, tokens] = x.float()
    return layout.to_latents(finished)


@pytest.mark.parametrize(("kind", "size"), LAYOUTS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_caches_and_skips_change_nothing(kind, size, guidance, sampler):
    generator, labels = model(kind, size), torch.tensor([0, 2, 2])
    settings = generator.settings(3, guidance, sampler=sampler)
    with torch.inference_mode():
        expected = plain_latents(generator, labels, settings, SeededNoise(rngs(1, 2, 3)))
    ours = generator.generate_latents(labels, settings, rngs(1, 2, 3))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_kept_cells_stay_and_are_context():
    generator, labels = model(), torch.tensor([0, 1])
    settings = generator.settings(3, 2.0)
    start = torch.randn(2, 3, 4, 4)
    keep = torch.tensor([[True, False, False, True], [True, True, False, False]])
    calls = []
    made = generator.generate_latents(labels, settings, rngs(1, 2), start, keep, lambda *args: calls.append(args))
    cells, given = (generator.entities.to_sequence(x).unflatten(1, (4, 4)) for x in (made, start))
    assert torch.equal(cells[keep], given[keep])
    assert not torch.isclose(cells[~keep], given[~keep]).any()
    for row in range(2):
        alone = generator.generate_latents(
            labels[row, None], settings, rngs(row + 1), start[row, None], keep[row, None]
        )
        torch.testing.assert_close(alone[0], made[row], atol=2e-5, rtol=1e-4)
    assert [step for step, _ in calls][-1] == settings.total_steps
    assert sum(latents is not None for _, latents in calls) == 4  # one picture to show for each cell
    other = generator.generate_latents(labels, settings, rngs(1, 2), start + 1, keep)
    changed = generator.entities.to_sequence(other).unflatten(1, (4, 4))[1, 2]
    assert not torch.allclose(changed, cells[1, 2], atol=1e-4)


def test_steps_may_fall_from_entity_to_entity():
    generator = model()
    settings = generator.settings((7, 1), 2.0)
    assert settings.steps == (7, 5, 3, 1)
    assert settings.total_steps == 16
    steps = []
    generator.generate_latents(torch.tensor([0]), settings, rngs(0), on_step=lambda step, _: steps.append(step))
    assert steps == list(range(1, 17))


def test_guidance_grows_with_the_entities():
    settings = model().settings(2, 4.0)
    assert [settings.guidance_of(entity) for entity in range(4)] == [1, 2, 3, 4]
    assert model("image", None).settings(2, 4.0).guidance_of(0) == 4


def test_times_end_at_the_data():
    assert model().settings(3).times(0) == pytest.approx([1, 0.52, 0.04, 0])
    assert model().settings(1).times(0) == [1, 0]
    assert model().settings(2, sampler="ode").times(0) == [1, 0.5, 0]


def test_two_runs_at_once_do_not_meet():
    """The cache is the run's, not the model's: a run within a run changes neither."""
    generator = model()
    settings = generator.settings(2, 2.0)
    label = torch.tensor([0])
    expected = generator.generate_latents(label, settings, rngs(0))
    inner = []

    def start_another(step, latents):
        if step == 3:
            inner.append(generator.generate_latents(label, settings, rngs(0)))

    outer = generator.generate_latents(label, settings, rngs(0), on_step=start_another)
    assert torch.equal(outer, expected)
    assert torch.equal(inner[0], expected)


def test_save_and_load(tmp_path):
    generator = model()
    generator.save_pretrained(tmp_path / "m")
    loaded = mt.load(tmp_path / "m")
    settings, label = generator.settings(2, 2.0), torch.tensor([1])
    assert torch.equal(
        loaded.generate_latents(label, settings, rngs(0)), generator.generate_latents(label, settings, rngs(0))
    )
    half = mt.load(tmp_path / "m", dtype="bfloat16")
    made = half.generate_latents(label, settings, rngs(0))
    assert made.dtype == torch.float32
    assert (made - generator.generate_latents(label, settings, rngs(0))).abs().mean() < 0.1


def test_fp64_is_close():
    generator, labels = model(), torch.tensor([1])
    settings = generator.settings(2, 2.0)
    expected = generator.generate_latents(labels, settings, rngs(0))
    torch.testing.assert_close(
        generator.double().generate_latents(labels, settings, rngs(0)), expected, atol=1e-5, rtol=1e-4
    )


def test_the_compiled_network_gives_the_same():
    generator, label = model(), torch.tensor([1])
    settings = generator.settings(2, 2.0)
    expected = generator.generate_latents(label, settings, rngs(0))
    generator.compile_network(backend="eager", mode=None)
    torch.testing.assert_close(generator.generate_latents(label, settings, rngs(0)), expected, atol=1e-5, rtol=1e-4)
    assert list(generator.state_dict()) == list(model().state_dict())


def test_memory_is_estimated_with_the_steps_of_the_run(make_small):
    """Each block keeps what it makes of every step's time; the most steps of an entity count."""
    generator = make_small("xar")
    few, many, falling = (generator.bytes_per_image(generator.settings(steps)) for steps in (2, 100, (100, 50)))
    assert many - few == 4 * 2 * 6 * 32 * 98
    assert falling == many


def test_what_cannot_be_is_said():
    for bad in ({"num_heads": 3}, {"encoder_depth": 0}, {"layout": "hexagon"}):
        with pytest.raises(InvalidInput):
            model(**bad)
    generator = model()
    for bad in ({"steps": 0}, {"steps": (3, 0)}, {"steps": 10**6}, {"guidance": math.inf}, {"sampler": "heun"}):
        with pytest.raises(InvalidInput):
            generator.settings(**bad)
    with pytest.raises(TokenizerMismatch):
        generator.use_tokenizer(mt.load("titok-tiny"))
    with pytest.raises(InvalidInput, match="finite"):
        generator.check_content(torch.full((1, 3, 4, 4), math.nan))


def test_foreign_weights_are_refused():
    with pytest.raises(InvalidCheckpoint, match="no weights of xAR"):
        from_official("xar", {}, {"a": torch.zeros(1)})
