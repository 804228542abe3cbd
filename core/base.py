"""What every model of ours is, and what every tokenizer is: a name, a fingerprint and a vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from .compact import COMPACT_WEIGHTS
from .errors import InvalidInput
from .packed import check_can_apply, check_not_packed

OnStep = Callable[..., None]  # on_step(step, total, preview=None); raise mt.Cancelled in it to stop


@dataclass
class TokenizerOutput:
    """Result of a tokenizer's training pass.

    decoded: pixels [B, 3, H, W], or logits over proxy codes [B, K, G, G] (stage 1 of two-stage models).
    ids_BL: int64 ids, None for continuous latents. vq: the quantizer's losses. posterior: the Gaussian of a VAE.
    num_tokens: how many tokens were kept, for models that drop the tail.
    semantic_BPT: what is to be like a teacher's features [B, P, T], for models that are distilled from one.
    """

    decoded: Tensor
    ids_BL: Tensor | None = None
    vq: Any = None
    posterior: Any = None
    num_tokens: int | None = None
    semantic_BPT: Tensor | None = None


class Model(ModelMixin, ConfigMixin):
    """Base of all models: `from_pretrained`, `save_pretrained` and `push_to_hub` of diffusers, and a name."""

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules: ClassVar[list[str]] = []
    modality: ClassVar[str]
    folder: Path | None = None  # that it was loaded from

    def __init__(self):
        super().__init__()
        self.name = type(self).__name__.lower()  # `mt.load` puts the registry's name here

    def cast(self, dtype: torch.dtype) -> Self:
        """Convert to `dtype` in place, except what `_keep_in_fp32_modules` names."""
        check_can_apply(self, lambda tensor: tensor.to(dtype))
        for name, child in self.named_children():
            # Not the `to` of a diffusers model, which warns about modules that are none.
            nn.Module.to(child, torch.float32 if name in self._keep_in_fp32_modules else dtype)
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        return self

    # A model with packed weights refuses here, as long as it is whole: no weight converted, no file written.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        check_can_apply(self, fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        if mode:
            check_not_packed(self)
        return super().train(mode)

    @classmethod
    @wraps(ModelMixin.from_pretrained.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **options) -> Self:
        # diffusers knows nothing of weights in one byte; what it can be asked for besides does not apply to them.
        if (Path(pretrained_model_name_or_path) / COMPACT_WEIGHTS).is_file():
            from .registry import load

            dtype = options.get("torch_dtype") or torch.float32
            model = load(pretrained_model_name_or_path)
            if not isinstance(model, cls):
                raise InvalidInput(
                    f"{pretrained_model_name_or_path} holds a {type(model).__name__}, not a {cls.__name__}"
                )
            return model.cast(dtype)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **options)

    @wraps(ModelMixin.save_pretrained)  # pipelines ask for the signature
    def save_pretrained(self, save_directory, *args, **options) -> None:
        check_not_packed(self)
        super().save_pretrained(save_directory, *args, **options)


class Tokenizer(Model):
    """Base of all tokenizers. Subclasses say `modality`, `vocab_size`, `max_tokens`, and implement the tensor level."""

    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize"]  # nearest codes are always searched in fp32

    fingerprint_weights: ClassVar[tuple[str, ...]] = ("quantize.embedding", "latent_tokens")

    @property
    def fingerprint(self) -> str:
        """16 hex digits that say which tokens this model understands: a hash of its config and its codebook.

        `fingerprint_weights` says which parameters stand for the codebook.

        Values are rounded to bfloat16 first, so that loading in another dtype keeps the fingerprint.
        """
        config = {key: value for key, value in dict(self.config).items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
        for name, value in sorted(self.state_dict().items()):
            if name.startswith(self.fingerprint_weights):
                digest.update(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def check_callback(callback: Any, what: str = "on_step") -> None:
    """Raise InvalidInput when `callback` is neither None nor something to call."""
    if callback is not None and not callable(callback):
        raise InvalidInput(f"{what} must be a function to call after each step, not {callback!r}")


def report(on_step: OnStep | None, step: int, total: int, preview: Any = None) -> None:
    """Call `on_step` if there is one."""
    if on_step is not None:
        on_step(step, total, preview=preview)
