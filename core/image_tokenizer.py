"""What every image tokenizer is: pictures of any size in, tokens between, pictures out.

Shape suffixes: B batch, 3/H/W image of side `image_size`, L tokens, R rows (tiles of the pictures), S tile side.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from PIL import Image
from torch import Tensor

from .base import OnStep, Tokenizer, report
from .errors import InvalidInput, nearest_names
from .images import fit_square, read_image, to_pil, to_pixels
from .sizes import check_whole, whole
from .tiles import TileGrid
from .tokens import ImageFrame, Tokens


class ImageTokenizer(Tokenizer):
    """Base of image tokenizers: pictures in, tokens or latents between, pictures out.

    Subclasses implement `encode_pixels` and `decode_ids`; continuous ones `encode_latents` and `decode_latents`.
    """

    modality = "image"
    is_variable_length = False  # prefixes of the tokens decode: those of `lengths`
    scales: tuple[int, ...] = ()  # tokens of each scale, coarse to fine, where a prefix must be some whole scales
    is_continuous = False  # latents instead of ids
    accepts_text = False  # the decoder reads a caption
    decoding_option_names: tuple[str, ...] = ()  # of `decode`, for decoders that can be run in several ways
    keeps_pixels = True  # False: ids tell what a picture shows, not where; it has no tiles, and its PSNR says little
    shows_steps = False  # `decode_ids` can tell after each of its steps what it will come to
    text_encoder = "openai/clip-vit-large-patch14-336"  # hub id or folder, for models that accept text

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens a picture may have, in growing order."""
        if self.scales:
            return tuple(accumulate(self.scales))
        return range(1 if self.is_variable_length else self.max_tokens, self.max_tokens + 1)

    def tokens_of_scales(self, num_scales: int) -> int:
        """Tokens in the first `num_scales` scales.

        Raises:
            InvalidInput: there are none, or not as many.
        """
        if not self.scales:
            raise InvalidInput(f"the tokens of {self.name} have no scales")
        return self.lengths[check_whole(num_scales, "the number of scales", 1, len(self.scales)) - 1]

    def longest_within(self, count: int) -> int:
        """The most tokens that a picture may have and that `count` allows; the fewest where it allows none."""
        return self.lengths[max(bisect.bisect_right(self.lengths, count) - 1, 0)]

    def file_bytes(self, num_tokens: int, frame: ImageFrame) -> int:
        """Size of the `.mtok` file of one picture with `num_tokens` tokens a tile."""
        ids = torch.zeros(num_tokens * frame.num_tiles, dtype=torch.long)
        return self._tokens([ids], [frame], is_batch=False).num_bytes

    def fit(self, image: Image.Image) -> Image.Image:
        """A picture of any size as the square that this tokenizer reads."""
        return fit_square(image, self.image_size)

    @torch.inference_mode()
    def encode(
        self,
        images,
        *,
        num_tokens: int | None = None,
        target_psnr: float | None = None,
        max_bytes: int | None = None,
        tile: bool = False,
        batch_size: int = 8,
        on_step: OnStep | None = None,
    ) -> Tokens:
        """Turn one picture or a list of them into `Tokens`.

        Args:
            images: path, bytes, PIL image, array or tensor (see `read_image`), or a list of these.
            num_tokens: keep the first `num_tokens` (variable-length tokenizers only).
            target_psnr: choose per picture the fewest tokens whose reconstruction reaches this PSNR in dB; all tokens
                where none does.
            max_bytes: keep as many tokens as a one-picture `.mtok` file of this size holds.
            tile: cover the whole picture at its own size with overlapping tiles; without it the picture is resized and
                centre-cropped to `image_size`.
            on_step: called after each batch with the number of finished pictures and the total.

        Raises:
            InvalidInput: unreadable pictures or options that this tokenizer does not have.
        """
        sources, is_batch = as_list(images)
        self._check_encode_options(num_tokens, target_psnr, max_bytes)
        batch_size = check_whole(batch_size, "batch_size", 1)
        rows_ids, frames = [], []
        per_chunk = 1 if tile else batch_size  # pictures whose rows are in memory at once
        for start in range(0, len(sources), per_chunk):
            prepared = [self._prepare(read_image(source), tile) for source in sources[start : start + per_chunk]]
            pixels_R3SS, chunk_frames = torch.cat([rows for rows, _ in prepared]), [frame for _, frame in prepared]
            longest = [self._longest(frame, num_tokens, max_bytes) for frame in chunk_frames]
            needed = max(longest) if self.is_variable_length else None
            ids = []
            for batch in pixels_R3SS.split(batch_size):
                ids.append(self.encode_pixels(batch.to(self.device), needed).cpu())
                report(on_step, start, len(sources))
            ids_RL, lengths = torch.cat(ids), longest
            if target_psnr is not None:
                beat = partial(report, on_step, start, len(sources))  # so that a long search can be cancelled
                lengths = self._shortest_reaching(target_psnr, longest, pixels_R3SS, ids_RL, batch_size, beat)
            for rows, length in zip(ids_RL.chunk(len(chunk_frames)), lengths, strict=True):
                rows_ids.append(rows[:, :length].reshape(-1))
            frames += chunk_frames
            report(on_step, len(frames), len(sources))
        return self._tokens(rows_ids, frames, is_batch)

    @torch.inference_mode()
    def decode(
        self,
        tokens: Tokens,
        *,
        text: str | Sequence[str] | None = None,
        as_tensor: bool = False,
        batch_size: int = 8,
        previews: bool = False,
        on_step: OnStep | None = None,
        **options,
    ):
        """Turn `Tokens` back into pictures: one PIL image, or a list when the tokens came from a list.

        `text` is the caption, or one caption per picture, for text-aware models. With `as_tensor`, fp32 tensors
        [3, H, W] in [0, 1] instead of PIL images. Pictures are `image_size` square unless they were encoded as tiles.
        `options` are those of `decoding_option_names`, such as the steps of a flow. `on_step` is called after each
        picture; of a decoder that works in steps after each of these, with what its last picture will come to (fp32
        [3, H, W] in [0, 1]) where `previews` asks for it and `shows_steps`.

        Raises:
            TokenizerMismatch: tokens of another model.
            InvalidInput: options that this tokenizer does not have, or values out of their range.
        """
        tokens.check(self.name, self.fingerprint)
        batch_size = check_whole(batch_size, "batch_size", 1)
        captions = self._captions(text, len(tokens))
        arguments = self.checked_decoding(**options)
        steps = _Steps(on_step, len(tokens), arguments, previews and self.shows_steps)
        pictures: list = [None] * len(tokens)
        whole = [index for index, frame in enumerate(tokens.frames) if not frame.is_tiled]
        done = 0
        for group in (whole[start : start + batch_size] for start in range(0, len(whole), batch_size)):
            texts = None if captions is None else [captions[i] for i in group]
            within = steps.within(done, len(group))
            pixels = self._decode_rows(tokens.ids[group], tokens.lengths[group], texts, arguments | within)
            for index, picture in zip(group, pixels, strict=True):
                pictures[index] = picture
            done += len(group)
            steps.report(done, pixels[-1])
        for index in sorted(set(range(len(tokens))) - set(whole)):
            texts = None if captions is None else [captions[index]]
            pictures[index] = self._decode_tiles(tokens, index, texts, batch_size, steps, done, arguments)
            done += 1
            steps.report(done, pictures[index])
        results = pictures if as_tensor else [to_pil(picture) for picture in pictures]
        return results if tokens.is_batch else results[0]

    @torch.inference_mode()
    def reconstruct(self, images, *, text=None, as_tensor: bool = False, batch_size: int = 8, on_step=None, **options):
        """Encode and decode in one call; `options` are those of both. Works for continuous tokenizers, too."""
        if not self.is_continuous:
            decoding = {name: options.pop(name) for name in self.decoding_option_names if name in options}
            self.checked_decoding(**decoding)  # a wrong value is found before the work
            tokens = self.encode(images, batch_size=batch_size, on_step=on_step, **options)
            return self.decode(tokens, text=text, as_tensor=as_tensor, batch_size=batch_size, **decoding)
        if options:
            raise InvalidInput(f"{self.name} has continuous latents: {', '.join(options)} cannot be chosen")
        sources, is_batch = as_list(images)
        captions = self._captions(text, len(sources))
        pictures = []
        for start in range(0, len(sources), batch_size):
            chunk = [to_pixels(self.fit(read_image(s))) for s in sources[start : start + batch_size]]
            latents = self.encode_latents(torch.stack(chunk).to(self.device))
            text_features = () if captions is None else (self.encode_text(captions[start : start + batch_size]),)
            pictures += self.decode_latents(latents, *text_features).clamp(0, 1).cpu().unbind()
            report(on_step, len(pictures), len(sources), pictures[-1])
        results = pictures if as_tensor else [to_pil(picture) for picture in pictures]
        return results if is_batch else results[0]

    def code_vectors(self, ids_BL: Tensor) -> Tensor:
        """What the quantizer has for each id, before any decoder: fp32 [B, L, C] of int64 ids."""
        self.check_ids(ids_BL)
        return self.quantize.lookup(ids_BL)

    # Checks that the tensor level of every image tokenizer shares.

    def check_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """Return `pixels_B3HW`, or raise InvalidInput naming the shape it has and should have."""
        side = self.image_size
        if pixels_B3HW.ndim != 4 or pixels_B3HW.shape[1:] != (3, side, side) or not pixels_B3HW.is_floating_point():
            raise InvalidInput(
                f"{self.name} reads float pixels [B, 3, {side}, {side}] in [0, 1], got {pixels_B3HW.dtype} "
                f"{list(pixels_B3HW.shape)}; `encode` resizes pictures of any size"
            )
        return pixels_B3HW

    def check_num_tokens(self, num_tokens: int | None) -> None:
        """Refuse a token count that this tokenizer cannot give."""
        if num_tokens is None:
            return
        number = whole(num_tokens)
        if number is None or not 1 <= number <= self.max_tokens:
            raise InvalidInput(
                f"num_tokens={num_tokens!r} is out of range; {self.name} has 1 to {self.max_tokens} tokens"
            )
        if num_tokens != self.max_tokens and not self.is_variable_length:
            raise InvalidInput(
                f"{self.name} always uses {self.max_tokens} tokens; for {num_tokens} take a variable-length tokenizer, "
                "such as one-d-piece-tiny"
            )
        if num_tokens not in self.lengths:
            ends = ", ".join(map(str, self.lengths))
            raise InvalidInput(f"{num_tokens} tokens end within a scale; whole scales of {self.name} end at {ends}")

    def check_ids(self, ids_BL: Tensor, lengths_B: Tensor | None = None) -> None:
        """Refuse ids of a wrong shape, dtype or range, and lengths that do not fit them."""
        if self.is_continuous:
            raise InvalidInput(f"{self.name} has continuous latents and no ids; use decode_latents")
        if ids_BL.ndim != 2 or ids_BL.dtype != torch.int64:
            raise InvalidInput(f"ids must be int64 [B, L], got {ids_BL.dtype} {list(ids_BL.shape)}")
        self.check_num_tokens(ids_BL.shape[1])
        if ids_BL.numel() and not 0 <= int(ids_BL.min()) <= int(ids_BL.max()) < self.vocab_size:
            raise InvalidInput(
                f"ids must lie in [0, {self.vocab_size}), got {int(ids_BL.min())} to {int(ids_BL.max())}"
            )
        if lengths_B is not None:
            if (
                lengths_B.shape != ids_BL.shape[:1]
                or not 1 <= int(lengths_B.min()) <= int(lengths_B.max()) <= ids_BL.shape[1]
            ):
                raise InvalidInput(f"lengths {lengths_B.tolist()} do not fit ids of shape {list(ids_BL.shape)}")
            if not self.is_variable_length and int(lengths_B.min()) < self.max_tokens:
                raise InvalidInput(
                    f"{self.name} always uses {self.max_tokens} tokens, got lengths {lengths_B.tolist()}"
                )
            for length in set(lengths_B.tolist()):
                self.check_num_tokens(length)

    # Lengths: how many tokens each picture keeps.

    def _check_encode_options(self, num_tokens, target_psnr, max_bytes) -> None:
        if self.is_continuous:
            raise InvalidInput(f"{self.name} has continuous latents and no ids; use reconstruct or encode_latents")
        self.check_num_tokens(num_tokens)
        if num_tokens is not None and (target_psnr is not None or max_bytes is not None):
            raise InvalidInput("num_tokens fixes the length; give it alone, or target_psnr and/or max_bytes")
        if target_psnr is not None and not self.is_variable_length:
            raise InvalidInput(
                f"{self.name} always uses {self.max_tokens} tokens; target_psnr needs a variable-length one"
            )
        if max_bytes is not None:
            check_whole(max_bytes, "max_bytes", 1)
        if target_psnr is None:
            return
        is_number = isinstance(target_psnr, (int, float)) and not isinstance(target_psnr, bool)
        if not is_number or not 0 < target_psnr < 100:
            raise InvalidInput(f"target_psnr={target_psnr!r} dB is out of range (0 to 100)")

    def _longest(self, frame: ImageFrame, num_tokens: int | None, max_bytes: int | None) -> int:
        """Most tokens a row that `num_tokens` or the byte budget allow for a picture of this frame."""
        longest = self.max_tokens if num_tokens is None else num_tokens
        if max_bytes is None:
            return longest
        lengths = self.lengths[: bisect.bisect_right(self.lengths, longest)]
        fitting = bisect.bisect_right(lengths, max_bytes, key=lambda length: self.file_bytes(length, frame))
        if fitting == 0:
            least = self.file_bytes(lengths[0], frame)
            raise InvalidInput(f"max_bytes={max_bytes} is too small: {self.name} needs at least {least} bytes")
        return lengths[fitting - 1]

    def _shortest_reaching(
        self,
        target_psnr: float,
        longest: list[int],
        pixels_R3SS: Tensor,
        ids_RL: Tensor,
        batch_size: int,
        beat: Callable,
    ) -> list[int]:
        """Fewest tokens per picture that reach `target_psnr`, found by bisection: quality grows with length."""
        choices = torch.tensor(self.lengths)
        low, high = torch.zeros(len(longest), dtype=torch.long), torch.searchsorted(choices, torch.tensor(longest))
        rows_per_picture = len(ids_RL) // len(longest)
        while bool((low < high).any()):
            middle = (low + high) // 2
            lengths_R = choices[middle].repeat_interleave(rows_per_picture)
            errors = []
            for rows in torch.arange(len(ids_RL)).split(batch_size):
                decoded = self._decode_rows(ids_RL[rows], lengths_R[rows])
                errors.append((decoded - pixels_R3SS[rows]).square().mean(dim=(1, 2, 3)))
                beat()
            mse = torch.cat(errors).view(len(longest), -1).mean(dim=1)
            reached = mse <= 10 ** (-target_psnr / 10)
            # `high` always holds a length that reaches the target, or the longest.
            high = torch.where(reached, middle.minimum(high), high)
            low = torch.where(reached, low, (middle + 1).minimum(high))
        return choices[high].tolist()

    # Rows and tiles.

    def _prepare(self, image: Image.Image, tile: bool) -> tuple[Tensor, ImageFrame]:
        """The squares [R, 3, S, S] that stand for a picture, and its frame."""
        if not tile:
            return to_pixels(self.fit(image))[None], ImageFrame(image.width, image.height)
        grid = TileGrid.cover(image.width, image.height, self.image_size)
        return grid.split(to_pixels(image)), ImageFrame(image.width, image.height, grid.rows, grid.cols)

    def _tokens(self, rows_ids: list[Tensor], frames: list[ImageFrame], is_batch: bool) -> Tokens:
        lengths = torch.tensor([len(row) for row in rows_ids])
        ids = torch.nn.utils.rnn.pad_sequence(rows_ids, batch_first=True)
        return Tokens(
            ids=ids, lengths=lengths, tokenizer=self.name, fingerprint=self.fingerprint, vocab_size=self.vocab_size,
            modality=self.modality, frames=tuple(frames), is_batch=is_batch, scales=self.scales,
        )  # fmt: skip

    def decoding_arguments(self, **options) -> dict:
        """What `decode_ids` takes for the options of `decode`, checked; subclasses that have options say how.

        It is one object, which has every option by its name, and `total_steps` where the decoder works in steps.
        """
        return {}

    def checked_decoding(self, /, **options) -> dict:
        """`decoding_arguments`, where an option that there is not is an InvalidInput naming the nearest."""
        for name in options:
            if name not in self.decoding_option_names:
                known = ", ".join(self.decoding_option_names)
                its = f"It has {known}.{nearest_names(name, self.decoding_option_names)}" if known else "It has none."
                raise InvalidInput(f"{self.name} has no option {name!r} of decoding. {its}")
        return self.decoding_arguments(**options)

    def decoding_defaults(self) -> dict:
        """Every option of `decode` with the value that it has when the call does not say."""
        (settings,) = self.decoding_arguments().values() or (None,)
        return {name: getattr(settings, name) for name in self.decoding_option_names}

    def _decode_rows(
        self, ids_RL: Tensor, lengths_R: Tensor, texts: list[str] | None = None, arguments: dict | None = None
    ) -> Tensor:
        """Pixels fp32 [R, 3, S, S] on the CPU, clamped to [0, 1]."""
        ids_RL = ids_RL[:, : int(lengths_R.max())].to(self.device)
        lengths = None if bool((lengths_R == ids_RL.shape[1]).all()) else lengths_R.to(self.device)
        text_features = {} if texts is None else {"text_BTE": self.encode_text(texts)}
        return self.decode_ids(ids_RL, lengths, **text_features, **(arguments or {})).clamp(0, 1).cpu()

    def _decode_tiles(
        self, tokens: Tokens, index: int, texts, batch_size: int, steps: _Steps, done: int, arguments: dict
    ) -> Tensor:
        frame = tokens.frames[index]
        grid = TileGrid.of_frame(frame, self.image_size)
        ids_RL = tokens.ids[index, : tokens.lengths[index]].view(grid.num_tiles, -1)
        canvas = grid.canvas()
        for rows in torch.arange(grid.num_tiles).split(batch_size):
            lengths_R = torch.full((len(rows),), ids_RL.shape[1])
            row_texts = None if texts is None else texts * len(rows)
            share = int(rows[0]) / grid.num_tiles, len(rows) / grid.num_tiles
            within = steps.within(done + share[0], share[1], previews=False)
            pixels = self._decode_rows(ids_RL[rows], lengths_R, row_texts, arguments | within)
            canvas.paste(rows.tolist(), pixels)
            steps.report(done + sum(share))
        return canvas.picture()

    def _captions(self, text: str | Sequence[str] | None, count: int) -> list[str] | None:
        if text is None:
            if self.accepts_text:
                raise InvalidInput(f"{self.name} decodes with a caption; pass text= (for example 'A photo of a cat.')")
            return None
        if not self.accepts_text:
            raise InvalidInput(f"{self.name} takes no text; only TA-TiTok models do")
        captions = [text] * count if isinstance(text, str) else list(text)
        if len(captions) != count:
            raise InvalidInput(f"{len(captions)} captions were given for {count} pictures")
        return captions


