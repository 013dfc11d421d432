"""Progress on the node, the cancel button, and the button that finishes early."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

import comfy.model_management as mm
import comfy.utils
from PIL import Image
from server import PromptServer

from ...training.loop import Step
from .controls import Controls
from .live import LiveRun
from .news import INTERVAL

Cancelled = mm.InterruptProcessingException
"""What comes through when the user pressed cancel: in some versions of ComfyUI an Exception, in others not."""


def throw_if_cancelled() -> None:
    """Raise ComfyUI's interrupt when the user pressed cancel."""
    mm.throw_exception_if_processing_interrupted()


class Progress:
    """The progress bar and the line of text on one node, and what its panel shows where it has one."""

    def __init__(self, node_id: str | None, live: LiveRun | None = None) -> None:
        self.node_id = node_id
        self.live = live or LiveRun(None)
        self._bar: comfy.utils.ProgressBar | None = None

    def phase(self, text: str) -> None:
        """Say what is being done."""
        self.live.phase(text)
        self.line(text)

    def line(self, text: str) -> None:
        """Show a line of text on the node."""
        if self.node_id is not None and getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)

    def update(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is None or self._bar.total != total:
            self._bar = comfy.utils.ProgressBar(total, node_id=self.node_id)
        self._bar.update_absolute(done, total)

    def show(self, picture: Image.Image) -> None:
        """Show a picture on the node, leaving the bar where it is."""
        if self._bar is not None:
            self._bar.update_absolute(self._bar.current, self._bar.total, ("JPEG", picture, None))

    def encoding(self, what: str, done: int, total: int) -> None:
        """Report the cache's progress and stop when the user pressed cancel."""
        throw_if_cancelled()
        self.line(f"{what.capitalize()}: {done} of {total}")
        self.live.phase(what.capitalize(), done, total)
        self.update(done, total)


def watched(steps: Iterable[Step], progress: Progress, total: int, requests: Controls) -> Iterator[Step]:
    """Pass steps on while drawing progress; cancel raises ComfyUI's interrupt, *Finish now* just ends the steps."""
    pace = smoothed = None
    drawn = -math.inf
    started = time.perf_counter() - requests.waited
    for step in steps:
        took = time.perf_counter() - requests.waited - started
        pace = took if pace is None else 0.9 * pace + 0.1 * took
        if not step.skipped:
            smoothed = step.loss if smoothed is None else 0.95 * smoothed + 0.05 * step.loss
        progress.live.step(step, pace)
        # Drawing progress may raise ComfyUI's interrupt: by then the step must have been handed on.
        yield step
        # A page that draws every step of a fast training has no time left for its user.
        if time.perf_counter() - drawn >= INTERVAL or step.number >= total:
            drawn = time.perf_counter()
            progress.line(training_line(step.number, total, pace, smoothed))
            progress.update(step.number, total)
        # What happens between two steps (saving, previews, a pause) is no part of the pace.
        started = time.perf_counter() - requests.waited
        throw_if_cancelled()
        if requests.take("finish"):
            return


def training_line(step: int, total: int, seconds_per_step: float, loss: float | None) -> str:
    """One line: step, speed, time left, smoothed loss."""
    left = round((total - step) * seconds_per_step)
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
    shown = "no finite loss yet" if loss is None else f"loss {loss:.4f}"
    return f"Training: step {step} of {total} · {seconds_per_step:.2f} s/step · {clock} left · {shown}"
