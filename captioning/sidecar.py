"""The caption file beside an image: ``cat.png`` has its caption in ``cat.txt``."""

import os
import uuid
from pathlib import Path


def caption_path(image: Path) -> Path:
    """Where the caption of ``image`` lives."""
    return image.with_suffix(".txt")


def read_caption(image: Path) -> str:
    """The caption beside ``image``, stripped; "" when there is none.

    Reads UTF-8 with or without a byte order mark, UTF-16 with one, and otherwise Windows-1252.
    """
    path = caption_path(image)
    return _decode(path.read_bytes()).strip() if path.is_file() else ""


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
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
