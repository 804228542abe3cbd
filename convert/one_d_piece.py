"""One-D-Piece: the authors' config and keys to our `OneDPiece` (turingmotors/One-D-Piece, a fork of legacy TiTok)."""

from __future__ import annotations

from ..core.errors import InvalidCheckpoint
from ..core.strict import build
from ..tokenizers.image.one_d_piece import OneDPiece
from .fields import Config, StateDict
from .titok import shared_arguments, unwrap, vq_model


def from_official(config: Config, state_dict: StateDict) -> OneDPiece:
    """Return the `OneDPiece` of these official keys, in eval mode.

    `strict_length_assertion` (absent: true) only made the official decoder refuse prefixes; ours decodes them always.
    """
    official, overrides = unwrap(config)
    model = vq_model(official)
    if model.choice("quantize_mode", ("vq", "vae"), default="vq") != "vq":
        raise InvalidCheckpoint("One-D-Piece has no VAE mode: model.vq_model.quantize_mode must be vq or absent")
    if not model.flag("is_legacy", default=True):
        raise InvalidCheckpoint("One-D-Piece has the legacy latent order: model.vq_model.is_legacy must be absent")
    model.flag("strict_length_assertion", default=True)
    arguments = shared_arguments(official, overrides)
    arguments["has_pixel_decoder"] = model.flag("finetune_decoder", default=True)
    return build(OneDPiece, arguments, state_dict)
