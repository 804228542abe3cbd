"""Recipes of speech codecs; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from .recipe import Count, Fraction, OptimizerRecipe, Positive, Section, TrainingRun, Weight, load_recipe
from .speech_data import SpeechDataRecipe
from .speech_discriminators import KINDS, Kind
from .speech_recipe import class_name_of

CODECS = ("SimCodec",)


class CodecModelRecipe(Section):
    """Which codec is trained.

    config: arguments of the class, over those of `like`. like: a name from `mediatok models` whose sizes are taken.
    init_from: folder in our layout whose weights the run starts from.
    merge: [N, K] makes one codebook of N*K codes of the two groups of `init_from`'s group quantizer: all pairs of the N
    most used codes of the first and the K most used of the second, by their counts over the training set.
    continuous_steps: first steps without quantization; then k-means over the latents places the codes.
    weight_norm: train with weight norm, as the authors; it is folded into the weights at the end.
    revive_codes: give codes that no frame chose for a while the place of a frame; without it small runs collapse.
    """

    class_name: Literal["SimCodec"] = "SimCodec"
    like: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    init_from: Path | None = None
    merge: tuple[Positive, Positive] | None = None
    continuous_steps: Count = 0
    weight_norm: bool = False
    revive_codes: bool = False

    @model_validator(mode="after")
    def _needs(self):
        if self.merge is not None and self.init_from is None:
            raise ValueError("merge needs init_from= (the folder of a codec with a group quantizer)")
        if self.init_from is not None and (self.like or self.config):
            raise ValueError("init_from brings its own sizes; leave out like and config")
        return self


class CodecLossRecipe(Section):
    """Losses and their weights (specification, section 5: the defaults are those of SimCodec's parent, HiFi-Codec).

    mel_weights, stft_weights: weight of the log-mel and of the linear spectral distance by FFT size.
    discriminators: which kinds take part; discriminator_width: 32 is the published size. `discriminator_weight` 0
    leaves them all out; they join at step `discriminator_start`.
    """

    mel_weights: dict[Positive, Weight] = Field({1024: 45.0, 512: 1.0, 256: 1.0}, min_length=1)
    stft_weights: dict[Positive, Weight] = Field(default_factory=dict)
    quantizer_weight: Weight = 10.0
    discriminator_weight: Weight = 1.0
    feature_weight: Weight = 2.0
    discriminators: tuple[Kind, ...] = KINDS
    discriminator_width: Positive = 32
    discriminator_start: Count = 0
    discriminator_lr: Weight = 2e-4


class CodecOptimizerRecipe(OptimizerRecipe):
    """As for tokenizers, with the defaults of codecs; `muon` gives the kernels to Muon, AdamW keeps the rest."""

    lr: float = Field(2e-4, gt=0)
    betas: tuple[Fraction, Fraction] = (0.5, 0.9)
    weight_decay: Weight = 0.0
    max_grad_norm: float = Field(1000.0, gt=0)
    muon: bool = False


class CodecRecipe(TrainingRun):
    """One training run; `output` is the run's folder."""

    model: CodecModelRecipe
    data: SpeechDataRecipe
    loss: CodecLossRecipe = CodecLossRecipe()
    optimizer: CodecOptimizerRecipe = CodecOptimizerRecipe()

    @model_validator(mode="after")
    def _rounds_what_is_stored(self):
        if self.run.rounded_steps and self.model.weight_norm:
            raise ValueError("run.rounded_steps rounds weights as they are stored, and model.weight_norm trains others")
        return self


def load_codec_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> CodecRecipe:
    """Read and check the recipe at `path`; see `load_recipe`."""
    return load_recipe(path, overrides, CodecRecipe)


def is_codec_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` trains a codec, by its model.class_name."""
    return class_name_of(path) in CODECS
