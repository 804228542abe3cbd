"""Config rules of the authors' checkpoints, strict keys, and every released tensor by name and shape."""

import gzip
import json
import re
from pathlib import Path

import mediatok as mt
import pytest
import torch
from mediatok.convert import from_official
from mediatok.convert.load import of_entry
from mediatok.convert.titok import titok_arguments
from mediatok.core.errors import InvalidCheckpoint
from mediatok.core.registry import constructor_arguments, find_entry, model_class
from mediatok.training.discriminator import PatchDiscriminator
from safetensors.torch import load_file

CASES = Path(__file__).parent.parent / "parity"
DISCRIMINATOR = CASES / "titok/manifests/training_discriminator.json.gz"
KEPT = ("titok", "one_d_piece")  # systems whose official keys are ours
MANIFESTS = sorted({path for system in KEPT for path in CASES.glob(f"{system}/manifests/*.json.gz")} - {DISCRIMINATOR})


def stem(manifest):
    return manifest.name.removesuffix(".json.gz")


def read_manifest(manifest):
    return json.loads(gzip.decompress(manifest.read_bytes()))


def model_name(manifest):
    return "maskgit-vqgan" if stem(manifest).startswith("maskgit-vqgan") else stem(manifest).replace("_", "-")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=stem)
def test_every_released_tensor(manifest):
    expected = read_manifest(manifest)
    entry = find_entry(model_name(manifest))
    with torch.device("meta"):
        model = model_class(entry.class_name)(**constructor_arguments(entry))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["keys"]
    assert sum(value.numel() for value in model.state_dict().values()) == expected["params"]
    assert abs(entry.parameters - expected["params"]) < 60_000


RENAMED = sorted(
    path for system in ("maskgit", "xar", "kl16_vae") for path in CASES.glob(f"{system}/manifests/*.json.gz")
)
DERIVED = re.compile(r"mask|.*\.rope\..*")  # buffers that follow from the geometry


def renamed_name(manifest):
    name = stem(manifest).lower().replace("_", "-").replace("generator", "maskgit")
    return "maskgit-one-d-piece-s256" if "one-d-piece" in name else name


@pytest.mark.parametrize("manifest", RENAMED, ids=stem)
def test_every_released_tensor_has_its_place(manifest):
    """Releases whose keys ours does not keep: every official key and shape is taken, none is missing."""
    entry, keys = find_entry(renamed_name(manifest)), read_manifest(manifest)["keys"]
    weights = {key: torch.empty(shape, device="meta") for key, shape in keys.items() if not DERIVED.fullmatch(key)}
    model = of_entry(entry, weights)
    assert type(model).__name__ == entry.class_name
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
    for missing in list(weights)[::40]:
        rest = {key: value for key, value in weights.items() if key != missing}
        with pytest.raises(InvalidCheckpoint):
            of_entry(entry, rest)
    with pytest.raises(InvalidCheckpoint, match="unknown"):
        of_entry(entry, weights | {"transformer.extra.weight": torch.empty(3, device="meta")})


def test_the_unreleased_discriminator():
    expected = read_manifest(DISCRIMINATOR)["keys"]
    with torch.device("meta"):
        assert {key: list(value.shape) for key, value in PatchDiscriminator().state_dict().items()} == expected


def test_every_released_model_has_a_manifest():
    entries = [entry for entry in mt.models() if entry.modality == "image" and entry.kind == "tokenizer"]
    # Those of later systems are compared with a digest in their own tests.
    own = ("FlexTok", "Seed", "TokenFlow")
    released = {entry.name for entry in entries if not entry.is_shipped and entry.class_name not in own}
    assert released == {model_name(path) for path in MANIFESTS} | {"kl16"}


def load(case):
    folder = CASES / case
    return json.loads((folder / "config.json").read_text()), load_file(folder / "weights.safetensors")


