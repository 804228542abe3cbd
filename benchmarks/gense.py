"""GenSE at its published size: `mediatok` in fp32 and bfloat16 against the plain formulation, which keeps no cache.

For 1 s of audio the plain way runs whole. For 10 s it would take hours, so a few of its steps are timed, from the first
to the last, and the time of all is their integral; the same is done for 1 s, to compare with the whole run.
Each way runs `--repeats` times; the smallest time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
from measure import arguments, record, with_torchs_kernels
from mediatok.generators.gense import ExponentialNoise, GenSE
from mediatok.tokenizers.speech.semantic import SemanticTokenizer
from plain_gense import PlainGenSE, network_logits
from plain_simcodec import PlainSimCodec

CODEC, SEMANTIC, ALL_LAYERS, LAYER = "simcodec-100hz", "semantic-wavlm-large", 24, 6
SECONDS = (1, 10)
WAYS = {  # dtype, and whether the weights are packed
    "fp32": ("float32", False),
    "fp32, packed": ("float32", True),
    "bfloat16, packed": ("bfloat16", True),
}
POINTS = 5  # steps of the plain way that are timed for an extrapolation
STAGES = ("semantic tokens and codec", "N2S", "S2S", "sound")

Times = dict[str, float]  # wall and processor seconds


def clocked(call: Callable[[], object]) -> tuple[Times, object]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def best(call: Callable[[], object], repeats: int) -> tuple[Times, object]:
    runs = [clocked(call) for _ in range(repeats)]
    return {clock: min(times[clock] for times, _ in runs) for clock in ("wall", "cpu")}, runs[-1][1]


def build(dtype: str, is_packed: bool) -> GenSE:
    """GenSE with its tokenizers, all of random weights."""
    model = mt.create("gense", seed=0, dtype=dtype)
    model.use_tokenizers(mt.create(SEMANTIC, seed=1, dtype=dtype), mt.create(CODEC, seed=2, dtype=dtype))
    if is_packed:
        model.pack_network()
    return model


def build_plain(model: GenSE) -> PlainGenSE:
    """The plain way with the weights of `model`; the encoder's further layers are random."""
    own = model.semantic_tokenizer
    config = {key: value for key, value in own.config.items() if not key.startswith("_")}
    torch.manual_seed(3)
    encoder = SemanticTokenizer(**config | {"layer": ALL_LAYERS}).eval()
    encoder.load_state_dict(own.state_dict(), strict=False)
    codec = PlainSimCodec(model.codec.config).copy_from(model.codec).eval()
    return PlainGenSE(model, encoder, LAYER, codec)


def noise() -> ExponentialNoise:
    return ExponentialNoise([torch.Generator().manual_seed(0)])


def stages(model: GenSE, wave: torch.Tensor, repeats: int) -> tuple[dict[str, Times], torch.Tensor]:
    """Seconds of each stage, and the acoustic tokens; N2S ends with its last token."""
    semantic, codec, settings = model.semantic_tokenizer, model.codec, model.settings()
    times = {}
    times[STAGES[0]], tokens = best(lambda: (semantic.encode_waveform(wave), codec.encode_waveform(wave)), repeats)
    borders: list[tuple[float, float]] = []

    def note(step: int) -> None:
        if step == tokens[0].shape[1]:
            borders.append((time.perf_counter(), time.process_time()))

    def write() -> torch.Tensor:
        borders.append((time.perf_counter(), time.process_time()))
        return model.generate_ids(*tokens, settings, noise=noise(), on_step=note)[1]

    times["S2S"], written = best(write, repeats)
    clocks = ("wall", "cpu")
    pairs = list(zip(borders[::2], borders[1::2], strict=True))
    times["N2S"] = {clock: min(after[i] - before[i] for before, after in pairs) for i, clock in enumerate(clocks)}
    times["S2S"] = {clock: times["S2S"][clock] - times["N2S"][clock] for clock in clocks}
    times["sound"], _ = best(lambda: codec.decode_ids(written), repeats)
    return {stage: times[stage] for stage in STAGES}, written


