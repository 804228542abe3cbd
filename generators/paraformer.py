"""Paraformer: speech recognition in a single pass (Gao et al. 2022, arXiv 2206.08317).

Features of 60 ms go through a deep encoder. A predictor gives each frame a rate; where the running sum of the rates
passes whole numbers tokens are complete, and each token's vector is what was gathered for it (continuous
integrate-and-fire). A decoder without any order of its own says all tokens at once. In training it is shown some of
the true tokens (glancing), which is how it learns that neighbours depend on each other.

The released models differ in what is beside that: nothing ("paraformer"), a head for time stamps (arXiv 2301.12343), or
that and one for hotwords (arXiv 2308.03266, "paraformer-zh").

Shape suffixes: B clips, N samples, T frames, F features, W width, K tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..core.audio import open_audio
from ..core.base import Model, OnStep, check_callback, report
from ..core.errors import InvalidInput, LimitExceeded
from ..core.generator import GeneratorOutput, check_number
from ..core.memory import is_out_of_memory
from ..core.sizes import check_whole
from ..core.speech_tokenizer import as_list
from ..core.transcript import Transcript, Word
from ..kernels.cif import integrate_and_fire
from ..kernels.linear import pack_for_inference
from ..nn.layers import Linear
from ..nn.parallel import (
    IGNORED,
    GlancingSampler,
    ParallelDecoder,
    RatePredictor,
    count_loss,
    scaled_to,
    token_loss,
)
from ..nn.sanm import Encoder, is_inside
from .paraformer_frontend import Frontend
from .paraformer_hotwords import HotwordHead, with_no_hotword
from .paraformer_segments import BLOCK_SECONDS, Segment, segments
from .paraformer_text import BLANK, EOS, SOS, Vocabulary
from .paraformer_timestamps import TimestampHead, token_seconds
from .paraformer_training import masked_features

TIMESTAMP_LOSS_WEIGHT = 0.5
MAX_HOTWORDS = 10_000


@dataclass(frozen=True)
class Heard:
    """Tokens before they are named: vectors [B, K, W], counts int64 [B], and rates [B, T + 1] with the tail's."""

    vectors_BKW: Tensor
    counts_B: Tensor
    rates_BT: Tensor


@dataclass(frozen=True)
class Recognition:
    """What was said in one clip: ids without the special ones, their log-probability, and (start, end) in seconds."""

    ids: list[int]
    score: float
    seconds: list[tuple[float, float]]


@dataclass(frozen=True)
class TrainingPass:
    """One training pass, with what leads to its losses. rates: as predicted. draft, mixed: None without glancing."""

    losses: dict[str, Tensor]
    target_BK: Tensor
    rates_BT: Tensor
    vectors_BKW: Tensor
    draft_BKV: Tensor | None
    mixed_BKW: Tensor | None
    logits_BKV: Tensor


