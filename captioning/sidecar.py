"""The caption files of a dataset: whose they are, what they were before, and back again."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from .caption_file import caption_path, hash_of, read_caption, text_of, tidy, write_caption, write_whole
from .caption_log import MISSING, REVIEWED, YOURS, Entry, entry_of, read_log, update_log

BACKUPS_NAME = ".caption_backups"
CHANGES_NAME = "changes.jsonl"
SECONDS_BETWEEN_SAVES = 1.0


class CaptionStore:
    """Reads and writes caption files, remembers whose each is, and backs it up before its first change.

    A caption is automatic as long as its text is the one that was written here; edited by anyone else it is yours.
    One store is one change that `undo` takes back: a captioning run, or one edit. Use it as a context, or call
    `save` at the end.
    """

    def __init__(self) -> None:
        self.stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
        self._logs: dict[Path, dict[str, Entry]] = {}
        self._changes: dict[Path, dict[str, Entry | None]] = {}
        self._backed_up: set[Path] = set()
        self._saved = time.monotonic()

    def __enter__(self) -> "CaptionStore":
        return self

    def __exit__(self, *_) -> None:
        self.save()

    def state(self, image: Path) -> str:
        """MISSING, AUTOMATIC, YOURS or REVIEWED; raises OSError when the caption file cannot be read."""
        caption = read_caption(image)
        if not caption:
            return MISSING
        entry = self._entry(caption_path(image))
        return entry.state if entry and entry.hash == hash_of(caption) else YOURS

    def written_by(self, image: Path) -> str:
        """The `by` of the caption as it stands; "" when it is somebody else's."""
        entry = self._entry(caption_path(image))
        return entry.by if entry and entry.hash == hash_of(read_caption(image)) else ""

    def write(self, image: Path, caption: str, *, state: str = YOURS, by: str = "") -> None:
        """Put the caption beside the image, the file of before kept in the backup; an empty one is a ValueError.

        A file that says the same already is left as it is.
        """
        caption, path = tidy(caption), caption_path(image)
        if not caption or caption != read_caption(image):
            if caption:
                self._back_up(path, hash_of(caption))
            write_caption(image, caption)
        self._note(path, Entry(hash_of(caption), state, by))

    def mark_reviewed(self, image: Path) -> None:
        """Remember that somebody read the caption and found it good; nothing happens where there is none."""
        if caption := read_caption(image):
            self._note(caption_path(image), Entry(hash_of(caption), REVIEWED, self.written_by(image)))

    def save(self) -> None:
        """Write down whose the captions are; those of a run that was killed before count as yours."""
        for folder, changes in self._changes.items():
            update_log(folder, changes)
        self._changes, self._saved = {}, time.monotonic()

    def _entry(self, path: Path) -> Entry | None:
        if path.parent not in self._logs:
            self._logs[path.parent] = read_log(path.parent)
        return self._logs[path.parent].get(path.name)

    def _note(self, path: Path, entry: Entry) -> None:
        self._entry(path)
        self._logs[path.parent][path.name] = entry
        self._changes.setdefault(path.parent, {})[path.name] = entry
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def _back_up(self, path: Path, new: str) -> None:
        """Before a change: keep the file, and note what is about to be written; a file is only kept once."""
        backup = path.parent / BACKUPS_NAME / self.stamp
        backup.mkdir(parents=True, exist_ok=True)
        change = _Change(path.name, new)
        if path not in self._backed_up:
            existed = path.is_file()
            if existed:
                write_whole(backup / path.name, path.read_bytes())
            change = replace(change, first=True, existed=existed, before=self._entry(path))
        with (backup / CHANGES_NAME).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(asdict(change), ensure_ascii=False) + "\n")
        self._backed_up.add(path)


@dataclass(frozen=True)
class _Change:
    """One line of a backup: the hash of what was written to a file and, the first time, what there was before."""

    name: str
    wrote: str
    first: bool = False
    existed: bool = False
    before: Entry | None = None


def backups(folders: Iterable[Path]) -> list[str]:
    """The stamps of all changes in these folders that can be undone, newest first."""
    found = {path.parent.name for folder in folders for path in folder.glob(f"{BACKUPS_NAME}/*/{CHANGES_NAME}")}
    return sorted(found, reverse=True)


def undo(folders: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Take the newest change in these folders back: (files as they were before, files kept since edited later).

    The backup itself is renamed, never deleted, so that the next undo takes back the change before.
    """
    folders = list(folders)
    restored: list[Path] = []
    kept: list[Path] = []
    for stamp in backups(folders)[:1]:
        for folder in folders:
            if (folder / BACKUPS_NAME / stamp / CHANGES_NAME).is_file():
                _restore(folder, folder / BACKUPS_NAME / stamp, restored, kept)
    return restored, kept


def _restore(folder: Path, backup: Path, restored: list[Path], kept: list[Path]) -> None:
    entries: dict[str, Entry | None] = {}
    for change in _changes_in(backup):
        path = folder / change.name
        now = hash_of(text_of(path.read_bytes())) if path.is_file() else ""
        if now != change.wrote:
            kept.append(path)
            continue
        if change.existed:
            write_whole(path, (backup / change.name).read_bytes())
        else:
            path.unlink()
        entries[change.name] = change.before
        restored.append(path)
    update_log(folder, entries)
    (backup / CHANGES_NAME).replace(backup / f"undone_{CHANGES_NAME}")


def _changes_in(backup: Path) -> list[_Change]:
    """One change a file: what there was before the first, and what the last one wrote."""
    changes: dict[str, _Change] = {}
    for line in (backup / CHANGES_NAME).read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
            change = _Change(**{**value, "before": entry_of(value["before"])})
        except (ValueError, TypeError, KeyError):
            continue  # a line cut short by a crash, before its file was touched
        if Path(change.name).name != change.name:
            continue
        first = changes.get(change.name, change)
        changes[change.name] = replace(first, wrote=change.wrote)
    return [change for change in changes.values() if change.first]
