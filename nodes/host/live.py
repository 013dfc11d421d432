"""What a training on a node looks like right now, for the panel on that node and for anyone who asks by HTTP."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from pathlib import Path
from urllib.parse import urlencode

import comfy.model_management as mm
import psutil
import torch

from ...training.checkpoint import mean_of
from ...training.curve import Smoother
from ...training.loop import Step
from ...training.run import TrainingRun, safe_name
from . import controls, folders
from .news import News
from .series import Series

EVENT = "lora_workbench.training"
MOST_POINTS = {"loss": 400, "validation": 200, "rate": 100}
MOST_PREVIEWS = 400
MOST_NOTES = 50
MOST_RUNS = 16

_runs: OrderedDict[tuple[str, str], LiveRun] = OrderedDict()
_runs_lock = threading.Lock()


class LiveRun:
    """The state of the training on one node, safe to read from any thread. Without a node id nobody hears of it.

    Inside ``with`` it is that node's newest run; leaving says how it ended: finished, cancelled or failed.
    """

    def __init__(self, node_id: str | None, name: str = "", *, starts_over: bool = False) -> None:
        self.node_id, self.name, self._going_on = node_id, name, going_on(starts_over)
        self._lock = threading.RLock()
        self._facts: dict = {"node_id": node_id, "name": name, "run": "", "status": "preparing", "phase": ""}
        self._facts |= {"done": None, "of": None, "step": 0, "total": None, "seconds_per_step": None}
        self._facts |= {"learning_rate": None, "plan": "", "message": ""}
        self._series = {key: Series(most) for key, most in MOST_POINTS.items()}
        self._lists: dict[str, list] = {"smoothed": [], "previews": [], "notes": []}
        self._sent = dict.fromkeys((*self._series, *self._lists), 0)
        self._number = 0
        self._news = News(EVENT, self._event, self._lock)
        self._smoother = Smoother()
        self._peak = 0
        self._id = f"{time.time_ns():x}"

    def __enter__(self) -> LiveRun:
        _remember(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        step, total = self._facts["step"], self._facts["total"]
        if kind is None:
            early = total is not None and step < total
            message = f"Finished early at step {step:,} of {total:,}; {self._going_on}." if early else ""
            self._tell(status="finished", message=message)
        elif issubclass(kind, mm.InterruptProcessingException):
            kept = f"Step {step:,} is kept; {self._going_on}." if step else "No step was done yet."
            self._tell(status="cancelled", message=f"Cancelled. {kept}")
        else:
            self._tell(status="failed", message=str(error) or kind.__name__)
        self._tell(phase="", done=None, of=None)

    # What the training tells

    def phase(self, text: str, done: int | None = None, of: int | None = None) -> None:
        """What is being done, and how much of it."""
        self._tell(phase=text, done=done, of=of)

    def plan(self, text: str) -> None:
        """What will be trained, in a line."""
        self._tell(plan=text)

    def opened(self, run: TrainingRun, total: int | None) -> None:
        """The run on disk that goes on here up to step `total`: what it did before is part of the picture."""
        with self._lock:
            for point in run.points():
                if point.loss is not None:
                    self._add("loss", point.step, point.loss)
                    self._smoother.add(point.step, [point.loss], [point.sigma])
                if point.learning_rate is not None:
                    self._add("rate", point.step, point.learning_rate)
            self._smooth()
            for number, values in run.validations():
                self._add("validation", number, mean_of(values))
            for path in sorted((run.folder / "previews").glob("[0-9]*_*.png")):
                self._add_preview(int(path.name.split("_")[0]), "", path)
            self._put("notes", [{"step": None, "text": text} for text in run.notes])
            self._tell(run=run.name, step=run.step, total=total)

    def step(self, step: Step, seconds: float) -> None:
        """A step is done; `seconds` is the pace of late."""
        with self._lock:
            if not step.skipped:
                self._add("loss", step.number, step.loss)
                self._smoother.add(step.number, step.losses, step.sigmas)
                self._smooth()
            self._add("rate", step.number, step.learning_rate)
            facts = {"step": step.number, "seconds_per_step": seconds, "learning_rate": step.learning_rate}
            self._tell(status="training", phase="Training", done=None, of=None, **facts)

    def validation(self, step: int, mean: float) -> None:
        """The mean loss of the held-out pictures after a step; step 0 is the untrained base."""
        with self._lock:
            self._add("validation", step, mean)
            self._tell()

    def preview(self, step: int, prompt: str, path: Path) -> None:
        """A preview of that step is in a file below ComfyUI's output folder."""
        with self._lock:
            self._add_preview(step, prompt, path)
            self._tell()

    def back_to(self, step: int) -> None:
        """The training went back to that step: what came after it is no longer so."""
        with self._lock:
            for key, series in self._series.items():
                if series.back_to(step):
                    self._sent[key] = 0
            self._put("previews", [entry for entry in self._lists["previews"] if entry["step"] <= step])
            self._tell(step=step)

    def note(self, text: str) -> None:
        """Something the user should know: a roll-back, a knob that moved."""
        with self._lock:
            self._put("notes", [*self._lists["notes"], {"step": self._facts["step"], "text": text}][-MOST_NOTES:])
            self._tell()

    def touched(self) -> None:
        """Something changed that is not told here: what the user asked for."""
        self._tell()

    # What others see

    def state(self) -> dict:
        """Everything there is to show, ready for JSON."""
        with self._lock:
            return {**self._now(), **{key: list(self._values(key)) for key in self._sent}}

    def _add(self, key: str, step: int, value: float) -> None:
        rounded = significant(value)
        if rounded is not None and self._series[key].add(step, rounded):
            self._sent[key] = 0

    def _put(self, key: str, values: list) -> None:
        """Another list in place of the one there is; what both begin with need not be sent again."""
        before = self._lists[key][: self._sent[key]]
        if values[: len(before)] != before:
            self._sent[key] = 0
        self._lists[key] = values

    def _smooth(self) -> None:
        self._put("smoothed", [(round(step, 1), significant(loss)) for step, loss in self._smoother.curve()])

    def _add_preview(self, step: int, prompt: str, path: Path) -> None:
        shown, address = self._lists["previews"], view_address(path)
        preview = {"step": step, "prompt": prompt, "url": address}
        if address is None or preview in shown:
            return
        file = address.split("&v=")[0]
        kept = [entry for entry in shown if entry["url"].split("&v=")[0] != file]
        kept.append(preview)
        kept.sort(key=lambda entry: entry["step"])
        self._put("previews", kept[:1] + kept[1:][-MOST_PREVIEWS + 1 :])

    def _values(self, key: str) -> list:
        return self._series[key].points if key in self._series else self._lists[key]

    def _now(self) -> dict:
        """All but the curves, previews and notes."""
        facts, asked = dict(self._facts), controls.of(self.node_id)
        pace, total = facts["seconds_per_step"], facts["total"]
        left = None if pace is None or total is None else max(0.0, (total - facts["step"]) * pace)
        ended = facts["status"] not in ("preparing", "training")
        open_ = None if ended or asked is None else asked
        if open_ and open_.waiting:
            facts |= {"status": "paused", "phase": "Paused"}
        return {
            **facts,
            "id": self._id,
            "number": self._number,
            "seconds_per_step": significant(pace),
            "seconds_left": significant(left),
            "memory": None if ended else self._memory(),
            "asked": open_.asked() if open_ else [],
            "paused": open_.paused() if open_ else False,
            "possible": open_.possible() if open_ else [],
        }

    def _memory(self) -> dict:
        device = mm.get_torch_device()
        if device.type == "cpu":
            kind, used, free = "RAM", psutil.Process().memory_info().rss, psutil.virtual_memory().available
        else:
            free = mm.get_free_memory(torch.device(device))
            kind, used = "GPU", mm.get_total_memory(device) - free
        self._peak = max(self._peak, used)
        return {"kind": kind, "used": int(used), "peak": int(self._peak), "free": int(free)}

    def _tell(self, **facts: object) -> None:
        with self._lock:
            self._facts |= facts
            if self.node_id is not None:
                self._news.tell()

    def _event(self) -> dict:
        """What is new: a list in it takes the place of all from its `from` on."""
        self._number += 1
        event = self._now()
        for key, start in self._sent.items():
            values = self._values(key)
            if start < len(values) or start == 0:
                event[key] = {"from": start, "values": values[start:]}
            self._sent[key] = len(values)
        return event


