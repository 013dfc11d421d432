"""What a Picker shows of the checkpoints, on its node and by HTTP, and what the user answers when it asks."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import comfy.model_management as mm

from ...training.checkpoint import Checkpoint
from ..keeping import kept_as
from . import folders
from .live import significant, view_address
from .news import News

if TYPE_CHECKING:
    from ...training.picking import Decision

EVENT = "lora_workbench.picking"
POLL = 0.1
"""Seconds between two looks at the cancel button while the user is asked."""
MOST_NODES = 16

_choices: OrderedDict[str, Choice] = OrderedDict()
_again: dict[str, int] = {}
_lock = threading.Lock()


class NotPossible(ValueError):
    """A request that the Picker on a node cannot follow now; the message says why."""


class Choice:
    """The state of the Picker on one node, safe to use from any thread. Without a node id nobody hears of it.

    Inside ``with`` it becomes that node's newest; leaving says how it ended: picked, cancelled or failed.
    """

    def __init__(self, node_id: str | None, name: str = "", *, of_one_training: bool = True) -> None:
        """Files that are not `of_one_training` may be anybody's, so none of them can be deleted here."""
        self.node_id, self.name = node_id, name
        lock = threading.RLock()
        self._changed, self._news = threading.Condition(lock), News(EVENT, self._event, lock)
        self._facts: dict = {"node_id": node_id, "name": name, "id": f"{time.time_ns():x}", "status": "measuring"}
        self._facts["deletable"] = of_one_training
        self._facts |= {"phase": "", "done": None, "of": None, "message": "", "verdict": None, "picked": None}
        self._files: list[dict] = []
        self._prompts: list[str] = []
        self._cells: list[dict] = []
        self._pictures: dict[str, Path] = {}
        self._answer: str | None = None
        self._deadline: float | None = None
        self._number = 0

    def __enter__(self) -> Choice:
        if self.node_id is not None:
            with _lock:
                _choices.pop(self.node_id, None)
                _choices[self.node_id] = self
                while len(_choices) > MOST_NODES:
                    _choices.popitem(last=False)
        self._tell()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            ended = {"status": "idle" if self.picked_name is None else "picked"}
        elif issubclass(kind, mm.InterruptProcessingException):
            ended = {"status": "cancelled", "message": "Cancelled, so nothing was picked.", "picked": None}
        else:
            ended = {"status": "failed", "message": str(error) or kind.__name__, "picked": None}
        self._tell(**ended, phase="", done=None, of=None)

    # What the node tells

    def phase(self, text: str, done: int | None = None, of: int | None = None) -> None:
        """What is being done, and how much of it."""
        self._tell(phase=text, done=done, of=of)

    def files(self, entries: Sequence[Mapping]) -> None:
        """The LoRA files and what is known of each: its name under `lora`, and all else that the page is to show."""
        with self._changed:
            self._files = [dict(entry) for entry in entries]
            self._look()
            self._tell()

    def say(self, verdict: Decision) -> None:
        """What was decided, in words."""
        self._tell(verdict={"kind": verdict.kind, "confidence": verdict.confidence, "reason": verdict.reason})

    def drawing(self, prompts: Sequence[str]) -> None:
        """Pictures of these prompts are being made from now on."""
        with self._changed:
            self._prompts, self._cells, self._pictures = list(prompts), [], {}
            self._tell(status="drawing")

    def cell(self, lora: str | None, strength: float, prompt: int, path: Path) -> None:
        """A picture is in a file below ComfyUI's output folder; without a LoRA it is the untrained model's."""
        with self._changed:
            told = {"lora": lora, "strength": strength, "prompt": prompt, "url": view_address(path)}
            self._cells.append(told)
            if lora is not None and strength == 1:
                self._pictures.setdefault(lora, path)
            self._tell()

    def ask(self, default: str, timeout_minutes: float) -> str:
        """The name of the LoRA that the user chooses; `default` when the time is over, which 0 minutes never is.

        ComfyUI's interrupt on cancel.
        """
        with self._changed:
            self._answer = None
            self._deadline = time.monotonic() + 60 * timeout_minutes if timeout_minutes > 0 else None
            self._tell(status="asking", phase="Waiting for your choice", done=None, of=None)
            while self._answer is None and not self._is_over():
                self._changed.wait(POLL)
                mm.throw_exception_if_processing_interrupted()
            message = "" if self._answer is not None else _nobody_chose(timeout_minutes)
            chosen = self._answer or default
            # What the node still does with the chosen file comes before it has picked.
            self._tell(status="measuring", phase="", picked=chosen, message=message)
            return chosen

    def picked(self, lora: str) -> None:
        """This LoRA goes on."""
        self._tell(status="picked", picked=lora, phase="", done=None, of=None)

    # What the user wants

    def choose(self, lora: str) -> None:
        """Answer with a LoRA; NotPossible when nothing is asked, or for a file that is not there to be chosen."""
        with self._changed:
            if self._facts["status"] != "asking" or self._answer is not None:
                raise NotPossible(f"Node {self.node_id} is not asking now, so nothing can be chosen: queue it first.")
            self._usable(lora)
            self._answer = lora
            self._changed.notify_all()

    def to_keep(self, lora: str) -> tuple[Checkpoint, Path | None]:
        """The file of that name as a checkpoint, and a picture of it; NotPossible for one that cannot be kept."""
        with self._changed:
            entry = self._usable(lora)
            path = folders.lora_path(lora)
            return Checkpoint(int(entry.get("step") or 0), str(path), lora), self._pictures.get(lora)

    def check_deletable(self, names: Sequence[str]) -> None:
        """NotPossible unless all of these are files of this node that nobody picked or kept, after the pick.

        What lies in the loras folder itself may be anything the user has, and not files of one training.
        """
        with self._changed:
            self._look()
            if self._facts["status"] != "picked":
                raise NotPossible(f"Node {self.node_id} has picked nothing yet, so nothing is deleted: queue it first.")
            if not self._facts["deletable"]:
                raise NotPossible("Files of a chosen folder may be anybody's, so none is deleted here: do it by hand.")
            picked = _picked_anywhere()
            for name in names:
                entry = self._entry(name)
                if name in picked:
                    raise NotPossible(f"'{name}' is picked, so it is not deleted: take it off the list.")
                if len(PureWindowsPath(name).parts) == 1:
                    raise NotPossible(
                        f"'{name}' lies in the loras folder itself and not in a training's folder, so it is not "
                        "deleted here: delete it by hand."
                    )
                if entry["kept"]:
                    raise NotPossible(f"'{name}' is kept, so it is not deleted: take it off the list.")

    def changed(self) -> None:
        """Files were copied or deleted: look again."""
        with self._changed:
            self._look()
            self._tell()

    # What others see

    @property
    def id(self) -> str:
        """What tells this picking from every other."""
        return self._facts["id"]

    @property
    def picked_name(self) -> str | None:
        return self._facts["picked"]

    def state(self) -> dict:
        """Everything there is to show, ready for JSON, the files as they are now."""
        with self._changed:
            self._look()
            return self._now()

    def _now(self) -> dict:
        left = None
        if self._facts["status"] == "asking" and self._deadline is not None:
            left = max(0.0, self._deadline - time.monotonic())
        files = [{**entry, **_finite(entry, "percent"), **_finite(entry, "training_percent")} for entry in self._files]
        lists = {"files": files, "prompts": list(self._prompts), "cells": list(self._cells)}
        return {**self._facts, "number": self._number, **lists, "seconds_left": left}

    def _look(self) -> None:
        """How large each file is now and whether it is kept; one that is gone is taken off the list."""
        there, gone = [], set()
        for entry in self._files:
            try:
                path = folders.lora_path(entry["lora"])
                there.append({**entry, "bytes": path.stat().st_size, "kept": self._is_kept(path, entry["lora"])})
            except (OSError, ValueError):
                gone.add(entry["lora"])
        self._files, self._cells = there, [cell for cell in self._cells if cell["lora"] not in gone]

    def _is_kept(self, path: Path, lora: str) -> bool:
        try:
            return kept_as(Checkpoint(0, str(path), lora), self.name) is not None
        except PermissionError:  # what cannot be read cannot have been copied
            return False

    def _entry(self, lora: str) -> dict:
        for entry in self._files:
            if entry["lora"] == lora:
                return entry
        raise NotPossible(f"'{lora[:200]}' is none of the files of node {self.node_id}: choose one that it lists.")

    def _usable(self, lora: str) -> dict:
        entry = self._entry(lora)
        if entry.get("broken"):
            raise NotPossible(f"'{lora}' cannot be used ({entry['broken']}): choose another file.")
        return entry

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _tell(self, **facts: object) -> None:
        with self._changed:
            self._facts |= facts
            if self.node_id is not None:
                self._news.tell()

    def _event(self) -> dict:
        self._number += 1
        return self._now()


def of(node_id: str) -> Choice | None:
    """The newest state of the Picker on a node; None when it has not run since ComfyUI started."""
    with _lock:
        return _choices.get(node_id)


def state_of(node_id: str) -> dict:
    """What the Picker on a node shows; its status is "idle" when it has not run."""
    found = of(node_id)
    if found is not None:
        return found.state()
    empty = Choice(node_id)
    empty._facts["status"] = "idle"
    return empty.state()


def ask_again(node_id: str) -> None:
    """Have the Picker on a node run at the next queueing, though none of its inputs change."""
    with _lock:
        _again[node_id] = _again.get(node_id, 0) + 1


def times_asked_again(node_id: str | None) -> int:
    """How often that was asked of a node: part of what its Picker's result depends on."""
    with _lock:
        return _again.get(node_id, 0) if node_id is not None else 0


def _picked_anywhere() -> set[str | None]:
    with _lock:
        return {choice.picked_name for choice in _choices.values()}


def _nobody_chose(minutes: float) -> str:
    counted = "1 minute" if minutes == 1 else f"{minutes:g} minutes"
    return f"Nobody chose within {counted}, so the suggested file goes on."


def _finite(entry: Mapping, key: str) -> dict:
    return {key: significant(entry[key])} if key in entry else {}
