"""Captions as people have them: text files, JSON, tables, one text for a whole folder; in the encodings they use."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

from .dataset import lines_of

TABLE_SUFFIXES = (".jsonl", ".csv")
NAME_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description")
TAG_COLUMNS = ("tags",)
TEXT_SUFFIXES = (".txt", ".TXT", ".caption", ".json")


class Captions:
    """What there is to read about pictures: the first of these that says something.

    A `.txt`, `.caption` or `.json` file of the picture's name beside it; the rows of a table; `default.txt` in its
    folder. `tables` are `.jsonl` and `.csv` files with columns for the file name, the caption and the tags; the names
    are paths seen from the table's folder.
    """

    def __init__(self, tables: Iterable[Path]) -> None:
        self.notes: list[str] = []
        self._rows: dict[str, list[str]] = {}
        self._unused: dict[str, str] = {}
        self._defaults: dict[Path, list[str]] = {}
        for table in tables:
            self._read(table)

    def of(self, picture: Path) -> tuple[list[str], str]:
        """The captions of a picture, best first, none when nobody has described it; and a remark on how they came."""
        key = _key(picture)
        self._unused.pop(key, None)
        said, remark = _beside(picture)
        return said or self._rows.get(key) or self._default(picture.parent), remark

    def unused(self) -> list[str]:
        """A note when tables name pictures that were not asked for."""
        names = list(self._unused.values())
        return [f"{_counted(len(names), 'row')} of the tables name no picture here, e.g. {names[0]}."] if names else []

    def _default(self, folder: Path) -> list[str]:
        if folder not in self._defaults:
            said, _ = _read_safely(folder / "default.txt") if (folder / "default.txt").is_file() else ([], "")
            self._defaults[folder] = said
        return self._defaults[folder]

    def _read(self, table: Path) -> None:
        try:
            rows = list(_rows_of(table))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            self.notes.append(f"The table {table.name} is not read ({error}): correct it or remove it.")
            return
        for name, captions in rows:
            key = _key(table.parent / _inside(name))
            self._rows.setdefault(key, []).extend(captions)
            self._unused[key] = f"{name} in {table.name}"


def read_text(path: Path) -> tuple[str, bool]:
    """The text of a file in UTF-8, UTF-16 or else Windows-1252, and whether it was the last; OSError as `open`."""
    text, is_old = _decoded(path.read_bytes())
    return text.lstrip("\ufeff").replace("\r\n", "\n").strip(), is_old


def _beside(picture: Path) -> tuple[list[str], str]:
    """The captions of the first file of the picture's name that says something, and a remark."""
    remark = ""
    # An accent may be a character of its own, as a Mac writes it, or a part of the letter.
    stems = dict.fromkeys((picture.stem, *(unicodedata.normalize(form, picture.stem) for form in ("NFC", "NFD"))))
    for path in (picture.with_name(f"{stem}{suffix}") for stem in stems for suffix in TEXT_SUFFIXES):
        if path.is_file():
            said, remark = _read_safely(path)
            if said:
                return said, remark
    return [], remark


def _read_safely(path: Path) -> tuple[list[str], str]:
    """The captions in a file, and a remark where it could not be read as it should."""
    try:
        text, is_old = read_text(path)
        if path.suffix == ".json":
            return list(_captions_in(json.loads(text))), ""
    except OSError as error:
        return [], f"the caption file cannot be read ({error.strerror}), so it counts as without caption"
    except (ValueError, RecursionError):
        return [], "the caption file is not JSON, so it counts as without caption"
    said = lines_of(text)
    if is_old:
        return said, "the caption is neither UTF-8 nor UTF-16 and was read as Windows-1252"
    return said, "several lines in the caption file, each of which is a caption of its own" if said[1:] else ""


def _decoded(data: bytes) -> tuple[str, bool]:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace"), False
    if data.count(0) * 4 > len(data):  # UTF-16 without a mark: in Latin letters every second byte is zero
        order = "le" if data[1::2].count(0) >= data[::2].count(0) else "be"
        return data.decode(f"utf-16-{order}", errors="replace"), False
    try:
        return data.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), True


def _rows_of(table: Path) -> Iterator[tuple[str, list[str]]]:
    """(file name, captions) of each row that has both; ValueError when the table has no such columns."""
    text, _ = read_text(table)
    found = False
    for row in _json_rows(text) if table.suffix.lower() == ".jsonl" else _csv_rows(text):
        row = {str(column).strip().lower().replace(" ", "_"): value for column, value in row.items()}
        name = next((row[column] for column in NAME_COLUMNS if row.get(column)), None)
        found = found or (name is not None and not row.keys().isdisjoint(CAPTION_COLUMNS + TAG_COLUMNS))
        if isinstance(name, str) and (captions := list(_captions_in(row))):
            yield name, captions
    if not found:
        raise ValueError("it has no columns such as file_name and caption")


def _json_rows(text: str) -> Iterator[dict]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON") from error
            if isinstance(row, dict):
                yield row


def _csv_rows(text: str) -> Iterator[dict]:
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)  # of equal ones the first
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)


def _captions_in(said: object) -> Iterator[str]:
    """The captions in a JSON value: a text, a list of texts, or an object with a caption, tags or both."""
    if isinstance(said, str):
        said = [said]
    if isinstance(said, list):
        yield from filter(None, (" ".join(text.split()) for text in said if isinstance(text, str)))
    if isinstance(said, dict):
        captions = next((said[column] for column in CAPTION_COLUMNS if said.get(column)), "")
        tags = next((said[column] for column in TAG_COLUMNS if said.get(column)), "")
        listed = tags if isinstance(tags, str) else ", ".join(map(str, tags)) if isinstance(tags, (list, dict)) else ""
        for caption in list(_captions_in(captions)) or [""]:
            yield from _captions_in(", ".join(filter(None, (caption.rstrip(" .,") if listed else caption, listed))))


def _inside(name: str) -> Path:
    """A file name of a table as a path to look for below the table's folder; one from another place by its end."""
    path = PureWindowsPath(name)  # takes both separators apart, and knows drives
    return Path(path.name) if path.anchor else Path(*path.parts)


def _key(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
