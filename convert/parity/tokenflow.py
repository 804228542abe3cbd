"""Replay of TokenFlow's tokenizer: whole, its quantizer alone, and the preprocessing of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ...core.images import crop_square, to_pil
from ...nn.shared_mapping_vq import SharedMappingQuantizer
from ...tokenizers.image.tokenflow import TokenFlow
from ...training.code_window import CodeWindow
from .. import tokenflow
from ..tokenflow_keys import our_name
from .replay import EXACT, LOSS, PIXEL, Replay, Tolerance

MAP = Tolerance(atol=2e-5, rtol=1e-5)
PICTURE = Tolerance(atol=1e-4)
GRADIENT = Tolerance(atol=1e-5, rtol=1e-3)
SUMS_OF_DISTANCES = Tolerance(rtol=1e-5)  # over all codes
QUANTIZER_LOSS = Tolerance(atol=1e-6, rtol=1e-5)


def replay_tokenizer(replay: Replay) -> None:
    """Kind tokenizer: encode and decode with inner outputs, any number of scales, and training passes."""
    model = tokenflow.from_official(replay.case.config, replay.case.weights())
    pixels_B3HW = replay.input("image_u8").float() / 255
    with torch.no_grad(), rows_of(model.quantize) as rows, taps_of(model) as taps:
        h_BCGG = model.encode_map(pixels_B3HW)
        ids_BS, sum_BCGG = model.quantize.encode(h_BCGG)
        decoded_B3HW = model.decode_map(sum_BCGG)
        semantic_BPT = model.decode_semantic(sum_BCGG)
    for side, residual in zip(model.config.sides, rows, strict=True):
        replay.check(f"encode.scale{side}.residual", residual, MAP)
    names = {
        "encode.semantic_feature": taps["encoder_vqkd"], "encode.semantic_code_input": taps["encode_task_layer"],
        "encode.pixel_feature": taps["encoder"], "encode.pixel_code_input": taps["quant_conv"],
        "encode.quantized": sum_BCGG, "decode.post_quant": taps["post_quant_conv"],
        "decode.semantic_decoder_out": taps["decoder_vqkd"], "decode.semantic": semantic_BPT,
    }  # fmt: skip
    replay.check_all(names, MAP)
    replay.check("encode.pixel_encoder_input", taps["encoder.input"], MAP)
    replay.check("decode.pixel_decoder_out", taps["decoder"], PICTURE)
    replay.check("decode.image", 2 * decoded_B3HW - 1, PICTURE)
    replay.check("encode.indices", model.encode_pixels(pixels_B3HW))
    recorded_BS = replay.case.io.get("encode.indices", ids_BS)
    with torch.no_grad():
        replay.check("encode.quantized", model.quantize.sum_of(recorded_BS), MAP, "of the ids")
        replay.check("understanding_tokens", model.encode_features(pixels_B3HW), MAP)
        for match in replay.matches(r"decode_code\.(?:first(\d+)|all)\.image"):
            length = model.lengths[int(match[1] or len(model.lengths)) - 1]
            replay.check(match[0], 2 * model.decode_ids(recorded_BS[:, :length]) - 1, PICTURE)
            lengths_B = torch.full((len(recorded_BS),), length)
            masked = 2 * model.decode_ids(recorded_BS, lengths_B) - 1
            replay.check(match[0], masked, PICTURE, "of masked ids")
    if any(replay.matches(r"train\..+")):
        _replay_training(replay, model, pixels_B3HW)


def _replay_training(replay: Replay, model: TokenFlow, pixels_B3HW: Tensor) -> None:
    for name, left_out in replay.case.setting("train", "drops").items():
        model.zero_grad()
        window = CodeWindow(model.vocab_size)
        with rows_of(model.quantize) as rows:
            sum_BCGG, vq = model.quantize(model.encode_map(pixels_B3HW), left_out)
        image_B3HW, semantic_BPT = 2 * model.decode_map(sum_BCGG) - 1, model.decode_semantic(sum_BCGG)
        total = vq.quantizer_loss + image_B3HW.square().mean() + semantic_BPT.square().mean()
        total.backward()
        sides = [side for number, side in enumerate(model.config.sides) if number != left_out]
        usage = []
        for ids_Bk in vq.ids_BL.split([side**2 for side in sides], dim=1):
            window.update(ids_Bk)
            usage.append(window.share())
        distances = torch.tensor([distance_sums(model.quantize, small) for small in rows]).mean(dim=0)
        replay.check(f"train.{name}.indices", vq.ids_BL)
        replay.check(f"train.{name}.quantized", sum_BCGG, MAP)
        replay.check_all(loss_values(vq, total, f"train.{name}."), QUANTIZER_LOSS)
        replay.check(f"train.{name}.codebook_usage", sum(usage) / len(usage), LOSS)
        replay.check_all(distance_values(distances, f"train.{name}."), SUMS_OF_DISTANCES)
        for match in replay.matches(rf"train\.{name}\.grad\.(.+)"):
            replay.check(match[0], gradient_of(model, match[1]), GRADIENT)


def replay_scales(replay: Replay) -> None:
    """Kind msvq: the residual quantizer alone, on one schedule after the other."""
    weights = replay.case.weights()
    for name, settings in replay.case.setting("sets").items():
        prefix = f"{name}.quantize."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        quantizer = tokenflow.quantizer_from_official({}, own, tuple(settings["scales"]))
        ids_BS, sum_BCGG = quantizer.encode(replay.input(f"{name}.h"))
        replay.check(f"{name}.indices", ids_BS.int())
        replay.check(f"{name}.quantized", sum_BCGG, MAP)
        with torch.no_grad():
            replay.check(f"{name}.quantized", quantizer.sum_of(ids_BS), MAP, "of the ids")


def replay_quantizer(replay: Replay) -> None:
    """Kind quantizer: one search, with its losses, gradients and use of codes."""
    z_BCHW = replay.input("z")
    for mode in ("eval", "train"):
        quantizer = tokenflow.from_official(replay.case.config, replay.case.weights())
        leaf = z_BCHW.clone().requires_grad_()
        rows_NC = rearrange(leaf, "b c h w -> (b h w) c")
        codebook_KC = quantizer.codebook()
        codes_NC, ids_N, losses = quantizer.quantize_rows(rows_NC, codebook_KC)
        z_q = rearrange(codes_NC, "(b h w) c -> b c h w", b=len(z_BCHW), h=z_BCHW.shape[2])
        replay.check(f"{mode}.z_q", z_q, MAP)
        replay.check(f"{mode}.indices", ids_N)
        replay.check_all(distance_values(torch.tensor(distance_sums(quantizer, z_BCHW)), f"{mode}."), SUMS_OF_DISTANCES)
        if mode == "eval":
            entry = F.embedding(ids_N, codebook_KC).view(len(z_BCHW), *z_BCHW.shape[2:], -1)
            replay.check("entry.bchw", rearrange(entry, "b h w c -> b c h w"), MAP)
            continue
        for name, loss in zip(("vq_loss", "commit_loss", "entropy_loss"), losses, strict=True):
            replay.check(f"train.{name}", loss, QUANTIZER_LOSS)
        ((z_q * replay.input("probe")).sum() + losses.sum()).backward()
        replay.check("train.grad.z", leaf.grad, GRADIENT)
        for match in replay.matches(r"train\.grad\.(embedding.+)"):
            replay.check(match[0], gradient_of(quantizer, match[1]), GRADIENT)
        window = CodeWindow(len(codebook_KC))
        window.update(ids_N)
        replay.check("train.codebook_usage", window.share(), LOSS)
        if replay.has("train.codebook_used_tail"):
            tail = len(replay.case.io["train.codebook_used_tail"])
            replay.check("train.codebook_used_tail", window.ids[-tail:].float(), EXACT)


def replay_preprocess(replay: Replay) -> None:
    """Kind preprocess: centre and drawn crops of pictures, and pixels as bytes."""
    size = int(replay.case.setting("target"))
    for match in replay.matches(r"(im\d+)\.input_hwc"):
        image = Image.fromarray(replay.input(match[0]).numpy())
        replay.check(f"{match[1]}.center", pixels_of(crop_square(image, size)))
        if replay.has(f"{match[1]}.draws"):
            short_side, top, left = replay.input(f"{match[1]}.draws").tolist()
            replay.check(f"{match[1]}.random", pixels_of(crop_square(image, size, short_side, (top, left))))
    if replay.has("to_uint8.input"):
        values = (replay.input("to_uint8.input") + 1) / 2
        replay.check("to_uint8.output", pixels_of(to_pil(values.expand(3, 1, -1)))[0, :, 0], PIXEL)


# Looking inside.


@contextmanager
def rows_of(quantizer: SharedMappingQuantizer) -> Iterator[list[Tensor]]:
    """Collects, while it is open, the small maps [B, C, k, k] that codes are searched for."""
    maps: list[Tensor] = []
    reduced = quantizer.reduced

    def keep(x_BCGG: Tensor, side: int) -> Tensor:
        maps.append(reduced(x_BCGG, side))
        return maps[-1]

    quantizer.reduced = keep
    try:
        yield maps
    finally:
        del quantizer.reduced


@contextmanager
def taps_of(model: TokenFlow) -> Iterator[dict[str, Tensor]]:
    """Collects, while it is open, what the parts give, and what the pixel encoder reads."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[f"{name}.input"], outputs[name] = args[0], output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_children()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def gradient_of(model: nn.Module, key: str) -> Tensor:
    """The gradient of the parameter that the official `key` names."""
    return model.get_parameter(our_name(key)).grad


