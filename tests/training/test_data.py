"""The order of samples is a pure function of the seed; shards with hostile members are harmless."""

import io
import tarfile

import numpy as np
import pytest
import torch
from mediatok.core.errors import InvalidInput
from mediatok.training.data import (
    ImageFolder,
    TrainingPictures,
    batch_positions,
    derived_seed,
    is_held_out,
    open_source,
    training_batches,
    validation_pictures,
)
from mediatok.training.recipe import DataRecipe
from mediatok.training.shards import ShardSet, expand_shards
from PIL import Image


def training_pictures(folder, **options):
    recipe = DataRecipe(train=str(folder), **options)
    return TrainingPictures(open_source(recipe.train), recipe, image_size=16, seed=7)


def first_batches(pictures, count, *args):
    batches = training_batches(pictures, *args)
    return [next(batches)[0] for _ in range(count)]


def test_each_epoch_has_every_picture_once(pictures):
    data = training_pictures(pictures, flip=0)
    orders = [[data.order.index(48 * epoch + place) for place in range(48)] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(48))
    assert not np.array_equal(orders[0], orders[1])
    again = training_pictures(pictures, flip=0)
    assert [again.order.index(96 + place) for place in range(48)] == orders[2]


def test_two_processes_share_the_batches_of_one(pictures):
    data = training_pictures(pictures, min_scale=0.6)
    whole = first_batches(data, 4, 0, 8)
    halves = [first_batches(data, 4, 0, 4, process, 2) for process in range(2)]
    for index in range(4):
        assert torch.equal(whole[index], torch.cat([halves[0][index], halves[1][index]]))


def test_any_place_can_be_reached_at_once(pictures):
    data = training_pictures(pictures, min_scale=0.6)
    assert torch.equal(first_batches(data, 10, 0, 4)[9], first_batches(data, 1, 9, 4)[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_and_memory_change_nothing(pictures, in_memory):
    plain = first_batches(training_pictures(pictures, min_scale=0.6), 5, 0, 4)
    other = first_batches(training_pictures(pictures, min_scale=0.6, in_memory=in_memory, num_workers=2), 5, 0, 4)
    assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_derived_seeds():
    seeds = {derived_seed(*parts) for parts in ((0, 1), (1, 0), (0, 0, 1), (0,), (7, 2**40))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(3, 4) == derived_seed(3, 4)


def test_positions():
    batches = batch_positions(1, 2, 1, 3)
    assert [next(batches), next(batches)] == [[8, 9], [14, 15]]


def test_split_is_by_name_and_disjoint(pictures):
    train, val = (ImageFolder(pictures, split) for split in ("train", "val"))
    assert len(train) + len(val) == 48
    assert len(val) > 0
    assert all(is_held_out(path.stem) for path in val.paths)


def test_broken_pictures_are_skipped(pictures, caplog):
    (pictures / "p00.png").write_bytes(b"not a picture")
    data = training_pictures(pictures)
    assert len(first_batches(data, 12, 0, 4)) == 12
    assert "broken" in caplog.text


def test_only_broken_pictures_are_an_error(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"x")
    with pytest.raises(InvalidInput, match="broken"):
        training_pictures(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(InvalidInput):
        open_source(str(tmp_path))


def test_captions_lie_beside_pictures(pictures):
    (pictures / "p01.txt").write_text("a red cat\n")
    _, captions = validation_pictures(open_source(str(pictures)), 16, 3)
    assert captions == ["", "a red cat", ""]


# Shards


def png(value, side=20):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, data=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        with tarfile.open(tmp_path / f"s-{number:02d}.tar", "w") as tar:
            for index in range(10):
                value = number * 10 + index
                add(tar, f"{value:04d}.png", png(value))
                add(tar, f"{value:04d}.txt", f"picture {value}".encode())
    return tmp_path


def red(picture):
    return picture.getpixel((0, 0))[0]


def test_shards_are_read_in_place(shards):
    source = open_source(str(shards / "s-{00..02}.tar"))
    assert len(source) == 30
    assert [red(source.read(index)[0]) for index in range(30)] == list(range(30))
    assert source.read(17)[1] == "picture 17"


def test_shard_order_is_random_and_whole(shards):
    source = open_source(str(shards / "*.tar"))
    orders = [source.order(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(30))
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_training_from_shards_equals_training_from_a_folder_in_kind(shards):
    data = training_pictures(shards / "s-{00..02}.tar", num_workers=2)
    seen = torch.cat(first_batches(data, 10, 0, 3))[:, 0, 0, 0]
    assert sorted(seen.tolist()) == list(range(30))


def test_split_of_shards(shards):
    train, val = (open_source(str(shards / "*.tar"), split) for split in ("train", "val"))
    assert len(train) + len(val) == 30


def test_hostile_members_are_ignored(tmp_path):
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "good.png", png(1))
        add(tar, "../escape.png", png(2))
        add(tar, "/absolute.png", png(3))
        add(tar, "a/../../b.png", png(4))
        add(tar, "link.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(tar, "hard.png", kind=tarfile.LNKTYPE, link="good.png")
        add(tar, "device.png", kind=tarfile.CHRTYPE)
        add(tar, "fifo.png", kind=tarfile.FIFOTYPE)
        add(tar, "empty.png")
        add(tar, "folder.png", kind=tarfile.DIRTYPE)
        add(tar, "code.py", b"import os")
        add(tar, "x" * 2000 + ".png", png(5))
        add(tar, "good.png", png(9))  # a second picture of the same name
    source = ShardSet([path])
    assert len(source) == 1
    assert red(source.read(0)[0]) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"\0" * 10_240, b"no tar file at all", png(1)])
def test_files_that_are_no_shard(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(InvalidInput):
        open_source(str(path))


def test_shard_cut_short(shards):
    path = shards / "s-00.tar"
    path.write_bytes(path.read_bytes()[:3000])
    try:
        source = ShardSet([path])
    except InvalidInput:
        return
    assert [red(source.read(index)[0]) for index in range(len(source))] == list(range(len(source)))


@pytest.mark.parametrize("pattern", ["https://example.org/{0..3}.tar", "pipe:cat x.tar", "missing-{0..2}.tar"])
def test_shards_that_cannot_be_read(pattern):
    with pytest.raises(InvalidInput):
        expand_shards(pattern)
