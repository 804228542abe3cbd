"""What the studio does with pictures: encode and decode within a budget, change a token, see where a token acts.

Everything here is plain Python on the public API; the tabs only turn controls into these calls and results into pages.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from PIL import Image

from .. import Tokens, codec_curve, rate_curve, read_image
from ..core.errors import InvalidInput
from ..core.images import psnr, resized_to, to_pil, to_pixels
from ..core.tokens import ImageFrame
from ..evaluation.rate import RatePoint, default_lengths, reference_image
from .studio_worker import Job, device_name

# What is fixed -> option of encode. Whole scales are counted in tokens, too.
BUDGETS = {"tokens": "num_tokens", "scales": "num_tokens", "quality": "target_psnr", "bytes": "max_bytes"}
MAX_FILE_BYTES = 2**31
NUM_ALTERNATIVES = 4  # other codes that are tried in a token's place to see where it acts
HEAT_GAMMA = 0.7  # lifts small differences in the heat map


@dataclass(frozen=True)
class Budget:
    """What the user fixes: "tokens" or "scales" (count), "quality" (dB) or "bytes" (of the .mtok file)."""

    kind: str = "tokens"
    amount: float = 0

    def options(self, tokenizer) -> dict:
        """Keyword arguments of `encode`. A fixed-length tokenizer has its own count, whatever was asked."""
        if self.kind not in BUDGETS:
            raise InvalidInput(f"budget must be one of {', '.join(BUDGETS)}, not {self.kind!r}")
        if tokenizer.is_continuous or (BUDGETS[self.kind] == "num_tokens" and not tokenizer.is_variable_length):
            return {}
        if self.amount is None or not np.isfinite(self.amount) or self.amount <= 0:
            raise InvalidInput(f"Give a {self.kind} budget above zero, not {self.amount}.")
        if self.kind == "scales":
            return {"num_tokens": tokenizer.tokens_of_scales(int(self.amount))}
        if self.kind == "tokens":
            return {"num_tokens": tokenizer.longest_within(int(self.amount))}
        return {BUDGETS[self.kind]: float(self.amount) if self.kind == "quality" else int(self.amount)}


@dataclass(frozen=True)
class Result:
    """One picture, its tokens and its reconstruction.

    source: what `mt.load` takes. reference: the picture as the tokenizer saw it, None if only a .mtok was given.
    tokens: None for continuous tokenizers. psnr: dB, None without a reference. seconds: encode plus decode.
    decoding: options of `decode` that differ from the model's own. scales: tokens of each scale, if there are some.
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
    decoding: dict = field(default_factory=dict)
    scales: tuple[int, ...] = ()
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

    @property
    def num_scales(self) -> int:
        """Scales that the tokens have; 0 where there are none."""
        return sum(end <= self.tokens_per_tile for end in accumulate(self.scales))

    def ids(self) -> list[int]:
        """The code of each position; empty for continuous tokenizers."""
        return [] if self.tokens is None else self.tokens.ids[0, : int(self.tokens.lengths[0])].tolist()


def encode_picture(
    tokenizer, source: str, picture, picture_name: str, budget: Budget, job: Job,
    *, tile: bool = False, caption: str | None = None, decoding: dict | None = None, emit: Callable | None = None,
) -> Result:  # fmt: skip
    """Encode and decode one picture (anything `read_image` takes) within a budget. Hold the device around it.

    decoding: options of `decode`. emit: gets PIL images of what decoders that work in steps come to.
    """
    options, decoding = budget.options(tokenizer), changed_options(tokenizer, decoding)
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
        watch = job.on_step if emit is None else partial(_watch, job, emit)
        image = tokenizer.decode(tokens, previews=emit is not None, on_step=watch, **text, **decoding)
    return Result(
        source, tokenizer.name, picture_name, reference, image, tokens, picture_psnr(image, reference),
        time.perf_counter() - started, device_name(str(tokenizer.device)), options, tokenizer.max_tokens,
        tokenizer.is_variable_length, text.get("text"), decoding, tokenizer.scales, unedited=tokens,
    )  # fmt: skip


def _watch(job: Job, emit: Callable, step: int, total: int, preview: torch.Tensor | None = None) -> None:
    job.check()
    if preview is not None and step < total:
        emit(to_pil(preview))


