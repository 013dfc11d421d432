"""Training that outlives trouble: it begins again from a good state, more slowly, in less memory, or after a pause.

Two states are kept in memory, copied every 50 steps. When training goes wrong it goes back to the older of them, since
the newer may be spoilt already, and on at half the learning rate. A run that was stopped goes back to the state it goes
on from, and when that was in vain to the one before, if it has it. The state of the last step is copied only when it is
needed: when memory ran out, and for a pause.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from .loop import Snapshot, Step

KEPT_EVERY = 50
"""Steps between two states that are kept to go back to."""
TIMES = 3
"""How often the rate is halved before training stops."""
HISTORY = 2000
"""How many pictures a rise of the loss is measured against."""
REACH = 150
"""Steps: two blocks, and as far as training goes back."""
RISE, ERRORS = 0.3, 6.0
"""A rise of the log loss that no healthy training shows, and how many standard errors it must have."""

POINTS = "points"
PAUSE, MEMORY = "pause", "memory"
Begin = Callable[[Snapshot | None, float], Iterator[Step]]


def enduring(
    begin: Begin,
    resume: Snapshot | None,
    *,
    before: Snapshot | None = None,
    spoilt: Callable[[int], str] = lambda step: "",
    slowdown: float = 1.0,
    out_of_memory: tuple[type[BaseException], ...] = (),
    step_down: Callable[[], str | None] = lambda: None,
    paused: Callable[[], bool] = lambda: False,
    wait: Callable[[Snapshot | None], None] = lambda state: None,
    note: Callable[[str], None] = lambda text: None,
    went_back: Callable[[int, float], None] = lambda step, slowdown: None,
) -> Iterator[Step]:
    """The steps of `begin(state, slowdown)`, which is called again from a state whenever something is in the way.

    - Not finite, diverging, or `spoilt(step)` by a sentence: back to a good state at half the rate, with `note` and
      `went_back(step, slowdown)`. FloatingPointError when that has been done three times.
    - Out of memory: `step_down()` moves one knob and says which; on from the last step. MemoryError when it says None.
    - `paused()`: training is closed, so that its memory goes; `wait(state)` is given the state of the last step, None
      before the first, and when it returns training goes on from there.

    `begin(None, ...)` must begin with fresh adapters; `before` is an older state than `resume`. A step's snapshot is
    that of the newest good state, which is its own until another step is taken.
    """
    run = _Position(resume, before, slowdown)
    while True:
        trouble = ""
        try:
            with closing(begin(run.newest, run.slowdown)) as steps:
                for step in steps:
                    trouble = run.watch.trouble(step) or spoilt(step.number)
                    if trouble:
                        break
                    yield run.taken(step)
                    if paused():
                        trouble = PAUSE
                        break
        except FloatingPointError as error:
            trouble = str(error)
        except out_of_memory:
            trouble = MEMORY
        # Only from here on is the memory of the failed step free: its error held it.
        step = steps = None
        if not trouble:
            return
        if trouble in (PAUSE, MEMORY):
            run.settle()
            wait(run.settled()) if trouble == PAUSE else note(_stepped_down(step_down(), run.number))
        else:
            note(run.go_back(trouble))
            went_back(run.number, run.slowdown)


class _Position:
    """How far training is, and the states it can go back to."""

    def __init__(self, resume: Snapshot | None, before: Snapshot | None, slowdown: float) -> None:
        self.slowdown, self.watch = slowdown, Watch(resume.losses if resume else None)
        self.newest, self.number = resume, resume.step if resume else 0
        self._kept, self._live = [resume], None
        self._before, self._tried = before, None

    def taken(self, step: Step) -> Step:
        """The step as it is passed on, after its state has been kept where it is its turn."""
        self._live, self.number = step, step.number
        if step.number % KEPT_EVERY == 0:
            self.newest = step.snapshot()
            self._kept = [self._kept[-1], self.newest]
        return replace(step, _taken=self.snapshot)

    def snapshot(self, number: int) -> Snapshot:
        """The newest good state; RuntimeError when there is none but the beginning."""
        state = self._copied()
        if state is None or not state.step:
            raise RuntimeError(f"The state of step {number} is gone, and none before it was kept but the beginning.")
        return replace(state, losses=self.watch.recent(state.step))

    def settle(self) -> None:
        """Hold a copy of the newest state instead of the training itself, whose memory can go then."""
        self.newest, self._live = self._copied(), None
        self.number = self.newest.step if self.newest else 0

    def settled(self) -> Snapshot | None:
        """The state that is held, as it is to be written; None at the beginning."""
        return self.snapshot(self.number) if self.number else None

    def go_back(self, trouble: str) -> str:
        """Return to a good state at half the rate, and say so; FloatingPointError when it was done often enough."""
        at, self._live = self.number, None
        self.newest = self._good()
        self._kept, self.number = [self.newest], self.newest.step if self.newest else 0
        if self.slowdown <= 0.5**TIMES:
            raise FloatingPointError(
                f"Training stopped at step {at}, though the learning rate was halved {TIMES} times. {trouble}"
            )
        self.slowdown /= 2
        self.watch.forget(self.number)
        return (
            f"Step {at}: {trouble} Training went back to step {self.number} and goes on at "
            f"{self.slowdown:g} times the learning rate."
        )

    def _good(self) -> Snapshot | None:
        """The older of the states that are kept; where training went wrong from it already, the one before it."""
        state = self._kept[0]
        if state is self._tried and self._before is not None:
            state, self._before = self._before, None
        self._tried = state
        return state

    def _copied(self) -> Snapshot | None:
        if self._live is not None:
            # A step that fails while it is changing the state leaves nothing to copy.
            with suppress(RuntimeError):
                return self._live.snapshot()
        return self.newest


class Watch:
    """Notices that the loss rises past what noise explains, by blocks of steps, noise levels taken out.

    The log loss of each picture is compared with the median of its noise level among the pictures before the last two
    blocks. Training diverges when the medians of both blocks lie above by `RISE` and by `ERRORS` standard errors
    (1.2533 x 1.4826 x median absolute deviation / sqrt(n), for a median). Blocks are of 25 steps, and of 5 in the first
    100 steps, where only a large rise stands out.

    A run that goes on brings its `recent` points along, so that it is watched as if it had never stopped.
    """

    def __init__(self, recent: Mapping[str, Tensor] | None = None) -> None:
        # step, noise level, log loss
        self._points: list[tuple[int, float, float]] = [tuple(row) for row in recent[POINTS].tolist()] if recent else []

    def trouble(self, step: Step) -> str:
        """A sentence when training diverges by now, else nothing."""
        if step.skipped:
            return ""
        self._points += [
            (step.number, sigma, math.log(loss))
            for sigma, loss in zip(step.sigmas, step.losses, strict=True)
            if loss > 0
        ]
        started = self._points[0][0] if self._points else step.number
        size = 25 if step.number - started >= 100 else 5
        if step.number % size:
            return ""
        rise = self._rise(step.number, size)
        return f"The loss rose to {math.exp(rise):.1f} times what it was." if rise else ""

    def recent(self, step: int) -> dict[str, Tensor]:
        """The points up to a step that later ones may be compared with, (n, 3) in double precision."""
        until = bisect_right(self._points, step, key=itemgetter(0))
        before = bisect_right(self._points, step - REACH, key=itemgetter(0))
        points = self._points[max(0, before - HISTORY) : until]
        return {POINTS: torch.tensor(points, dtype=torch.float64).reshape(-1, 3)}

    def forget(self, after: int) -> None:
        """Leave out what came after a step."""
        self._points = [point for point in self._points if point[0] <= after]

    def _rise(self, now: int, size: int) -> float:
        """How far the log loss of both of the last blocks lies above what was before, or 0 when that may be noise."""
        before = [(sigma, loss) for step, sigma, loss in self._points if step <= now - 2 * size][-HISTORY:]
        last = [
            [
                (sigma, loss)
                for step, sigma, loss in self._points
                if now - later * size < step <= now - (later - 1) * size
            ]
            for later in (1, 2)
        ]
        if len(before) < 10 or not all(last):
            return 0.0
        levels = Levels(before)
        return min(levels.rise(block) for block in last)


class Levels:
    """What the log loss usually is at each noise level, from points (noise level, log loss)."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        ordered = sorted(points)
        count = max(1, min(10, len(ordered) // 10))
        bins = [ordered[len(ordered) * i // count : len(ordered) * (i + 1) // count] for i in range(count)]
        self._bounds = [each[0][0] for each in bins[1:]]
        self._medians = [statistics.median(loss for _, loss in each) for each in bins]
        left = [abs(loss) for loss in self._residuals(points)]
        self._spread, self._per_bin = 1.2533 * 1.4826 * statistics.median(left), len(ordered) / count

    def rise(self, points: Sequence[tuple[float, float]]) -> float:
        """The median rise of some points, or 0 when noise may explain it."""
        found = statistics.median(self._residuals(points))
        error = self._spread * math.sqrt(1 / len(points) + 1 / self._per_bin)
        return found if found > max(RISE, ERRORS * error) else 0.0

    def _residuals(self, points: Sequence[tuple[float, float]]) -> list[float]:
        return [loss - self._medians[bisect_right(self._bounds, sigma)] for sigma, loss in points]


def _stepped_down(knob: str | None, step: int) -> str:
    if knob is None:
        raise MemoryError(
            f"The memory of the device ran out after step {step}, and nothing is left to turn down: use a lower "
            "resolution or rank, or close what else uses the device."
        )
    return f"Step {step}: memory ran out; {knob}. Training went on from there."
