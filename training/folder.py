"""A folder of pictures, with captions and masks in and beside it, as a Dataset."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from . import masks
from .buckets import size_notes
from .caption_sources import Captions
from .dataset import (
    REGULARIZATION,
    ROLES,
    TRAIN,
    VALIDATION,
    Dataset,
    Example,
    caption_notes,
    insert_trigger,
    triggers_of,
)
from .images import look_at
from .listing import KOHYA, SUB_FOLDERS, Source, pictures_of, sources_of, unread_notes
from .split import hold_out_count, split

MOST_REPEATS, MOST_IN_EPOCH = 1000, 2_000_000
"""With more repeats a folder's number is rather a date; an epoch of more pictures does not fit into memory."""


def scan(
    folder: Path,
    *,
    trigger_word: str = "",
    resolution: int = 1024,
    hold_out: int | None = None,
    repeats: int = 1,
    role: str = TRAIN,
    weight: float = 1.0,
    sub_folders: str = KOHYA,
    mask_source: str = masks.FILES_AND_ALPHA,
    fill_masked: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **training,
) -> Dataset:
    """The pictures of `folder` and of its sub-folders, as far as `sub_folders` says; those of `N_name` count N times.

    One picture is looked at after the other. What cannot be read becomes a note. `hold_out` pictures are kept from
    training, see `split`. Regularization pictures get no trigger word and are never held out, validation pictures all
    are. With `fill_masked` what masks leave out is painted over. `progress` hears (done, total) and may raise to stop;
    `training` are further fields of the Dataset. Raises FileNotFoundError when there is no such folder, ValueError when
    nothing in it can be used.
    """
    _check(repeats, role, weight, sub_folders, mask_source)
    folder, named = Path(folder).absolute(), role != REGULARIZATION
    sources = sources_of(folder, sub_folders, trigger_word.strip() if named else "", named)
    pictures = pictures_of(folder, sources, sub_folders)
    reader = _Reader(sources, mask_source, fill_masked)
    for done, (path, source) in enumerate(pictures):
        progress(done, len(pictures))
        reader.read(path, source)
    if not reader.examples:
        raise ValueError(f"None of the pictures in {folder} can be read, e.g. {reader.unreadable[-1]}")
    examples = [replace(e, repeats=e.repeats * repeats, weight=weight) for e in reader.examples]
    repeat_notes = _repeat_notes(reader.examples, repeats)
    if role == REGULARIZATION:
        train, kept = tuple(replace(example, role=role) for example in examples), ()
    elif role == VALIDATION:
        train, kept = (), tuple(examples)
    else:
        train, kept = split(examples, hold_out_count(len(examples), hold_out), resolution=resolution)
    dataset = Dataset(
        folder,
        train,
        kept,
        trigger_word=triggers_of(examples),
        resolution=resolution,
        uncaptioned=tuple(reader.uncaptioned),
        **training,
    )
    notes = [*unread_notes(folder, sub_folders), *repeat_notes, *reader.notes(), *_size_notes(dataset)]
    return replace(dataset, notes=(*notes, *caption_notes(dataset)))


class _Reader:
    """Pictures become examples, what is odd about them becomes notes."""

    def __init__(self, sources: Sequence[Source], mask_source: str, fill_masked: bool) -> None:
        self.examples: list[Example] = []
        self.uncaptioned: list[Path] = []
        self.unreadable: list[str] = []
        self._mask_source, self._fill_masked = mask_source, fill_masked
        self._captions = Captions(table for source in sources for table in source.tables)
        self._remarks: dict[str, list[Path]] = {}
        self._lone_masks = [path for source in sources for path in source.lone_masks]

    def read(self, path: Path, source: Source) -> None:
        try:
            look = look_at(path)
            mask, mask_remark = masks.mask_for(path, look, source.masks, self._mask_source)
        except ValueError as error:
            self.unreadable.append(str(error))
            return
        said, caption_remark = self._captions.of(path)
        if not said:
            self.uncaptioned.append(path)
        first, *others = (insert_trigger(text, source.trigger_word) for text in said or [source.class_words])
        self.examples.append(
            Example(
                path,
                first,
                look.width,
                look.height,
                source.repeats,
                variants=tuple(others),
                mask=mask,
                fill_masked=self._fill_masked and mask is not None,
                trigger_word=source.trigger_word,
                class_words=source.class_words,
            )
        )
        for remark in filter(None, (*look.remarks, mask_remark, caption_remark)):
            self._remarks.setdefault(remark, []).append(path)

    def notes(self) -> list[str]:
        """What was left out and what is odd, one sentence each."""
        notes = [f"Left out: {error}" for error in self.unreadable]
        notes += [f"{_names(paths)}: {remark}." for remark, paths in self._remarks.items()]
        if self._lone_masks:
            notes.append(f"{_names(self._lone_masks)}: a mask by its name, but there is no picture of that name.")
        if self._fill_masked and not any(example.mask for example in self.examples):
            notes.append("fill_masked is on and no picture has a mask, so nothing is painted over.")
        return notes + self._captions.notes + self._captions.unused()


def _check(repeats: int, role: str, weight: float, sub_folders: str, mask_source: str) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if not weight > 0:
        raise ValueError(f"weight must be above 0, got {weight}.")
    for name, value, known in (
        ("role", role, ROLES),
        ("sub_folders", sub_folders, SUB_FOLDERS),
        ("mask_source", mask_source, masks.SOURCES),
    ):
        if value not in known:
            raise ValueError(f"{name} is '{value}', but must be one of: {', '.join(known)}.")


def _repeat_notes(examples: Sequence[Example], repeats: int) -> list[str]:
    """A note on each folder whose number is too high for one of repeats; ValueError when an epoch gets too long."""
    folders = {e.path.parent.name: e.repeats for e in examples if e.repeats > MOST_REPEATS}
    rename = "rename the folder if its number means something else, such as a date"
    if (total := repeats * sum(example.repeats for example in examples)) > MOST_IN_EPOCH:
        name = max(folders, key=folders.get, default="")
        remedy = f"lower repeats, or {rename}, as in {name}." if name else "lower repeats."
        raise ValueError(f"An epoch of {total:,} pictures is more than fits into memory: {remedy}")
    return [f"{name} repeats each of its pictures {times:,} times: {rename}." for name, times in folders.items()]


def _size_notes(dataset: Dataset) -> list[str]:
    pictures = [(e.path.name, e.width, e.height) for e in dataset.examples + dataset.held_out]
    return size_notes(pictures, dataset.all_resolutions, dataset.largest_enlargement)


def _names(paths: Sequence[Path]) -> str:
    return paths[0].name + (f" and {len(paths) - 1} more" if paths[1:] else "")
