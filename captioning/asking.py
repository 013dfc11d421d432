"""What is the same for every model that is shown a picture and asked to describe it."""

from PIL import Image

LONGEST_CAPTION_TOKENS = 300
"""More than any text encoder of an image model reads with attention."""
LONGEST_SIDE = 1024
"""Pixels; what a model reads grows with the area, and captions do not get better beyond this."""


def shrunk(image: Image.Image) -> Image.Image:
    """A copy of the picture, no longer on any side than LONGEST_SIDE; smaller ones keep their size."""
    image = image.copy()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image
