"""SEED-LLaMA: a language model that reads and writes pictures as words (Ge et al. 2023, arXiv 2310.01218, section 3.2).

LLaMA of transformers with 8,192 more words, SEED's codes, and two that open and close a picture. Within a text it is

    <img> 32 codes </img>

wherever it stands (`seed_llama_layout.py`). The model only predicts the next token (`seed_llama_sampling.py`); what it
wrote between `<img>` and `</img>` the tokenizer draws.

Prompts of unequal length are read together, padded on the left, and nobody looks at the padding.

Shape suffixes: B prompts, L tokens, T with those that are still to come, V ids, W width, Q codes of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from ..core.base import Model, OnStep, check_callback, report
from ..core.companion import Companion, check_companion, load_companion
from ..core.errors import InvalidInput, LimitExceeded, ModelNotFound, TokenizerMismatch, nearest_names
from ..core.generator import (
    Generation,
    GeneratorOutput,
    check_flag,
    check_number,
    check_option_names,
    image_seeds,
)  # fmt: skip
from ..core.image_tokenizer import ImageTokenizer
from ..core.images import to_pil
from ..core.memory import available_memory
from ..core.prompts import read_prompts
from ..core.registry import TEXT_FILES
from ..core.sizes import MAX_DEPTH, check_sizes, check_whole
from ..core.text_tokenizer import read_text_tokenizer
from ..core.tokens import ImageFrame, Tokens
from ..kernels.linear import linear
from ..nn.layers import to_compute, widened
from ..nn.llama import IGNORED, build_llama, next_token_loss
from ..nn.modes import in_evaluation_mode
from .next_scale_sampling import MAX_TEMPERATURE
from .seed_llama_layout import PROMPTS, Layout, Reply, prompt_parts
from .seed_llama_sampling import ImageVocabulary, Reading, WritingSettings, likeliest_picture, write

MAX_PROMPTS = 1024
MAX_TOKENS = 512  # of a reply, unless the call says
MAX_BEAMS = 64


class SeedLLaMA(Model):
    """A language model over text and SEED's codes. Defaults are those of SEED-LLaMA-8B.

    Args:
        vocab_size: V. first_code, num_codes: where the codes are among the ids. image_tokens: Q.
        begin_image, end_image, begin_text, end_text, padding: ids; the first two of `<img>` and `</img>`.
        hidden_size, intermediate_size, num_layers, num_heads, rms_norm_eps, rope_base, max_positions: LLaMA's.
        prompt: how a question is put: "vicuna" (8B), "llama2" (14B), or "plain" for models that only continue.
        tokenizer, tokenizer_fingerprint: of the picture tokenizer.
    """

    modality = "image"

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 40194,
        first_code: int = 32000,
        num_codes: int = 8192,
        begin_image: int = 40192,
        end_image: int = 40193,
        image_tokens: int = 32,
        begin_text: int = 1,
        end_text: int = 2,
        padding: int = 0,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_layers: int = 32,
        num_heads: int = 32,
        rms_norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
        max_positions: int = 2048,
        prompt: str = "vicuna",
        tokenizer: str | None = "seed-2",
        tokenizer_fingerprint: str | None = None,
    ):
        super().__init__()
        check_sizes(vocab_size=vocab_size, num_codes=num_codes, image_tokens=image_tokens, hidden_size=hidden_size)
        check_sizes(intermediate_size=intermediate_size, num_heads=num_heads, max_positions=max_positions)
        check_sizes(MAX_DEPTH, num_layers=num_layers)
        if hidden_size % num_heads or hidden_size // num_heads % 2:
            raise InvalidInput(f"hidden_size {hidden_size} does not divide into {num_heads} heads of even width")
        if prompt not in PROMPTS:
            raise InvalidInput(f"prompt must be one of {', '.join(PROMPTS)}, not {prompt!r}")
        if not 0 <= first_code <= vocab_size - num_codes:
            raise InvalidInput(
                f"{num_codes} codes from {first_code} on do not fit {vocab_size} ids: this language model has no image "
                "vocabulary"
            )
        codes = slice(first_code, first_code + num_codes)
        for name, number in (("begin_image", begin_image), ("end_image", end_image), ("end_text", end_text)):
            if not 0 <= number < vocab_size or codes.start <= number < codes.stop:
                raise InvalidInput(f"{name}={number} must be one of {vocab_size} ids, and no code")
        self.vocabulary = ImageVocabulary(codes, begin_image, end_image, image_tokens)
        self.layout = Layout(vocab_size, self.vocabulary, begin_text, end_text, padding)
        self.llm = build_llama(
            vocab_size, hidden_size, intermediate_size, num_layers, num_heads, rms_norm_eps, rope_base, max_positions
        )
        self._tokenizer_box = Companion()
        self._text_tokenizer: Any = None

    # The language model.

    def hidden_states(self, ids_BL: Tensor, **options: Any) -> Tensor:
        """[B, L, W] behind the last norm; `options` are those of transformers' `LlamaModel`."""
        inputs_BLW = to_compute(self.llm.model.embed_tokens(ids_BL), self.llm.lm_head.weight)
        return self.llm.model(inputs_embeds=inputs_BLW, **options).last_hidden_state

    def logits(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """Logits fp32 [..., V] over the ids in `ids`, of hidden states [..., W]."""
        return linear(hidden, widened(self.llm.lm_head.weight[ids], hidden)).float()

    def forward(self, ids_BL: Tensor, labels_BL: Tensor | None = None) -> GeneratorOutput:
        """Next-token cross entropy over ids int64 [B, L], padded on the right: the training pass.

        labels_BL: what counts, -100 elsewhere; everything but padding where None.
        """
        if labels_BL is None:
            labels_BL = ids_BL.masked_fill(ids_BL == self.config.padding, IGNORED)
        logits_BLV = self.logits(self.hidden_states(ids_BL, use_cache=False))
        return GeneratorOutput(next_token_loss(logits_BLV, labels_BL), {})

    # Writing.

    def settings(
        self,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 0.5,
        max_images: int | None = None,
        starts_with_image: bool = False,
    ) -> WritingSettings:
        """Checked settings of a run; the defaults are the authors'.

        Args:
            max_tokens: of a reply, 1 to the model's positions; None for 512, or what there is.
            temperature: 0 (no chance) to 10. top_p: 0 to 1 (all).
            max_images: of a reply; None for any number. starts_with_image: begin every reply with a picture.

        Raises:
            InvalidInput: a value out of its range or of another type.
        """
        max_tokens = min(MAX_TOKENS, self.config.max_positions) if max_tokens is None else max_tokens
        max_tokens = check_whole(max_tokens, "max_tokens", 1, self.config.max_positions)
        max_images = max_tokens if max_images is None else check_whole(max_images, "max_images", 0)
        starts_with_image = check_flag(starts_with_image, "starts_with_image")
        if starts_with_image and (max_tokens < self.vocabulary.length + 2 or max_images == 0):
            raise InvalidInput(
                f"a picture takes {self.vocabulary.length + 2} tokens: max_tokens={max_tokens} and "
                f"max_images={max_images} leave no room for one"
            )
        return WritingSettings(
            max_tokens,
            check_number(temperature, "temperature", 0.0, MAX_TEMPERATURE),
            check_number(top_p, "top_p", 0.0, 1.0),
            max_images,
            starts_with_image,
        )

    @torch.inference_mode()
    @in_evaluation_mode
    def generate_ids(
        self,
        prompts: Sequence[Tensor],
        settings: WritingSettings,
        rngs: Sequence[torch.Generator],
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Continue prompts, each int64 [L] with its own length; the ids of each reply without the one that ends it.

        Each draws from its own `rngs[b]` alone, so that its batch does not matter. `on_token` gets the number of tokens
        written after each.
        """
        if settings.starts_with_image:
            prompts = self._before_a_picture(prompts)
        reading, first_BW = self._read(prompts, settings.max_tokens - int(settings.starts_with_image))
        return write(reading, self.logits, first_BW, self.vocabulary, settings, rngs, self.config.end_text, on_token)

    @torch.inference_mode()
    @in_evaluation_mode
    def likeliest_codes(
        self, prompts: Sequence[Tensor], num_beams: int, on_token: Callable[[int], None] | None = None
    ) -> Tensor:
        """Codes int64 [B, Q] of the picture behind each prompt (int64 [L]) that a search with `num_beams` finds.

        One beam takes the likeliest code every time.
        """
        reading, first_BW = self._read(self._before_a_picture(prompts), self.vocabulary.length)
        return likeliest_picture(reading, self.logits, first_BW, self.vocabulary, num_beams, on_token)

    def _before_a_picture(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([prompt.cpu(), torch.tensor([self.vocabulary.begin])]) for prompt in prompts]

    def _read(self, prompts: Sequence[Tensor], num_more: int) -> tuple[Reading, Tensor]:
        """Prompts that are read, with room for `num_more` tokens, and hidden states [B, W] of their last tokens."""
        ids_BL, is_token_BT = self.layout.left_padded(prompts, num_more)
        if is_token_BT.shape[1] > self.config.max_positions:
            raise LimitExceeded(
                f"a prompt of {ids_BL.shape[1]} tokens and {num_more} more are over the {self.config.max_positions} "
                f"that {self.name} can read; shorten it, or lower max_tokens"
            )
        reading = Reading(self.hidden_states, is_token_BT.to(self.device))
        return reading, reading(ids_BL)

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        *,
        seed: int | Sequence[int] | None = None,
        draw_images: bool = True,
        drawing: dict[str, Any] | None = None,
        batch_size: int = 4,
        on_step: OnStep | None = None,
        **options,
    ) -> list[Reply]:
        """Reply to prompts of texts and pictures with texts and pictures.

            model.generate([("What is this?", "photo.jpg")], seed=0)[0].text

        Args:
            prompts: a text, or a list of prompts. Each is a text, or a tuple of texts and pictures in their order; a
                picture is what `read_image` takes but a text (`Path("photo.jpg")`, say), or the `Tokens` of one.
            seed: of the first reply, the others take the next numbers; or one for each. Drawn when None.
            draw_images: draw the pictures that were written; without it they are given as `Tokens`.
            drawing: options of the tokenizer's `decode`.
            batch_size: prompts that are read and continued together.
            on_step: called as on_step(tokens, total) after each token; raise `mt.Cancelled` in it to stop.
            options: see `settings`.

        Raises:
            InvalidInput: empty or unreadable prompts, and values out of range.
            LimitExceeded: a prompt that is too long, or a batch that does not fit in memory.
            ModelNotFound: the text tokenizer is not here, or the image decoder where pictures are to be drawn.
        """
        rows = list(prompts) if isinstance(prompts, list) else [prompts]
        if not 1 <= len(rows) <= MAX_PROMPTS:
            raise InvalidInput(f"give 1 to {MAX_PROMPTS} prompts, not {len(rows)}")
        settings = self.checked_settings(**options)
        seeds = image_seeds(seed, len(rows))
        batch_size = min(check_whole(batch_size, "batch_size", 1), len(rows))
        check_callback(on_step)
        ids = [self.prompt_ids(row) for row in rows]
        if options.get("max_tokens") is None:  # what has room
            room = self.config.max_positions - max(map(len, ids))
            settings = replace(settings, max_tokens=max(1, min(settings.max_tokens, room)))
        drawing = dict(drawing or {})
        known = self.tokenizer.decoding_option_names
        if unknown := next((name for name in drawing if name not in known), None):
            raise InvalidInput(f"{self.tokenizer.name} draws with no {unknown!r}.{nearest_names(unknown, known)}")
        if draw_images and settings.max_images:
            self.tokenizer.decoding_arguments(**drawing)  # a missing decoder is found before the work, not after it
        self.check_memory(batch_size, max(map(len, ids)) + settings.max_tokens)
        replies: list[Reply] = []
        total = settings.max_tokens * -(-len(rows) // batch_size)
        for number, batch in enumerate(torch.arange(len(rows)).split(batch_size)):

            def show(step: int, done: int = number * settings.max_tokens) -> None:
                report(on_step, done + step, total)

            rngs = [torch.Generator().manual_seed(seeds[row]) for row in batch]
            written = self.generate_ids([ids[row] for row in batch], settings, rngs, show)
            replies += [self.reply(reply, draw_images, drawing) for reply in written]
        return replies

    @torch.inference_mode()
    def draw(
        self,
        texts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = 5.0,
        negative: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.5,
        batch_size: int = 4,
        on_step: OnStep | None = None,
    ) -> Generation:
        """One picture for each text.

        Args:
            negative: guide drawing away from the picture that the model writes without any text, as the authors
                evaluate. steps, guidance: of the tokenizer's image decoder.
            num_beams: search the likeliest picture with so many beams (the authors evaluate with 4) and leave nothing
                to chance; 1 draws the codes by `seed`, `temperature` and `top_p`.
            batch_size, on_step: see `generate`.

        Returns a `Generation` whose content are the codes int64 [N, Q]; its labels are the numbers of the texts.
        """
        texts = read_prompts(texts)
        tokenizer, length = self.tokenizer, self.vocabulary.length
        num_beams = check_whole(num_beams, "num_beams", 1, MAX_BEAMS)
        arguments = tokenizer.decoding_arguments(steps=steps, guidance=guidance)
        seeds = image_seeds(seed, len(texts))
        if num_beams > 1:
            codes_NQ = self._searched(texts, num_beams, batch_size, on_step)
        else:
            replies = self.generate(
                texts, seed=seeds, draw_images=False, batch_size=batch_size, on_step=on_step, temperature=temperature,
                top_p=top_p, max_tokens=length + 2, max_images=1, starts_with_image=True,
            )  # fmt: skip
            codes_NQ = torch.cat([reply.images[0].ids for reply in replies])
        none_1Q = None
        if negative:
            none_1Q = self.likeliest_codes([torch.tensor([self.config.begin_text])], num_beams)
        images: list[Image.Image] = []
        for rows in codes_NQ.split(batch_size):
            pixels = tokenizer.decode_ids(rows.to(self.device), negative_ids=none_1Q, **arguments)
            images += [to_pil(picture) for picture in pixels.clamp(0, 1).cpu()]
        return Generation(images, codes_NQ, list(range(len(texts))), seeds)

    def _searched(self, texts: list[str], num_beams: int, batch_size: int, on_step: OnStep | None) -> Tensor:
        """Codes int64 [N, Q] on the CPU that `likeliest_codes` finds for each text."""
        batch_size, length = min(check_whole(batch_size, "batch_size", 1), len(texts)), self.vocabulary.length
        check_callback(on_step)
        ids = [self.prompt_ids(text) for text in texts]
        self.check_memory(batch_size * num_beams, max(map(len, ids)) + length + 1)
        batches = [ids[first : first + batch_size] for first in range(0, len(ids), batch_size)]
        codes = []
        for number, batch in enumerate(batches):

            def show(step: int, done: int = number * length) -> None:
                report(on_step, done + step, len(batches) * length)

            codes.append(self.likeliest_codes(batch, num_beams, show).cpu())
        return torch.cat(codes)

    def checked_settings(self, **options) -> WritingSettings:
        """`settings`, where an option that there is not is an InvalidInput naming the nearest."""
        check_option_names(self, options)
        return self.settings(**options)

    def check_memory(self, batch_size: int, tokens: int) -> None:
        """Refuse a batch whose keys and values would not fit in what is free on this model's device."""
        config = self.config
        per_prompt = 4 * (2 * config.num_layers * config.hidden_size * tokens + 2 * config.vocab_size)
        fitting = available_memory(self.device) // per_prompt
        if batch_size > fitting:
            way_out = f"use batch_size={fitting}" if fitting else "lower max_tokens"
            raise LimitExceeded(f"{batch_size} prompts at once need more memory than {self.device} has; {way_out}")

    # Texts and pictures as ids, and back.

    def prompt_ids(self, prompt) -> Tensor:
        """Ids int64 [L] of a prompt, in the form that this model was tuned with; see `generate`."""
        pieces = [self._piece(piece) for piece in prompt_parts(prompt, self.config.prompt)]
        return self.layout.sequence(pieces, is_whole=False)

    def _piece(self, piece) -> Tensor | list[int]:
        if isinstance(piece, str):
            return self.text_ids(piece)
        tokens = piece if isinstance(piece, Tokens) else self.tokenizer.encode(piece)
        tokens.check(self.tokenizer.name, self.tokenizer.fingerprint)
        if len(tokens) != 1:
            raise InvalidInput(f"a prompt holds pictures one by one, and these are tokens of {len(tokens)}")
        return tokens.ids[0]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, none of them a picture's; see `Layout.text_ids`."""
        return self.layout.text_ids(text, self.text_tokenizer) if text else []

    def reply(self, ids: Sequence[int], draw_images: bool = False, drawing: dict[str, Any] | None = None) -> Reply:
        """Ids that were written as texts and pictures. A picture that is not whole is left out."""
        parts = []
        for part in self.layout.parts(ids):
            if isinstance(part, Tensor):
                tokens = self.image_tokens(part[None])
                parts.append(self.tokenizer.decode(tokens, **(drawing or {})) if draw_images else tokens)
            elif part and (text := self.text_tokenizer.decode(part)):
                parts.append(text)
        return Reply(parts, list(ids))

    def image_tokens(self, codes_1Q: Tensor) -> Tokens:
        """Codes of one picture, int64 [1, Q], as the tokenizer's `Tokens`."""
        tokenizer = self.tokenizer
        side = tokenizer.image_size
        return Tokens(
            ids=codes_1Q, lengths=torch.tensor([codes_1Q.shape[1]]), tokenizer=tokenizer.name,
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, modality="image",
            frames=(ImageFrame(side, side),), is_batch=False,
        )  # fmt: skip

    @property
    def text_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of the text; see `use_text`."""
        if self._text_tokenizer is None:
            raise ModelNotFound(
                f"{self.name} has no text tokenizer: it lies in the folder of the released model (tokenizer.model); "
                "name that with model.use_text(folder)"
            )
        return self._text_tokenizer

    def use_text(self, folder: str | Path) -> None:
        """Read and write texts with the text tokenizer in `folder` (tokenizer.json or tokenizer.model).

        Raises:
            ModelNotFound: there is none. InvalidCheckpoint: it is not what it should be.
        """
        self._text_tokenizer = read_text_tokenizer(Path(folder))

    def save_pretrained(self, save_directory, *args, **options) -> None:
        super().save_pretrained(save_directory, *args, **options)
        if self._text_tokenizer is not None:
            self._text_tokenizer.save(str(Path(save_directory) / TEXT_FILES[0]))

    # The picture tokenizer.

    @property
    def tokenizer(self) -> ImageTokenizer:
        """The picture tokenizer, loaded on first use; it follows this model's device."""
        if self._tokenizer_box.tokenizer is None:
            way_out = "give it one with use_tokenizer(mt.load(...))"
            self.use_tokenizer(load_companion(self, self.config.tokenizer, way_out))
        return self._tokenizer_box.on(self.device)

    def use_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Read and draw pictures with `tokenizer` from now on.

        Raises:
            InvalidInput: it is no picture tokenizer.
            TokenizerMismatch: this model was trained with another one, or one that has other tokens.
        """
        if not isinstance(tokenizer, ImageTokenizer) or tokenizer.is_continuous:
            raise InvalidInput(f"{self.name} needs an image tokenizer with ids, not {type(tokenizer).__name__}")
        check_companion(self, tokenizer, self.config.tokenizer, self.config.tokenizer_fingerprint)
        ours, theirs = (self.config.num_codes, self.vocabulary.length), (tokenizer.vocab_size, tokenizer.max_tokens)
        if ours != theirs:
            raise TokenizerMismatch(
                f"{self.name} knows {ours[1]} tokens of {ours[0]} codes a picture, and {tokenizer.name} has "
                f"{theirs[1]} of {theirs[0]}"
            )
        self._tokenizer_box.tokenizer = tokenizer


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released models, by our name."""
    large = {
        "hidden_size": 5120, "intermediate_size": 13824, "num_layers": 40, "num_heads": 40, "rms_norm_eps": 1e-5,
        "max_positions": 4096,
    }  # fmt: skip
    return {
        "seed-llama-8b-pretrain": {"prompt": "plain"},
        "seed-llama-8b-sft": {},
        "seed-llama-14b-pretrain": large | {"prompt": "plain"},
        "seed-llama-14b-sft": large | {"prompt": "llama2"},
    }
