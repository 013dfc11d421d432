"""Pictures, captions and masks that other nodes made, written once to a folder that is then read like any other."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .whole_file import patiently

# The time of every file as it was written, so that those edited later can be told: 2000-01-01, UTC.
WRITTEN_AT = 946_684_800
WRITTEN_AT_NS = WRITTEN_AT * 10**9


def write(folder: Path, images: Sequence[Tensor], captions: Sequence[str] = (), masks: Sequence[Tensor] = ()) -> Path:
    """The folder below `folder` with these pictures as PNG, their captions and masks beside them; written if new.

    `images` are (B, H, W, C) or (H, W, C) from 0 to 1 with 1, 3 or 4 channels, `masks` (B, H, W) or (H, W) with 1 where
    a picture is learned; all zero means no mask. Captions and masks are as many as the pictures, or one for all. The
    folder's name says what is in it, so edited captions stay as long as the same pictures come. Raises ValueError when
    the numbers do not go together, OSError naming the folder that cannot be written.
    """
    count = sum(len(batch) if batch.ndim == 4 else 1 for batch in images)
    if not count:
        raise ValueError("images brings no picture: connect a node that makes some.")
    captions = _for_each("captions", list(captions), count)
    masks = _for_each("masks", [mask for batch in masks for mask in (batch if batch.ndim == 3 else [batch])], count)
    name = hashlib.sha256()
    for content in _contents(images, captions, masks):
        name.update(content)
    place = Path(folder) / name.hexdigest()[:16]
    if not place.is_dir():
        _write_all(place, images, captions, masks)
    return place


def _for_each(name: str, given: list, count: int) -> list:
    """One entry for each picture; [] stays []."""
    if len(given) not in (0, 1, count):
        raise ValueError(f"{name} brings {len(given)} for {count} pictures: give one for each, or one for all.")
    return given * count if len(given) == 1 else given


def _pictures(images: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """(H, W, C) or (H, W) in 8 bits, one picture at a time."""
    number = 0
    for batch in images:
        for pixels in batch if batch.ndim == 4 else [batch]:
            number += 1
            if not pixels.isfinite().all():
                raise ValueError(f"Picture {number} of images holds values that are not numbers: make it again.")
            yield _eight_bits(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _eight_bits(values: Tensor) -> np.ndarray:
    # Cut, not rounded, as ComfyUI's Save Image does: a picture that went through 8 bits comes back unchanged.
    return np.ascontiguousarray((values.float().cpu().numpy() * 255).clip(0, 255).astype(np.uint8))


def _contents(images: Sequence[Tensor], captions: list[str], masks: list[Tensor]) -> Iterator[bytes]:
    for kind, arrays in (("picture", _pictures(images)), ("mask", map(_eight_bits, masks))):
        for array in arrays:
            yield f"{kind} {array.shape}".encode()
            yield array.tobytes()
    for caption in captions:
        yield f"caption {len(caption)} {caption}".encode()


def _write_all(place: Path, images: Sequence[Tensor], captions: list[str], masks: list[Tensor]) -> None:
    """All files or no folder: written under another name, then renamed."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix="."))
        try:
            for number, pixels in enumerate(_pictures(images)):
                stem = temporary / f"{number + 1:05d}"
                Image.fromarray(pixels).save(stem.with_suffix(".png"), compress_level=1)
                if captions and captions[number].strip():
                    stem.with_suffix(".txt").write_text(captions[number].strip() + "\n", encoding="utf-8")
                if masks and masks[number].any():
                    Image.fromarray(_eight_bits(masks[number])).save(temporary / f"{stem.name}_mask.png")
            for path in temporary.iterdir():
                os.utime(path, (WRITTEN_AT, WRITTEN_AT))
            temporary.chmod(0o755)
            patiently(lambda: os.replace(temporary, place))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise OSError(
            f"The folder {place.parent} cannot be written ({error.strerror}): free space there or allow writing to it."
        ) from error
