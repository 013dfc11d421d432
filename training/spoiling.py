"""Notices at once that training spoils the network: it answers the same questions far worse than before the first step.

A rise of the loss (endurance.py) needs healthy steps to be compared with, and a learning rate that is far too high
leaves none: the network is lost within ten steps, and its loss is steady from then on.
"""

from __future__ import annotations

import math
import statistics

from .run import Validation

CHECKED_AT = (10, 25, 50, 100)
"""Steps after which the questions are asked again."""
PICTURES = 2
"""How many training pictures are asked about, each at the noise levels of validation."""
MOST = math.log(2)


def spoilt(now: Validation, before: Validation) -> str:
    """A sentence where losses with the same noise are more than twice what they were (geometric mean), else nothing."""
    pairs = zip(sum(now, []), sum(before, []), strict=True)
    ratios = [math.log(new / old) for new, old in pairs if new > 0 and old > 0]
    rise = statistics.fmean(ratios) if ratios else 0.0
    if not MOST < rise < math.inf:
        return ""
    return (
        f"The loss on the same pictures and noise is {math.exp(rise):.1f} times what it was before training: "
        "learning_rate is too high."
    )
