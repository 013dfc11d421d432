"""A folder of pictures, with a text file beside each, as a Dataset."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .augmentation import Augmentation
from .images import image_size
from .wording import Wording

# What a picture is for: to learn from, to remember (class pictures), or to measure with.
TRAIN, REGULARIZATION, VALIDATION = "train", "regularization", "validation"

# HEIC is listed so that phone pictures which cannot be read are named instead of passed over.
PICTURE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"]
)


@dataclass(frozen=True)
class Example:
    """One picture file and the caption it is trained with."""

    path: Path
    caption: str
    width: int
    height: int
    repeats: int = 1
    variants: tuple[str, ...] = ()  # further captions of the same picture, the trigger word in them
    mask: Path | None = None  # a grey picture, white = learn this; the picture itself when its alpha channel says so
    trigger_word: str = ""  # of its concept
    class_words: str = ""  # what it is, e.g. "zork star" of the kohya folder "10_zork star"
    weight: float = 1.0  # factor on its loss
    role: str = TRAIN  # TRAIN or REGULARIZATION


@dataclass(frozen=True)
class Dataset:
    """The pictures of a folder, to train on and held out for validation; `notes` says in sentences what is odd."""

    folder: Path
    examples: tuple[Example, ...]
    held_out: tuple[Example, ...] = ()
    trigger_word: str = ""
    resolution: int = 1024
    notes: tuple[str, ...] = ()
    uncaptioned: tuple[Path, ...] = ()  # pictures nobody has described yet
    resolutions: tuple[int, ...] = ()  # all sizes to train at; () = (resolution,)
    background: str = "white"  # what shows through transparent parts
    largest_enlargement: float = 0.0  # never scale a picture up beyond this factor; 0 = no limit
    wording: Wording = Wording()
    augmentation: Augmentation = Augmentation()


def scan(
    folder: Path, *, trigger_word: str = "", resolution: int = 1024, hold_out: int | None = None, repeats: int = 1
) -> Dataset:
    """The pictures of `folder` and of its kohya sub-folders `N_name`, whose pictures are repeated N times as often.

    Pictures that cannot be read become notes. `hold_out` of them, chosen by file name, are kept from training; None
    means none of fewer than 10 pictures and up to 8 of many. Raises FileNotFoundError when there is no such folder,
    ValueError when nothing in it can be trained on.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    folder, trigger_word = Path(folder).absolute(), trigger_word.strip()
    examples, uncaptioned, notes = [], [], list(_folder_notes(folder))
    for path, times in _pictures(folder):
        try:
            width, height = image_size(path)
        except ValueError as error:
            notes.append(f"Left out: {error}")
            continue
        caption, trouble = _caption_beside(path)
        notes.extend(trouble)
        if not caption:
            uncaptioned.append(path)
        examples.append(Example(path, insert_trigger(caption, trigger_word), width, height, times * repeats))
    if not examples:
        raise ValueError(f"None of the pictures in {folder} can be read, e.g. {notes[-1].removeprefix('Left out: ')}")
    notes += _size_notes(examples, resolution)
    train, kept = _split(examples, _hold_out_count(len(examples), hold_out))
    dataset = Dataset(folder, train, kept, trigger_word, resolution, tuple(notes), tuple(uncaptioned))
    return replace(dataset, notes=dataset.notes + _caption_notes(dataset))


def insert_trigger(caption: str, trigger: str) -> str:
    """The caption with `trigger` put first, unless it is there as a whole word in any case; otherwise verbatim."""
    trigger = trigger.strip()
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption.strip() else trigger


def with_captions(dataset: Dataset, captions: Mapping[Path, str]) -> Dataset:
    """The dataset with new captions for the pictures in `captions`, the trigger word inserted where it is absent."""

    def recaptioned(example: Example) -> Example:
        if example.path not in captions:
            return example
        return replace(example, caption=insert_trigger(captions[example.path].strip(), dataset.trigger_word))

    emptied = tuple(e.path for e in dataset.examples + dataset.held_out if not captions.get(e.path, "kept").strip())
    changed = replace(
        dataset,
        examples=tuple(map(recaptioned, dataset.examples)),
        held_out=tuple(map(recaptioned, dataset.held_out)),
        uncaptioned=tuple(path for path in dataset.uncaptioned if path not in captions) + emptied,
    )
    stale = _caption_notes(dataset)
    return replace(changed, notes=tuple(n for n in dataset.notes if n not in stale) + _caption_notes(changed))


