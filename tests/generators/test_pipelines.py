"""The generators as diffusers pipelines: saved whole, loaded in three ways, reproducible, interruptible."""

import os
import subprocess
import sys

import mediatok as mt
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from mediatok.core import generator as base

KINDS = ("maskgit", "xar")


@pytest.fixture
def pipeline(make_small):
    """Function from a kind to its pipeline."""

    def make(kind: str):
        cls = {"maskgit": mt.MaskGITPipeline, "xar": mt.XARPipeline}[kind]
        pipe = cls.from_generator(make_small(kind))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=KINDS)
def pipe(request, pipeline):
    return pipeline(request.param)


def arrays(images):
    return [np.array(image).tolist() for image in images]


def test_same_pictures_as_the_generator(pipe):
    labels = ["food", 2, None]
    ours = pipe.generator.generate(labels, seed=[4, 9, 4], steps=3, guidance=2.0)
    theirs = pipe(labels, generator=seeded(4, 9, 4), num_inference_steps=3, guidance_scale=2.0)
    assert arrays(theirs.images) == arrays(ours)
    (images,) = pipe("food", generator=seeded(4)[0], num_inference_steps=3, guidance_scale=2.0, return_dict=False)
    assert arrays(images) == arrays(ours[:1])


def test_one_generator_for_several_pictures(pipe):
    def run(seed):
        return pipe([0, 1], num_images_per_prompt=2, generator=seeded(seed)[0], output_type="pt").images

    first = run(3)
    assert first.shape == (4, 3, 16, 16)
    assert torch.equal(run(3), first)
    assert not torch.equal(run(4), first)
    assert not torch.equal(first[0], first[1])


def test_output_types(pipe):
    pixels = pipe(1, generator=seeded(0), output_type="pt").images
    assert pixels.dtype == torch.float32
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    array = pipe(1, generator=seeded(0), output_type="np").images
    assert array.shape == (1, 16, 16, 3)
    assert np.array_equal(array[0].transpose(2, 0, 1), pixels[0].numpy())
    assert pipe(1, generator=seeded(0)).images[0].size == (16, 16)


def test_saved_and_loaded_whole(pipe, tmp_path):
    expected = arrays(pipe([0, 1], generator=seeded(1, 2)).images)
    pipe.save_pretrained(tmp_path / "saved")
    index = pipe.load_config(tmp_path / "saved")
    assert index["generator"] == ["mediatok", type(pipe.generator).__name__]
    for loader in (type(pipe), DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path / "saved")
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe)
        assert arrays(loaded([0, 1], generator=seeded(1, 2)).images) == expected
    loaded.to(torch.bfloat16)
    assert loaded.generator.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_loading_where_nothing_is_imported_yet(kind, pipeline, tmp_path):
    pipeline(kind).save_pretrained(tmp_path / "saved")
    code = (
        "from diffusers import DiffusionPipeline as P;"
        "pipe = P.from_pretrained('saved', custom_pipeline='pipeline', trust_remote_code=True);"
        "print(type(pipe).__module__, pipe(1).images[0].size)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == ["mediatok.generators.pipelines", "(16, 16)\n"]


def test_callback_sees_every_step_and_can_interrupt(pipe):
    seen = []

    def note(pipe, step, timestep, kwargs):
        seen.append((step, timestep, kwargs["content"]))
        return kwargs

    whole = pipe(1, generator=seeded(0), callback_on_step_end=note, output_type="pt").images
    steps = len(seen)
    assert [step for step, _, _ in seen] == list(range(steps))
    assert [timestep for _, timestep, _ in seen] == pytest.approx([1 - (i + 1) / steps for i in range(steps)])
    with torch.inference_mode():
        assert torch.equal(pipe.generator.decode_content(seen[-1][2]).clamp(0, 1), whole)
    first_content = next(step for step, _, content in seen if content is not None)
    seen.clear()

    def stop(pipe, step, timestep, kwargs):
        seen.append(step)
        pipe._interrupt = step == first_content
        return kwargs

    assert pipe(1, generator=seeded(0), callback_on_step_end=stop, output_type="pt").images.shape == whole.shape
    assert seen[-1] == first_content

    def fail(pipe, step, timestep, kwargs):
        raise mt.Cancelled("enough")

    with pytest.raises(mt.Cancelled):
        pipe(1, callback_on_step_end=fail)


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(1)
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_labels": "fod"}, "Did you mean 'food'"),
        ({"class_labels": 3}, "label 3 is out of range"),
        ({"num_inference_steps": 0}, "steps=0 must be a whole number"),
        ({"guidance_scale": float("nan")}, "guidance=nan must be"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt=True"),
        ({"num_images_per_prompt": 2.0}, "num_images_per_prompt=2.0"),
        ({"num_images_per_prompt": 10**9}, "from 1 to 4096 for 1 labels"),
        ({"num_images_per_prompt": 1000, "class_labels": [1] * 5}, "from 1 to 819 for 5 labels"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 pictures"),
        ({"generator": 5}, "torch.Generators, not int"),
        ({"generator": [None], "class_labels": [1]}, "torch.Generators, not NoneType"),
        ({"generator": [1, 2], "class_labels": [1, 2]}, "torch.Generators, not int"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function"),
        ({"speed": 5}, "no option 'speed'"),
    ],
)
def test_bad_input(pipeline, options, words):
    with pytest.raises(mt.InvalidInput, match=words):
        pipeline("maskgit")(**{"class_labels": 1} | options)


def test_memory(pipe, monkeypatch):
    per_image = pipe.generator.bytes_per_image(pipe.generator.settings())
    monkeypatch.setattr(base, "available_memory", lambda device: 2 * per_image)
    with pytest.raises(mt.LimitExceeded, match="make at most 2 pictures in one call"):
        pipe([0] * 3)
    with pytest.raises(mt.LimitExceeded, match="make at most 2 pictures in one call"):
        pipe(0, num_images_per_prompt=4)


def test_a_pipeline_from_another(pipe):
    twin = type(pipe).from_pipe(pipe)
    assert twin.components == pipe.components


def test_packed_weights_are_not_saved(pipe, tmp_path):
    pipe.generator.pack_network()
    with pytest.raises(mt.InvalidInput, match="load the model again"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_components_must_match(make_small):
    generator = make_small("maskgit")
    with pytest.raises(mt.TokenizerMismatch):
        mt.MaskGITPipeline(generator, mt.create("titok-tiny"))
    with pytest.raises(mt.TokenizerMismatch):
        mt.XARPipeline(make_small("xar"), generator.tokenizer)