def _remember(run: LiveRun) -> None:
    if run.node_id is None:
        return
    with _runs_lock:
        _runs.pop((run.node_id, run.name), None)
        _runs[run.node_id, run.name] = run
        while len(_runs) > MOST_RUNS:
            _runs.popitem(last=False)


def state_of(node_id: str, name: str | None) -> dict:
    """The state of the newest run of a node, of that name when one is given; else as the run's folder tells it.

    Its status is "idle" when there is none.
    """
    with _runs_lock:
        found = [run for (node, of), run in _runs.items() if node == node_id and name in (None, of)]
    run = found[-1] if found else past(node_id, name or "")
    return run.state()


def going_on(starts_over: bool) -> str:
    """What the user does to train on."""
    return "set resume to continue, then queue again to go on" if starts_over else "queue again to go on"


def past(node_id: str, name: str) -> LiveRun:
    """A run of an earlier session, read from its folder; an empty one when there is none."""
    live = LiveRun(node_id, name)
    run = newest_run(name)
    live._facts["status"] = "idle" if run is None else "past"
    if run is not None:
        live.opened(run, None)
    return live


def newest_run(name: str) -> TrainingRun | None:
    """The run written last of that name; None when there is none that can be read."""
    return next(iter(runs_of(name)), None)


def runs_of(name: str) -> list[TrainingRun]:
    """The runs that are called so or were typed so, as the disk tells capitals apart, the one written last first."""
    try:
        title = safe_name(name)
    except ValueError:
        return []
    found = []
    for folder in folders.runs_folder().glob("*"):
        if not folder.name.casefold().startswith(title.casefold()):
            continue
        record, as_typed = folder / "record.json", folder.with_name(title + folder.name[len(title) :])
        try:
            values = json.loads(record.read_text("utf-8"))
            called = title.casefold() in (values["title"].casefold(), folder.name.casefold())
            if called and as_typed.samefile(folder):
                found.append((record.stat().st_mtime_ns, record.parent, values))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    found.sort(key=lambda entry: entry[0], reverse=True)
    return [TrainingRun(folder, folders.loras_folder(), values) for _, folder, values in found]


def unfinished(name: str) -> str:
    """How far those runs of that typed name are which have something left to do; empty when none has."""
    left = []
    for run in runs_of(name):
        planned, there = run.fact("planned"), [entry.step for entry in run.checkpoints()]
        if planned is not None and planned not in there:
            left.append(f"{run.name} {max(there, default=0)} of {planned}")
    # In the order of their names, since the one written last need not be the one that changed.
    return ", ".join(sorted(set(left)))


def view_address(path: Path) -> str | None:
    """Where ComfyUI serves a file of its output folder, below its own address; None for any other file."""
    try:
        place = path.resolve().relative_to(folders.output_folder().resolve())
        changed = path.stat().st_mtime_ns
    except (OSError, ValueError):
        return None
    names = {"filename": place.name, "subfolder": place.parent.as_posix(), "type": "output"}
    return f"/view?{urlencode(names)}&v={changed:x}"


def significant(value: float | None) -> float | None:
    """Six digits of a number; None for what is no finite number, which JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
