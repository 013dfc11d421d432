"""Variants of a picture, few enough to be encoded and kept: another crop, mirrored, slightly other colours.

What a variant looks like depends on the picture and the settings alone. Which one is seen is a function of the seed
and of how often the picture was seen before.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageEnhance

from .buckets import crop_box, enlargement

if TYPE_CHECKING:
    from .dataset import Example

_SIDES = re.compile(r"(?<![a-z])(left|right)(most|wards?|handed)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Augmentation:
    """How many `variants` of a picture take turns, and how they differ; variant 0 is always the plain picture.

    The crop of the others is up to the share `crop_jitter` smaller and moved by up to that share of its sides, never
    beyond the picture. With `flip` every second one is mirrored, unless a caption of the picture tells left from
    right. Brightness, contrast and saturation change by up to the share `colour`.
    """

    variants: int = 4
    crop_jitter: float = 0.0
    flip: bool = False
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (("variants", 1, 32), ("crop_jitter", 0, 0.5), ("colour", 0, 0.5)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, but must be between {low} and {high}.")
        if self.variants == 1 and self._varies:
            raise ValueError(
                "variants is 1, which is the plain picture alone: "
                "set it to 2 or more, or turn crop_jitter, flip and colour off."
            )

    @property
    def count(self) -> int:
        """How many different versions there are: one when nothing is varied."""
        return self.variants if self._varies else 1

    @property
    def _varies(self) -> bool:
        return bool(self.crop_jitter or self.flip or self.colour)


@dataclass(frozen=True)
class View:
    """How a picture is looked at: its part `box`, in pixels of the upright picture, scaled to `size`.

    `colour` holds the factors on brightness, contrast and saturation. All sizes are (width, height).
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    mirrored: bool = False
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def picture(self, image: Image.Image) -> Image.Image:
        """An RGB picture seen this way."""
        seen = self._turned(image.resize(self.size, Image.Resampling.LANCZOS, box=self.box))
        adjustments = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for adjustment, factor in zip(adjustments, self.colour, strict=True):
            seen = adjustment(seen).enhance(factor) if factor != 1 else seen
        return seen

    def mask(self, mask: Image.Image, size: tuple[int, int]) -> Image.Image:
        """A grey picture of the size of the whole picture, seen this way at `size`: the mean of what a pixel covers."""
        return self._turned(mask.resize(size, Image.Resampling.BOX, box=self.box))

    def _turned(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image


def view_of(
    example: Example,
    size: tuple[int, int],
    variant: int,
    augmentation: Augmentation,
    *,
    key: str,
    largest_enlargement: float = 0.0,
) -> View:
    """Variant number `variant` of a picture at `size`; `key` identifies the picture, wherever it lies.

    A smaller crop is scaled up more, so `largest_enlargement` (0 = no limit) holds for it too.
    """
    plain = View(size, crop_box(example.width, example.height, size))
    if variant == 0:
        return plain
    drawn = random.Random(f"{key} {variant}")
    shares = [drawn.random() for _ in range(6)]  # all of them in any case, so that one setting moves nothing else
    box, jitter = plain.box, augmentation.crop_jitter
    if jitter:
        needed = enlargement(example.width, example.height, size) / largest_enlargement if largest_enlargement else 0.0
        scale = max(1 - jitter * shares[0], min(1.0, needed))
        left, right = _moved(box[0], box[2], example.width, scale, jitter, shares[1])
        top, bottom = _moved(box[1], box[3], example.height, scale, jitter, shares[2])
        box = (left, top, right, bottom)
    mirrored = augmentation.flip and variant % 2 == 1 and not tells_sides((example.caption, *example.variants))
    brightness, contrast, saturation = (1 + augmentation.colour * (2 * share - 1) for share in shares[3:])
    return View(size, box, mirrored, (brightness, contrast, saturation))


def variant_of(count: int, seed: int, turn: int, key: str) -> int:
    """Which of a picture's `count` variants it shows the time it is seen that is counted `turn`, from 0.

    In every `count` turns each variant comes once, in an order of the picture's own.
    """
    if count == 1:
        return 0
    again, position = divmod(turn, count)
    return random.Random(f"{seed} {key} {again}").sample(range(count), count)[position]


def tells_sides(captions: Iterable[str]) -> bool:
    """Whether a caption speaks of left or right, which mirroring the picture would make wrong."""
    return any(_SIDES.search(caption) for caption in captions)


def _moved(start: float, end: float, limit: float, scale: float, jitter: float, share: float) -> tuple[float, float]:
    """An interval shrunk by `scale` and moved by up to `jitter` of its length, inside 0 to `limit`."""
    length = (end - start) * scale
    first = (start + end - length) / 2
    reach = jitter * (end - start)
    lowest, highest = max(0.0, first - reach), min(limit - length, first + reach)
    first = lowest + share * max(0.0, highest - lowest)
    return first, min(float(limit), first + length)
