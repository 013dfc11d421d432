"""Picture files as upright RGB pixels, whatever they were saved as."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

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
_BITS_PER_SAMPLE = 258  # the TIFF tag


@dataclass(frozen=True)
class Look:
    """What a picture file is, told without its pixels; `remarks` says what is odd but does no harm."""

    width: int  # of the upright picture
    height: int
    transparent: bool  # there is an alpha channel or a transparent colour, whether or not anything shows through
    remarks: tuple[str, ...] = ()


def open_image(path: Path, background: str = "white") -> Image.Image:
    """The picture as RGB in the colours of sRGB: upright by its EXIF, first frame, 16 bits scaled to 8.

    `background` is what shows through its transparent parts. Raises ValueError naming the file when it cannot be read.
    """
    with _reading(path) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image), background)


def open_alpha(path: Path) -> Image.Image:
    """How opaque each pixel of the upright picture is, 0 to 255, as a grey picture.

    Raises ValueError naming the file when it cannot be read.
    """
    with _reading(path) as image:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


def look_at(path: Path) -> Look:
    """Size and oddities of a picture, from the file's header; decoded only where the file's end looks cut off.

    Raises ValueError naming the file when it cannot be read.
    """
    with _reading(path) as image:
        ending = _last_bytes(path)
        # A PNG may carry its EXIF after the pixels, where only loading finds it.
        if not _looks_whole(image.format, ending) or (image.format == "PNG" and b"eXIf" in ending):
            image.load()
        # The base method on purpose: the PNG plugin's own decodes every picture that has no EXIF.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        width, height = (image.height, image.width) if orientation in _SIDEWAYS else image.size
        return Look(width, height, _is_transparent(image), tuple(_remarks(image, path)))


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


def _remarks(image: Image.Image, path: Path) -> Iterator[str]:
    kind = "JPEG" if image.format == "MPO" else image.format
    expected = Image.registered_extensions().get(path.suffix.lower())
    if expected and kind != expected:
        yield f"really a {kind} picture, whatever the name says"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        yield "more than one frame, of which the first is used"
    if _has_deep_colours(image, path):
        yield "16 bits a colour, of which Pillow reads the upper 8"


def _has_deep_colours(image: Image.Image, path: Path) -> bool:
    """Whether there are 16 bits a colour, which Pillow reduces to 8 without a word; grey keeps its own bits."""
    if image.mode.startswith("I"):
        return False
    if image.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24] == 16  # bit depth: behind the signature, the IHDR chunk's head, width and height
    return image.format == "TIFF" and 16 in image.tag_v2.get(_BITS_PER_SAMPLE, ())


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    profile = image.info.get("icc_profile", b"")
    if _is_transparent(image):
        pixels = image.convert("RGBA")
        flat = Image.new("RGB", pixels.size, background)
        flat.paste(_in_srgb(pixels.convert("RGB"), profile), mask=pixels.getchannel("A"))
        return flat
    return _in_srgb(image if image.mode in ("L", "CMYK") else image.convert("RGB"), profile)


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    transform = _transform_to_srgb(profile, image.mode) if profile else None
    return ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")


@lru_cache(maxsize=16)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None when the colours are those of sRGB already, or the profile is of no use for such a picture."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(own).startswith("sRGB"):
            return None
        return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16-bit or floating-point values in 8 bits; Pillow's own conversion clips it."""
    values = np.asarray(image, dtype=np.float32)
    whole = image.mode.startswith("I")
    brightest = 65535.0 if whole else 1.0 if values.max(initial=0) <= 1 else 255.0
    return Image.fromarray(np.rint((values / brightest).clip(0, 1) * 255).astype(np.uint8))
