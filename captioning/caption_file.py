"""The caption file beside an image: ``cat.png`` has its caption in ``cat.txt``."""

import hashlib
import os
import time
import uuid
from pathlib import Path
from unicodedata import normalize

ENDINGS = (".txt", ".TXT", ".caption")
"""A caption file that is there keeps its name; the first ending is that of new ones."""
TRIES, PAUSE = 20, 0.05
"""How often a file is replaced that somebody reads at this moment, which Windows refuses, and seconds between tries."""


def caption_path(image: Path) -> Path:
    """Where the caption of ``image`` lives; a file that is there keeps its name, even ``cat.TXT``.

    An accent in its name may be a character of its own, as a Mac writes it, or a part of the letter.
    """
    paths = [image.with_suffix(ending) for ending in ENDINGS]
    paths += [path.with_name(normalize(form, path.name)) for form in ("NFC", "NFD") for path in paths]
    return next((path for path in dict.fromkeys(paths) if path.is_file()), paths[0])


def read_caption(image: Path) -> str:
    """The caption beside ``image``, stripped; "" when there is none.

    Reads UTF-8 and UTF-16, with or without a byte order mark, and otherwise Windows-1252.
    """
    path = caption_path(image)
    return text_of(path.read_bytes()) if path.is_file() else ""


def text_of(data: bytes) -> str:
    """The text of a caption file's content, without blanks around it and with plain line breaks."""
    return tidy(_decode(data).lstrip("\ufeff"))


def tidy(caption: str) -> str:
    """The caption as it is written: plain line breaks, no blanks around it."""
    return caption.replace("\r\n", "\n").replace("\r", "\n").strip()


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
    caption = tidy(caption)
    if not caption:
        raise ValueError(f"the caption for {image.name} is empty, so no file was written")
    write_whole(caption_path(image), (caption + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Replace the file, whole or not at all."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        _put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _put_in_place(temporary: Path, path: Path) -> None:
    for _ in range(TRIES - 1):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(PAUSE)
    os.replace(temporary, path)


def hash_of(caption: str) -> str:
    """A short name for the text of a caption."""
    return hashlib.sha256(caption.encode(errors="replace")).hexdigest()[:16]
