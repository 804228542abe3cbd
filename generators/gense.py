"""GenSE: speech enhancement as two language models over tokens (Yao et al. 2025, arXiv 2502.02942).

Noisy speech becomes semantic tokens (what is said) and acoustic tokens (a codec's). N2S, "noise to semantic", writes
the clean semantic tokens behind the noisy ones. S2S, "semantic to speech", reads

    noisy semantic, clean semantic, <begin>, noisy acoustic

and writes the clean acoustic tokens, which the codec decodes. The noisy acoustic tokens in this prompt carry the voice
("token chain prompting", section 3.3). Long clips go through in windows, which are cross-faded.

Positions restart within a sequence: in N2S behind <begin>, in S2S at the acoustic tokens, of which the new ones count
from 1000.

Shape suffixes: B clips, T semantic tokens, A acoustic tokens, N windows, S samples, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..core.audio import Waveform, read_audio
from ..core.base import Model, OnStep, check_callback, report
from ..core.companion import Companion, check_companion, load_companion
from ..core.errors import InvalidInput, LimitExceeded, TokenizerMismatch
from ..core.generator import check_flag, check_number, image_seeds
from ..core.memory import available_memory
from ..core.sizes import check_whole
from ..core.speech_tokenizer import SpeechTokenizer
from ..kernels.linear import pack_for_inference
from ..nn.gpt2 import GPT2
from .gense_windows import WindowPlan

BEGIN = 1  # 0 pads and 2 ends in the official vocabulary; neither is ever written
FIRST_ID = 3  # of the semantic tokens; the acoustic ones follow them
NEW_POSITION = 1000  # of the first acoustic token that S2S writes
TEMPERATURES = (0.01, 10.0)


@dataclass(frozen=True)
class GenSESettings:
    """How tokens are chosen: the likeliest (`greedy`), or drawn from softmax(logits / temperature)."""

    greedy: bool
    temperature: float


@dataclass
class GenSEOutput:
    """Result of the training pass: `loss` is the sum of the two others, all 0-d with gradient; detached `metrics`."""

    loss: Tensor
    n2s_loss: Tensor
    s2s_loss: Tensor
    metrics: dict[str, Tensor]


class ExponentialNoise:
    """Exp(1) noise of a batch, each clip's from its own generator: argmax(p / noise) is a draw from p."""

    def __init__(self, rngs: Sequence[torch.Generator]):
        self.rngs = rngs

    def draw(self, model: str, step: int, num_ids: int) -> Tensor:
        """Of token number `step` of "n2s" or "s2s": fp32 [B, V]."""
        noise_BV = torch.stack([torch.empty(num_ids).exponential_(generator=rng) for rng in self.rngs])
        return noise_BV.clamp_(min=2.0**-25)  # half of the smallest draw in fp32 but 0, which would win against any p


