"""Recipes of the speech models beside codecs, one kind a class; see `recipe.py` for how they are read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..core.errors import InvalidRecipe, nearest_names
from .generator_recipe import GeneratorOptimizerRecipe
from .noise import NoiseRecipe
from .recipe import Fraction, Positive, Section, TrainingRun, Weight, load_recipe, read_recipe
from .speech_data import SpeechDataRecipe
from .utterances import UtteranceDataRecipe

Name = Annotated[str, Field(min_length=1)]  # of a model: one of `mediatok models`, or a folder of ours


class SpeechModelRecipe(Section):
    """Which model is trained.

    config: arguments of the class, over those of `like`; what follows from data and tokenizers is filled in.
    like: a name from `mediatok models` whose sizes are taken. init_from: folder in our layout whose sizes and weights
    the run starts from.
    """

    class_name: str
    like: str | None = None
    config: dict[str, Any] = {}  # noqa: RUF012
    init_from: Path | None = None

    @model_validator(mode="after")
    def _has_one_source(self):
        if self.init_from is not None and (self.like or self.config):
            raise ValueError("init_from brings its own sizes; leave out like and config")
        return self


class SpeechRunRecipe(TrainingRun):
    """What all of these runs share; `output` is the run's folder."""

    optimizer: GeneratorOptimizerRecipe = GeneratorOptimizerRecipe()


class SemanticModelRecipe(SpeechModelRecipe):
    class_name: Literal["SemanticTokenizer"]


class MaskedPredictionRecipe(Section):
    """What the encoder of semantic tokens learns from (HuBERT, Hsu et al. 2021, section II).

    num_targets: clusters of cepstra whose numbers are predicted. start, length: every frame begins a masked span of
    `length` frames with probability `start`. noisy: share of the clips that are made noisy; their targets stay clean.
    """

    num_targets: Annotated[int, Field(ge=2)] = 100
    start: Annotated[float, Field(gt=0, lt=1)] = 0.08
    length: Positive = 10
    noisy: Fraction = 0.5


class SemanticRecipe(SpeechRunRecipe):
    """Self-training of the encoder of semantic tokens."""

    model: SemanticModelRecipe
    data: SpeechDataRecipe
    noise: NoiseRecipe = NoiseRecipe()
    targets: MaskedPredictionRecipe = MaskedPredictionRecipe()


class GenSEModelRecipe(SpeechModelRecipe):
    """trains: which of the two language models; they share nothing, and may be trained on two machines.

    aligned_start: a start for small data sets; see `gense_start.py`.
    """

    class_name: Literal["GenSE"]
    trains: Literal["both", "n2s", "s2s"] = "both"
    aligned_start: bool = False


class GenSERecipe(SpeechRunRecipe):
    """Training of GenSE.

    semantic, codec: its tokenizers, which stay as they are. crops: how many crops are cut and made noisy; they come
    again and again, and their tokens are kept. By default, each comes once: more noise is heard, and most of the time
    goes into tokens.
    """

    model: GenSEModelRecipe
    semantic: Name
    codec: Name
    crops: Positive | None = None
    data: SpeechDataRecipe
    noise: NoiseRecipe = NoiseRecipe()


class ParaformerModelRecipe(SpeechModelRecipe):
    """Without `tokens` in its config, a new model's vocabulary is the characters of the training transcripts.

    alignment_weight: of the loss that lets the rates complete tokens where the head for CTC hears them; see
    `paraformer_training.py`. The paper has none; with little data the rates hardly find the tokens without it.
    error_weight: of minimum word error rate training with negative samples (section 2.5), which comes last: set it in a
    run with init_from.
    """

    class_name: Literal["Paraformer"]
    alignment_weight: Weight = 0.0
    error_weight: Weight = 0.0

    @model_validator(mode="after")
    def _has_ctc(self):
        if self.alignment_weight and self.init_from is None and not self.config.get("ctc_weight"):
            raise ValueError("alignment_weight needs the head for CTC: set config.ctc_weight")
        return self


class ParaformerRecipe(SpeechRunRecipe):
    """Training of Paraformer."""

    model: ParaformerModelRecipe
    data: UtteranceDataRecipe


class SpeakModelRecipe(SpeechModelRecipe):
    class_name: Literal["Speak"]


class SpeakRecipe(SpeechRunRecipe):
    """Training of Speak.

    codec: whose tokens it writes. recogniser: a Paraformer, which measures what is understood of what is said; its head
    for CTC, if it has one, tells how long each character of the training texts lasts. Without that the lengths have to
    be found by the loss on tokens alone, which takes much data.
    """

    model: SpeakModelRecipe
    codec: Name
    recogniser: Name | None = None
    data: UtteranceDataRecipe


SCHEMAS: dict[str, type[SpeechRunRecipe]] = {
    "SemanticTokenizer": SemanticRecipe,
    "GenSE": GenSERecipe,
    "Paraformer": ParaformerRecipe,
    "Speak": SpeakRecipe,
}


def load_speech_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SpeechRunRecipe:
    """Read and check the recipe at `path` by its model.class_name; see `load_recipe`."""
    class_name = class_name_of(path)
    if class_name not in SCHEMAS:
        raise InvalidRecipe(
            f"model.class_name {class_name!r} is none of {', '.join(SCHEMAS)}.{nearest_names(class_name, SCHEMAS)}"
        )
    return load_recipe(path, overrides, SCHEMAS[class_name])


def is_speech_recipe(path: str | Path) -> bool:
    """Whether the recipe at `path` is one of these, by its model.class_name."""
    return class_name_of(path) in SCHEMAS


def class_name_of(path: str | Path) -> str:
    """model.class_name of a recipe; "" where it has none."""
    model = read_recipe(path).get("model")
    return str(model.get("class_name", "")) if isinstance(model, dict) else ""
