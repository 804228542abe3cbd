"""KL-16: the authors' VAE becomes diffusers' `AutoencoderKL` by renaming alone (latent-diffusion's key names)."""

from __future__ import annotations

import re
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from ..core.errors import InvalidCheckpoint
from ..core.strict import build
from ..tokenizers.image.kl_vae import KLAutoencoder
from .fields import Fields
from .titok import Config, StateDict

LATENT_SCALE = 0.2325
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
RELEASED = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "blocks": 2, "attn": [16], "resolution": 256, "embed": 16}
NORM_GROUPS = 32


def from_official(config: Config, state_dict: StateDict) -> AutoencoderKL:
    """Return the `AutoencoderKL` of these official keys, in eval mode; keys below `loss.` are left out.

    `config` holds the `architecture` (`ch`, `ch_mult`, `blocks`, `attn`, `resolution`, `embed`); empty is KL-16.
    """
    architecture = Fields(config.get("architecture", RELEASED), "architecture")
    multipliers = architecture.integers("ch_mult")
    arguments = autoencoder_arguments(architecture, multipliers)
    scale = Fields(config, "config").number("latent_scale", LATENT_SCALE)
    weights = {
        our_key(key, len(multipliers)): _flattened(key, value)
        for key, value in state_dict.items()
        if not key.startswith("loss.")
    }
    return build(AutoencoderKL, arguments | {"scaling_factor": scale}, weights)


def tokenizer_from_official(config: Config, state_dict: StateDict) -> KLAutoencoder:
    """The same as a `KLAutoencoder`, with the interface of our tokenizers."""
    vae = from_official(config, state_dict)
    known = vae.config
    arguments = {
        "image_size": known.sample_size, "latent_channels": known.latent_channels,
        "block_out_channels": tuple(known.block_out_channels), "layers_per_block": known.layers_per_block,
        "norm_num_groups": known.norm_num_groups, "scaling_factor": known.scaling_factor,
        "encoder_attention": known.down_block_types[-1].startswith("Attn"),
    }  # fmt: skip
    return build(KLAutoencoder, arguments, {f"vae.{key}": value for key, value in vae.state_dict().items()})


def autoencoder_arguments(architecture: Fields, multipliers: tuple[int, ...]) -> dict[str, Any]:
    """Constructor arguments of diffusers' class.

    Raises:
        InvalidCheckpoint: a network that the class cannot express.
    """
    width, resolution = architecture.integer("ch"), architecture.integer("resolution")
    if multipliers[0] != 1:
        raise InvalidCheckpoint(f"architecture.ch_mult must begin with 1, not {multipliers[0]}")
    attention = set(architecture.integers("attn"))
    levels = len(multipliers)
    sides = [resolution // 2**level for level in range(levels)]
    if any(side in attention for side in sides[:-1]) or not architecture.integer("blocks", limit=64):
        raise InvalidCheckpoint(f"architecture.attn {sorted(attention)}: attention is known at the coarsest level only")
    last = "AttnDownEncoderBlock2D" if sides[-1] in attention else "DownEncoderBlock2D"
    return {
        "down_block_types": ("DownEncoderBlock2D",) * (levels - 1) + (last,),
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(width * multiplier for multiplier in multipliers),
        "layers_per_block": architecture.integer("blocks", limit=64),
        "latent_channels": architecture.integer("embed"),
        "norm_num_groups": NORM_GROUPS,
        "sample_size": resolution,
    }


def our_key(key: str, levels: int) -> str:
    """diffusers' name of an official key."""
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", key):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{_in_resnet(match[3])}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(\w+)", key):
        return f"{match[1]}.mid_block.attentions.0.{ATTENTION.get(match[2], match[2])}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d{1,3})\.(block|attn)\.(\d{1,3})\.(.+)", key):
        level = _level(match[2], int(match[3]), levels)
        if match[4] == "block":
            return f"{match[1]}.{level}.resnets.{match[5]}.{_in_resnet(match[6])}"
        part, _, rest = match[6].partition(".")
        return f"{match[1]}.{level}.attentions.{match[5]}.{ATTENTION.get(part, part)}.{rest}"
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d{1,3})\.(down|up)sample\.conv\.(\w+)", key):
        return f"{match[1]}.{_level(match[2], int(match[3]), levels)}.{match[4]}samplers.0.conv.{match[5]}"
    return key.replace(".norm_out.", ".conv_norm_out.")


def _level(way: str, number: int, levels: int) -> str:
    """Levels of the way up are counted from the finest by the authors, in order of execution by diffusers."""
    return f"down_blocks.{number}" if way == "down" else f"up_blocks.{levels - 1 - number}"


def _in_resnet(rest: str) -> str:
    return rest.replace("nin_shortcut", "conv_shortcut")


def _flattened(key: str, value: Tensor) -> Tensor:
    """Attention's 1x1 convolutions are linear layers in diffusers."""
    is_projection = re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", key)
    return value[:, :, 0, 0] if is_projection and value.ndim == 4 else value
