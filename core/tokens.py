"""`Tokens`: the ids of one medium or of a batch, with what decoding them needs.

Shape suffixes: B items, L tokens of the longest item, Q codebooks a position.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from .errors import InvalidInput, InvalidTokens, TokenizerMismatch
from .files import atomic_write, read_limited, shown
from .sizes import whole

MAX_SIDE = 2**16 - 1  # pixels; JPEG and GIF have the same limit
MAX_TILES = 2**14 - 1  # in a row or column
MAX_SAMPLES = 2**32 - 1  # of a clip
MAX_LENGTH = 2**28 - 1  # tokens of an item
MAX_VOCAB_SIZE = 2**32
MAX_CODEBOOKS = 255
MAX_SCALES = 255
MAX_NAME_BYTES = 24


@dataclass(frozen=True)
class ImageFrame:
    """What a picture was: its size in pixels, and the grid of its tiles.

    rows, cols: 0 x 0 when the whole picture was resized and cropped to the tokenizer's square. Otherwise the ids are
    those of rows * cols tiles, one tile after the other in row-major order, each with the same number of tokens.
    """

    width: int
    height: int
    rows: int = 0
    cols: int = 0

    def __post_init__(self):
        for name, limit in (("width", MAX_SIDE), ("height", MAX_SIDE)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise InvalidTokens(f"the {name} of an image frame must be 1 to {limit}, not {value!r}")
        grid = (self.rows, self.cols)
        if grid != (0, 0) and not all(isinstance(n, int) and 1 <= n <= MAX_TILES for n in grid):
            raise InvalidTokens(f"the tiles of an image frame must be 0 x 0, or 1 to {MAX_TILES} a side, not {grid!r}")

    @property
    def is_tiled(self) -> bool:
        return self.rows > 0

    @property
    def num_tiles(self) -> int:
        return max(self.rows * self.cols, 1)


@dataclass(frozen=True)
class SpeechFrame:
    """What a clip was: its number of samples at the tokenizer's rate. Decoded waveforms are cut to it."""

    num_samples: int

    def __post_init__(self):
        if not isinstance(self.num_samples, int) or not 1 <= self.num_samples <= MAX_SAMPLES:
            raise InvalidTokens(f"the samples of a clip must be 1 to {MAX_SAMPLES}, not {self.num_samples!r}")


@dataclass(frozen=True)
class ShapeFrame:
    """Where a shape stood: a point p of the tokenizer's box [-1, 1]^3 is the point (x, y, z) + scale * p of its world.

    All four are rounded to fp32, as the file keeps them.
    """

    x: float
    y: float
    z: float
    scale: float

    def __post_init__(self):
        for name in ("x", "y", "z", "scale"):
            value = getattr(self, name)
            try:
                # Adding zero leaves no -0.0, which would be a second spelling of the same place.
                rounded = struct.unpack("<f", struct.pack("<f", value))[0] + 0.0
            except (struct.error, OverflowError):
                rounded = math.nan
            if not math.isfinite(rounded) or (name == "scale" and rounded <= 0):
                kind = "positive and finite" if name == "scale" else "finite"
                raise InvalidTokens(f"the {name} of a shape frame must be an fp32 number that is {kind}, not {value!r}")
            object.__setattr__(self, name, rounded)


Frame = ImageFrame | SpeechFrame | ShapeFrame

# What an item of each modality carries beside its ids. A new modality adds its frame here and its number in mtok.py.
FRAMES: dict[str, type[Frame]] = {"image": ImageFrame, "speech": SpeechFrame, "shape": ShapeFrame}


@dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """Ids of B items, all made by one tokenizer. Immutable: methods and `dataclasses.replace` return new `Tokens`.

    ids: int64 [B, L], or [B, L, Q] where a position has Q codebooks; on the CPU, each in [0, vocab_size). Rows are
        padded with 0 past their length; L is the largest length.
    lengths: int64 [B], tokens of each item, at least 1.
    tokenizer: name of the tokenizer, cut to 24 UTF-8 bytes; for people, `fingerprint` decides.
    fingerprint: 16 hex digits of the tokenizer's config and codebook.
    vocab_size: 2 to 2**32 codes.
    modality: "image", "speech" or "shape".
    frames: one an item, see `ImageFrame`, `SpeechFrame` and `ShapeFrame`.
    is_batch: whether they came from a list, so that decoding returns a list.
    scales: tokens of each scale, where coarse scales come before finer ones; every item then ends with a whole scale.

    Raises:
        InvalidTokens: any of this does not hold.
    """

    ids: Tensor
    lengths: Tensor
    tokenizer: str
    fingerprint: str
    vocab_size: int
    modality: str
    frames: tuple[Frame, ...]
    is_batch: bool = True
    scales: tuple[int, ...] = ()

    def __post_init__(self):
        _check_labels(self)
        ids, lengths_B = _as_int64("ids", self.ids, ndims=(2, 3)), _as_int64("lengths", self.lengths, ndims=(1,))
        _check_numbers(ids, lengths_B, self.vocab_size)
        frames = tuple(self.frames)
        _check_frames(frames, FRAMES[self.modality], lengths_B)
        scales = tuple(self.scales)
        _check_scales(scales, frames, lengths_B)
        if not self.is_batch and len(lengths_B) != 1:
            raise InvalidTokens(f"is_batch=False is for one item, got {len(lengths_B)}")
        # Copies outside of inference mode: ours alone, and usable as indices where gradients are needed.
        with torch.inference_mode(False):
            object.__setattr__(self, "ids", ids[:, : int(lengths_B.max())].clone(memory_format=torch.contiguous_format))
            object.__setattr__(self, "lengths", lengths_B.clone())
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "tokenizer", _cut_name(self.tokenizer))

    def __len__(self) -> int:
        """Number of items."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[Tokens]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key) -> Tokens:
        """`tokens[i]`: one item. `tokens[a:b]`: some items. `tokens[:, :k]`: the first k tokens of every item."""
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], slice):
            return self[key[0]]._prefix(key[1])
        if isinstance(key, slice):
            chosen = list(range(len(self))[key])
            if not chosen:
                raise InvalidInput(f"tokens[{key.start}:{key.stop}] selects none of {len(self)} items")
        elif hasattr(key, "__index__"):
            chosen = [range(len(self))[key]]  # IndexError beyond the last item, as sequences do
        else:
            raise InvalidInput(f"tokens take tokens[i], tokens[a:b] or tokens[:, :k], not {key!r}")
        frames = tuple(self.frames[index] for index in chosen)
        is_batch = isinstance(key, slice) and self.is_batch
        return replace(self, ids=self.ids[chosen], lengths=self.lengths[chosen], frames=frames, is_batch=is_batch)

    def _prefix(self, key: slice) -> Tokens:
        if key.start not in (None, 0) or key.step not in (None, 1):
            raise InvalidInput("only prefixes of the tokens can be taken: tokens[:, :k]")
        if key.stop is None:
            return self
        count = whole(key.stop)
        if count is None or count < 1:
            raise InvalidInput(
                f"tokens[:, :{key.stop!r}] would keep no tokens; keep a whole number of them, at least 1"
            )
        if self.modality == "image" and any(frame.num_tiles > 1 for frame in self.frames):
            raise InvalidInput(f"tiled pictures have no common prefix; use encode(..., tile=True, num_tokens={count})")
        if self.scales and not set(self.lengths.clamp(max=count).tolist()) <= set(accumulate(self.scales)):
            ends = ", ".join(map(str, accumulate(self.scales)))
            raise InvalidInput(f"tokens[:, :{count}] would cut a scale; they end at {ends}: see tokens.up_to_scale(k)")
        return replace(self, ids=self.ids[:, :count], lengths=self.lengths.clamp(max=count))

    def up_to_scale(self, k: int) -> Tokens:
        """The first k scales of every item, for tokenizers with scales; fewer where an item has fewer."""
        if not self.scales:
            raise InvalidInput(f"tokens of {self.tokenizer} have no scales")
        number = whole(k)
        if number is None or not 1 <= number <= len(self.scales):
            raise InvalidInput(f"up_to_scale takes 1 to {len(self.scales)}, not {k!r}")
        return self[:, : sum(self.scales[:number])]

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Join the items of several `Tokens` of the same tokenizer into one batch."""
        if not parts:
            raise InvalidInput("no tokens to join")
        first = parts[0]
        for part in parts[1:]:
            first.check(part.tokenizer, part.fingerprint)
            if (part.modality, part.vocab_size, part.scales, part.ids.shape[2:]) != (
                first.modality, first.vocab_size, first.scales, first.ids.shape[2:],
            ):  # fmt: skip
                raise InvalidTokens(f"{part!r} and {first!r} cannot be joined")
        lengths_B = torch.cat([part.lengths for part in parts])
        ids = torch.zeros(len(lengths_B), int(lengths_B.max()), *first.ids.shape[2:], dtype=torch.int64)
        start = 0
        for part in parts:
            ids[start : start + len(part), : part.ids.shape[1]] = part.ids
            start += len(part)
        frames = tuple(frame for part in parts for frame in part.frames)
        return replace(first, ids=ids, lengths=lengths_B, frames=frames, is_batch=True)

    def check(self, name: str, fingerprint: str) -> None:
        """Raise TokenizerMismatch unless these tokens were made with the tokenizer of that fingerprint."""
        if fingerprint != self.fingerprint:
            raise TokenizerMismatch(
                f"these tokens were made by {self.tokenizer} ({self.fingerprint}) and cannot be decoded by {name} "
                f"({fingerprint}); load the tokenizer that made them"
            )

    @property
    def bits_per_token(self) -> int:
        """Bits of one id in a file: ceil(log2(vocab_size)). A position with Q codebooks takes Q times as many."""
        return (self.vocab_size - 1).bit_length()

    @property
    def num_bytes(self) -> int:
        """Exact size of the `.mtok` file."""
        from .mtok import size_bytes

        return size_bytes(self)

    def to_bytes(self) -> bytes:
        """The `.mtok` file (docs/mtok.md). The same tokens always give the same bytes."""
        from .mtok import write_mtok

        return write_mtok(self)

    @staticmethod
    def from_bytes(data: bytes) -> Tokens:
        """Parse a `.mtok` file; InvalidTokens says what is wrong with it."""
        from .mtok import read_mtok

        return read_mtok(data)

    def save(self, path: str | Path) -> None:
        """Write a `.mtok` file. `path` is left as it was on any error."""
        data = self.to_bytes()
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)

    @staticmethod
    def load(path: str | Path) -> Tokens:
        """Read a `.mtok` file. InvalidInput if it cannot be read, InvalidTokens if it is not sound."""
        from .mtok import MAX_FILE_BYTES

        try:
            return Tokens.from_bytes(read_limited(path, MAX_FILE_BYTES))
        except InvalidTokens as error:
            raise InvalidTokens(f"{shown(path)}: {error}") from error

    def __eq__(self, other) -> bool:
        if not isinstance(other, Tokens):
            return NotImplemented
        return (
            all(
                getattr(self, name) == getattr(other, name)
                for name in ("tokenizer", "fingerprint", "vocab_size", "modality", "frames", "is_batch", "scales")
            )
            and torch.equal(self.lengths, other.lengths)
            and torch.equal(self.ids, other.ids)
        )

    __hash__ = None

    def __repr__(self) -> str:
        items = f"{len(self)} x {self.modality}" if self.is_batch else self.modality
        codebooks = f" x {self.ids.shape[2]}" if self.ids.ndim == 3 else ""
        return (
            f"Tokens({items}, {_span(self.lengths)}{codebooks} tokens of {self.bits_per_token} bits, "
            f"{self.num_bytes} bytes, {self.tokenizer} {self.fingerprint})"
        )


