"""Variants of a picture, few enough to be encoded and kept: another crop, mirrored, slightly other colours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """How many `variants` of a picture take turns, and how they differ; variant 0 is always the plain picture.

    The crop of the others is up to the share `crop_jitter` smaller and moved by up to that share of its sides, never
    beyond the picture. With `flip` every second one is mirrored. Brightness, contrast and saturation change by up to
    the share `colour`.
    """

    variants: int = 1
    crop_jitter: float = 0.0
    flip: bool = False
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (("variants", 1, 32), ("crop_jitter", 0, 0.5), ("colour", 0, 0.5)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, but must be between {low} and {high}.")
        if self.variants == 1 and (self.crop_jitter or self.flip or self.colour):
            raise ValueError(
                "variants is 1, which is the plain picture alone: "
                "set it to 2 or more, or turn crop_jitter, flip and colour off."
            )
