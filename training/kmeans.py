"""Fit the clusters of semantic tokens: `python -m mediatok.training.kmeans RECIPE.yaml [section.key=value ...]`.

Features of an encoder over a folder of speech are gathered and clustered by mini-batch k-means (Sculley 2010), as
GenSE's were. The tokenizer with its clusters is written in our layout.

Shape suffixes: N features, D their width, K clusters.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.audio import read_audio
from ..core.errors import InvalidInput, InvalidRecipe, MediatokError
from ..core.registry import load
from ..kernels.nearest import nearest_code
from ..tokenizers.speech.semantic import SemanticTokenizer
from .build import config_of, construct
from .clusters import spread_start
from .data import MAX_BROKEN_IN_A_ROW
from .export import export_model
from .kmeans_recipe import KMeansRecipe, load_kmeans_recipe
from .speech_data import SpeechFolder

logger = logging.getLogger(__name__)
LOG_EVERY = 100  # clips


def fit(recipe: KMeansRecipe) -> SemanticTokenizer:
    """Gather, cluster, and write the tokenizer to the recipe's output; returns it, on the CPU.

    Raises:
        InvalidRecipe: the encoder is none, or there are fewer features than clusters.
        InvalidInput: no speech.
    """
    encoder = load(recipe.encoder)
    if not isinstance(encoder, SemanticTokenizer):
        raise InvalidRecipe(f"encoder {recipe.encoder} holds a {type(encoder).__name__}, no encoder of semantic tokens")
    source = SpeechFolder(recipe.data.train, "train")
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    settings, rng = recipe.clusters, torch.Generator().manual_seed(recipe.clusters.seed)
    features_ND = gather_features(encoder, source, recipe.data.max_frames, rng)
    if len(features_ND) < settings.num_clusters:
        raise InvalidRecipe(
            f"clusters.num_clusters {settings.num_clusters} are more than the {len(features_ND)} frames of "
            f"{recipe.data.train}"
        )
    logger.info("%d features of %d clips", len(features_ND), len(source))
    centres_KD = fit_by_batches(
        features_ND, settings.num_clusters, settings.batch_size, settings.passes, rng, settings.start
    )
    tokenizer = with_clusters(encoder.cpu(), centres_KD.cpu())
    export_model(tokenizer, recipe.output / "model", recipe.export_dtype)
    return tokenizer


@torch.inference_mode()
def gather_features(
    tokenizer: SemanticTokenizer, source: SpeechFolder, max_frames: int, rng: torch.Generator
) -> Tensor:
    """At most `max_frames` features fp32 [N, D] of clips, each frame as likely as another; on the tokenizer's device.

    Raises:
        InvalidInput: many broken clips in a row; single ones are left out.
    """
    total = source.total_samples(tokenizer.sample_rate) / tokenizer.hop_length
    share = min(1.0, 1.05 * max_frames / max(total, 1.0))  # a little more, of which the rest is drawn
    parts: list[Tensor] = []
    broken = 0
    for number, path in enumerate(source.paths):
        try:
            wave_BT = read_audio(path, tokenizer.sample_rate).samples
        except MediatokError as error:
            logger.warning("skipped a broken clip: %s", error)
            broken += 1
            if broken == MAX_BROKEN_IN_A_ROW:
                raise InvalidInput(f"{broken} broken clips in a row; the last: {error}") from error
            continue
        broken = 0
        wave_BT = F.pad(wave_BT, (0, -wave_BT.shape[1] % tokenizer.hop_length)).to(tokenizer.device)
        kept_L = torch.rand(wave_BT.shape[1] // tokenizer.hop_length, generator=rng) < share
        if bool(kept_L.any()):
            parts.append(tokenizer.features(wave_BT)[0, kept_L.to(tokenizer.device)])
        if (number + 1) % LOG_EVERY == 0:
            logger.info("heard %d of %d clips", number + 1, len(source))
    if not parts:
        return torch.empty(0, tokenizer.config.hidden_size)
    features_ND = torch.cat(parts)
    drawn_N = torch.randperm(len(features_ND), generator=rng)[:max_frames]
    return features_ND[drawn_N.to(features_ND.device)]


@torch.inference_mode()
def fit_by_batches(
    features_ND: Tensor, num_clusters: int, batch_size: int, passes: int, rng: torch.Generator, start: str = "k-means++"
) -> Tensor:
    """Centres fp32 [K, D] of features fp32 [N, D] by mini-batch k-means.

    A centre moves to the mean of all features that it was nearest to when they were visited. After each pass a centre
    that was nearest to none begins anew at a random feature.
    """
    device = features_ND.device
    if start == "random":
        drawn_K = torch.randperm(len(features_ND), generator=rng)[:num_clusters]
        centres_KD = features_ND[drawn_K.to(device)].clone()
    else:
        centres_KD = spread_start(features_ND, num_clusters, rng)
    visits_K = torch.zeros(num_clusters, device=device)
    for number in range(passes):
        used_K, distance = torch.zeros_like(visits_K), 0.0
        order_N = torch.randperm(len(features_ND), generator=rng).to(device)
        for rows_N in order_N.split(batch_size):
            batch_ND = features_ND[rows_N]
            nearest_N = nearest_code(batch_ND, centres_KD)
            distance += float((batch_ND - centres_KD[nearest_N]).square().sum())
            counts_K = torch.bincount(nearest_N, minlength=num_clusters).float()
            sums_KD = torch.zeros_like(centres_KD).index_add_(0, nearest_N, batch_ND)
            used_K, visits_K = used_K + counts_K, visits_K + counts_K
            centres_KD += (sums_KD - counts_K[:, None] * centres_KD) / visits_K.clamp(min=1)[:, None]
        unused = (used_K == 0).nonzero()[:, 0]
        if len(unused) and number + 1 < passes:
            drawn = torch.randint(len(features_ND), (len(unused),), generator=rng)
            centres_KD[unused], visits_K[unused] = features_ND[drawn.to(device)], 0.0
        logger.info(
            "pass %d of %d: mean squared distance %.4f, %d clusters unused",
            number + 1, passes, distance / len(features_ND), len(unused),
        )  # fmt: skip
    return centres_KD


def with_clusters(encoder: SemanticTokenizer, centres_KD: Tensor) -> SemanticTokenizer:
    """The tokenizer of `encoder` with these centres, in eval mode."""
    tokenizer = construct("SemanticTokenizer", config_of(encoder) | {"num_clusters": len(centres_KD)})
    tokenizer.encoder.load_state_dict(encoder.encoder.state_dict())
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.copy_(centres_KD)
    return tokenizer.eval()


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m mediatok.training.kmeans RECIPE.yaml [section.key=value ...]")
        return 0 if arguments else 2
    try:
        recipe = load_kmeans_recipe(Path(arguments[0]), arguments[1:])
        fit(recipe)
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(recipe.output / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
