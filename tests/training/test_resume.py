"""A run that was interrupted, however rudely, ends exactly like one that was not; two processes equal one."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mediatok as mt
import pytest
import torch
import yaml
from mediatok.training import tokenizer
from mediatok.training.checkpoint import load_checkpoint, save_checkpoint, whole_checkpoints
from mediatok.training.discriminator import PatchDiscriminator
from mediatok.training.recipe import check_recipe
from mediatok.training.tokenizer import TokenizerTrainer
from mediatok.training.tracker import read_log


class Interrupted(Exception):
    pass


def run(values, output, stop_at=None):
    """Train to the end, or until the checkpoint of step `stop_at` is written; the last checkpoint's contents."""
    values = copy.deepcopy(values) | {"output": str(output)}
    trainer = TokenizerTrainer(check_recipe(values))
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


def assert_equal(one, other):
    tensors, state = one
    other_tensors, other_state = other
    assert tensors.keys() == other_tensors.keys()
    for file, values in tensors.items():
        assert values.keys() == other_tensors[file].keys()
        for name, value in values.items():
            assert torch.equal(value, other_tensors[file][name]), f"{file}: {name}"
    assert {k: v for k, v in state.items() if k != "recipe"} == {k: v for k, v in other_state.items() if k != "recipe"}


VARIANTS = {
    "vq": {},
    "adversarial": {"loss": {"perceptual": "none", "discriminator_weight": 0.1, "discriminator_start": 6}},
    "tail drop": {"model": {"class_name": "OneDPiece"}, "run": {"gradient_accumulation": 2}},
    "vae": {"model": {"config": {"quantizer": "vae", "clustering": False}}},
}


def merged(values, changes):
    values = copy.deepcopy(values)
    for key, change in changes.items():
        values[key] = merged(values.get(key, {}), change) if isinstance(change, dict) else change
    return values


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_and_ten_steps_equal_twenty(recipe_values, tmp_path, variant):
    values = merged(recipe_values, VARIANTS[variant])
    whole = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at=10)
    assert_equal(run(values, tmp_path / "parts"), whole)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    assert [line["step"] for line in logs[1]] == list(range(1, 21))
    for one, other in zip(*logs, strict=True):
        assert one["total_loss"] == other["total_loss"]


def test_a_kl_autoencoder_resumes_and_its_decoder_goes_on_alone(recipe_values, tmp_path):
    sizes = {"image_size": 16, "latent_channels": 2, "block_out_channels": [8, 8], "layers_per_block": 1}
    values = recipe_values | {"model": {"class_name": "KLAutoencoder", "config": sizes | {"norm_num_groups": 4}}}
    whole = run(values, tmp_path / "whole")
    run(values, tmp_path / "parts", stop_at=10)
    assert_equal(run(values, tmp_path / "parts"), whole)
    first = mt.load(tmp_path / "whole" / "model")
    assert first.config.scaling_factor != 0.2325  # measured at the end of the run
    values["model"] = {"class_name": "KLAutoencoder", "stage": "2", "init_from": str(tmp_path / "whole" / "model")}
    run(values, tmp_path / "decoder")
    second = mt.load(tmp_path / "decoder" / "model")
    assert second.fingerprint == first.fingerprint
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latents = first.encode_latents(pixels)
        assert torch.equal(second.encode_latents(pixels), latents)
        assert not torch.equal(second.decode_latents(latents), first.decode_latents(latents))


def test_everything_that_should_move_moves(recipe_values, tmp_path):
    """Otherwise equality above would prove little."""
    values = merged(recipe_values, VARIANTS["adversarial"])
    first = run(values, tmp_path / "run", stop_at=10)[0]
    last = run(values, tmp_path / "run")[0]
    moved = {
        ("model", "quantize.embedding.weight"),
        ("model", "quantize.embed_prob"),
        ("model", "latent_tokens"),
        ("ema", "encoder.patch_embed.weight"),
        ("optimizer", "encoder.patch_embed.weight/exp_avg_sq"),
        ("discriminator", "block_in.0.weight"),
        ("discriminator_optimizer", "block_in.0.weight/exp_avg"),
        ("discriminator_loss", "ema_real_logits_mean"),
    }
    for file, name in moved:
        assert not torch.equal(first[file][name], last[file][name]), f"{file}: {name}"


