"""What the studio does with pictures: encode and decode within a budget, change a token, see where a token acts.

Everything here is plain Python on the public API; the tabs only turn controls into these calls and results into pages.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from .. import Tokens, codec_curve, rate_curve, read_image
from ..core.errors import InvalidInput
from ..core.images import psnr, to_pixels
from ..evaluation.rate import RatePoint, default_lengths, reference_image
from .studio_worker import Job, device_name

BUDGETS = {"tokens": "num_tokens", "quality": "target_psnr", "bytes": "max_bytes"}  # what is fixed -> option of encode
NUM_ALTERNATIVES = 4  # other codes that are tried in a token's place to see where it acts
HEAT_GAMMA = 0.7  # lifts small differences in the heat map


@dataclass(frozen=True)
class Budget:
    """What the user fixes: "tokens" (count), "quality" (dB) or "bytes" (of the .mtok file)."""

    kind: str = "tokens"
    amount: float = 0

    def options(self, tokenizer) -> dict:
        """Keyword arguments of `encode`. A fixed-length tokenizer has its own count, whatever was asked."""
        if self.kind not in BUDGETS:
            raise InvalidInput(f"budget must be one of {', '.join(BUDGETS)}, not {self.kind!r}")
        if tokenizer.is_continuous or (self.kind == "tokens" and not tokenizer.is_variable_length):
            return {}
        if self.amount is None or not np.isfinite(self.amount) or self.amount <= 0:
            raise InvalidInput(f"Give a {self.kind} budget above zero, not {self.amount}.")
        if self.kind == "tokens":
            return {"num_tokens": tokenizer.longest_within(int(self.amount))}
        return {BUDGETS[self.kind]: float(self.amount) if self.kind == "quality" else int(self.amount)}


@dataclass(frozen=True)
class Result:
    """One picture, its tokens and its reconstruction.

    source: what `mt.load` takes. reference: the picture as the tokenizer saw it, None if only a .mtok was given.
    tokens: None for continuous tokenizers. psnr: dB, None without a reference. seconds: encode plus decode.
    edits: position -> code that the user put there; `unedited` are the tokens before.
    """

    source: str
    model_name: str
    picture_name: str
    reference: Image.Image | None
    image: Image.Image
    tokens: Tokens | None
    psnr: float | None
    seconds: float
    device: str
    options: dict
    max_tokens: int
    is_variable_length: bool
    caption: str | None = None
    edits: dict[int, int] = field(default_factory=dict)
    unedited: Tokens | None = None

    @property
    def bits_per_pixel(self) -> float | None:
        if self.tokens is None:
            return None
        return 8 * self.tokens.num_bytes / (self.image.width * self.image.height)

    @property
    def num_tiles(self) -> int:
        frame = None if self.tokens is None else self.tokens.frames[0]
        return 1 if frame is None else frame.num_tiles

    @property
    def tokens_per_tile(self) -> int:
        return 0 if self.tokens is None else int(self.tokens.lengths[0]) // self.num_tiles

    def ids(self) -> list[int]:
        """The code of each position; empty for continuous tokenizers."""
        return [] if self.tokens is None else self.tokens.ids[0, : int(self.tokens.lengths[0])].tolist()


def encode_picture(
    tokenizer, source: str, picture, picture_name: str, budget: Budget, job: Job,
    *, tile: bool = False, caption: str | None = None,
) -> Result:  # fmt: skip
    """Encode and decode one picture (anything `read_image` takes) within a budget. Hold the device around it."""
    options = budget.options(tokenizer)
    if tile and not tokenizer.is_continuous:
        options["tile"] = True
    text = text_option(tokenizer, caption)
    reference = reference_image(tokenizer, picture, tile=options.get("tile", False))
    job.check()
    started = time.perf_counter()
    if tokenizer.is_continuous:
        tokens = None
        image = tokenizer.reconstruct(reference, on_step=job.on_step, **text)
    else:
        tokens = tokenizer.encode(reference, on_step=job.on_step, **options)
        image = tokenizer.decode(tokens, on_step=job.on_step, **text)
    return Result(
        source, tokenizer.name, picture_name, reference, image, tokens, picture_psnr(image, reference),
        time.perf_counter() - started, device_name(str(tokenizer.device)), options, tokenizer.max_tokens,
        tokenizer.is_variable_length, text.get("text"), unedited=tokens,
    )  # fmt: skip


def decode_tokens(tokenizer, source: str, tokens: Tokens, name: str, job: Job, *, caption: str | None = None) -> Result:
    """Decode tokens whose picture is not known (a .mtok file)."""
    tokens = tokens[0] if tokens.is_batch else tokens
    text = text_option(tokenizer, caption)
    started = time.perf_counter()
    image = tokenizer.decode(tokens, on_step=job.on_step, **text)
    return Result(
        source, tokenizer.name, name, None, image, tokens, None, time.perf_counter() - started,
        device_name(str(tokenizer.device)), {}, tokenizer.max_tokens, tokenizer.is_variable_length, text.get("text"),
        unedited=tokens,
    )  # fmt: skip


def change_token(tokenizer, result: Result, position: int, code: int, job: Job) -> Result:
    """Put another code at a position and decode again."""
    check_position(result, position)
    if not 0 <= code < result.tokens.vocab_size:
        raise InvalidInput(
            f"code {code} is out of range; {result.model_name} has codes 0 to {result.tokens.vocab_size - 1}"
        )
    edits = {**result.edits, position: code}
    if int(result.unedited.ids[0, position]) == code:
        del edits[position]
    return with_edits(tokenizer, result, edits, job)


def with_edits(tokenizer, result: Result, edits: dict[int, int], job: Job) -> Result:
    """The result with exactly these changed tokens; no edits give the encoder's own tokens back."""
    ids = result.unedited.ids.clone()
    for position, code in edits.items():
        ids[0, position] = code
    tokens = replace(result.unedited, ids=ids)
    started = time.perf_counter()
    image = tokenizer.decode(tokens, on_step=job.on_step, **text_option(tokenizer, result.caption))
    seconds = time.perf_counter() - started
    return replace(
        result, tokens=tokens, image=image, edits=edits, seconds=seconds, psnr=picture_psnr(image, result.reference)
    )


