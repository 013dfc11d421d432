"""What a LoRA file holds, whatever it says about itself: the same for a copy, a cover or another remark in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors allows no more either."""
PIECE = 1 << 20


@dataclass(frozen=True)
class Content:
    """The SHA-256 over the tensors of a file, their names and shapes; and the names, () in other formats."""

    digest: str
    names: tuple[str, ...] = ()


def content_of(path: Path) -> Content:
    """The content of a LoRA file, read once as long as it does not change; OSError when it cannot be read.

    A file of another format, or a damaged one, is taken as a whole.
    """
    facts = path.stat()
    return _content(path, facts.st_size, (facts.st_mtime_ns, facts.st_ino))


@lru_cache(maxsize=256)
def _content(path: Path, size: int, _version: tuple[int, int]) -> Content:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = _header(file.read(length)) if length <= min(size, LONGEST_HEADER) else None
        if header is None:
            file.seek(0)
        told = json.dumps(header, sort_keys=True).encode()
        digest = hashlib.sha256(len(told).to_bytes(8, "little") + told)
        while piece := file.read(PIECE):
            digest.update(piece)
    return Content(digest.hexdigest(), tuple(header or ()))


def _header(data: bytes) -> dict | None:
    """Where each tensor lies, without the metadata; None when this is no header of a safetensors file."""
    try:
        header = json.loads(data)
    except ValueError:
        return None
    if not isinstance(header, dict):
        return None
    return {name: place for name, place in header.items() if name != "__metadata__"}
