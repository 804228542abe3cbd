"""K-means: centres of features, by Lloyd's rule from a k-means++ start.

Shape suffixes: N features, D their width, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..kernels.nearest import nearest_code

MAX_ROUNDS = 50
CANDIDATES = 2**14  # features that the start is drawn from


def fit_clusters(features_ND: Tensor, num_clusters: int, rng: torch.Generator) -> Tensor:
    """Centres fp32 [K, D] of features fp32 [N, D]; an empty cluster begins anew at a random feature.

    Raises:
        InvalidInput: fewer features than clusters.
    """
    if len(features_ND) < num_clusters:
        raise InvalidInput(f"{len(features_ND)} features are too few for {num_clusters} clusters")
    centres_KD, before_N = spread_start(features_ND, num_clusters, rng), None
    for _ in range(MAX_ROUNDS):
        nearest_N = nearest_code(features_ND, centres_KD)
        if before_N is not None and torch.equal(nearest_N, before_N):
            break
        before_N = nearest_N
        counts_K = torch.bincount(nearest_N, minlength=num_clusters)
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, nearest_N, features_ND)
        centres_KD = sums_KD / counts_K.clamp(min=1)[:, None]
        empty = (counts_K == 0).nonzero()[:, 0]
        if len(empty):
            drawn = torch.randint(len(features_ND), (len(empty),), generator=rng)
            centres_KD[empty] = features_ND[drawn.to(features_ND.device)]
    return centres_KD


def spread_start(features_ND: Tensor, num_clusters: int, rng: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre is drawn by its squared distance to the nearest."""
    kept = torch.randperm(len(features_ND), generator=rng)[: max(CANDIDATES, num_clusters)]
    pool_ND = features_ND[kept.to(features_ND.device)]
    chosen = [0]
    distances_N = torch.full((len(pool_ND),), float("inf"), device=pool_ND.device)
    for _ in range(num_clusters - 1):
        distances_N = distances_N.minimum((pool_ND - pool_ND[chosen[-1]]).square().sum(dim=1))
        chances_N = distances_N.cpu().double()
        if not float(chances_N.sum()):  # fewer different features than clusters
            chances_N = torch.ones_like(chances_N)
        chosen.append(int(torch.multinomial(chances_N, 1, generator=rng)))
    return pool_ND[chosen].clone()