def token_effect(tokenizer, result: Result, position: int, job: Job) -> Image.Image:
    """Where a token acts: the picture in grey, and over it how much each pixel changes without this token.

    There is no "empty" code, so the token is replaced by each of a few other codes, spread over the codebook, and the
    change is the mean absolute difference over these, the brightest change being white-hot.
    """
    check_position(result, position)
    vocab_size, code = result.tokens.vocab_size, int(result.tokens.ids[0, position])
    shown = to_pixels(result.image)
    change_HW = torch.zeros(shown.shape[1:])
    for k in range(1, NUM_ALTERNATIVES + 1):
        ids = result.tokens.ids.clone()
        ids[0, position] = (code + k * vocab_size // (NUM_ALTERNATIVES + 1)) % vocab_size
        other = tokenizer.decode(
            replace(result.tokens, ids=ids), on_step=job.on_step, **text_option(tokenizer, result.caption)
        )
        change_HW += (to_pixels(other) - shown).abs().mean(0)
        job.check()
    return heat_map(shown, change_HW)


def heat_map(pixels_3HW: torch.Tensor, change_HW: torch.Tensor) -> Image.Image:
    """Grey picture, dimmed, under a black-red-yellow-white map of `change_HW` (any scale)."""
    heat = (change_HW / change_HW.max().clamp(min=1e-6)).pow(HEAT_GAMMA)
    ramp = torch.stack([(3 * heat).clamp(0, 1), (3 * heat - 1).clamp(0, 1), (3 * heat - 2).clamp(0, 1)])
    grey = pixels_3HW.mean(0, keepdim=True) * 0.45
    mixed = grey * (1 - heat) + ramp * heat
    return Image.fromarray((mixed.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())


def measure_curves(
    tokenizer, reference: Image.Image, job: Job, *, tile: bool, hold, caption: str | None = None
) -> dict[str, list[RatePoint]]:
    """Rate-distortion curves of a picture: this tokenizer, JPEG and WebP. `hold(job)` takes the device."""
    curves = {}
    if not tokenizer.is_continuous and not tokenizer.accepts_text:
        with hold(job):
            if tile:  # one length at a time, so that Stop acts between them
                curves[tokenizer.name] = []
                for length in default_lengths(tokenizer)[-3:]:
                    job.check()
                    curves[tokenizer.name] += rate_curve(tokenizer, reference, [length], tile=True)
            else:
                curves[tokenizer.name] = rate_curve(tokenizer, reference, on_step=job.on_step)
    for label, codec in (("JPEG", "jpeg"), ("WebP", "webp")):
        job.check()
        curves[label] = codec_curve(reference, codec)
    return curves


def check_position(result: Result, position: int) -> None:
    """Refuse a position that the result's tokens do not have."""
    if result.tokens is None:
        raise InvalidInput(f"{result.model_name} has continuous latents: there is no token to choose.")
    if not 0 <= position < int(result.tokens.lengths[0]):
        raise InvalidInput(f"there is no token {position + 1}; this picture has {int(result.tokens.lengths[0])}")


def text_option(tokenizer, caption: str | None) -> dict:
    """The caption for decoders that read one; an empty one becomes a neutral caption."""
    return {"text": (caption or "").strip() or "A photo."} if tokenizer.accepts_text else {}


def picture_psnr(image: Image.Image, reference: Image.Image | None) -> float | None:
    """PSNR in dB on 8-bit pixels, or None without a reference."""
    return None if reference is None else psnr(to_pixels(image), to_pixels(reference))


def open_picture(path) -> Image.Image:
    """Read a picture through the library's limits."""
    return read_image(path)
