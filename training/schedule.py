"""The learning rate as a function of the step: nothing to save, nothing to resume.

The formulas are those of transformers' and diffusers' `get_scheduler`, except that warm-up begins at 1 / warm-up
instead of 0, so that no step is taken in vain.
"""

from __future__ import annotations

import math

CONSTANT, COSINE, LINEAR, RESTARTS = "constant", "cosine", "linear", "cosine with restarts"
SCHEDULES = (CONSTANT, COSINE, LINEAR, RESTARTS)


def learning_rate(
    step: int, *, peak: float, steps: int, warmup: float = 0, schedule: str = CONSTANT, restarts: int = 1
) -> float:
    """The rate of the 0-based `step`: a linear rise over the warm-up, then the schedule down to zero at `steps`.

    `warmup` counts steps, or below 1 is a fraction of all steps. `restarts` is how many cosines follow one another.
    """
    rising = warmup_steps(warmup, steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * remaining(schedule, min(1.0, (step - rising) / max(1, steps - rising)), restarts)


def warmup_steps(warmup: float, steps: int) -> int:
    """The warm-up in steps; below 1 it is a fraction of `steps`."""
    return round(warmup * steps) if warmup < 1 else round(warmup)


def remaining(schedule: str, done: float, restarts: int = 1) -> float:
    """What is left of the peak when `done` (0 to 1) of the steps after warm-up are over."""
    if schedule == CONSTANT:
        return 1.0
    if done >= 1:
        return 0.0
    if schedule == LINEAR:
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * (done if schedule == COSINE else restarts * done % 1)))
