"""Which file a name means, written with either separator, with or without its folder and its ending."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath

CLOSE, MOST = 0.6, 3
ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Found:
    """The file that a name means, as the list has it ("" when there is none), and what to say about it, if anything."""

    name: str
    note: str = ""


def found(name: str, names: Sequence[str]) -> Found:
    """The file so called, else the only one of that file name in any folder: it has been moved, or no folder was named.

    ValueError for a name that leaves the loras folder.
    """
    if leaves_the_folder(name):
        raise ValueError(f"'{name}' is not the name of a LoRA file. Choose one from the list of the loras folder.")
    if name in names:
        return Found(name)
    asked = _plain(name)
    if alike := [listed for listed in names if asked in _spellings(_plain(listed))]:
        return Found(alike[0])
    moved = [listed for listed in names if _file(asked) in _spellings(_file(_plain(listed)))]
    if len(moved) == 1:
        named_a_file = "/" in asked or asked.endswith(ENDINGS)
        return Found(moved[0], f"'{name}' was found as '{moved[0]}'" if named_a_file else "")
    return Found("", missing(name, moved or closest(asked, names)))


def leaves_the_folder(name: str) -> bool:
    """Whether a name from a workflow could lead out of the folder it is looked up in."""
    path = PureWindowsPath(name)  # takes both separators apart, and knows drives
    return bool(path.anchor) or ".." in path.parts or "\0" in name


def missing(name: str, others: Sequence[str]) -> str:
    """What is said of a LoRA that is not there, with the names that come near."""
    such = f", such as {' or '.join(repr(other) for other in others[:MOST])}" if others else ""
    return f"The LoRA '{name}' is not in the loras folder. Put the file back, or choose another one{such}."


def closest(asked: str, names: Sequence[str]) -> list[str]:
    """The names whose files are called most like the one that was asked for, best first."""
    files: dict[str, str] = {}
    for name in names:
        files.setdefault(_stem(_file(_plain(name))), name)
    like = difflib.get_close_matches(_stem(_file(asked)), files, MOST, CLOSE)
    return [files[file] for file in like]


def _plain(name: str) -> str:
    return name.replace("\\", "/").lower()


def _file(name: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def _spellings(name: str) -> tuple[str, str]:
    return name, _stem(name)
