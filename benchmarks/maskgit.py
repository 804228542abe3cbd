"""MaskGIT over TiTok-L-32, 8 steps: `mediatok` in fp32 and bfloat16 against the plain formulation."""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import plain_maskgit
import torch
from measure import alternate, arguments, peak_mib, record, report_peaks, with_torchs_kernels
from mediatok.generators.maskgit import GumbelNoise

NAME = "maskgit-titok-l32"
WAYS = {  # dtype, and whether the weights are packed
    "plain": ("float32", False),
    "fp32": ("float32", False),
    "fp32, packed": ("float32", True),
    "bfloat16, packed": ("bfloat16", True),
}
BATCHES = (1, 4)


class FixedNoise(GumbelNoise):
    """The same uniform numbers as `plain_maskgit.generate` gets, at the places that are asked for."""

    def __init__(self, tokens: list[torch.Tensor], confidence: list[torch.Tensor]):
        self.uniform_tokens, self.uniform_confidence = tokens, confidence

    def tokens(self, step, masked_BK, counts, num_codes):
        uniform = self.uniform_tokens[step].gather(1, masked_BK[:, :, None].expand(-1, -1, num_codes))
        return plain_maskgit.gumbel(uniform)

    def confidence(self, step, masked_BK, counts):
        return plain_maskgit.gumbel(self.uniform_confidence[step].gather(1, masked_BK))


def build(way: str) -> torch.nn.Module:
    dtype, is_packed = WAYS[way]
    model = mt.create(NAME, seed=0, dtype=dtype)
    if is_packed:
        model.pack_network()
    return model


def calls(way: str, model: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    settings = model.settings()

    def ours(labels: torch.Tensor) -> torch.Tensor:
        return model.generate_ids(labels, settings, [torch.Generator().manual_seed(i) for i in range(len(labels))])

    plain = partial(with_torchs_kernels(plain_maskgit.generate), model, settings=settings)
    call = plain if way == "plain" else ours
    return {f"batch {size}": partial(call, torch.arange(size)) for size in BATCHES}


def equal_ids(plain_model: torch.nn.Module, model: torch.nn.Module) -> str:
    """How many ids the plain way and that of `model` share under the same noise, for 4 pictures."""
    generator, labels, settings = torch.Generator().manual_seed(0), torch.arange(4), model.settings()
    shape = (4, model.config.num_tokens)
    tokens = [torch.rand(*shape, model.config.codebook_size, generator=generator) for _ in range(settings.steps)]
    confidence = [torch.rand(shape, generator=generator) for _ in range(settings.steps)]
    numbers = iter([draw for pair in zip(tokens, confidence, strict=True) for draw in pair])
    plain_way = with_torchs_kernels(plain_maskgit.generate)
    plain = plain_way(plain_model, labels, settings, lambda *_: next(numbers))
    ours = model.generate_ids(labels, settings, [], noise=FixedNoise(tokens, confidence))
    return f"{int((plain == ours).sum())} of {ours.numel()} ids"


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(options.peak, build(options.peak)))
        return
    peaks = {way: peak_mib(way, options.threads) for way in WAYS}
    models = {way: build(way) for way in WAYS}
    lines = [
        "| operation | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with torch.inference_mode():
        agreement = {way: equal_ids(models["plain"], models[way]) for way in ("fp32", "fp32, packed")}
    of_way = {way: calls(way, model) for way, model in models.items()}
    for operation in of_way["plain"]:
        times = alternate({way: of_way[way][operation] for way in WAYS}, options.repeats)
        for way, taken in times.items():
            ratio, peak = {clock: times["plain"][clock] / taken[clock] for clock in taken}, peaks[way][operation]
            lines.append(
                f"| {operation} | {way} | {taken['wall']:.3f} | {taken['cpu']:.3f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) |"
            )
    equal = "; ".join(f"{way}: {count}" for way, count in agreement.items())
    lines += ["", f"Ids that equal those of the plain way under the same noise: {equal}."]
    record("maskgit", lines, options)


if __name__ == "__main__":
    main()
