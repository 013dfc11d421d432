"""The caption file beside an image: ``cat.png`` has its caption in ``cat.txt``."""

import os
import uuid
from pathlib import Path


def caption_path(image: Path) -> Path:
    """Where the caption of ``image`` lives; a file that is there keeps its name, even ``cat.TXT``."""
    lower, upper = image.with_suffix(".txt"), image.with_suffix(".TXT")
    return upper if upper.is_file() and not lower.is_file() else lower


def read_caption(image: Path) -> str:
    """The caption beside ``image``, stripped; "" when there is none.

    Reads UTF-8 and UTF-16, with or without a byte order mark, and otherwise Windows-1252.
    """
    path = caption_path(image)
    return _decode(path.read_bytes()).strip() if path.is_file() else ""


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    if data.count(0) * 4 > len(data):  # UTF-16 without a mark: in Latin letters every second byte is zero
        return data.decode("utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def write_caption(image: Path, caption: str) -> None:
    """Put ``caption`` beside ``image`` as UTF-8, whole or not at all; raises ValueError when it is empty."""
    caption = caption.strip()
    if not caption:
        raise ValueError(f"the caption for {image.name} is empty, so no file was written")
    path = caption_path(image)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(caption + "\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
