"""A run on disk: its record, its checkpoints, and the state from which it goes on.

<runs>/<name>/record.json         what was trained, on what, and every checkpoint
<runs>/<name>/metrics.jsonl       one line a step
<runs>/<name>/state.safetensors   the newest snapshot: adapters and optimizer, float32
<loras>/<name>/<name>_000100.safetensors
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .loop import Snapshot, Step
from .whole_file import write_atomically

LONGEST_NAME = 100
"""Bytes."""

Validation = list[list[float]]
"""Loss per held-out picture and noise level."""


@dataclass(frozen=True)
class Checkpoint:
    """A written LoRA file: after which step, where, its training loss since the one before, and its validation."""

    step: int
    path: str
    lora_name: str
    loss: float | None = None
    validation: Validation | None = None


@dataclass(frozen=True)
class Checkpoints:
    """What the Trainer hands to the Picker: the files of one run, in order, and the untrained base's validation."""

    name: str
    folder: str
    trigger_word: str
    entries: tuple[Checkpoint, ...]
    base_validation: Validation | None = None


def safe_name(name: str) -> str:
    """The name as a folder name on any system; ValueError when nothing of it can be used.

    Path separators, drive letters and leading dots are what lets a shared workflow write outside its folders.
    """
    cleaned = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "_", name).strip(" ._")
    # A file name holds 255 bytes, and a version and a step are still to be added.
    cleaned = cleaned.encode()[:LONGEST_NAME].decode(errors="ignore").strip(" ._")
    if not cleaned or re.fullmatch(r"(?i)con|prn|aux|nul|com\d|lpt\d", cleaned.split(".")[0]):
        raise ValueError(f"name '{name}' cannot be a file name: use letters and digits, for example 'my_lora'.")
    return cleaned


class TrainingRun:
    """One run's folder. Everything that must survive the process is written through this class."""

    def __init__(self, folder: Path, loras: Path, record: dict) -> None:
        self.folder, self.loras, self._record = folder, loras, record

    @classmethod
    def open(cls, runs: Path, loras: Path, name: str, identity: dict, *, start_over: bool = False) -> TrainingRun:
        """The newest run of this name with this identity, to go on with; else a new one.

        What another identity trained under the same name is never overwritten: the new run is called `<name>_v2`,
        `_v3` and so on. With `start_over` a new one is always made.
        """
        base, same = safe_name(name), None
        for number in range(1, 10_000):
            folder = runs / (base if number == 1 else f"{base}_v{number}")
            record = _read_record(folder)
            if record is None and not (loras / folder.name).exists():
                record = {"name": folder.name, "title": base, "identity": identity, "step": 0, "checkpoints": []}
                return same or cls(folder, loras, record)
            if record is not None and record["identity"] == identity and not start_over:
                same = cls(folder, loras, record)
        raise ValueError(f"There are already 9,999 runs called '{base}': choose another name.")

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
        """How far the newest state is."""
        return self._record["step"]

    @property
    def base_validation(self) -> Validation | None:
        return self._record.get("base_validation")

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints whose files are still there, in order; also where the loras folder has been moved."""
        entries = (Checkpoint(**entry) for entry in self._record["checkpoints"])
        placed = (
            entry if Path(entry.path).is_file() else replace(entry, path=str(self.loras / entry.lora_name))
            for entry in entries
        )
        return tuple(entry for entry in placed if Path(entry.path).is_file())

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every step that counts: what a stopped run trained past its state is left out."""
        latest: dict[int, float] = {}
        path = self.folder / "metrics.jsonl"
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            # A crash can leave half a line; what is lost is one point of a chart.
            with suppress(ValueError):
                entry = json.loads(line)
                if entry["step"] <= self.step and entry["loss"] is not None:
                    latest[entry["step"]] = entry["loss"]
        return sorted(latest.items())

    def resume(self) -> Snapshot | None:
        """The newest state, or None when there is none; ValueError when it is damaged."""
        path = self.folder / "state.safetensors"
        if not path.is_file() or not self.step:
            return None
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "optimizer": {}}
        try:
            with safe_open(path, framework="pt") as file:
                step = int(file.metadata()["step"])
                for key in file.keys():  # noqa: SIM118 - it is no dict and cannot be iterated
                    part, name = key.split("/", 1)
                    parts[part][name] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"The state '{path}' cannot be read ({error}): set resume to 'start over'.") from error
        return Snapshot(step, **parts)

    def log(self, step: Step, seconds: float) -> None:
        """Append one step to the metrics."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {
            "step": step.number,
            "loss": step.loss if math.isfinite(step.loss) else None,
            "learning_rate": step.learning_rate,
            "seconds": round(seconds, 4),
        }
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, snapshot: Snapshot, write_lora: Callable[[Path, Snapshot], None], loss: float | None) -> Checkpoint:
        """Write the LoRA file, then the state, then the record that names both."""
        path = self.loras / self.name / f"{self.name}_{snapshot.step:06d}.safetensors"
        write_lora(path, snapshot)
        tensors = {f"weights/{name}": tensor for name, tensor in snapshot.weights.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in snapshot.optimizer.items()}
        write_atomically(self.folder / "state.safetensors", save(tensors, metadata={"step": str(snapshot.step)}))
        checkpoint = Checkpoint(snapshot.step, str(path), str(path.relative_to(self.loras)), loss)
        kept = [entry for entry in self._record["checkpoints"] if entry["step"] != snapshot.step]
        self._record["checkpoints"] = sorted([*kept, asdict(checkpoint)], key=lambda entry: entry["step"])
        self._record["step"] = snapshot.step
        self._write_record()
        return checkpoint

    def note_validation(self, step: int, validation: Validation) -> None:
        """Remember what the held-out pictures gave: step 0 is the untrained base."""
        if step == 0:
            self._record["base_validation"] = validation
        for entry in self._record["checkpoints"]:
            if entry["step"] == step:
                entry["validation"] = validation
        self._write_record()

    def note(self, **facts: object) -> None:
        """Facts about the run (settings, held-out pictures) for its record, which the next checkpoint writes."""
        self._record.update(facts)

    def result(self, up_to: int, trigger_word: str) -> Checkpoints:
        """The checkpoints up to a step, as handed to the next node."""
        entries = tuple(entry for entry in self.checkpoints() if entry.step <= up_to)
        return Checkpoints(self.name, str(self.loras / self.name), trigger_word, entries, self.base_validation)

    def _write_record(self) -> None:
        write_atomically(self.folder / "record.json", json.dumps(self._record, indent=1).encode())


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


def recorded(
    steps: Iterable[Step],
    run: TrainingRun,
    write_lora: Callable[[Path, Snapshot], None],
    *,
    save_every: int,
    last_step: int,
) -> Iterator[Step | Checkpoint]:
    """Pass steps on, and write a checkpoint every `save_every` steps and at the end, whatever the end is.

    When the steps stop early or an error or interrupt comes through, the last finished step is saved first.
    """
    last: Step | None = None
    saved: Step | None = None
    losses: list[float] = []
    started = time.perf_counter()

    def save_last() -> Checkpoint:
        nonlocal saved
        saved = last
        checkpoint = run.save(last.snapshot(), write_lora, statistics.fmean(losses) if losses else None)
        losses.clear()
        return checkpoint

    try:
        for last in steps:
            run.log(last, time.perf_counter() - started)
            if not last.skipped:
                losses.append(last.loss)
            yield last
            if last.number % save_every == 0 or last.number == last_step:
                yield save_last()
            started = time.perf_counter()
    except BaseException:
        if last is not saved:
            save_last()
        raise
    if last is not saved:
        yield save_last()
