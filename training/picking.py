"""Which checkpoint to use, from the loss on pictures that were kept out of training.

Each checkpoint is compared with the untrained base at the same noise and noise levels: D = mean over levels of
ln(L / L0) for each picture, H = mean of D over the pictures. The logarithm of a ratio has no unit, so hard pictures
and noisy levels do not dominate, and 0 is "as good as the base".
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from .run import Checkpoint, Checkpoints, Validation

SUGGESTED, LAST, AT_STEP = "suggested", "last", "at step"
PICKS = (SUGGESTED, LAST, AT_STEP)
BALANCED, FLEXIBLE, LIKENESS = "balanced", "flexible", "likeness"
PREFERENCES = (BALANCED, FLEXIBLE, LIKENESS)
SMALLEST_DIFFERENCE = 0.003
ERROR_OF_ONE_PICTURE = 0.02
SMALLEST_IMPROVEMENT, SMALLEST_IMPROVEMENT_OF_FEW, FEW = 0.012, 0.02, 4
STANDARD_ERRORS = 2.5


@dataclass(frozen=True)
class Choice:
    """The chosen checkpoint and the reason, in words for the user."""

    checkpoint: Checkpoint
    reason: str


def choose(checkpoints: Checkpoints, pick: str, at_step: int, preference: str) -> Choice:
    """The checkpoint the user asked for; ValueError when there is none, or none at that step."""
    entries = checkpoints.entries
    if not entries:
        raise ValueError(f"The run '{checkpoints.name}' has no checkpoint left in '{checkpoints.folder}': train again.")
    if pick == AT_STEP:
        return Choice(_at_step(entries, at_step, checkpoints.name), f"Step {at_step} was asked for.")
    if pick == LAST:
        return Choice(entries[-1], f"Step {entries[-1].step} is the last checkpoint.")
    return _suggested(checkpoints, preference)


def improvement(entry: Checkpoint, base: Validation) -> list[float]:
    """D of each held-out picture; below zero is better than the base."""
    return [
        statistics.fmean(math.log(level / base_level) for level, base_level in zip(levels, base_levels, strict=True))
        for levels, base_levels in zip(entry.validation, base, strict=True)
    ]


def scored(checkpoints: Checkpoints) -> list[Checkpoint]:
    """The checkpoints that can be compared with the base: all of whose held-out losses are proper numbers."""
    if not _is_proper(checkpoints.base_validation):
        return []
    return [entry for entry in checkpoints.entries if _is_proper(entry.validation)]


def percent_better(entry: Checkpoint, base: Validation) -> float:
    """How much lower the held-out loss is than the base model's, in percent; negative when it is higher."""
    return 100 * (1 - math.exp(statistics.fmean(improvement(entry, base))))


def _at_step(entries: tuple[Checkpoint, ...], step: int, name: str) -> Checkpoint:
    for entry in entries:
        if entry.step == step:
            return entry
    there = ", ".join(str(entry.step) for entry in entries)
    raise ValueError(f"The run '{name}' has no checkpoint at step {step}: choose one of {there}.")


def _is_proper(validation: Validation | None) -> bool:
    return bool(validation) and all(0 < level < math.inf for levels in validation for level in levels)


def _suggested(checkpoints: Checkpoints, preference: str) -> Choice:
    candidates = scored(checkpoints)
    if not candidates:
        last = checkpoints.entries[-1]
        return Choice(last, f"No pictures were kept out of training, so step {last.step}, the last, is only a guess.")
    curves = [improvement(entry, checkpoints.base_validation) for entry in candidates]
    means = [statistics.fmean(curve) for curve in curves]
    best = means.index(min(means))
    safe = _safe_range(curves, means, best)
    number = {FLEXIBLE: safe[0], BALANCED: best, LIKENESS: safe[-1]}[preference]
    if not _is_measurable(curves[best]):
        return Choice(candidates[number], _nothing_learned(candidates[number], len(curves[best])))
    return Choice(candidates[number], _reason(candidates, means, safe, number, len(curves[best])))


def _safe_range(curves: list[list[float]], means: list[float], best: int) -> list[int]:
    """The neighbours of the best checkpoint that are as good within measuring error."""

    def good(number: int) -> bool:
        allowed = max(_standard_error(curves[number], curves[best]), -0.05 * means[best], SMALLEST_DIFFERENCE)
        return means[number] - means[best] <= allowed

    first = last = best
    while first > 0 and good(first - 1):
        first -= 1
    while last + 1 < len(means) and good(last + 1):
        last += 1
    return list(range(first, last + 1))


def _is_measurable(curve: list[float]) -> bool:
    """Whether a checkpoint's improvement over the base is more than the differences between pictures explain."""
    least = SMALLEST_IMPROVEMENT_OF_FEW if len(curve) < FEW else SMALLEST_IMPROVEMENT
    error = _standard_error(curve, [0.0] * len(curve))
    return -statistics.fmean(curve) >= max(least, STANDARD_ERRORS * error)


def _standard_error(curve: list[float], other: list[float]) -> float:
    """Of the paired difference between two checkpoints, over pictures."""
    if len(other) < 2:
        return ERROR_OF_ONE_PICTURE
    return statistics.stdev(a - b for a, b in zip(curve, other, strict=True)) / math.sqrt(len(other))


def _nothing_learned(chosen: Checkpoint, pictures: int) -> str:
    return (
        f"No checkpoint is measurably better than the base model on {_counted(pictures)} kept out of training, so step "
        f"{chosen.step} is only a guess: check the captions, try another learning rate, or add pictures."
    )


def _reason(candidates: list[Checkpoint], means: list[float], safe: list[int], number: int, pictures: int) -> str:
    percent = 100 * (1 - math.exp(means[number]))
    sentence = (
        f"Step {candidates[number].step} is suggested: on {_counted(pictures)} kept out of training it is "
        f"{percent:.0f} % better than the base model."
    )
    if len(safe) > 1:
        sentence += (
            f" Steps {candidates[safe[0]].step} to {candidates[safe[-1]].step} are equal within measuring error."
        )
    if number == len(candidates) - 1 and len(candidates) > 2:
        sentence += " It is the last one and may not be the end: training longer could help."
    return sentence


def _counted(pictures: int) -> str:
    return "1 picture" if pictures == 1 else f"{pictures} pictures"
