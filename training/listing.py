"""Which files of a folder and its sub-folders are pictures, masks and tables of captions."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from . import masks
from .caption_sources import TABLE_SUFFIXES
from .dataset import natural_key

# HEIC is listed so that phone pictures which cannot be read are named instead of passed over.
PICTURE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"]
)

# Which sub-folders belong to a dataset, and how.
KOHYA, ALL, CONCEPTS = "named 10_name", "all", "each a concept"
SUB_FOLDERS = (KOHYA, ALL, CONCEPTS)


@dataclass(frozen=True)
class Source:
    """The files of one folder, and what its pictures have in common."""

    pictures: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    masks: dict[str, Path] = field(default_factory=dict)
    repeats: int = 1
    trigger_word: str = ""
    class_words: str = ""

    @property
    def lone_masks(self) -> list[Path]:
        """The masks whose picture is not there."""
        stems = set(map(masks.key_of, self.pictures))
        return [path for stem, path in sorted(self.masks.items()) if stem not in stems]


def sources_of(folder: Path, sub_folders: str, trigger_word: str, named: bool) -> list[Source]:
    """The folder itself and the sub-folders that are read; raises when there is no folder.

    Unless `named`, a sub-folder that is a concept does not make its name a trigger word.
    """
    if not folder.exists():
        raise FileNotFoundError(f"The folder {folder} does not exist: check the path for typing errors.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder it lies in.")
    sources = [_listed(folder, trigger_word=trigger_word)]
    for path in _sub_folders(folder):
        times, words = _kohya_name(path.name)
        if sub_folders == CONCEPTS:
            name = words or path.name
            sources.append(_listed(path, max(times, 1), name if named else "", name))
        elif times or sub_folders == ALL:
            sources.append(_listed(path, max(times, 1), trigger_word, words))
    return sources


def _listed(folder: Path, repeats: int = 1, trigger_word: str = "", class_words: str = "") -> Source:
    source = Source(repeats=repeats, trigger_word=trigger_word, class_words=class_words)
    mask_files = []
    for path in _files(folder):
        if path.suffix.lower() in TABLE_SUFFIXES:
            source.tables.append(path)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            (mask_files if masks.is_mask(path) else source.pictures).append(path)
    for place in filter(masks.is_folder, _folders(folder)):
        mask_files += (path for path in _files(place) if path.suffix.lower() in PICTURE_SUFFIXES)
    return replace(source, masks=masks.by_picture(mask_files))


def pictures_of(folder: Path, sources: Sequence[Source], sub_folders: str) -> list[tuple[Path, Source]]:
    """Every picture with its source, in natural order; raises when there is none."""
    found = [(path, source) for source in sources for path in source.pictures]
    if not found:
        raise ValueError(f"The folder {folder} has no pictures: {_what_to_do(folder, sub_folders)}")
    return sorted(found, key=lambda item: (natural_key(item[0].relative_to(folder).as_posix()), item[0]))


def _what_to_do(folder: Path, sub_folders: str) -> str:
    others = _with_pictures(folder, sub_folders)
    if others:
        return f"its sub-folder {others[0].name} has some, so give that folder, or set sub_folders to '{ALL}'."
    return "put files such as .png, .jpg or .webp into it."


def unread_notes(folder: Path, sub_folders: str) -> list[str]:
    others = _with_pictures(folder, sub_folders)
    if not others:
        return []
    first, more = others[0].name, f" and {len(others) - 1} more" if others[1:] else ""
    return [
        f"The sub-folder {first}{more} is not read: "
        f"call it 1_{first}, or set sub_folders to '{ALL}', to train on its pictures too."
    ]


def _with_pictures(folder: Path, sub_folders: str) -> list[Path]:
    """The sub-folders that are not read although they hold pictures, in order."""
    others = [path for path in _sub_folders(folder) if sub_folders == KOHYA and not _kohya_name(path.name)[0]]
    return [path for path in others if any(p.suffix.lower() in PICTURE_SUFFIXES for p in islice(_files(path), 1000))]


def _sub_folders(folder: Path) -> list[Path]:
    """The sub-folders that are not hidden and hold no masks, in order."""
    return [path for path in _folders(folder) if not masks.is_folder(path)]


def _folders(folder: Path) -> list[Path]:
    """The sub-folders that are not hidden, in order."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and _leads_to(entry.is_dir)]
    return [folder / name for name in sorted(names, key=natural_key)]


def _files(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and _leads_to(entry.is_file):
                yield folder / entry.name


def _leads_to(kind: Callable[[], bool]) -> bool:
    """The answer of an entry's `is_file` or `is_dir`; False for a link that goes in circles."""
    try:
        return kind()
    except OSError:
        return False


def _kohya_name(name: str) -> tuple[int, str]:
    """(N, the words) of a folder called `N_words`, or (0, "")."""
    match = re.match(r"(\d{1,6})_(.*)", name, re.ASCII | re.DOTALL)
    return (int(match[1]), match[2].strip()) if match else (0, "")
