"""The sizes pictures are trained at, and which part of a picture fills one. Sizes are always (width, height)."""

import math
from collections.abc import Sequence

MIN_SIDE = 256


def bucket_sizes(resolution: int, step: int = 64) -> tuple[tuple[int, int], ...]:
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


def crop_box(width: int, height: int, bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """The centred part of a `width` x `height` picture that fills `bucket`: (left, top, right, bottom).

    In pixels of the original, upright picture, not rounded. The box has the bucket's exact aspect ratio and touches
    two opposite edges of the picture; `images.fit` scales exactly this box to the bucket.
    """
    scale = max(bucket[0] / width, bucket[1] / height)
    left = max(0.0, (width - bucket[0] / scale) / 2)
    top = max(0.0, (height - bucket[1] / scale) / 2)
    return left, top, width - left, height - top
