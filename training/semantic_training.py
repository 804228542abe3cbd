"""Self-training of the encoder of semantic tokens by masked prediction (HuBERT, Hsu et al. 2021, first iteration).

Cepstra of the speech are clustered; spans of what the encoder sees are masked, and it predicts the clusters of the
frames that it cannot see. Some clips are made noisy, their targets are not (WavLM, Chen et al. 2022, section III-C).
The head that predicts is left behind, and `python -m mediatok.training.kmeans` then clusters what the encoder hears.

Shape suffixes: B batch, T samples, L frames, D width, C cepstra, K clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from ..core.errors import InvalidRecipe
from ..tokenizers.speech.semantic import RIGHT_PAD, SemanticTokenizer
from .build import config_of, construct
from .clusters import fit_clusters
from .data import derived_seed
from .noisy_speech import NoisySpeech, validation_pairs, whole_frames
from .speech_data import SpeechFolder, TrainingSpeech, speech_batches
from .speech_trainer import SpeechTrainer, build_speech_model
from .tracker import Tracker

logger = logging.getLogger(__name__)
WINDOW_SECONDS = 0.025
CEPSTRA, MELS = 13, 40
MAX_FITTED_FRAMES = 200_000
Batch = tuple[Tensor, Tensor]  # clean and noisy samples [B, T]


class CepstralTargets(nn.Module):
    """The cluster of each frame's cepstrum, with its first and second derivative."""

    def __init__(self, sample_rate: int, hop_length: int, num_clusters: int):
        super().__init__()
        window = round(WINDOW_SECONDS * sample_rate)
        self.pad = max(0, window - hop_length)  # so that there is a frame for each hop
        mel = {"n_fft": window, "hop_length": hop_length, "n_mels": MELS, "center": False}
        self.cepstrum = torchaudio.transforms.MFCC(sample_rate, CEPSTRA, melkwargs=mel)
        self.register_buffer("scaling", torch.zeros(2, 3 * CEPSTRA))
        self.register_buffer("centres", torch.zeros(num_clusters, 3 * CEPSTRA))

    def features(self, wave_BT: Tensor) -> Tensor:
        """fp32 [B, L, 3C] of clips of whole frames."""
        cepstra_BCL = self.cepstrum(F.pad(wave_BT, (0, self.pad)))
        slopes_BCL = torchaudio.functional.compute_deltas(cepstra_BCL)
        bends_BCL = torchaudio.functional.compute_deltas(slopes_BCL)
        return torch.cat([cepstra_BCL, slopes_BCL, bends_BCL], dim=1).transpose(1, 2)

    def fit(self, features_NC: Tensor, rng: torch.Generator) -> None:
        """Cluster features [N, 3C], each channel scaled to a deviation of 1."""
        mean_C, deviation_C = features_NC.mean(dim=0), features_NC.std(dim=0).clamp(min=1e-3)
        self.scaling.copy_(torch.stack([mean_C, deviation_C]))
        self.centres.copy_(fit_clusters((features_NC - mean_C) / deviation_C, len(self.centres), rng))

    def forward(self, wave_BT: Tensor) -> Tensor:
        """Numbers of the clusters, int64 [B, L]."""
        features_BLC = (self.features(wave_BT) - self.scaling[0]) / self.scaling[1]
        return torch.cdist(features_BLC, self.centres[None]).argmin(dim=-1)


