"""What SEED's training reads: pictures whose captions are in one file, and captions as ids.

Shape suffixes: B batch, L tokens of a caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidRecipe, ModelNotFound
from ..core.files import read_limited
from ..generators.text_pieces import BOS, PAD, Pieces, pieces_of
from .data import ImageFolder
from .seed_recipe import SeedDataRecipe

MAX_NAMES_BYTES = 256 * 2**20


class Captions:
    """Captions to ids int64 [B, L], padded on the right, and where they are tokens.

    Words and characters of `texts` (of the training set) are the vocabulary, unless a folder brings one.
    """

    def __init__(self, texts: Sequence[str], max_tokens: int, folder: Path | None = None):
        self.max_tokens, self.released = max_tokens, None
        if folder is None:
            self.pieces = Pieces(pieces_of(texts))
            self.size = len(self.pieces)
            return
        from transformers import AutoTokenizer

        try:
            self.released = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the parsers of other libraries raise many kinds
            raise ModelNotFound(f"the text tokenizer in {folder} cannot be read ({type(error).__name__})") from error
        self.size = len(self.released)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self.released is not None:
            batch = self.released(
                list(texts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            return batch.input_ids, batch.attention_mask.bool()
        rows = [[BOS, *self.pieces.encode(text)][: self.max_tokens] for text in texts]
        ids_BL = torch.tensor([row + [PAD] * (self.max_tokens - len(row)) for row in rows])
        return ids_BL, ids_BL != PAD


class NamedFolder(ImageFolder):
    """Image folders whose captions are in a JSON file, where no text file lies beside a picture."""

    def __init__(self, folders: Sequence[str | Path], split: str | None, recipe: SeedDataRecipe):
        self.paths = [path for folder in folders for path in ImageFolder(folder, split).paths]
        names, fields = recipe.names, recipe.caption_fields
        try:
            table = json.loads(read_limited(names, MAX_NAMES_BYTES))
            self.names = {stem: ", ".join(str(entry[field]) for field in fields) for stem, entry in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            example = dict.fromkeys(fields, "...")
            raise InvalidRecipe(f"data.names {names} must map file stems to {example} ({error!r})") from None

    def read(self, index: int):
        image, caption = super().read(index)
        return image, caption or self.names.get(self.paths[index].stem, "")

    def captions(self) -> list[str]:
        return [self.names.get(path.stem, "") for path in self.paths]


class CaptionPairs(NamedFolder):
    """Folders that draw the same things in several styles: two pictures of a caption always come one after the other.

    All captions come equally often, whether two pictures have it or twelve; its two are drawn from all that it has.
    """

    def __init__(self, folders: Sequence[str | Path], split: str | None, recipe: SeedDataRecipe):
        super().__init__(folders, split, recipe)
        groups: dict[str, list[int]] = {}
        for index, caption in enumerate(self.captions()):
            groups.setdefault(caption, []).append(index)
        self.groups = [np.array(indices) for indices in groups.values()]

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """`len(self)` indices, pairs side by side."""
        pairs: list[np.ndarray] = []
        while 2 * len(pairs) < len(self):
            for group in rng.permutation(len(self.groups)):
                indices = self.groups[group]
                pairs.append(rng.choice(indices, 2, replace=len(indices) < 2))
        return np.concatenate(pairs)[: len(self)]
