"""Replay of FlexTok: quantizer, guidance and tables, the VAE, the resampler with its training pass, and whole pictures.

Every recorded decoder pass is replayed as it is run here, with the registers that are not kept as one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.strict import build
from ...kernels import fsq
from ...nn.gaussian import DiagonalGaussian
from ...tokenizers.image import flextok_flow as flow
from ...tokenizers.image.flextok import FlexTok
from ...tokenizers.image.flextok_network import sincos_table, time_features
from ...tokenizers.image.kl_vae import KLAutoencoder
from .. import flextok
from ..fields import Fields
from .replay import GRADIENT, IMAGE, LOSS, Replay, Tolerance

INNER = Tolerance(atol=2e-5)
FLOW = Tolerance(atol=5e-5)
TABLE = Tolerance(atol=1e-6)
STUB = {"vae_channels": (4, 4, 4, 4), "vae_layers": 1, "vae_norm_groups": 1}  # where a case has no VAE
SIGMAS = {
    "uniform": lambda raw: raw,
    "ln": flow.logit_normal_times,
    "ln_strat": flow.stratified_times,
}
# Guidance of one step, recorded with settings that no config names.
WITHOUT_MOMENTUM = (3.0, {"momentum": 0.0, "threshold": 0.0, "eta": 0.3})
GUIDANCE = {  # of the recorded flows: scale, and whether it is projected
    "pipe_plain": (1.0, False),
    "pipe_cfg": (3.0, False),
    "pipe_apg": (7.5, True),
    "pipe_cfg_sched": (lambda time: 1 + 4 * time, False),
}


def replay_fsq(replay: Replay) -> None:
    """Kind fsq: every list of levels of the config."""
    for levels in replay.case.setting("config", "levels"):
        name = "x".join(map(str, levels))
        z = replay.input(f"{name}.z")
        replay.check(f"{name}.bounded", fsq.bound(z, levels), INNER)
        for note, (codes, ids) in (("definition", fsq.reference(z, levels)), ("operation", fsq.fsq(z, levels))):
            replay.check(f"{name}.quant", codes, note=note)
            replay.check(f"{name}.tokens", ids, note=note)
        if replay.has(f"{name}.indices"):
            replay.check(f"{name}.codes", fsq.codes_of(replay.input(f"{name}.indices"), levels))


def replay_parts(replay: Replay) -> None:
    """Kind parts: guidance over several steps, time features, tables of places, training times."""
    setting = replay.case.setting("config", "guidance", default={})
    numbers = {key: float(setting.get(key, value)) for key, value in
               {"cfg": 4.5, "apg": 7.5, "momentum": -0.5, "eta": 0.0, "norm_threshold": 2.5}.items()}  # fmt: skip
    projected = flow.ProjectedGuidance(numbers["momentum"], numbers["norm_threshold"], numbers["eta"])
    for match in replay.matches(r"guid\.(\d+)\.cond"):
        prefix = match[0].removesuffix("cond")
        pair = replay.input(match[0]), replay.input(f"{prefix}uncond")
        replay.check(f"{prefix}cfg", flow.plain_guidance(*pair, numbers["cfg"]), INNER)
        replay.check(f"{prefix}apg", projected(*pair, numbers["apg"]), INNER)
    if replay.has("guid.apg_nomom"):
        pair = replay.input("guid.0.cond"), replay.input("guid.0.uncond")
        scale, settings = WITHOUT_MOMENTUM
        replay.check("guid.apg_nomom", flow.ProjectedGuidance(**settings)(*pair, scale), INNER)
    for match in replay.matches(r"time\.freq_max([\d.]+)"):
        replay.check(match[0], time_features(replay.input("time.t"), float(match[1])), INNER)
    for match in replay.matches(r"sincos\.(\d+)x(\d+)x(\d+)"):
        height, columns, width = (int(number) for number in match.groups())
        replay.check(match[0], sincos_table(width, (height, columns)).permute(2, 0, 1)[None], TABLE)
    for match in replay.matches(r"sigma\.(\w+)\.sigma"):
        raw = replay.input(f"sigma.{match[1]}.raw")
        if match[1].startswith("mode"):
            times = flow.mode_times(raw, int(match[1].removeprefix("mode")) / 100)
        elif match[1] in SIGMAS:
            times = SIGMAS[match[1]](raw)
        else:
            raise InvalidInput(f"{replay.case.folder}: unknown density of times {match[1]!r}")
        replay.check(match[0], times, TABLE)


def replay_vae(replay: Replay) -> None:
    """Kind vae: the VAE alone."""
    arguments = flextok.vae_arguments(Fields(replay.case.setting("config"), "config"))
    sizes = {
        "latent_channels": arguments["latent_channels"], "block_out_channels": arguments["vae_channels"],
        "layers_per_block": arguments["vae_layers"], "norm_num_groups": arguments["vae_norm_groups"],
        "encoder_attention": False, "scaling_factor": arguments["scaling_factor"],
    }  # fmt: skip
    vae = build(KLAutoencoder, sizes, replay.case.weights())
    pixels = (replay.input("images") + 1) / 2
    with torch.no_grad():
        posterior = DiagonalGaussian(vae.encode_moments(pixels))
        mean = vae.encode_latents(pixels)
        replay.check("latents_mode", mean, IMAGE)
        # The authors' loss takes the scaled mean and the variance as it is.
        scaled = arguments["scaling_factor"] ** 2 * posterior.mean.square()
        kl = 0.5 * (scaled + posterior.logvar.exp() - 1 - posterior.logvar)
        replay.check("kl", kl.sum(dim=(1, 2, 3)), LOSS)
        if replay.has("posterior_noise"):
            latents = (posterior.mean + posterior.std * replay.input("posterior_noise")) * arguments["scaling_factor"]
            replay.check("latents_sampled", latents, IMAGE)
        recorded = replay.case.io.get("latents_mode", mean)
        replay.check("reconstruction", vae.decode_latents(recorded) * 2 - 1, IMAGE)


def replay_resampler(replay: Replay) -> None:
    """Kind resampler: from latents to tokens, decoder passes, flows, and a training pass."""
    config, weights = replay.case.setting("config"), replay.case.weights()
    arguments = flextok.flextok_arguments(config)
    if not any(key.startswith("vae.") for key in weights):
        stub = FlexTok(**arguments | STUB).vae.state_dict()
        config = config | {"vae": config["vae"] | {"_base_config_overrides": _official(STUB)}}
        weights = weights | {f"vae.{key}": value for key, value in stub.items()}
    model = flextok.from_official(config, weights)
    latents, noise = replay.input("latents"), replay.input("noise")
    with torch.no_grad():
        _replay_encoder(replay, model, latents)
        codes, _ = model.quantize(model.registers_of(latents))
        _replay_decoder(replay, model, latents, noise, codes)
        for name, (scale, is_projected) in GUIDANCE.items():
            if replay.has(f"{name}.latents"):
                steps, lengths = int(replay.input("pipe.timesteps")), replay.input("pipe.keep_k")
                settings = model.decoding_settings(steps=steps, guidance=scale, norm_guidance=is_projected)
                replay.check(f"{name}.latents", model.flow(codes, lengths, settings, noise), FLOW)
    if replay.has("train.noise"):
        _replay_training(replay, model, latents)


def replay_full(replay: Replay) -> None:
    """Kind full: from pictures to tokens and back."""
    model = flextok.from_official(replay.case.setting("config"), replay.case.weights())
    pixels, scale = (replay.input("images") + 1) / 2, model.config.scaling_factor
    with torch.no_grad():
        posterior = DiagonalGaussian(model.vae.encode_moments(pixels))
        replay.check("vae.mean", posterior.mean, IMAGE)
        replay.check("vae.logvar", posterior.logvar, IMAGE)
        latents = (posterior.mean + posterior.std * replay.input("vae.posterior_noise")) * scale
        replay.check("vae.latents", latents, IMAGE)
        replay.check("vae.decoded", model.vae.decode_latents(replay.case.io.get("vae.latents", latents)) * 2 - 1, IMAGE)
        z = model.registers_of(latents)
        replay.check("encode.z", z, IMAGE)
        replay.check("tokens", model.quantize(z)[1])
        ids, lengths = replay.case.io["tokens"], replay.input("detok.lengths")
        padded = torch.where(torch.arange(ids.shape[1]) < lengths[:, None], ids, 0)
        replay.check("detok.quant_padded", model.quantize.lookup(padded))
        noise, steps = replay.input("detok.noise"), int(replay.input("detok.timesteps"))
        for name, (guidance, is_projected) in {"plain": (1.0, False), "cfg": (3.0, False), "apg": (7.5, True)}.items():
            settings = model.decoding_settings(steps=steps, guidance=guidance, norm_guidance=is_projected)
            if replay.has(f"detok_{name}.images"):
                pictures = model.decode_ids(padded, lengths, settings, noise) * 2 - 1
                replay.check(f"detok_{name}.images", pictures, IMAGE)


def _official(arguments: dict) -> dict:
    names = {
        "vae_channels": "block_out_channels",
        "vae_layers": "layers_per_block",
        "vae_norm_groups": "norm_num_groups",
    }
    return {names[key]: value for key, value in arguments.items()}


def _packed(x_BLD: Tensor, replay: Replay, name: str) -> Tensor:
    """Sequences one behind the other, and the zeros that fill the recorded one up: [1, total, D]."""
    flat = x_BLD.flatten(0, 1)
    total = replay.case.io[name].shape[1] if replay.has(name) else len(flat)
    return F.pad(flat, (0, 0, 0, max(0, total - len(flat))))[None]


def _replay_encoder(replay: Replay, model: FlexTok, latents: Tensor) -> None:
    encoder = model.encoder
    patches = encoder.patch_embed(latents)
    grid = [side // model.config.patch_size for side in latents.shape[-2:]]
    replay.check("encode.enc_posemb_module.enc_vae_latents_patched", patches.unflatten(1, grid), INNER)
    num_patches, num_tokens = patches.shape[1], model.max_tokens
    x = torch.cat([patches, encoder.registers.expand(len(patches), -1, -1)], dim=1)
    seen = torch.ones(num_tokens, x.shape[1], dtype=torch.bool).tril(num_patches)
    for block in encoder.blocks:
        x = block(x, num_patches, seen)
    name = "encode.enc_transformer.enc_packed_seq"
    replay.check(name, _packed(x, replay, name), INNER)
    if replay.has("encode.enc_block_mask"):
        to_patches = torch.arange(x.shape[1]) < num_patches
        of_one = torch.cat([to_patches.expand(num_patches, -1), seen])
        side = replay.case.io["encode.enc_block_mask"].shape[-1]
        mask = torch.block_diag(*[of_one.float()] * len(x)).bool()
        replay.check("encode.enc_block_mask", F.pad(mask, [0, side - len(mask)] * 2)[None, None])
    replay.check("encode.enc_unpacker.enc_registers", x[:, num_patches:], INNER)
    z = model.registers_of(latents)
    replay.check("encode.enc_to_latents.enc_registers", z, INNER)
    replay.check("encode.z", z, INNER)
    codes, ids = model.quantize(z)
    replay.check("encode.quant", codes)
    replay.check("encode.tokens", ids)
    bounded = fsq.bound(z, model.quantize.levels)
    replay.check("encode.fsq_margin", 0.5 - (bounded - bounded.round()).abs().max(), INNER)
    for match in replay.matches(r"encode_k(\d+)\.tokens"):
        replay.check(match[0], model.quantize(model.registers_of(latents, int(match[1])))[1])
    if replay.has("encode_mixed.register_sizes"):
        for row, size in enumerate(replay.input("encode_mixed.register_sizes").tolist()):
            ids = model.quantize(model.registers_of(latents[row, None], size))[1]
            replay.check(f"encode_mixed.tokens.{row}", ids)


def _replay_decoder(replay: Replay, model: FlexTok, latents: Tensor, noise: Tensor, codes: Tensor) -> None:
    decoder = model.decoder
    times = replay.input("dec.timesteps")
    noisy = times[:, None, None, None] * noise + (1 - times[:, None, None, None]) * latents
    replay.check("dec.xt", noisy, INNER)
    modulations = decoder.modulations(times)
    registers, _ = decoder.condition(codes)
    for module in ("dec_registers_posemb_module", "dec_latent_dropout"):
        replay.check(f"dec_full.{module}.dec_registers_proj", registers, INNER)
    patches = decoder.patch_embed(noisy)
    grid = [side // model.config.patch_size for side in latents.shape[-2:]]
    replay.check("dec_full.dec_patches_posemb_module.dec_patches", patches.unflatten(1, grid), INNER)
    embedded = decoder.time_mlp(time_features(times, decoder.max_timestep))
    replay.check("dec_full.dec_time_embedder.dec_temb", embedded, INNER)
    layers = replay.case.config["config"]["decoder"]["module_dict"]["dec_transformer"].get("intermediate_layers")
    for index, (block, modulation) in enumerate(zip(decoder.blocks, modulations, strict=False)):
        patches, registers = block(patches, registers, modulation, None)
        if layers and index == layers[0]:
            name = "dec_full.repa_layer"
            replay.check(name, _packed(torch.cat([patches, registers], dim=1), replay, name), INNER)
    name = "dec_full.dec_transformer.dec_packed_seq"
    replay.check(name, _packed(torch.cat([patches, registers], dim=1), replay, name), INNER)
    replay.check("dec_full.v", decoder.velocities(patches, modulations[-1], noisy.shape[-1]), INNER)
    replay.check("dec_full.v", decoder(noisy, *decoder.condition(codes), modulations)[0], INNER, note="as it is run")
    for match in replay.matches(r"dec_k(\d+)\.v"):
        kept = int(match[1])
        condition = decoder.condition(codes[:, :kept])
        replay.check(match[0], decoder(noisy, *condition, modulations)[0], INNER)
        condition = decoder.condition(codes, torch.full((len(codes),), kept))
        replay.check(match[0], decoder(noisy, *condition, modulations)[0], INNER, note="among longer ones")
    nothing = torch.ones(len(codes), dtype=torch.bool)
    for note, given in (("alone", codes[:, :0]), ("among conditional ones", codes)):
        velocity, _ = decoder(noisy, *decoder.condition(given, None, nothing), modulations)
        replay.check("dec_uncond.v", velocity, INNER, note=note)


def _replay_training(replay: Replay, model: FlexTok, latents: Tensor) -> None:
    names = ("noise", "sigmas", "keep_k", "null")
    model.train()
    output = model.velocity_loss(latents, *(replay.input(f"train.{name}") for name in names))
    replay.check("train.v", output.velocity_BCGW, INNER)
    replay.check("train.loss_per_sample", output.losses_B, LOSS)
    replay.check("train.loss", output.loss, LOSS)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for match in replay.matches(r"train\.grad\.(.+)"):
        replay.check(match[0], flextok.official_value(match[1], gradients), GRADIENT)
