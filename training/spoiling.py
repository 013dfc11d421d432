"""Notices at once that training spoils the network: it answers the same questions far worse than before the first step.

A rise of the loss (endurance.py) needs healthy steps to be compared with, and a learning rate that is far too high
leaves none: the network is lost within ten steps, and its loss is steady from then on.

The questions are such as training asks, noise and levels included: what is trained on another noise than the plain one
may well answer the plain one worse.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .objective import Objective

if TYPE_CHECKING:
    from .batches import Batch
    from .config import TrainConfig
    from .loop import Denoiser

CHECKED_AT = (10, 25, 50, 100)
"""Steps after which the questions are asked again."""
PICTURES, QUESTIONS = 2, 4
"""How many training pictures are asked about, and how often each."""
MOST = math.log(2)


def losses_of(denoiser: Denoiser, pictures: Sequence[Batch], config: TrainConfig) -> list[float]:
    """The losses of the same questions every time, from batches of one picture each, without dropout or preservation.

    One question at a time goes through the network, so a training step takes more memory.
    """
    objective = Objective(replace(config.objective, preservation=0, mask_preservation=0), config.seed)
    questions = [picture for picture in pictures for _ in range(QUESTIONS)]
    losses = []
    for number, picture in enumerate(questions):
        with denoiser.adapted(), torch.no_grad():
            question = objective.question(denoiser, picture, number)
            losses += next(objective.terms(denoiser, question)).tolist()
    return losses


def spoilt(now: Sequence[float], before: Sequence[float]) -> str:
    """A sentence where losses with the same noise are more than twice what they were (geometric mean), else nothing."""
    ratios = [math.log(new / old) for new, old in zip(now, before, strict=True) if new > 0 and old > 0]
    rise = statistics.fmean(ratios) if ratios else 0.0
    if not MOST < rise < math.inf:
        return ""
    return (
        f"The loss on the same pictures and noise is {math.exp(rise):.1f} times what it was before training: "
        "learning_rate is too high."
    )
