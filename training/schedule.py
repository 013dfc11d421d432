"""The learning rate as a function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

CONSTANT, COSINE = "constant", "cosine"
SCHEDULES = (CONSTANT, COSINE)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int = 0, schedule: str = CONSTANT) -> float:
    """The rate of the 0-based `step`: a linear rise over `warmup` steps, then constant or a half cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == CONSTANT:
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
