"""The generator base: labels, seeds, batches, editing, previews, cancelling, memory, and which tokenizer decodes."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import mediatok as mt
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from mediatok.core import generator as base
from mediatok.core import memory
from mediatok.core.generator import ImageGenerator, check_number, check_steps, image_seeds
from mediatok.core.image_tokenizer import ImageTokenizer
from PIL import Image

NAMES = ("animals", "animal parts", "Food & drink", "7")
UNITS = 4  # content: 4 ids, each the grey value of a quarter of an 8 x 8 picture


class FakeTokenizer(ImageTokenizer):
    """Ids are the mean grey of the four quarters of a picture."""

    vocab_size, max_tokens = 256, UNITS

    @register_to_config
    def __init__(self, image_size: int = 8, salt: int = 0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode_pixels(self, pixels_B3HW):
        return (pixels_B3HW.mean(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4)).flatten(1) * 255).long()

    def decode_ids(self, ids_BL, lengths_B=None):
        grey = (ids_BL.view(-1, 1, 2, 2) / 255).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        return grey.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class FakeSettings:
    steps: int
    guidance: float
    heat: float

    @property
    def total_steps(self):
        return self.steps


class FakeGenerator(ImageGenerator):
    """Draws every id anew in each step; the last one is shifted by the label."""

    num_units, unit_grid = UNITS, (2, 2)

    @register_to_config
    def __init__(
        self,
        num_classes: int = 4,
        label_names: tuple[str, ...] = NAMES,
        tokenizer: str | None = None,
        tokenizer_fingerprint: str | None = None,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fails_from = None  # batch size that is out of memory

    def settings(self, steps=None, guidance=None, *, heat=None):
        number = check_number(2 if guidance is None else guidance, "guidance")
        return FakeSettings(check_steps(3 if steps is None else steps), number, check_number(heat or 0, "heat"))

    def generate_content(self, labels_B, settings, rngs, start=None, keep_BU=None, on_step=None):
        if self.fails_from and len(labels_B) >= self.fails_from:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        for step in range(settings.steps):
            ids = torch.stack([torch.randint(0, 200, (UNITS,), generator=rng) for rng in rngs])
            ids = ids + labels_B[:, None]
            if keep_BU is not None:
                ids = torch.where(keep_BU, start, ids)
            on_step(step + 1, ids if step else None)
        return ids

    def encode_content(self, pixels_B3HW):
        return self.tokenizer.encode_pixels(pixels_B3HW)

    def decode_content(self, content):
        return self.tokenizer.decode_ids(content)

    def bytes_per_image(self, settings):
        return 1000

    def check_tokenizer(self, tokenizer):
        if tokenizer.max_tokens != UNITS:
            raise mt.TokenizerMismatch("other tokens")

    def check_content(self, content):
        content = content[None] if content.ndim == 1 else content
        if content.ndim != 2 or content.shape[1] != UNITS or content.dtype != torch.int64:
            raise mt.InvalidInput(f"content must be int64 [B, {UNITS}], got {list(content.shape)}")
        return content


@pytest.fixture
def gen():
    generator = FakeGenerator().eval()
    generator.use_tokenizer(FakeTokenizer().eval())
    return generator


# Labels.


def test_labels_are_names_prefixes_numbers_and_none(gen):
    assert gen.label_ids(["animals", " ANIMALS ", "food", 2, "2", None, "7"]).tolist() == [0, 0, 2, 2, 2, 4, 3]
    assert gen.label_ids("food").tolist() == [2]
    for several in (torch.tensor([1, 3]), np.array([1, 3]), (1, 3), range(1, 4, 2)):
        assert gen.label_ids(several).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("anmals", "'animals'.*knows animals, animal parts"),
        ("drink", "Did you mean 'food & drink'"),
        ("anim", r"'animals' \(0\), 'animal parts' \(1\)"),
        ("", "unknown label ''"),
        (4, "label 4 is out of range.*0 to 3"),
        ("-1", "label -1 is out of range"),
        ("9" * 5000, "unknown label"),
        (True, "not True"),
        (1.5, "not 1.5"),
        ([[1]], r"not \[1\]"),
        ([], "1 to 4096 labels, not 0"),
        ([0] * 5000, "not 5000"),
        (torch.tensor([0.5]), "not 0.5"),
        (object(), "a label is a name, a number or None"),
    ],
)
def test_wrong_labels_say_what_would_work(gen, label, words):
    with pytest.raises(mt.InvalidInput, match=words):
        gen.generate(label)


def test_imagenet_names_stand_in_where_a_model_has_1000_classes():
    gen = FakeGenerator(num_classes=1000, label_names=())
    assert gen.label_ids(["tench", "tiger cat"]).tolist() == [0, 282]
    with pytest.raises(mt.InvalidInput, match="could be any of 'great white shark'"):
        gen.label_ids("great")
    with pytest.raises(mt.InvalidInput, match="only the numbers 0 to 6"):
        FakeGenerator(num_classes=7, label_names=()).label_ids("cat")


# Seeds and batches.


def test_a_picture_depends_on_its_seed_alone(gen):
    whole = gen.sample([0, 1, 2, 0, 1], seed=5, batch_size=5)
    assert whole.seeds == [5, 6, 7, 8, 9]
    assert whole.labels == [0, 1, 2, 0, 1]
    for batch_size in (1, 2, 3):
        assert torch.equal(gen.sample([0, 1, 2, 0, 1], seed=5, batch_size=batch_size).content, whole.content)
    assert torch.equal(gen.sample([2, 0], seed=[7, 5]).content, whole.content[[2, 0]])
    assert [picture.size for picture in whole.images] == [(8, 8)] * 5
    assert not whole.content.is_inference()


def test_without_a_seed_every_call_is_another(gen):
    first, second = gen.sample([0, 0]), gen.sample([0, 0])
    assert len({*first.seeds, *second.seeds}) == 4
    assert torch.equal(gen.sample([0, 0], seed=first.seeds).content, first.content)


@pytest.mark.parametrize(
    "seed",
    [
        -1, 2**63, 2**63 - 1, 1.5, "1", True, [1], [1, 2, 3], [1, None], np.float32(1), torch.tensor(1.0),
        torch.tensor(True), torch.tensor([[1, 2]]), torch.tensor([]),
    ],
)  # fmt: skip
def test_wrong_seeds(seed):
    with pytest.raises(mt.InvalidInput, match="seeds"):
        image_seeds(seed, 2)


def test_seeds_may_be_tensors_and_arrays():
    for one in (torch.tensor(3), np.int64(3), np.array(3)):
        assert image_seeds(one, 2) == [3, 4]
    for several in (torch.tensor([7, 3]), np.array([7, 3]), (7, 3)):
        assert image_seeds(several, 2) == [7, 3]


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**12, 1.0, True, "8", float("nan")])
def test_absurd_steps(gen, steps):
    with pytest.raises(mt.InvalidInput, match="whole number from 1 to 1000"):
        gen.generate(0, steps=steps)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -float("inf"), -1, 1000, 10**400, "3", True])
def test_absurd_guidance(gen, guidance):
    with pytest.raises(mt.InvalidInput, match=r"guidance=.* must be a number from 0 to 100"):
        gen.generate(0, guidance=guidance)


def test_other_wrong_options(gen):
    with pytest.raises(mt.InvalidInput, match=r"no option .heta.\. Did you mean 'heat'"):
        gen.generate(0, heta=1)
    with pytest.raises(mt.InvalidInput, match=r"no option .self."):
        gen.generate(0, self=3)
    for batch_size in (0, -1, 1.5, True, "2", None, torch.tensor(1.5), np.array([1, 2])):
        with pytest.raises(mt.InvalidInput, match="batch_size"):
            gen.generate(0, batch_size=batch_size)


def test_whole_numbers_of_numpy_and_of_any_size(gen):
    expected = gen.sample([0, 1, 2], seed=1, steps=2).content
    assert torch.equal(gen.sample([0, 1, 2], seed=1, steps=np.int64(2), batch_size=10**30).content, expected)


# Editing.


def test_kept_units_stay(gen):
    first = gen.sample([0, 1], seed=1)
    keep = torch.tensor([True, False, True, False])
    for kept in (keep, keep[None], keep.expand(2, -1), [0, 2], (0, 2), np.array([0, 2]), torch.tensor([0, 2])):
        edited = gen.sample([2, 3], seed=9, start=first, keep=kept).content
        assert torch.equal(edited[:, keep], first.content[:, keep])
        assert not torch.equal(edited, first.content)
    one = gen.sample([2, 3], seed=9, start=first.content[0], keep=2).content
    assert one[:, 2].tolist() == [int(first.content[0, 2])] * 2
    nothing_kept = gen.sample([2, 3], seed=9, start=first, keep=[])
    assert torch.equal(nothing_kept.content, gen.sample([2, 3], seed=9).content)


def test_tokens_and_pictures_can_be_edited(gen, tmp_path):
    first = gen.sample([0, 1], seed=1)
    gen.tokens(first.content).save(tmp_path / "first.mtok")
    tokens = mt.Tokens.load(tmp_path / "first.mtok")
    assert [np.array(a).tolist() for a in gen.tokenizer.decode(tokens)] == [np.array(a).tolist() for a in first.images]
    everything = list(range(UNITS))
    assert torch.equal(gen.sample([0, 1], start=tokens, keep=everything).content, first.content)
    pictures = [Image.new("RGB", (30, 20), (51, 51, 51)), np.full((8, 8, 3), 102, dtype=np.uint8)]
    assert gen.sample([0, 1], start=pictures, keep=everything).content.tolist() == [[51] * 4, [102] * 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": [0]}, "go together"),
        ({"start": torch.zeros(1, UNITS, dtype=torch.int64)}, "go together"),
        ({"start": torch.zeros(2, UNITS), "keep": [0]}, "int64"),
        ({"start": torch.zeros(3, UNITS, dtype=torch.int64), "keep": [0]}, "3 pictures for 2 labels"),
        ({"start": torch.zeros(UNITS, dtype=torch.int64), "keep": [4]}, "unit 4.*0 to 3"),
        ({"start": torch.zeros(UNITS, dtype=torch.int64), "keep": ["0"]}, "unit '0'"),
        ({"start": torch.zeros(UNITS, dtype=torch.int64), "keep": "all"}, "unit 'all'"),
        ({"start": torch.zeros(UNITS, dtype=torch.int64), "keep": torch.ones(3, dtype=torch.bool)}, r"bool \[4\]"),
        ({"start": torch.zeros(UNITS, dtype=torch.int64), "keep": torch.ones(3, 4) > 0}, "3 rows for 2 labels"),
        ({"start": "/no/such.png", "keep": [0]}, "no/such.png"),
        ({"start": [], "keep": [0]}, "empty"),
    ],
)
def test_wrong_edits(gen, options, words):
    with pytest.raises(mt.InvalidInput, match=words):
        gen.generate([0, 1], **options)


def test_tokens_of_others_and_of_different_lengths_are_not_edited(gen):
    tokens = gen.tokens(torch.ones(2, UNITS, dtype=torch.int64))
    ragged = mt.Tokens.cat([tokens[:1], tokens[1:, :2]])
    with pytest.raises(mt.InvalidInput, match="different lengths"):
        gen.sample([0, 1], start=ragged, keep=[0])
    with pytest.raises(mt.InvalidInput, match="content must be"):
        gen.sample([0, 1], start=tokens[:, :2], keep=[0])
    other = FakeGenerator()
    other.use_tokenizer(FakeTokenizer(salt=1))
    with pytest.raises(mt.TokenizerMismatch):
        other.sample([0, 1], start=tokens, keep=[0])


# Progress.


def test_every_step_is_reported_and_previews_are_pixels(gen):
    seen = []
    gen.generate([0] * 3, steps=2, batch_size=2, previews=True, on_step=lambda *a, preview: seen.append((*a, preview)))
    assert [(step, total) for step, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    previews = [preview for _, _, preview in seen]
    assert previews[0] is None
    assert previews[2] is None
    assert previews[1].shape == (2, 3, 8, 8)
    assert previews[3].shape == (1, 3, 8, 8)
    assert 0 <= float(previews[1].min()) <= float(previews[1].max()) <= 1
    gen.generate(0, on_step=lambda step, total, preview=None: seen.append(preview))
    assert seen[-1] is None  # not asked for


def test_what_cannot_be_called_is_refused_before_any_work(gen, monkeypatch):
    monkeypatch.setattr(gen, "generate_content", lambda *arguments: pytest.fail("worked"))
    with pytest.raises(mt.InvalidInput, match="on_step must be a function"):
        gen.generate(0, on_step="progress")


def test_cancelling_stops_at_the_next_step(gen):
    steps = []

    def stop(step, total, preview=None):
        steps.append(step)
        if step == 4:
            raise mt.Cancelled("enough")

    with pytest.raises(mt.Cancelled):
        gen.generate([0] * 9, steps=3, batch_size=1, on_step=stop)
    assert steps == [1, 2, 3, 4]


# Memory.


def test_a_batch_beyond_the_memory_is_refused_with_the_size_that_fits(gen, monkeypatch):
    monkeypatch.setattr(base, "available_memory", lambda device: 2500)
    with pytest.raises(mt.LimitExceeded, match=r"a batch of 8 .* use batch_size=2"):
        gen.generate([0] * 20)
    assert len(gen.generate([0] * 5, batch_size=2)) == 5
    assert len(gen.generate([0, 1])) == 2  # two pictures are a batch of two
    monkeypatch.setattr(base, "available_memory", lambda device: 999)
    with pytest.raises(mt.LimitExceeded, match="not even one picture fits"):
        gen.generate(0)


def test_running_out_of_memory_after_all(gen):
    gen.fails_from = 3
    with pytest.raises(mt.LimitExceeded, match=r"a batch of 7 .* use batch_size=3"):
        gen.generate([0] * 7)
    gen.fails_from = 1
    with pytest.raises(mt.LimitExceeded, match="not even one picture fits"):
        gen.generate(0)
    with pytest.raises(RuntimeError, match="something else"), gen.memory_errors(2):
        raise RuntimeError("something else")


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.available_memory(torch.device("cpu"))
    assert free > 2**20
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert memory.available_memory(torch.device("cpu")) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(torch.device("cpu")) > 2**20


# The tokenizer.


def test_the_tokenizer_is_no_part_of_the_model(gen, tmp_path):
    assert list(gen.state_dict()) == ["weight"]
    assert len(list(gen.parameters())) == 1
    gen.save_pretrained(tmp_path / "fake")
    assert {file.name for file in (tmp_path / "fake").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    twin = copy.deepcopy(gen)
    assert twin.tokenizer is gen.tokenizer
    twin.use_tokenizer(FakeTokenizer(salt=1))
    assert twin.tokenizer is not gen.tokenizer


def test_another_tokenizer_is_refused():
    right, wrong = FakeTokenizer(), FakeTokenizer(salt=1)
    gen = FakeGenerator(tokenizer="right", tokenizer_fingerprint=right.fingerprint)
    gen.use_tokenizer(right)
    with pytest.raises(mt.TokenizerMismatch, match=f"right .fingerprint {right.fingerprint}.*{wrong.fingerprint}"):
        gen.use_tokenizer(wrong)
    assert gen.tokenizer is right
    with pytest.raises(mt.InvalidInput, match="image tokenizer, not str"):
        gen.use_tokenizer("titok-tiny")


def test_the_tokenizer_is_looked_up_by_name_or_folder_only(tmp_path, monkeypatch):
    from mediatok.core import registry

    with pytest.raises(mt.InvalidInput, match="names no tokenizer; give it one"):
        FakeGenerator().generate(0)
    for name in ("somebody/repository", str(tmp_path / "gone"), "titok-tinny", "", 5):
        with pytest.raises(mt.InvalidInput, match="neither a known model nor a folder"):
            FakeGenerator(tokenizer=name).generate(0)
    asked = []
    monkeypatch.setattr(registry, "load", lambda name, **options: asked.append((name, options)) or FakeTokenizer())
    assert len(FakeGenerator(tokenizer="titok-tiny").generate([0, 1])) == 2
    FakeGenerator(tokenizer=str(tmp_path)).to(torch.bfloat16).generate(0)
    assert asked == [("titok-tiny", {"dtype": "float32"}), (str(tmp_path), {"dtype": "bfloat16"})]


def test_the_tokenizer_follows_the_device(gen):
    gen.to("meta")
    assert gen.tokenizer.device.type == "meta"


def test_a_tokenizer_of_other_sizes_is_refused(gen):
    with pytest.raises(mt.TokenizerMismatch, match="other tokens"):
        gen.use_tokenizer(mt.create("one-d-piece-tiny"))


def test_only_tokenizers_with_ids_make_tokens(gen):
    gen._tokenizer_box.tokenizer = SimpleNamespace(is_continuous=True, device=gen.device)
    with pytest.raises(mt.InvalidInput, match="continuous"):
        gen.tokens(torch.zeros(1, UNITS, dtype=torch.int64))
