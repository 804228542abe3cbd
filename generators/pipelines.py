"""The generators as `diffusers.DiffusionPipeline`s: saved and loaded whole, called with diffusers' own words.

    pipe = mt.MaskGITPipeline.from_generator(mt.load("maskgit-tiny"))
    pipe.save_pretrained("folder")
    pipe = mt.MaskGITPipeline.from_pretrained("folder").to("cuda")
    images = pipe(["food & drink", 3], generator=torch.Generator().manual_seed(0)).images

Once this module is imported `DiffusionPipeline.from_pretrained("folder")` finds these classes, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from torch import Tensor

from ..core.base import check_callback
from ..core.errors import Cancelled, InvalidInput
from ..core.generator import MAX_IMAGES, ImageGenerator
from ..core.images import to_pil
from ..core.packed import check_not_packed
from ..tokenizers.image.kl_vae import KLAutoencoder
from ..tokenizers.image.one_d_piece import OneDPiece
from ..tokenizers.image.titok import TiTok
from .maskgit import MaskGIT
from .xar import XAR

OUTPUT_TYPES = ("pil", "pt", "np")
CODE_FILE = "pipeline.py"
WAY_OUT = "make at most {} pictures in one call"  # a pipeline has no batch_size

# Tell diffusers that "mediatok" in a `model_index.json` is a library whose models it may load.
LOADABLE_CLASSES.setdefault("mediatok", {"Model": ["save_pretrained", "from_pretrained"]})
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["mediatok"])


class _Interrupted(Exception):
    """Leaves the sampling loop when somebody set `pipe._interrupt`."""


class _LabelPipeline(DiffusionPipeline):
    """What both pipelines do; they differ in the names of their components."""

    generator: ImageGenerator

    @classmethod
    def from_generator(cls, generator: ImageGenerator) -> Self:
        """The pipeline of a generator and the tokenizer that it uses."""
        return cls(generator, generator.tokenizer)

    def save_pretrained(self, save_directory, *args, **options) -> None:
        """Save all components; beside them a line of code by which diffusers finds this class on its own.

        That is `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)`.

        Raises:
            InvalidInput: packed weights, which cannot be saved; nothing is written then.
        """
        check_not_packed(self.generator)
        super().save_pretrained(save_directory, *args, **options)
        Path(save_directory, CODE_FILE).write_text(f"from mediatok import {type(self).__name__}  # noqa: F401\n")

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str | None] | None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | tuple[int, int] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict], dict | None] | None = None,
        **options,
    ) -> ImagePipelineOutput | tuple:
        """Make pictures of classes, all in one batch.

        Args:
            class_labels: class names or numbers, None for no class; one or a list.
            num_images_per_prompt: pictures of each label; they follow each other. At most 4096 are made in one call.
            generator: one for each picture, or one for all. One picture with `torch.Generator().manual_seed(s)` is the
                picture that `generate(seed=s)` of the model makes.
            num_inference_steps, guidance_scale, options: see `settings` of the model; None means its defaults.
            output_type: "pil", "pt" (fp32 [N, 3, H, W] in [0, 1]) or "np" (fp32 [N, H, W, 3]).
            callback_on_step_end: called as callback(pipe, step, timestep, {"content": ...}) after each step: timestep
                falls from 1 to 0, content is ids or latents, or None where nothing new can be seen. What it returns
                is ignored. Setting `pipe._interrupt = True` ends the run with what there is.

        Raises:
            InvalidInput: labels, steps, guidance or types that make no sense.
            LimitExceeded: a batch that does not fit in memory.
        """
        if output_type not in OUTPUT_TYPES:
            raise InvalidInput(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}")
        check_callback(callback_on_step_end, "callback_on_step_end")
        model = self.generator
        labels_N = _repeated(model.label_ids(class_labels), num_images_per_prompt)
        settings = model.checked_settings(num_inference_steps, guidance_scale, **options)
        rngs = _rngs(generator, len(labels_N))
        model.check_memory(len(labels_N), settings, WAY_OUT)
        with self.progress_bar(total=settings.total_steps) as bar, model.memory_errors(len(labels_N), WAY_OUT):
            content = self._sample(labels_N.to(model.device), settings, rngs, bar, callback_on_step_end)
            pixels_N3HW = model.decode_content(content).float().clamp(0, 1)
        images = _as_type(pixels_N3HW, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(self, labels_N: Tensor, settings, rngs: list[torch.Generator], bar, callback) -> Tensor:
        self._interrupt = False
        latest: Tensor | None = None

        def on_step(step: int, content: Tensor | None) -> None:
            nonlocal latest
            latest = latest if content is None else content
            bar.update(step - bar.n)
            if callback is not None:
                callback(self, step - 1, 1 - step / settings.total_steps, {"content": content})
            if self._interrupt:
                raise _Interrupted

        try:
            return self.generator.generate_content(labels_N, settings, rngs, on_step=on_step)
        except _Interrupted:
            if latest is None:
                raise Cancelled("interrupted before there was anything to show") from None
            return latest


class MaskGITPipeline(_LabelPipeline):
    """MaskGIT with the tokenizer whose ids it makes."""

    # `from_pipe` passes on what is of exactly a class named here, not of one derived from it.
    def __init__(self, generator: MaskGIT, tokenizer: TiTok | OneDPiece):
        super().__init__()
        generator.use_tokenizer(tokenizer)
        self.register_modules(generator=generator, tokenizer=tokenizer)


class XARPipeline(_LabelPipeline):
    """xAR with the KL autoencoder whose latents it makes."""

    def __init__(self, generator: XAR, vae: KLAutoencoder):
        super().__init__()
        generator.use_tokenizer(vae)
        self.register_modules(generator=generator, vae=vae)


# `DiffusionPipeline.from_pretrained` looks the class named in a saved pipeline up among diffusers' own.
diffusers.MaskGITPipeline, diffusers.XARPipeline = MaskGITPipeline, XARPipeline


def _repeated(labels: Tensor, count: int) -> Tensor:
    """Each label `count` times, where that is not too many pictures for one call."""
    largest = MAX_IMAGES // len(labels)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= largest:
        raise InvalidInput(
            f"num_images_per_prompt={count!r} must be a whole number from 1 to {largest} for {len(labels)} labels"
        )
    return labels.repeat_interleave(count)


def _rngs(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One generator a picture, so that a picture does not depend on its batch."""
    if generator is not None:
        is_list = isinstance(generator, (list, tuple))
        rngs = list(generator) if is_list else [generator]
        for rng in rngs:
            if not isinstance(rng, torch.Generator):
                raise InvalidInput(f"generator must be torch.Generators, not {type(rng).__name__}")
        if is_list and len(rngs) != count:
            raise InvalidInput(f"{len(rngs)} generators for {count} pictures; give one, or one for each")
        if len(rngs) == count:
            return rngs
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _as_type(pixels_N3HW: Tensor, output_type: str):
    if output_type == "pt":
        return pixels_N3HW
    if output_type == "np":
        return pixels_N3HW.movedim(1, -1).cpu().numpy()
    return [to_pil(pixels_3HW) for pixels_3HW in pixels_N3HW]
