"""What every step gave, as `metrics.csv` in the run's folder and, where TensorBoard is installed, as its scalars."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from .whole_file import naming_a_full_disk

FILE, SCALARS = "metrics.csv", "tensorboard"


@dataclass(frozen=True)
class Point:
    """One step: what it cost, at which mean noise level, how it was taken, and the held-out loss where it was measured.

    `loss` is the mean over the pictures of the step, None when it was skipped; `seconds` is how long the step took.
    """

    step: int
    loss: float | None = None
    sigma: float | None = None
    learning_rate: float | None = None
    norm: float | None = None
    seconds: float | None = None
    skipped: bool = False
    validation: float | None = None


COLUMNS = tuple(field.name for field in fields(Point))


class Metrics:
    """The metrics of a run on disk; a line a step is appended, and a later line about a step counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._scalars = None
        self._begun = False
        self._waiting = ""
        """Lines that are not written yet, since another program held the file."""

    def append(self, point: Point) -> None:
        """Keep what is known about a step now; what was kept about it before and is None here stays.

        OSError naming the folder when its disk is full.
        """
        with naming_a_full_disk(self._folder):
            self._append(point)

    def _append(self, point: Point) -> None:
        if not self._begun:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._scalars, self._begun = _scalars(self._folder / SCALARS, point.step), True
        cells = [
            "" if value is None else int(value) if value is True or value is False else value
            for value in astuple(point)
        ]
        self._waiting += ",".join(map(str, cells)) + "\n"
        with suppress(PermissionError):  # on Windows a spreadsheet that shows the file keeps others from writing to it
            self._write_waiting()
        if self._scalars is not None:
            for name in ("loss", "sigma", "learning_rate", "norm", "validation"):
                if getattr(point, name) is not None:
                    self._scalars.add_scalar(name, getattr(point, name), point.step)

    def read(self, up_to: int) -> list[Point]:
        """Every step that counts, in order: what a stopped run trained past its last state is left out."""
        path = self._folder / FILE
        text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
        points: dict[int, Point] = {}
        for point in _parsed((text + self._waiting).splitlines()):
            if point.step <= up_to:
                points[point.step] = _merged(points.get(point.step), point)
        return [points[step] for step in sorted(points)]

    def close(self) -> None:
        """Write out what TensorBoard still holds; appending again opens it again."""
        if self._scalars is not None:
            self._scalars.close()
        self._scalars, self._begun = None, False

    def _write_waiting(self) -> None:
        with open(self._folder / FILE, "ab+") as file:
            if not file.tell():
                file.write(f"{','.join(COLUMNS)}\n".encode())
            else:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill can leave half a line, which must not spoil the next
                    file.write(b"\n")
            file.write(self._waiting.encode())
        self._waiting = ""


def _scalars(folder: Path, step: int):
    """TensorBoard's writer, which hides what was written from this step on; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)


def _parsed(lines: Iterable[str]) -> Iterable[Point]:
    """The points of a file, leaving out its heading and every line that is not whole."""
    for row in csv.reader(line.replace("\0", "") for line in lines):
        if len(row) == len(COLUMNS):
            with suppress(ValueError):
                step, *cells, skipped, validation = row
                loss, sigma, rate, norm, seconds = map(_number, cells)
                yield Point(int(step), loss, sigma, rate, norm, seconds, skipped == "1", _number(validation))


def _number(cell: str) -> float | None:
    """The cell's number, None for an empty cell; ValueError for anything else."""
    value = float(cell) if cell else None
    return value if value is None or math.isfinite(value) else None


def _merged(before: Point | None, point: Point) -> Point:
    """A line with nothing but a validation adds to what is known; any other says the step was taken anew."""
    if before is None or point != Point(point.step, validation=point.validation):
        return point
    return replace(before, validation=point.validation)