def _check_labels(tokens: Tokens) -> None:
    """Everything but the numbers; names end up in messages, so they must be printable."""
    if not isinstance(tokens.tokenizer, str) or not tokens.tokenizer.isprintable():
        raise InvalidTokens(f"the tokenizer's name must be printable text, not {tokens.tokenizer!r}")
    if not isinstance(tokens.fingerprint, str) or not re.fullmatch("[0-9a-f]{16}", tokens.fingerprint):
        raise InvalidTokens(f"a fingerprint is 16 lower-case hex digits, not {tokens.fingerprint!r}")
    if not isinstance(tokens.vocab_size, int) or not 2 <= tokens.vocab_size <= MAX_VOCAB_SIZE:
        raise InvalidTokens(f"vocab_size must be 2 to {MAX_VOCAB_SIZE}, not {tokens.vocab_size!r}")
    if tokens.modality not in FRAMES:
        raise InvalidTokens(f"modality must be one of {', '.join(FRAMES)}, not {tokens.modality!r}")


def _check_numbers(ids: Tensor, lengths_B: Tensor, vocab_size: int) -> None:
    if len(lengths_B) == 0:
        raise InvalidTokens("tokens need at least one item")
    if not 1 <= int(lengths_B.min()) <= int(lengths_B.max()) <= MAX_LENGTH:
        raise InvalidTokens(f"lengths must be 1 to {MAX_LENGTH}, got {_span(lengths_B)}")
    if ids.shape[0] != len(lengths_B) or ids.shape[1] < int(lengths_B.max()):
        raise InvalidTokens(f"ids {list(ids.shape)} do not hold {len(lengths_B)} items of length {_span(lengths_B)}")
    if ids.ndim == 3 and not 1 <= ids.shape[2] <= MAX_CODEBOOKS:
        raise InvalidTokens(f"ids [B, L, Q] must have 1 to {MAX_CODEBOOKS} codebooks, got {list(ids.shape)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise InvalidTokens(f"ids must lie in [0, {vocab_size}), got {_span(ids)}")
    is_padding_BL = torch.arange(ids.shape[1]) >= lengths_B[:, None]
    is_used_BL = ids.ne(0) if ids.ndim == 2 else ids.ne(0).any(-1)
    if bool((is_used_BL & is_padding_BL).any()):
        raise InvalidTokens("ids past the length of their item must be 0")


def _check_frames(frames: tuple, frame_class: type, lengths_B: Tensor) -> None:
    if len(frames) != len(lengths_B) or not all(isinstance(frame, frame_class) for frame in frames):
        raise InvalidTokens(f"{len(lengths_B)} items need as many {frame_class.__name__}s, got {len(frames)} frames")
    if frame_class is ImageFrame:
        for frame, length in zip(frames, lengths_B.tolist(), strict=True):
            if length % frame.num_tiles:
                raise InvalidTokens(f"{length} tokens do not divide into {frame.rows} x {frame.cols} tiles")


def _check_scales(scales: tuple[int, ...], frames: tuple[Frame, ...], lengths_B: Tensor) -> None:
    if not scales:
        return
    if len(scales) > MAX_SCALES or not all(isinstance(n, int) and 1 <= n <= MAX_LENGTH for n in scales):
        raise InvalidTokens(f"scales must be at most {MAX_SCALES} numbers from 1 to {MAX_LENGTH}, not {scales!r}")
    ends = set(accumulate(scales))
    for frame, length in zip(frames, lengths_B.tolist(), strict=True):
        if length // getattr(frame, "num_tiles", 1) not in ends:
            raise InvalidTokens(f"{length} tokens are no whole number of scales, which end at {sorted(ends)}")


def _as_int64(name: str, values: Tensor, ndims: tuple[int, ...]) -> Tensor:
    is_integer = isinstance(values, Tensor) and not (values.is_floating_point() or values.is_complex())
    if not is_integer or values.dtype == torch.bool or values.ndim not in ndims:
        kind = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InvalidTokens(
            f"{name} must be an integer tensor of {' or '.join(map(str, ndims))} dimensions, got {kind}"
        )
    return values.detach().to("cpu", torch.int64)


def _cut_name(name: str) -> str:
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def _span(values: Tensor) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"
