"""Train a speech codec: `accelerate launch -m mediatok.training.codec RECIPE.yaml [section.key=value ...]`.

Random crops of clips go through the codec; spectral, quantizer and adversarial losses compare what comes out.

Shape suffixes: B batch, T samples, L frames, Q codebooks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ..core.errors import InvalidRecipe, nearest_names
from ..core.registry import ENTRIES, constructor_arguments, find_entry, load
from ..evaluation.speech_metrics import measure_pairs
from ..tokenizers.speech.simcodec import merge_codebooks
from .build import construct
from .checkpoint import load_optimizer_tensors, optimizer_tensors
from .code_revival import CodeRevival, place_codes
from .codec_recipe import CodecModelRecipe, load_codec_recipe
from .schedule import cosine_lr, make_optimizer, set_lr
from .speech_data import SpeechFolder, TrainingSpeech, speech_batches, validation_clips
from .speech_discriminators import STFT_SIZES, SpeechDiscriminator
from .speech_losses import CodecLoss, LogMel, discriminator_gan_loss
from .tracker import Tracker
from .trainer import Trainer, run_from_command_line
from .validate import code_usage

logger = logging.getLogger(__name__)
FRAMES_PER_CODE = 4  # latents that k-means sees for each code
MAX_COUNTED_CLIPS = 512  # of the training set, whose use of codes decides which are merged


class CodecTrainer(Trainer):
    """A codec's run."""

    samples_name = "clips"

    def build_models(self, state: dict | None) -> None:
        recipe = self.recipe
        split = recipe.data.val is None
        self.source = SpeechFolder(recipe.data.train, "train" if split else None)
        config = None if state is None else state["model_config"]
        self.raw_model = build_codec(recipe.model, self.source, config).to(self.device).train()
        self.raw_model.set_weight_norm(recipe.model.weight_norm)
        self.codec_loss = CodecLoss(recipe.loss, self.raw_model.sample_rate).to(self.device)
        self.mel = LogMel(self.raw_model.sample_rate).to(self.device)
        self.revival = CodeRevival(self.raw_model.quantize) if recipe.model.revive_codes else None
        self.raw_discriminator = None
        if recipe.loss.discriminator_weight:
            try:
                discriminator = SpeechDiscriminator(recipe.loss.discriminator_width, recipe.loss.discriminators)
            except ValueError as error:
                raise InvalidRecipe(f"loss: {error}") from error
            self.raw_discriminator = discriminator.to(self.device)

    def build_optimizers(self) -> None:
        optimizer = self.recipe.optimizer
        settings = {"betas": optimizer.betas, "weight_decay": optimizer.weight_decay}
        self.model, self.optimizer = self.accelerator.prepare(
            self.raw_model,
            make_optimizer(self.raw_model.named_parameters(), optimizer.lr, **settings, muon=optimizer.muon),
        )
        self.discriminator_step = 0
        if self.raw_discriminator is not None:
            parameters = self.raw_discriminator.named_parameters()
            self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
                self.raw_discriminator, make_optimizer(parameters, self.recipe.loss.discriminator_lr, **settings)
            )

    def build_data(self) -> None:
        recipe, model = self.recipe, self.raw_model
        rate, hop = model.sample_rate, model.hop_length
        num_samples = max(1, round(recipe.data.seconds * rate / hop)) * hop
        self._check_length(num_samples)
        self.speech = TrainingSpeech(self.source, recipe.data, rate, num_samples, recipe.run.seed)
        split = recipe.data.val is None
        val_source = SpeechFolder(recipe.data.val or recipe.data.train, "val" if split else None)
        self.val_clips = validation_clips(val_source, rate, recipe.data.max_val_clips)
        minutes = sum(clip.seconds for clip in self.val_clips) / 60
        logger.info("%d clips to train on, %d (%.1f min) to validate", len(self.source), len(self.val_clips), minutes)

    def open_batches(self, first_batch: int) -> Iterator[tuple[Tensor, None]]:
        accelerator = self.accelerator
        batches = speech_batches(
            self.speech, first_batch, self.recipe.run.batch_size, accelerator.process_index, accelerator.num_processes
        )
        return ((wave_BT, None) for wave_BT in batches)

    def train_on(self, batch: tuple[Tensor, None], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        real_BT = batch[0].to(self.device, non_blocking=True)
        if micro == 0:
            self._pairs, self._ids = [], []  # of this step: for the discriminator, and for the use of codes
            if self.step == self.recipe.model.continuous_steps > 0:
                self._place_codes()
        is_quantized = self.step >= self.recipe.model.continuous_steps
        output = self.model(real_BT, quantized=is_quantized)
        self._pairs.append((real_BT, output.decoded.detach().float()))
        if output.ids_BL is not None:
            self._ids.append(output.ids_BL)
        loss, metrics = self._loss(output, real_BT)
        if not is_quantized:  # DDP waits for a gradient of every parameter
            loss = loss + sum(0.0 * codebook.sum() for codebook in self.raw_model.quantize.codebooks)
        return loss, metrics

    def after_step(self) -> dict[str, Tensor]:
        metrics = self._train_discriminator() if self._is_adversarial() else {}
        if self.revival is not None:
            metrics["revived_codes"] = self.revival.step()
            self.ema.restart_rows(self.raw_model, self.revival.moved, "quantize.")
        return metrics

    def batch_statistics(self) -> dict[str, float]:
        if not self._ids:
            return {}
        usage = usage_of(torch.cat(self._ids), self.raw_model.vocab_size)
        return {f"batch_{name}": value for name, value in usage.items()}

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Mel distance, STOI, and PESQ where it is installed, over whole held-out clips; the use of codes.

        Nothing as long as the codes are not in use.
        """
        if self.step <= self.recipe.model.continuous_steps > 0:
            return {}
        tokens = model.encode(self.val_clips)
        decoded = model.decode(tokens)
        ids = [tokens.ids[row, :length] for row, length in enumerate(tokens.lengths.tolist())]
        distances = []
        for real, fake in zip(self.val_clips, decoded, strict=True):
            real_mel, fake_mel = (self.mel(clip.samples.to(self.device)) for clip in (real, fake))
            distances.append(float((real_mel - fake_mel).abs().mean()))
        figures = {"mel_distance": sum(distances) / len(distances)}
        figures |= measure_pairs(self.val_clips, decoded)
        figures |= usage_of(torch.cat(ids)[None], model.vocab_size)
        return {f"val_{name}": value for name, value in figures.items()}

    def show_samples(self, model: torch.nn.Module, tracker: Tracker) -> None:
        real = self.val_clips[: self.recipe.run.num_samples]
        tracker.sounds(self.step, real, model.reconstruct(real))

    def _loss(self, output, real_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not self._is_adversarial():
            return self.codec_loss(output, real_BT)
        self.raw_discriminator.requires_grad_(False)
        try:
            return self.codec_loss(output, real_BT, self.raw_discriminator)
        finally:
            self.raw_discriminator.requires_grad_(True)

    def _place_codes(self) -> None:
        """K-means over latents of the first samples, which are the same in every run with this seed."""
        frames = self.speech.num_samples // self.raw_model.hop_length
        needed = -(-FRAMES_PER_CODE * self.raw_model.vocab_size // (frames * self.recipe.run.batch_size))
        batches = speech_batches(self.speech, 0, self.recipe.run.batch_size)
        with torch.no_grad():
            latents = [self.raw_model.encode_latent(next(batches).to(self.device)) for _ in range(needed)]
        place_codes(self.raw_model.quantize, latents, torch.Generator().manual_seed(self.recipe.run.seed))
        self.ema.copy_from(self.raw_model, "quantize.")
        logger.info("placed the codes by k-means over %d batches", needed)

    def _is_adversarial(self) -> bool:
        return self.raw_discriminator is not None and self.step >= self.recipe.loss.discriminator_start

    def _check_length(self, num_samples: int) -> None:
        """Mirroring at the edges needs more than half a window."""
        loss = self.recipe.loss
        has_stft = loss.discriminator_weight and "stft" in loss.discriminators
        longest = max(*loss.mel_weights, *loss.stft_weights, max(STFT_SIZES) if has_stft else 0)
        if num_samples <= longest // 2:
            raise InvalidRecipe(f"data.seconds gives {num_samples} samples; more than {longest // 2} are needed")

    def _train_discriminator(self) -> dict[str, Tensor]:
        run, optimizer, loss_recipe = self.recipe.run, self.recipe.optimizer, self.recipe.loss
        lr = cosine_lr(
            self.discriminator_step, loss_recipe.discriminator_lr, optimizer.end_lr, optimizer.warmup_steps,
            run.steps - loss_recipe.discriminator_start,
        )  # fmt: skip
        set_lr(self.discriminator_optimizer, lr)
        totals: dict[str, Tensor] = {}
        for micro, (real_BT, fake_BT) in enumerate(self._pairs):
            last = micro == len(self._pairs) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.discriminator):
                maps = self.discriminator(torch.cat([real_BT, fake_BT]))
                halves = [[feature_map.chunk(2) for feature_map in found] for found in maps]
                real, fake = ([[pair[side] for pair in found] for found in halves] for side in (0, 1))
                loss, metrics = discriminator_gan_loss(real, fake)
                self.accelerator.backward(loss / len(self._pairs))
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value / len(self._pairs)
        self.accelerator.clip_grad_norm_(self.discriminator.parameters(), optimizer.max_grad_norm)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        self.discriminator_step += 1
        return totals

    def checkpoint_contents(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        tensors, state = super().checkpoint_contents()
        if self.revival is not None:
            tensors["code_revival"] = self.revival.state_dict()
        if self.raw_discriminator is not None:
            tensors["discriminator"] = self.raw_discriminator.state_dict()
            tensors["discriminator_optimizer"] = optimizer_tensors(
                self.discriminator_optimizer.optimizer, self.raw_discriminator
            )
        return tensors, state | {"discriminator_step": self.discriminator_step}

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        super().restore(tensors, state)
        if self.revival is not None:
            self.revival.load_state_dict(tensors["code_revival"])
        if self.raw_discriminator is not None:
            self.raw_discriminator.load_state_dict(tensors["discriminator"])
            load_optimizer_tensors(
                self.discriminator_optimizer.optimizer, self.raw_discriminator, tensors["discriminator_optimizer"]
            )
        self.discriminator_step = state["discriminator_step"]


def build_codec(recipe: CodecModelRecipe, source: SpeechFolder, config: dict | None = None):
    """The codec of a recipe: random, from a folder, or with the merged codebooks of a group quantizer.

    config: constructor arguments of the checkpoint that is resumed, which override the recipe's.
    """
    if config is not None:
        return construct(recipe.class_name, config)
    if recipe.init_from is None:
        like = {}
        if recipe.like is not None:
            entry = find_entry(recipe.like)
            if entry is None or entry.class_name != recipe.class_name:
                names = [name for name, known in ENTRIES.items() if known.class_name == recipe.class_name]
                raise InvalidRecipe(f"model.like {recipe.like!r} is no codec.{nearest_names(recipe.like, names)}")
            like = constructor_arguments(entry)
        return construct(recipe.class_name, like | recipe.config)
    codec = load(recipe.init_from)
    if type(codec).__name__ != recipe.class_name:
        raise InvalidRecipe(f"model.init_from {recipe.init_from} holds a {type(codec).__name__}")
    if recipe.merge is None:
        return codec
    paths = source.paths[:: max(1, len(source) // MAX_COUNTED_CLIPS)]
    ids_BLQ = codec.encode(paths)
    used = torch.cat([ids_BLQ.ids[row, :length] for row, length in enumerate(ids_BLQ.lengths.tolist())])
    counts = torch.stack([torch.bincount(column, minlength=codec.vocab_size) for column in used.unbind(1)])
    return merge_codebooks(codec, counts, recipe.merge)


def usage_of(ids: Tensor, num_codes: int) -> dict[str, float]:
    """`code_usage` of ids [B, L] or [B, L, Q], the mean over codebooks."""
    columns = ids.flatten(0, 1)[:, None] if ids.ndim == 2 else ids.flatten(0, 1)
    usages = [code_usage(column[None], num_codes) for column in columns.unbind(1)]
    return {name: sum(usage[name] for usage in usages) / len(usages) for name in usages[0]}


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.codec", load_codec_recipe, CodecTrainer, argv)


if __name__ == "__main__":
    sys.exit(main())
