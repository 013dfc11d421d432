"""The limit of time: as many steps as fit into it, and an end when they take longer all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..training.loop import Step
from ..training.presets import Plan, fitted
from ..training.run import TrainingRun
from ..training.spoiling import CHECKED_AT

OVERRUN = 1.1
"""How many times the limit of time a training may take that is slower than measured."""
FITTED = "fitted"


def fitted_to(minutes: float, plan: Plan, run: TrainingRun, seconds_per_step: float) -> Plan:
    """The plan with as many steps as fit into what is measured, which the run keeps for a later queueing.

    ValueError as of `fitted`.
    """
    # What was done in an earlier queueing, such as the untrained model's previews, was measured then.
    validation, preview, check = (run.fact(f"seconds_per_{what}", 0.0) for what in ("validation", "preview", "check"))
    save = validation * (2 if plan.train.ema else 1) + preview * plan.save_every / plan.preview_every
    chosen = fitted(
        plan,
        minutes,
        seconds_per_step,
        save,
        seconds_per_validation=validation,
        seconds_once=_of_checks(60 * minutes, check, run.step, plan.train.steps, seconds_per_step),
        done=run.step,
    )
    numbers = {
        "steps": chosen.train.steps,
        "warmup": chosen.train.warmup,
        "save_every": chosen.save_every,
        "preview_every": chosen.preview_every,
        "validate_every": chosen.validate_every,
        "notes": chosen.notes,
    }
    run.remember(**{FITTED: {**run.fact(FITTED, {}), _key(minutes, plan): numbers}}, planned=chosen.train.steps)
    return chosen


def as_fitted(plan: Plan, run: TrainingRun, minutes: float) -> Plan | None:
    """The plan as an earlier queueing with the same wishes and limit of time fitted it; None when there was none."""
    numbers = run.fact(FITTED, {}).get(_key(minutes, plan))
    if not minutes or numbers is None:
        return None
    train_config = replace(plan.train, steps=numbers["steps"], warmup=numbers["warmup"])
    intervals = {name: numbers[name] for name in ("save_every", "preview_every", "validate_every")}
    return replace(plan, train=train_config, notes=tuple(numbers["notes"]), **intervals)


def in_time(
    steps: Iterator[Step], minutes: float, last: int, clock: Callable[[], float], note: Callable[[str], None]
) -> Iterator[Step]:
    """Pass steps on until `minutes` and a tenth of them are over; then end with a `note`, where it is not the `last`.

    What is done between two steps counts as well. A machine that became slower is a reason, or steps that were undone.
    """
    started = clock()
    for step in steps:
        yield step
        if step.number < last and clock() - started > 60 * minutes * OVERRUN:
            note(
                f"The {minutes:g} minutes of stop_after were over at step {step.number} of {last}: training took "
                "longer than was measured before it. Queue again to go on."
            )
            return


def _of_checks(limit: float, check: float, done: int, last: int, seconds_per_step: float) -> float:
    """Seconds of the looks whether the model is spoilt that fit into the limit together with the steps before them."""
    seconds = 0.0
    for step in CHECKED_AT:
        if done < step <= last and (step - done) * seconds_per_step + seconds + check <= limit:
            seconds += check
    return seconds


def _key(minutes: float, plan: Plan) -> str:
    """What was wished for: any other wish is fitted anew."""
    intervals = plan.save_every, plan.preview_every, plan.validate_every
    return " ".join(f"{number:g}" for number in (minutes, plan.train.steps, *intervals))
