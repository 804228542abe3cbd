"""What ids know of what a picture shows: the same emoji in another drawing style, found by its ids alone.

    python -m mediatok.evaluation.retrieval titok-tiny one-d-piece-tiny \\
        --gallery data/fluent-emoji/64/val --queries data/emoji-google/64/val --labels data/fluent-emoji/labels.json

Every query is compared with every picture of the gallery; the right one is that of the same file name (`make data`
names both sets by code points). Printed is a Markdown table: how often the right picture is the first, among the first
5 and 10, and the median of its rank, beside what chance gives. Equal similarities share the mean of their ranks.

Two pictures are as similar as

    equal ids    the share of places that have the same id
    codes        the mean, over all places, of the cosine of the two ids' code vectors
    embedding    the cosine of the embeddings that all ids together decode to, of tokenizers that have one (SEED's image
                 embedding; the teacher's features of TokenFlow, averaged over the picture)

All of these are functions of the ids. For comparison, the first row looks at pixels: the pictures reduced to 32x32, and
the root of their mean squared difference.

With labels, the last column asks what a query finds besides itself: how often the most similar *other* picture is of
the same kind (`subcategory` of the emoji: "face-smiling", "food-fruit"). Queries that are alone of their kind are left
out of it.

Skin-tone variants are left out of both sets: six pictures would be nearly right, and the tones of the rendered emoji do
not always follow their names.

Shape suffixes: Q queries, G pictures of the gallery, B pictures, L places, C code channels, E embedding channels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InvalidInput, MediatokError
from ..core.files import read_limited
from ..core.image_tokenizer import ImageTokenizer
from ..core.images import fit_square, read_image, to_pixels
from ..core.registry import load
from ..training.data import ImageFolder
from .tables import head, number, row

SKIN_TONE = re.compile(r"-1f3f[b-f]", re.IGNORECASE)  # behind another code point; alone they are emoji of their own
PIXEL_SIDE = 32
TOP = (1, 5, 10)
COLUMNS = ("model", "compared by", "first", "first 5", "first 10", "median rank")
KIND = "subcategory"  # the field of labels that is a picture's kind
MAX_LABELS_BYTES = 256 * 2**20
BATCH = 32
PAIRS_AT_ONCE = 2**24  # ids that are compared at a time


@dataclass(frozen=True)
class Retrieval:
    """How well right pictures were found: shares of queries whose right one is among the first 1, 5 and 10, its median
    rank, and how often the nearest other picture is of the same kind (None without labels)."""

    model: str
    similarity: str
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    same_kind: float | None = None

    @classmethod
    def of(cls, model: str, similarity: str, ranks_Q: Tensor, same_kind: float | None = None) -> Retrieval:
        shares = [float((ranks_Q <= top).double().mean()) for top in TOP]
        return cls(model, similarity, *shares, float(ranks_Q.double().quantile(0.5)), same_kind)


def ranks_of_right(similarity_QG: Tensor, right_Q: Tensor) -> Tensor:
    """The rank of picture `right_Q` (int64, numbers in the gallery) for each query, fp64 [Q] from 1 on; equal
    similarities share the mean of their ranks."""
    own_Q1 = similarity_QG.gather(1, right_Q[:, None])
    better_Q, equal_Q = (similarity_QG > own_Q1).sum(dim=1), (similarity_QG == own_Q1).sum(dim=1)
    return better_Q.double() + (equal_Q.double() + 1) / 2


def share_of_same_kind(similarity_QG: Tensor, right_Q: Tensor, kinds: Sequence[str]) -> float:
    """How often the most similar picture of the gallery, its own left out, is of the query's kind.

    similarity_QG: all equal is what guessing gives: equal similarities share a query's turn. kinds: of the gallery; a
    query's is that of its right picture. Queries without another of their kind have no turn; NaN if none has one.
    """
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    kind_G = torch.tensor([numbers[kind] for kind in kinds])
    is_own_QG = torch.arange(len(kinds)) == right_Q[:, None]
    is_kind_QG = (kind_G == kind_G[right_Q][:, None]) & ~is_own_QG
    others_QG = similarity_QG.masked_fill(is_own_QG, float("-inf"))
    is_nearest_QG = others_QG == others_QG.amax(dim=1, keepdim=True)
    hit_Q = (is_nearest_QG & is_kind_QG).sum(dim=1) / is_nearest_QG.sum(dim=1)
    return float(hit_Q[is_kind_QG.any(dim=1)].double().mean())


def chance(num_gallery: int, same_kind: float | None = None) -> Retrieval:
    """What guessing gives on average."""
    return Retrieval("chance", "", *(min(top / num_gallery, 1.0) for top in TOP), (num_gallery + 1) / 2, same_kind)


def equal_ids(a_QL: Tensor, b_GL: Tensor) -> Tensor:
    """The share of places that have the same id, fp32 [Q, G], of int64 ids."""
    rows = max(1, PAIRS_AT_ONCE // b_GL.numel())
    return torch.cat([(a_BL[:, None] == b_GL).float().mean(dim=2) for a_BL in a_QL.split(rows)])


def mean_cosine(a_QLC: Tensor, b_GLC: Tensor) -> Tensor:
    """The mean over all places of the cosines of vectors, fp32 [Q, G]."""
    return F.normalize(a_QLC, dim=2).flatten(1) @ F.normalize(b_GLC, dim=2).flatten(1).T / a_QLC.shape[1]


@torch.inference_mode()
def similarities(tokenizer: ImageTokenizer, queries: Sequence, gallery: Sequence) -> dict[str, Tensor]:
    """By name, how similar the queries are to the pictures of the gallery, by their ids alone: fp32 [Q, G].

    Raises:
        InvalidInput: an unreadable picture, or a tokenizer without ids.
    """
    ids_QL, ids_GL = (tokenizer.encode(list(pictures), batch_size=BATCH).ids for pictures in (queries, gallery))
    found = {"equal ids": equal_ids(ids_QL, ids_GL)}
    found["codes"] = mean_cosine(*(_in_batches(tokenizer, tokenizer.code_vectors, ids) for ids in (ids_QL, ids_GL)))
    if hasattr(tokenizer, "decode_embedding"):
        embeddings = (_in_batches(tokenizer, tokenizer.decode_embedding, ids) for ids in (ids_QL, ids_GL))
        found["embedding"] = mean_cosine(*(embedding_BE[:, None] for embedding_BE in embeddings))
    return found


def pixel_similarity(queries: Sequence, gallery: Sequence) -> Tensor:
    """The negated root mean squared difference of pictures reduced to 32x32, fp32 [Q, G]."""
    a_QP, b_GP = (
        torch.stack([to_pixels(fit_square(read_image(picture), PIXEL_SIDE)).flatten() for picture in pictures])
        for pictures in (queries, gallery)
    )
    return -torch.cdist(a_QP, b_GP) / a_QP.shape[1] ** 0.5


def paired(queries: Sequence[Path], gallery: Sequence[Path]) -> tuple[list[Path], list[Path], Tensor]:
    """Queries that have a picture in the gallery, the gallery, and the numbers int64 [Q] of the right pictures in it;
    both without skin-tone variants.

    Raises:
        InvalidInput: the gallery has two pictures of one name, or none of the queries' names.
    """
    queries, gallery = ([path for path in paths if not SKIN_TONE.search(path.stem)] for paths in (queries, gallery))
    place_of: dict[str, int] = {}
    for place, path in enumerate(gallery):
        if path.stem in place_of:
            raise InvalidInput(
                f"the gallery holds {gallery[place_of[path.stem]]} and {path}: name the folder of one size"
            )
        place_of[path.stem] = place
    kept = [path for path in queries if path.stem in place_of]
    if not kept:
        raise InvalidInput(f"none of the {len(queries)} queries has a picture of its name among {len(gallery)}")
    return kept, gallery, torch.tensor([place_of[path.stem] for path in kept])


def kinds_of(gallery: Sequence[Path], labels: Path) -> list[str]:
    """The kinds of pictures, by their files' stems in a JSON file such as `make data` writes.

    Raises:
        InvalidInput: a file that is none, or that lacks a picture.
    """
    try:
        table = json.loads(read_limited(labels, MAX_LABELS_BYTES))
        return [str(table[path.stem][KIND]) for path in gallery]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f'{labels} must give the kind of every picture: {{"STEM": {{"{KIND}": "..."}}}} ({error!r})'
        ) from None


def measure_retrieval(
    names: Sequence[str], queries: Sequence[Path], gallery: Sequence[Path], right_Q: Tensor,
    kinds: Sequence[str] | None = None,
) -> Iterator[Retrieval]:  # fmt: skip
    """Chance, pixels, and each way to compare the ids of each of the tokenizers `names`, one after the other.

    queries, gallery, right_Q: as `paired` gives them. kinds: of the gallery's pictures, if they are known.
    """

    def same_kind(similarity_QG: Tensor) -> float | None:
        return None if kinds is None else share_of_same_kind(similarity_QG, right_Q, kinds)

    def found(model: str, by: str, similarity_QG: Tensor) -> Retrieval:
        return Retrieval.of(model, by, ranks_of_right(similarity_QG, right_Q), same_kind(similarity_QG))

    yield chance(len(gallery), same_kind(torch.zeros(len(queries), len(gallery))))
    yield found(f"pixels at {PIXEL_SIDE}x{PIXEL_SIDE}", "", pixel_similarity(queries, gallery))
    for name in names:
        tokenizer = load(name)
        if not isinstance(tokenizer, ImageTokenizer):
            raise InvalidInput(f"{name} holds a {type(tokenizer).__name__}, which is no image tokenizer")
        for by, similarity_QG in similarities(tokenizer, queries, gallery).items():
            yield found(tokenizer.name, by, similarity_QG)


def _in_batches(tokenizer: ImageTokenizer, call, ids_BL: Tensor) -> Tensor:
    return torch.cat([call(ids.to(tokenizer.device)).float().cpu() for ids in ids_BL.split(BATCH)])


def as_markdown(found: Retrieval) -> str:
    """A line of the table."""
    shares = [number(100 * share, 1, " %") for share in (found.recall_at_1, found.recall_at_5, found.recall_at_10)]
    name = f"`{found.model}`" if found.similarity else found.model
    kind = [] if found.same_kind is None else [number(100 * found.same_kind, 1, " %")]
    return row(name, found.similarity, *shares, f"{found.median_rank:g}", *kind)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mediatok.evaluation.retrieval", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("models", nargs="+", help="names or folders of image tokenizers")
    parser.add_argument("--gallery", type=Path, required=True, help="folder of the pictures that are looked through")
    parser.add_argument("--queries", type=Path, required=True, help="folder of pictures of the same names")
    parser.add_argument("--labels", type=Path, help=f"JSON file with the {KIND} of each picture, by its file's stem")
    parser.add_argument("--json", action="store_true", help="print a JSON object a row")
    arguments = parser.parse_args(argv)
    try:
        queries, gallery, right_Q = paired(
            *(ImageFolder(path).paths for path in (arguments.queries, arguments.gallery))
        )
        kinds = None if arguments.labels is None else kinds_of(gallery, arguments.labels)
        if not arguments.json:
            columns = COLUMNS if kinds is None else (*COLUMNS, f"other of its {KIND}")
            print(
                f"{len(queries)} queries of {arguments.queries}, looked for in the {len(gallery)} pictures of "
                f"{arguments.gallery}; no skin-tone variants.\n\n{head(*columns)}"
            )
        for found in measure_retrieval(arguments.models, queries, gallery, right_Q, kinds):
            print(json.dumps(asdict(found)) if arguments.json else as_markdown(found), flush=True)
    except MediatokError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
