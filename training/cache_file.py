"""A file of the cache: tensors by name and a checksum, written whole or not at all."""

import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .whole_file import WRITING, patiently, remove_leftovers

HOUR = 3600.0
"""Seconds after which nobody can still be writing a file of the cache."""


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a cache file; raises ValueError when it is missing or damaged."""
    try:
        data = path.read_bytes()
        header, payload = _parts(data)
        if int(header["__metadata__"]["crc32"]) != zlib.crc32(payload):
            raise ValueError("its checksum differs")
        # The caller may be inside inference mode, whose tensors could not be trained on later.
        with torch.inference_mode(False):
            return safetensors.torch.load(data)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"The cache file {path} is missing or damaged ({error}): queue again and it is made anew."
        ) from error


def is_intact(path: Path) -> bool:
    """Whether a cache file is there and as it was written."""
    try:
        read(path)
    except ValueError:
        return False
    return True


def _parts(data: bytes) -> tuple[dict, memoryview]:
    """Header and payload of a safetensors file: eight bytes of header length, the header as JSON, the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), memoryview(data)[start:]


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Keep tensors on disk; OSError naming the folder when it cannot be written."""
    # Cloned because safetensors refuses views that share memory.
    owned = {name: value.contiguous().clone() for name, value in tensors.items()}
    _, payload = _parts(safetensors.torch.save(owned))
    _write_bytes(path, safetensors.torch.save(owned, {"crc32": str(zlib.crc32(payload))}))


def _write_bytes(path: Path, data: bytes) -> None:
    """The whole file or none: written under another name, then renamed."""
    with _writing_to(path.parent):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=WRITING)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            patiently(lambda: os.replace(temporary, path))
        except BaseException:
            os.unlink(temporary)
            raise


def try_writing(folder: Path) -> None:
    """Make the folder; OSError naming it when nothing can be written there. What a killed process left is removed."""
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    remove_leftovers([folder], older_than=HOUR)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The cache folder {folder} cannot be written ({error.strerror}): free space there or allow writing to it."
        ) from error
