"""Train TokenFlow: `accelerate launch -m mediatok.training.tokenflow RECIPE.yaml [section.key=value ...]`.

The loop is that of the other tokenizers (`tokenizer.py`), with a teacher's features to give back beside the picture.
The log shows how many of the codes the last 131,072 ids used.

Shape suffixes: B batch, 3/H/W image.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..convert.vision_towers import load_tower
from ..core.errors import InvalidRecipe
from ..core.registry import load
from ..tokenizers.image.tokenflow import TokenFlow
from .build import config_of, construct, sizes_like
from .code_window import CodeWindow
from .discriminator import PatchDiscriminator
from .losses import DiscriminatorLoss, GeneratorLoss
from .patchgan import PatchGAN
from .perceptual import build_perceptual
from .teachers import build_teacher, semantic_loss
from .tokenflow_recipe import TokenFlowModelRecipe, load_tokenflow_recipe
from .tokenizer import TokenizerTrainer
from .trainer import run_from_command_line


class TokenFlowTrainer(TokenizerTrainer):
    """A TokenFlow's run."""

    vqgan = None  # the base class asks for proxy codes' network

    def build_models(self, state: dict | None) -> None:
        recipe, loss = self.recipe, self.recipe.loss
        self.raw_model = build_tokenflow(recipe.model, None if state is None else state["model_config"])
        self.raw_model.to(self.device).train()
        self.teacher = None
        if recipe.model.stage == "decoder":
            self.raw_model.freeze_encoder()
        elif loss.semantic_weight:
            self.teacher = self._teacher()
        if recipe.model.gradient_checkpointing:
            self.raw_model.enable_gradient_checkpointing()
        perceptual = build_perceptual(loss.perceptual, loss.perceptual_weights) if loss.perceptual_weight else None
        self.generator_loss = GeneratorLoss(loss, perceptual).to(self.device)
        self.discriminator_loss = DiscriminatorLoss(loss).to(self.device)
        self.raw_discriminator = None
        if loss.discriminator_weight:
            network = PatchGAN() if loss.discriminator == "pix2pix" else PatchDiscriminator()
            self.raw_discriminator = network.to(self.device)
        self.window = CodeWindow(self.raw_model.vocab_size)

    def _teacher(self) -> torch.nn.Module:
        loss, config = self.recipe.loss, self.raw_model.config
        teacher = build_teacher(loss.teacher, loss.teacher_weights, config.sides[-1]).to(self.device)
        side = self.raw_model.image_size
        with torch.no_grad():
            _, places, width = teacher(torch.zeros(1, 3, side, side, device=self.device)).shape
        if (places, width) != (config.sides[-1] ** 2, config.teacher_width):
            raise InvalidRecipe(
                f"the teacher {loss.teacher} sees {places} places with {width} features, and the model gives back "
                f"{config.sides[-1] ** 2} with {config.teacher_width}: set model.config.teacher_width or sides"
            )
        return teacher

    def train_on(self, batch: tuple[Tensor, list[str]], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().train_on(batch, micro)
        self.window.update(self._ids[-1])
        self._ids[-1] = self._ids[-1].flatten()[:, None]  # batches that leave out a scale have fewer
        return loss, metrics

    def batch_statistics(self) -> dict[str, float]:
        return super().batch_statistics() | {"codebook_usage": self.window.share()}

    def _loss(self, output, pixels_B3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = super()._loss(output, pixels_B3HW)
        if self.teacher is None:
            return total, metrics
        with torch.no_grad(), self.accelerator.autocast():
            target_BPT = self.teacher(pixels_B3HW)
        semantic = self.recipe.loss.semantic_weight * semantic_loss(output.semantic_BPT, target_BPT)
        total = total + semantic
        return total, metrics | {"semantic_loss": semantic.detach(), "total_loss": total.detach()}

    def checkpoint_contents(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        tensors, state = super().checkpoint_contents()
        return tensors | {"code_window": {"ids": self.window.ids}}, state

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        super().restore(tensors, state)
        self.window.ids = tensors["code_window"]["ids"]


def build_tokenflow(recipe: TokenFlowModelRecipe, config: dict | None = None) -> TokenFlow:
    """The tokenizer of `recipe`: fresh, from `init_from`, or random with exactly `config` (that of a checkpoint).

    Raises:
        InvalidRecipe: names, sizes or flags that do not fit together.
        ModelNotFound: a vision tower that is not there; the message says which file, and where from.
    """
    if config is not None:
        return construct("TokenFlow", config)
    if recipe.init_from is None:
        model = construct("TokenFlow", sizes_like(recipe) | recipe.config)
        if recipe.tower is not None:
            _take_tower(model, recipe)
        return model
    source = load(str(recipe.init_from))
    if not isinstance(source, TokenFlow):
        raise InvalidRecipe(f"model.init_from holds a {type(source).__name__}, not a TokenFlow")
    if not recipe.config:
        return source
    model = construct("TokenFlow", config_of(source) | recipe.config)
    kept = {key: value for key, value in source.state_dict().items() if not key.startswith("decoder.")}
    model.load_state_dict(kept, strict=False)  # the pixel decoder starts anew
    return model


def _take_tower(model: TokenFlow, recipe: TokenFlowModelRecipe) -> None:
    tower, _ = load_tower(model.config.tower, recipe.tower)
    given, own = tower.state_dict(), model.encoder_vqkd.state_dict()
    for name, value in own.items():
        if name not in given or given[name].shape != value.shape:
            raise InvalidRecipe(
                f"model.tower {recipe.tower} has other sizes than the model's semantic encoder: {name} differs"
            )
    # A deeper SigLIP is cut where the model reads it.
    model.encoder_vqkd.load_state_dict({name: given[name] for name in own})


def main(argv: list[str] | None = None) -> int:
    return run_from_command_line("mediatok.training.tokenflow", load_tokenflow_recipe, TokenFlowTrainer, argv)


if __name__ == "__main__":
    sys.exit(main())
