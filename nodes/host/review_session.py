"""One dataset folder that is open for review: its pictures, their captions, and every change to them."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...captioning.caption_file import caption_path, read_caption, text_of, tidy
from ...captioning.caption_log import MISSING, REVIEWED, YOURS, Entry, read_log, update_log
from ...captioning.find_replace import replace_in
from ...captioning.sidecar import BACKUPS_NAME, CaptionStore, backups, undo
from ...training.caption_sources import Captions
from ...training.dataset import insert_trigger, lines_of
from ...training.images import open_image
from ...training.listing import PICTURE_SUFFIXES, Source, pictures_of, sources_of
from .tokens import TokenCounter

MOST_PICTURES = 5000


class NotInDataset(ValueError):
    """A name that is no picture of the open folder."""


class CaptionChanged(ValueError):
    """The caption is not what the reviewer saw; `picture` is what it is now."""

    def __init__(self, picture: dict[str, Any]) -> None:
        super().__init__(f"The caption of {picture['name']} was changed meanwhile. Save again to keep yours instead.")
        self.picture = picture


@dataclass(frozen=True)
class _Contents:
    """What is in the folder at one moment."""

    pictures: dict[str, tuple[Path, Source]]  # by name; all, or the one that was asked for
    folders: list[Path]  # that hold pictures
    captions: Captions
    count: int  # of all pictures, with those that are too many to show

    def caption(self, path: Path) -> str:
        """The caption of a picture: what its own file says, else a table or the default of its folder."""
        return read_caption(path) or "\n".join(self.captions.of(path)[0])


@dataclass(frozen=True)
class _Mark:
    """A caption that was marked as reviewed, and its entry of before: a change of the log alone."""

    stamp: str
    caption_file: Path
    before: Entry | None


class Session:
    """The review of one folder. Names are relative to it, with forward slashes; nothing outside it is ever reached.

    `sub_folders` are read as LoRA Dataset Loader does. Raises FileNotFoundError or ValueError in one sentence when
    there is no such folder, or no picture in it.
    """

    def __init__(self, folder: Path, trigger_word: str, sub_folders: str, count: TokenCounter) -> None:
        self.folder = folder.resolve()
        self._trigger_word, self._sub_folders, self._count = trigger_word.strip(), sub_folders, count
        self._marks: list[_Mark] = []
        self._one_change = threading.Lock()
        self._contents()

    def listing(self) -> dict[str, Any]:
        """Every picture with its caption, the limit of tokens, whether there is a change to undo, and a note if any."""
        contents, store = self._contents(), CaptionStore()
        shown = [self._picture(name, contents, store) for name in contents.pictures]
        left_out = contents.count - len(shown)
        note = f"{left_out} of {contents.count} pictures are not shown here." if left_out else ""
        return {"pictures": shown, "limit": self._count.limit, "undo": self._can_undo(contents), "note": note}

    def read(self, name: str) -> dict[str, Any]:
        """One picture as in `listing`, with the caption that was in its file before the last change to it."""
        path = self.path_of(name)
        return {**self._picture(name, self._contents(path), CaptionStore()), "previous": _previous(path)}

    def tokens(self, name: str, caption: str) -> int:
        """How many tokens the picture would have with this caption, trained with its trigger word in it."""
        return self._tokens(caption, self._source(name, self._contents(self.path_of(name))))

    def thumbnail(self, name: str, side: int) -> bytes:
        """A JPEG file of the upright picture, at most `side` pixels wide and high."""
        picture, file = open_image(self.path_of(name)), io.BytesIO()
        picture.thumbnail((side, side))
        picture.save(file, "JPEG", quality=85)
        return file.getvalue()

    def save(self, name: str, caption: str, seen: str, reviewed: bool) -> dict[str, Any]:
        """Write a caption, as reviewed on request; raises CaptionChanged when what there is is not what was `seen`."""
        with self._one_change:
            path = self.path_of(name)
            contents = self._contents(path)
            if contents.caption(path) != seen:
                raise CaptionChanged(self.read(name))
            if tidy(caption) != read_caption(path) and (reviewed or tidy(caption) != seen):
                with CaptionStore() as store:
                    store.write(path, caption, state=REVIEWED if reviewed else YOURS)
            elif reviewed:
                self._mark_reviewed(path)
            return {"picture": self._picture(name, contents, CaptionStore()), "undo": self._can_undo(contents)}

    def replace(self, find: str, replacement: str, *, preview: bool, **how: bool) -> dict[str, Any]:
        """Find and replace in every caption, or only say what that would change; no caption becomes empty.

        `how` is that of `replace_in`.
        """
        with self._one_change:
            contents, changes, emptied = self._contents(), [], []
            for name, (path, _) in contents.pictures.items():
                before = contents.caption(path)
                after = replace_in(before, find, replacement, **how)
                if not tidy(after) and before:
                    emptied.append(name)
                elif after != before:
                    changes.append({"name": name, "before": before, "after": tidy(after)})
            if preview:
                return {"changes": changes, "emptied": emptied}
            with CaptionStore() as store:
                for change in changes:
                    store.write(contents.pictures[change["name"]][0], change["after"], state=YOURS)
            pictures = [self._picture(change["name"], contents, store) for change in changes]
            return {"changes": changes, "emptied": emptied, "pictures": pictures, "undo": self._can_undo(contents)}

    def undo(self) -> dict[str, Any]:
        """Take back the newest change of captions in this folder, made here or by LoRA Auto-Captioner."""
        with self._one_change:
            contents = self._contents()
            if self._marks and [self._marks[-1].stamp] > backups(contents.folders)[:1]:
                mark, kept = self._marks.pop(), []
                update_log(mark.caption_file.parent, {mark.caption_file.name: mark.before})
                restored = [mark.caption_file]
            else:
                restored, kept = undo(contents.folders)
            stems, store = {file.with_suffix("") for file in restored}, CaptionStore()
            names = [name for name, (path, _) in contents.pictures.items() if path.with_suffix("") in stems]
            pictures = [self._picture(name, contents, store) for name in names]
            return {"pictures": pictures, "kept": [file.name for file in kept], "undo": self._can_undo(contents)}

    def path_of(self, name: str) -> Path:
        """The picture of that name; NotInDataset for anything that is not a picture inside the folder."""
        path = self.folder / name
        if not self._is_own(path):
            raise NotInDataset(f"'{name[:100]}' is no picture of the open folder.")
        return path

    def _is_own(self, path: Path) -> bool:
        """Whether this is a picture in the folder, not hidden, and neither it nor a caption of it leads elsewhere."""
        try:
            captions = (caption_path(path), path.with_suffix(".json"), path.parent / "default.txt")
            hidden = any(part.startswith(".") for part in path.relative_to(self.folder).parts)
            is_picture = path.resolve().suffix.lower() in PICTURE_SUFFIXES and path.is_file()
            return is_picture and not hidden and all(map(self._is_inside, (path, *captions)))
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # no path at all, outside the folder, or a link that goes in circles
            return False

    def _is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder)

    def _contents(self, only: Path | None = None) -> _Contents:
        sources = sources_of(self.folder, self._sub_folders, self._trigger_word, True)
        found = pictures_of(self.folder, sources, self._sub_folders)
        wanted = [item for item in found if item[0] == only] if only else found[:MOST_PICTURES]
        own = [(path, source) for path, source in wanted if self._is_own(path)]
        tables = [table for source in sources for table in source.tables if self._is_inside(table)]
        pictures = {path.relative_to(self.folder).as_posix(): (path, source) for path, source in own}
        folders = [folder for folder in sorted({path.parent for path, _ in found}) if self._is_inside(folder)]
        return _Contents(pictures, folders, Captions(tables), len(found))

    def _source(self, name: str, contents: _Contents) -> Source:
        if name not in contents.pictures:
            raise NotInDataset(f"'{name[:100]}' is not among the pictures of the open folder.")
        return contents.pictures[name][1]

    def _picture(self, name: str, contents: _Contents, store: CaptionStore) -> dict[str, Any]:
        source = self._source(name, contents)
        path = contents.pictures[name][0]
        caption, state, file = contents.caption(path), store.state(path), path.stat()
        return {
            "name": name,
            "caption": caption,
            "state": YOURS if state == MISSING and caption else state,
            "tokens": self._tokens(caption, source),
            "version": f"{file.st_mtime_ns}-{file.st_size}",
        }

    def _tokens(self, caption: str, source: Source) -> int:
        """The tokens of the longest line, each of which is a caption of its own."""
        return max(self._count(insert_trigger(line, source.trigger_word)) for line in lines_of(caption) or [""])

    def _mark_reviewed(self, path: Path) -> None:
        file = caption_path(path)
        stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S.%fZ")  # sorted with those of CaptionStore
        with CaptionStore() as store:
            self._marks.append(_Mark(stamp, file, read_log(file.parent).get(file.name)))
            store.mark_reviewed(path)

    def _can_undo(self, contents: _Contents) -> bool:
        return bool(self._marks or backups(contents.folders))


def _previous(path: Path) -> str:
    """What was in the caption file of a picture before its last change; "" when nothing was."""
    file = caption_path(path)
    kept = [folder / file.name for folder in sorted((file.parent / BACKUPS_NAME).glob("*"))]
    last = next((backup for backup in reversed(kept) if backup.is_file()), None)
    return text_of(last.read_bytes()) if last else ""
