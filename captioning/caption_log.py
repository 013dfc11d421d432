"""Who wrote which caption file: ``.caption_log.json`` in the folder of the files."""

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .caption_file import write_whole

LOG_NAME = ".caption_log.json"
MISSING, AUTOMATIC, YOURS, REVIEWED = "missing", "automatic", "yours", "reviewed"
_one_writer = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """A caption file as it was last written here: its text's hash, whose it is, and who wrote it with what settings."""

    hash: str
    state: str = YOURS
    by: str = ""


def read_log(folder: Path) -> dict[str, Entry]:
    """The entries by file name; what cannot be read or understood is left out, so that its captions count as yours."""
    try:
        content = json.loads((folder / LOG_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: entry for name, value in entries if (entry := entry_of(value))}


def entry_of(value: object) -> Entry | None:
    """An entry out of JSON; None when it is none."""
    fields = [value.get(name) for name in ("hash", "state", "by")] if isinstance(value, dict) else [None]
    if not all(isinstance(field, str) for field in fields) or fields[1] not in (AUTOMATIC, YOURS, REVIEWED):
        return None
    return Entry(*fields)


def update_log(folder: Path, changes: Mapping[str, Entry | None]) -> None:
    """Write these entries and keep the others; None takes an entry out."""
    with _one_writer:
        entries = {**read_log(folder), **changes}
        content = {name: asdict(entry) for name, entry in sorted(entries.items()) if entry}
        write_whole(folder / LOG_NAME, json.dumps(content, ensure_ascii=False, indent=0).encode())
