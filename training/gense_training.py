"""Training GenSE: each crop of clean speech is made noisy anew, tokenized, and both language models learn to write the
clean tokens (arXiv 2502.02942, section 3.3; made noisy as in arXiv 2507.09929).

N2S and S2S read the true tokens before the one that they predict, S2S the true clean semantic tokens.

Shape suffixes: B batch, T samples, L semantic tokens, A acoustic tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..core.audio import Waveform
from ..core.errors import InvalidRecipe, TokenizerMismatch
from ..core.registry import load
from ..core.speech_tokenizer import SpeechTokenizer
from ..generators.gense import GenSE
from .data import SampleOrder, batch_positions
from .gense_start import align_chains
from .noisy_speech import NoisySpeech, validation_pairs, whole_frames
from .speech_data import SpeechFolder, TrainingSpeech, speech_batches
from .speech_trainer import SpeechTrainer, build_speech_model
from .tracker import Tracker

logger = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor]  # clean and noisy samples [B, T]
TokenBatch = tuple[Tensor, Tensor, Tensor, Tensor]  # semantic [B, L], acoustic [B, A]; noisy ones first


class TeacherForcing(nn.Module):
    """The losses of those of GenSE's language models that are trained; the other one is frozen."""

    def __init__(self, model: GenSE, trains: str):
        super().__init__()
        self.model, self.trains = model, trains
        if trains != "both":
            (model.s2s if trains == "n2s" else model.n2s).requires_grad_(False)

    def forward(
        self, noisy_BL: Tensor, clean_BL: Tensor, noisy_acoustic_BA: Tensor, clean_acoustic_BA: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss with gradient and detached metrics."""
        if self.trains == "both":
            output = self.model(noisy_BL, clean_BL, noisy_acoustic_BA, clean_acoustic_BA)
            return output.loss, output.metrics
        if self.trains == "n2s":
            loss, accuracy = self.model.n2s_loss(noisy_BL, clean_BL)
        else:
            loss, accuracy = self.model.s2s_loss(noisy_BL, clean_BL, noisy_acoustic_BA, clean_acoustic_BA)
        return loss, {f"{self.trains}_loss": loss.detach(), f"{self.trains}_accuracy": accuracy}


class KeptTokens:
    """The tokens of the first `count` pairs of `data`, each made when it first comes, in an endless order of `seed`.

    Which pair comes when is a pure function of the place in the run, as without keeping; a resumed run makes the tokens
    anew.
    """

    def __init__(self, count: int, data: NoisySpeech, tokens: Callable[[Tensor, Tensor], TokenBatch], seed: int):
        self.count, self.data, self.tokens = count, data, tokens
        self.index_of = SampleOrder(self, seed).index
        self.kept: dict[int, TokenBatch] = {}

    def __len__(self) -> int:
        return self.count

    def order(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.count)

    def batches(self, *place: int) -> Iterator[TokenBatch]:
        """Batches as `batch_positions` numbers them."""
        for positions in batch_positions(*place):
            indices = [self.index_of(position) for position in positions]
            if new := sorted(set(indices) - self.kept.keys()):
                clean, noisy = (torch.stack(part) for part in zip(*(self.data[i] for i in new), strict=True))
                for i, *rows in zip(new, *self.tokens(clean, noisy), strict=True):
                    self.kept[i] = tuple(rows)
            yield tuple(torch.stack(part) for part in zip(*(self.kept[i] for i in indices), strict=True))


class GenSETrainer(SpeechTrainer):
    """The run of an enhancer. The tokenizers are frozen."""

    exported_part = "model"

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        self.semantic, self.codec = (self._frozen(name) for name in (recipe.semantic, recipe.codec))
        facts = {
            "num_semantic": self.semantic.vocab_size, "num_acoustic": self.codec.vocab_size,
            "semantic_tokenizer": recipe.semantic, "semantic_fingerprint": self.semantic.fingerprint,
            "codec": recipe.codec, "codec_fingerprint": self.codec.fingerprint,
        }  # fmt: skip
        model = build_speech_model(recipe.model, facts, None if state is None else state["model_config"])
        try:
            model.use_tokenizers(self.semantic, self.codec)
        except TokenizerMismatch as error:
            raise InvalidRecipe(f"semantic, codec: {error}") from error
        if recipe.model.aligned_start and state is None:
            self._align(model)
        self.raw_model = TeacherForcing(model, recipe.model.trains).to(self.device).train()

    def _frozen(self, name: str) -> SpeechTokenizer:
        tokenizer = load(name)
        if not isinstance(tokenizer, SpeechTokenizer):
            raise InvalidRecipe(f"{name} holds a {type(tokenizer).__name__}, which is no tokenizer of speech")
        if not tokenizer.vocab_size:
            raise InvalidRecipe(f"{name} has no clusters yet; `python -m mediatok.training.kmeans` fits them")
        return tokenizer.requires_grad_(False).to(self.device)

    def _align(self, model: GenSE) -> None:
        hop_length = self.codec.hop_length
        if self.semantic.hop_length != hop_length:
            raise InvalidRecipe(
                f"model.aligned_start needs two tokenizers of one rate; {self.recipe.semantic} has a token every "
                f"{self.semantic.hop_length} samples, {self.recipe.codec} every {hop_length}"
            )
        num_tokens = self._crop_samples() // hop_length
        model.check_positions(num_tokens, num_tokens, num_tokens)
        align_chains(model, num_tokens, self.semantic.quantize.embedding.weight, self.codec.quantize.layer(0)[0])

    def _crop_samples(self) -> int:
        unit = math.lcm(self.semantic.hop_length, self.codec.hop_length)
        return whole_frames(self.recipe.data.seconds, self.codec.sample_rate, unit)

    def build_data(self) -> None:
        recipe, rate = self.recipe, self.codec.sample_rate
        num_samples = self._crop_samples()
        self.raw_model.model.check_positions(
            num_samples // self.semantic.hop_length, *[num_samples // self.codec.hop_length] * 2
        )
        source = SpeechFolder(recipe.data.train, self.train_split)
        speech = TrainingSpeech(source, recipe.data, rate, num_samples, recipe.run.seed)
        self.data = NoisySpeech(speech, recipe.noise)
        self.kept = None if recipe.crops is None else KeptTokens(recipe.crops, self.data, self._tokens, recipe.run.seed)
        self.val_clean_BT, self.val_noisy_BT = validation_pairs(
            SpeechFolder(*self.val_folder), recipe.data, recipe.noise, rate, num_samples
        )
        rows = zip(
            self.val_clean_BT.split(recipe.run.batch_size), self.val_noisy_BT.split(recipe.run.batch_size), strict=True
        )
        self.val_tokens = [self._tokens(clean_BT, noisy_BT) for clean_BT, noisy_BT in rows]
        logger.info("%d clips to train on, %d to validate", len(source), len(self.val_clean_BT))

    @torch.no_grad()
    def _tokens(self, clean_BT: Tensor, noisy_BT: Tensor) -> TokenBatch:
        both = torch.cat([noisy_BT, clean_BT]).to(self.device)
        return *self.semantic.encode_waveform(both).chunk(2), *self.codec.encode_waveform(both).chunk(2)

    def open_batches(self, first_batch: int) -> Iterator[Batch | TokenBatch]:
        accelerator = self.accelerator
        place = first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        return speech_batches(self.data, *place) if self.kept is None else self.kept.batches(*place)

    def train_on(self, batch: Batch | TokenBatch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.model(*(self._tokens(*batch) if self.kept is None else batch))
        return loss, metrics | {"total_loss": loss.detach()}

    def validate(self, model: TeacherForcing) -> dict[str, float]:
        """Losses and accuracies on held-out clips, in the same noise each time."""
        figures: dict[str, float] = {}
        for tokens in self.val_tokens:
            loss, metrics = model(*tokens)
            for name, value in (metrics | {"loss": loss}).items():
                share = len(tokens[0]) / len(self.val_clean_BT)
                figures[f"val_{name}"] = figures.get(f"val_{name}", 0.0) + float(value) * share
        return figures

    def show_samples(self, model: TeacherForcing, tracker: Tracker) -> None:
        rate, count = self.codec.sample_rate, self.recipe.run.num_samples
        noisy = [Waveform(wave_T, rate) for wave_T in self.val_noisy_BT[:count]]
        tracker.sounds(self.step, noisy, [model.model.enhance(clip, seed=0) for clip in noisy])