class _Steps:
    """Tells `on_step` how far `decode` has come: in steps of the decoder, or pictures where it has none."""

    def __init__(self, on_step: OnStep | None, num_pictures: int, arguments: dict, previews: bool):
        self.on_step, self.num_pictures, self.previews = on_step, num_pictures, previews
        self.per_picture = next((getattr(value, "total_steps", None) for value in arguments.values()), None)

    def report(self, pictures: float, preview: Tensor | None = None) -> None:
        """So many pictures are done."""
        per_picture = self.per_picture or 1
        report(self.on_step, int(pictures * per_picture), self.num_pictures * per_picture, preview)

    def within(self, done: float, count: float, previews: bool = True) -> dict:
        """What `decode_ids` takes to report its steps: of `count` pictures, after `done` others."""
        if self.on_step is None or self.per_picture is None:
            return {}

        def on_step(step: int, total: int, preview: Tensor | None = None) -> None:
            if step < total:  # the last one is told with the picture
                self.report(done + count * step / total, preview)

        return {"on_step": on_step} | ({"previews": True} if previews and self.previews else {})


def as_list(images) -> tuple[list, bool]:
    """Return the pictures as a list, and whether a list (or a batch [B, ., ., .]) was given."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise InvalidInput("the list of pictures is empty")
        return list(images), True
    if getattr(images, "ndim", 0) == 4:
        return list(images), True
    return [images], False
