"""Where a shape begins: the logit from which a place counts as inside, fitted to training shapes.

Cross-entropy makes logits tell chances. Of thin parts a small model is never sure, so at even chances they are lost. A
lower threshold keeps more of them and thickens the rest a little; the best one for IoU is found here, and moved to 0,
where surfaces are drawn.
"""

from __future__ import annotations

import numpy as np
import torch

from ..evaluation.shape_points import intersection_over_union
from .shape_data import ShapeShards

NUM_SHAPES = 128
NUM_QUERIES = 16_384  # of the box, each shape
THRESHOLDS = tuple(-step / 10 for step in range(21))


@torch.no_grad()
def fit_threshold(model, source: ShapeShards, num_points: int) -> float:
    """Move the logits of `model`, a trained VAT, so that mean IoU is best at 0; returns the threshold that was best.

    source: training shapes, of which some are taken, as they are. num_points: of each, that the encoder reads.
    """
    chosen = np.random.default_rng(0).permutation(len(source))[:NUM_SHAPES]
    totals = np.zeros(len(THRESHOLDS))
    for index in map(int, chosen):
        surface = (torch.from_numpy(array[:num_points])[None].to(model.device) for array in source.surface(index))
        places_Q3, inside_Q = map(
            torch.from_numpy, source.queries(index, "uniform", 0, min(NUM_QUERIES, source.num_queries))
        )
        field = model.decode_ids(model.encode_points(*surface))
        logits_Q = field.occupancy(places_Q3[None].to(model.device))[0].cpu()
        totals += [intersection_over_union(logits_Q >= threshold, inside_Q) for threshold in THRESHOLDS]
    best = THRESHOLDS[int(totals.argmax())]
    model.head.last.bias.sub_(best)
    return best
