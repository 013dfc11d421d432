"""How good a LoRA file is: its losses at fixed noise and noise levels, each beside that of the untrained base.

    D(i) = mean over levels s of ln( L(i, s) / L0(i, s) )     of picture i
    H, T = mean of D over the pictures kept out of training, and over some that were trained on

The logarithm of a ratio has no unit, so hard pictures and noisy levels do not dominate; pairing takes the noise out; 0
is "as good as the base", and exactly that for a file that changes nothing.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from .checkpoint import Checkpoint, Validation
from .timesteps import VALIDATION_PLACES

LARGEST_DISAGREEMENT = 0.002
"""How far two measurements of the same question may lie apart, as a share: kernels and their precision differ."""
ERROR_OF_ONE_PICTURE = 0.02
"""Taken for the standard error where there is one picture only."""


@dataclass(frozen=True)
class Effort:
    """How many held-out and how many training pictures are asked about, and at which places of the noise schedule."""

    pictures: int
    levels: tuple[float, ...]


QUICK, STANDARD, THOROUGH = "quick", "standard", "thorough"
EFFORTS = {
    QUICK: Effort(2, VALIDATION_PLACES),
    STANDARD: Effort(4, VALIDATION_PLACES),
    THOROUGH: Effort(8, (0.10, 0.25, 0.40, 0.55, 0.70, 0.85)),
}


@dataclass(frozen=True)
class Score:
    """What was measured of a LoRA file, or of the base, with which files are compared.

    `held_out` and `training` are losses by picture and noise level, empty where there are no such pictures; `effect`
    is the Frobenius norm of all that the file changes about the weights. A file that cannot be used says why in a few
    words in `broken`, such as "it cannot be read", and has no losses.
    """

    held_out: Validation = field(default_factory=list)
    training: Validation = field(default_factory=list)
    effect: float | None = None
    broken: str = ""


@dataclass(frozen=True)
class Scored:
    """A checkpoint and its score."""

    checkpoint: Checkpoint
    score: Score


def differences(values: Validation, base: Validation) -> list[float]:
    """D of each picture; below zero is better than the base, and exactly 0 is as good."""
    return [
        statistics.fmean(math.log(level / base_level) for level, base_level in zip(levels, base_levels, strict=True))
        for levels, base_levels in zip(values, base, strict=True)
    ]


def mean_difference(values: Validation, base: Validation) -> float:
    """H or T: the mean of D over the pictures."""
    return statistics.fmean(differences(values, base))


def percent_better(values: Validation, base: Validation) -> float:
    """How much lower the losses are than the base model's, in percent; negative when they are higher."""
    return percent_of(mean_difference(values, base))


def percent_of(mean: float) -> float:
    """H or T as how much lower the losses are than the base model's, in percent."""
    return 100 * (1 - math.exp(mean))


def standard_error(some: list[float], others: list[float]) -> float:
    """Of the mean paired difference between two lists of D, over pictures."""
    if len(others) < 2:
        return ERROR_OF_ONE_PICTURE
    return statistics.stdev(a - b for a, b in zip(some, others, strict=True)) / math.sqrt(len(others))


def is_proper(values: Validation | None) -> bool:
    """Whether there are losses, and all of them are proper numbers."""
    return bool(values) and all(0 < level < math.inf for levels in values for level in levels)


def comparable(values: Validation | None, base: Validation | None) -> bool:
    """Whether the losses answer the question that the base was asked."""
    return is_proper(values) and is_proper(base) and [len(levels) for levels in values] == [len(o) for o in base]


def agree(values: Validation | None, others: Validation | None) -> bool:
    """Whether two measurements of one model are of the same pictures, captions and levels, judged by their losses."""
    return comparable(values, others) and all(
        math.isclose(a, b, rel_tol=LARGEST_DISAGREEMENT)
        for some, more in zip(values, others, strict=True)
        for a, b in zip(some, more, strict=True)
    )


def leak(score: Score, without: Score, base: Score, base_without: Score) -> float | None:
    """tau = 1 - H'/H, H' being the gain with the trigger word taken out of the captions, for the base as well.

    1: nothing is learned without the word; near 0: the LoRA works without it, and so will leak into every picture.
    None where no gain was measured.
    """
    for part in ("held_out", "training"):
        some = [getattr(other, part) for other in (score, base, without, base_without)]
        if all(map(is_proper, some)):
            gain = mean_difference(some[0], some[1])
            return 1 - mean_difference(some[2], some[3]) / gain if gain < 0 else None
    return None


def without_words(caption: str, words: Iterable[str]) -> str:
    """The caption without these words, whole and in any case, and without the commas and spaces they leave behind."""
    for word in sorted(filter(None, (word.strip() for word in words)), key=len, reverse=True):
        caption = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", caption, flags=re.IGNORECASE)
    caption = re.sub(r"\s*,(\s*,)+", ",", caption)
    return re.sub(r"\s+", " ", re.sub(r"\s+([,.])", r"\1", caption)).strip(" ,")
