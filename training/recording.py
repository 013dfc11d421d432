"""What a training leaves behind: stages that pass its events on, and write and measure its checkpoints."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from .checkpoint import EMA, Checkpoint, Validation
from .loop import Snapshot, Step
from .lora import Adapters
from .run import TrainingRun, WriteLora

MOMENT = 2.0
"""Seconds a user who pressed cancel may be kept waiting."""


def recorded(
    steps: Iterable[Step],
    run: TrainingRun,
    write_lora: WriteLora,
    *,
    save_every: int,
    last_step: int,
    asked: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Step | Checkpoint]:
    """Pass steps on, and write a checkpoint every `save_every` steps, when `asked()`, and at the end, whatever it is.

    When the steps stop early or an error or interrupt comes through, the last finished step is saved first.
    """
    last: Step | None = None
    saved: Step | None = None
    losses: list[float] = []
    run.begin()
    started = clock()

    def save_last(snapshot: Snapshot) -> list[Checkpoint]:
        nonlocal saved
        saved = last
        try:
            made = run.save(snapshot, write_lora, statistics.fmean(losses) if losses else None)
        except OSError:
            # The states may lie on another disk than the LoRA files, which is full or gone; but a run whose state is
            # at its end would never write its last file.
            if snapshot.step < last_step:
                with suppress(OSError):
                    run.keep(snapshot)
            raise
        losses.clear()
        return made

    try:
        for last in steps:
            run.log(last, clock() - started)
            if not last.skipped:
                losses.append(last.loss)
            yield last
            if asked() or last.number % save_every == 0 or last.number == last_step:
                yield from save_last(last.snapshot())
            elif run.went_back:
                run.keep(last.snapshot())
            started = clock()
        if last is not saved:
            yield from save_last(last.snapshot())
    except BaseException:
        if last is not saved and (snapshot := _kept(last)) is not None:
            save_last(snapshot)
        raise
    finally:
        run.metrics.close()


def _kept(step: Step) -> Snapshot | None:
    """The newest state there is at or before a step; None when an error in the middle of the next one left none."""
    try:
        return step.snapshot()
    except RuntimeError:
        return None


def validated(
    events: Iterable[Step | Checkpoint],
    run: TrainingRun,
    measure: Callable[[], Validation],
    adapters: Adapters,
    *,
    interrupt: type[BaseException],
    every: int = 0,
    ready: Callable[[], bool] = lambda: True,
    told: Callable[[int, Validation], None] = lambda step, values: None,
) -> Iterator[Step | Checkpoint]:
    """Pass events on, and ask the held-out pictures about every checkpoint, and every so many steps between them.

    `ready()` says whether the network can be asked at all, and `told(step, values)` hears of what the weights as
    trained gave.
    An average is measured with its weights in the adapters, which hold those of the training again afterwards. After
    the `interrupt` of a user who cancels, the checkpoint that it left is measured too, where that takes a moment only.
    """
    last: Step | None = None
    measured = {step for step, _ in run.validations()}
    seconds = math.inf

    def ask(step: int) -> None:
        nonlocal seconds
        started = time.perf_counter()
        values = measure()
        run.note_validation(step, values)
        told(step, values)
        measured.add(step)
        seconds = time.perf_counter() - started

    try:
        for event in events:
            if isinstance(event, Step):
                last = event
                if every and event.number % every == 0:
                    ask(event.number)
            elif event.average == EMA:
                with holding(adapters, last.snapshot().ema):
                    run.note_validation(event.step, measure(), EMA)
            elif not event.average and event.step not in measured:
                ask(event.step)
            yield event
    except interrupt:
        kept = last is not None and run.step == last.number
        if kept and last.number not in measured and seconds <= MOMENT and ready():
            ask(last.number)
        raise


@contextmanager
def holding(adapters: Adapters, weights: dict) -> Iterator[None]:
    """Inside, the adapters hold other weights, for example their average; afterwards their own again."""
    own = adapters.state()
    adapters.load(weights)
    try:
        yield
    finally:
        adapters.load(own)
