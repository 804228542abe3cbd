"""What every speech tokenizer is: clips of any length in, tokens between, waveforms out.

Long clips go through in windows that overlap by the tokenizer's context, so that the tokens and the samples are those
of one pass, in flat memory.

Shape suffixes: B batch, T samples, L frames (positions of tokens), Q codebooks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .audio import AudioStream, Waveform, open_audio
from .base import OnStep, Tokenizer, check_callback, report
from .errors import InvalidInput, LimitExceeded
from .tokens import SpeechFrame, Tokens

WINDOW_SECONDS = 20.0
MAX_WHOLE_SECONDS = 300.0  # for tokenizers whose frames depend on the whole clip


@dataclass(frozen=True)
class _Window:
    """Piece `index` of clip `item`: samples [T] or ids [L, ...]; its frames `skip` to `skip + keep` count, the others
    are context.
    """

    item: int
    index: int
    content: Tensor
    skip: int
    keep: int


class SpeechTokenizer(Tokenizer):
    """Base of speech tokenizers.

    Subclasses implement `encode_waveform` and `decode_ids`, and say `sample_rate`, `hop_length`, `vocab_size`,
    `num_codebooks` and `context_frames`.
    """

    modality = "speech"
    num_codebooks = 1
    max_tokens = None  # clips have any length
    is_variable_length = True

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return self.config.sample_rate

    @property
    @abstractmethod
    def hop_length(self) -> int:
        """Samples that one frame stands for."""

    @property
    @abstractmethod
    def context_frames(self) -> int | None:
        """Frames on either side beyond which nothing changes a frame's ids, nor the samples decoded from it.

        None: a frame depends on the whole clip, which then cannot be split.
        """

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop_length

    @property
    def bit_rate(self) -> float:
        """Bits a second of the ids, each stored in ceil(log2(vocab_size)) bits."""
        return self.frame_rate * self.num_codebooks * (self.vocab_size - 1).bit_length()

    @abstractmethod
    def encode_waveform(self, wave_BT: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Ids int64 [B, L] ([B, L, Q] with several codebooks) of `wave_BT`, fp32 in [-1, 1] at `sample_rate`.

        T is a multiple of `hop_length`, L = T / hop_length. Rows whose length in samples, `lengths_B` rounded up to
        the hop, is less than T give the ids that they give alone, followed by zeros.
        """

    @abstractmethod
    def decode_ids(self, ids: Tensor) -> Tensor:
        """Waveform fp32 [B, L * hop_length] in [-1, 1] of ids [B, L] or [B, L, Q]."""

    @torch.inference_mode()
    def encode(self, audio, *, batch_size: int = 8, on_step: OnStep | None = None) -> Tokens:
        """Turn one clip or a list of them into `Tokens`.

        Args:
            audio: path, bytes of a file or `Waveform` (see `read_audio`), or a list of these; any rate and number of
                channels, mixed to mono.
            batch_size: windows of equal length that go through together.
            on_step: called after each batch with the seconds of audio that are finished, and their total.

        Raises:
            InvalidInput: unreadable audio.
            LimitExceeded: a clip too long for a tokenizer that cannot split it.
        """
        check_callback(on_step)
        sources, is_batch = as_list(audio)
        streams = [open_audio(source) for source in sources]
        num_samples = [0] * len(streams)  # known once a stream has been read
        total = sum(stream.seconds or 0 for stream in streams)
        clips = self._map_windows(self._wave_windows(streams, num_samples), self.encode_waveform, 1, batch_size,
                                  on_step, total)  # fmt: skip
        return Tokens(
            ids=torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
            lengths=torch.tensor([len(ids) for ids in clips]), tokenizer=self.name, fingerprint=self.fingerprint,
            vocab_size=self.vocab_size, modality=self.modality, is_batch=is_batch,
            frames=tuple(SpeechFrame(count) for count in num_samples),
        )  # fmt: skip

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, batch_size: int = 8, on_step: OnStep | None = None):
        """Turn `Tokens` back into sound: one mono `Waveform`, or a list when the tokens came from a list.

        `on_step` is called with the seconds of sound that are finished, and their total.

        Raises:
            TokenizerMismatch: tokens of another model.
        """
        check_callback(on_step)
        tokens.check(self.name, self.fingerprint)
        total = int(tokens.lengths.sum()) / self.frame_rate
        waves = self._map_windows(
            self._id_windows(tokens), self.decode_ids, self.hop_length, batch_size, on_step, total
        )
        clips = [
            Waveform(wave_T[: frame.num_samples], self.sample_rate)
            for wave_T, frame in zip(waves, tokens.frames, strict=True)
        ]
        return clips if tokens.is_batch else clips[0]

    @torch.inference_mode()
    def decode_blocks(self, tokens: Tokens, on_step: OnStep | None = None) -> Iterator[Tensor]:
        """The sound of one item, fp32 [1, T] blocks as they are decoded: the samples of `decode`, in flat memory."""
        tokens.check(self.name, self.fingerprint)
        if len(tokens) != 1:
            raise InvalidInput(f"blocks are decoded of one clip, not of {len(tokens)}; take tokens[i]")
        left = tokens.frames[0].num_samples
        done, total = 0.0, int(tokens.lengths[0]) / self.frame_rate
        for window in self._id_windows(tokens):
            wave_BT = self.decode_ids(window.content[None].to(self.device)).cpu()
            block_BT = wave_BT[:, window.skip * self.hop_length :][:, : min(window.keep * self.hop_length, left)]
            left -= block_BT.shape[1]
            done += window.keep / self.frame_rate
            report(on_step, round(done), max(1, round(total)))
            if block_BT.shape[1]:
                yield block_BT

    def reconstruct(self, audio, *, batch_size: int = 8, on_step: OnStep | None = None):
        """Encode and decode in one call."""
        return self.decode(self.encode(audio, batch_size=batch_size, on_step=on_step), batch_size=batch_size)

    # Checks that the tensor level of every speech tokenizer shares.

    def check_wave(self, wave_BT: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return `wave_BT`, or raise InvalidInput naming the shape it has and should have."""
        if wave_BT.ndim != 2 or not wave_BT.is_floating_point() or not wave_BT.shape[1]:
            raise InvalidInput(
                f"{self.name} reads float samples [B, T] in [-1, 1], got {wave_BT.dtype} {list(wave_BT.shape)}"
            )
        if wave_BT.shape[1] % self.hop_length:
            raise InvalidInput(
                f"{wave_BT.shape[1]} samples are no multiple of {self.hop_length}, which one token of {self.name} "
                "stands for; pad with zeros at the right, as `encode` does"
            )
        if lengths_B is not None and (
            lengths_B.shape != wave_BT.shape[:1]
            or not 1 <= int(lengths_B.min()) <= int(lengths_B.max()) <= wave_BT.shape[1]
        ):
            raise InvalidInput(f"lengths {lengths_B.tolist()} do not fit samples of shape {list(wave_BT.shape)}")
        return wave_BT

    def check_ids(self, ids: Tensor) -> Tensor:
        """Return `ids`, or raise InvalidInput for a wrong shape, dtype or range."""
        shape = "[B, L]" if self.num_codebooks == 1 else f"[B, L, {self.num_codebooks}]"
        fits = ids.ndim == 2 if self.num_codebooks == 1 else ids.ndim == 3 and ids.shape[2] == self.num_codebooks
        if not fits or ids.dtype != torch.int64 or not ids.numel():
            raise InvalidInput(f"ids of {self.name} must be int64 {shape}, got {ids.dtype} {list(ids.shape)}")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidInput(f"ids must lie in [0, {self.vocab_size}), got {int(ids.min())} to {int(ids.max())}")
        return ids

    def by_length(self, wave_BT: Tensor, lengths_B: Tensor | None, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """`encode` rows of unequal length so that none sees the padding of another; ids past a row's end are 0."""
        self.check_wave(wave_BT, lengths_B)
        if lengths_B is None:
            return encode(wave_BT)
        frames_B = -(-lengths_B // self.hop_length)
        ids = None
        for frames in frames_B.unique().tolist():
            rows_B = frames_B == frames
            part = encode(wave_BT[rows_B, : frames * self.hop_length])
            if ids is None:
                ids = part.new_zeros(len(wave_BT), wave_BT.shape[1] // self.hop_length, *part.shape[2:])
            ids[rows_B, :frames] = part
        return ids

    # Windows.

    def _map_windows(self, windows, function, samples_per_frame, batch_size, on_step, total: float) -> list[Tensor]:
        """`function` of all windows, batched, each clip's kept parts joined; on the CPU."""
        parts: dict[int, list[tuple[int, Tensor]]] = {}
        done = 0
        for group in _batches(windows, batch_size):
            results = function(torch.stack([window.content for window in group]).to(self.device)).cpu()
            for window, result in zip(group, results, strict=True):
                kept = result[window.skip * samples_per_frame : (window.skip + window.keep) * samples_per_frame]
                parts.setdefault(window.item, []).append((window.index, kept.clone()))
                done += window.keep
            seconds = done / self.frame_rate
            report(on_step, round(min(seconds, total)), max(1, round(total)))
        return [
            torch.cat([kept for _, kept in sorted(parts[item], key=lambda part: part[0])]) for item in sorted(parts)
        ]

    def _wave_windows(self, streams: Sequence[AudioStream], num_samples: list[int]) -> Iterator[_Window]:
        """Windows of all clips, read as they are needed; `num_samples` gets each clip's length."""
        for item, stream in enumerate(streams):
            source = _counted(stream.blocks(WINDOW_SECONDS, self.sample_rate), num_samples, item)
            padded = _padded(source, self.hop_length)
            whole = self.context_frames is None
            if whole:
                padded = iter([self._whole(padded, stream.where)])
            for index, (wave_T, skip, keep) in enumerate(self._split(padded, self.hop_length, whole)):
                yield _Window(item, index, wave_T, skip, keep)

    def _id_windows(self, tokens: Tokens) -> Iterator[_Window]:
        for item in range(len(tokens)):
            ids = tokens.ids[item, : tokens.lengths[item]]
            self.check_ids(ids[None])
            for index, (part, skip, keep) in enumerate(self._split(iter([ids]), 1, self.context_frames is None)):
                yield _Window(item, index, part, skip, keep)

    def _whole(self, blocks: Iterator[Tensor], where: str) -> Tensor:
        parts, limit = [], MAX_WHOLE_SECONDS * self.sample_rate
        for block_T in blocks:
            parts.append(block_T)
            if sum(map(len, parts)) > limit:
                raise LimitExceeded(
                    f"{where} lasts more than {MAX_WHOLE_SECONDS:.0f} s, the longest clip of {self.name}, whose every "
                    "token depends on the whole clip; split it"
                )
        return torch.cat(parts)

    def _split(self, blocks: Iterator[Tensor], unit: int, whole: bool) -> Iterator[tuple[Tensor, int, int]]:
        """Windows of a sequence that comes in blocks of any length, `unit` elements a frame: (window, skip, keep)."""
        if whole:
            content = torch.cat(list(blocks))
            yield content, 0, len(content) // unit
            return
        step, context = max(1, round(WINDOW_SECONDS * self.frame_rate)), self.context_frames
        held, start = None, 0  # `held` begins at frame max(start - context, 0)
        for block in _with_end(blocks):
            if block is not None:
                held = block if held is None else torch.cat([held, block])
            skip = min(start, context)
            while (frames := len(held) // unit) >= skip + step + context or (block is None and frames > skip):
                end = min(frames, skip + step + context)
                keep = min(step, frames - skip)
                yield held[: end * unit], skip, keep
                start += keep
                drop = skip + keep - min(start, context)
                held, skip = held[drop * unit :], min(start, context)


def _counted(blocks: Iterator[Tensor], counts: list[int], item: int) -> Iterator[Tensor]:
    for block_T in blocks:
        counts[item] += len(block_T)
        yield block_T


def _padded(blocks: Iterator[Tensor], multiple: int) -> Iterator[Tensor]:
    """The same samples, and zeros at the end up to a multiple."""
    total = 0
    for block_T in blocks:
        total += len(block_T)
        yield block_T
    if total % multiple:
        yield torch.zeros(-total % multiple)


def _with_end(blocks: Iterator[Tensor]) -> Iterator[Tensor | None]:
    yield from blocks
    yield None


def _batches(windows: Iterator[_Window], batch_size: int) -> Iterator[list[_Window]]:
    """Groups of up to `batch_size` windows of one length; never more than a few batches wait."""
    waiting: dict[int, list[_Window]] = {}
    for window in windows:
        group = waiting.setdefault(len(window.content), [])
        group.append(window)
        if len(group) == batch_size:
            yield waiting.pop(len(window.content))
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield waiting.pop(max(waiting, key=lambda length: len(waiting[length])))
    yield from waiting.values()


def as_list(audio) -> tuple[list, bool]:
    """The clips as a list, and whether a list was given."""
    if isinstance(audio, (list, tuple)):
        if not audio:
            raise InvalidInput("the list of clips is empty")
        return list(audio), True
    return [audio], False
