"""Picture files as upright RGB pixels, whatever they were saved as."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .buckets import crop_box

# Pillow's own limit for an error. Kept here as well, because other packs turn Pillow's off.
MAX_PIXELS = 178_956_970

# What Pillow is known to raise for damaged files, format by format.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_CHECKED_WHEN_OPENED = ("WEBP",)


def open_image(path: Path) -> Image.Image:
    """The picture as RGB: upright by its EXIF, transparency on white, 16 bits scaled to 8, first frame of an animation.

    Raises ValueError naming the file when it cannot be read.
    """
    with _reading(path) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright picture, from the file's header; decoded only where the file's end looks cut off.

    Raises ValueError naming the file when it cannot be read.
    """
    with _reading(path) as image:
        ending = _last_bytes(path)
        # A PNG may carry its EXIF after the pixels, where only loading finds it.
        if not _looks_whole(image.format, ending) or (image.format == "PNG" and b"eXIf" in ending):
            image.load()
        # The base method on purpose: the PNG plugin's own decodes every picture that has no EXIF.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return (image.height, image.width) if orientation in _SIDEWAYS else image.size


def fit(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """The picture scaled to cover `bucket` (width, height) and cropped to its centre, see `buckets.crop_box`."""
    return image.resize(bucket, Image.Resampling.LANCZOS, box=crop_box(*image.size, bucket))


@contextmanager
def _reading(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            yield image
    except _DAMAGED as error:
        raise ValueError(
            f"{Path(path).name} cannot be read as a picture ({_reason(error)}): save it again or remove it."
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image format that is known here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__


def _last_bytes(path: Path, count: int = 65536) -> bytes:
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - count))
        return file.read()


def _looks_whole(kind: str | None, ending: bytes) -> bool:
    return kind in _CHECKED_WHEN_OPENED or (kind in _ENDINGS and _ENDINGS[kind] in ending)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16-bit or floating-point values in 8 bits; Pillow's own conversion clips it."""
    values = np.asarray(image, dtype=np.float32)
    whole = image.mode.startswith("I")
    brightest = 65535.0 if whole else 1.0 if values.max(initial=0) <= 1 else 255.0
    return Image.fromarray(np.rint((values / brightest).clip(0, 1) * 255).astype(np.uint8))
