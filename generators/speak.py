"""Text to speech tokens in parallel: Paraformer's chain (arXiv 2206.08317) the other way round.

There characters are fewer than frames, here tokens are more than characters: a character's rate is its duration in
tokens, and integrate-and-fire spreads it. All tokens of a character would get the same vector, so each is told where in
its character it lies. The decoder names all tokens in one pass, a draft; in a second pass it sees the half of them that
it was surest of, which is glancing at inference. A codec decodes the tokens.

Shape suffixes: B texts, T characters, K tokens, W width, V vocabulary.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..core.audio import Waveform
from ..core.base import Model, OnStep, check_callback, report
from ..core.companion import Companion, check_companion, load_companion
from ..core.errors import InvalidInput, LimitExceeded, TokenizerMismatch
from ..core.generator import GeneratorOutput, check_number, image_seeds
from ..core.speech_tokenizer import SpeechTokenizer
from ..kernels.cif import integrate_and_fire, mass
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

ALPHABET = " abcdefghijklmnopqrstuvwxyz'.,?!-"
MAX_TEXT = 10_000  # characters of a call
LONGEST = 200  # characters that are spoken in one pass; longer texts are cut between sentences, clauses, then words
MAX_TOKENS = 4096  # of one pass
PAUSE = 0.15  # seconds between passes
WAVES = 8  # of the code for the place in a character
SHOWN = 0.5  # of the draft, in the second pass


class Speak(Model):
    """Characters to the tokens of a codec, and with it to sound.

    Args:
        vocab_size: codes of the codec, which has one codebook.
        alphabet: the characters that the model knows; the first is a space.
        tokens_per_character: what an untrained model predicts.
        width: of all vectors. *_depth, *_heads, *_mlp_width, *_taps: of the layers; see `nn.sanm`.
        glancing_ratio, smoothing, count_weight: of training; see `nn.parallel`.
        codec, codec_fingerprint: the tokenizer's name, and which one exactly.
    """

    modality = "speech"
    _keep_in_fp32_modules = ["predictor"]  # sums of rates  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192,
        alphabet: str = ALPHABET,
        tokens_per_character: float = 4.0,
        width: int = 256,
        encoder_depth: int = 6,
        encoder_heads: int = 4,
        encoder_mlp_width: int = 1024,
        encoder_taps: int = 11,
        decoder_depth: int = 6,
        decoder_heads: int = 4,
        decoder_mlp_width: int = 1024,
        decoder_taps: int = 21,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        glancing_ratio: float = 0.5,
        smoothing: float = 0.1,
        count_weight: float = 1.0,
        codec: str | None = None,
        codec_fingerprint: str | None = None,
    ):
        super().__init__()
        if not alphabet.startswith(" ") or len(set(alphabet)) != len(alphabet):
            raise InvalidInput(f"an alphabet begins with a space and has no character twice, unlike {alphabet!r}")
        if not 0 < tokens_per_character <= MAX_TOKENS:
            raise InvalidInput(f"tokens_per_character={tokens_per_character!r} must be a number above 0")
        drops = {"dropout": dropout, "attention_dropout": attention_dropout}
        self.embedding = nn.Embedding(len(alphabet), width)
        self.encoder = Encoder(
            width, width, encoder_depth, encoder_heads, encoder_mlp_width, encoder_taps, **drops
        )  # fmt: skip
        self.predictor = RatePredictor(width, expands=True)
        self.place = Linear(WAVES + 1, width)
        self.sampler = GlancingSampler(glancing_ratio)
        self.decoder = ParallelDecoder(
            vocab_size, width, decoder_depth, decoder_heads, decoder_mlp_width, taps=decoder_taps, **drops
        )
        self._codec_box = Companion()
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # the encoder multiplies by the root of the width
        nn.init.normal_(self.predictor.out.weight, std=0.01)
        nn.init.constant_(self.predictor.out.bias, math.log(math.expm1(min(tokens_per_character, 50.0))))

    # Text.

    def encode_text(self, text: str) -> list[int]:
        """Character numbers of a text between two spaces, in lower case; unknown punctuation counts as a space.

        Raises:
            InvalidInput: a letter, digit or sign that is not in the alphabet.
        """
        alphabet, ids = self.config.alphabet, [0]
        for character in unicodedata.normalize("NFKC", text).lower():
            if character not in alphabet and unicodedata.category(character)[0] in "LMNS":
                raise InvalidInput(f"{self.name} cannot say {character!r}; it knows {alphabet!r}: spell it out")
            number = max(alphabet.find(character), 0)
            if number or ids[-1]:  # one space at a time
                ids.append(number)
        return ids if ids[-1] == 0 and len(ids) > 1 else [*ids, 0]

    # The chain.

    def encode(self, text_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Characters' vectors [B, T, W], zero past the end of each row, and their rates fp32 [B, T]."""
        inside_BT = is_inside(lengths_B, text_BT.shape[1])
        x_BTW = self.embedding(text_BT) * inside_BT[..., None]
        frames_BTW = self.encoder(x_BTW, inside_BT) * inside_BT[..., None]
        return frames_BTW, self.predictor(frames_BTW, inside_BT)

    def spread(self, frames_BTW: Tensor, rates_BT: Tensor, counts_B: Tensor, max_count: int) -> Tensor:
        """The vector [B, K, W] of each token: of the characters that it lies in, and of where it does."""
        vectors_BKW, _ = integrate_and_fire(frames_BTW, rates_BT, counts_B, max_count)
        return vectors_BKW + self.place(places(rates_BT.detach(), max_count).to(vectors_BKW.dtype))

    def decode(self, vectors_BKW: Tensor, counts_B: Tensor, frames_BTW: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits fp32 [B, K, V]."""
        inside_BK = is_inside(counts_B, vectors_BKW.shape[1])
        return self.decoder(vectors_BKW, inside_BK, frames_BTW, is_inside(lengths_B, frames_BTW.shape[1]))

    def forward(
        self, text_BT: Tensor, text_lengths_B: Tensor, tokens_BK: Tensor, counts_B: Tensor,
        rng: torch.Generator | None = None, durations_BT: Tensor | None = None,
    ) -> GeneratorOutput:  # fmt: skip
        """The training pass: cross-entropy of the tokens, the error of their number and of known durations.

        text_BT, text_lengths_B: of `encode_text`. tokens_BK, counts_B: of the codec. durations_BT: tokens that each
        character lasts, where that is known; all zero in other rows, and zero past their ends. Such rows are spread by
        them. What else lies past a row's end means nothing.
        """
        frames_BTW, predicted_BT = self.encode(text_BT, text_lengths_B)
        longest, rates_BT = int(counts_B.max()), predicted_BT
        durations = predicted_BT.new_zeros(())
        if durations_BT is not None:
            is_known_B1 = durations_BT.sum(dim=1, keepdim=True) > 0
            rates_BT = torch.where(is_known_B1, durations_BT, predicted_BT)
            inside_BT = is_inside(text_lengths_B, text_BT.shape[1]) & is_known_B1
            distance_BT = (predicted_BT.log1p() - durations_BT.log1p()).abs() * inside_BT
            durations = distance_BT.sum() / inside_BT.sum().clamp(min=1)
        inside_BK = is_inside(counts_B, longest)
        target_BK = tokens_BK[:, :longest].masked_fill(~inside_BK, IGNORED)
        vectors_BKW = self.spread(frames_BTW, scaled_to(rates_BT, counts_B), counts_B, longest)
        draft_BKV, shown_BK = None, torch.zeros_like(inside_BK)
        if self.config.glancing_ratio > 0:
            with torch.no_grad():
                draft_BKV = self.decode(vectors_BKW, counts_B, frames_BTW, text_lengths_B)
            true_BKW = self.decoder.embed(target_BK.clamp(min=0))
            vectors_BKW, shown_BK = self.sampler(
                vectors_BKW, true_BKW, draft_BKV.argmax(dim=-1), target_BK, inside_BK, rng
            )
        logits_BKV = self.decode(vectors_BKW, counts_B, frames_BTW, text_lengths_B)
        tokens = token_loss(logits_BKV, target_BK, self.config.smoothing)
        counts = count_loss(predicted_BT.sum(dim=1), counts_B)
        loss = tokens + durations + self.config.count_weight * counts
        draft_BKV = logits_BKV if draft_BKV is None else draft_BKV
        metrics = {
            "tokens": tokens.detach(), "counts": counts.detach(), "durations": durations.detach(),
            "shown": shown_BK[inside_BK].float().mean(),
            "accuracy": (draft_BKV.argmax(dim=-1) == target_BK)[inside_BK].float().mean(),
        }  # fmt: skip
        return GeneratorOutput(loss, metrics)

    # Speaking.

    @torch.inference_mode()
    def generate_ids(
        self, text_BT: Tensor, lengths_B: Tensor, rngs: Sequence[torch.Generator], temperature: float = 0.7
    ) -> tuple[Tensor, Tensor]:
        """Codec tokens int64 [B, K], zero past the end of each row, and their numbers int64 [B], at least 1.

        rngs: a generator for each row, on the CPU; a row is the same in every batch.
        """
        frames_BTW, rates_BT = self.encode(text_BT, lengths_B)
        counts_B = mass(rates_BT)[:, -1].round().clamp(1, MAX_TOKENS).long()
        longest = int(counts_B.max())
        inside_BK = is_inside(counts_B, longest)
        vectors_BKW = self.spread(frames_BTW, rates_BT, counts_B, longest)
        logits_BKV = self.decode(vectors_BKW, counts_B, frames_BTW, lengths_B)
        draft_BK, sure_BK = _drawn(logits_BKV, counts_B, rngs, temperature)
        order_BK = sure_BK.masked_fill(~inside_BK, -torch.inf).argsort(dim=1, descending=True, stable=True)
        is_first_BK = torch.arange(longest, device=counts_B.device) < (counts_B * SHOWN).long()[:, None]
        is_shown_BK = torch.zeros_like(inside_BK).scatter(1, order_BK, is_first_BK)
        shown_BKW = self.decoder.embed(draft_BK)
        vectors_BKW = torch.where(is_shown_BK[..., None], shown_BKW, vectors_BKW.to(shown_BKW.dtype))
        logits_BKV = self.decode(vectors_BKW, counts_B, frames_BTW, lengths_B)
        final_BK, _ = _drawn(logits_BKV, counts_B, rngs, temperature)
        return torch.where(is_shown_BK, draft_BK, final_BK) * inside_BK, counts_B

    @torch.inference_mode()
    def speak(
        self, text: str, *, seed: int | None = None, temperature: float = 0.7, on_step: OnStep | None = None
    ) -> Waveform:
        """Say a text of up to 10,000 characters.

        Args:
            seed: of the first piece (a sentence or so), the others take the next numbers; drawn when None.
            temperature: 0 takes the likeliest tokens, 1 draws them by their probability; up to 10.
            on_step: called after each piece with how many are spoken, and of how many; raise `mt.Cancelled` to stop.

        Returns a mono `Waveform` at the codec's sample rate.

        Raises:
            InvalidInput: nothing to say, characters outside the alphabet, values out of range.
            TokenizerMismatch: the codec is not the one that this model was trained with.
        """
        check_callback(on_step)
        temperature = check_number(temperature, "temperature", 0.0, 10.0)
        if not isinstance(text, str) or not any(character.isalnum() for character in text):
            raise InvalidInput(f"there is nothing to say in {str(text)[:60]!r}")
        if len(text) > MAX_TEXT:
            raise LimitExceeded(f"a text has at most {MAX_TEXT} characters, not {len(text)}; say it in parts")
        pieces = [self.encode_text(piece) for piece in split_text(text)]
        first_seed = image_seeds(seed, 1)[0]
        codec, spoken = self.codec, []
        for number, ids in enumerate(pieces):
            rng = torch.Generator().manual_seed(image_seeds(first_seed, number + 1)[-1])
            text_1T = torch.tensor([ids], device=self.device)
            lengths_1 = torch.tensor([len(ids)], device=self.device)
            tokens_1K, _ = self.generate_ids(text_1T, lengths_1, [rng], temperature)
            spoken.append(codec.decode_ids(tokens_1K)[0].float().cpu())
            if number + 1 < len(pieces):
                spoken.append(torch.zeros(round(PAUSE * codec.sample_rate)))
            report(on_step, number + 1, len(pieces))
        return Waveform(torch.cat(spoken)[None], codec.sample_rate)

    def pack_network(self) -> None:
        """Lay the weights out for this CPU: faster, for inference only. Elsewhere nothing happens."""
        for network in (self.encoder, self.decoder):
            pack_for_inference(self, network)

    # The codec.

    @property
    def codec(self) -> SpeechTokenizer:
        """The codec that decodes what this model says, loaded on first use; it follows this model's device."""
        if self._codec_box.tokenizer is None:
            way_out = "give it one with use_codec(mt.load(...))"
            self.use_codec(load_companion(self, self.config.codec, way_out, "codec"))
        return self._codec_box.on(self.device)

    def use_codec(self, codec: SpeechTokenizer) -> None:
        """Decode with `codec` from now on.

        Raises:
            TokenizerMismatch: it has other tokens, or this model was trained with another one.
        """
        if not isinstance(codec, SpeechTokenizer):
            raise InvalidInput(f"{self.name} needs a speech tokenizer, not {type(codec).__name__}")
        if (codec.num_codebooks, codec.vocab_size) != (1, self.config.vocab_size):
            raise TokenizerMismatch(
                f"{self.name} says {self.config.vocab_size} tokens, one at a time, and {codec.name} has "
                f"{codec.vocab_size}, {codec.num_codebooks} at a time"
            )
        check_companion(self, codec, self.config.codec, self.config.codec_fingerprint)
        self._codec_box.tokenizer = codec


def places(rates_BT: Tensor, max_count: int) -> Tensor:
    """Where tokens lie in their characters, fp32 [B, K, WAVES + 1]: cosines of the part that is over, and the duration.

    A token lies in the character in which half of it is complete.
    """
    mass_BT = mass(rates_BT)
    middle_BK = (torch.arange(max_count, device=rates_BT.device) + 0.5).double().expand(len(rates_BT), -1).contiguous()
    unit_BK = torch.searchsorted(mass_BT, middle_BK).clamp(max=rates_BT.shape[1] - 1)
    until_BK, rate_BK = mass_BT.gather(1, unit_BK), rates_BT.double().gather(1, unit_BK)
    over_BK = (1 - (until_BK - middle_BK) / rate_BK.clamp(min=1e-6)).clamp(0, 1)
    waves_W = torch.arange(1, WAVES + 1, device=rates_BT.device) * math.pi
    return torch.cat([(over_BK[..., None] * waves_W).cos(), rate_BK.log1p()[..., None]], dim=-1).float()


def _drawn(
    logits_BKV: Tensor, counts_B: Tensor, rngs: Sequence[torch.Generator], temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens [B, K] drawn from softmax(logits / temperature), and the log-probability that the model gives each."""
    log_probs_BKV = logits_BKV.log_softmax(dim=-1)
    if temperature == 0:
        return log_probs_BKV.argmax(dim=-1), log_probs_BKV.amax(dim=-1)
    scores_BKV = log_probs_BKV / temperature
    for row, (count, rng) in enumerate(zip(counts_B.tolist(), rngs, strict=True)):
        # argmax(log p - log noise) is a draw from p for exponential noise; half of fp32's smallest draw stands for 0.
        noise_KV = torch.empty(count, scores_BKV.shape[2]).exponential_(generator=rng).clamp_(min=2.0**-25)
        scores_BKV[row, :count] -= noise_KV.log_().to(scores_BKV.device)
    drawn_BK = scores_BKV.argmax(dim=-1)
    return drawn_BK, log_probs_BKV.gather(2, drawn_BK[..., None])[..., 0]


def split_text(text: str, longest: int = LONGEST) -> list[str]:
    """Pieces of at most `longest` characters that hold a letter or digit: sentences, joined while they fit."""
    pieces = [text]
    for boundary in (r"(?<=[.!?])\s+", r"(?<=[,;:])\s+", r"\s+"):
        pieces = [part for piece in pieces for part in (re.split(boundary, piece) if len(piece) > longest else [piece])]
    pieces = [piece[start : start + longest] for piece in pieces for start in range(0, len(piece), longest)]
    joined: list[str] = []
    for piece in pieces:
        if joined and len(joined[-1]) + 1 + len(piece) <= longest:
            joined[-1] += " " + piece
        else:
            joined.append(piece)
    return [piece for piece in joined if any(character.isalnum() for character in piece)]
