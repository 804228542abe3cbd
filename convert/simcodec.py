"""SimCodec and HiFi-Codec: the authors' keys to our `SimCodec`.

The codec comes alone, as dicts "encoder", "quantizer" and "generator" in a `g_00100000` file beside its config.json
(the layout of HiFi-GAN's trainer), or inside GenSE's S2S checkpoint as `codec_tokenizer.*`. Weight norm is folded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidCheckpoint, InvalidInput, ModelNotFound
from ..core.strict import check_keys, load_strictly
from ..core.weights import WEIGHT_SUFFIXES, inside, read_config, read_state_dict
from ..tokenizers.speech.simcodec import SimCodec
from .fields import Config, Fields, StateDict

IN_GENSE = "codec_tokenizer."
BESIDE_IT = ("lm.", "xlsr.", "km.")  # what else is in GenSE's S2S checkpoint
GENERATOR_FILE = re.compile(r"g_\d{8}")
CONFIG = "config.json"
# The two forms of weight norm, magnitude and direction, behind a layer's name.
WEIGHT_NORMS = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)
MAX_STAGES = 12
MAX_CODEBOOKS = 64


def from_official(config: Config, state_dict: StateDict) -> SimCodec:
    """Return the `SimCodec` of these official keys, in eval mode.

    Args:
        config: the codec's config.json, or a parity case's that holds it as "config"; rates and dilations are read, the
            rest has to agree with the weights.
        state_dict: keys `encoder.*`, `quantizer.*` and `generator.*`, also behind `codec_tokenizer.`; with weight norm
            in either form, or without.

    Raises:
        InvalidCheckpoint: unknown or missing keys or wrong shapes (listed), or a config that does not fit them.
    """
    config = config["config"] if isinstance(config.get("config"), Mapping) else config
    weights = folded(codec_keys(state_dict))
    return _build(simcodec_arguments(config, weights), weights)


def from_arguments(arguments: Mapping[str, Any], state_dict: StateDict) -> SimCodec:
    """The `SimCodec` of these constructor arguments and official keys, for releases without a config."""
    return _build(arguments, folded(codec_keys(state_dict)))


def _build(arguments: Mapping[str, Any], weights: StateDict) -> SimCodec:
    try:
        with torch.device("meta"):
            model = SimCodec(**arguments)
    except InvalidInput as error:
        raise InvalidCheckpoint(f"the config describes an impossible model ({error})") from None
    ours = official_names(model)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_keys({official: shapes[name] for official, name in ours.items()}, weights)
    load_strictly(model, {ours[key]: value for key, value in weights.items()})
    return model.eval()


def codec_keys(state_dict: StateDict) -> dict[str, Tensor]:
    """The codec's part of GenSE's checkpoint; of a codec alone, everything."""
    if not any(key.startswith(IN_GENSE) for key in state_dict):
        return dict(state_dict)
    return {key.removeprefix(IN_GENSE): v for key, v in state_dict.items() if not key.startswith(BESIDE_IT)}


def folded(weights: StateDict) -> dict[str, Tensor]:
    """The plain weight g v / |v| in the place of every g and v; |v| is that of each slice along the first axis."""
    weights = dict(weights)
    for magnitude_name, direction_name in WEIGHT_NORMS:
        for key in [key for key in weights if key.endswith(direction_name)]:
            layer = key.removesuffix(direction_name)
            direction, magnitude = weights[key], weights.get(layer + magnitude_name)
            if direction.ndim == 3 and magnitude is not None and magnitude.shape == (len(direction), 1, 1):
                del weights[key], weights[layer + magnitude_name]
                norm = torch.linalg.vector_norm(direction.float(), dim=(1, 2), keepdim=True)
                weights[f"{layer}.weight"] = direction.float() * (magnitude.float() / norm)
    return weights


def official_names(model: SimCodec) -> dict[str, str]:
    """Official key, with folded weights -> ours."""
    config = model.config
    blocks, groups = len(config.resblock_kernel_sizes), config.n_code_groups
    is_hificodec = config.architecture == "hificodec"

    def name(ours: str) -> str:
        network, rest = ours.split(".", 1)
        if network == "quantize":
            layer, group = divmod(int(rest.removeprefix("codebooks.")), groups)
            place = f"{layer + 1 if layer else ''}" if is_hificodec else f".{layer}"
            return f"quantizer.quantizer_modules{place}.{group}.embedding.weight"
        rest = rest.replace("downs.", "ups.").replace("norms.", "normalize.")
        rest = re.sub(
            r"^(resblocks|normalize)\.(\d+)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) * blocks + int(m[3])}", rest
        )
        return f"{'generator' if network == 'decoder' else network}.{rest}"

    return {name(ours): ours for ours in model.state_dict()}


def simcodec_arguments(config: Config, weights: StateDict) -> dict[str, Any]:
    """Constructor arguments from the codec's config, and from the shapes what it leaves out."""
    fields, shapes = Fields(config, "the codec's config"), {key: tuple(value.shape) for key, value in weights.items()}
    if fields.integer("channel", 1) != 1:
        raise InvalidCheckpoint(f"the codec's config has {config['channel']} channels; only mono codecs are read")
    if str(config.get("resblock", "1")) != "1":
        raise InvalidCheckpoint(f"the codec's config has resblock {config['resblock']!r}; only '1' is read")
    rates, block_kernels = fields.integers("upsample_rates"), fields.integers("resblock_kernel_sizes")
    if len(rates) > MAX_STAGES:
        raise InvalidCheckpoint(f"the codec's config has {len(rates)} stages; at most {MAX_STAGES} are read")
    is_hificodec, layers, groups, codes = _codebooks(shapes)
    if "upsample_initial_channel" in fields:
        de_filters = max(1, fields.integer("upsample_initial_channel") // 2 ** len(rates))
    else:
        de_filters = _shape(shapes, "generator.conv_post.weight")[1]
    en_filters = fields.integer("width", _shape(shapes, "encoder.conv_pre.weight")[0])
    arguments = {
        "sample_rate": fields.integer("sampling_rate", fields.integer("sample_rate", 16000)),
        "en_filters": fields.integer("en_filters", en_filters), "de_filters": fields.integer("de_filters", de_filters),
        "vq_dim": fields.integer("vq_dim", _shape(shapes, "encoder.conv_post.weight")[0]),
        "upsample_rates": rates, "upsample_kernel_sizes": fields.integers("upsample_kernel_sizes"),
        "resblock_kernel_sizes": block_kernels, "resblock_dilation_sizes": _dilations(fields, len(block_kernels)),
        "n_q": fields.integer("n_q", layers, MAX_CODEBOOKS),
        "n_code_groups": fields.integer("n_code_groups", groups, MAX_CODEBOOKS),
        "n_codes": fields.integer("n_codes", codes),
        "codebook_loss_lambda": fields.number("codebook_loss_lambda", 1.0),
        "commitment_loss_lambda": fields.number("commitment_loss_lambda", 0.25),
    }  # fmt: skip
    if is_hificodec:
        arguments |= {"architecture": "hificodec", "spread_loss_lambda": 0.0}
        if "groupnorm_groups" in fields:
            arguments["norm_groups"] = fields.integers("groupnorm_groups", limit=2**16)
    return arguments


def _codebooks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bool, int, int, int]:
    """Whether they lie as HiFi-Codec's do (quantizer_modules.GROUP, quantizer_modules2.GROUP) and not as SimCodec's
    (quantizer_modules.LAYER.GROUP); numbers of layers and groups, and of codes in each.
    """
    keys = re.compile(r"quantizer\.quantizer_modules(\d?)\.(?:(\d+)\.)?(\d+)\.embedding\.weight")
    found = {match: shape for key, shape in shapes.items() if (match := keys.fullmatch(key))}
    if not found:
        raise InvalidCheckpoint("these are no weights of a codec: quantizer.quantizer_modules is missing")
    is_hificodec = all(match[2] is None for match in found)
    layers, groups = ({match[number] for match in found} for number in (1 if is_hificodec else 2, 3))
    return is_hificodec, len(layers), len(groups), max(1, *next(iter(found.values()))[:1])


