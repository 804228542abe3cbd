"""Semantic tokens: what is said, as one of K clusters every 20 ms (HuBERT, Hsu et al. 2021, section II-A; in GenSE,
arXiv 2502.02942, section 3.1).

Features are hidden states of a self-supervised speech encoder, a few layers up: WavLM or Wav2Vec2 of `transformers`,
of which only the layers below are built. A token is the number of the k-means centre that is nearest to a feature.

The waveform is not normalised, and 100 zeros follow it, so that there is one frame for each hop of the convolutions.

Shape suffixes: B batch, T samples, L frames, D feature width, K clusters.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.errors import InvalidInput
from ...core.speech_tokenizer import SpeechTokenizer
from ...kernels.nearest import nearest_code

RIGHT_PAD = 100  # samples
WINDOW_SECONDS = 30.0  # the encoder never sees more at once
OVERLAP_SECONDS = 10.0
ARCHITECTURES = ("wavlm", "wav2vec2")


class Clusters(nn.Module):
    """K-means centres, `embedding.weight` [K, D]."""

    def __init__(self, num_clusters: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(num_clusters, width)

    def nearest(self, x_BLD: Tensor) -> Tensor:
        """Number of the centre nearest to each feature, int64 [B, L]."""
        return nearest_code(x_BLD.flatten(0, 1), self.embedding.weight).view(x_BLD.shape[:2])


class SemanticTokenizer(SpeechTokenizer):
    """Cluster numbers of self-supervised features. Defaults are those of WavLM-Large in GenSE.

    The encoder computes in fp32 whatever the dtype: other tokens than those of training would come of less.

    Args:
        architecture: "wavlm" or "wav2vec2" (also XLS-R), in the form that normalises before each layer ("large").
        layer: blocks below the features, all that are built.
        hidden_size, num_attention_heads, intermediate_size: of each block.
        conv_dim, conv_kernel, conv_stride, conv_bias: of the convolutions over the waveform.
        pos_conv_kernel, pos_conv_groups: of the convolution that tells positions.
        num_buckets, max_distance: of WavLM's relative positions.
        num_clusters: 0 for an encoder whose clusters are still to be fitted (`python -m mediatok.training.kmeans`).
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize", "encoder"]

    @register_to_config
    def __init__(
        self,
        architecture: str = "wavlm",
        layer: int = 6,
        hidden_size: int = 1024,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        conv_dim: tuple[int, ...] = (512,) * 7,
        conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2),
        conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2),
        conv_bias: bool = False,
        pos_conv_kernel: int = 128,
        pos_conv_groups: int = 16,
        num_buckets: int = 320,
        max_distance: int = 800,
        num_clusters: int = 1024,
        sample_rate: int = 16000,
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise InvalidInput(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}")
        if not len(conv_dim) == len(conv_kernel) == len(conv_stride):
            raise InvalidInput(
                f"every convolution has a width, a kernel and a stride, not {len(conv_dim)}, {len(conv_kernel)} and "
                f"{len(conv_stride)} of them"
            )
        field = receptive_field(conv_kernel, conv_stride)
        if not field - self.hop_length <= RIGHT_PAD < field:
            raise InvalidInput(
                f"convolutions that see {field} samples every {self.hop_length} do not give one frame a hop with "
                f"{RIGHT_PAD} zeros at the end"
            )
        sizes = {
            "hidden_size": hidden_size, "num_hidden_layers": layer, "num_attention_heads": num_attention_heads,
            "intermediate_size": intermediate_size, "conv_dim": tuple(conv_dim), "conv_kernel": tuple(conv_kernel),
            "conv_stride": tuple(conv_stride), "conv_bias": conv_bias, "num_conv_pos_embeddings": pos_conv_kernel,
            "num_conv_pos_embedding_groups": pos_conv_groups,
        }  # fmt: skip
        self.encoder = build_encoder(architecture, sizes, num_buckets, max_distance)
        self.quantize = Clusters(num_clusters, hidden_size)

    @property
    def hop_length(self) -> int:
        return prod(self.config.conv_stride)

    @property
    def context_frames(self) -> None:
        return None  # attention sees the whole clip

    @property
    def vocab_size(self) -> int:
        return self.config.num_clusters

    def encode_waveform(self, wave_BT: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Ids int64 [B, L] of `wave_BT`, fp32 in [-1, 1]; see `SpeechTokenizer`.

        Up to 30 s are read whole, as the official code does. More is read in windows of 30 s, one every 20 s, of
        which the outer 5 s are context only.
        """
        if not self.vocab_size:
            raise InvalidInput(
                f"{self.name} has no clusters yet: fit them with `python -m mediatok.training.kmeans`, or take those "
                "of a GenSE checkpoint"
            )
        return self.by_length(wave_BT, lengths_B, lambda rows_BT: self.quantize.nearest(self._windowed(rows_BT)))

    def features(self, wave_BT: Tensor) -> Tensor:
        """Features fp32 [B, L, D] of clips of one length, a multiple of `hop_length`; windows as in `encode_waveform`.

        Before the encoder's final norm, as k-means sees them.
        """
        return self._windowed(self.check_wave(wave_BT))

    def _windowed(self, wave_BT: Tensor) -> Tensor:
        frames, hop = wave_BT.shape[1] // self.hop_length, self.hop_length
        padded_BT = F.pad(wave_BT.float(), (0, RIGHT_PAD))
        parts, done = [], 0
        for start, stop, end in windows(frames, self.frame_rate):
            x_BLD = self.hidden_states(padded_BT[:, start * hop : stop * hop + RIGHT_PAD])
            parts.append(x_BLD[:, done - start : end - start])
            done = end
        return torch.cat(parts, dim=1)

    def hidden_states(self, wave_BT: Tensor) -> Tensor:
        """What the last block gives for samples of any number, nothing added: fp32 [B, L, D]."""
        return self.encoder(wave_BT).last_hidden_state

    def decode_ids(self, ids: Tensor) -> Tensor:
        """Raises InvalidInput: a semantic token says which sound it is, not whose voice says it."""
        self.check_ids(ids)
        raise InvalidInput(
            f"the tokens of {self.name} have no sound of their own: they tell what is said and not how; GenSE makes a "
            "codec's tokens of them"
        )


def build_encoder(kind: str, sizes: dict, num_buckets: int, max_distance: int) -> nn.Module:
    """A WavLM or Wav2Vec2 of `transformers` that ends at its last block, without the norm behind it."""
    shared = {
        "feat_extract_norm": "layer", "do_stable_layer_norm": True, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
        "layerdrop": 0.0, "vocab_size": 32,
    }  # fmt: skip
    if kind == "wavlm":
        from transformers import WavLMConfig, WavLMModel

        config = WavLMConfig(**shared, **sizes, num_buckets=num_buckets, max_bucket_distance=max_distance)
        model = WavLMModel(config)
    else:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        model = Wav2Vec2Model(Wav2Vec2Config(**shared, **sizes))
    model.encoder.layer_norm = nn.Identity()
    # The weight of the position convolution is a plain one: nothing to compute anew in each call.
    parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    return model


def receptive_field(kernels: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Samples that one frame of a stack of convolutions sees."""
    return 1 + sum((kernel - 1) * prod(strides[:i]) for i, kernel in enumerate(kernels))


def windows(frames: int, frame_rate: float) -> list[tuple[int, int, int]]:
    """(first, last + 1, end) in frames of each window of a clip: it counts from where the one before ends to `end`."""
    size, overlap = round(WINDOW_SECONDS * frame_rate), round(OVERLAP_SECONDS * frame_rate)
    if frames <= size:
        return [(0, frames, frames)]
    starts = range(0, frames - overlap, size - overlap)
    inner = [(start, start + size, start + size - overlap // 2) for start in starts[:-1]]
    return [*inner, (starts[-1], frames, frames)]


def released_configs() -> dict[str, dict]:
    """Constructor arguments of the published encoders with GenSE's clusters, by our name."""
    return {"semantic-wavlm-large": {}, "semantic-xls-r-300m": {"architecture": "wav2vec2", "conv_bias": True}}
