"""What only training needs: augmented features, and the loss on errors (section 2.5 of arXiv 2206.08317).

Shape suffixes: B clips, L feature vectors, F features, K tokens, V vocabulary, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCKED_SHARE = 0.15  # of a sample's places; the paper does not say how many


def masked_features(
    features_BLF: Tensor, draws: Sequence[Tensor] | None = None, rng: torch.Generator | None = None, stack: int = 7,
    band_width: int = 30, time_width: int = 12,
) -> Tensor:  # fmt: skip
    """SpecAugment for stacked frames: a band of mel energies, and a stretch of time, become zero in each clip.

    Args:
        features_BLF: `stack` mel frames one after the other in each vector.
        draws: widths and first places of the bands [B, n], then of the stretches; one of each is drawn from `rng` when
            None. Widths lie in [0, band_width) and [0, time_width); places leave room for the widest of the batch.
        band_width, time_width: of mel bands, and of feature vectors.
    """
    batch, length, size = features_BLF.shape
    mels = size // stack
    if draws is None:
        draws = []
        for limit, total in ((band_width, mels), (time_width, length)):
            widths_Bn = torch.randint(min(limit, total + 1), (batch, 1), generator=rng)
            draws += [widths_Bn, torch.randint(max(1, total - int(widths_Bn.max())), (batch, 1), generator=rng)]
    band_Bn1, low_Bn1, time_Bn1, first_Bn1 = (draw.to(features_BLF.device)[..., None] for draw in draws)
    mel_F = torch.arange(size, device=features_BLF.device) % mels
    place_L = torch.arange(length, device=features_BLF.device)
    in_band_BF = ((mel_F >= low_Bn1) & (mel_F < low_Bn1 + band_Bn1)).any(dim=1)
    in_time_BL = ((place_L >= first_Bn1) & (place_L < first_Bn1 + time_Bn1)).any(dim=1)
    return features_BLF.masked_fill(in_band_BF[:, None] | in_time_BL[..., None], 0.0)


def error_loss(
    logits_BKV: Tensor, counts_B: Tensor, references: Sequence[Sequence[int]], num_samples: int = 4,
    rng: torch.Generator | None = None, blocked_share: float = BLOCKED_SHARE,
) -> Tensor:  # fmt: skip
    """Minimum word error rate training with negative samples: 0-d, the mean over clips.

    A decoder that says everything at once has one best path, so others are made by forbidding the best token in
    random places, where the second best then stands. The loss is the expected number of errors under the samples'
    own probabilities, less its mean.

    Args:
        logits_BKV: of the second pass. counts_B: tokens of each clip.
        references: the true ids of each clip. num_samples: paths of each clip, the best one among them.
        blocked_share: probability with which a place loses its best token.
    """
    log_probs_BKV = logits_BKV.float().log_softmax(dim=-1)
    best_BK2 = log_probs_BKV.topk(2, dim=-1)
    blocked_BNK = torch.rand(len(logits_BKV), num_samples, logits_BKV.shape[1], generator=rng) < blocked_share
    blocked_BNK[:, 0] = False
    blocked_BNK = blocked_BNK.to(logits_BKV.device)
    inside_BK = torch.arange(logits_BKV.shape[1], device=counts_B.device) < counts_B[:, None]
    ids_BNK, values_BNK = (
        torch.where(blocked_BNK, best[..., 1][:, None], best[..., 0][:, None])
        for best in (best_BK2.indices, best_BK2.values)
    )
    path_BN = (values_BNK * inside_BK[:, None]).sum(dim=2)
    counts = counts_B.tolist()
    errors_BN = torch.tensor(
        [
            [edit_distance(ids[: counts[row]], reference) for ids in ids_BNK[row].tolist()]
            for row, reference in enumerate(references)
        ],
        dtype=torch.float32, device=logits_BKV.device,
    )  # fmt: skip
    excess_BN = errors_BN - errors_BN.mean(dim=1, keepdim=True)
    return (path_BN.softmax(dim=1) * excess_BN).sum(dim=1).mean()


def edit_distance(ours: Sequence, theirs: Sequence) -> int:
    """The fewest insertions, deletions and replacements that turn one sequence into the other."""
    row = list(range(len(theirs) + 1))
    for i, item in enumerate(ours, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(theirs, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
    return row[-1]
