"""Files that are whole or not there, whatever happens while they are written: an error, a kill, a power cut."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

WRITING = ".writing-"
"""What the name of a file begins with until it is whole."""
PATIENCE, PAUSE = 1.0, 0.05
"""Seconds that a file which another program has open is waited for, and between two tries."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a safetensors file calls the types of the numbers that a state is made of."""
Data = bytes | Sequence[bytes | np.ndarray]
"""What a file holds, in one piece or in several that are written one after another."""


def write_atomically(path: Path, data: Data) -> None:
    """A temporary file beside the target, on the disk before it is renamed: nobody ever sees half a file.

    OSError naming the folder when its disk is full, PermissionError naming the file when a program holds it.
    """
    with naming_a_full_disk(path.parent):
        _write_atomically(path, data)


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Inside, an error of the system that the disk is full becomes a sentence that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"The disk of '{folder}' is full ({error.strerror}): free some space there, then queue again."
        ) from error


def _write_atomically(path: Path, data: Data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=WRITING, suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files only their owner can read; a LoRA is as readable as any other file in its folder.
        os.chmod(temporary, 0o644)
        put_in_place(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _settle(path.parent)


def put_in_place(temporary: str, path: Path) -> None:
    """Give a written file its name; PermissionError naming it when a program holds the file it replaces."""
    try:
        patiently(lambda: os.replace(temporary, path))
    except PermissionError as error:
        raise PermissionError(
            f"'{path}' cannot be replaced ({error.strerror}): close the program that has it open, then queue again."
        ) from error


def patiently(change: Callable[[], None]) -> None:
    """Rename or delete a file, which Windows refuses while anybody has it open, if only to show or to check it.

    So it is tried again for a second; then the PermissionError goes on.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return change()
        except PermissionError:
            if time.monotonic() >= until:
                raise
        time.sleep(PAUSE)


def write_keeping(path: Path, data: Data, previous: Path) -> None:
    """Write `path` anew and keep what it held as `previous`; at any moment at least one of the two is whole."""
    if path.is_file():
        beside = previous.with_name(f"{WRITING}{previous.name}")
        beside.unlink(missing_ok=True)
        try:
            os.link(path, beside)
            os.replace(beside, previous)
        except OSError:  # a file system without hard links
            write_atomically(previous, path.read_bytes())
    write_atomically(path, data)


def remove_leftovers(folders: Iterable[Path], older_than: float = 0.0) -> None:
    """Delete what a killed process was writing.

    In folders that others may be writing to at this moment, only what has not changed for `older_than` seconds.
    """
    for folder in folders:
        for path in folder.glob(f"{WRITING}*"):
            with suppress(OSError):
                if not older_than or time.time() - path.stat().st_mtime > older_than:
                    path.unlink()


def tensor_bytes(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> bytes:
    """A safetensors file with its metadata in order: the library's own order changes from one process to the next."""
    header, payload = _parts(safetensors.torch.save(dict(tensors)))
    return _joined(header, payload, entries)


def with_entries(data: bytes, entries: Mapping[str, str]) -> bytes:
    """The same safetensors file with other metadata; the tensors stay as they are, byte for byte."""
    header, payload = _parts(data)
    return _joined(header, payload, entries)


def payload_of(data: bytes) -> memoryview:
    """The tensors of a safetensors file, without its header."""
    return _parts(data)[1]


def checksummed(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> list[bytes | np.ndarray]:
    """A safetensors file that says in its metadata what the checksum of its tensors is, in pieces.

    The tensors, on the CPU, are not copied: a state may be larger than what else is free.
    """
    header, pieces, end, checksum = {}, [], 0, 0
    # The widest numbers first, so that each begins at a multiple of its width.
    for name, tensor in sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])):
        piece = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        start, end = end, end + piece.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        checksum = zlib.crc32(piece, checksum)
        pieces.append(piece)
    return [_head(header, {**entries, "crc32": str(checksum)}), *pieces]


def read_checksummed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; ValueError saying what is wrong with a file that is not what was written."""
    try:
        data = path.read_bytes()
        header, payload = _parts(data)
        entries = header["__metadata__"]
        if int(entries["crc32"]) != zlib.crc32(payload):
            raise ValueError("its checksum differs")
        return safetensors.torch.load(data), entries
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def _parts(data: bytes) -> tuple[dict, memoryview]:
    """Header and payload: eight bytes of header length, the header as JSON, the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), memoryview(data)[start:]


def _joined(header: dict, payload: memoryview, entries: Mapping[str, str]) -> bytes:
    return b"".join((_head(header, entries), payload))


def _head(header: dict, entries: Mapping[str, str]) -> bytes:
    """What comes before the tensors: the header with these entries as its metadata, and its length."""
    header = {name: value for name, value in header.items() if name != "__metadata__"}
    header["__metadata__"] = dict(sorted(entries.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _settle(folder: Path) -> None:
    """Bring a rename to the disk too, where the system lets a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
