"""Next-token generation of pictures over the tokens of any one-dimensional tokenizer of ours.

As FlexTok's authors do it (Bachmann et al. 2025, arXiv 2502.13967, section 4), with models called FlexAR: a causal
transformer writes one token after the other, given a class or a text. Over a tokenizer whose prefixes decode, any
number of tokens is a picture, and the first ones already show what it will be.

Shape suffixes: B pictures, R rows (B, or 2B when guided: the unconditional rows last), N tokens, L tokens of a call,
D width, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.generator import GeneratorOutput, ImageGenerator, check_number
from ..core.labels import check_class_names
from ..core.prompts import read_prompts
from ..core.sizes import MAX_DEPTH, check_sizes, check_whole
from ..kernels.linear import pack_for_inference
from ..nn.modes import in_evaluation_mode
from .next_scale_sampling import MAX_TEMPERATURE, SeededDraws
from .next_token_network import NextTokenTransformer, Shape, Text
from .next_token_text import TEXT_ENCODER, Prompts, T5Features


@dataclass(frozen=True)
class NextTokenSettings:
    """How to sample; `settings` of the model checks and makes it.

    num_tokens: to write. guidance: w of u + w (c - u), so that 1 is none, the same for every token. temperature: of the
    draws; 0 takes the likeliest tokens. top_k: draw among so many of the likeliest; 0 for all. top_p: draw among the
    likeliest that have this share of the probability together; 1 for all.
    """

    num_tokens: int
    guidance: float
    temperature: float
    top_k: int
    top_p: float

    @property
    def total_steps(self) -> int:
        return self.num_tokens


class NextToken(ImageGenerator):
    """Class- or text-conditional generator of tokens, one by one. Defaults are those of FlexAR-1B for classes.

    Args:
        width, depth, num_heads: of the transformer. hidden: width of its gated MLPs.
        norm: "layer" or "rms". qk_norm: norms of queries and keys, too. qkv_bias, bias: of the products that give
            queries, keys and values, and of all others. last_norm, head_norm: behind the blocks; before the head.
        vocab_size, num_tokens: of the tokenizer.
        num_classes: of a class-conditional model, else 0. text_width: of the encoded texts, else 0.
        text_length: positions at which longer texts are cut. text_encoder: the T5 that encoded the texts of training,
            a folder or one of Google's; None for the authors'.
        condition_dropout: share of the training pictures whose class or text is left out.
        guidance_scale, temperature, top_k, top_p: how to sample when the call does not say.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 1664,
        depth: int = 26,
        num_heads: int = 26,
        hidden: int = 4437,
        norm: str = "rms",
        qk_norm: bool = True,
        qkv_bias: bool = False,
        bias: bool = False,
        last_norm: bool = True,
        head_norm: bool = False,
        vocab_size: int = 64_000,
        num_tokens: int = 256,
        num_classes: int = 1000,
        label_names: tuple[str, ...] = (),
        text_width: int = 0,
        text_length: int = 128,
        text_encoder: str | None = None,
        dropout: float = 0.0,
        condition_dropout: float = 0.1,
        tokenizer: str | None = None,
        tokenizer_fingerprint: str | None = None,
        guidance_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__()
        check_sizes(width=width, num_heads=num_heads, hidden=hidden, vocab_size=vocab_size, num_tokens=num_tokens)
        check_sizes(MAX_DEPTH, depth=depth)
        check_sizes(text_length=text_length, **({"num_classes": num_classes} if num_classes else {}))
        check_sizes(**({"text_width": text_width} if text_width else {}))
        if bool(num_classes) == bool(text_width):
            raise InvalidInput(
                f"a generator has classes or reads text: one of {num_classes=} and {text_width=} must be 0"
            )
        if num_classes:
            check_class_names(label_names, num_classes)
        if text_encoder is not None and not isinstance(text_encoder, str):
            raise InvalidInput(f"text_encoder must be a name or a folder, not {text_encoder!r}")
        if width % num_heads:
            raise InvalidInput(f"width {width} is not divisible by {num_heads} heads")
        if norm not in ("layer", "rms"):
            raise InvalidInput(f"norm must be 'layer' or 'rms', not {norm!r}")
        shape = Shape(width, depth, num_heads, hidden, norm, qk_norm, qkv_bias, bias, dropout)
        self.transformer = NextTokenTransformer(
            shape, vocab_size, num_tokens, num_classes, text_width, last_norm, head_norm
        )
        self.text_encoder = TEXT_ENCODER if text_encoder is None else text_encoder
        self._text_features: T5Features | None = None

    @property
    def accepts_text(self) -> bool:
        """Whether pictures are asked for by text, and not by class."""
        return self.config.text_width > 0

    @property
    def num_units(self) -> int:
        return self.config.num_tokens

    @property
    def lengths(self) -> range:
        return range(1, self.config.num_tokens + 1)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def unit_grid(self) -> None:
        return None

    def class_rows(self) -> tuple[str, slice]:
        if self.accepts_text:
            raise InvalidInput(f"{self.name} reads text and has no classes")
        return "transformer.class_embed.weight", slice(0, self.config.num_classes + 1)

    def label_ids(self, labels) -> Tensor | Prompts:
        """Class numbers int64 [N] of labels; or, where the model reads text, the encoded prompts.

        Raises:
            InvalidInput: labels or prompts that cannot be read.
            ModelNotFound: the text encoder is not here.
        """
        return self.condition_of(read_prompts(labels)) if self.accepts_text else super().label_ids(labels)

    def condition_of(self, texts: Sequence[str]) -> Prompts:
        """Any number of prompts as `text_encoder` reads them; `NO_PROMPT` is none."""
        if self._text_features is None or self._text_features.path != self.text_encoder:
            self._text_features = T5Features(self.text_encoder, self.config.text_length)
        if self._text_features.width != self.config.text_width:
            raise InvalidInput(
                f"{self.name} reads texts of {self.config.text_width} channels, and the text encoder "
                f"{self.text_encoder!r} gives {self._text_features.width}"
            )
        return self._text_features(list(texts))

    # Training.

    def forward(
        self, ids_BN: Tensor, condition: Tensor | Prompts, rng: torch.Generator | None = None
    ) -> GeneratorOutput:
        """Drop some classes (int64 [B]) or texts, and predict every token from those before it: the training pass."""
        is_dropped_B = torch.rand(len(ids_BN), generator=rng) < self.config.condition_dropout
        if isinstance(condition, Prompts):
            condition = condition.without(is_dropped_B)
        else:
            condition = torch.where(is_dropped_B.to(condition.device), self.config.num_classes, condition)
        return self.token_loss(ids_BN, condition)[0]

    def token_loss(self, ids_BN: Tensor, condition: Tensor | Prompts) -> tuple[GeneratorOutput, Tensor]:
        """Mean cross entropy of all tokens, and the logits fp32 [B, N, V]."""
        network = self.transformer
        begin_B1D, text = self._conditioned(condition)
        features_BND = network(torch.cat([begin_B1D, network.embed(ids_BN[:, :-1], 0)], dim=1), text)
        logits_BNV = network.logits(features_BND)
        loss = F.cross_entropy(logits_BNV.flatten(0, 1), ids_BN.flatten())
        accuracy = (logits_BNV.detach().argmax(dim=-1) == ids_BN).float().mean()
        return GeneratorOutput(loss, {"accuracy": accuracy}), logits_BNV

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: not to vectors, embeddings and positions."""
        return parameter.ndim >= 2 and not any(part in name for part in ("embed", "positions"))

    # Sampling.

    def settings(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> NextTokenSettings:
        """Checked settings of a run; None takes the model's own.

        Args:
            steps: tokens to write, 1 to `num_units`; all by default. Fewer need a tokenizer whose prefixes decode.
            guidance: 0 to 100: w of u + w (c - u), so that 1 is none.
            temperature, top_k, top_p: see `NextTokenSettings`.

        Raises:
            InvalidInput: a value out of its range or of another type.
        """
        config = self.config
        num_tokens = check_whole(config.num_tokens if steps is None else steps, "steps", 1, config.num_tokens)
        if num_tokens < config.num_tokens:
            self.tokenizer.check_num_tokens(num_tokens)
        return NextTokenSettings(
            num_tokens,
            check_number(config.guidance_scale if guidance is None else guidance, "guidance"),
            check_number(config.temperature if temperature is None else temperature, "temperature", 0, MAX_TEMPERATURE),
            check_whole(config.top_k if top_k is None else top_k, "top_k", 0),
            check_number(config.top_p if top_p is None else top_p, "top_p", 0, 1),
        )

    @torch.inference_mode()
    @in_evaluation_mode
    def generate_ids(
        self,
        condition: Tensor | Prompts,
        settings: NextTokenSettings,
        rngs: Sequence[torch.Generator],
        start_BN: Tensor | None = None,
        keep_BN: Tensor | None = None,
        on_step: Callable[[int, Tensor | None], None] | None = None,
        draws=None,
        later_condition: Tensor | None = None,
    ) -> Tensor:
        """Ids int64 [B, L] of as many tokens as `settings` say, for classes (int64 [B]) or `Prompts`.

        Where `keep_BN` is True the ids of `start_BN` stay, and are context of the later ones. `on_step(step, ids)` gets
        the ids so far where they decode to a picture, at 1, 2, 4, ... tokens and at last, and None in between. `draws`
        replaces the random numbers of `rngs`. `later_condition`: classes int64 [R] of the rows from the second token
        on, for replaying the authors' code, which loses "no class" there.
        """
        network = self.transformer if self._compiled is None else self._compiled
        batch, total = len(condition), settings.num_tokens
        draws = SeededDraws(rngs, total, self.device) if draws is None else draws
        is_guided = settings.guidance != 1
        begin_R1D, text = self._conditioned(self._with_no_condition(condition) if is_guided else condition)
        rows = len(begin_R1D)
        cache = self.transformer.new_cache(rows, total)
        ids_BL = torch.zeros(batch, total, dtype=torch.int64, device=self.device)
        given, kept_by_all = 0, keep_BN is not None and keep_BN[:, :total].all(dim=0).tolist()
        if kept_by_all:  # what comes first and stays is read at once
            ids_BL = torch.where(keep_BN[:, :total], start_BN[:, :total], 0)
            given = next((place for place, is_kept in enumerate(kept_by_all) if not is_kept), total)
        if given == total:
            return ids_BL
        read_R = ids_BL[:, :given].repeat(rows // batch, 1)
        x_RLD = torch.cat([begin_R1D, self.transformer.embed(read_R, 0)], dim=1) if given else begin_R1D
        for place in range(given, total):
            features_RD = network(x_RLD, text, cache)[:, -1]
            drawn_B = draws.draw(slice(place, place + 1), self._guided_logits(features_RD, batch, settings), settings)
            drawn_B = drawn_B[:, 0]
            ids_BL[:, place] = drawn_B if keep_BN is None else torch.where(keep_BN[:, place], ids_BL[:, place], drawn_B)
            if on_step is not None:
                on_step(place + 1, ids_BL[:, : place + 1].clone() if self._can_be_shown(place + 1, total) else None)
            x_RLD = self.transformer.embed(ids_BL[:, place, None].repeat(rows // batch, 1), place)
            if later_condition is not None and place == given:
                begin_R1D, _ = self._conditioned(later_condition)
                cache.length, x_RLD = 0, torch.cat([begin_R1D, x_RLD], dim=1)
        return ids_BL

    def generate_content(self, labels_B, settings, rngs, start=None, keep_BU=None, on_step=None) -> Tensor:
        if keep_BU is not None:
            if bool(keep_BU[:, start.shape[1] :].any()):
                raise InvalidInput(f"keep names tokens that start lacks: it has {start.shape[1]}")
            start = F.pad(start, (0, self.num_units - start.shape[1]))
        return self.generate_ids(labels_B, settings, rngs, start, keep_BU, on_step)

    def _conditioned(self, condition: Tensor | Prompts) -> tuple[Tensor, Text | None]:
        """What rows begin with, [R, 1, D], and the text that they look at."""
        if isinstance(condition, Prompts):
            text = self.transformer.read(condition.states_NME, condition.is_text_NM)
            return self.transformer.begin(len(condition)), text
        return self.transformer.begin(len(condition), condition), None

    def _with_no_condition(self, condition: Tensor | Prompts) -> Tensor | Prompts:
        """The rows of a condition, then as many without any."""
        if not isinstance(condition, Prompts):
            return torch.cat([condition, torch.full_like(condition, self.config.num_classes)])
        rows = torch.arange(len(condition)).repeat(2)
        return condition[rows].without(torch.arange(len(rows)) >= len(condition))

    def _guided_logits(self, features_RD: Tensor, batch: int, settings: NextTokenSettings) -> Tensor:
        """Logits fp32 [B, 1, V]. The head is linear, so guidance acts on what goes into it: one product, not two."""
        network = self.transformer
        normed_RD = network.head_norm(features_RD)
        if settings.guidance != 1:
            conditional, unconditional = normed_RD[:batch], normed_RD[batch:]
            normed_RD = unconditional + settings.guidance * (conditional - unconditional)
        return network.head(normed_RD).float()[:, None]

    def _can_be_shown(self, num_tokens: int, total: int) -> bool:
        tokenizer = self._tokenizer_box.tokenizer
        if num_tokens == total or tokenizer is None or not tokenizer.is_variable_length:
            return num_tokens == total
        if tokenizer.scales:
            return num_tokens in tokenizer.lengths
        return num_tokens & (num_tokens - 1) == 0

    def pack_network(self) -> None:
        pack_for_inference(self, self.transformer)

    def bytes_per_image(self, settings: NextTokenSettings) -> int:
        """Cache, logits and activations of both branches, and the decoded pixels with what leads to them, in fp32."""
        config = self.config
        cache = 2 * 2 * config.depth * settings.num_tokens * config.width
        logits = 8 * config.vocab_size
        activations = 2 * (8 * config.width + 3 * config.hidden)
        side = self.tokenizer.image_size
        return 4 * (cache + logits + activations + 400 * side * side)


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released FlexAR models, by our name.

    Widths and depths are the authors'; kinds of norms and the MLP's width are assumed here, and read from the files
    when they are loaded.
    """
    sizes = {"113m": (768, 12), "382m": (1152, 18), "1b": (1664, 26), "3b": (2304, 36)}
    tokenizer = {"tokenizer": "flextok-d18-d28-dfn"}

    def shape(width: int, depth: int) -> dict:
        return {"width": width, "depth": depth, "num_heads": width // 64, "hidden": int(2 * 4 * width / 3)}

    text = {"num_classes": 0, "text_width": 2048, "guidance_scale": 3.0}
    configs = {f"flexar-{name}-t2i": shape(*size) | text | tokenizer for name, size in sizes.items()}
    return configs | {"flexar-1b-c2i": shape(*sizes["1b"]) | {"tokenizer": "flextok-d18-d28-in1k"}}