class Paraformer(Model):
    """Speech to text.

    Args:
        vocab_size, tokens: the text of each id; without texts the model can be trained and not asked.
        width: of all vectors. *_depth, *_heads, *_mlp_width: of the encoder's and the decoder's layers; of the
            decoder's, the first `attention_depth` look at the frames (all, when None).
        *_taps, *_shift: of their memories; see `nn.sanm.Memory`.
        projects_features: see `nn.sanm.Encoder`.
        rate_neighbours, rate_depthwise, rate_factor, rate_threshold: see `nn.parallel.RatePredictor`.
        tail: rate of an empty frame at the end, which completes a last token that lacks less than this.
        timestamp_times, timestamp_lstm, timestamp_features: of the head for time stamps (0: none); see
            `TimestampHead`, also for timestamp_factor and timestamp_threshold.
        hotword_depth, hotword_heads, hotword_mlp_width, hotword_taps, no_hotword_id: of the head for hotwords
            (0: none).
        sample_rate, num_mels, window_ms, hop_ms, stack, stride: see `Frontend`.
        ends_with_eos: whether </s> is a token of its own at the end of every sentence.
        glancing_ratio, smoothing, loss_per_token, count_weight, ctc_weight: of training. A weight of 0 leaves the head
            for CTC out.
    """

    modality = "speech"
    _keep_in_fp32_modules = ["frontend", "predictor", "timestamps"]  # sums and times  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8404,
        tokens: tuple[str, ...] = (),
        width: int = 512,
        encoder_depth: int = 50,
        encoder_heads: int = 4,
        encoder_mlp_width: int = 2048,
        encoder_taps: int = 11,
        encoder_shift: int = 0,
        projects_features: bool = False,
        decoder_depth: int = 16,
        decoder_heads: int = 4,
        decoder_mlp_width: int = 2048,
        decoder_taps: int = 11,
        decoder_shift: int = 0,
        attention_depth: int | None = None,
        rate_neighbours: tuple[int, int] = (1, 1),
        rate_depthwise: bool = False,
        rate_factor: float = 1.0,
        rate_threshold: float = 0.0,
        tail: float = 0.45,
        timestamp_times: int = 0,
        timestamp_lstm: bool = True,
        timestamp_features: bool = False,
        timestamp_factor: float = 0.25,
        timestamp_threshold: float = 0.01,
        hotword_depth: int = 0,
        hotword_heads: int = 4,
        hotword_mlp_width: int = 1024,
        hotword_taps: int = 21,
        no_hotword_id: int = 8377,
        sample_rate: int = 16000,
        num_mels: int = 80,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        stack: int = 7,
        stride: int = 6,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        ends_with_eos: bool = True,
        glancing_ratio: float = 0.75,
        smoothing: float = 0.1,
        loss_per_token: bool = True,
        count_weight: float = 1.0,
        ctc_weight: float = 0.0,
    ):
        super().__init__()
        if tokens and len(tokens) != vocab_size:
            raise InvalidInput(f"{len(tokens)} tokens for a vocabulary of {vocab_size}")
        if hotword_depth and not timestamp_times:
            raise InvalidInput("hotwords go with time stamps, as they were trained")
        drops = {"dropout": dropout, "attention_dropout": attention_dropout}
        self.frontend = Frontend(sample_rate, num_mels, window_ms, hop_ms, stack, stride)
        self.encoder = Encoder(
            stack * num_mels, width, encoder_depth, encoder_heads, encoder_mlp_width, encoder_taps, encoder_shift,
            has_projection=projects_features, **drops,
        )  # fmt: skip
        self.predictor = RatePredictor(
            width, *rate_neighbours, rate_depthwise, factor=rate_factor, threshold=rate_threshold, dropout=dropout
        )
        self.sampler = GlancingSampler(glancing_ratio)
        self.decoder = ParallelDecoder(
            vocab_size, width, decoder_depth, decoder_heads, decoder_mlp_width, taps=decoder_taps,
            shift=decoder_shift, attention_depth=attention_depth, **drops,
        )  # fmt: skip
        self.timestamps = None
        if timestamp_times:
            self.timestamps = TimestampHead(
                width, timestamp_times, timestamp_lstm, timestamp_features, timestamp_factor, timestamp_threshold
            )
        self.hotwords = None
        if hotword_depth:
            self.hotwords = HotwordHead(
                vocab_size, width, hotword_depth, hotword_heads, hotword_mlp_width, hotword_taps, no_hotword_id, **drops
            )
        self.ctc_head = Linear(width, vocab_size) if ctc_weight else None

    # The way from features to tokens.

    def encode(self, features_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Frames [B, T, W], zero past the end of each row, and a bool mask [B, T] (None where no row is padded).

        Zeros make a row's tokens independent of the batch it is in. The authors leave there what the encoder makes of
        the padding, which the predictor then sees.
        """
        inside_BT = _mask(lengths_B, features_BTF.shape[1])
        frames_BTW = self.encoder(features_BTF, inside_BT)
        return frames_BTW if inside_BT is None else frames_BTW * inside_BT[..., None], inside_BT

    def hear(self, frames_BTW: Tensor, lengths_B: Tensor) -> Heard:
        """Find the tokens: how many, and the vector of each (section 2.2)."""
        rates_BT = self.predictor(frames_BTW, _mask(lengths_B, frames_BTW.shape[1]))
        return hear(frames_BTW, rates_BT, lengths_B, self.config.tail)

    def name_tokens(
        self, heard: Heard, frames_BTW: Tensor, inside_BT: Tensor | None, hotwords_NW: Tensor | None = None,
        hotword_weight: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Log-probabilities fp32 [B, K, V] of every token."""
        inside_BK = _mask(heard.counts_B, heard.vectors_BKW.shape[1])
        hidden_BKW = self.decoder.stack(heard.vectors_BKW, inside_BK, frames_BTW, inside_BT)
        log_probs_BKV = self.decoder.head(hidden_BKW).float().log_softmax(dim=-1)
        if hotwords_NW is None:
            return log_probs_BKV
        return self.hotwords(
            log_probs_BKV, heard.vectors_BKW, hidden_BKW, inside_BK, hotwords_NW, hotword_weight
        )  # fmt: skip

    def fine_rates(self, frames_BTW: Tensor, lengths_B: Tensor, reads_padding: bool = False) -> Tensor:
        """Rates on the grid of the time stamps; see `TimestampHead.forward`."""
        source_BTW = frames_BTW
        if self.timestamps.reads_features:
            source_BTW = self.predictor.features(frames_BTW.float())
        return self.timestamps(source_BTW, lengths_B, reads_padding)

    @torch.inference_mode()
    def recognize(
        self, features_BTF: Tensor, lengths_B: Tensor, hotwords_NW: Tensor | None = None, hotword_weight: float = 1.0
    ) -> list[Recognition]:
        """The tokens of each clip. features_BTF, lengths_B: of `frontend`, every length at least 1.

        hotwords_NW: of `embed_hotwords`.
        """
        frames_BTW, inside_BT = self.encode(features_BTF, lengths_B)
        heard = self.hear(frames_BTW, lengths_B)
        if not heard.vectors_BKW.shape[1]:
            return [Recognition([], 0.0, []) for _ in lengths_B]
        best_BK, ids_BK = self.name_tokens(heard, frames_BTW, inside_BT, hotwords_NW, hotword_weight).max(dim=-1)
        seconds = self.frontend.seconds_per_frame
        if self.timestamps is None:  # the frame of the tail counts: it may complete the last token
            times, tail, rates_BT = 1, 1, heard.rates_BT
        else:
            times, tail, rates_BT = self.timestamps.times, 0, self.fine_rates(frames_BTW, lengths_B)
        found, rates_BT = [], rates_BT.cpu()
        rows = zip(ids_BK.tolist(), best_BK.tolist(), heard.counts_B.tolist(), lengths_B.tolist(), strict=True)
        for row, (ids, scores, count, length) in enumerate(rows):
            said = [number for number in ids[:count] if number not in (BLANK, SOS, EOS)]
            spans = token_seconds(rates_BT[row, : length * times + tail], len(said), seconds / times, length * seconds)
            found.append(Recognition(said, sum(scores[:count]), spans))
        return found

    # Recordings.

    @torch.inference_mode()
    def transcribe(
        self,
        audio,
        *,
        hotwords: Sequence[str] | str | None = None,
        hotword_weight: float = 1.0,
        batch_size: int = 8,
        on_step: OnStep | None = None,
    ) -> Transcript | list[Transcript]:
        """Write down what is said in a recording of any length, or in each of a list.

        Recordings are cut into pieces of at most 20 s at their quietest places, and pieces without a sound are left
        out; see `paraformer_segments`. They are read as they are needed, so that length costs no memory.

        Args:
            audio: path, bytes of a file or `Waveform` (see `read_audio`), or a list of these; any rate and number of
                channels, mixed to mono.
            hotwords: names and terms to expect, for models with a head for them; one text, or a list.
            hotword_weight: (0, 1]; how far they may change what was heard.
            batch_size: pieces that go through together.
            on_step: called after each batch with the seconds of sound that are finished and their total; `preview` is
                the text of the piece read last. Raise `mt.Cancelled` in it to stop.

        Raises:
            InvalidInput: unreadable audio, hotwords that this model cannot read or write, a model without tokens.
            LimitExceeded: a batch that does not fit in memory.
        """
        check_callback(on_step)
        batch_size = check_whole(batch_size, "batch_size", 1)
        vocabulary, rate = self.vocabulary, self.config.sample_rate
        hotword_weight = check_number(hotword_weight, "hotword_weight", 0.0, 1.0)
        hotwords_NW = None if hotwords is None else self.embed_hotwords(hotwords)
        sources, is_list = as_list(audio)
        streams = [open_audio(source) for source in sources]
        samples = [0] * len(streams)  # read so far
        words: list[list[Word]] = [[] for _ in streams]
        announced = sum(stream.seconds or 0.0 for stream in streams)

        def pieces() -> Iterator[Segment]:
            for clip, stream in enumerate(streams):
                yield from segments(_counted(stream.blocks(BLOCK_SECONDS, rate), samples, clip), rate, clip)

        finished = -1.0
        for batch in _batches(pieces(), batch_size):
            text = ""
            for piece, said in zip(batch, self._recognize_pieces(batch, hotwords_NW, hotword_weight), strict=True):
                end = piece.start + len(piece.samples) / rate  # the last frame may reach beyond
                spans = [(min(piece.start + a, end), min(piece.start + b, end)) for a, b in said.seconds]
                new_words = vocabulary.words(said.ids, spans)
                words[piece.clip] += new_words
                text = Transcript(tuple(new_words), 0.0).text
            finished = sum(samples) / rate
            report(on_step, round(finished), max(1, round(max(announced, finished))), text)
        if finished < sum(samples) / rate:  # silence at the end
            seconds = max(1, round(sum(samples) / rate))
            report(on_step, seconds, seconds, "")
        transcripts = [Transcript(tuple(said), count / rate) for said, count in zip(words, samples, strict=True)]
        return transcripts if is_list else transcripts[0]

    def _recognize_pieces(self, batch: list[Segment], hotwords_NW: Tensor | None, weight: float) -> list[Recognition]:
        lengths_B = torch.tensor([len(piece.samples) for piece in batch], device=self.device)
        wave_BN = torch.nn.utils.rnn.pad_sequence([piece.samples for piece in batch], batch_first=True)
        try:
            features_BTF, lengths_B = self.frontend(wave_BN.to(self.device), lengths_B)
            return self.recognize(features_BTF, lengths_B, hotwords_NW, weight)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            way_out = f"use batch_size={len(batch) // 2}" if len(batch) > 1 else "not even one piece fits"
            raise LimitExceeded(
                f"{len(batch)} pieces of sound do not fit in the memory of {self.device}; {way_out}"
            ) from None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens' texts; InvalidInput when the config has none."""
        if not self.config.tokens:
            raise InvalidInput(f"{self.name} has no token texts: it can be trained, and not transcribe")
        return Vocabulary(self.config.tokens)

    def embed_hotwords(self, hotwords: Sequence[str] | str) -> Tensor | None:
        """Vectors [N + 1, W] of hotwords and of "no hotword"; None when there are none.

        Raises:
            InvalidInput: a model without the head for them, too many, or a word that its tokens cannot write.
        """
        if self.hotwords is None:
            raise InvalidInput(f"{self.name} takes no hotwords; a SeACo model such as paraformer-zh does")
        hotwords = [hotwords] if isinstance(hotwords, str) else list(hotwords)
        if len(hotwords) > MAX_HOTWORDS or not all(isinstance(word, str) and word.strip() for word in hotwords):
            raise InvalidInput(f"hotwords are at most {MAX_HOTWORDS} texts, none of them empty")
        if not hotwords:
            return None
        return self.hotwords.embed(self.decoder, with_no_hotword([self.vocabulary.encode(word) for word in hotwords]))

    def pack_network(self) -> None:
        """Lay the weights out for this CPU: faster, for inference only. Elsewhere nothing happens."""
        for network in (self.encoder, self.decoder, *([] if self.hotwords is None else [self.hotwords])):
            pack_for_inference(self, network)

    # Training (section 2.4).

    def forward(
        self, features_BTF: Tensor, lengths_B: Tensor, ids_BK: Tensor, counts_B: Tensor,
        rng: torch.Generator | None = None,
    ) -> GeneratorOutput:  # fmt: skip
        """The loss of clips and their texts; in training mode the features are masked at random.

        features_BTF, lengths_B: of `frontend`. ids_BK, counts_B: of the texts, without </s>; what lies past a row's
        count means nothing. The head for hotwords is left as it is.
        """
        if self.training:
            features_BTF = masked_features(features_BTF, rng=rng, stack=self.config.stack)
        frames_BTW, _ = self.encode(features_BTF, lengths_B)
        losses = self.training_pass(frames_BTW, lengths_B, ids_BK, counts_B, rng).losses
        return GeneratorOutput(losses["loss"], {name: loss.detach() for name, loss in losses.items()})

    def training_pass(
        self, frames_BTW: Tensor, lengths_B: Tensor, ids_BK: Tensor, counts_B: Tensor,
        rng: torch.Generator | None = None, order_BK: Tensor | None = None,
        lead: Callable[[Tensor], Tensor] | None = None,
    ) -> TrainingPass:  # fmt: skip
        """`forward` from the encoder's frames on. order_BK: for `GlancingSampler`.

        lead: turns the predicted rates into those that tokens are gathered by; their number is still learned from.
        """
        config = self.config
        inside_BT = _mask(lengths_B, frames_BTW.shape[1])
        target_BK, target_counts_B = ids_BK.masked_fill(~is_inside(counts_B, ids_BK.shape[1]), IGNORED), counts_B
        if config.ends_with_eos:
            target_BK = F.pad(target_BK, (0, 1), value=IGNORED).scatter(1, counts_B[:, None], EOS)
            target_counts_B = counts_B + 1
        longest = int(target_counts_B.max())
        target_BK = target_BK[:, :longest]
        inside_BK = is_inside(target_counts_B, longest)

        rates_BT = self.predictor(frames_BTW, inside_BT)
        led_BT = rates_BT if lead is None else lead(rates_BT)
        vectors_BKW = self.target_vectors(frames_BTW, led_BT, target_counts_B, longest)
        draft_BKV = mixed_BKW = None
        if config.glancing_ratio > 0:
            with torch.no_grad():
                draft_BKV = self.decoder(vectors_BKW, inside_BK, frames_BTW, inside_BT)
            true_BKW = self.decoder.embed(target_BK.clamp(min=0))
            draft_BK = draft_BKV.argmax(dim=-1)
            mixed_BKW, _ = self.sampler(vectors_BKW, true_BKW, draft_BK, target_BK, inside_BK, rng, order_BK)
        entering_BKW = vectors_BKW if mixed_BKW is None else mixed_BKW
        logits_BKV = self.decoder(entering_BKW, inside_BK, frames_BTW, inside_BT)

        per_token = config.loss_per_token
        tokens = token_loss(logits_BKV, target_BK, config.smoothing, per_token)
        counts = count_loss(rates_BT.sum(dim=1), target_counts_B, per_token)
        losses = {"tokens": tokens, "counts": counts, "loss": tokens + config.count_weight * counts}
        if self.ctc_head is not None:
            losses["ctc"] = self._ctc_loss(frames_BTW, lengths_B, ids_BK, counts_B)
            losses["loss"] = losses["loss"] + config.ctc_weight * (losses["ctc"] - tokens)
        if self.timestamps is not None:
            fine_B = self.fine_rates(frames_BTW, lengths_B, reads_padding=True).sum(dim=1)
            losses["fine_counts"] = count_loss(fine_B, target_counts_B, per_token)
            losses["loss"] = losses["loss"] + TIMESTAMP_LOSS_WEIGHT * losses["fine_counts"]
        named_BKV = logits_BKV if draft_BKV is None else draft_BKV
        losses["accuracy"] = (named_BKV.argmax(dim=-1) == target_BK)[inside_BK].float().mean()
        return TrainingPass(losses, target_BK, rates_BT, vectors_BKW, draft_BKV, mixed_BKW, logits_BKV)

    def target_vectors(self, frames_BTW: Tensor, rates_BT: Tensor, counts_B: Tensor, longest: int) -> Tensor:
        """The vectors [B, longest, W] of as many tokens as the target has, from rates scaled to that."""
        return integrate_and_fire(frames_BTW, scaled_to(rates_BT, counts_B), counts_B, longest)[0]

    def _ctc_loss(self, frames_BTW: Tensor, lengths_B: Tensor, ids_BK: Tensor, counts_B: Tensor) -> Tensor:
        log_probs_TBV = self.ctc_head(frames_BTW).float().log_softmax(dim=-1).transpose(0, 1)
        summed = F.ctc_loss(log_probs_TBV, ids_BK, lengths_B, counts_B, BLANK, reduction="sum", zero_infinity=True)
        return summed / len(ids_BK)


def hear(frames_BTW: Tensor, rates_BT: Tensor, lengths_B: Tensor, tail: float) -> Heard:
    """Tokens of frames and their rates, and of an empty frame at the end of each row that has the rate `tail`."""
    tail_B1 = rates_BT.new_full((len(rates_BT), 1), tail)
    rates_BT = F.pad(rates_BT, (0, 1)).scatter_add(1, lengths_B[:, None], tail_B1)
    vectors_BKW, counts_B = integrate_and_fire(F.pad(frames_BTW, (0, 0, 0, 1)), rates_BT)
    return Heard(vectors_BKW, counts_B, rates_BT)


def _mask(lengths_B: Tensor, length: int) -> Tensor | None:
    """bool [B, length], True inside each row; None where all rows are full, which saves the masking."""
    return None if bool((lengths_B >= length).all()) else is_inside(lengths_B, length)


def _counted(blocks: Iterator[Tensor], counts: list[int], clip: int) -> Iterator[Tensor]:
    for block_N in blocks:
        counts[clip] += len(block_N)
        yield block_N


def _batches(pieces: Iterator[Segment], batch_size: int) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released models, by our name."""
    stamped = {"timestamp_times": 3}
    return {
        "paraformer": {},
        "paraformer-long": stamped,
        "paraformer-en": stamped | {"vocab_size": 10020},
        "paraformer-zh": stamped | {"hotword_depth": 6},
    }