def plain_stages(plain: PlainGenSE, wave: torch.Tensor, whole: bool) -> tuple[dict[str, Times], torch.Tensor | None]:
    """As `stages`; with `whole` every step is run, without it the language models' times are extrapolated."""
    times: dict[str, Times] = {}
    times[STAGES[0]], (semantic, acoustic) = clocked(lambda: plain.tokens(wave))
    written = None
    if whole:
        draws = noise()
        times["N2S"], clean = clocked(lambda: plain.n2s(semantic, draws))
        times["S2S"], written = clocked(lambda: plain.s2s(semantic, clean, acoustic, draws))
    else:
        t, a = semantic.shape[1], acoustic.shape[1]
        times["N2S"] = extrapolated(plain.model.n2s, t + 1, t)
        times["S2S"] = extrapolated(plain.model.s2s, 2 * t + 1 + a, a)
    times["sound"], _ = clocked(lambda: plain.codec.decode_ids(acoustic))
    return {stage: times[stage] for stage in STAGES}, written


def extrapolated(lm: torch.nn.Module, length: int, steps: int) -> Times:
    """Seconds of `steps` steps, the first of which reads `length` tokens, by the trapezoidal rule over a few."""
    at = torch.linspace(0, steps - 1, POINTS).round().long()
    measured = []
    for step in at.tolist():
        ids = torch.zeros(1, length + step, dtype=torch.long)
        measured.append(clocked(partial(network_logits, lm, ids, torch.zeros(length + step, dtype=torch.long)))[0])
    mean = {clock: torch.trapezoid(torch.tensor([m[clock] for m in measured]), at.float()) for clock in ("wall", "cpu")}
    return {clock: float(integral) / (steps - 1) * steps for clock, integral in mean.items()}


def main() -> None:
    options = arguments(__doc__)
    waves = {seconds: 0.1 * torch.randn(1, 16000 * seconds) for seconds in SECONDS}
    rows: dict[tuple[int, str], dict[str, Times]] = {}
    tokens: dict[tuple[int, str], torch.Tensor] = {}
    with torch.inference_mode():
        for way, (dtype, is_packed) in WAYS.items():
            model = build(dtype, is_packed)
            stages(model, waves[SECONDS[0]][:, :3200], 1)  # a warm-up
            for seconds, wave in waves.items():
                rows[seconds, way], tokens[seconds, way] = stages(model, wave, options.repeats)
            if way == "fp32":
                plain = build_plain(model)
                run = with_torchs_kernels(plain_stages)
                rows[1, "plain"], tokens[1, "plain"] = run(plain, waves[1], whole=True)
                for seconds in SECONDS:
                    rows[seconds, "plain, extrapolated"], _ = run(plain, waves[seconds], whole=False)
                del plain
            del model
    lines = [
        f"Random weights; {CODEC}, so that 1 s is 50 semantic and 100 acoustic tokens. The plain way's language models "
        f"are timed whole for 1 s; where it says extrapolated, by {POINTS} of their steps.",
        "",
        "| audio | stage | way | wall s | cpu s | faster than plain: wall (cpu) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for seconds in SECONDS:
        base = rows.get((seconds, "plain")) or rows[seconds, "plain, extrapolated"]
        for stage in (*STAGES, "all"):
            for way in ("plain", "plain, extrapolated", *WAYS):
                if (seconds, way) not in rows:
                    continue
                taken, plain_taken = of_stage(rows[seconds, way], stage), of_stage(base, stage)
                ratio = {clock: plain_taken[clock] / taken[clock] for clock in taken}
                lines.append(
                    f"| {seconds} s | {stage} | {way} | {taken['wall']:.2f} | {taken['cpu']:.2f} "
                    f"| {ratio['wall']:.1f}x ({ratio['cpu']:.1f}x) |"
                )
    same = {way: float((tokens[1, way] == tokens[1, "plain"]).float().mean()) for way in WAYS}
    told = ", ".join(f"{way} {share:.0%}" for way, share in same.items())
    lines += ["", f"Acoustic tokens of 1 s that equal the plain way's, from the same noise: {told}."]
    record("gense", lines, options)


def of_stage(times: dict[str, Times], stage: str) -> Times:
    if stage != "all":
        return times[stage]
    return {clock: sum(taken[clock] for taken in times.values()) for clock in ("wall", "cpu")}


if __name__ == "__main__":
    main()
