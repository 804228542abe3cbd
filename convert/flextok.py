"""FlexTok: the authors' config and keys to our `FlexTok`.

Their config names a class for every module (`_target_`). The names are compared with those that are known, and nothing
is made from them. It lies in a config.json, or in the header of the safetensors file as a Python literal a section.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import InvalidCheckpoint
from ..core.strict import build, check_keys
from ..core.weights import MAX_CONFIG_BYTES, check_plain
from ..tokenizers.image.flextok import FlexTok
from ..tokenizers.image.flextok_network import NUM_KINDS, NUM_MODULATIONS, TIME_FEATURES
from ..tokenizers.image.kl_vae import KLAutoencoder
from .fields import Config, Fields, StateDict, renamed

logger = logging.getLogger(__name__)
SECTIONS = ("vae", "encoder", "decoder", "regularizer")
NAMES = re.compile(r"flextok(\.\w{1,60}){1,8}")  # of their classes: text, as any other value
MODULES = {  # of the two networks that hold weights or say something, and the class of each
    "encoder": {
        "enc_patch_emb": "PatchEmbedder", "enc_posemb_module": "PositionalEmbeddingAdder",
        "enc_register_module": "Registers1D", "enc_seq_packer": "BlockWiseSequencePacker",
        "enc_transformer": "FlexTransformer", "enc_to_latents": "LinearHead",
    },
    "decoder": {
        "dec_from_latents": "LinearLayer", "dec_registers_posemb_module": "PositionalEmbeddingAdder",
        "dec_nested_dropout": "MaskedNestedDropout", "dec_latent_dropout": "LearnedNullCond",
        "dec_noise_patch_emb": "PatchEmbedder", "dec_patches_posemb_module": "PositionalEmbeddingAdder",
        "dec_seq_packer": "BlockWiseSequencePacker", "dec_time_embedder": "TimestepEmbedder",
        "dec_transformer": "FlexTransformer", "dec_to_patches": "ToPatchesLinearHead",
    },
}  # fmt: skip
PLUMBING = ("PerSampleOp", "SequenceUnpacker")  # modules that only move data about
PLACES = {
    "enc_patch_emb.patch_proj": "encoder.patch_embed.proj",
    "enc_posemb_module.posembs": "encoder.patch_embed.positions",
    "enc_register_module.registers": "encoder.registers",
    "enc_to_latents.proj": "encoder.head",
    "dec_from_latents.proj": "decoder.code_embed",
    "dec_registers_posemb_module.posembs": "decoder.register_positions",
    "dec_nested_dropout.dropout_mask_token": "decoder.mask_token",
    "dec_latent_dropout.nullcond": "decoder.null_token",
    "dec_noise_patch_emb.patch_proj": "decoder.patch_embed.proj",
    "dec_patches_posemb_module.posembs": "decoder.patch_embed.positions",
    "dec_time_embedder.mlp.0": "decoder.time_mlp.0",
    "dec_time_embedder.mlp.2": "decoder.time_mlp.2",
    "dec_to_patches.adaLN_modulation.1": "decoder.head_modulation",
    "dec_to_patches.proj": "decoder.head",
}
IN_BLOCK = {  # one product of ours, and which of its rows
    "attn.wq": ("attn.qkv", 0), "attn.wk": ("attn.qkv", 1), "attn.wv": ("attn.qkv", 2),
    "mlp.fc1": ("mlp.fc1", 0), "mlp.fc3": ("mlp.fc1", 1), "adaLN_modulation.1": ("modulation", None),
}  # fmt: skip
# What only the authors' training uses.
UNUSED = re.compile(r"decoder\.module_dict\.dec_repa.*|encoder\.module_dict\.enc_register_module\.extra_registers")
PREFIX = re.compile(r"(encoder|decoder)\.module_dict\.")


def is_known_name(name: str) -> bool:
    """Whether a config's `_target_` is a name of the authors' package."""
    return NAMES.fullmatch(name) is not None


def is_config(config: Config | None) -> bool:
    """Whether a config is one of FlexTok's."""
    return config is not None and all(isinstance(sections(config).get(name), Mapping) for name in SECTIONS)


def sections(config: Config) -> Config:
    """The sections of a config, which may lie below "config"."""
    below = config.get("config")
    return below if isinstance(below, Mapping) and "encoder" in below else config


