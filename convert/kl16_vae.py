"""KL-16: the authors' VAE becomes diffusers' `AutoencoderKL` by renaming alone (latent-diffusion's key names)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from ..core.errors import InvalidCheckpoint
from ..core.strict import build
from ..tokenizers.image.kl_vae import KLAutoencoder
from .fields import MAX_SIZE, Config, Fields, StateDict

LATENT_SCALE = 0.2325
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
RELEASED = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "blocks": 2, "attn": [16], "resolution": 256, "embed": 16}
NORM_GROUPS = 32


def from_official(config: Config, state_dict: StateDict) -> AutoencoderKL:
    """Return the `AutoencoderKL` of these official keys, in eval mode; keys below `loss.` are left out.

    `config` holds the `architecture` (`ch`, `ch_mult`, `blocks`, `attn`, `resolution`, `embed`); what it lacks is as in
    KL-16. Encoder levels whose nominal side `resolution` / 2**level is in `attn` have attention.
    """
    architecture = official_architecture(config)
    multipliers = architecture.integers("ch_mult")
    arguments = autoencoder_arguments(architecture)
    scale = Fields(config, "config").number("latent_scale", LATENT_SCALE)
    weights = {
        our_key(key, len(multipliers)): _flattened(key, value)
        for key, value in state_dict.items()
        if not key.startswith("loss.")
    }
    return build(AutoencoderKL, arguments | {"scaling_factor": scale}, weights)


def tokenizer_from_official(config: Config, state_dict: StateDict) -> KLAutoencoder:
    """The same as a `KLAutoencoder`, with the interface of our tokenizers.

    Raises:
        InvalidCheckpoint: also where an encoder level above the coarsest has attention, which that class does not have.
    """
    vae = from_official(config, state_dict)
    known = vae.config
    if any(kind.startswith("Attn") for kind in known.down_block_types[:-1]):
        raise InvalidCheckpoint("a KLAutoencoder has attention at the coarsest level only; use the AutoencoderKL")
    arguments = {
        "image_size": known.sample_size, "latent_channels": known.latent_channels,
        "block_out_channels": tuple(known.block_out_channels), "layers_per_block": known.layers_per_block,
        "norm_num_groups": known.norm_num_groups, "scaling_factor": known.scaling_factor,
        "encoder_attention": known.down_block_types[-1].startswith("Attn"),
    }  # fmt: skip
    return build(KLAutoencoder, arguments, {f"vae.{key}": value for key, value in vae.state_dict().items()})


def official_architecture(config: Config) -> Fields:
    """The `architecture` of a config, completed from KL-16."""
    given = config.get("architecture", {})
    return Fields(RELEASED | given if isinstance(given, Mapping) else given, "architecture")


def has_attention(architecture: Fields) -> list[bool]:
    """Of each encoder level, finest first."""
    sides = architecture.integers("attn", limit=MAX_SIZE, may_be_empty=True)
    resolution = architecture.integer("resolution")
    return [resolution // 2**level in sides for level in range(len(architecture.integers("ch_mult")))]


def autoencoder_arguments(architecture: Fields) -> dict[str, Any]:
    """Constructor arguments of diffusers' class.

    Raises:
        InvalidCheckpoint: a network that the class cannot express.
    """
    multipliers, width = architecture.integers("ch_mult"), architecture.integer("ch")
    if multipliers[0] != 1:
        raise InvalidCheckpoint(
            f"architecture.ch_mult begins with {multipliers[0]}, and an AutoencoderKL's first level is as wide as what "
            "enters it: only 1 can be converted"
        )
    return {
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in has_attention(architecture)
        ),
        "up_block_types": ("UpDecoderBlock2D",) * len(multipliers),
        "block_out_channels": tuple(width * multiplier for multiplier in multipliers),
        "layers_per_block": architecture.integer("blocks", limit=64),
        "latent_channels": architecture.integer("embed"),
        "norm_num_groups": NORM_GROUPS,
        "sample_size": architecture.integer("resolution"),
    }


def our_key(key: str, levels: int) -> str:
    """diffusers' name of an official key."""
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", key):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{_in_resnet(match[3])}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(.+)", key):
        return f"{match[1]}.mid_block.attentions.0.{ATTENTION.get(match[2], match[2])}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d{1,3})\.(block|attn)\.(\d{1,3})\.(.+)", key):
        level = _level(match[2], int(match[3]), levels)
        if match[4] == "block":
            return f"{match[1]}.{level}.resnets.{match[5]}.{_in_resnet(match[6])}"
        part, _, rest = match[6].partition(".")
        return f"{match[1]}.{level}.attentions.{match[5]}.{ATTENTION.get(part, part)}.{rest}"
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d{1,3})\.(down|up)sample\.(.+)", key):
        return f"{match[1]}.{_level(match[2], int(match[3]), levels)}.{match[4]}samplers.0.{match[5]}"
    return key.replace(".norm_out.", ".conv_norm_out.")


def our_module(name: str, levels: int) -> str:
    """diffusers' name of an official module."""
    return our_key(f"{name}.norm.weight", levels).removesuffix(".weight").rpartition(".")[0]  # as if it held a norm


def _level(way: str, number: int, levels: int) -> str:
    """Levels of the way up are counted from the finest by the authors, in order of execution by diffusers."""
    return f"down_blocks.{number}" if way == "down" else f"up_blocks.{levels - 1 - number}"


def _in_resnet(rest: str) -> str:
    return rest.replace("nin_shortcut", "conv_shortcut")


def _flattened(key: str, value: Tensor) -> Tensor:
    """Attention's 1x1 convolutions are linear layers in diffusers."""
    is_projection = re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", key)
    return value[:, :, 0, 0] if is_projection and value.ndim == 4 else value
