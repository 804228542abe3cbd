"""Training Paraformer: clips and their texts go in, the model's `forward` gives the loss (arXiv 2206.08317, section 2).

Features are normalized by statistics of the training set, which are taken once, when a new run starts.

The rates have to find the tokens by the losses on the tokens and on their number alone, which takes much data. Where a
run asks for it they learn from the head for CTC, which finds tokens sooner: on its likeliest way through the true text,
a token should be complete where that head begins to hear it, and nothing should be gathered elsewhere. The decoder
reads vectors that are gathered so. Rates that are scaled to the number of tokens of a whole clip, some of which have
been missed, would lead it ever further astray.

Shape suffixes: B batch, T samples, L feature vectors, F features, K tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..core.audio import Waveform
from ..core.errors import InvalidRecipe
from ..core.generator import GeneratorOutput
from ..generators.paraformer import Paraformer
from ..generators.paraformer_frontend import Frontend
from ..generators.paraformer_training import error_loss, masked_features
from ..nn.parallel import IGNORED
from .alignment import token_ends
from .data import derived_seed
from .speech_trainer import SpeechTrainer, build_speech_model
from .text import SpokenFolder, character_tokens
from .tracker import Tracker
from .utterances import TrainingUtterances, padded_batch, utterance_batches

logger = logging.getLogger(__name__)
MAX_MEASURED_CLIPS = 5000  # for the statistics of features
SMALLEST_DEVIATION = 1e-3
SMALLEST_RATE = 1e-4  # of which a logarithm is taken
Batch = tuple[Tensor, tuple[Tensor, list[str]]]  # samples [B, T], (their lengths [B], their texts)


class RecogniserLosses(nn.Module):
    """Paraformer's losses; besides, its rates led by its head for CTC, and the expected number of errors.

    alignment_weight, error_weight: of these two; 0 leaves them out.
    """

    def __init__(self, model: Paraformer, alignment_weight: float = 0.0, error_weight: float = 0.0):
        super().__init__()
        self.model, self.alignment_weight, self.error_weight = model, alignment_weight, error_weight

    def forward(
        self, features_BLF: Tensor, lengths_B: Tensor, ids_BK: Tensor, counts_B: Tensor, rng: torch.Generator
    ) -> GeneratorOutput:
        """As `Paraformer.forward`."""
        model = self.model
        if self.training:
            features_BLF = masked_features(features_BLF, rng=rng, stack=model.config.stack)
        frames_BLW, _ = model.encode(features_BLF, lengths_B)
        lead = None
        if self.alignment_weight:
            with torch.no_grad():
                log_probs_BLV = model.ctc_head(frames_BLW).float().log_softmax(dim=-1)
            ends_BL, sure_B = token_ends(log_probs_BLV, lengths_B, ids_BK, counts_B, model.config.ends_with_eos)

            def lead(rates_BL: Tensor) -> Tensor:
                return scaled_within(rates_BL, ends_BL, sure_B > 0)

        made = model.training_pass(frames_BLW, lengths_B, ids_BK, counts_B, rng, lead=lead)
        losses = dict(made.losses)
        if self.alignment_weight:
            losses["alignment"] = alignment_loss(made.rates_BT, ends_BL, lengths_B, sure_B)
            losses["loss"] = losses["loss"] + self.alignment_weight * losses["alignment"]
        if self.error_weight:
            targets = [[number for number in row if number != IGNORED] for row in made.target_BK.tolist()]
            counts_B = torch.tensor([len(row) for row in targets], device=counts_B.device)
            losses["errors"] = error_loss(made.logits_BKV, counts_B, targets, rng=rng)
            losses["loss"] = losses["loss"] + self.error_weight * losses["errors"]
        return GeneratorOutput(losses["loss"], {name: value.detach() for name, value in losses.items()})


def scaled_within(rates_BL: Tensor, ends_BL: Tensor, is_aligned_B: Tensor) -> Tensor:
    """The rates scaled so that each token gathers 1 by its end; nothing is left after the last. Others stay."""
    ends_BL = ends_BL.long()
    token_BL = ends_BL.cumsum(dim=1) - ends_BL  # the token that a frame belongs to
    some_BL = rates_BL.clamp(min=SMALLEST_RATE)
    sums_BL = torch.zeros_like(some_BL).scatter_add(1, token_BL, some_BL).gather(1, token_BL)
    is_within_BL = token_BL < ends_BL.sum(dim=1, keepdim=True)
    return torch.where(is_aligned_B[:, None], some_BL / sums_BL * is_within_BL, rates_BL)


def alignment_loss(rates_BL: Tensor, ends_BL: Tensor, lengths_B: Tensor, sure_B: Tensor) -> Tensor:
    """Cross-entropy of the rates, per token, where 1 is wanted of a token's end and 0 of all other frames.

    A clip counts by how sure CTC is of its tokens: at first hardly at all.
    """
    rates_BL = rates_BL.clamp(SMALLEST_RATE, 1 - SMALLEST_RATE)
    likely_BL = torch.where(ends_BL, rates_BL, 1 - rates_BL)
    inside_BL = torch.arange(rates_BL.shape[1], device=rates_BL.device) < lengths_B[:, None]
    return -(likely_BL.log() * inside_BL * sure_B[:, None]).sum() / ends_BL.sum().clamp(min=1)


class ParaformerTrainer(SpeechTrainer):
    """A recogniser's run."""

    exported_part = "model"

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        self.source = SpokenFolder(recipe.data.train, self.train_split, recipe.data.transcripts)
        facts = {}
        if recipe.model.init_from is None and not recipe.model.config.get("tokens"):
            tokens = character_tokens(self.source.texts)
            facts = {"tokens": tokens, "vocab_size": len(tokens)}
        model = build_speech_model(recipe.model, facts, None if state is None else state["model_config"])
        if recipe.model.alignment_weight and model.ctc_head is None:
            raise InvalidRecipe("model.alignment_weight needs the head for CTC, which model.init_from does not have")
        weights = recipe.model.alignment_weight, recipe.model.error_weight
        self.raw_model = RecogniserLosses(model, *weights).to(self.device).train()
        self.is_new = state is None and recipe.model.init_from is None

    def build_data(self) -> None:
        recipe, rate = self.recipe, self.raw_model.model.config.sample_rate
        batch_of_all = recipe.run.batch_size * self.accelerator.num_processes
        self.data = TrainingUtterances(self.source, recipe.data, rate, batch_of_all, recipe.run.seed)
        val_source = SpokenFolder(*self.val_folder, recipe.data.transcripts)
        whole = recipe.data.model_copy(update={"speeds": ()})
        val_data = TrainingUtterances(val_source, whole, rate, 1, 0)
        self.val_items = [val_data.clip(index) for index in range(min(len(val_data), recipe.data.max_val_clips))]
        logger.info("%d clips to train on, %d to validate", len(self.data), len(self.val_items))
        if self.is_new:
            measure_features(self.raw_model.model.frontend, self.data)

    def open_batches(self, first_batch: int) -> Iterator[Batch]:
        accelerator, recipe = self.accelerator, self.recipe
        return utterance_batches(
            self.data, padded_batch, first_batch, recipe.run.batch_size, accelerator.process_index,
            accelerator.num_processes, recipe.data.num_workers,
        )  # fmt: skip

    def train_on(self, batch: Batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        seed = derived_seed(self.recipe.run.seed, self.step, self.accelerator.process_index, micro)
        output = self.model(*self._inputs(batch), torch.Generator().manual_seed(seed))
        metrics = {name: value for name, value in output.metrics.items() if name != "loss"}
        return output.loss, metrics | {"total_loss": output.loss.detach()}

    @torch.no_grad()
    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features [B, L, F] and their lengths, ids [B, K] and theirs."""
        wave_BT, (lengths_B, texts) = batch
        wave_BT, lengths_B = wave_BT.to(self.device, non_blocking=True), lengths_B.to(self.device)
        model = self.raw_model.model
        features_BLF, lengths_B = model.frontend(wave_BT, lengths_B)
        ids = [torch.tensor(model.vocabulary.encode(text, unknown=True)) for text in texts]
        counts_B = torch.tensor([len(row) for row in ids], device=self.device)
        return features_BLF, lengths_B, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.device), counts_B

    def validate(self, model: RecogniserLosses) -> dict[str, float]:
        """Losses, with the same tokens shown each time, and the rates of wrong characters and words that it writes."""
        import jiwer

        rng, size, totals = torch.Generator().manual_seed(0), self.recipe.run.batch_size, {}
        for first in range(0, len(self.val_items), size):
            items = self.val_items[first : first + size]
            output = model(*self._inputs(padded_batch(items)), rng)
            for name, value in output.metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(items) / len(self.val_items)
        wanted = [text for _, text in self.val_items]
        written = self._transcribe(model.model, len(self.val_items))
        errors = {"cer": jiwer.cer(wanted, written), "wer": jiwer.wer(wanted, written)}
        return {f"val_{name}": value for name, value in (totals | errors).items()}

    def show_samples(self, model: RecogniserLosses, tracker: Tracker) -> None:
        count = min(self.recipe.run.num_samples, len(self.val_items))
        wanted = [text for _, text in self.val_items[:count]]
        lines = [f"{said}\n{heard}\n" for said, heard in zip(wanted, self._transcribe(model.model, count), strict=True)]
        tracker.texts(self.step, lines)

    def _transcribe(self, model: Paraformer, count: int) -> list[str]:
        clips = [Waveform(clip_T, model.config.sample_rate) for clip_T, _ in self.val_items[:count]]
        return [transcript.text for transcript in model.transcribe(clips)]


@torch.no_grad()
def measure_features(frontend: Frontend, data: TrainingUtterances) -> None:
    """Let features of `data` have mean 0 and deviation 1 from now on."""
    count, device = 0, frontend.cmvn.device
    sum_F, squares_F = torch.zeros(2, frontend.cmvn.shape[1], dtype=torch.float64, device=device)
    frontend.cmvn.copy_(torch.tensor([[0.0], [1.0]]))
    for index in range(min(len(data), MAX_MEASURED_CLIPS)):
        clip_T, _ = data.clip(index)
        features_LF = frontend(clip_T[None].to(device))[0][0].double()
        count += len(features_LF)
        sum_F += features_LF.sum(dim=0)
        squares_F += features_LF.square().sum(dim=0)
    mean_F = sum_F / count
    deviation_F = (squares_F / count - mean_F.square()).clamp(min=0).sqrt().clamp(min=SMALLEST_DEVIATION)
    frontend.cmvn.copy_(torch.stack([-mean_F, 1 / deviation_F]))
