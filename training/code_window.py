"""How many codes of a codebook are in use, over the last ids that were chosen (TokenFlow's training log).

Shape suffixes: W ids of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 131_072  # four times the largest released codebook


class CodeWindow:
    """The last ids, newest at the end; id 0 in the places that were not filled yet."""

    def __init__(self, codebook_size: int, window: int = WINDOW):
        self.codebook_size = codebook_size
        self.ids = torch.zeros(window, dtype=torch.int64)

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """Put ids of any shape behind the others, the oldest of which leave."""
        new_W = ids.detach().flatten().cpu()[-len(self.ids) :]
        self.ids = torch.cat([self.ids[len(new_W) :], new_W])

    def share(self) -> float:
        """Share of the codes that occur in the window, 0 to 1."""
        return len(self.ids.unique()) / self.codebook_size