def official_config(manifest):
    """The config that the authors publish with a checkpoint, as told by its name."""
    sizes = {"s": "small", "b": "base", "l": "large"}
    family, code, *kind = stem(manifest).split("_")
    letters = code.rstrip("0123456789")
    vq = {"vit_enc_model_size": sizes[letters[0]], "vit_dec_model_size": sizes[letters[-1]], "vit_enc_patch_size": 16,
          "vit_dec_patch_size": 16, "num_latent_tokens": int(code[len(letters):])}  # fmt: skip
    if "vae" in kind:
        vq |= {"quantize_mode": "vae", "token_size": 16, "finetune_decoder": False, "is_legacy": False}
    elif kind:
        vq |= {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False, "commitment_cost": 0.25,
               "finetune_decoder": False, "is_legacy": False}  # fmt: skip
        vq |= {"clustering_vq": True, "quantize_mode": "vq"} if family == "tatitok" else {}
    else:
        vq |= {"codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "commitment_cost": 0.25}
    return {"model": {"vq_model": vq}, "dataset": {"preprocessing": {"crop_size": 256}}}


@pytest.mark.parametrize("manifest", [m for m in MANIFESTS if stem(m).startswith(("titok", "tatitok"))], ids=stem)
def test_published_configs_become_the_released_models(manifest):
    keys = dict.fromkeys(read_manifest(manifest)["keys"])
    cls = model_class("TiTok")
    with torch.device("meta"):
        ours = cls(**titok_arguments(official_config(manifest), keys))
        released = cls(**constructor_arguments(find_entry(model_name(manifest))))
    ours, released = ({k: v for k, v in model.config.items() if k[0] != "_"} for model in (ours, released))
    assert ours == released


# Defaults and refusals.


def test_absent_flags_mean_legacy_and_fine_tuned():
    config, weights = load("titok/two_stage_vq")
    del config["official_config"]["model"]["vq_model"]["finetune_decoder"]
    model = from_official("titok", config, weights)
    assert model.config.is_legacy
    assert model.config.has_pixel_decoder


def test_the_bare_official_config_is_enough_where_sizes_are_presets():
    config, weights = load("titok/single_stage_vq")
    with pytest.raises(InvalidCheckpoint, match="differences"):  # base/large by name, tiny by shape
        from_official("titok", config["official_config"], weights)


def test_input_is_left_alone():
    config, weights = load("titok/quantizer_clustering")
    before = {key: value.clone() for key, value in weights.items()}
    quantizer = from_official("titok", config, weights).train()
    quantizer(torch.randn(2, config["token_size"], 1, 5))
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    assert not torch.equal(quantizer.embed_prob, before["embed_prob"])


def test_half_precision_weights_become_fp32():
    config, weights = load("titok/tatitok_vae")
    model = from_official("titok", config, {key: value.half() for key, value in weights.items()})
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_text_is_told_by_the_keys():
    config, weights = load("titok/tatitok_vq")
    vq = config["official_config"]["model"]["vq_model"]
    assert from_official("titok", config, weights).accepts_text
    for field in ("text_context_length", "text_embed_dim"):  # absent: 77 and 768
        vq.pop(field)
    weights["decoder.text_guidance_proj.weight"] = torch.zeros(40, 768)
    weights["decoder.text_guidance_positional_embedding"] = torch.zeros(77, 40)
    assert from_official("titok", config, weights).accepts_text


def test_clustering_flag_without_its_buffer_is_off():
    config, weights = load("titok/tatitok_vq")
    config["official_config"]["model"]["vq_model"]["clustering_vq"] = True
    assert not from_official("titok", config, weights).quantize.clustering
    assert from_official("titok", config, weights | {"quantize.embed_prob": torch.zeros(128)}).quantize.clustering
    config["official_config"]["model"]["vq_model"]["clustering_vq"] = False
    with pytest.raises(InvalidCheckpoint, match=r"unknown quantize\.embed_prob"):
        from_official("titok", config, weights | {"quantize.embed_prob": torch.zeros(128)})


VQ_CHANGES = [
    ("titok/single_stage_vae", {"finetune_decoder": True}, "finetune_decoder must be false"),
    ("titok/single_stage_vae", {"finetune_decoder": None}, "finetune_decoder must be false"),
    ("titok/single_stage_vq", {"finetune_decoder": True}, "only a legacy model"),
    ("titok/single_stage_vq", {"quantize_mode": "fsq"}, "quantize_mode must be one of vq, vae, not 'fsq'"),
    ("titok/single_stage_vq", {"vit_enc_model_size": "huge"}, "must be one of small, base, large, not 'huge'"),
    ("titok/single_stage_vq", {"token_size": None}, r"lacks model\.vq_model\.token_size"),
    ("titok/single_stage_vq", {"token_size": "16"}, "whole number"),
    ("titok/single_stage_vq", {"token_size": True}, "whole number"),
    ("titok/single_stage_vq", {"num_latent_tokens": 0}, "whole number from 1"),
    ("titok/single_stage_vq", {"num_latent_tokens": 10**12}, "whole number from 1 to"),
    ("titok/single_stage_vq", {"num_latent_tokens": 7}, "differences"),
    ("titok/single_stage_vq", {"vit_enc_patch_size": 7}, "multiple of the patch size"),
    ("titok/single_stage_vq", {"is_legacy": "false"}, "true or false"),
    ("titok/single_stage_vq", {"is_legacy": True}, "missing decoder.ffn.2.weight"),
    ("titok/single_stage_vq", {"codebook_size": 127}, r"quantize.embedding.weight has shape \[128, 16\] instead of"),
    ("titok/single_stage_vq", {"text_embed_dim": 12}, "missing decoder.text_guidance_proj"),
    ("titok/two_stage_vq", {"finetune_decoder": False}, "unknown pixel_"),
    ("titok/stage1_train", {"finetune_decoder": True}, "missing pixel_"),
    ("titok/two_stage_vq", {"commitment_cost": "dear"}, "must be a number"),
    ("one_d_piece/lengths", {"quantize_mode": "vae"}, "no VAE mode"),
    ("one_d_piece/lengths", {"is_legacy": False}, "legacy latent order"),
    ("one_d_piece/lengths", {"strict_length_assertion": 3}, "true or false"),
]


@pytest.mark.parametrize(("case", "change", "reason"), VQ_CHANGES)
def test_wrong_configs_are_refused(case, change, reason):
    config, weights = load(case)
    config["official_config"]["model"]["vq_model"].update(change)
    with pytest.raises(InvalidCheckpoint, match=reason):
        from_official(config["system"], config, weights)


def test_impossible_heads_are_refused():
    config, weights = load("titok/single_stage_vq")
    config["size_overrides"]["encoder"]["num_heads"] = 7
    with pytest.raises(InvalidCheckpoint, match="impossible model"):
        from_official("titok", config, weights)
    config["size_overrides"]["encoder"]["num_layers"] = 10**9
    with pytest.raises(InvalidCheckpoint, match="from 1 to 256"):
        from_official("titok", config, weights)


@pytest.mark.parametrize("section", [{}, {"model": {}}, {"model": 3, "dataset": []}, {"model": {"vq_model": [1]}}])
def test_configs_without_their_sections_are_refused(section):
    _, weights = load("titok/single_stage_vq")
    with pytest.raises(InvalidCheckpoint, match="no section"):
        from_official("titok", section, weights)


@pytest.mark.parametrize(
    "case", ["titok/two_stage_vq", "titok/maskgit_vqgan", "titok/quantizer_l2", "one_d_piece/lengths"]
)
def test_unknown_missing_and_misshapen_keys_are_listed(case):
    config, weights = load(case)
    key = sorted(weights)[0]
    with pytest.raises(InvalidCheckpoint, match=r"unknown module\.extra"):
        from_official(config["system"], config, weights | {"module.extra": torch.ones(1)})
    with pytest.raises(InvalidCheckpoint, match=f"{key} has shape"):
        from_official(config["system"], config, weights | {key: weights[key][None]})
    if len(weights) > 20:
        kept = dict(sorted(weights.items())[len(weights) // 2 :])
        with pytest.raises(InvalidCheckpoint, match="missing") as caught:
            from_official(config["system"], config, kept)
        assert str(caught.value).count("missing") == 10
        assert f"{len(weights) - len(kept)} differences" in str(caught.value)
        assert f"and {len(weights) - len(kept) - 10} more" in str(caught.value)


def test_systems():
    config, weights = load("titok/maskgit_vqgan")
    assert type(from_official("maskgit_vqgan", config, weights)).__name__ == "MaskGitVQGAN"
    config, weights = load("one_d_piece/lengths")
    assert type(from_official("one_d_piece", config, weights)).__name__ == "OneDPiece"
    for wrong in ("tiktok", ""):
        with pytest.raises(InvalidCheckpoint, match="unknown system"):
            from_official(wrong, config, weights)
    with pytest.raises(InvalidCheckpoint, match="empty"):
        from_official("titok", config, {})
