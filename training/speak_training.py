"""Training Speak: texts go in, the tokens that a codec makes of their clips are what it learns to write.

A recogniser whose head for CTC finds the letters in the clips tells how long each lasts (as FastSpeech learns from a
teacher, Ren et al. 2019, arXiv 1905.09263, section 3.3). Tokens are then gathered by these lengths in the place of the
rates, which learn to be like them.

Shape suffixes: B batch, T characters, K tokens, N letters.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..core.audio import read_audio
from ..core.errors import InvalidRecipe, TokenizerMismatch
from ..core.generator import GeneratorOutput
from ..core.registry import load
from ..core.speech_tokenizer import SpeechTokenizer
from ..generators.paraformer import Paraformer
from ..generators.speak import Speak
from .data import SampleOrder, derived_seed
from .speak_data import SpokenClip, encode_clips
from .speech_trainer import SpeechTrainer, build_speech_model
from .text import SpokenFolder, alphabet_of
from .tracker import Tracker
from .utterances import ByLength, utterance_batches

logger = logging.getLogger(__name__)
LONGEST_LETTER = 0.15  # seconds; what follows until the next word is silence
SPOKEN_CLIPS = 8  # of the validation set


class SpeakBatch(NamedTuple):
    """Tokens [B, K] and texts [B, T], padded with zeros, and their lengths.

    durations_BT: of the characters, in tokens; fp32, all zero in a row where they are not known.
    """

    tokens_BK: Tensor
    counts_B: Tensor
    text_BT: Tensor
    lengths_B: Tensor
    durations_BT: Tensor

    def to(self, device: torch.device) -> SpeakBatch:
        return SpeakBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class SpeakClips(Dataset):
    """Item `position` is the clip at that place of the endless order of `seed`: its tokens, text and durations."""

    def __init__(self, model: Speak, clips: Sequence[SpokenClip], frame_rate: float, batch: int, seed: int):
        alphabet, frames = model.config.alphabet, frame_rate
        self.items = []
        for clip in clips:
            text = unicodedata.normalize("NFKC", clip.text).lower()
            known = "".join(c if c in alphabet or not c.isalnum() else " " for c in text)
            ids = model.encode_text(known)
            durations = character_durations([alphabet[i] for i in ids], clip.starts_N * frames, len(clip.ids_K), frames)
            self.items.append((clip.ids_K, torch.tensor(ids), durations))
        self.order = SampleOrder(ByLength([len(clip.ids_K) for clip in clips], batch), seed)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.items[self.order.index(position)]


def character_durations(characters: Sequence[str], starts_N: Tensor, count: int, frame_rate: float) -> Tensor:
    """How many tokens each character lasts, fp32 [T], `count` in all; zeros where its letters are not those aligned.

    starts_N: where each letter or digit begins, in tokens. It lasts until the next one; at the end of a word a part of
    that belongs to what stands between the words.
    """
    durations_T = torch.zeros(len(characters))
    letters = [place for place, character in enumerate(characters) if character.isalnum()]
    if not letters or len(letters) != len(starts_N):
        return durations_T
    edges = [*starts_N.clamp(0, count).tolist(), float(count)]
    durations_T[: letters[0]] = edges[0] / max(1, letters[0])
    for number, place in enumerate(letters):
        length = edges[number + 1] - edges[number]
        between = (letters[number + 1] if number + 1 < len(letters) else len(characters)) - place - 1
        own = min(length, LONGEST_LETTER * frame_rate) if between else length
        durations_T[place] = own
        durations_T[place + 1 : place + 1 + between] = (length - own) / max(1, between)
    return durations_T


def collated(items: Sequence[tuple[Tensor, Tensor, Tensor]]) -> SpeakBatch:
    """Items padded to one length."""
    tokens, texts, durations = (pad_sequence(rows, batch_first=True) for rows in zip(*items, strict=True))
    counts_B, lengths_B = (torch.tensor([len(item[part]) for item in items]) for part in (0, 1))
    return SpeakBatch(tokens, counts_B, texts, lengths_B, durations)


class SpeakTrainer(SpeechTrainer):
    """A speaker's run. The codec and the recogniser are frozen."""

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        self.codec = load(recipe.codec)
        if not isinstance(self.codec, SpeechTokenizer):
            raise InvalidRecipe(f"codec {recipe.codec} holds a {type(self.codec).__name__}, no codec")
        self.recogniser = None if recipe.recogniser is None else load(recipe.recogniser)
        if not isinstance(self.recogniser, Paraformer | None):
            raise InvalidRecipe(f"recogniser {recipe.recogniser} holds a {type(self.recogniser).__name__}")
        for network in (self.codec, self.recogniser):
            if network is not None:
                network.requires_grad_(False).to(self.device)
        with self.accelerator.main_process_first():
            self.clips = self._encoded(recipe.data.train, self.train_split, "train")
            self.val_clips = self._encoded(*self.val_folder, "val")[: recipe.data.max_val_clips]
        model = build_speech_model(recipe.model, self._facts(), None if state is None else state["model_config"])
        try:
            model.use_codec(self.codec)
        except TokenizerMismatch as error:
            raise InvalidRecipe(f"codec: {error}") from error
        self.raw_model = model.to(self.device).train()

    def _encoded(self, folder: str, split: str | None, name: str) -> list[SpokenClip]:
        recipe = self.recipe
        source = SpokenFolder(folder, split, recipe.data.transcripts)
        cache = recipe.output / f"{name}_tokens.safetensors"
        return encode_clips(source, self.codec, self.recogniser, recipe.data.max_seconds, cache)

    def _facts(self) -> dict:
        recipe = self.recipe
        alphabet = recipe.model.config.get("alphabet") or alphabet_of(clip.text for clip in self.clips)
        tokens = sum(len(clip.ids_K) for clip in self.clips)
        characters = sum(len(clip.text) for clip in self.clips)
        facts = {
            "vocab_size": self.codec.vocab_size, "codec": recipe.codec, "codec_fingerprint": self.codec.fingerprint,
            "alphabet": alphabet, "tokens_per_character": round(tokens / characters, 3),
        }  # fmt: skip
        if "tokens_per_character" in recipe.model.config:
            del facts["tokens_per_character"]
        return facts

    def build_data(self) -> None:
        recipe, model, rate = self.recipe, self.raw_model, self.codec.frame_rate
        batch_of_all = recipe.run.batch_size * self.accelerator.num_processes
        self.data = SpeakClips(model, self.clips, rate, batch_of_all, recipe.run.seed)
        val_items = SpeakClips(model, self.val_clips, rate, 1, 0).items
        size = recipe.run.batch_size
        self.val_batches = [collated(val_items[first : first + size]) for first in range(0, len(val_items), size)]
        known = sum(bool(durations.sum()) for _, _, durations in self.data.items)
        logger.info(
            "%d clips to train on, the lengths of characters known in %d, and %d to validate",
            len(self.clips), known, len(self.val_clips),
        )  # fmt: skip

    def open_batches(self, first_batch: int) -> Iterator[SpeakBatch]:
        accelerator, recipe = self.accelerator, self.recipe
        return utterance_batches(
            self.data, collated, first_batch, recipe.run.batch_size, accelerator.process_index,
            accelerator.num_processes, recipe.data.num_workers,
        )  # fmt: skip

    def train_on(self, batch: SpeakBatch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        seed = derived_seed(self.recipe.run.seed, self.step, self.accelerator.process_index, micro)
        output = self._losses(self.model, batch, torch.Generator().manual_seed(seed))
        metrics = {name: value for name, value in output.metrics.items() if name != "loss"}
        return output.loss, metrics | {"total_loss": output.loss.detach()}

    def _losses(self, model: torch.nn.Module, batch: SpeakBatch, rng: torch.Generator) -> GeneratorOutput:
        batch = batch.to(self.device)
        return model(batch.text_BT, batch.lengths_B, batch.tokens_BK, batch.counts_B, rng, batch.durations_BT)

    def validate(self, model: Speak) -> dict[str, float]:
        """Losses, with the same tokens shown each time, and the rate of characters that the recogniser gets wrong."""
        rng, figures = torch.Generator().manual_seed(0), {}
        for batch in self.val_batches:
            share = len(batch.counts_B) / len(self.val_clips)
            for name, value in self._losses(model, batch, rng).metrics.items():
                figures[f"val_{name}"] = figures.get(f"val_{name}", 0.0) + float(value) * share
        if self.recogniser is not None:
            import jiwer

            clips = self.val_clips[:SPOKEN_CLIPS]
            heard = self.recogniser.transcribe([model.speak(clip.text, seed=0) for clip in clips])
            figures["val_cer"] = jiwer.cer([clip.spoken for clip in clips], [said.text for said in heard])
        return figures

    def show_samples(self, model: Speak, tracker: Tracker) -> None:
        clips = self.val_clips[: self.recipe.run.num_samples]
        real = [read_audio(clip.path, self.codec.sample_rate) for clip in clips]
        tracker.sounds(self.step, real, [model.speak(clip.text, seed=0) for clip in clips])