class MaskedPrediction(nn.Module):
    """The encoder of `tokenizer`, and what it is trained with."""

    def __init__(self, tokenizer: SemanticTokenizer, num_targets: int):
        super().__init__()
        width = tokenizer.config.hidden_size
        self.tokenizer = tokenizer
        self.mask_embedding = nn.Parameter(torch.rand(width))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_targets))
        self.targets = CepstralTargets(tokenizer.sample_rate, tokenizer.hop_length, num_targets)
        tokenizer.quantize.requires_grad_(False)  # its clusters are fitted later

    def forward(self, noisy_BT: Tensor, target_BL: Tensor, is_masked_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the masked frames' targets, and the share that is predicted right."""
        encoder = self.tokenizer.encoder
        heard_BLD = encoder.feature_extractor(F.pad(noisy_BT, (0, RIGHT_PAD))).transpose(1, 2)
        heard_BLD, _ = encoder.feature_projection(heard_BLD)
        heard_BLD = torch.where(is_masked_BL[..., None], self.mask_embedding.to(heard_BLD.dtype), heard_BLD)
        hidden_BLD = encoder.encoder(heard_BLD).last_hidden_state
        logits_NK, target_N = self.head(hidden_BLD[is_masked_BL]).float(), target_BL[is_masked_BL]
        accuracy = (logits_NK.detach().argmax(dim=-1) == target_N).float().mean()
        return F.cross_entropy(logits_NK, target_N), accuracy


def masked_spans(batch: int, frames: int, start: float, length: int, rng: torch.Generator) -> Tensor:
    """bool [B, L], True in spans of `length` frames; every frame begins one with probability `start`.

    Every row has one span at least.
    """
    begins_BL = torch.rand(batch, frames, generator=rng) < start
    one_B = torch.randint(frames, (batch,), generator=rng)
    begins_BL[torch.arange(batch), one_B] |= ~begins_BL.any(dim=1)
    reach_BL = F.pad(begins_BL.float(), (length - 1, 0))
    return F.max_pool1d(reach_BL[:, None], length, stride=1)[:, 0] > 0


class SemanticTrainer(SpeechTrainer):
    """The run of an encoder of semantic tokens."""

    exported_part = "tokenizer"

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        self.source = SpeechFolder(recipe.data.train, self.train_split)
        tokenizer = build_speech_model(
            recipe.model, {"num_clusters": 0}, None if state is None else state["model_config"]
        )
        tokenizer = without_clusters(tokenizer)
        self.raw_model = MaskedPrediction(tokenizer, recipe.targets.num_targets).to(self.device).train()
        self.is_new = state is None

    def build_data(self) -> None:
        recipe, tokenizer = self.recipe, self.raw_model.tokenizer
        rate = tokenizer.sample_rate
        num_samples = whole_frames(recipe.data.seconds, rate, tokenizer.hop_length)
        if num_samples // tokenizer.hop_length <= recipe.targets.length:
            raise InvalidRecipe(f"data.seconds {recipe.data.seconds} leaves nothing between spans of targets.length")
        speech = TrainingSpeech(self.source, recipe.data, rate, num_samples, recipe.run.seed)
        self.data = NoisySpeech(speech, recipe.noise, recipe.targets.noisy)
        val_source = SpeechFolder(*self.val_folder)
        self.val_clean_BT, self.val_noisy_BT = validation_pairs(
            val_source, recipe.data, recipe.noise, rate, num_samples
        )
        logger.info("%d clips to train on, %d to validate", len(self.source), len(self.val_clean_BT))
        if self.is_new:
            self._fit_targets(speech)

    @torch.no_grad()
    def _fit_targets(self, speech: TrainingSpeech) -> None:
        targets, features, count = self.raw_model.targets, [], 0
        for position in range(len(self.source) * 4):  # a few crops of each clip
            features.append(targets.features(speech[position][None].to(self.device))[0])
            count += len(features[-1])
            if count >= MAX_FITTED_FRAMES:
                break
        targets.fit(torch.cat(features), torch.Generator().manual_seed(self.recipe.run.seed))

    def open_batches(self, first_batch: int) -> Iterator[Batch]:
        accelerator = self.accelerator
        return speech_batches(
            self.data, first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        )

    def train_on(self, batch: Batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        seed = derived_seed(self.recipe.run.seed, self.step, self.accelerator.process_index, micro)
        rng = torch.Generator().manual_seed(seed)
        loss, accuracy = self.model(*self._inputs(*batch, rng))
        return loss, {"masked_accuracy": accuracy, "total_loss": loss.detach()}

    @torch.no_grad()
    def _inputs(self, clean_BT: Tensor, noisy_BT: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        target_BL = self.raw_model.targets(clean_BT.to(self.device))
        targets = self.recipe.targets
        is_masked_BL = masked_spans(*target_BL.shape, targets.start, targets.length, rng)
        return noisy_BT.to(self.device), target_BL, is_masked_BL.to(self.device)

    def validate(self, model: MaskedPrediction) -> dict[str, float]:
        """Loss and accuracy on held-out clips, clean and noisy, under the same masks each time."""
        figures: dict[str, float] = {}
        for name, heard_BT in (("clean", self.val_clean_BT), ("noisy", self.val_noisy_BT)):
            rng = torch.Generator().manual_seed(0)
            size, total = self.recipe.run.batch_size, len(heard_BT)
            for clean_BT, rows_BT in zip(self.val_clean_BT.split(size), heard_BT.split(size), strict=True):
                values = model(*self._inputs(clean_BT, rows_BT, rng))
                for key, value in zip(("loss", "masked_accuracy"), values, strict=True):
                    key = f"val_{name}_{key}"
                    figures[key] = figures.get(key, 0.0) + float(value) * len(rows_BT) / total
        return figures

    def show_samples(self, model: MaskedPrediction, tracker: Tracker) -> None:
        """Nothing: features have neither pictures nor sound."""


def without_clusters(tokenizer: SemanticTokenizer) -> SemanticTokenizer:
    """The same encoder without clusters: those of an encoder that is trained further would no longer fit."""
    if not tokenizer.vocab_size:
        return tokenizer
    bare = construct("SemanticTokenizer", config_of(tokenizer) | {"num_clusters": 0})
    bare.encoder.load_state_dict(tokenizer.encoder.state_dict())
    return bare
