"""What is made noisy stays aligned, has the loudness asked for, and is the same for the same draw."""

import itertools

import numpy as np
import pytest
import torch
from mediatok.training.noise import KINDS, NoiseRecipe, add_noise, corrupt, make_noise, room_response

RATE = 16000


def speech(seconds=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    loudness = torch.rand(round(seconds * 10), generator=rng).repeat_interleave(RATE // 10)
    return 0.3 * loudness * torch.sin(torch.arange(len(loudness)) * 0.12)


OTHERS = [speech(1.3, seed) for seed in range(1, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1000, 40_001])
def test_noise_of_every_kind(kind, length):
    noise_T = make_noise(kind, length, np.random.default_rng(0), RATE, OTHERS, OTHERS)
    assert noise_T.shape == (length,)
    assert noise_T.dtype == torch.float32
    assert float(noise_T.square().mean()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("kind", "decibels"), [("white", 0), ("pink", -3), ("brown", -6)])
def test_colours_fall_by_octave(kind, decibels):
    spectrum = torch.fft.rfft(make_noise(kind, 2**18, np.random.default_rng(0), RATE)).abs().square()
    bands = [spectrum[2**k : 2 ** (k + 1)].mean().log10() * 10 for k in range(11, 17)]
    slopes = [float(b - a) for a, b in itertools.pairwise(bands)]
    assert slopes == pytest.approx([decibels] * 5, abs=0.5)


@pytest.mark.parametrize("snr", [-5, 0, 20])
def test_the_ratio_is_the_one_asked_for(snr):
    clean_T = speech()
    added_T = add_noise(clean_T, make_noise("white", len(clean_T), np.random.default_rng(0)), snr) - clean_T
    measured = 10 * torch.log10(clean_T.square().mean() / added_T.square().mean())
    assert float(measured) == pytest.approx(snr, abs=0.01)
    assert torch.equal(add_noise(torch.zeros(100), torch.ones(100), snr), torch.zeros(100))


@pytest.mark.parametrize("rt60", [0.1, 0.5])
def test_rooms_fall_by_60_decibels(rt60):
    response = room_response(rt60, 6.0, np.random.default_rng(0), RATE).double()
    tail = response[1:].square()
    assert 10 * torch.log10(1 / tail.sum()) == pytest.approx(6.0, abs=0.01)
    first, last = tail[: len(tail) // 10].mean(), tail[-len(tail) // 10 :].mean()
    assert 10 * torch.log10(last / first) == pytest.approx(
        -54, abs=3
    )  # between the middles of the first and last tenth


def test_a_sample_is_a_function_of_its_draw():
    recipe = NoiseRecipe(reverb=1.0, second_noise=1.0, clip=1.0)
    noisy = [corrupt(speech(), recipe, np.random.default_rng([3, seed]), RATE, OTHERS) for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert noisy[0].shape == speech().shape
    assert float(noisy[0].abs().max()) <= 1


def test_reverberation_keeps_the_sound_in_its_place():
    click_T = torch.zeros(RATE)
    click_T[4000] = 0.5
    recipe = NoiseRecipe(reverb=1.0, direct=(10, 10), snr=(60, 60), second_noise=0, clip=0)
    assert int(corrupt(click_T, recipe, np.random.default_rng(0), RATE).abs().argmax()) == 4000


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kinds": ["white", "purple"]}, "purple"),
        ({"kinds": []}, "none"),
        ({"kinds": ["recorded"]}, "folder"),
        ({"snr": [20, -5]}, "lowest, highest"),
        ({"rt60": [0.1, 30]}, "less than or equal to 3"),
    ],
)
def test_bad_recipes(values, words):
    with pytest.raises(ValueError, match=words):
        NoiseRecipe(**values)


def test_silence_stays_silent():
    recipe = NoiseRecipe(reverb=1.0, clip=1.0)
    assert not corrupt(torch.zeros(8000), recipe, np.random.default_rng(0)).any()
