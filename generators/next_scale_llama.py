"""Text to image, scale by scale: TokenFlow's generator (Qu et al. 2024, arXiv 2412.03069, section 3.3).

A LLaMA reads a prompt and writes the ids of TokenFlow's scales, coarse ones first, each as a whole. A scale reads the
codes so far, enlarged from scale to scale; the tokenizer enlarges each scale's codes to the full side at once, so the
two maps differ, on purpose. Scales after the first may be drawn several times over: each further pass reads what the
one before drew, and usually draws more greedily.

Shape suffixes: B pictures, N pictures of a call, R rows (B, or 2B when guided: the unconditional rows last), P prefix
tokens, S tokens of all scales, k tokens of one scale, L tokens of some, C code channels, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor

from ..core.errors import InvalidInput, ModelNotFound, TokenizerMismatch
from ..core.generator import GeneratorOutput, ImageGenerator, check_number
from ..core.prompts import NO_PROMPT, read_prompts
from ..core.registry import TEXT_FILES
from ..core.sizes import MAX_DEPTH, MAX_SIZE, check_sizes, check_whole
from ..core.text_tokenizer import read_text_tokenizer
from ..kernels.linear import pack_for_inference
from ..nn.modes import in_evaluation_mode
from ..nn.shared_mapping_vq import SharedMappingQuantizer, resize_bicubic
from .next_scale_llama_network import LlamaOfScales
from .next_scale_sampling import MAX_TEMPERATURE, NextScaleSettings, SeededDraws, sample_scales
from .text_pieces import BOS, CLOSE, EOS, OPEN, PAD, Pieces, check_pieces

# (top_k, top_p) of the passes over a scale, by their number (the authors' presets).
PASSES = {1: ((600, 0.6),), 2: ((1200, 0.8), (1, 1.0)), 3: ((1200, 0.8), (100, 0.8), (1, 1.0))}
STOCK_NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


@dataclass(frozen=True)
class TextToImageSettings(NextScaleSettings):
    """How to sample; `negative` is what the unconditional rows read, "" for what training dropped prompts for."""

    negative: str = ""

    @property
    def steps(self) -> int:
        """Passes over each scale but the first."""
        return 1 + len(self.again)


@dataclass(frozen=True)
class PromptIds:
    """Prompts as the model reads them, in the place that class numbers have in a class-conditional generator.

    prefix_NP: int64; see `NextScaleLlama.prompt_ids`.
    """

    texts: tuple[str, ...]
    prefix_NP: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor) -> PromptIds:
        return PromptIds(tuple(self.texts[row] for row in rows.tolist()), self.prefix_NP[rows])

    def to(self, device: torch.device) -> PromptIds:
        return PromptIds(self.texts, self.prefix_NP.to(device))

    def tolist(self) -> list[str]:
        return list(self.texts)


class EnlargedCodes:
    """The codes so far as the language model reads them: [B, k, C] of the newest scale, enlarged from one to the next.

    Implements what `sample_scales` asks of a quantizer.
    """

    def __init__(self, quantizer: SharedMappingQuantizer):
        self.quantizer, self.scales, self.code_width = quantizer, quantizer.scales, quantizer.code_width

    def accumulate(self, map_BlC: Tensor, scale: int, ids_Bk: Tensor) -> Tensor:
        """The map of the scale before, or for scale 0 anything, to that of `scale` with its codes added."""
        codes_BkC = self.quantizer.codes(ids_Bk)
        return codes_BkC if scale == 0 else self.view(map_BlC, scale) + codes_BkC

    def view(self, map_BlC: Tensor, scale: int) -> Tensor:
        """A map as `scale` reads it."""
        side = self.quantizer.sides[scale]
        square_BCll = rearrange(map_BlC, "b (h w) c -> b c h w", h=round(map_BlC.shape[1] ** 0.5))
        return rearrange(resize_bicubic(square_BCll, side), "b c h w -> b (h w) c")


class NextScaleLlama(ImageGenerator):
    """Text-conditional generator of TokenFlow's ids: prompts in the place of labels. Defaults are the released 7B's.

        mt.load("tokenflow-t2i").generate(["a red apple", "a sad robot"], seed=0, steps=3)

    Args:
        sides, codebook_size, code_width: the tokenizer's.
        width, depth, num_heads, num_kv_heads, hidden: of the blocks. norm_eps: of their norms. rope_theta: of places.
        text_pieces: the model's own small vocabulary; empty for one that a folder brings (see `use_text`), of which
            `text_vocab_size`, `pad_id`, `bos_id`, `opening` (what stands before a picture) and `closing` (what stands
            behind it, learned and never written) tell. Codes follow on the ids of texts.
        prompt_length: tokens of a prompt at most; more are cut off.
        prompt_drop_prob: share of the training pictures whose prompt is replaced by `negative_prompt`.
        negative_prompt: what guidance leads away from; "" for no text.
        guidance_scale: of the last scale. num_passes: over each scale but the first, 1 to 3.
        tokenizer, tokenizer_fingerprint: the tokenizer's name, and which one exactly.
    """

    accepts_text = True

    @register_to_config
    def __init__(
        self,
        sides: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16),
        codebook_size: int = 32768,
        code_width: int = 40,
        width: int = 4096,
        depth: int = 32,
        num_heads: int = 32,
        num_kv_heads: int = 32,
        hidden: int = 11008,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        text_pieces: tuple[str, ...] = (),
        text_vocab_size: int = 32001,
        pad_id: int = 32000,
        bos_id: int = 1,
        opening: tuple[int, ...] = (529, 2492, 29958),
        closing: tuple[int, ...] = (1533, 2492, 29958, 2),
        prompt_length: int = 128,
        prompt_drop_prob: float = 0.1,
        negative_prompt: str = STOCK_NEGATIVE,
        guidance_scale: float = 7.5,
        num_passes: int = 1,
        tokenizer: str | None = None,
        tokenizer_fingerprint: str | None = None,
    ):
        super().__init__()
        if not isinstance(sides, (tuple, list)) or not sides or sides[0] != 1:
            raise InvalidInput(f"sides must begin with 1, which the prompt predicts, not {sides!r}")
        check_sizes(4096, **{f"sides[{number}]": side for number, side in enumerate(sides)})
        check_sizes(
            codebook_size=codebook_size, code_width=code_width, width=width, num_heads=num_heads, hidden=hidden,
            num_kv_heads=num_kv_heads, prompt_length=prompt_length,
        )  # fmt: skip
        check_sizes(MAX_DEPTH, depth=depth)
        if width % num_heads or width // num_heads % 2 or num_heads % num_kv_heads:
            raise InvalidInput(
                f"width {width} must be an even number of channels for each of {num_heads} heads, and those a multiple "
                f"of num_kv_heads={num_kv_heads}"
            )
        check_pieces(text_pieces)
        if text_pieces:
            self.ids = TextIds(len(Pieces(text_pieces)), PAD, BOS, (OPEN,), (CLOSE, EOS))
        else:
            self.ids = TextIds(text_vocab_size, pad_id, bos_id, tuple(opening), tuple(closing))
        self.ids.check()
        check_whole(num_passes, "num_passes", 1, max(PASSES))
        check_number(prompt_drop_prob, "prompt_drop_prob", 0.0, 1.0)
        check_number(norm_eps, "norm_eps", 0.0, 1.0)
        check_number(rope_theta, "rope_theta", 1.0, 1e9)
        if not isinstance(negative_prompt, str):
            raise InvalidInput(f"negative_prompt must be a text, not {negative_prompt!r}")
        self.transformer = LlamaOfScales(
            tuple(side**2 for side in sides), self.ids.size + codebook_size, self.ids.size, codebook_size, code_width,
            width, depth, num_heads, num_kv_heads, hidden, norm_eps, rope_theta,
        )  # fmt: skip
        self._pieces = Pieces(text_pieces) if text_pieces else None
        self._text_tokenizer: Any = None  # of a released model, see `use_text`

    @property
    def scales(self) -> tuple[int, ...]:
        """Tokens of each scale, coarse to fine."""
        return tuple(side**2 for side in self.config.sides)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(accumulate(self.scales))

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def num_units(self) -> int:
        """Scales: the first ones of a picture can be kept while finer ones are made anew."""
        return len(self.config.sides)

    @property
    def unit_grid(self) -> None:
        return None

    def class_rows(self) -> tuple[str, slice]:
        raise InvalidInput(f"{self.name} has no classes; it reads prompts")

    @property
    def label_names(self) -> tuple[str, ...]:
        """There are none: pictures are asked for by prompts."""
        return ()

    # Texts.

    def use_text(self, folder: str | Path) -> None:
        """Read prompts with the text tokenizer in `folder` (tokenizer.json or tokenizer.model).

        Raises:
            ModelNotFound: there is none. InvalidCheckpoint: it is not what it should be.
        """
        self._text_tokenizer = read_text_tokenizer(Path(folder))

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, without marks of its beginning and end."""
        if self._pieces is not None:
            return self._pieces.encode(text)
        if self._text_tokenizer is None:
            raise ModelNotFound(
                f"{self.name} has no text tokenizer: download tokenizer.model of LLaMA-2, which lies in "
                "huggingface.co/ByteFlow-AI/TokenFlow-t2i, too, and name its folder with model.use_text(folder)"
            )
        return self._text_tokenizer.encode(text, add_special_tokens=False).ids

    def save_pretrained(self, save_directory, *args, **options) -> None:
        super().save_pretrained(save_directory, *args, **options)
        if self._text_tokenizer is not None:
            self._text_tokenizer.save(str(Path(save_directory) / TEXT_FILES[0]))

    def prompt_ids(self, texts: Sequence[str]) -> Tensor:
        """Prefixes int64 [N, P]: padding, the mark of the beginning, the text, what opens a picture.

        `NO_PROMPT` becomes the negative prompt of the config, which training puts in the place of dropped prompts.
        """
        rows = []
        for text in texts:
            text = self.config.negative_prompt if text == NO_PROMPT else text
            ids = [self.ids.bos, *(self.encode_text(text) if text else [])][: self.config.prompt_length]
            if not all(0 <= number < self.ids.size for number in ids):
                raise InvalidInput(f"the text tokenizer has more ids than the {self.ids.size} of {self.name}")
            rows.append([self.ids.pad] * (self.config.prompt_length - len(ids)) + ids + list(self.ids.opening))
        return torch.tensor(rows)

    def label_ids(self, prompts) -> PromptIds:
        """A prompt or several (see `read_prompts`) as they are read."""
        return self.condition_of(read_prompts(prompts))

    def condition_of(self, texts: Sequence[str]) -> PromptIds:
        """Any number of prompts as they are read; `NO_PROMPT` is none."""
        return PromptIds(tuple(texts), self.prompt_ids(texts))

    # Training.

    def forward(
        self, ids_BS: Tensor, prefix_BP: Tensor | PromptIds, rng: torch.Generator | None = None
    ) -> GeneratorOutput:
        """Drop some prompts and predict all scales, each from the true ones before it: the training pass."""
        prefix_BP = prefix_BP.prefix_NP if isinstance(prefix_BP, PromptIds) else prefix_BP
        is_dropped_B = (torch.rand(len(ids_BS), generator=rng) < self.config.prompt_drop_prob).to(ids_BS.device)
        if bool(is_dropped_B.any()):
            none_1P = self.prompt_ids([NO_PROMPT]).to(prefix_BP.device)
            prefix_BP = torch.where(is_dropped_B[:, None], none_1P, prefix_BP)
        loss, accuracy = self.loss_of(self.logits(ids_BS, prefix_BP), ids_BS)
        return GeneratorOutput(loss, {"accuracy": accuracy})

    def logits(self, ids_BS: Tensor, prefix_BP: Tensor) -> Tensor:
        """Logits fp32 [B, L, V] over all ids at every row of a whole sequence (teacher forcing)."""
        closing_BL = torch.tensor(self.ids.closing, device=ids_BS.device).expand(len(ids_BS), -1)
        views = [self.transformer.scale_rows(view, number + 1) for number, view in enumerate(self.views(ids_BS))]
        rows = [self.transformer.prefix_rows(prefix_BP), *views]
        if len(self.ids.closing):
            rows.append(self.transformer.closing_rows(closing_BL))
        num_after = rows[-1].shape[1] if len(self.ids.closing) else 0
        visible = self.transformer.visible(prefix_BP != self.ids.pad, num_after)
        return self.transformer.logits(self.transformer(torch.cat(rows, dim=1), 0, visible))

    def loss_of(self, logits_BLV: Tensor, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy (0-d) of the picture and of what closes it, and the accuracy of the picture's ids."""
        closing_BL = torch.tensor(self.ids.closing, device=ids_BS.device).expand(len(ids_BS), -1)
        target_BL = torch.cat([ids_BS + self.ids.size, closing_BL], dim=1)
        first = logits_BLV.shape[1] - target_BL.shape[1] - bool(self.ids.closing)
        predicted_BLV = logits_BLV[:, first : first + target_BL.shape[1]]
        loss = F.cross_entropy(predicted_BLV.flatten(0, 1), target_BL.flatten())
        is_right_BS = predicted_BLV.detach()[:, : ids_BS.shape[1]].argmax(dim=-1) == target_BL[:, : ids_BS.shape[1]]
        return loss, is_right_BS.float().mean()

    @torch.no_grad()
    def views(self, ids_BS: Tensor) -> list[Tensor]:
        """What the scales from the second on read, fp32 [B, k, C] each."""
        codes, views, map_BkC = EnlargedCodes(self.tokenizer.quantize), [], torch.empty(0)
        with torch.autocast(ids_BS.device.type, enabled=False):
            for scale, places in enumerate(self.transformer.slices[:-1]):
                map_BkC = codes.accumulate(map_BkC, scale, ids_BS[:, places])
                views.append(codes.view(map_BkC, scale + 1))
        return views

    def is_decayed(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Whether weight decay applies: to matrices, but not to embeddings."""
        return parameter.ndim == 2 and "embed" not in name

    # Sampling.

    def settings(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        negative: str | None = None,
    ) -> TextToImageSettings:
        """Checked settings of a run; None takes the model's own.

        Args:
            steps: passes over each scale but the first, 1 to 3. The authors' best has 3 (GenEval 0.55 against 0.50).
            guidance: 0 (none) to 100: t of c + t (c - u) at the last scale; it grows linearly from 0 at the first.
            temperature: of the draws; 0 takes the likeliest codes.
            top_k, top_p: of the first pass, over the preset of `steps`; 0 and 1 for all. Later passes keep theirs.
            negative: what guidance leads away from; None for the config's negative prompt.

        Raises:
            InvalidInput: a value out of its range or of another type.
        """
        config = self.config
        steps = check_whole(config.num_passes if steps is None else steps, "steps", 1, max(PASSES))
        (first_k, first_p), *again = PASSES[steps]
        return TextToImageSettings(
            num_scales=len(self.scales),
            guidance=check_number(config.guidance_scale if guidance is None else guidance, "guidance"),
            temperature=check_number(temperature, "temperature", 0.0, MAX_TEMPERATURE),
            top_k=check_whole(first_k if top_k is None else top_k, "top_k", 0, MAX_SIZE),
            top_p=check_number(first_p if top_p is None else top_p, "top_p", 0.0, 1.0),
            again=tuple(again),
            negative=read_prompts(negative)[0],
        )

    @torch.inference_mode()
    @in_evaluation_mode
    def generate_ids(
        self,
        prefix_RP: Tensor,
        settings: NextScaleSettings,
        draws: SeededDraws,
        start_BL: Tensor | None = None,
        on_pass: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Ids int64 [B, S] for prefixes int64 (see `prompt_ids`); those of the first scales stay when `start_BL` gives
        them.

        With guidance, prefixes of the unconditional rows come behind those of the B pictures. `on_pass(number, ids)`
        gets the ids so far after each pass over a scale.
        """
        network, scales = self.transformer, self.scales
        is_text_RP = prefix_RP != self.ids.pad
        # What is padding in all rows is seen by none.
        first = int((~is_text_RP).all(dim=0).cumprod(dim=0).sum())
        prefix_RP, is_text_RP = prefix_RP[:, first:], is_text_RP[:, first:]
        length = prefix_RP.shape[1]
        cache = network.new_cache(len(prefix_RP), length)
        is_padded = not bool(is_text_RP.all())

        def run(x_RLW: Tensor, visible_RLT: Tensor | None) -> Tensor:
            return network(x_RLW, first + cache.length, visible_RLT, cache)

        def hidden_of(scale: int, view_RkC: Tensor | None) -> Tensor:
            if view_RkC is None:
                causal_PP = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
                return run(network.prefix_rows(prefix_RP), causal_PP & is_text_RP[:, None])[:, -1:]
            visible_R1T = None
            if is_padded:
                visible_R1T = F.pad(is_text_RP, (0, cache.length + scales[scale] - length), value=True)[:, None]
            visible = None if visible_R1T is None else visible_R1T.expand(-1, scales[scale], -1)
            return run(network.scale_rows(view_RkC, scale), visible)

        def again_of(scale: int, view_RkC: Tensor) -> Tensor:
            with cache.kept(cache.length - scales[scale]):
                return hidden_of(scale, view_RkC)

        codes = EnlargedCodes(self.tokenizer.quantize)
        return sample_scales(codes, hidden_of, network.code_logits, settings, draws, start_BL, on_pass, again_of)

    def generate_content(self, labels_B, settings, rngs, start=None, keep_BU=None, on_step=None) -> Tensor:
        start_BL = None
        if keep_BU is not None:
            kept = self._kept_tokens(keep_BU)
            if kept > start.shape[1]:
                raise InvalidInput(f"start has {start.shape[1]} ids, and keep asks for {kept}")
            start_BL = start[:, :kept]
        prefix_RP = labels_B.prefix_NP
        if settings.guidance:
            (negative_P,) = self.prompt_ids([settings.negative]).to(prefix_RP.device)
            prefix_RP = torch.cat([prefix_RP, negative_P.expand_as(prefix_RP)])
        draws = SeededDraws(rngs, sum(self.scales), self.device, settings.steps)
        return self.generate_ids(prefix_RP, settings, draws, start_BL, on_step)

    def _kept_tokens(self, keep_BU: Tensor) -> int:
        """Tokens of the scales that stay: the first ones, the same for all pictures."""
        kept_U = keep_BU[0]
        number = int(kept_U.cumprod(dim=0).sum())
        if bool((keep_BU != kept_U).any()) or bool(kept_U[number:].any()):
            raise InvalidInput(f"{self.name} keeps the first scales of a picture, the same ones of all: keep=range(n)")
        return sum(self.scales[:number])

    # The tokenizer's side.

    def check_tokenizer(self, tokenizer) -> None:
        ours = (tuple(self.config.sides), self.config.codebook_size, self.config.code_width)
        quantizer = getattr(tokenizer, "quantize", None)
        if not isinstance(quantizer, SharedMappingQuantizer):
            raise TokenizerMismatch(f"{self.name} writes ids of a TokenFlow, and {tokenizer.name} is none")
        theirs = (quantizer.sides, tokenizer.vocab_size, quantizer.code_width)
        if ours != theirs:
            raise TokenizerMismatch(
                f"{self.name} makes scales of the sides {ours[0]} of {ours[1]} codes with {ours[2]} channels, "
                f"{tokenizer.name} has {theirs[0]}, {theirs[1]}, {theirs[2]}"
            )

    def bytes_per_image(self, settings: TextToImageSettings) -> int:
        """Cache, activations and draws of both branches, and the decoded pixels with what leads to them."""
        config, longest = self.config, max(self.scales)
        rows = 2 if settings.guidance else 1
        length = config.prompt_length + len(self.ids.opening) + sum(self.scales)
        cache = 2 * config.depth * length * config.width * config.num_kv_heads // config.num_heads
        activations = longest * (6 * config.width + 3 * config.hidden + config.num_heads * length)
        draws = 6 * longest * config.codebook_size
        side = self.tokenizer.image_size
        return 4 * (rows * (cache + activations) + draws + 400 * side * side)

    def pack_network(self) -> None:
        pack_for_inference(self, self.transformer.blocks)


@dataclass(frozen=True)
class TextIds:
    """The ids of texts: how many, and those with a meaning. Codes come behind them."""

    size: int
    pad: int
    bos: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]

    def check(self) -> None:
        """Raise InvalidInput for ids beyond the texts'."""
        check_sizes(text_vocab_size=self.size)
        if not self.opening:
            raise InvalidInput("opening must hold at least one id: its last row predicts the first scale")
        for number in (self.pad, self.bos, *self.opening, *self.closing):
            check_whole(number, "an id of a text", 0, self.size - 1)


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released model, by our name."""
    return {"tokenflow-t2i": {"tokenizer": "tokenflow-b"}}
