"""The LoRA files that a node reads to make another of, and how their sizes are said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from comfy_api.latest import io

from ..lora_files.layers import EXACT
from ..lora_files.opening import LoraFile, finite, open_lora
from .host import folders
from .lora_rows import NONE, is_none

BROADEST = (torch.float32, torch.bfloat16, torch.float16)
"""What numbers are written as where files differ, or keep them in fewer bits than a LoRA can be computed in."""


def lora_inputs(tooltip: str) -> list:
    """The two inputs of a node that reads one LoRA: its choice among the files, and a name from another node."""
    return [
        io.Combo.Input("lora", options=[NONE, *folders.lora_names()], tooltip=tooltip),
        io.String.Input(
            "lora_name",
            optional=True,
            force_input=True,
            tooltip="The name of a LoRA from another node. Where one is wired, it is taken instead of lora.",
        ),
    ]


def source(name: str) -> LoraFile:
    """The LoRA file of that name, whole and with finite values alone; ValueError saying what is wrong with it."""
    file = open_lora(folders.lora_path(name))
    finite(file)
    return file


def lora_problem(lora: str | None) -> bool | str:
    """What `validate_inputs` answers about a LoRA: True, also written as on another system, or why there is none.

    None comes from a wire.
    """
    try:
        return lora is None or is_none(lora) or bool(folders.lora_path(lora))
    except ValueError as error:
        return str(error)


def chosen_name(lora: str, lora_name: str | None) -> str:
    """The name that a node was given by a wire, else that of its widget; ValueError without either."""
    name = lora_name if lora_name and lora_name.strip() else lora
    if is_none(name):
        raise ValueError("No LoRA is chosen: choose one from the list, or connect lora_name.")
    return name


def chosen(lora: str, lora_name: str | None) -> LoraFile:
    """The LoRA file of the chosen name, as `source` reads it."""
    return source(chosen_name(lora, lora_name))


def state_of(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of the files, so that ComfyUI notices another file of the same name."""
    state = []
    for name in names:
        try:
            about = folders.lora_path(name).stat()
            state.append((name, about.st_size, about.st_mtime_ns))
        except (OSError, ValueError):
            state.append((name, 0, 0))
    return state


def precision_of(files: Sequence[LoraFile]) -> torch.dtype:
    """The precision that the files share, else float32; that of 8-bit files is float16."""
    found = {
        tensor.dtype
        for file in files
        for name, tensor in file.tensors.items()
        if tensor.is_floating_point() and not EXACT.search(name)
    }
    found = {torch.float16 if dtype.itemsize == 1 else dtype for dtype in found}
    return found.pop() if len(found) == 1 and found <= set(BROADEST) else torch.float32


def size_of(path: Path) -> str:
    """A file's size in words."""
    size = path.stat().st_size
    for unit, length in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= length:
            value = size / length
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{size} bytes"


def percent(share: float) -> str:
    """A share in words; only what is whole is 100 %."""
    return "100 %" if share > 1 - 1e-6 else f"{min(100 * share, 99.99):.{2 if share > 0.999 else 1}f} %"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Ranks of layers: the one they share, or the lowest and the highest."""
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
