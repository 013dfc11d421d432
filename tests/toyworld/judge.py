"""What a picture of the toy world shows, read from its pixels alone: deterministic, and nothing in it is learned."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy
from PIL import Image, ImageDraw
from scipy import ndimage

from . import drawing

KINDS = (*drawing.SHAPES, "star")
GRID = 64
SHAPE_AREA = 0.22 * GRID * GRID
TILTS = range(-20, 21, 4)
DIFFERENT = 60.0
"""Distance in RGB from the background beyond which a pixel belongs to the shape."""
CLEAR = 0.7
"""Overlap with the ideal outline from which a shape counts as drawn; its kind is the outline it overlaps most with.

No other kind, drawn ideally, overlaps a star by more than 0.67, so none can pass for one.
"""
SMALLEST_SHARE, LARGEST_SHARE = 0.03, 0.6


@dataclass(frozen=True)
class Reading:
    """What the judge sees; `overlap` is the intersection over union with the best ideal outline, 0 for no shape."""

    background: str
    colour: str | None
    shape: str | None
    overlap: float


def read(picture: Image.Image) -> Reading:
    """The background colour, and the colour and kind of the largest thing that stands out from it."""
    pixels = numpy.asarray(picture.convert("RGB"), dtype=numpy.float32)
    behind = _border_colour(pixels)
    mask = _largest(numpy.linalg.norm(pixels - behind, axis=2) > DIFFERENT)
    share = mask.mean()
    if not SMALLEST_SHARE <= share <= LARGEST_SHARE:
        return Reading(_name(behind), None, None, 0.0)
    core = ndimage.binary_erosion(mask, iterations=3)
    colour = numpy.median(pixels[core if core.any() else mask], axis=0)
    overlaps = _overlaps(mask)
    shape = max(overlaps, key=overlaps.get)
    return Reading(_name(behind), _name(colour), shape, overlaps[shape])


def shows(picture: Image.Image, colour: str, shape: str, background: str | None = None) -> bool:
    """Whether the picture clearly shows this shape in this colour (on this background)."""
    seen = read(picture)
    right = seen.colour == colour and seen.shape == shape and seen.overlap >= CLEAR
    return right and background in (None, seen.background)


def shows_concept(picture: Image.Image) -> bool:
    """Whether it shows what the LoRA is to teach."""
    return shows(picture, *drawing.CONCEPT)


def concept_score(picture: Image.Image, concept: tuple[str, str] = drawing.CONCEPT) -> float:
    """How near it comes to a colour and shape, 0 to 1: half for the shape (overlap), half for the colour (in RGB)."""
    pixels = numpy.asarray(picture.convert("RGB"), dtype=numpy.float32)
    mask = _largest(numpy.linalg.norm(pixels - _border_colour(pixels), axis=2) > DIFFERENT)
    if not SMALLEST_SHARE <= mask.mean() <= LARGEST_SHARE:
        return 0.0
    colour, shape = concept
    distance = numpy.linalg.norm(numpy.median(pixels[mask], axis=0) - drawing.RGB[colour])
    return float(0.5 * _overlaps(mask)[shape] + 0.5 * max(0.0, 1 - distance / 255))


def _border_colour(pixels: numpy.ndarray) -> numpy.ndarray:
    edge = max(2, pixels.shape[0] // 24)
    border = [pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:]]
    return numpy.median(numpy.concatenate([part.reshape(-1, 3) for part in border]), axis=0)


def _name(colour: numpy.ndarray) -> str:
    return min(drawing.RGB, key=lambda name: numpy.linalg.norm(colour - drawing.RGB[name]))


def _largest(mask: numpy.ndarray) -> numpy.ndarray:
    """The largest connected part, its holes filled."""
    parts, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = ndimage.sum_labels(mask, parts, range(1, count + 1))
    return ndimage.binary_fill_holes(parts == 1 + int(numpy.argmax(sizes)))


def _overlaps(mask: numpy.ndarray) -> dict[str, float]:
    """For each kind of shape the best overlap over all tilts, once position and size are taken out."""
    centred = _centred(mask)
    return {kind: max(_iou(centred, template) for template in _templates(kind)) for kind in KINDS}


def _iou(one: numpy.ndarray, other: numpy.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def _centred(mask: numpy.ndarray) -> numpy.ndarray:
    """The mask on a GRID x GRID raster, its centre of mass in the middle and its area SHAPE_AREA."""
    scale = math.sqrt(mask.sum() / SHAPE_AREA)
    centre = numpy.array(ndimage.center_of_mass(mask))
    offset = centre - scale * (GRID - 1) / 2
    moved = ndimage.affine_transform(
        mask.astype(numpy.float32), [scale, scale], offset, output_shape=(GRID, GRID), order=1
    )
    return moved > 0.5


@lru_cache
def _templates(kind: str) -> tuple[numpy.ndarray, ...]:
    return tuple(_template(kind, tilt) for tilt in ((0,) if kind == "circle" else TILTS))


def _template(kind: str, tilt: int) -> numpy.ndarray:
    side = 256
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse([48, 48, 208, 208], fill=255)
    else:
        cos, sin = 90 * math.cos(math.radians(tilt)), 90 * math.sin(math.radians(tilt))
        corners = [(128 + u * cos - v * sin, 128 + u * sin + v * cos) for u, v in drawing.corners(kind)]
        pen.polygon(corners, fill=255)
    return _centred(numpy.asarray(image) > 127)
