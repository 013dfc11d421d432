"""Which pictures are kept out of training, so that checkpoints can be measured on pictures they never saw."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .buckets import bucket_for, bucket_sizes
from .dataset import TRAIN, Dataset, Example, natural_key

# (from this many pictures on, how many are held out): two already recover most of what a held-out set can tell, and
# more than eight bring little. Fewer than ten pictures are too few to spare one.
HELD_OUT = ((20, 4), (10, 2), (0, 0))
LARGE, SHARE, MOST = 40, 10, 8


def hold_out_count(count: int, wanted: int | None = None) -> int:
    """How many of `count` pictures to hold out; None: 0 below 10, 2 below 20, 4 below 40, then a tenth, at most 8.

    Raises ValueError when `wanted` leaves nothing to train on.
    """
    if wanted is None:
        return min(MOST, count // SHARE) if count >= LARGE else next(held for least, held in HELD_OUT if count >= least)
    if not 0 <= wanted < count:
        raise ValueError(
            f"hold_out must lie between 0 and {count - 1} for a folder with {count} pictures, got {wanted}."
        )
    return wanted


def split(
    examples: Sequence[Example], count: int, clusters: Iterable[Sequence[Path]] = (), resolution: int = 1024
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(to train on, held out), both in the order given: `count` pictures are held out, spread over buckets by size.

    Within a bucket the smallest hashes of the file name are taken, so that new files rarely change the choice. Of each
    of the `clusters` of near-duplicates one picture at most is taken, and only when no picture without a duplicate is
    left: a picture whose twin is trained on measures nothing. So fewer than `count` may be held out.
    """
    cluster_of = {path: number for number, cluster in enumerate(clusters) for path in cluster}
    alone = [example for example in examples if example.path not in cluster_of]
    first: dict[int, Example] = {}
    for example in sorted(examples, key=_rank):
        if example.path in cluster_of:
            first.setdefault(cluster_of[example.path], example)
    chosen = _spread(alone, count, resolution)
    chosen += _spread(list(first.values()), count - len(chosen), resolution)
    paths = {example.path for example in chosen}
    return tuple(e for e in examples if e.path not in paths), tuple(e for e in examples if e.path in paths)


def split_again(dataset: Dataset, clusters: Iterable[Sequence[Path]]) -> Dataset:
    """A dataset that was split, with as many pictures held out as before, chosen knowing its near-duplicates.

    Where nothing is trained on, as in a folder of validation pictures, it stays as it is.
    """
    if not dataset.examples:
        return dataset
    pictures = sorted(dataset.examples + dataset.held_out, key=lambda example: natural_key(str(example.path)))
    candidates = [example for example in pictures if example.role == TRAIN]
    train, held_out = split(candidates, len(dataset.held_out), clusters, dataset.resolution)
    others = tuple(example for example in dataset.examples if example.role != TRAIN)
    return replace(dataset, examples=train + others, held_out=held_out)


def _spread(examples: Sequence[Example], count: int, resolution: int) -> list[Example]:
    """The `count` first by hash, each bucket giving its share of them (Sainte-Laguë's method of seats)."""
    sizes = bucket_sizes(resolution)
    buckets: dict[tuple[int, int], list[Example]] = defaultdict(list)
    for example in sorted(examples, key=_rank):
        buckets[bucket_for(example.width, example.height, sizes)].append(example)
    seats = [
        (-len(members) / (2 * seat + 1), member) for members in buckets.values() for seat, member in enumerate(members)
    ]
    ranked = sorted(seats, key=lambda claim: (claim[0], _rank(claim[1])))
    return [member for _, member in ranked[: max(0, count)]]


def _rank(example: Example) -> tuple[bytes, Path]:
    return hashlib.sha256(os.fsencode(example.path.name)).digest(), example.path
