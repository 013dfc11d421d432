"""Masks: grey pictures beside the pictures, or their own transparency; white is learned, black is not."""

from collections.abc import Iterable
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image, ImageFilter

from .dataset import Example
from .images import Look, open_alpha, open_image

FILES_AND_ALPHA, FILES, OFF = "mask files and transparency", "mask files", "off"
SOURCES = (FILES_AND_ALPHA, FILES, OFF)
FOLDERS = ("masks", "mask")
_ENDINGS = ("_mask", "-masklabel")
LEFT_OUT, LEARNED = 40, 0.95
"""Of 255: what is darker is left out, black after JPEG included. Of the brightest: what is wholly learned."""
_PAINTED, _SOFTNESS = 1024, 1 / 64  # pixels of the longer side, and its share by which painted parts are blurred
_SHAPE_TOLERANCE = 0.02  # how much the ratio of a mask's sides may differ from the picture's


def is_mask(path: Path) -> bool:
    """Whether a file is a mask by its name: `NAME_mask.png` or `NAME-masklabel.png`, in any image format."""
    return path.stem.lower().endswith(_ENDINGS)


def is_folder(path: Path) -> bool:
    """Whether a sub-folder holds masks by its name, `masks` or `mask` in any case."""
    return path.name.lower() in FOLDERS


def by_picture(paths: Iterable[Path]) -> dict[str, Path]:
    """Mask files under the key, see `key_of`, of the picture each belongs to."""
    return {_picture_of(path): path for path in paths}


def key_of(picture: Path) -> str:
    """What masks are found by: the stem in lower case, with accents in one of the two forms that systems write."""
    return normalize("NFC", picture.stem.lower())


def mask_for(picture: Path, look: Look, files: dict[str, Path], source: str) -> tuple[Path | None, str]:
    """The mask of a picture, as in `Example.mask`, and a remark when it has one that cannot be used.

    `files` comes from `by_picture`. Raises ValueError naming the picture when its transparency cannot be read.
    """
    if source == OFF:
        return None, ""
    if path := files.get(key_of(picture)):
        trouble = _trouble(path, look)
        return (None, f"trained without its mask {path.name}, {trouble}") if trouble else (path, "")
    if not look.transparent or source != FILES_AND_ALPHA:
        return None, ""
    least, most = open_alpha(picture).getextrema()
    if most == 0:
        return None, "trained without a mask, as it is transparent all over"
    return (picture if least < 255 else None), ""


def open_mask(example: Example) -> Image.Image | None:
    """The mask of an example as a grey picture of the size of its upright picture; None when it has none.

    Raises ValueError naming the file when it cannot be read.
    """
    if example.mask is None:
        return None
    if example.mask == example.path:
        return open_alpha(example.path)
    mask = open_image(example.mask, "black").convert("L")
    size = example.width, example.height
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def shown(example: Example, background: str = "white") -> Image.Image:
    """The picture of an example as training sees it, whole and upright, painted over where that is wanted.

    Raises ValueError naming the file that cannot be read.
    """
    picture = open_image(example.path, background)
    return filled(picture, open_mask(example)) if example.fill_masked else picture


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with what a mask leaves out painted in the nearest of the colours that are learned, softened.

    So neither the VAE nor the network sees what was there. What is grey stays, as it counts for something; a mask that
    is black all over changes nothing.
    """
    left_out = np.asarray(mask) < LEFT_OUT
    if left_out.all() or not left_out.any():
        return picture
    painted = _painted(picture, mask).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(painted, picture, Image.fromarray(left_out))


def _painted(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The colours of a picture where it is learned, carried on from there, as a picture that may be smaller."""
    from scipy.ndimage import distance_transform_edt

    scale = min(1.0, _PAINTED / max(picture.size))
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    # BOX is the mean of what a smaller pixel covers: where some of that is left out, its mask is darker.
    pixels, seen = (np.asarray(image.resize(size, Image.Resampling.BOX)) for image in (picture, mask))
    rows, columns = distance_transform_edt(seen < LEARNED * seen.max(), return_distances=False, return_indices=True)
    nearest = Image.fromarray(pixels[rows, columns])
    return nearest.filter(ImageFilter.GaussianBlur(_SOFTNESS * max(size)))


def _trouble(path: Path, look: Look) -> str:
    """Why a mask file cannot be used, "" when it can."""
    try:
        mask = open_image(path, "black").convert("L")
    except ValueError:
        return "which cannot be read"
    if abs(mask.width * look.height / (mask.height * look.width) - 1) > _SHAPE_TOLERANCE:
        return f"which has another shape ({mask.width} x {mask.height})"
    return "" if mask.getextrema()[1] else "which is black all over"


def _picture_of(path: Path) -> str:
    stem = key_of(path)
    return next((stem.removesuffix(ending) for ending in _ENDINGS if stem.endswith(ending)), stem)