def header_config(path: Path) -> dict[str, Any] | None:
    """The config in the header of a safetensors file; None where there is none.

    Raises InvalidCheckpoint when it is not plain data, or names code of others than the authors.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError):
        return None  # reading the weights says more
    if not all(name in header for name in SECTIONS):
        return None
    config = {}
    for name, text in header.items():
        if len(text) > MAX_CONFIG_BYTES:
            raise InvalidCheckpoint(f"{path}: section '{name}' of the header has {len(text):,} characters")
        try:
            config[name] = _plain(ast.literal_eval(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            if name in SECTIONS:
                raise InvalidCheckpoint(f"{path}: section '{name}' of the header is no plain value") from None
    check_plain(config, str(path), names=is_known_name)
    return config


def from_official(config: Config, state_dict: StateDict) -> FlexTok:
    """Return the `FlexTok` of these official keys, in eval mode.

    Raises:
        InvalidCheckpoint: a config that is incomplete or says what we do not have, or keys and shapes that do not fit
            it (listed by their official names).
    """
    arguments = flextok_arguments(config)
    unused = [key for key in state_dict if UNUSED.fullmatch(key)]
    if unused:
        logger.info("%d tensors that only training uses are left out (%s, ...)", len(unused), unused[0])
    saved = {key: value for key, value in state_dict.items() if key not in unused}
    check_keys(official_shapes(arguments), saved)
    return build(FlexTok, arguments, our_weights(saved))


def our_weights(state_dict: StateDict) -> dict[str, Tensor]:
    """Official tensors under our names, in our shapes."""
    return renamed({key: _reshaped(key, value) for key, value in state_dict.items()}, place)


def place(key: str) -> tuple[str, int | None]:
    """Our parameter for an official key, and which part of its rows where several are one product of ours."""
    name = PREFIX.sub("", key)
    if match := re.fullmatch(r"(enc|dec)_transformer\.blocks\.(\d{1,4})\.(.+)\.(weight|bias)", name):
        module, part = IN_BLOCK.get(match[3], (match[3], None))
        return f"{'encoder' if match[1] == 'enc' else 'decoder'}.blocks.{match[2]}.{module}.{match[4]}", part
    if name in PLACES:
        return PLACES[name], None
    module, _, last = name.rpartition(".")
    return f"{PLACES.get(module, module)}.{last}", None


def _reshaped(key: str, value: Tensor) -> Tensor:
    if key.endswith("registers_posemb_module.posembs"):
        return value[0, 0].T
    return value[0].permute(1, 2, 0) if key.endswith(".posembs") else value


def official_value(key: str, ours: Mapping[str, Tensor]) -> Tensor:
    """What stands in `ours` (values by our names, such as gradients) for an official key, in its shape there."""
    name, part = place(key)
    if name not in ours:
        raise InvalidCheckpoint(f"{key} is no parameter of FlexTok")
    value = ours[name]
    if part is not None:
        value = value.chunk(3 if name.endswith("qkv.weight") else 2)[part]
    if key.endswith("registers_posemb_module.posembs"):
        return value.T[None, None]
    return value.permute(2, 0, 1)[None] if key.endswith(".posembs") else value


def official_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every official parameter, and its shape, of a `FlexTok` with these constructor arguments."""
    channels, patch, code_size = arguments["latent_channels"], arguments["patch_size"], len(arguments["levels"])
    values, registers, grid = channels * patch**2, arguments["num_tokens"], tuple(arguments["grid"])
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int, has_bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (outputs,)

    def block(name: str, width: int) -> None:
        for part in ("wq", "wk", "wv", "proj"):
            linear(f"{name}.attn.{part}", width, width, has_bias=False)
        hidden = int(2 * int(4 * width) / 3)
        for part in ("fc1", "fc3"):
            linear(f"{name}.mlp.{part}", hidden, width, has_bias=False)
        linear(f"{name}.mlp.fc2", width, hidden, has_bias=False)

    prefix, width = "encoder.module_dict.enc_", arguments["encoder_width"]
    linear(f"{prefix}patch_emb.patch_proj", width, values)
    shapes |= {f"{prefix}posemb_module.posembs": (1, width, *grid)}
    shapes |= {f"{prefix}register_module.registers": (registers, width)}
    for number in range(arguments["encoder_depth"]):
        block(f"{prefix}transformer.blocks.{number}", width)
    linear(f"{prefix}to_latents.proj", code_size, width)
    prefix, width = "decoder.module_dict.dec_", arguments["decoder_width"]
    linear(f"{prefix}from_latents.proj", width, code_size)
    shapes |= {f"{prefix}registers_posemb_module.posembs": (1, 1, width, registers)}
    shapes |= {f"{prefix}nested_dropout.dropout_mask_token": (width,), f"{prefix}latent_dropout.nullcond": (width,)}
    linear(f"{prefix}noise_patch_emb.patch_proj", width, values)
    shapes |= {f"{prefix}patches_posemb_module.posembs": (1, width, *grid)}
    linear(f"{prefix}time_embedder.mlp.0", width, TIME_FEATURES)
    linear(f"{prefix}time_embedder.mlp.2", width, width)
    for number in range(arguments["decoder_depth"]):
        linear(f"{prefix}transformer.blocks.{number}.adaLN_modulation.1", NUM_KINDS * NUM_MODULATIONS * width, width)
        block(f"{prefix}transformer.blocks.{number}", width)
    linear(f"{prefix}to_patches.adaLN_modulation.1", 2 * width, width)
    linear(f"{prefix}to_patches.proj", values, width)
    return shapes | vae_shapes(arguments)


