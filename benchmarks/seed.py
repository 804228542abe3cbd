"""SEED-2, one picture: `mediatok` in fp32 and with bfloat16 weights against the plain formulation in fp32.

Plain is what the papers' code does: attention by two products and a softmax, keys and values of each layer by products
of their own, one row of queries for each picture from the first layer on, and all distances to the codes at once.
Weights are random; the released sizes take 5 GB in fp32 and half of it in bfloat16.
"""

from collections.abc import Callable
from functools import partial

import mediatok as mt
import torch
from einops import rearrange
from measure import alternate, arguments, peak_mib, record, report_peaks, with_torchs_kernels
from torch import Tensor, nn

NAME = "seed-2"
DTYPES = {"plain": "float32", "fp32": "float32", "bfloat16": "bfloat16"}


class PlainSeed:
    """The formulas over the weights of a `Seed`."""

    def __init__(self, model: nn.Module):
        self.model = model
        for module in model.modules():  # torch's own layers
            if type(module).__name__ in ("Linear", "LayerNorm", "Conv2d"):
                module.__class__ = getattr(nn, type(module).__name__)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        model = self.model
        x_BTF = self.vision(model.normalized(pixels_B3HW))
        z_BQC = model.to_code(self.qformer(model.qformer, model.queries, x_BTF))
        codes_KC = model.quantize.embedding.weight
        distances = z_BQC.square().sum(-1, keepdim=True) + codes_KC.square().sum(1) - 2 * z_BQC @ codes_KC.T
        return distances.argmin(-1)

    def decode(self, ids_BQ: Tensor) -> Tensor:
        model = self.model
        x_BQD = model.from_code(model.quantize.embedding.weight[ids_BQ]) + model.image_blocks.positions
        for block in model.image_blocks.blocks:
            h_BQD, attn = block.ln_1(x_BQD), block.attn
            qkv = h_BQD @ attn.in_proj_weight.T + attn.in_proj_bias
            x_BQD = x_BQD + attn.out_proj(self.attention(*qkv.chunk(3, -1), attn.num_heads))
            x_BQD = x_BQD + block.mlp(block.ln_2(x_BQD))
        return model.to_embedding(x_BQD)

    def vision(self, x_B3HW: Tensor) -> Tensor:
        network = self.model.vision.network
        x_BTF = network.embeddings(x_B3HW)
        heads = self.model.config.vision_heads
        for layer in network.encoder.layers:
            q, k, v = layer.self_attn.qkv(layer.layer_norm1(x_BTF)).chunk(3, -1)
            x_BTF = x_BTF + layer.self_attn.projection(self.attention(q, k, v, heads))
            x_BTF = x_BTF + layer.mlp(layer.layer_norm2(x_BTF))
        return network.post_layernorm(x_BTF)

    def qformer(self, qformer: nn.Module, queries_QD: Tensor, features_BTF: Tensor) -> Tensor:
        batch, count, heads = len(features_BTF), len(queries_QD), qformer.num_heads
        mask = torch.full((count, count), -10000.0).triu(1)
        x_BQD = qformer.norm(queries_QD.expand(batch, -1, -1))
        weights = qformer.cross_kv.weight.chunk(2 * qformer.num_cross)
        biases = qformer.cross_kv.bias.chunk(2 * qformer.num_cross)
        cross = 0
        for layer in qformer.layers:
            q, k, v = (x_BQD @ w.T + b for w, b in self._parts(layer.attn.qkv))
            x_BQD = layer.attn.norm(x_BQD + layer.attn.proj(self.attention(q, k, v, heads, mask)))
            if layer.cross is not None:
                k, v = (features_BTF @ weights[cross + i].T + biases[cross + i] for i in range(2))
                y_BQD = self.attention(layer.cross.q(x_BQD), k, v, heads)
                x_BQD, cross = layer.cross.norm(x_BQD + layer.cross.proj(y_BQD)), cross + 2
            x_BQD = layer.mlp(x_BQD)
        return x_BQD

    @staticmethod
    def _parts(linear: nn.Linear) -> list[tuple[Tensor, Tensor]]:
        return list(zip(linear.weight.chunk(3), linear.bias.chunk(3), strict=True))

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
        q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
        shares = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)
        return rearrange(shares @ v, "b h l d -> b l (h d)")


def calls(way: str) -> dict[str, Callable[[], Tensor]]:
    """Of one way; all have the same random weights."""
    model = mt.create(NAME, seed=0, dtype=DTYPES[way])
    generator = torch.Generator().manual_seed(1)
    pixels, ids = torch.rand(1, 3, 224, 224, generator=generator), torch.randint(8192, (1, 32), generator=generator)
    if way != "plain":
        return {"encode": partial(model.encode_pixels, pixels), "decode": partial(model.decode_embedding, ids)}
    plain = PlainSeed(model)
    return {"encode": with_torchs_kernels(partial(plain.encode, pixels)), "decode": partial(plain.decode, ids)}


def main() -> None:
    options = arguments(__doc__)
    if options.peak:
        report_peaks(calls(options.peak))
        return
    peaks = {way: peak_mib(way, options.threads) for way in DTYPES}
    calls_of = {way: calls(way) for way in DTYPES}
    lines = [
        "| operation | way | wall s | cpu s | faster than plain: wall (cpu) | peak MiB (added) | equal to plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation in ("encode", "decode"):
        ways = {way: of_way[operation] for way, of_way in calls_of.items()}
        with torch.inference_mode():
            results = {way: call() for way, call in ways.items()}
        for way, taken in (times := alternate(ways, options.repeats)).items():
            peak = peaks[way][operation]
            ratio = {clock: times["plain"][clock] / taken[clock] for clock in taken}
            lines.append(
                f"| {operation} | {way} | {taken['wall']:.3f} | {taken['cpu']:.3f} "
                f"| {ratio['wall']:.2f}x ({ratio['cpu']:.2f}x) | {peak['peak']:.0f} ({peak['added']:.0f}) "
                f"| {agreement(results[way], results['plain'])} |"
            )
    record("seed", lines, options)


def agreement(result: Tensor, plain: Tensor) -> str:
    if not plain.is_floating_point():
        return f"{int((result == plain).sum())} of {plain.numel()} ids"
    return f"max error {(result - plain).abs().max():.1e}"


if __name__ == "__main__":
    main()
