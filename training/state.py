"""The state from which a run goes on, bit for bit: `state.safetensors`, and the one before it.

A new state replaces the old one only when it is whole on the disk, and the old one is kept until the next. When the
newest is damaged, by a disk or a hand, the one before it is used.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .loop import Snapshot
from .whole_file import checksummed, read_checksummed, write_keeping

NEWEST, PREVIOUS, DAMAGED = "state.safetensors", "state.previous.safetensors", "state.damaged.safetensors"
PARTS = ("weights", "optimizer", "ema", "losses")


def write(folder: Path, snapshot: Snapshot, slowdown: float = 1.0) -> None:
    """Keep a snapshot as the newest state; whatever stops this, one whole state is left."""
    tensors = {f"{part}/{name}": tensor for part in PARTS for name, tensor in (getattr(snapshot, part) or {}).items()}
    entries = {"step": str(snapshot.step), "slowdown": str(slowdown)}
    write_keeping(folder / NEWEST, checksummed(tensors, entries), folder / PREVIOUS)


def read(folder: Path) -> tuple[Snapshot, float, bool] | None:
    """The newest state that is whole, its slowdown, and whether a damaged newer one was set aside for it.

    None when there is no state; ValueError when there are only damaged ones.
    """
    problem = ""
    for path in _files(folder):
        try:
            snapshot, slowdown = _snapshot(path)
        except ValueError as error:
            problem = problem or f"The state '{path}' cannot be read ({error}): set resume to 'start over'."
            continue
        if problem:
            os.replace(folder / NEWEST, folder / DAMAGED)
        return snapshot, slowdown, bool(problem)
    if problem:
        raise ValueError(problem)
    return None


def read_before(folder: Path, step: int) -> Snapshot | None:
    """The state that was kept before the one of a step; None when there is none that is older and whole."""
    try:
        snapshot, _ = _snapshot(folder / PREVIOUS)
    except ValueError:
        return None
    return snapshot if snapshot.step < step else None


def is_there(folder: Path) -> bool:
    """Whether there is a state, whole or damaged."""
    return bool(_files(folder))


def step_of(folder: Path) -> int | None:
    """After which step the newest state with a readable header is; None when there is none."""
    for path in _files(folder):
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return int(header["__metadata__"]["step"])
        except (ValueError, KeyError, TypeError, MemoryError, OverflowError):
            continue
    return None


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / NEWEST, folder / PREVIOUS) if path.is_file()]


def _snapshot(path: Path) -> tuple[Snapshot, float]:
    tensors, entries = read_checksummed(path)
    parts: dict[str, dict] = {part: {} for part in PARTS}
    try:
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        kept = (parts[part] or None for part in ("ema", "losses"))
        snapshot = Snapshot(int(entries["step"]), parts["weights"], parts["optimizer"], *kept)
        return snapshot, float(entries["slowdown"])
    except KeyError as error:
        raise ValueError(f"another version of LoRA Workbench wrote it, {error} is not as it is here") from error