def _dilations(fields: Fields, count: int) -> tuple[tuple[int, ...], ...]:
    lists = fields.section.get("resblock_dilation_sizes")
    if not isinstance(lists, list | tuple) or len(lists) != count:
        raise InvalidCheckpoint(f"{fields.where}.resblock_dilation_sizes must be {count} lists, not {lists!r:.80}")
    where = f"{fields.where}.resblock_dilation_sizes"
    return tuple(Fields({str(i): dilations}, where).integers(str(i)) for i, dilations in enumerate(lists))


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...]:
    if len(shapes.get(key, ())) != 3:
        raise InvalidCheckpoint(f"these are no weights of a codec with this config: {key} is missing or not 3-d")
    return shapes[key]


# Files.


def is_release(path: Path) -> bool:
    """Whether `path` is a folder with a codec's config.json, or a file of weights in one."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not path.exists() or not file.is_file() or not (path.is_dir() or _is_weights(path)):
        return False
    config = read_config(inside(file.parent, CONFIG))
    return "upsample_rates" in config and "_class_name" not in config


def load_release(path: Path, name: str | None = None) -> SimCodec:
    """Load a file of weights, or of a folder the newest `g_00100000` or else its only one; by the config.json beside.

    name: of the model; that of the folder without.

    Raises:
        ModelNotFound: there are no weights.
        InvalidCheckpoint: several files that could be meant; weights or a config that do not fit each other.
    """
    folder = path if path.is_dir() else path.parent
    weights = _newest(path) if path.is_dir() else path
    config, state_dict = read_config(inside(folder, CONFIG)), read_state_dict(weights)
    try:
        model = from_official(config, state_dict)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{weights}: {error}") from None
    model.name = name or folder.resolve().name
    return model


def _newest(folder: Path) -> Path:
    files = sorted(file.name for file in folder.iterdir() if _is_weights(file))
    numbered = [name for name in files if GENERATOR_FILE.fullmatch(name)]
    if not files:
        raise ModelNotFound(f"{folder} holds no weights (a g_00100000 file, or one *.ckpt)")
    if len(files) > 1 and not numbered:
        raise InvalidCheckpoint(f"{folder} holds several weight files ({', '.join(files[:5])}); name one of them")
    return inside(folder, (numbered or files)[-1])


def _is_weights(file: Path) -> bool:
    return file.suffix in WEIGHT_SUFFIXES or GENERATOR_FILE.fullmatch(file.name) is not None
