"""Keys and values of what a transformer has read, so that each token is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the finished tokens of one run: preallocated, and no part of the model.

    `keys` and `values` are [depth, R, H, T, K] (R rows, H heads, T tokens, K head width) with dtype and device of
    `like`; their first `length` tokens are filled.

    values_by_channel: lay the values out so that all tokens of a channel lie side by side, for `attention_of_one`.
    """

    def __init__(
        self, depth: int, rows: int, heads: int, tokens: int, head_width: int, like: Tensor,
        values_by_channel: bool = False,
    ):  # fmt: skip
        self.keys = like.new_empty(depth, rows, heads, tokens, head_width)
        self.values = torch.empty_like(self.keys)
        if values_by_channel:
            self.values = self.values.view(depth, rows, heads, head_width, tokens).transpose(-1, -2)
        self.length = 0  # finished tokens

    def extend(self, layer: int, k_RHLK: Tensor, v_RHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Put a call's keys and values [R, H, L, K] behind the finished ones of block `layer`.

        Returns all that the call may see, [R, H, length + L, K]. `length` stays: it grows when the call's tokens are
        finished.
        """
        rows, end = len(k_RHLK), self.length + k_RHLK.shape[2]
        self.keys[layer, :rows, :, self.length : end] = k_RHLK
        self.values[layer, :rows, :, self.length : end] = v_RHLK
        return self.keys[layer, :rows, :, :end], self.values[layer, :rows, :, :end]

    @contextmanager
    def kept(self, start: int) -> Iterator[None]:
        """Within this, tokens from `start` on may be computed anew for once; behind it, all is as it was before."""
        length = self.length
        saved = [part[..., start:length, :].clone() for part in (self.keys, self.values)]
        self.length = start
        try:
            yield
        finally:
            for part, value in zip((self.keys, self.values), saved, strict=True):
                part[..., start:length, :] = value
            self.length = length
