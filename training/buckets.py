"""The sizes pictures are trained at, and which part of a picture fills one. Sizes are always (width, height)."""

import math
from collections.abc import Sequence
from functools import lru_cache

MIN_SIDE = 256
STEP = 64
MOST_NAMED = 10


@lru_cache
def bucket_sizes(resolution: int, step: int = STEP) -> tuple[tuple[int, int], ...]:
    """All (width, height) in multiples of `step` that fill `resolution ** 2` as far as they can without exceeding it.

    Both orientations and the square are there. Sides go from 256, or half the resolution if less, to twice it.
    """
    if resolution < step:
        raise ValueError(f"The resolution must be at least {step}, got {resolution}.")
    area = resolution**2
    shortest, longest = min(MIN_SIDE, resolution // 2), 2 * resolution
    square = resolution // step * step
    sizes = {(square, square)}
    for width in range(step, longest + 1, step):
        height = area // width // step * step
        if width >= shortest and shortest <= height <= longest and height > 0:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def bucket_for(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose shape is nearest to the picture's, by the ratio of aspect ratios; every picture has one."""
    aspect = math.log(width / height)

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        # Rounded so that a wide picture and the same picture turned upright meet the same ties.
        return round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]

    return min(sizes, key=distance)


def sizes_for(
    width: int, height: int, resolutions: Sequence[int], largest_enlargement: float = 0.0
) -> tuple[tuple[int, int], ...]:
    """The sizes one picture is trained at, smallest first: one for each resolution that it is large enough for.

    A picture is scaled up by at most `largest_enlargement` (0 = no limit) and then trained at a smaller size; see
    `size_for`. Several resolutions never enlarge a picture beyond the smallest of them, or where a limit is given
    beyond that. A resolution that brings no more pixels than the one before is left out, so that every picture has at
    least one size and no size twice.
    """
    sizes: list[tuple[int, int]] = []
    for resolution in sorted(set(resolutions)):
        limit = largest_enlargement or (1.0 if sizes else 0.0)
        size = size_for(width, height, resolution, limit)
        if not sizes or math.prod(size) > math.prod(sizes[-1]):
            sizes.append(size)
    return tuple(sizes)


def size_for(width: int, height: int, resolution: int, largest_enlargement: float = 0.0) -> tuple[int, int]:
    """The size of a picture at one resolution; where its bucket asks for too much enlargement, sides are cut to fit.

    Each side is then the largest multiple of 64 that needs no more than `largest_enlargement` (0 = no limit). Only a
    picture with a side that is smaller than 64 even so is enlarged further.
    """
    bucket = bucket_for(width, height, bucket_sizes(resolution))
    if not largest_enlargement or enlargement(width, height, bucket) <= largest_enlargement:
        return bucket
    fitting = [int(side * largest_enlargement) // STEP * STEP for side in (width, height)]
    return max(STEP, min(bucket[0], fitting[0])), max(STEP, min(bucket[1], fitting[1]))


def enlargement(width: int, height: int, bucket: tuple[int, int]) -> float:
    """How many times a picture is scaled up to cover `bucket`; below 1 it is scaled down."""
    return max(bucket[0] / width, bucket[1] / height)


def size_notes(
    pictures: Sequence[tuple[str, int, int]], resolutions: Sequence[int], largest_enlargement: float = 0.0
) -> list[str]:
    """What to tell about the pictures, each (name, width, height), that are too small for a resolution asked for."""
    largest = max(resolutions)
    if not largest_enlargement and len(set(resolutions)) == 1:
        small = [f"{name} ({width} x {height})" for name, width, height in pictures if width * height < largest**2]
        told = (
            f"smaller than {largest} x {largest}, e.g. {', '.join(small[:1])}: they are enlarged, which can teach blur."
        )
        return [f"{_of_all(small, pictures)} {told}"] if small else []
    notes, enlarged, smaller = [], [], []
    for name, width, height in pictures:
        size = sizes_for(width, height, resolutions, largest_enlargement)[-1]
        factor = enlargement(width, height, size)
        if factor > max(1.0, largest_enlargement):
            enlarged.append(f"{name} ({width} x {height}, {factor:.1f} times)")
        elif size != bucket_for(width, height, bucket_sizes(largest)):
            smaller.append(f"{name} at {size[0]} x {size[1]}")
    if smaller:
        beyond = f" more than {largest_enlargement:g} times" if largest_enlargement > 1 else ""
        told = f"too small for {largest} x {largest} and trained smaller instead of enlarged{beyond}"
        notes.append(f"{_of_all(smaller, pictures)} {told}: {_named(smaller)}.")
    if enlarged:
        told = "smaller than the smallest size to train at and enlarged, which can teach blur"
        notes.append(f"{_of_all(enlarged, pictures)} {told}: {_named(enlarged)}.")
    return notes


def _of_all(some: Sequence, everything: Sequence) -> str:
    return f"{len(some)} of {len(everything)} pictures {'is' if len(some) == 1 else 'are'}"


def _named(some: Sequence[str]) -> str:
    more = len(some) - MOST_NAMED
    return ", ".join(some[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def crop_box(width: int, height: int, bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """The centred part of a `width` x `height` picture that fills `bucket`: (left, top, right, bottom).

    In pixels of the original, upright picture, not rounded. The box has the bucket's exact aspect ratio and touches
    two opposite edges of the picture; `augmentation.View` scales exactly such a box.
    """
    scale = enlargement(width, height, bucket)
    left = max(0.0, (width - bucket[0] / scale) / 2)
    top = max(0.0, (height - bucket[1] / scale) / 2)
    return left, top, width - left, height - top
