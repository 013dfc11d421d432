"""Reads a LoRA file that anybody may have made: what is not as it should be is a sentence, never a crash or a wait.

A safetensors file is eight bytes with the length of its header, the header as JSON, and the tensors end to end. Nothing
in a file is followed, run or written.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

Read = TypeVar("Read")
LONGEST_HEADER = 100_000_000  # bytes; safetensors allows no more either
LARGEST_FILE = 16 << 30  # bytes; more than any LoRA
MOST_TENSORS = 100_000
MOST_DIMENSIONS = 8
LONGEST_NAME = 512  # characters
TOO_MANY = f"its header names more than {MOST_TENSORS:,} tensors"
SUFFIXES = (".safetensors", ".sft")

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class LoraFile:
    """What lies in a LoRA file: its tensors by name, and its metadata."""

    path: Path
    tensors: dict[str, Tensor]
    entries: dict[str, str]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: bytes `start` to `end` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def open_lora(path: Path) -> LoraFile:
    """The file, read whole; ValueError naming it and what is wrong with it. Values that are not finite are let in."""
    return _guarded(Path(path), _read)


def check_lora(path: Path) -> None:
    """ValueError as `open_lora` raises it for what the header alone shows to be wrong; the tensors are not read."""
    _guarded(Path(path), _places)


def header_of(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of the file's tensors by name, and its metadata; ValueError as `open_lora` raises it."""
    places, entries = _guarded(Path(path), _places)
    return {name: place.shape for name, place in places.items()}, entries


def finite(file: LoraFile) -> None:
    """ValueError naming the first tensor with a value that is not finite."""
    for name, tensor in file.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(_askable(tensor)).all():
            raise ValueError(
                f"The LoRA file '{file.path.name}' is broken: '{name}' holds values that are not finite. Inspect LoRA "
                "lists them all; download or train the file again."
            )


def _askable(tensor: Tensor) -> Tensor:
    """The values in a type that torch can ask whether they are finite: it cannot ask numbers of one byte."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _guarded(path: Path, read: Callable[[Path, BinaryIO], Read]) -> Read:
    """What `read` finds in the file; whatever goes wrong is a ValueError with a sentence."""
    try:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError("only .safetensors files are read, since others can run programs")
        # Asked before it is opened: to open a pipe waits until somebody writes into it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is a folder or something else that is no file")
        with path.open("rb") as file:
            return read(path, file)
    except OSError as error:
        raise _unreadable(path, error.strerror or "the disk gave an error") from error
    except MemoryError as error:
        raise _unreadable(path, "it does not fit into memory") from error
    except ValueError as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"The LoRA file '{path.name}' cannot be read: {reason}. Download or train it again, or choose another file."
    )


def _read(path: Path, file: BinaryIO) -> LoraFile:
    places, entries = _places(path, file)
    in_order = sorted(places, key=lambda name: (places[name].start, places[name].end))
    read = {name: _tensor(file, places[name]) for name in in_order}
    return LoraFile(path, {name: read[name] for name in places}, entries)


def _places(path: Path, file: BinaryIO) -> tuple[dict[str, _Place], dict[str, str]]:
    """Where each tensor lies, and the metadata; the file stands at the first tensor then."""
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"its {size >> 30} GiB are more than a LoRA can have")
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= LONGEST_HEADER:
        raise ValueError("it does not begin as a safetensors file does")
    if length > size - 8:
        raise ValueError("it ends inside its header, so it is cut off")
    header = _header(file.read(length))
    entries = header.pop("__metadata__", {})
    _check_entries(entries)
    places = {name: _place(name, told) for name, told in header.items()}
    _check_order(places, size - 8 - length)
    return places, entries


# The header


def _header(data: bytes) -> dict:
    _check_amount(data)
    try:
        header = json.loads(data.decode(), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError("its header is no JSON") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    if len(header) > MOST_TENSORS:
        raise ValueError(TOO_MANY)
    return header


def _check_amount(data: bytes) -> None:
    """Counted before it is parsed, since Python needs up to 50 times the room for what a header can list."""
    text = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if text.count(b'"') > 20 * MOST_TENSORS:
        raise ValueError(TOO_MANY)
    outside = b"".join(text.split(b'"')[::2])
    if outside.count(b"[") + outside.count(b"{") > 4 * MOST_TENSORS or outside.count(b",") > 20 * MOST_TENSORS:
        raise ValueError(TOO_MANY)


def _once(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"its header names {_short(twice)} twice")
    return table


def _check_entries(entries: object) -> None:
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise ValueError("its metadata is something else than text")
    try:
        "".join((*entries, *entries.values())).encode()
    except UnicodeEncodeError as error:
        raise ValueError("its metadata holds half a character") from error


def _place(name: str, told: object) -> _Place:
    _check_name(name)
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header says something else of {_short(name)} than type, shape and place")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{_short(name)} is of a type that LoRAs do not have")
    if not _whole_numbers(shape) or len(shape) > MOST_DIMENSIONS or math.prod(max(1, n) for n in shape) > LARGEST_FILE:
        raise ValueError(f"{_short(name)} has a shape that no tensor has")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{_short(name)} lies nowhere in the file")
    place = _Place(getattr(torch, DTYPES[dtype]), tuple(shape), *offsets)
    if math.prod(shape) * place.dtype.itemsize != place.end - place.start:
        raise ValueError(f"{_short(name)} has another size than its shape says")
    return place


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST_FILE for value in values)


def _check_name(name: str) -> None:
    if not 0 < len(name) <= LONGEST_NAME:
        raise ValueError(f"it names a tensor with {len(name)} characters")
    if not name.isprintable():
        raise ValueError(f"it names a tensor {_short(name)}, with characters that cannot be shown")
    if any(mark in name for mark in ("/", "\\", "..")):
        raise ValueError(f"it names a tensor {_short(name)}, which is a path")


def _short(name: str) -> str:
    return ascii(name if len(name) <= 60 else f"{name[:60]}...")


# The tensors


def _check_order(places: Mapping[str, _Place], size: int) -> None:
    """The tensors lie end to end and fill the file: none overlaps another, none lies outside."""
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            raise ValueError(f"{_short(name)} overlaps another tensor or leaves a gap before it")
        end = place.end
    if end > size:
        raise ValueError(f"{size:,} of the {end:,} bytes of its tensors are there, so it is cut off")
    if end < size:
        raise ValueError(f"{size - end:,} bytes that belong to no tensor follow the others")


def _tensor(file: BinaryIO, place: _Place) -> Tensor:
    if place.start == place.end:
        return torch.empty(place.shape, dtype=place.dtype)
    data = bytearray(place.end - place.start)
    if file.readinto(data) != len(data):
        raise ValueError("it became shorter while it was read")
    return torch.frombuffer(data, dtype=place.dtype).reshape(place.shape)
