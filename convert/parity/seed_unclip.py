"""Replay of Stable unCLIP as SEED draws with it: from embeddings and recorded noise to the picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import InvalidInput
from ...core.strict import load_strictly
from ...tokenizers.image.drawing import Drawing
from ...tokenizers.image.stable_unclip import StableUnCLIP
from .replay import TAP, Replay, Tolerance

LATENTS = Tolerance(atol=5e-4)  # guidance amplifies
IMAGE = Tolerance(atol=2e-3)
SCHEDULERS = {"PNDM": "PNDMScheduler", "DDIM": "DDIMScheduler"}
NOISING = ("DDPMScheduler",)


def replay_unclip(replay: Replay) -> None:
    """Kind unclip_decode: the condition, the latents after each call of the network, and the picture."""
    decoder = build_decoder(replay)
    embedding, noise = replay.input("image_embeds"), replay.input("embed_noise")
    steps, guidance = int(replay.case.setting("steps")), float(replay.case.setting("guidance_scale"))
    drawing = Drawing(0, steps, guidance, decoder.num_calls(steps))
    condition_B = decoder.condition(embedding, noise)
    none_B = torch.zeros_like(condition_B)
    if replay.has("negative_image_embeds"):
        none_B = decoder.condition(replay.input("negative_image_embeds"), replay.input("negative_embed_noise"))
    is_guided = guidance > 1
    replay.check("class_labels", torch.cat([none_B, condition_B]) if is_guided else condition_B, TAP)
    schedule = decoder.pipeline.image_noising_scheduler
    replay.check("noising_alpha_cumprod_0", schedule.alphas_cumprod[:1], TAP)
    rows = len(replay.case.io["prompt_embeds"]) if replay.has("prompt_embeds") else 1
    replay.check("prompt_embeds", decoder.empty_prompt_1TE.expand(rows, -1, -1), TAP)
    replay.check("timesteps", decoder.pipeline.scheduler.timesteps)
    states: list[Tensor] = []
    images_B3SS = decoder.sample(
        condition_B, none_B, replay.input("latents"), drawing, on_latents=lambda latents: states.append(latents.clone())
    )
    replay.check("latents_after_step", torch.stack(states), LATENTS)
    replay.check("image", images_B3SS.movedim(1, -1), IMAGE)


def build_decoder(replay: Replay) -> StableUnCLIP:
    """The case's networks and schedules in diffusers' pipeline."""
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPTextConfig, CLIPTextModel

    case, weights = replay.case, replay.case.weights()

    def network(factory: Any, part: str) -> nn.Module:
        own = {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(f"{part}.")}
        # Newer versions of transformers have one level of names less.
        own = {key.removeprefix("text_model."): value for key, value in own.items()}
        module = factory()  # not on the meta device: some of its buffers are in no checkpoint
        load_strictly(module, own)
        return module.eval()

    def settings(part: str) -> dict:
        found = case.setting(part)
        if not isinstance(found, dict):
            raise InvalidInput(f"{case.folder}: '{part}' must be a mapping, not {found!r}")
        return found

    def scheduler(name: str, given: dict) -> Any:
        if name not in (*SCHEDULERS.values(), *NOISING):
            raise InvalidInput(f"{case.folder}: unknown scheduler {name!r}")
        return getattr(diffusers, name)(**given)

    named = case.setting("scheduler")
    given = settings("scheduler_config") | ({"skip_prk_steps": True} if named == "PNDM" else {})
    if named == "DDIM":
        given = {"clip_sample": False} | given
    noising = settings("noising_scheduler")
    text_encoder = network(lambda: CLIPTextModel(CLIPTextConfig(**settings("text_encoder"))), "text_encoder")
    channels = weights["image_normalizer.mean"].shape[1]
    scaling = {"scaling_factor": float(case.setting("vae_scaling_factor", default=0.18215))}
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=None, tokenizer=None, text_encoder=text_encoder,
        image_normalizer=network(lambda: StableUnCLIPImageNormalizer(channels), "image_normalizer"),
        image_noising_scheduler=scheduler(
            noising.get("cls"), {key: value for key, value in noising.items() if key != "cls"}
        ),
        unet=network(lambda: diffusers.UNet2DConditionModel(**settings("unet")), "unet"),
        scheduler=scheduler(SCHEDULERS.get(named, named), given),
        vae=network(lambda: diffusers.AutoencoderKL(**(settings("vae") | scaling)), "vae"),
    )  # fmt: skip
    with torch.no_grad():
        return StableUnCLIP(pipeline, text_encoder(torch.tensor([case.setting("prompt_ids")]))[0])
