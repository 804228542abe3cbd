"""MaskGIT over 1-D tokens: all tokens at once, the unsure ones again (Chang et al. 2022, arXiv 2202.04200).

As TiTok (arXiv 2406.07550, section 3.3) and One-D-Piece use it. Generation starts with every token masked. A step
draws all masked tokens from the transformer's guided logits, keeps the most confident draws and masks the rest again,
fewer after each step, until none is left.

Ids: 0 .. C-1 are the tokenizer's codes, C is the mask, then one id for each class, and one for "no class".

Shape suffixes: B batch, N tokens of a picture, K masked tokens, C codes, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..core.generator import GeneratorOutput, ImageGenerator, check_flag, check_number, check_steps
from ..core.labels import check_class_names
from ..core.sizes import MAX_DEPTH, check_sizes
from ..kernels.linear import pack_for_inference
from ..nn.layers import Linear
from ..nn.modes import in_evaluation_mode
from .maskgit_networks import UViT, ViT, init_weights, take
from .maskgit_sampling import DECAYS, GumbelNoise, MaskGITSettings, Step, first_places, plan_steps


class MaskGIT(ImageGenerator):
    """Class-conditional masked generator of 1-D tokens.

    Args:
        network: "vit" (post-norm, as BERT) or "uvit" (pre-norm with long skips; no dropout).
        num_tokens, codebook_size: the tokenizer's.
        class_label_dropout, label_smoothing, loss_weight_unmasked_token: of the training pass.
        num_steps and the rest: how to sample when the call does not say; see `MaskGITSettings`.
    """

    @register_to_config
    def __init__(
        self,
        network: str = "vit",
        hidden_size: int = 768,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 3072,
        dropout: float = 0.1,
        attn_drop: float = 0.1,
        codebook_size: int = 4096,
        num_tokens: int = 32,
        num_classes: int = 1000,
        label_names: tuple[str, ...] = (),
        tokenizer: str | None = None,
        tokenizer_fingerprint: str | None = None,
        class_label_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        loss_weight_unmasked_token: float = 0.1,
        num_steps: int = 8,
        guidance_scale: float = 3.0,
        guidance_decay: str = "constant",
        guidance_scale_pow: float = 3.0,
        randomize_temperature: float = 4.5,
        softmax_temperature_annealing: bool = False,
    ):
        super().__init__()
        if network not in ("vit", "uvit"):
            raise InvalidInput(f"network must be 'vit' or 'uvit', not {network!r}")
        check_sizes(
            hidden_size=hidden_size, num_attention_heads=num_attention_heads, intermediate_size=intermediate_size,
            codebook_size=codebook_size, num_tokens=num_tokens, num_classes=num_classes,
        )  # fmt: skip
        check_sizes(MAX_DEPTH, num_hidden_layers=num_hidden_layers)
        check_class_names(label_names, num_classes)
        if hidden_size % num_attention_heads:
            raise InvalidInput(f"hidden_size {hidden_size} is not divisible by {num_attention_heads} heads")
        num_ids = codebook_size + num_classes + 2
        sizes = (hidden_size, num_hidden_layers, num_attention_heads, intermediate_size)
        if network == "vit":
            self.transformer = ViT(num_ids, num_tokens + 1, *sizes, dropout, attn_drop)
        else:
            self.transformer = UViT(num_ids, num_tokens + 1, *sizes)
        self.lm_head = Linear(hidden_size, codebook_size)
        init_weights(self.lm_head, nn.init.normal_ if network == "vit" else nn.init.trunc_normal_)
        self._near_CC: Tensor | None = None  # of `train_with_near_codes`

    @property
    def mask_id(self) -> int:
        return self.config.codebook_size

    @property
    def num_units(self) -> int:
        return self.config.num_tokens

    @property
    def lengths(self) -> tuple[int]:
        return (self.config.num_tokens,)

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def unit_grid(self) -> None:
        return None

    def class_rows(self) -> tuple[str, slice]:
        first = self.mask_id + 1
        return "transformer.embeddings.weight", slice(first, first + self.config.num_classes + 1)

    # Training (TiTok's recipe).

    def forward(self, ids_BN: Tensor, labels_B: Tensor, rng: torch.Generator | None = None) -> GeneratorOutput:
        """Mask a random share of `ids_BN`, drop some labels, and predict: the training pass."""
        batch = len(ids_BN)
        is_masked_BN = self.draw_mask(torch.rand(batch, generator=rng), torch.rand(ids_BN.shape, generator=rng))
        is_dropped_B = torch.rand(batch, generator=rng) < self.config.class_label_dropout
        labels_B = torch.where(is_dropped_B.to(labels_B.device), self.config.num_classes, labels_B)
        is_masked_BN = is_masked_BN.to(ids_BN.device)
        if self._near_CC is None or not self.training:
            return self.masked_token_loss(ids_BN, is_masked_BN, labels_B)[0]
        target_BNC = self._near_CC[ids_BN]
        # One draw from each row by its cumulative sum: torch.multinomial takes a random number for each code.
        chance_BN1 = torch.rand(*ids_BN.shape, 1, generator=rng).to(ids_BN.device)
        read_BN = torch.searchsorted(target_BNC.cumsum(-1), chance_BN1)[..., 0].clamp(max=self.mask_id - 1)
        return self.masked_token_loss(ids_BN, is_masked_BN, labels_B, read_BN, target_BNC)[0]

    def train_with_near_codes(self, codebook_CD: Tensor, temperature: float) -> None:
        """From now on codes near a picture's own count as right, too, and are read in their place now and then.

        "Soft labeling" and "stochastic sampling" of Lee et al. 2022 (arXiv 2203.01941, section 3.2.3): each code stands
        for softmax(-squared distance / `temperature`) over the codebook [C, D]. It helps where the training pictures
        are few for so many codes. Validation is as before.
        """
        codebook_CD = codebook_CD.detach().float()
        self._near_CC = torch.softmax(-torch.cdist(codebook_CD, codebook_CD).square() / temperature, dim=-1)

    @staticmethod
    def draw_mask(ratio_B: Tensor, order_BN: Tensor) -> Tensor:
        """Bool [B, N] from uniform numbers: arccos(ratio) of the tokens, those whose rank in `order_BN` is low."""
        num_tokens = order_BN.shape[1]
        share_B = (torch.arccos(ratio_B) / (math.pi / 2)).clamp(1e-6, 1.0)
        counts_B = (num_tokens * share_B).round().clamp(min=1)
        return order_BN.argsort(dim=-1) < counts_B[:, None]

    def masked_token_loss(
        self, ids_BN: Tensor, is_masked_BN: Tensor, labels_B: Tensor,
        read_BN: Tensor | None = None, target_BNC: Tensor | None = None,
    ) -> tuple[GeneratorOutput, Tensor]:  # fmt: skip
        """Smoothed cross entropy at every position, unmasked ones weighing less; and the logits [B, N, C].

        The network reads `read_BN` and is to predict the distributions `target_BNC`; both are `ids_BN` by default.
        """
        read_BN = ids_BN if read_BN is None else read_BN
        logits_BNC = self.logits(torch.where(is_masked_BN, self.mask_id, read_BN), labels_B).float()
        target = ids_BN if target_BNC is None else target_BNC.movedim(-1, 1)
        loss_BN = F.cross_entropy(
            logits_BNC.movedim(-1, 1), target, reduction="none", label_smoothing=self.config.label_smoothing
        )
        weight_BN = torch.where(is_masked_BN, 1.0, self.config.loss_weight_unmasked_token)
        loss = (weight_BN * loss_BN).sum() / (weight_BN.sum() + 1e-8)
        is_right_BN = logits_BNC.detach().argmax(dim=-1) == ids_BN
        accuracy = ((is_right_BN & is_masked_BN).sum(dim=1) / is_masked_BN.sum(dim=1)).mean()
        return GeneratorOutput(loss, {"masked_accuracy": accuracy}), logits_BNC

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: not to norms, biases and embeddings."""
        return parameter.ndim >= 2 and not any(part in name for part in ("embed", "norm", "bias"))

    # The network.

    def logits(self, ids_BN: Tensor, labels_B: Tensor) -> Tensor:
        """Logits [B, N, C] over the codes; `ids_BN` holds codes and `mask_id`, label `num_classes` is "no class"."""
        return self.lm_head(self.transformer(self._with_class(ids_BN, labels_B))[:, 1:])

    def _with_class(self, ids_BN: Tensor, labels_B: Tensor) -> Tensor:
        return torch.cat([(self.mask_id + 1 + labels_B)[:, None], ids_BN], dim=1)

    def pack_network(self) -> None:
        pack_for_inference(self, self.transformer)

    def _hidden(self, ids_BL: Tensor, positions_BK: Tensor) -> Tensor:
        """What the head reads at the positions; a compiled network computes all, so that shapes do not change."""
        if self._compiled is None:
            return self.transformer(ids_BL, positions_BK)
        return take(self._compiled(ids_BL).clone(), positions_BK)

    # Sampling.

    def settings(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        *,
        guidance_decay: str | None = None,
        guidance_pow: float | None = None,
        temperature: float | None = None,
        annealing: bool | None = None,
    ) -> MaskGITSettings:
        """Checked settings of a run; None takes the model's own.

        Args:
            steps: 1 to 1000.
            guidance: 0 to 100. With the decays "constant" and "linear" it is w of c + w (c - u), so that 0 is none.
                With "power-cosine" it is 1 + w, as in xAR, so that 1 is none (and less turns away from the class).
            annealing: True or False. The rest: see `MaskGITSettings`.

        Raises:
            InvalidInput: a value out of its range or of another type.
        """
        config = self.config
        decay = config.guidance_decay if guidance_decay is None else guidance_decay
        if not isinstance(decay, str) or decay not in DECAYS:
            raise InvalidInput(f"guidance_decay={decay!r} must be one of {', '.join(DECAYS)}")
        power = config.guidance_scale_pow if guidance_pow is None else guidance_pow
        temperature = config.randomize_temperature if temperature is None else temperature
        annealing = config.softmax_temperature_annealing if annealing is None else annealing
        return MaskGITSettings(
            steps=check_steps(config.num_steps if steps is None else steps),
            guidance=check_number(config.guidance_scale if guidance is None else guidance, "guidance"),
            guidance_decay=decay,
            guidance_pow=check_number(power, "guidance_pow"),
            temperature=check_number(temperature, "temperature"),
            annealing=check_flag(annealing, "annealing"),
        )

    @torch.inference_mode()
    @in_evaluation_mode
    def generate_ids(
        self,
        labels_B: Tensor,
        settings: MaskGITSettings,
        rngs: Sequence[torch.Generator],
        start_BN: Tensor | None = None,
        keep_BN: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        noise: GumbelNoise | None = None,
    ) -> Tensor:
        """Ids int64 [B, N] for class numbers `labels_B`; where `keep_BN` is True those of `start_BN` stay.

        `on_step(step, ids)` gets whole ids: kept and decided ones, and the last draw of the others. `noise` replaces
        the noise of `rngs`.
        """
        noise = GumbelNoise(rngs, self.device) if noise is None else noise
        batch, num_tokens = len(labels_B), self.config.num_tokens
        # Column N is a dummy: rows with fewer masked tokens than others point at it.
        ids_BN1 = torch.full((batch, num_tokens + 1), self.mask_id, device=self.device)
        free_BN = torch.ones(batch, num_tokens, dtype=torch.bool, device=self.device)
        if keep_BN is not None:
            free_BN = ~keep_BN
            ids_BN1[:, :-1] = torch.where(free_BN, self.mask_id, start_BN)
        num_free = free_BN.sum(dim=1).tolist()
        steps = plan_steps(settings, num_free)  # all counts are known before the loop: no host sync in it
        masked_BK = first_places(free_BN.int().argsort(dim=1, descending=True, stable=True), num_free, dummy=num_tokens)
        labels_2B = torch.cat([labels_B, torch.full_like(labels_B, self.config.num_classes)])
        for step in steps:
            weight = settings.guidance_weight(step.number)
            logits_BKC = self._guided_logits(ids_BN1[:, :-1], labels_2B, masked_BK, weight)
            logits_BKC = logits_BKC / settings.logit_divisor(step.number)
            drawn_BK = self._draw_tokens(logits_BKC, masked_BK, step, noise)
            ids_BN1.scatter_(1, masked_BK, drawn_BK)
            if on_step is not None:
                on_step(step.number + 1, ids_BN1[:, :-1].clone())
            if step is not steps[-1]:
                masked_BK = self._choose_to_mask(logits_BKC, drawn_BK, masked_BK, step, noise)
                ids_BN1.scatter_(1, masked_BK, self.mask_id)
        return ids_BN1[:, :-1].clone()

    def _draw_tokens(self, logits_BKC: Tensor, masked_BK: Tensor, step: Step, noise: GumbelNoise) -> Tensor:
        """Codes int64 [B, K] for the masked places, drawn from softmax(logits / noise scale) by Gumbel noise."""
        if step.noise_scale:
            noise_BKC = noise.tokens(step.number, masked_BK, step.masked_now, self.config.codebook_size)
            logits_BKC = logits_BKC + step.noise_scale * noise_BKC
        return logits_BKC.argmax(dim=-1)

    def _choose_to_mask(
        self, logits_BKC: Tensor, drawn_BK: Tensor, masked_BK: Tensor, step: Step, noise: GumbelNoise
    ) -> Tensor:
        """Which places are masked in the next step, as `masked_BK`: those whose draws' noisy logits are lowest."""
        confidence_BK = logits_BKC.gather(2, drawn_BK[:, :, None])[:, :, 0]
        if step.noise_scale:
            noise_BK = noise.confidence(step.number, masked_BK, step.masked_now)
            confidence_BK = confidence_BK + step.noise_scale * noise_BK
        dummy = self.config.num_tokens
        order_BK = confidence_BK.masked_fill(masked_BK == dummy, math.inf).argsort(dim=1)
        return first_places(masked_BK.gather(1, order_BK), step.masked_next, dummy)

    def generate_content(self, labels_B, settings, rngs, start=None, keep_BU=None, on_step=None) -> Tensor:
        return self.generate_ids(labels_B, settings, rngs, start, keep_BU, on_step)

    def _guided_logits(self, ids_BN: Tensor, labels_2B: Tensor, masked_BK: Tensor, weight: float) -> Tensor:
        """Logits fp32 [B, K, C] at the masked tokens; both branches go through the network as one batch.

        The head is linear, so guidance acts on what goes into it: one product instead of two.
        """
        positions_BK = masked_BK.clamp(max=ids_BN.shape[1] - 1) + 1
        if not weight:
            hidden_BKW = self._hidden(self._with_class(ids_BN, labels_2B[: len(ids_BN)]), positions_BK)
        else:
            ids_2BL = self._with_class(ids_BN.repeat(2, 1), labels_2B)
            conditional, unconditional = self._hidden(ids_2BL, positions_BK.repeat(2, 1)).chunk(2)
            hidden_BKW = conditional + weight * (conditional - unconditional)
        return self.lm_head(hidden_BKW).float()

    def bytes_per_image(self, settings: MaskGITSettings) -> int:
        """Logits, noise and activations of both branches, and the decoded pixels with what leads to them, in fp32."""
        config = self.config
        sampling = 5 * config.num_tokens * config.codebook_size
        activations = 2 * (config.num_tokens + 1) * (6 * config.hidden_size + 2 * config.intermediate_size)
        side = self.tokenizer.image_size
        return 4 * (sampling + activations + 400 * side * side)


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released generators, by our name."""
    uvit = {
        "network": "uvit", "hidden_size": 1024, "num_hidden_layers": 20, "num_attention_heads": 16,
        "intermediate_size": 4096,
    }  # fmt: skip

    def sampling(steps: int, temperature: float, guidance: float, decay: str) -> dict:
        return {
            "num_steps": steps, "randomize_temperature": temperature, "guidance_scale": guidance,
            "guidance_decay": decay, "softmax_temperature_annealing": True,
        }  # fmt: skip

    configs = {
        "maskgit-titok-l32": {"tokenizer": "titok-l32", "num_tokens": 32} | sampling(8, 9.5, 4.5, "linear"),
        "maskgit-titok-b64": {"tokenizer": "titok-b64", "num_tokens": 64} | sampling(8, 11.0, 3.0, "linear"),
        "maskgit-titok-s128": uvit
        | {"tokenizer": "titok-s128", "num_tokens": 128}
        | sampling(64, 2.8, 6.9, "power-cosine"),
    }
    for size, temperature, guidance in (("s", 3.0, 12.5), ("b", 2.5, 8.5), ("l", 3.0, 5.5)):
        configs[f"maskgit-one-d-piece-{size}256"] = {
            "tokenizer": f"one-d-piece-{size}256",
            "num_tokens": 256,
        } | sampling(16, temperature, guidance, "power-cosine")
    return configs
