"""FlexTok d12-d12: encoding latents, one decoder pass and two guided steps, in fp32 and bfloat16 against the plain way.

The VAE is left out: both ways run the same one.
"""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
from measure import alternate, arguments, peak_mib, record, report_peaks, with_torchs_kernels
from plain_flextok import PlainFlexTok

NAME, KEPT = "flextok-d12-d12-in1k", (8, 32, 256)
WAYS = {"plain": "float32", "fp32": "float32", "bfloat16": "bfloat16"}


def build(way: str) -> torch.nn.Module:
    model = mt.create(NAME, seed=0, dtype=WAYS[way])
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # modulations and heads are zeros in a fresh model: nothing would be compared
        for name, parameter in model.named_parameters():
            if "modulation" in name or "head" in name:
                values = torch.randn(parameter.shape, generator=rng)
                parameter.copy_(values * 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1 * values)
    return model


def calls(way: str, model: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *model.vae.latent_shape, generator=rng)
    noise = torch.randn(1, *model.vae.latent_shape, generator=rng)
    ids = torch.randint(model.vocab_size, (1, model.max_tokens), generator=rng)
    plain = PlainFlexTok(model)
    one_pass = model.decoding_settings(steps=1, guidance=1.0)
    two_steps = model.decoding_settings(steps=2, guidance=7.5)

    def encode(kept: int) -> torch.Tensor:
        if way == "plain":
            return with_torchs_kernels(plain.encode)(latents, kept)
        return model.quantize(model.registers_of(latents, kept))[1]

    def decode(kept: int, settings) -> torch.Tensor:
        if way == "plain":
            return with_torchs_kernels(plain.flow)(ids[:, :kept], settings, noise)
        return model.decode_to_latents(ids[:, :kept], None, settings, noise)

    operations = {f"encode {kept}": partial(encode, kept) for kept in KEPT}
    operations |= {f"decoder pass, {kept}": partial(decode, kept, one_pass) for kept in KEPT}
    return operations | {f"two guided steps, {kept}": partial(decode, kept, two_steps) for kept in KEPT}


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(options.peak, build(options.peak)))
        return
    peaks = {way: peak_mib(way, options.threads) for way in WAYS}
    of_way = {way: calls(way, build(way)) for way in WAYS}
    lines = [
        "| operation, tokens | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation in of_way["plain"]:
        ways = {way: of_way[way][operation] for way in WAYS}
        with torch.inference_mode():
            results = {way: call() for way, call in ways.items()}
        times = alternate(ways, options.repeats)
        for way, taken in times.items():
            ratio, peak = {clock: times["plain"][clock] / taken[clock] for clock in taken}, peaks[way][operation]
            if results[way].is_floating_point():
                difference = f"{(results[way] - results['plain']).abs().max():.1e}"
            else:
                difference = f"{int((results[way] != results['plain']).sum())} of {results[way].numel()} ids"
            lines.append(
                f"| {operation} | {way} | {taken['wall']:.3f} | {taken['cpu']:.3f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) "
                f"| {difference} |"
            )
    record("flextok", lines, options)


if __name__ == "__main__":
    main()