def test_workers_change_nothing(recipe_values, tmp_path):
    plain = run(recipe_values, tmp_path / "plain")
    values = merged(recipe_values, {"data": {"num_workers": 2}})
    run(values, tmp_path / "workers", stop_at=10)
    assert_equal(run(values, tmp_path / "workers"), plain)


def launch(recipe_file, *overrides, processes=1):
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["mediatok.training.tokenizer", str(recipe_file), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_runs_continue_exactly(recipe_values, tmp_path):
    values = merged(recipe_values, {"run": {"steps": 24, "checkpoint_every": 1, "keep_checkpoints": 2}})
    whole = run(merged(values, {"run": {"checkpoint_every": 24}}), tmp_path / "whole")
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(values))
    folder, rng, kills = tmp_path / "killed" / "checkpoints", random.Random(0), 0
    for attempt in range(20):
        process = launch(recipe_file, f"output={tmp_path / 'killed'}")
        if attempt < 2:  # let it write for a random while, then kill it, mostly in the middle of a write
            before = newest(folder)
            while newest(folder) <= before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            assert whole_checkpoints(folder), "a kill left no whole checkpoint"
            continue
        output, _ = process.communicate()
        assert process.returncode == 0, output
        break
    assert kills == 2
    assert_equal(load_checkpoint(whole_checkpoints(folder)[-1]), whole)


def newest(folder):
    return max((int(path.name.removeprefix("step_")) for path in whole_checkpoints(folder)), default=0)


def test_kill_within_a_checkpoint_write(tmp_path):
    """Every instant of a write: a child is killed after a growing delay while it saves again and again."""
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from mediatok.training.checkpoint import save_checkpoint\n"
        "print('ready', flush=True)\n"
        "for step in range(1, 10**6):\n"
        "    tensors = {'model': {'w': torch.full((2000,), float(step))}}\n"
        "    save_checkpoint(Path(sys.argv[1]), step, tensors, {'step': step}, 2)\n"
    )
    rng = random.Random(1)
    child = None
    for attempt in range(3):
        folder = tmp_path / f"attempt{attempt}"
        child = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        for _ in range(40):  # what is on the disk at any instant, not only at the kill, must be whole
            time.sleep(rng.uniform(0, 0.004))
            child.send_signal(signal.SIGSTOP)
            check_newest(folder)
            child.send_signal(signal.SIGCONT)
        child.kill()
        child.wait()
        child.stdout.close()
        check_newest(folder)
        save_checkpoint(folder, 10**7, {"model": {"w": torch.zeros(1)}}, {"step": 10**7}, 2)
        assert len(list(folder.iterdir())) <= 2, "leftovers of the kill are still there"


def check_newest(folder):
    found = whole_checkpoints(folder)
    if not found:  # the first save is not finished
        assert not list(folder.glob("step_*"))
        return
    tensors, state = load_checkpoint(found[-1])
    assert tensors["model"]["w"].eq(state["step"]).all()


def test_two_processes_equal_one_with_twice_the_batch(recipe_values, tmp_path, monkeypatch):
    """With the discriminator, LeCAM, tail drop, accumulation and dead-code revival at once."""
    monkeypatch.setattr(tokenizer, "PatchDiscriminator", PatchDiscriminator)  # the child processes have the real one
    values = merged(merged(recipe_values, VARIANTS["adversarial"]), VARIANTS["tail drop"])
    values = merged(values, {"run": {"steps": 10}, "loss": {"discriminator_start": 8}})
    run(merged(values, {"run": {"batch_size": 8}}), tmp_path / "one")
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(values))
    process = launch(recipe_file, f"output={tmp_path / 'two'}", processes=2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == list(range(1, 11))
    for line, other in zip(one, two, strict=True):
        for name in ("total_loss", "reconstruction_loss", "discriminator_loss", "lecam_loss"):
            if name in line:
                assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), f"step {line['step']}: {name}"


def test_log_line_cut_by_a_kill_is_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "x": 1.0}) + '\n{"step": 2, "x')
    assert read_log(log) == [{"step": 1, "x": 1.0}]
