"""What `sample` promises whatever the model: batches, edits, callbacks, failures and threads."""

import copy
import pickle
import threading

import mediatok as mt
import pytest
import torch

KINDS = ["maskgit", "xar"]
FIVE = {"labels": [1, 2, 0, None, 2], "seed": [4, 9, 7, 1, 7]}  # the third is label 0 with seed 7


@pytest.fixture(params=KINDS)
def gen(request, make_small):
    return make_small(request.param)


def close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0 if not ours.is_floating_point() else 1e-5)


def test_alone_in_a_batch_and_in_another(gen):
    alone = gen.sample(0, seed=7, steps=3).content[0]
    for size in (2, 3, 5):
        close(gen.sample(**FIVE, steps=3, batch_size=size).content[2], alone)


def test_keeping_nothing_is_starting_from_nothing_and_keeping_all_changes_nothing(gen):
    start = gen.sample([0, 1], seed=1)
    nothing = gen.sample([1, 2], seed=5, start=start, keep=[])
    close(nothing.content, gen.sample([1, 2], seed=5).content)
    everything = gen.sample([1, 2], seed=5, start=start, keep=range(gen.num_units))
    assert torch.equal(everything.content, start.content)


def test_an_edit_does_not_depend_on_what_others_keep(gen):
    start = gen.sample([0, 1], seed=1)
    keep = torch.zeros(2, gen.num_units, dtype=torch.bool)
    keep[0, 1:], keep[1, ::2] = True, True
    both = gen.sample([1, 2], seed=[5, 6], start=start, keep=keep)
    close(both.content[1], gen.sample(2, seed=6, start=start.content[1:], keep=keep[1]).content[0])


def test_label_and_guidance_decide(gen):
    """Else the tests above could not tell one label's picture from another's."""
    plain = gen.sample(0, seed=7).content
    assert not torch.equal(gen.sample(1, seed=7).content, plain)
    assert not torch.equal(gen.sample(0, seed=7, guidance=9.0).content, plain)


def test_a_seed_decides_also_amid_training(gen):
    expected = gen.sample([0, 1], seed=3).content
    gen.train()
    frozen = gen.transformer.blocks[0].eval()
    assert torch.equal(gen.sample([0, 1], seed=3).content, expected)
    with pytest.raises(ValueError, match="theirs"):
        gen.sample(0, on_step=lambda *step, preview=None: (_ for _ in ()).throw(ValueError("theirs")))
    assert {module for module in gen.modules() if not module.training} == set(frozen.modules())


def test_steps_are_counted_over_all_batches(gen):
    seen = []
    gen.sample([0, 1, 2], seed=0, steps=2, batch_size=2, on_step=lambda *step, preview=None: seen.append(step))
    total = 2 * gen.settings(2).total_steps
    assert seen == [(step, total) for step in range(1, total + 1)]


def test_previews_are_pictures_of_the_current_batch(gen):
    shapes = []

    def show(step, total, preview=None):
        if preview is not None:
            assert 0 <= float(preview.min()) <= float(preview.max()) <= 1
            shapes.append(len(preview))

    gen.sample([0, 1, 2], seed=0, steps=2, batch_size=2, previews=True, on_step=show)
    assert set(shapes) == {1, 2}


@pytest.mark.parametrize("error", [mt.Cancelled("stop"), KeyboardInterrupt(), ValueError("theirs")], ids=repr)
def test_whatever_a_callback_raises_comes_out_and_the_model_works_on(gen, error):
    before = gen.sample(0, seed=3).content

    def fail(step, total, preview=None):
        if step == 2:
            raise error

    with pytest.raises(type(error)):
        gen.sample([0, 1], seed=1, on_step=fail)
    assert torch.equal(gen.sample(0, seed=3).content, before)


def test_threads_do_not_meet(gen):
    def make(seed):
        return gen.sample([0, 1, 2], seed=seed, steps=4).content

    alone, made = [make(seed) for seed in range(4)], {}
    threads = [threading.Thread(target=lambda seed=seed: made.update({seed: make(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, content in enumerate(alone):
        close(made[seed], content)


def test_no_guidance_is_the_conditional_network_alone(gen):
    sizes = set()
    handle = gen.transformer.register_forward_pre_hook(lambda module, args: sizes.add(len(args[0])))
    none = {"maskgit": 0.0, "xar": 1.0}[type(gen).__name__.lower()]
    gen.sample([0, 1, 2], seed=0, guidance=none)
    assert sizes == {3}
    gen.sample([0, 1, 2], seed=0, guidance=none + 1)
    handle.remove()
    assert 6 in sizes


def test_packed_weights_make_the_same_pictures_and_cannot_be_saved(gen, tmp_path):
    before = gen.sample([0, 1], seed=3, steps=3).content
    gen.pack_network()
    after = gen.sample([0, 1], seed=3, steps=3).content
    torch.testing.assert_close(after.float(), before.float(), rtol=0, atol=1e-4)
    kept = {name: value.clone() for name, value in gen.named_parameters()}
    for refused in (
        lambda: gen.save_pretrained(tmp_path / "packed"), gen.train, gen.state_dict, lambda: gen.to("meta"),
        lambda: gen.to(torch.bfloat16), gen.half, lambda: gen.cast(torch.bfloat16), lambda: pickle.dumps(gen),
    ):  # fmt: skip
        with pytest.raises(mt.MediatokError, match="load the model again"):
            refused()
    # It refuses as a whole: nothing is written, converted or moved, and no dropout is on.
    assert not any(tmp_path.iterdir())
    assert not any(module.training for module in gen.modules())
    assert all(torch.equal(value, kept[name]) for name, value in gen.named_parameters())
    assert torch.equal(gen.sample([0, 1], seed=3, steps=3).content, after)
    assert torch.equal(copy.deepcopy(gen).sample([0, 1], seed=3, steps=3).content, after)
    gen.to("cpu").float().eval()  # changes nothing
