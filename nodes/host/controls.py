"""What the user asks of the training on a node while it runs: finish, save, preview, pause, go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import comfy.model_management as mm

ONCE = ("finish", "save", "preview")
ACTIONS = (*ONCE, "pause", "resume")
POLL = 0.1
"""Seconds between two looks at the cancel button during a pause."""

_training: dict[str, Controls] = {}


class NotPossible(ValueError):
    """A request that the training on a node cannot follow now; the message says why."""


class Controls:
    """The requests to one training. They reach it inside ``with``, and end with it.

    `changed` is called, from the thread that asks, after each request.
    """

    def __init__(self, node_id: str | None, changed: Callable[[], None] = lambda: None) -> None:
        self.node_id = node_id
        self.waiting = False
        self.waited = 0.0
        """Seconds spent in pauses."""
        self._changed = changed
        self._asked: set[str] = set()
        self._paused = False
        self._lock = threading.Lock()

    def __enter__(self) -> Controls:
        if self.node_id is not None:
            _training[self.node_id] = self
        return self

    def __exit__(self, *_: object) -> None:
        if self.node_id is not None and _training.get(self.node_id) is self:
            del _training[self.node_id]

    def ask(self, action: str) -> None:
        """Ask for one of ACTIONS; to finish ends a pause. NotPossible for what makes no sense during one."""
        with self._lock:
            if self._paused and action in ("save", "preview"):
                raise NotPossible(f"The training on node {self.node_id} is paused: continue first, then {action}.")
            if action in ONCE:
                self._asked.add(action)
            self._paused = action == "pause" or (self._paused and action not in ("resume", "finish"))
        self._changed()

    def take(self, action: str) -> bool:
        """Whether that was asked for since the last time it was taken."""
        with self._lock:
            asked = action in self._asked
            self._asked.discard(action)
        return asked

    def asked(self) -> list[str]:
        """What was asked for and not taken yet."""
        with self._lock:
            return sorted(self._asked)

    def possible(self) -> list[str]:
        """What may be asked now."""
        return ["finish", "resume"] if self._paused else [*ONCE, "pause"]

    def paused(self) -> bool:
        """Whether the training is to stand still."""
        return self._paused

    def wait(self) -> None:
        """Return when the training may go on; ComfyUI's interrupt on cancel."""
        if not self._paused:
            return
        pause, self.waiting, started = threading.Event(), True, time.perf_counter()
        self._changed()
        try:
            while self._paused:
                mm.throw_exception_if_processing_interrupted()
                pause.wait(POLL)
        finally:
            self.waiting = False
            self.waited += time.perf_counter() - started
            self._changed()


def of(node_id: str | None) -> Controls | None:
    """The controls of the training on a node; None when it is not training."""
    return _training.get(node_id) if node_id is not None else None


def ask(node_id: str, action: str) -> None:
    """Ask the training on a node for one of ACTIONS; NotPossible when that node is not training."""
    controls = of(node_id)
    if controls is None:
        raise NotPossible(f"Node {node_id} is not training now, so there is nothing to {action}: queue it first.")
    controls.ask(action)