def vae_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameters of the VAE, named alike by the authors and by us, and their shapes."""
    factor = 2 ** (len(arguments["vae_channels"]) - 1)
    sizes = {
        "image_size": factor, "latent_channels": arguments["latent_channels"],
        "block_out_channels": arguments["vae_channels"], "layers_per_block": arguments["vae_layers"],
        "norm_num_groups": arguments["vae_norm_groups"], "encoder_attention": False,
    }  # fmt: skip
    try:
        with torch.device("meta"):
            vae = KLAutoencoder(**sizes)
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidCheckpoint(f"the config describes an impossible VAE ({error})") from None
    return {f"vae.{key}": tuple(value.shape) for key, value in vae.state_dict().items()}


def flextok_arguments(config: Config) -> dict[str, Any]:
    """Constructor arguments that an official config describes.

    Raises InvalidCheckpoint for what is missing, and for what no released model has (named).
    """
    config = sections(config)
    encoder, decoder = (_modules(config, name) for name in ("encoder", "decoder"))
    vae, levels = vae_arguments(Fields(config.get("vae"), "vae")), Fields(config.get("regularizer"), "regularizer")
    _check_class(levels, "FSQ")
    grid = encoder["enc_posemb_module"].integers("max_sizes", limit=1024)
    registers = encoder["enc_register_module"].integer("n_max")
    arguments = vae | {
        "num_tokens": registers, "levels": levels.integers("levels", limit=2**12), "grid": grid,
        "patch_size": _patch_size(encoder["enc_patch_emb"]),
        "max_timestep": decoder["dec_time_embedder"].number("max_timestep"),
    }  # fmt: skip
    for name, modules, trunk in (("encoder", encoder, "enc_transformer"), ("decoder", decoder, "dec_transformer")):
        arguments |= {
            f"{name}_width": modules[trunk].integer("dim"), f"{name}_depth": modules[trunk].integer("depth", limit=512),
            f"{name}_head_width": modules[trunk].integer("head_dim", 64),
        }  # fmt: skip
    _agree("the grids of both networks", grid, decoder["dec_patches_posemb_module"].integers("max_sizes", limit=1024))
    _agree("the patch sizes", arguments["patch_size"], _patch_size(decoder["dec_noise_patch_emb"]),
           _patch_size(decoder["dec_to_patches"]))  # fmt: skip
    _agree(
        "the numbers of registers",
        (registers,),
        decoder["dec_registers_posemb_module"].integers("max_sizes", limit=2**20),
    )
    _agree("the sizes of a code", len(arguments["levels"]), encoder["enc_to_latents"].integer("dim_out"),
           decoder["dec_from_latents"].integer("dim_in"))  # fmt: skip
    channels = (encoder["enc_patch_emb"].integer("channels_in"), decoder["dec_to_patches"].integer("channels_out"))
    _agree("the latent channels", vae["latent_channels"], *channels)
    if len(grid) != 2:
        raise InvalidCheckpoint(f"enc_posemb_module.max_sizes must be rows and columns, not {grid}")
    _only(encoder["enc_seq_packer"], "mask_mode", "causal_last")
    _only(decoder["dec_seq_packer"], "mask_mode", "full")
    _only(decoder["dec_transformer"], "adaLN_expansion", NUM_KINDS)
    _only(decoder["dec_time_embedder"], "frequency_embedding_size", TIME_FEATURES)
    _only(decoder["dec_registers_posemb_module"], "posemb_type", "learnable_sum")
    for positions in (encoder["enc_posemb_module"], decoder["dec_patches_posemb_module"]):
        _only(positions, "posemb_type", "sincos")
        _only(positions, "posemb_scaling", "absolute")
    for head in (encoder["enc_to_latents"], decoder["dec_to_patches"]):
        _only(head, "use_mup_readout", False)
    return arguments


def vae_arguments(section: Fields) -> dict[str, Any]:
    """Arguments of `FlexTok` for its VAE, of the section `vae` or of a case of the VAE alone."""
    _check_class(section, "StableDiffusionVAE")
    overrides = section.section.get("_base_config_overrides", section.section.get("base_config_overrides"))
    changes = Fields(overrides or {}, f"{section.where}._base_config_overrides")
    known = {"block_out_channels", "norm_num_groups", "layers_per_block", "scaling_factor"}
    if unknown := set(changes.section) - known:
        raise InvalidCheckpoint(f"{changes.where} changes {', '.join(map(str, unknown))}, which is not converted")
    given = section if "scaling_factor" in section or "scaling_factor" not in changes else changes
    if "scaling_factor" not in given:
        raise InvalidCheckpoint(
            "the config has no vae.scaling_factor, and a wrong one gives wrong pictures without an error; write the "
            "value of the VAE's own config there"
        )
    return {
        "latent_channels": section.integer("latent_channels"),
        "vae_channels": changes.integers("block_out_channels", (128, 256, 512, 512), limit=2**16),
        "vae_layers": changes.integer("layers_per_block", 2, limit=64),
        "vae_norm_groups": changes.integer("norm_num_groups", 32),
        "scaling_factor": given.number("scaling_factor"),
    }


def _modules(config: Config, network: str) -> dict[str, Fields]:
    """The modules of a network that say something, by name."""
    given = Fields(Fields(config.get(network), network).section.get("module_dict"), f"{network}.module_dict").section
    for name, section in given.items():
        if name in MODULES[network] or name.startswith("dec_repa"):
            continue
        target = section.get("_target_", "") if isinstance(section, Mapping) else ""
        if str(target).rpartition(".")[2] not in PLUMBING:
            raise InvalidCheckpoint(f"{network}.module_dict.{str(name)[:60]} is a module that is not known here")
    modules = {name: Fields(given.get(name), f"{network}.module_dict.{name}") for name in MODULES[network]}
    for name, section in modules.items():
        _check_class(section, MODULES[network][name])
    return modules


def _check_class(section: Fields, expected: str) -> None:
    target = section.section.get("_target_", f".{expected}")
    if not isinstance(target, str) or target.rpartition(".")[2] != expected:
        raise InvalidCheckpoint(f"{section.where} is a {str(target)[:80]!r}; a {expected} can be converted")


def _patch_size(section: Fields) -> int:
    sizes = section.integers("patch_sizes", limit=1024)
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise InvalidCheckpoint(f"{section.where}.patch_sizes must be two equal numbers, not {list(sizes)}")
    return sizes[0]


def _agree(what: str, *values: Any) -> None:
    if any(value != values[0] for value in values):
        raise InvalidCheckpoint(f"{what} differ within the config: {', '.join(str(value) for value in values)}")


def _only(section: Fields, key: str, expected: Any) -> None:
    """What a config may leave out, but not say otherwise."""
    value = section.section.get(key)
    if value is not None and (value != expected or isinstance(value, bool) != isinstance(expected, bool)):
        raise InvalidCheckpoint(f"{section.where}.{key} is {value!r:.80}; only {expected!r} can be converted")


def _plain(value: Any, depth: int = 0) -> Any:
    """A Python literal as plain data: tuples become lists."""
    if depth > 32:
        raise ValueError("nested too deep")
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    return value
