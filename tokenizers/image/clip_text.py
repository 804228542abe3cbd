"""Caption features for TA-TiTok: every position of CLIP ViT-L/14-336's text tower after the final norm, not pooled.

Shape suffixes: B captions, T text positions, E text width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import InvalidInput, ModelNotFound

DEFAULT_TEXT_ENCODER = "openai/clip-vit-large-patch14-336"


class ClipTextFeatures:
    """CLIP's text tower through transformers, from a hub id or a local folder with tokenizer and weights."""

    def __init__(self, path: str = DEFAULT_TEXT_ENCODER, context_length: int = 77):
        from transformers import AutoTokenizer, CLIPTextModel

        self.context_length = context_length
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = CLIPTextModel.from_pretrained(path).eval()
        except (OSError, ValueError) as error:
            raise ModelNotFound(
                f"the text encoder {path!r} could not be loaded ({error.__class__.__name__}); download "
                f"{DEFAULT_TEXT_ENCODER} and set tokenizer.text_encoder to its folder"
            ) from error

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Features fp32 [B, T, E]; longer captions are cut at T tokens, as CLIP was trained."""
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise InvalidInput(f"captions must be non-empty strings, got {texts!r}")
        batch = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        # Padding is not masked: the released models saw the tower's output at all 77 positions.
        return self.model(input_ids=batch.input_ids).last_hidden_state.float()
