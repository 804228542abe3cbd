"""LLaMA (Touvron et al. 2023, arXiv 2302.13971) of transformers, with our linear layers.

Shape suffixes: B rows, L tokens, V ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear

IGNORED = -100  # a label that does not count


def build_llama(
    vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, rms_norm_eps: float,
    rope_base: float, max_positions: int,
) -> nn.Module:  # fmt: skip
    """A `LlamaForCausalLM` of transformers with our linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads, num_key_value_heads=num_heads,
        rms_norm_eps=rms_norm_eps, max_position_embeddings=max_positions, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": rope_base},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    llm = LlamaForCausalLM(config)
    with torch.device("cpu"):  # loading builds models on the meta device, and the rates of rotation come from no file
        llm.model.rotary_emb = LlamaRotaryEmbedding(config)
    for module in llm.modules():  # the same layer, for weights that are stored in bfloat16
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return llm


def next_token_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross entropy of each token given those before it, 0-d; labels of -100 do not count."""
    return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORED)