@torch.no_grad()
def distance_sums(quantizer: SharedMappingQuantizer, z_BCHW: Tensor) -> tuple[float, float]:
    """Means over all rows of the sum over all codes of the squared distance squared, semantic and pixel part."""
    rows_NC, codebook_KC = (
        quantizer.normalized(rearrange(z_BCHW.detach(), "b c h w -> (b h w) c")),
        quantizer.codebook(),
    )
    distances_2NK = (
        (rows[:, None] - codes).square().sum(dim=-1)
        for rows, codes in zip(rows_NC.split(quantizer.widths, 1), codebook_KC.split(quantizer.widths, 1), strict=True)
    )
    return tuple(float(d_NK.square().sum(dim=1).mean()) for d_NK in distances_2NK)


def distance_values(sums_2: Tensor, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}vqkd_d_norm": sums_2[0], f"{prefix}vqgan_d_norm": sums_2[1]}


def loss_values(vq, total: Tensor, prefix: str) -> dict[str, Tensor]:
    names = {"vq_loss": vq.codebook_loss, "commit_loss": vq.commitment_loss, "entropy_loss": vq.entropy_loss}
    return {f"{prefix}{name}": value for name, value in names.items()} | {f"{prefix}total": total}


def pixels_of(image: Image.Image) -> Tensor:
    """Bytes [H, W, 3] of a picture."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