def read_caption(path: Path) -> str:
    """The text of a caption file in UTF-8, UTF-16 or Windows-1252, verbatim but for blanks around it."""
    return _decoded(path.read_bytes()).lstrip("\ufeff").replace("\r\n", "\n").strip()


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """A sort key that puts `2.png` before `10.png`."""
    parts = re.findall(r"\d+|\D+", text.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    if data.count(0) * 4 > len(data):  # UTF-16 without a mark: in Latin letters every second byte is zero
        return data.decode("utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _pictures(folder: Path) -> list[tuple[Path, int]]:
    """(path, repeats) of every picture file in natural order; raises when there is no folder or no picture."""
    if not folder.exists():
        raise FileNotFoundError(f"The folder {folder} does not exist: check the path for typing errors.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder it lies in.")
    found = [(path, times) for source, times in _sources(folder) for path in _visible(source) if _is_picture(path)]
    if not found:
        raise ValueError(f"The folder {folder} has no pictures: put files such as .png, .jpg or .webp into it.")
    return sorted(found, key=lambda item: (natural_key(item[0].relative_to(folder).as_posix()), item[0]))


def _sources(folder: Path) -> Iterator[tuple[Path, int]]:
    yield folder, 1
    for path in _visible(folder):
        if path.is_dir() and _kohya_repeats(path.name):
            yield path, _kohya_repeats(path.name)


def _kohya_repeats(name: str) -> int:
    """The N of a folder called `N_name`, or 0."""
    match = re.match(r"(\d{1,6})_", name, re.ASCII)
    return int(match[1]) if match else 0


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


def _caption_beside(picture: Path) -> tuple[str, list[str]]:
    """The caption of a picture, "" when there is none, and a note when its file cannot be read."""
    path = next((p for p in (picture.with_suffix(".txt"), picture.with_suffix(".TXT")) if p.is_file()), None)
    if path is None:
        return "", []
    try:
        return read_caption(path), []
    except OSError as error:
        return "", [
            f"The caption file {path.name} cannot be read ({error.strerror}): its picture counts as without caption."
        ]


def _hold_out_count(count: int, wanted: int | None) -> int:
    if wanted is None:
        return min(8, count // 10) if count >= 40 else 4 if count >= 20 else 2 if count >= 10 else 0
    if not 0 <= wanted < count:
        raise ValueError(
            f"hold_out must lie between 0 and {count - 1} for a folder with {count} pictures, got {wanted}."
        )
    return wanted


def _split(examples: Sequence[Example], count: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(to train on, held out): the smallest name hashes are held out, so that new files rarely change the choice."""
    ranked = sorted(examples, key=lambda e: (hashlib.sha256(os.fsencode(e.path.name)).digest(), e.path))
    chosen = {example.path for example in ranked[:count]}
    return tuple(e for e in examples if e.path not in chosen), tuple(e for e in examples if e.path in chosen)


def _folder_notes(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        return
    for path in _visible(folder):
        if path.is_dir() and not _kohya_repeats(path.name) and any(map(_is_picture, _visible(path))):
            yield f"The sub-folder {path.name} is not read: call it 1_{path.name} to train on its pictures too."


def _size_notes(examples: Sequence[Example], resolution: int) -> list[str]:
    small = [e for e in examples if e.width * e.height < resolution**2]
    if not small:
        return []
    first = f"{small[0].path.name} ({small[0].width} x {small[0].height})"
    return [
        f"{_of_all(small, examples)} smaller than {resolution} x {resolution}, e.g. {first}: "
        "they are enlarged, which can teach blur."
    ]


def _caption_notes(dataset: Dataset) -> tuple[str, ...]:
    if not dataset.uncaptioned:
        return ()
    instead = "the trigger word alone is used" if dataset.trigger_word else "no text at all is used"
    counted = _of_all(dataset.uncaptioned, dataset.examples + dataset.held_out, "have", "has")
    return (f"{counted} no caption, e.g. {dataset.uncaptioned[0].name}: {instead}.",)


def _of_all(some: Sequence, everything: Sequence, many: str = "are", one: str = "is") -> str:
    return f"{len(some)} of {len(everything)} pictures {one if len(some) == 1 else many}"
