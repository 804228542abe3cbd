"""A codec's run: exact resume with everything on, codebooks that stay in use, two stages, losses as written out."""

import copy
import json
import math
from pathlib import Path

import mediatok as mt
import pytest
import torch
import torch.nn.functional as F
from mediatok.core.audio import Waveform, write_audio
from mediatok.nn.grouped_vq import GroupedResidualVQ, spread_loss
from mediatok.tokenizers.speech.simcodec import SimCodec
from mediatok.training.checkpoint import load_checkpoint, whole_checkpoints
from mediatok.training.code_revival import CodeRevival, place_codes, residuals
from mediatok.training.codec import CodecTrainer
from mediatok.training.codec_recipe import CodecRecipe
from mediatok.training.export import export_run
from mediatok.training.recipe import check_recipe
from mediatok.training.speech_discriminators import SpeechDiscriminator
from mediatok.training.speech_losses import LogMel, discriminator_gan_loss, feature_loss, generator_gan_loss
from mediatok.training.tracker import read_log

SIZES = {
    "en_filters": 2, "de_filters": 2, "vq_dim": 8, "upsample_rates": [5, 4, 4, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
    "n_codes": 16,
}  # fmt: skip


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve clips of chirps: ten to train on, two to validate."""
    path = tmp_path_factory.mktemp("speech")
    names = [f"c{number:02d}" for number in range(12)]
    for number, name in enumerate(names):
        time_T = torch.arange(16000) / 16000
        wave_T = 0.4 * torch.sin(2 * math.pi * (200 + 60 * number) * time_T * (1 + time_T))
        write_audio(Waveform(wave_T, 16000), path / f"{name}.wav")
    (path / "splits.json").write_text(json.dumps({"train": names[:10], "val": names[10:], "test": []}))
    return path


@pytest.fixture
def values(folder, tmp_path):
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "model": {"config": SIZES, "continuous_steps": 3, "revive_codes": True},
        "data": {"train": str(folder), "seconds": 0.1, "min_gain": 0.5},
        "loss": {
            "mel_weights": {512: 15.0}, "stft_weights": {256: 1.0}, "discriminators": ["period", "scale"],
            "discriminator_width": 4, "discriminator_start": 6,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "muon": True},
        "run": {"steps": 10, "batch_size": 4, "log_every": 1, "validate_every": 5, "sample_every": 10,
                "checkpoint_every": 1, "num_samples": 2, "keep_checkpoints": 20},
    }  # fmt: skip


def run(values, output, stop_at=None):
    values = copy.deepcopy(values) | {"output": str(output)}
    trainer = CodecTrainer(check_recipe(values, CodecRecipe))
    save = trainer.save

    def save_and_stop():
        save()
        if trainer.step == stop_at:
            raise Interrupted

    trainer.save = save_and_stop
    if stop_at is None:
        trainer.run()
    else:
        with pytest.raises(Interrupted):
            trainer.run()
    return load_checkpoint(whole_checkpoints(Path(output) / "checkpoints")[-1])


@pytest.mark.parametrize("stop_at", [2, 3, 8])  # without quantization; just before the codes are placed; adversarial
def test_resumed_runs_end_bit_for_bit_alike(values, tmp_path, stop_at):
    tensors, state = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at)
    again, again_state = run(values, tmp_path / "parts")
    assert tensors.keys() == again.keys() >= {"model", "ema", "discriminator", "code_revival"}
    for part, named in tensors.items():
        for name, value in named.items():
            assert torch.equal(value, again[part][name]), f"{part}: {name}"
    assert state["discriminator_step"] == again_state["discriminator_step"] == 4
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert "quantizer_loss" not in log[2]
    assert all(math.isfinite(line[key]) for line in log for key in line)
    assert any("val_stoi" in line and "val_codebook_usage" in line for line in log)
    samples = sorted(file.name for file in (tmp_path / "whole" / "samples").iterdir())
    assert samples == ["original.wav", "step_00000010.wav"]
    model = mt.load(tmp_path / "whole" / "model")
    assert torch.equal(model.quantize.codebooks[0], tensors["ema"]["quantize.codebooks.0"])


def test_the_second_stage_begins_where_the_first_ended(values, folder, tmp_path):
    first = copy.deepcopy(values)
    first["model"]["config"] = SIZES | {"n_code_groups": 2, "n_codes": 8}
    run(first, tmp_path / "first")
    export_run(tmp_path / "first", tmp_path / "stage1")
    second = copy.deepcopy(values)
    second["model"] = {"init_from": str(tmp_path / "stage1"), "merge": [4, 4]}
    trainer = CodecTrainer(check_recipe(second, CodecRecipe))
    stage1, merged = mt.load(tmp_path / "stage1"), trainer.raw_model.eval()
    assert merged.config.n_codes == 16
    codes_KC = merged.quantize.codebooks[0].detach()
    halves = zip(stage1.quantize.layer(0), (codes_KC[::4, :4], codes_KC[:4, 4:]), strict=True)
    kept = [[(codes == row).all(1).nonzero().item() for row in half] for codes, half in halves]
    clip = mt.read_audio(folder / "c00.wav")
    pairs = stage1.encode(clip).ids.flatten(0, 1)
    counts = [torch.bincount(column, minlength=8) for column in pairs.unbind(1)]
    assert all(counts[group].sum() for group in range(2))
    ids_BLQ = torch.tensor([[[kept[0][a], kept[1][b]] for a in range(4) for b in range(4)]])
    with torch.no_grad():
        assert torch.allclose(stage1.decode_ids(ids_BLQ), merged.decode_ids(torch.arange(16)[None]), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"merge": [2, 2]}}, "init_from"),
        ({"model": {"like": "simcodec-51hz"}}, "simcodec-50hz"),
        ({"model": {"config": SIZES | {"n_code": 4}}}, "n_codes"),
        ({"data": {"train": "nowhere"}}, "not a folder"),
        ({"data": {"train": None, "seconds": 0.01}}, "more than"),
        ({"loss": {"discriminator_width": 6}}, "multiple of 4"),
        ({"loss": {"discriminators": ["eriod"]}}, "period"),
    ],
)
def test_bad_recipes(values, folder, change, words):
    values = copy.deepcopy(values)
    for section, settings in change.items():
        values[section] = settings | ({"train": str(folder)} if settings.get("train", "") is None else {})
    with pytest.raises(mt.MediatokError, match=words):
        CodecTrainer(check_recipe(values, CodecRecipe))


# Codebooks.


def test_k_means_places_the_codes_where_latents_are():
    rng = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(8, 6, generator=rng)
    points = centres[torch.randint(8, (400,), generator=rng)] + 0.01 * torch.randn(400, 6, generator=rng)
    quantize = GroupedResidualVQ(2, 1, 64, 6)
    place_codes(quantize, [points.T[None]], torch.Generator().manual_seed(1))
    assert float(torch.cdist(centres, quantize.codebooks[0].detach()).min(dim=1).values.max()) < 0.1
    left = points - quantize.lookup(quantize.nearest(points.T[None])[..., :1])[0].T
    assert float(left.detach().norm(dim=1).mean()) < 0.1
    both = points - quantize.lookup(quantize.nearest(points.T[None]))[0].T
    assert float(both.detach().norm(dim=1).mean()) < float(left.detach().norm(dim=1).mean())


def test_codes_that_nobody_calls_move_to_frames():
    torch.manual_seed(0)
    quantize = GroupedResidualVQ(1, 1, 32, 4).train()
    revival = CodeRevival(quantize)
    quantize.codebooks[0].data[:] = 100.0
    quantize.codebooks[0].data[0] = 0.0
    for _ in range(60):
        latents = torch.randn(2, 4, 20)
        ids = quantize(latents).ids_BLQ
        revival.step()
    assert len(ids.unique()) > 12
    quantize.eval()
    quantize(torch.randn(2, 4, 20))
    assert float(revival.step()) == 0  # what validation shows it is not training


def test_residuals_are_what_each_codebook_saw():
    torch.manual_seed(0)
    quantize = GroupedResidualVQ(2, 2, 8, 6)
    for codebook in quantize.codebooks:
        codebook.data.normal_()
    latent = torch.randn(1, 6, 10)
    ids_NQ = quantize.nearest(latent)[0]
    parts = residuals(quantize, latent[0].T, ids_NQ)
    assert [
        torch.cdist(part, codes).argmin(1).tolist() for part, codes in zip(parts, quantize.codebooks, strict=True)
    ] == [column.tolist() for column in ids_NQ.unbind(1)]


@pytest.mark.parametrize("num_codes", [10, 1500])
def test_spread_loss_in_pieces_is_the_whole(num_codes):
    codes = torch.randn(num_codes, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    plain = F.cross_entropy(3 * codes @ codes.T, torch.arange(num_codes))
    loss = spread_loss(codes)
    assert torch.allclose(loss, plain)
    ours, theirs = (torch.autograd.grad(value, codes)[0] for value in (loss, plain))
    assert torch.allclose(ours, theirs)


# Losses.


def test_log_mel_is_torchaudios():
    import torchaudio

    wave_BT = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    ours = LogMel(16000)(wave_BT)
    spectrum = torchaudio.transforms.MelSpectrogram(
        16000, 1024, hop_length=240, n_mels=80, power=1, norm="slaney", mel_scale="slaney", center=False
    )(F.pad(wave_BT[:, None], (392, 392), mode="reflect")[:, 0])
    assert torch.allclose(ours, spectrum.clamp(min=1e-5).log(), atol=1e-3)


def test_adversarial_losses_are_zero_for_perfect_players():
    real = [[torch.ones(1, 2, 3), torch.ones(1, 1, 4)]] * 3
    fake = [[torch.ones(1, 2, 3), torch.zeros(1, 1, 4)]] * 3
    assert float(discriminator_gan_loss(real, fake)[0]) == 0
    assert float(generator_gan_loss(real)) == 0
    assert float(generator_gan_loss(fake)) == 3
    assert float(feature_loss(real, fake)) == 3
    assert float(feature_loss(real, real)) == 0


@pytest.mark.parametrize("samples", [1280, 1601])
def test_discriminators_judge_any_length(samples):
    torch.manual_seed(0)
    maps = SpeechDiscriminator(4)(torch.randn(2, samples))
    assert len(maps) == 5 + 3 + 5
    assert all(torch.isfinite(value).all() and len(value) == 2 for found in maps for value in found)


def test_weight_norm_changes_nothing_but_training():
    torch.manual_seed(0)
    codec = SimCodec(**SIZES)
    wave = torch.randn(1, 1600)
    with torch.no_grad():
        before = codec(wave).decoded
        codec.set_weight_norm(True)
        assert any("original0" in name for name, _ in codec.named_parameters())
        assert torch.allclose(codec(wave).decoded, before, atol=1e-5)
        codec.set_weight_norm(False)
        assert torch.allclose(codec(wave).decoded, before, atol=1e-5)
    assert codec.state_dict().keys() == SimCodec(**SIZES).state_dict().keys()