class GenSE(Model):
    """Speech enhancement by N2S and S2S.

    Args:
        num_semantic, num_acoustic: codes of the two tokenizers.
        hidden_size, num_hidden_layers, num_attention_heads: of both language models.
        n2s_positions, s2s_positions: rows of their position tables.
        dropout: in training.
        semantic_tokenizer, codec: names of the tokenizers, with their fingerprints.
    """

    modality = "speech"

    @register_to_config
    def __init__(
        self,
        num_semantic: int = 1024,
        num_acoustic: int = 8192,
        hidden_size: int = 1024,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        n2s_positions: int = 2048,
        s2s_positions: int = 4096,
        dropout: float = 0.1,
        semantic_tokenizer: str | None = None,
        semantic_fingerprint: str | None = None,
        codec: str | None = None,
        codec_fingerprint: str | None = None,
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise InvalidInput(f"hidden_size {hidden_size} is not divisible by {num_attention_heads} heads")
        sizes = (hidden_size, num_hidden_layers, num_attention_heads, dropout)
        self.semantic_ids = slice(FIRST_ID, FIRST_ID + num_semantic)
        self.acoustic_ids = slice(self.semantic_ids.stop, self.semantic_ids.stop + num_acoustic)
        self.n2s = GPT2(self.semantic_ids.stop, n2s_positions, *sizes)
        self.s2s = GPT2(self.acoustic_ids.stop, s2s_positions, *sizes)
        self._semantic_box, self._codec_box = Companion(), Companion()

    # The sequences (section 3.3).

    def n2s_prompt(self, noisy_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, T + 1] and positions [T + 1] of what N2S continues."""
        begin_B1 = torch.full_like(noisy_BT[:, :1], BEGIN)
        prompt = torch.cat([noisy_BT + self.semantic_ids.start, begin_B1], dim=1)
        return prompt, torch.arange(prompt.shape[1], device=prompt.device)

    def s2s_prompt(self, noisy_BT: Tensor, clean_BT: Tensor, acoustic_BA: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, 2T + 1 + A] and positions [2T + 1 + A] of what S2S continues."""
        begin_B1 = torch.full_like(noisy_BT[:, :1], BEGIN)
        semantic = torch.cat([noisy_BT, clean_BT], dim=1) + self.semantic_ids.start
        prompt = torch.cat([semantic, begin_B1, acoustic_BA + self.acoustic_ids.start], dim=1)
        chain, voice = semantic.shape[1] + 1, acoustic_BA.shape[1]
        position = torch.arange(max(chain, voice), device=prompt.device)
        return prompt, torch.cat([position[:chain], position[:voice]])

    # Training.

    def forward(
        self, noisy_semantic_BT: Tensor, clean_semantic_BT: Tensor, noisy_acoustic_BA: Tensor, clean_acoustic_BA: Tensor
    ) -> GenSEOutput:
        """Losses of both models, each with the true tokens before the one that it predicts: the training pass.

        Tokens are those of the tokenizers, int64. S2S reads the true clean semantic tokens. Only what is to be written
        counts, not the prompts.
        """
        n2s_loss, n2s_accuracy = self.n2s_loss(noisy_semantic_BT, clean_semantic_BT)
        s2s_loss, s2s_accuracy = self.s2s_loss(
            noisy_semantic_BT, clean_semantic_BT, noisy_acoustic_BA, clean_acoustic_BA
        )
        metrics = {
            "n2s_loss": n2s_loss.detach(), "n2s_accuracy": n2s_accuracy,
            "s2s_loss": s2s_loss.detach(), "s2s_accuracy": s2s_accuracy,
        }  # fmt: skip
        return GenSEOutput(n2s_loss + s2s_loss, n2s_loss, s2s_loss, metrics)

    def n2s_loss(self, noisy_BT: Tensor, clean_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of the clean semantic tokens, and how many are the likeliest ones."""
        prompt, positions = self.n2s_prompt(noisy_BT)
        new_positions = torch.arange(clean_BT.shape[1], device=clean_BT.device)
        return self.n2s.continuation_loss(prompt, positions, clean_BT + self.semantic_ids.start, new_positions)

    def s2s_loss(
        self, noisy_BT: Tensor, clean_BT: Tensor, noisy_acoustic_BA: Tensor, clean_acoustic_BA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of the clean acoustic tokens, and how many are the likeliest ones."""
        prompt, positions = self.s2s_prompt(noisy_BT, clean_BT, noisy_acoustic_BA)
        new_positions = NEW_POSITION + torch.arange(clean_acoustic_BA.shape[1], device=clean_BT.device)
        written = clean_acoustic_BA + self.acoustic_ids.start
        return self.s2s.continuation_loss(prompt, positions, written, new_positions)

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: to the matrices, not to norms, biases and embeddings."""
        return parameter.ndim >= 2 and ".blocks." in name

    # Generating tokens.

    def settings(self, greedy: bool = False, temperature: float = 1.0) -> GenSESettings:
        """Checked settings of a run.

        Raises:
            InvalidInput: `greedy` is no bool, or `temperature` no number from 0.01 to 10.
        """
        temperature = check_number(temperature, "temperature", *TEMPERATURES)
        return GenSESettings(check_flag(greedy, "greedy"), temperature)

    def generate_ids(
        self,
        noisy_semantic_BT: Tensor,
        noisy_acoustic_BA: Tensor,
        settings: GenSESettings,
        rngs: Sequence[torch.Generator] = (),
        num_acoustic: int | None = None,
        on_step: Callable[[int], None] | None = None,
        noise: ExponentialNoise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clean semantic tokens [B, T] and clean acoustic ones, int64, of noisy ones [B, T] and [B, A].

        Args:
            rngs: a generator for each clip, on the CPU; not needed when greedy.
            num_acoustic: acoustic tokens to write, A unless given. The official code writes `official_length(T, A)`.
            on_step: called with the number of tokens written so far, of T + A in all.
            noise: replaces the noise of `rngs`.

        Raises:
            LimitExceeded: more tokens than the position tables have rows for.
        """
        noise = ExponentialNoise(rngs) if noise is None else noise
        num_semantic = noisy_semantic_BT.shape[1]
        num_acoustic = noisy_acoustic_BA.shape[1] if num_acoustic is None else num_acoustic
        self.check_positions(num_semantic, noisy_acoustic_BA.shape[1], num_acoustic)

        def chooser(model: str) -> Callable[[int, Tensor], Tensor]:
            def choose(step: int, logits_BV: Tensor) -> Tensor:
                if settings.greedy:
                    return logits_BV.argmax(dim=-1)
                chance_BV = torch.softmax(logits_BV / settings.temperature, dim=-1)
                return (chance_BV / noise.draw(model, step, logits_BV.shape[1]).to(chance_BV)).argmax(dim=-1)

            return choose

        def step_behind(before: int) -> Callable[[int], None] | None:
            return None if on_step is None else lambda step: on_step(before + step)

        prompt, positions = self.n2s_prompt(noisy_semantic_BT)
        new = torch.arange(num_semantic, device=prompt.device)
        written = self.n2s.generate(prompt, positions, new, chooser("n2s"), self.semantic_ids, step_behind(0))
        clean_semantic_BT = written - self.semantic_ids.start

        prompt, positions = self.s2s_prompt(noisy_semantic_BT, clean_semantic_BT, noisy_acoustic_BA)
        new = NEW_POSITION + torch.arange(num_acoustic, device=prompt.device)
        written = self.s2s.generate(
            prompt, positions, new, chooser("s2s"), self.acoustic_ids, step_behind(num_semantic)
        )
        return clean_semantic_BT, written - self.acoustic_ids.start

    def check_positions(self, num_semantic: int, num_noisy: int, num_acoustic: int) -> None:
        """Raise LimitExceeded where a clip of so many tokens has no place in a position table."""
        n2s, s2s = self.n2s.num_positions, self.s2s.num_positions
        if num_semantic + 1 > n2s or max(2 * num_semantic + 1, num_noisy, NEW_POSITION + num_acoustic - 1) > s2s:
            raise LimitExceeded(
                f"{num_semantic} semantic and {num_acoustic} acoustic tokens at once are more than {self.name} has "
                f"positions for ({n2s} and {s2s}); give it shorter pieces"
            )

    # Enhancing sound.

    @torch.inference_mode()
    def enhance(
        self,
        audio,
        *,
        seed: int | None = None,
        greedy: bool = False,
        temperature: float = 1.0,
        batch_size: int = 4,
        on_step: OnStep | None = None,
    ) -> Waveform:
        """Clean speech from noisy speech, of any length.

        Up to 10 s are enhanced at once. More is cut into windows of 10 s, spread evenly and overlapping by a second or
        more, and joined by linear cross-fades of a second in the middle of their overlaps. Where the position tables
        are too short for 10 s, windows are as long as they allow.

        Args:
            audio: path, bytes of a file or `Waveform`; any rate and number of channels, mixed to mono.
            seed: of the first window, the others take the next numbers; drawn when None.
            greedy: take the likeliest tokens, without any chance. temperature: below 1, draws are more careful.
            batch_size: windows that are written together.
            on_step: called as on_step(tokens, total) after each token; raise `mt.Cancelled` in it to stop.

        Returns a mono `Waveform` at the codec's sample rate, as long as `audio`.

        Raises:
            InvalidInput: unreadable audio, and values out of range.
            LimitExceeded: a batch that does not fit in memory.
            TokenizerMismatch: a tokenizer is not the one that this model was trained with.
        """
        settings = self.settings(greedy, temperature)
        batch_size = check_whole(batch_size, "batch_size", 1)
        check_callback(on_step)
        first_seed = image_seeds(seed, 1)[0]
        semantic, codec = self.semantic_tokenizer, self.codec
        samples_S = read_audio(audio, codec.sample_rate).samples[0]
        cut = self.window_plan(len(samples_S))
        seeds = image_seeds(first_seed, len(cut.starts))
        noisy_NS = cut.windows(samples_S)
        per_window = cut.size // semantic.hop_length + cut.size // codec.hop_length
        batch_size = min(batch_size, len(noisy_NS))
        self.check_memory(batch_size, cut.size)
        clean, done, total = [], 0, per_window * len(noisy_NS)
        for rows in torch.arange(len(noisy_NS)).split(batch_size):
            noisy_BS = noisy_NS[rows].to(self.device)
            rngs = [torch.Generator().manual_seed(seeds[row]) for row in rows]

            def show(step: int, done: int = done, rows: int = len(rows)) -> None:
                report(on_step, done + step * rows, total)

            ids = semantic.encode_waveform(noisy_BS), codec.encode_waveform(noisy_BS)
            clean.append(codec.decode_ids(self.generate_ids(*ids, settings, rngs, on_step=show)[1]).float().cpu())
            done += per_window * len(rows)
        return Waveform(cut.join(torch.cat(clean))[None, : len(samples_S)], codec.sample_rate)

    def window_plan(self, num_samples: int) -> WindowPlan:
        """How a clip of so many samples is cut."""
        semantic_hop, codec_hop = self.semantic_tokenizer.hop_length, self.codec.hop_length
        n2s, s2s = self.n2s.num_positions, self.s2s.num_positions
        largest = min(min(n2s - 1, (s2s - 1) // 2) * semantic_hop, (s2s + 1 - NEW_POSITION) * codec_hop)
        unit = math.lcm(semantic_hop, codec_hop)
        if largest < unit:
            raise LimitExceeded(f"{self.name} has not positions enough for any sound ({n2s} and {s2s})")
        return WindowPlan.make(num_samples, self.codec.sample_rate, unit, largest)

    def check_memory(self, batch_size: int, num_samples: int) -> None:
        """Refuse a batch of windows whose keys and values would not fit in what is free on this model's device."""
        semantic, acoustic = num_samples // self.semantic_tokenizer.hop_length, num_samples // self.codec.hop_length
        tokens = 2 * semantic + 2 * acoustic
        per_window = 4 * tokens * self.config.hidden_size * (2 * self.config.num_hidden_layers + 8)
        fitting = available_memory(self.device) // per_window
        if batch_size > fitting:
            way_out = f"use batch_size={fitting}" if fitting else "not even one fits"
            raise LimitExceeded(
                f"{batch_size} windows at once need about {batch_size * per_window / 2**30:.1f} GiB on {self.device}, "
                f"more than is free; {way_out}"
            )

    def pack_network(self) -> None:
        """Lay the weights out for this processor, in their place: the same sound, sooner.

        From then on the model can only generate: to train, save or move it, load it again. Does nothing where the
        model is not on the CPU, or torch lacks oneDNN.
        """
        pack_for_inference(self, self.n2s)
        pack_for_inference(self, self.s2s)

    # The tokenizers.

    @property
    def semantic_tokenizer(self) -> SpeechTokenizer:
        """The semantic tokenizer, loaded on first use; it follows this model's device."""
        if self._semantic_box.tokenizer is None:
            way_out = "give it one with use_tokenizers(semantic=mt.load(...))"
            self.use_tokenizers(
                semantic=load_companion(self, self.config.semantic_tokenizer, way_out, "semantic tokenizer")
            )
        return self._semantic_box.on(self.device)

    @property
    def codec(self) -> SpeechTokenizer:
        """The codec, loaded on first use; it follows this model's device."""
        if self._codec_box.tokenizer is None:
            way_out = "give it one with use_tokenizers(codec=mt.load(...))"
            self.use_tokenizers(codec=load_companion(self, self.config.codec, way_out, "codec"))
        return self._codec_box.on(self.device)

    def use_tokenizers(self, semantic: SpeechTokenizer | None = None, codec: SpeechTokenizer | None = None) -> None:
        """Use these tokenizers from now on; None leaves the one that is there.

        Raises:
            TokenizerMismatch: this model was trained with another one, or one that has other tokens.
        """
        config = self.config
        if semantic is not None:
            self._check_tokens(semantic, config.num_semantic)
            check_companion(self, semantic, config.semantic_tokenizer, config.semantic_fingerprint)
        if codec is not None:
            self._check_tokens(codec, config.num_acoustic)
            check_companion(self, codec, config.codec, config.codec_fingerprint)
        semantic, codec = semantic or self._semantic_box.tokenizer, codec or self._codec_box.tokenizer
        if semantic is not None and codec is not None and semantic.sample_rate != codec.sample_rate:
            raise TokenizerMismatch(
                f"{semantic.name} hears {semantic.sample_rate} samples a second and {codec.name} {codec.sample_rate}"
            )
        self._semantic_box.tokenizer, self._codec_box.tokenizer = semantic, codec

    def _check_tokens(self, tokenizer: SpeechTokenizer, size: int) -> None:
        if not isinstance(tokenizer, SpeechTokenizer):
            raise InvalidInput(f"{self.name} needs speech tokenizers, not {type(tokenizer).__name__}")
        if (tokenizer.num_codebooks, tokenizer.vocab_size) != (1, size):
            raise TokenizerMismatch(
                f"{self.name} knows {size} tokens, one at a time, and {tokenizer.name} has {tokenizer.vocab_size} of "
                f"them, {tokenizer.num_codebooks} at a time"
            )


def official_length(num_semantic: int, num_acoustic: int) -> int:
    """How many acoustic tokens the official code writes: A where A = 2T, as with a codec of 100 tokens a second.

    With one of 50 a second it writes half as many again as there should be.
    """
    return (2 * num_semantic + num_acoustic) // 2


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released model."""
    return {"gense": {}}
