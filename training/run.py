"""A run on disk: its record, its checkpoints, and the state from which it goes on.

<runs>/<name>/record.json                  what was trained, on what, every checkpoint and every validation
<runs>/<name>/metrics.csv                  one line a step (metrics.py)
<runs>/<name>/state.safetensors            the newest snapshot, and beside it the one before (state.py)
<loras>/<name>/<name>_000100.safetensors
<loras>/<name>/<name>_000100_ema.safetensors, <name>_last3.safetensors      averages, where asked for

A checkpoint counts once its state is whole. It is written in this order: LoRA file, its entry in the record, state, the
record's step; so a kill at any moment leaves the run at this checkpoint or at the one before, and nothing in between.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Protocol

from . import lora_file, metrics, state
from .checkpoint import EMA, Checkpoint, Checkpoints, Validation, mean_of
from .description import OURS, read
from .differences import named_beside
from .ema import averaged
from .identity import effective
from .loop import Snapshot, Step
from .metrics import Metrics, Point
from .whole_file import patiently, remove_leftovers, write_atomically

LONGEST_NAME = 100
"""Bytes."""
DAMAGED = ".damaged"
"""What is put behind the name of a LoRA file that cannot be read."""


class WriteLora(Protocol):
    """How a snapshot becomes a LoRA file."""

    def __call__(self, path: Path, snapshot: Snapshot, average: str = "") -> None:
        """Write the snapshot's weights to `path`, whole or not at all; `average` is said in the file."""


def safe_name(name: str) -> str:
    """The name as a folder name on any system; ValueError when nothing of it can be used.

    Path separators, drive letters and leading dots are what lets a shared workflow write outside its folders.
    """
    cleaned = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "_", name).strip(" ._")
    # A file name holds 255 bytes, and a version and a step are still to be added.
    if len(cleaned.encode()) > LONGEST_NAME:
        # Names that begin alike are still two names.
        ending = f"_{hashlib.sha256(cleaned.encode()).hexdigest()[:8]}"
        begun = cleaned.encode()[: LONGEST_NAME - len(ending)].decode(errors="ignore")
        cleaned = begun.strip(" ._") + ending
    if not cleaned or re.fullmatch(r"(?i)con|prn|aux|nul|com\d|lpt\d", cleaned.split(".")[0].strip()):
        raise ValueError(f"name '{name}' cannot be a file name: use letters and digits, for example 'my_lora'.")
    return cleaned