def decode_tokens(
    tokenizer, source: str, tokens: Tokens, name: str, job: Job,
    *, caption: str | None = None, decoding: dict | None = None,
) -> Result:  # fmt: skip
    """Decode tokens whose picture is not known (a .mtok file)."""
    tokens = tokens[0] if tokens.is_batch else tokens
    text, decoding = text_option(tokenizer, caption), changed_options(tokenizer, decoding)
    started = time.perf_counter()
    image = tokenizer.decode(tokens, on_step=job.on_step, **text, **decoding)
    return Result(
        source, tokenizer.name, name, None, image, tokens, None, time.perf_counter() - started,
        device_name(str(tokenizer.device)), {}, tokenizer.max_tokens, tokenizer.is_variable_length, text.get("text"),
        decoding, tokenizer.scales, unedited=tokens,
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
    image = tokenizer.decode(tokens, on_step=job.on_step, **ways(tokenizer, result))
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
        other = tokenizer.decode(replace(result.tokens, ids=ids), on_step=job.on_step, **ways(tokenizer, result))
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
    tokenizer, reference: Image.Image, job: Job, *, tile: bool, hold, decoding: dict | None = None
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
                curves[tokenizer.name] = _prefix_curve(tokenizer, reference, job, decoding or {})
    for label, codec in (("JPEG", "jpeg"), ("WebP", "webp")):
        job.check()
        curves[label] = codec_curve(reference, codec)
    return curves


def _prefix_curve(tokenizer, reference: Image.Image, job: Job, decoding: dict) -> list[RatePoint]:
    """`rate_curve`, which Stop ends within a step of the decoder."""
    full, points = tokenizer.encode(reference, on_step=job.on_step), []
    for length in default_lengths(tokenizer):
        tokens = full if length == tokenizer.max_tokens else full[:, :length]
        image = tokenizer.decode(tokens, on_step=job.on_step, **decoding)
        size, pixels = tokens.num_bytes, image.width * image.height
        points.append(RatePoint(size, 8 * size / pixels, picture_psnr(image, reference), length, f"{length} tokens"))
    return points


def equal_bytes(tokenizers: list, picture, most: int) -> list[Budget]:
    """For each tokenizer the budget under which their files are as equal as can be: none larger than the smallest.

    Each fills at most `most` bytes; what the one with the least then has is all that the others may have. Those that
    cannot be as small have the fewest tokens that they can have, and do not count.
    """
    if not most or not 0 < most < MAX_FILE_BYTES:
        raise InvalidInput(f"Give a number of bytes above zero, not {most}.")

    def largest(tokenizer, frame: ImageFrame, limit: int) -> tuple[int, int]:
        """Length and bytes of the longest that fits; of the shortest where none does."""
        fitting = bisect.bisect_right(tokenizer.lengths, limit, key=lambda n: tokenizer.file_bytes(n, frame))
        length = tokenizer.lengths[max(fitting - 1, 0)]
        return length, tokenizer.file_bytes(length, frame)

    frames = [ImageFrame(*reference_image(tokenizer, picture).size) for tokenizer in tokenizers]
    pairs = list(zip(tokenizers, frames, strict=True))
    sizes = [largest(*pair, most)[1] for pair in pairs if not pair[0].is_continuous]
    limit = min([size for size in sizes if size <= most], default=most)
    return [Budget("tokens", 0 if pair[0].is_continuous else largest(*pair, limit)[0]) for pair in pairs]


def changed_options(tokenizer, decoding: dict | None) -> dict:
    """Those of `decoding` that this tokenizer, or a generator's, has and that are not its own values anyway.

    Raises:
        InvalidInput: a value that makes no sense.
    """
    if not decoding or not tokenizer.decoding_option_names:
        return {}
    own = tokenizer.decoding_defaults()
    given = {name: value for name, value in decoding.items() if name in own and value is not None}
    tokenizer.checked_decoding(**given)
    return {name: value for name, value in given.items() if value != own[name]}


def ways(tokenizer, result: Result) -> dict:
    """How a result was decoded, as keyword arguments of `decode`."""
    return text_option(tokenizer, result.caption) | result.decoding


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
    """PSNR in dB on 8-bit pixels, at the size of the reference; None without one."""
    return None if reference is None else psnr(to_pixels(resized_to(image, reference)), to_pixels(reference))


def open_picture(path) -> Image.Image:
    """Read a picture through the library's limits."""
    return read_image(path)
