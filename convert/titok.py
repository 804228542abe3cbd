"""TiTok and TA-TiTok: the authors' config and keys to our `TiTok`; also their MaskGIT-VQGAN and their bare quantizer.

Our parameters bear the authors' names, so converting is reading the config and checking every key and shape.
Source of the rules: bytedance/1d-tokenizer; the config is the whole OmegaConf tree, of which `model.vq_model` counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.errors import InvalidCheckpoint
from ..core.strict import build
from ..nn.vq import VectorQuantizer
from ..tokenizers.image.maskgit_vqgan import MaskGitVQGAN
from ..tokenizers.image.titok import SIZES, TiTok
from .fields import Config, Fields, StateDict

TEXT_FIELDS = ("text_context_length", "text_embed_dim")
MAX_DEPTH = 256


def from_official(config: Config, state_dict: StateDict) -> nn.Module:
    """Return the `TiTok`, `MaskGitVQGAN` or `VectorQuantizer` that these official keys belong to, in eval mode."""
    if "encoder.conv_in.weight" in state_dict:
        return vqgan_from_official(config, state_dict)
    if "embedding.weight" in state_dict:
        return quantizer_from_official(config, state_dict)
    return build(TiTok, titok_arguments(config, state_dict), state_dict)


def unwrap(config: Config) -> tuple[Config, Config]:
    """Return the official config and the size overrides, which a parity case carries side by side."""
    if "official_config" in config:
        return config["official_config"], config.get("size_overrides") or {}
    return config, config.get("size_overrides") or {}


def titok_arguments(config: Config, state_dict: StateDict) -> dict[str, Any]:
    """Map an official config to the constructor of `TiTok`. The keys tell what configs leave out: text, clustering."""
    official, overrides = unwrap(config)
    arguments = shared_arguments(official, overrides)
    model = vq_model(official)
    quantizer = model.choice("quantize_mode", ("vq", "vae"), default="vq")
    has_pixel_decoder = model.flag("finetune_decoder", default=True)
    is_legacy = model.flag("is_legacy", default=True)
    if quantizer == "vae" and has_pixel_decoder:
        raise InvalidCheckpoint("a VAE has no pixel decoder: model.vq_model.finetune_decoder must be false")
    if has_pixel_decoder and not is_legacy:
        raise InvalidCheckpoint("only a legacy model has a pixel decoder: set model.vq_model.finetune_decoder false")
    # The released TA-TiTok configs name no text sizes but keep `clustering_vq` on, whose buffer they do not have.
    is_text_aware = any(field in model for field in TEXT_FIELDS) or "decoder.text_guidance_proj.weight" in state_dict
    return arguments | {
        "quantizer": quantizer,
        "is_legacy": is_legacy,
        "has_pixel_decoder": has_pixel_decoder,
        "clustering": model.flag("clustering_vq", default=False) and "quantize.embed_prob" in state_dict,
        "text_context_length": model.integer("text_context_length", default=77) if is_text_aware else None,
        "text_embed_dim": model.integer("text_embed_dim", default=768) if is_text_aware else None,
    }


def vq_model(official: Config) -> Fields:
    """The section `model.vq_model` of an official config."""
    model = official.get("model")
    return Fields(model.get("vq_model") if isinstance(model, Mapping) else None, "model.vq_model")


def shared_arguments(official: Config, overrides: Config) -> dict[str, Any]:
    """The sizes that TiTok and One-D-Piece configs state alike."""
    model = vq_model(official)
    dataset = Fields(official.get("dataset"), "dataset")
    preprocessing = Fields(dataset.section.get("preprocessing"), "dataset.preprocessing")
    arguments = {
        "image_size": preprocessing.integer("crop_size"),
        "encoder_patch_size": model.integer("vit_enc_patch_size"),
        "decoder_patch_size": model.integer("vit_dec_patch_size"),
        "num_latent_tokens": model.integer("num_latent_tokens"),
        "token_size": model.integer("token_size"),
        "use_l2_norm": False,
    }
    if model.section.get("quantize_mode") != "vae":
        arguments |= {
            "codebook_size": model.integer("codebook_size"),
            "use_l2_norm": model.flag("use_l2_norm", default=False),
            "commitment_cost": model.number("commitment_cost", default=0.25),
        }
    for ours, size_field in (("encoder", "vit_enc_model_size"), ("decoder", "vit_dec_model_size")):
        preset = SIZES[model.choice(size_field, SIZES)]
        sizes = Fields(overrides.get(ours) or {}, f"size_overrides.{ours}")
        arguments |= {
            f"{ours}_width": sizes.integer("width", default=preset[0]),
            f"{ours}_depth": sizes.integer("num_layers", default=preset[1], limit=MAX_DEPTH),
            f"{ours}_heads": sizes.integer("num_heads", default=preset[2]),
        }
    pixel = vqgan_sizes(overrides.get("pixel_vqgan") or {}, "size_overrides.pixel_vqgan")
    return arguments | {
        "pixel_channels": pixel["hidden_channels"],
        "pixel_multipliers": pixel["channel_multipliers"],
        "pixel_res_blocks": pixel["num_res_blocks"],
        "pixel_embed_dim": pixel["z_channels"],
    }


def vqgan_sizes(config: Config, where: str) -> dict[str, Any]:
    """Map the authors' VQGAN config to the sizes of our encoder and decoder; what is absent is as released."""
    fields = Fields(config, where)
    multipliers = fields.integers("channel_mult", default=(1, 1, 2, 2, 4))
    if fields.integer("num_resolutions", default=len(multipliers)) != len(multipliers):
        raise InvalidCheckpoint(f"{where}.num_resolutions does not match the {len(multipliers)} values of channel_mult")
    return {
        "hidden_channels": fields.integer("hidden_channels", default=128),
        "channel_multipliers": multipliers,
        "num_res_blocks": fields.integer("num_res_blocks", default=2, limit=MAX_DEPTH),
        "z_channels": fields.integer("z_channels", default=256),
    }


def vqgan_from_official(config: Config, state_dict: StateDict) -> MaskGitVQGAN:
    """Build a `MaskGitVQGAN` of the released sizes, unless `config` is a parity case that states others."""
    sizes = config.get("config") or unwrap(config)[1].get("pixel_vqgan") or {}
    case, fields = Fields(config, "config"), Fields(sizes, "the VQGAN's config")
    arguments = vqgan_sizes(sizes, fields.where) | {
        "image_size": fields.integer("resolution", default=256),
        "codebook_size": case.integer("num_embeddings", default=fields.integer("codebook_size", default=1024)),
        "commitment_cost": case.number("commitment_cost", default=0.25),
    }
    return build(MaskGitVQGAN, arguments, state_dict)


def quantizer_from_official(config: Config, state_dict: StateDict) -> VectorQuantizer:
    """Build a bare `VectorQuantizer` from its own official arguments."""
    fields = Fields(config, "config")
    arguments = {
        "codebook_size": fields.integer("codebook_size"),
        "token_size": fields.integer("token_size"),
        "commitment_cost": fields.number("commitment_cost", default=0.25),
        "use_l2_norm": fields.flag("use_l2_norm", default=False),
        "clustering": fields.flag("clustering_vq", default=False),
    }
    return build(VectorQuantizer, arguments, state_dict)
