"""What a training hands on: its LoRA files, each with what is known about it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .dataset import Dataset

EMA = "EMA"
Validation = list[list[float]]
"""Loss per held-out picture and noise level."""


@dataclass(frozen=True)
class Checkpoint:
    """A written LoRA file: after which step, where, its training loss since the one before, and its validation.

    `average` says of what the file is an average, "EMA" or "last 3"; it is empty for the weights as trained.
    """

    step: int
    path: str
    lora_name: str
    loss: float | None = None
    validation: Validation | None = None
    average: str = ""

    @property
    def label(self) -> str:
        """What it is called beside others: "step 1,400", "step 1,400, EMA" or "the average of the last 3"."""
        if self.average.startswith("last "):
            return f"the average of the {self.average}"
        return f"step {self.step:,}" + (f", {self.average}" if self.average else "")

    @property
    def heading(self) -> str:
        """The same where there is little room: "step 1,400", "step 1,400, EMA" or "last 3"."""
        return self.average if self.average.startswith("last ") else self.label


@dataclass(frozen=True)
class Checkpoints:
    """What the Trainer hands to the Picker: the files of one run, in order, and the untrained base's validation."""

    name: str
    folder: str
    trigger_word: str
    entries: tuple[Checkpoint, ...]
    base_validation: Validation | None = None
    averages: tuple[Checkpoint, ...] = ()
    dataset: Dataset | None = None
    """What they were trained on, where that is known."""


def mean_of(validation: Validation) -> float:
    """The mean over all pictures and noise levels."""
    return statistics.fmean(level for picture in validation for level in picture)