class TrainingRun:
    """One run's folder. Everything that must survive the process is written through this class."""

    def __init__(self, folder: Path, loras: Path, record: dict) -> None:
        self.folder, self.loras, self._record = folder, loras, record
        self.metrics = Metrics(folder)
        self.went_back = False
        """Whether the state on disk is past the step that training went back to."""
        self.slowdown = 1.0
        """The factor on the learning rate after roll-backs: part of the state, given back by `resume()`."""

    @classmethod
    def open(cls, runs: Path, loras: Path, name: str, identity: dict, *, start_over: bool = False) -> TrainingRun:
        """The newest run of this name with this identity, `effective` alone, to go on with; else a new one.

        What another identity trained under the same name is never overwritten: the new run is called `<name>_v2`,
        `_v3` and so on, and says why. With `start_over` a new one is always made. A run that ended before its first
        step leaves its name to the next one.
        """
        base, same, unused, others = safe_name(name), None, None, {}
        for number in range(1, 10_000):
            folder = runs / (base if number == 1 else f"{base}_v{number}")
            record, has_files = _read_record(folder), (loras / folder.name).exists()
            if record is None and not has_files:
                return same or cls._new(unused or folder, loras, base, identity, others)
            if record is None:
                continue
            stored, wanted = effective(record["identity"], identity)
            is_untrained = not has_files and _is_untrained(folder, record)
            if stored == wanted and not start_over and not (same and is_untrained):
                same = cls(folder, loras, record)
            elif is_untrained:
                unused = unused or folder
            else:
                others[folder.name] = record["identity"]
        raise ValueError(f"There are already 9,999 runs called '{base}': choose another name.")

    @classmethod
    def _new(cls, folder: Path, loras: Path, title: str, identity: dict, others: dict[str, dict]) -> TrainingRun:
        record = {"name": folder.name, "title": title, "identity": identity, "step": 0, "checkpoints": []}
        if folder.name != title:
            record["notes"] = [named_beside(title, folder.name, identity, others)]
        return cls(folder, loras, record)

    @property
    def name(self) -> str:
        """The run's folder name, which is also the folder of its LoRA files."""
        return self._record["name"]

    @property
    def title(self) -> str:
        """The name as the user typed it, without the number that keeps runs apart."""
        return self._record["title"]

    @property
    def step(self) -> int:
        """How far the run is: as far as its newest state, or as its record where the states were deleted."""
        step = state.step_of(self.folder)
        return self._record["step"] if step is None else step

    @property
    def has_lost_its_state(self) -> bool:
        """Whether it was trained and cannot go on, because its states were deleted."""
        return self._record["step"] > 0 and not state.is_there(self.folder)

    @property
    def base_validation(self) -> Validation | None:
        return dict(self.validations()).get(0)

    def validations(self) -> list[tuple[int, Validation]]:
        """(step, loss per held-out picture and noise level) wherever it was measured, the untrained base at step 0."""
        step = self.step
        return sorted((at, values) for at, values in self._record.get("validations", ()) if at <= step)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints whose files are still there, in order; also where the loras folder has been moved."""
        return self._entries("checkpoints")

    def averages(self) -> tuple[Checkpoint, ...]:
        """The files that hold averages: EMA at each checkpoint, and of the last checkpoints."""
        return self._entries("averages")

    def _entries(self, kind: str) -> tuple[Checkpoint, ...]:
        measured = dict(self._record.get("validations", ()))
        entries = (Checkpoint(**entry) for entry in self._record.get(kind, ()))
        placed = (entry if Path(entry.path).is_file() else self._moved(entry) for entry in entries)
        return tuple(
            entry if entry.average else replace(entry, validation=measured.get(entry.step))
            for entry in placed
            if Path(entry.path).is_file()
        )

    def _moved(self, entry: Checkpoint) -> Checkpoint:
        """The entry where its file lies in the loras folder of today, which another system may have written."""
        name = Path(*PureWindowsPath(entry.lora_name).parts)  # takes both separators apart
        return replace(entry, path=str(self.loras / name), lora_name=str(name))

    def points(self) -> list[Point]:
        """The metrics of every step that counts: what a stopped run trained past its state is left out."""
        return self.metrics.read(self.step)

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every step that counts and was not skipped."""
        return [(point.step, point.loss) for point in self.points() if point.loss is not None]

    def curve(self) -> list[tuple[int, float, float]]:
        """(step, loss, noise level) of every step that counts, NaN for the loss of a skipped one."""
        return [
            (p.step, math.nan if p.loss is None else p.loss, p.sigma) for p in self.points() if p.seconds is not None
        ]

    def begin(self) -> None:
        """Write the record of a new run before anything else, so that a killed one is found again under its name.

        What a killed process was writing is removed; a run is written by one process at a time.
        """
        remove_leftovers([self.folder, self.folder / "previews", self.loras / self.name])
        there = _read_record(self.folder)
        if there is None or there["identity"] != self._record["identity"]:
            self._write_record()

    def resume(self) -> Snapshot | None:
        """The newest state that is whole, or None when there is none; ValueError when there are only damaged ones."""
        found = state.read(self.folder)
        if found is None:
            return None
        snapshot, self.slowdown, damaged = found
        if damaged:
            self.add_note(f"The newest state was damaged and set aside; training went on from step {snapshot.step}.")
        return snapshot

    def resume_before(self, step: int) -> Snapshot | None:
        """The state before the newest one, which is of `step`, to go back to when that one is spoilt; None without."""
        return state.read_before(self.folder, step)

    def back_to(self, step: int, slowdown: float) -> None:
        """Go on from an earlier step at a lower rate; what was saved past it is no longer part of this run."""
        self.slowdown, self.went_back = slowdown, True
        for kind in ("checkpoints", "averages"):
            for entry in self._record.get(kind, ()):
                if entry["step"] > step:
                    with suppress(PermissionError):  # in use on Windows: then it is replaced when that step comes again
                        patiently(partial(Path(entry["path"]).unlink, missing_ok=True))
            self._record[kind] = [entry for entry in self._record.get(kind, ()) if entry["step"] <= step]
        self._record["validations"] = [entry for entry in self._record.get("validations", ()) if entry[0] <= step]

    def log(self, step: Step, seconds: float) -> None:
        """Append one step to the metrics."""
        self.metrics.append(
            Point(
                step.number,
                loss=_finite(step.loss),
                # The curve is read by the logarithm of the noise level, so that is what is averaged.
                sigma=math.exp(statistics.fmean(math.log(max(s, 1e-6)) for s in step.sigmas)) if step.sigmas else None,
                learning_rate=step.learning_rate,
                norm=_finite(step.norm),
                seconds=round(seconds, 4),
                skipped=step.skipped,
            )
        )

    def save(self, snapshot: Snapshot, write_lora: WriteLora, loss: float | None) -> list[Checkpoint]:
        """Write the LoRA files, their entries, the state and how far the run is; first the weights as trained."""
        made = self._files_of(snapshot, write_lora, loss)
        self.keep(snapshot)
        return made

    def write_again(self, write_lora: WriteLora) -> list[Checkpoint]:
        """Write the LoRA files of the newest state, which stays as it is; none where there is no state."""
        snapshot = self.resume()
        if snapshot is None:
            return []
        losses = [entry["loss"] for entry in self._record["checkpoints"] if entry["step"] == snapshot.step]
        return self._files_of(snapshot, write_lora, losses[-1] if losses else None)

    def _files_of(self, snapshot: Snapshot, write_lora: WriteLora, loss: float | None) -> list[Checkpoint]:
        made = [self._written("checkpoints", self._path(snapshot.step), snapshot, write_lora, loss, "")]
        if snapshot.ema:
            shadow, path = replace(snapshot, weights=snapshot.ema), self._path(snapshot.step, "_ema")
            made.append(self._written("averages", path, shadow, write_lora, None, EMA))
        self._write_record()
        return made

    def keep(self, snapshot: Snapshot) -> None:
        """Write the state and how far the run is, without a LoRA file."""
        state.write(self.folder, snapshot, self.slowdown)
        self.went_back = False
        self._record["step"] = snapshot.step
        self._write_record()

    def set_aside_damaged(self) -> list[Checkpoint]:
        """Give the LoRA files of this run that cannot be read another name, so that they stand in nobody's way."""
        damaged = []
        for entry in (*self.checkpoints(), *self.averages()):
            try:
                read(Path(entry.path))
            except ValueError as error:
                if isinstance(error.__cause__, OSError):
                    continue  # in use, or on a disk that does not answer: nothing is wrong with the file itself
                patiently(partial(os.replace, entry.path, entry.path + DAMAGED))
                damaged.append(entry)
        return damaged

    def average_of_last(self, count: int, up_to: int) -> Checkpoint | None:
        """The mean of the last `count` checkpoints up to a step as a file of its own, made where it is not there yet.

        None when there are fewer than two.
        """
        entries = [entry for entry in self.checkpoints() if entry.step <= up_to][-count:]
        if count < 2 or len(entries) < 2:
            return None
        newest, path = Path(entries[-1].path), self.loras / self.name / f"{self.name}_last{len(entries)}.safetensors"
        for there in self.averages():
            if Path(there.path) == path and there.step == entries[-1].step:
                return there
        told = {**read(newest), f"{OURS}average": f"last {len(entries)}"}
        lora_file.write(path, averaged([Path(entry.path) for entry in entries]), told)
        entry = self._enter("averages", path, entries[-1].step, None, f"last {len(entries)}")
        self._write_record()
        return entry

    def note_validation(self, step: int, validation: Validation, average: str = "") -> None:
        """Remember what the held-out pictures gave: step 0 is the untrained base."""
        if average:
            for entry in self._record["averages"]:
                if (entry["step"], entry["average"]) == (step, average):
                    entry["validation"] = validation
        else:
            kept = [entry for entry in self._record.get("validations", ()) if entry[0] != step]
            self._record["validations"] = sorted([*kept, [step, validation]], key=lambda entry: entry[0])
            if step:
                self.metrics.append(Point(step, validation=mean_of(validation)))
        self._write_record()

    def note(self, **facts: object) -> None:
        """Facts about the run (settings, held-out pictures) for its record, which the next checkpoint writes."""
        self._record.update(facts)

    def remember(self, **facts: object) -> None:
        """Facts that must hold from now on, such as the steps that a time box came to: in the record at once."""
        self._record.update(facts)
        self._write_record()

    def fact(self, name: str, default: object = None) -> object:
        """What was noted under a name."""
        return self._record.get(name, default)

    def add_note(self, text: str) -> None:
        """A sentence about what happened to the run, for its report; said once however often it happens again."""
        notes = self._record.setdefault("notes", [])
        if text not in notes:
            notes.append(text)
            self._write_record()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._record.get("notes", ()))

    def result(self, up_to: int, trigger_word: str) -> Checkpoints:
        """The checkpoints up to a step, as handed to the next node."""
        entries, averages = (
            tuple(entry for entry in some if entry.step <= up_to) for some in (self.checkpoints(), self.averages())
        )
        folder = str(self.loras / self.name)
        return Checkpoints(self.name, folder, trigger_word, entries, self.base_validation, averages)

    def _path(self, step: int, ending: str = "") -> Path:
        return self.loras / self.name / f"{self.name}_{step:06d}{ending}.safetensors"

    def _written(
        self, kind: str, path: Path, snapshot: Snapshot, write_lora: WriteLora, loss: float | None, average: str
    ) -> Checkpoint:
        if average:
            write_lora(path, snapshot, average)
        else:
            write_lora(path, snapshot)
        return self._enter(kind, path, snapshot.step, loss, average)

    def _enter(self, kind: str, path: Path, step: int, loss: float | None, average: str) -> Checkpoint:
        """Put a written file into the record, in place of what it replaces."""
        entry = Checkpoint(step, str(path), str(path.relative_to(self.loras)), loss, average=average)
        others = [other for other in self._record.get(kind, ()) if other["lora_name"] != entry.lora_name]
        self._record[kind] = sorted([*others, asdict(entry)], key=lambda other: other["step"])
        return entry

    def _write_record(self) -> None:
        write_atomically(self.folder / "record.json", json.dumps(self._record, indent=1).encode())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_untrained(folder: Path, record: dict) -> bool:
    """Whether a run ended before its first step, so that there is nothing of it to lose."""
    begun = record.get("step") or record.get("checkpoints") or state.step_of(folder) is not None
    return not begun and not (folder / metrics.FILE).is_file()


def _read_record(folder: Path) -> dict | None:
    path = folder / "record.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict) or "identity" not in record:
            raise ValueError("it is no record of a run")
        return record
    except ValueError as error:
        raise ValueError(
            f"The record '{path}' cannot be read ({error}): delete that file or choose another name."
        ) from error
