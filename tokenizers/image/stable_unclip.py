"""Stable unCLIP (Stable Diffusion 2.1 fine-tuned on image embeddings): a picture of what an embedding says.

The networks and the sampling loop are those of diffusers' `StableUnCLIPImg2ImgPipeline`, without its vision tower,
which nobody needs to draw from an embedding (2.5 GB). Added to it: an embedding of what the picture shall not be like,
a whole batch that starts with the same noise, and progress.

The network is told how noisy an embedding is, which is not at all. Yet diffusers adds noise at that level, too (0.6 %);
the embedding goes in as it is here.

Shape suffixes: B batch, E embedding channels, T text positions, 3/S image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ...core.base import OnStep, report
from ...core.errors import InvalidCheckpoint, MediatokError, ModelNotFound
from ...core.strict import shown
from ...core.weights import inside, read_config
from .drawing import Drawing

RELEASED_DECODER = "sd2-community/stable-diffusion-2-1-unclip"
PARTS = ("image_normalizer", "image_noising_scheduler", "tokenizer", "text_encoder", "unet", "scheduler", "vae")
FILES = [f"{part}/{file}" for part in PARTS for file in ("*.json", "*.txt", "*.safetensors")]
# diffusers' classes that a config may name; no other name is looked up.
SCHEDULERS = (
    "PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


class StableUnCLIP:
    """Draws pictures of embeddings.

    pipeline: a `StableUnCLIPImg2ImgPipeline`, whose `image_encoder` and `feature_extractor` may be None.
    empty_prompt_1TE: the features of the text "", fp32 or as the network computes.
    """

    steps, guidance = 20, 10.0  # the authors'

    def __init__(self, pipeline: Any, empty_prompt_1TE: Tensor):
        self.pipeline, self.empty_prompt_1TE = pipeline, empty_prompt_1TE
        pipeline.set_progress_bar_config(disable=True)
        # The pipeline would add noise, and knows no embedding but "none" to guide away from: it gets finished ones.
        pipeline._encode_image = lambda *args, image_embeds, **options: image_embeds

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """From a folder, or from a repository of the hub.

        Raises:
            ModelNotFound: it is not here and cannot be fetched.
            InvalidCheckpoint: the folder holds something else, or names code.
        """
        folder = Path(path) if Path(path).is_dir() else _download(str(path))
        try:
            pipeline = build_pipeline(folder, dtype)
        except MediatokError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = shown(" ".join(str(error).split())[:200])
            raise InvalidCheckpoint(f"{folder} does not hold Stable unCLIP as diffusers saves it: {reason}") from None
        tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
        length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        ids = tokenizer([""], padding="max_length", max_length=length, return_tensors="pt").input_ids
        with torch.no_grad():
            return cls(pipeline, text_encoder(ids)[0])

    @property
    def embedding_size(self) -> int:
        return self.pipeline.image_normalizer.mean.shape[1]

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def to(self, device: torch.device) -> Self:
        if self.pipeline.device != device:
            self.pipeline.to(device)
        return self

    def num_calls(self, steps: int) -> int:
        """Calls of the network for so many steps: one more with the released scheduler (PNDM)."""
        self.pipeline.scheduler.set_timesteps(steps)
        return len(self.pipeline.scheduler.timesteps)

    def condition(self, embedding_BE: Tensor, noise_BE: Tensor | None = None) -> Tensor:
        """What the network is given of embeddings, [B, 2E]: them, and that they are noisy at level 0.

        With `noise_BE`, the embedding is made that noisy, as diffusers does.
        """
        from diffusers.models.embeddings import get_timestep_embedding

        level_B = torch.zeros(len(embedding_BE), dtype=torch.int64, device=embedding_BE.device)
        level_BE = get_timestep_embedding(level_B, self.embedding_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        if noise_BE is not None:
            # Not by the normaliser's own method, which makes new parameters at every call.
            normalizer = self.pipeline.image_normalizer
            mean, deviation = normalizer.mean.detach(), normalizer.std.detach()
            normal_BE = (embedding_BE - mean) / deviation
            normal_BE = self.pipeline.image_noising_scheduler.add_noise(normal_BE, noise_BE, level_B)
            embedding_BE = normal_BE * deviation + mean
        return torch.cat([embedding_BE, level_BE.to(embedding_BE.dtype)], dim=1)

    @torch.no_grad()
    def draw(
        self,
        embedding_BE: Tensor,
        drawing: Drawing,
        negative_BE: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Pixels fp32 [B, 3, S, S] in [0, 1] of embeddings fp32 [B, E].

        on_step: called as on_step(call, total) after every call of the network.
        """
        dtype = self.pipeline.unet.dtype
        condition_B = self.condition(embedding_BE.to(dtype))
        # Nothing at all, the level's part included, is what the network was trained to take for "no embedding".
        none_B = torch.zeros_like(condition_B) if negative_BE is None else self.condition(negative_BE.to(dtype))
        return self.sample(condition_B, none_B, self.start(drawing.seed, len(embedding_BE)), drawing, on_step)

    def start(self, seed: int, batch: int) -> Tensor:
        """The noise that pictures start as, the same for each."""
        unet = self.pipeline.unet
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(unet.device, unet.dtype).expand(batch, -1, -1, -1)

    @torch.no_grad()
    def sample(
        self,
        condition_B: Tensor,
        none_B: Tensor,
        latents: Tensor,
        drawing: Drawing,
        on_step: OnStep | None = None,
        on_latents: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """`draw` of what `condition` made, from `latents` [B, C, G, G]; `on_latents` gets those after each call."""
        pipeline, batch = self.pipeline, len(condition_B)
        total = self.num_calls(drawing.steps)
        calls = 0

        def show(step: int, timestep: int, latents: Tensor) -> None:
            nonlocal calls
            calls += 1
            if on_latents is not None:
                on_latents(latents)
            report(on_step, calls, total)

        is_guided = drawing.guidance > 1
        prompt_BTE = self.empty_prompt_1TE.to(latents.device, latents.dtype).expand(batch, -1, -1)
        return pipeline(
            prompt_embeds=prompt_BTE,
            negative_prompt_embeds=prompt_BTE,
            image_embeds=torch.cat([none_B, condition_B]) if is_guided else condition_B,
            latents=latents * pipeline.scheduler.init_noise_sigma,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            output_type="pt",
            callback=show,
        ).images.float()


def build_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder as diffusers saves it, from the classes that belong there; no file chooses others."""
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPTextModel, CLIPTokenizer

    for part in PARTS:
        if not (folder / part).is_dir():
            raise InvalidCheckpoint(f"{folder} has no folder {part}, as Stable unCLIP has it")
        for config in sorted((folder / part).glob("*config.json")):
            read_config(inside(folder / part, config.name))  # plain data that names no code

    def scheduler(part: str) -> Any:
        config = read_config(inside(folder / part, "scheduler_config.json"))
        name = config.get("_class_name")
        if name not in SCHEDULERS:
            raise InvalidCheckpoint(f"{folder / part} names the scheduler {name!r}; known: {', '.join(SCHEDULERS)}")
        return getattr(diffusers, name).from_config(config)

    def network(cls: type, part: str) -> Any:
        return cls.from_pretrained(
            folder / part, local_files_only=True, use_safetensors=True, torch_dtype=dtype
        ).eval()  # fmt: skip

    return diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=None,
        image_normalizer=network(StableUnCLIPImageNormalizer, "image_normalizer"),
        image_noising_scheduler=scheduler("image_noising_scheduler"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        text_encoder=network(CLIPTextModel, "text_encoder"),
        unet=network(diffusers.UNet2DConditionModel, "unet"),
        scheduler=scheduler("scheduler"),
        vae=network(diffusers.AutoencoderKL, "vae"),
    )


def _download(hub_id: str) -> Path:
    way_out = (
        f"download {RELEASED_DECODER} where there is a network and set tokenizer.image_decoder to its folder. Encoding "
        "and decode_embedding need none"
    )
    if len(hub_id.split("/")) != 2 or hub_id.startswith((".", "/", "-", "~")):
        raise ModelNotFound(f"the image decoder {shown(hub_id)} is no folder here; {way_out}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES, ignore_patterns=["*.fp16.*", "*.bf16.*"]))
    except Exception as error:  # huggingface_hub raises many kinds: no network, no such repository, gated ...
        raise ModelNotFound(
            f"the image decoder {shown(hub_id)} could not be downloaded ({error.__class__.__name__}); {way_out}"
        ) from error
