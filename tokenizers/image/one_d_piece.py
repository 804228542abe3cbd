"""One-D-Piece: TiTok whose prefixes decode, too (Miwa et al. 2025, arXiv 2501.10064).

The architecture is the two-stage TiTok with 256 tokens. In training the tail of the token sequence is cut at a random
place ("Tail Token Drop"), which pushes what matters most to the head; so any first k tokens give an image, and quality
grows with k. The small shipped variant predicts RGB directly (`is_legacy=False`).

Shape suffixes as in titok.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.base import TokenizerOutput
from .titok import SIZES, TiTok


class OneDPiece(TiTok):
    """Variable-length image tokenizer: a `TiTok` whose first k tokens decode, for every k. Arguments as `TiTok`'s."""

    is_variable_length = True
    full_length_share = 0.0  # of training batches that drop nothing; 0 in the paper

    def forward(
        self, pixels_B3HW: Tensor, num_tokens: int | None = None, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """Encode, quantize, drop the tail and decode `pixels_B3HW` (fp32, [0, 1]): the training pass.

        In training mode the kept length is one uniform draw from 1..N for the whole batch (section 3.2); a given
        `num_tokens` cuts further.
        """
        z_BC1N, vq = self.quantize(self.encoder(pixels_B3HW, self.latent_tokens))
        if self.training:
            z_BC1N = z_BC1N[..., : self.draw_num_tokens(generator)]
        z_BC1N = z_BC1N[..., :num_tokens]
        decoded = self._decode(z_BC1N, text_BTE=None)
        return TokenizerOutput(decoded, ids_BL=vq.ids_BHW[:, 0], vq=vq, num_tokens=z_BC1N.shape[-1])

    def draw_num_tokens(self, generator: torch.Generator | None = None) -> int:
        """How many tokens Tail Token Drop keeps: uniform on 1..N, but for the `full_length_share`."""
        if self.full_length_share and float(torch.rand(1, generator=generator)) < self.full_length_share:
            return self.max_tokens
        return int(torch.randint(1, self.max_tokens + 1, (1,), generator=generator))


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the released One-D-Pieces, by our name."""
    configs = {}
    for size in ("small", "base", "large"):
        width, depth, heads = SIZES[size]
        configs[f"one-d-piece-{size[0]}256"] = {"num_latent_tokens": 256} | {
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in (("width", width), ("depth", depth), ("heads", heads))
        }
    return configs
