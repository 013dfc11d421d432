"""Every setting with its default, and the rule that makes it valid. A typo is an error, never a silent default."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .families import ATTENTION_AND_FEED_FORWARD, LAYER_PRESETS
from .schedule import CONSTANT, SCHEDULES


@dataclass(frozen=True)
class LoraConfig:
    """What is added to the model. `alpha` 0 means "the same as rank", which makes the scale alpha / rank 1."""

    rank: int = 16
    alpha: float = 0.0
    layers: str = ATTENTION_AND_FEED_FORWARD

    def __post_init__(self) -> None:
        _within("rank", self.rank, 1, 1024)
        _within("alpha", self.alpha, 0, 1024)
        one_of("layers", self.layers, LAYER_PRESETS)

    @property
    def scale(self) -> float:
        """alpha / rank, the factor on every adapter (Hu et al. 2021, section 4.1)."""
        return (self.alpha or self.rank) / self.rank


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. `steps` counts optimizer steps; `learning_rate` is the peak of the schedule."""

    steps: int = 1000
    learning_rate: float = 1e-4
    batch_size: int = 1
    accumulation: int = 1
    schedule: str = CONSTANT
    warmup: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _within("steps", self.steps, 1, 1_000_000)
        _within("learning_rate", self.learning_rate, 1e-8, 10.0)
        _within("batch_size", self.batch_size, 1, 256)
        _within("accumulation", self.accumulation, 1, 1024)
        _within("warmup", self.warmup, 0, 1_000_000)
        _within("weight_decay", self.weight_decay, 0, 10.0)
        _within("clip_norm", self.clip_norm, 0, 1000.0)
        one_of("schedule", self.schedule, SCHEDULES)

    def identity(self) -> dict[str, object]:
        """All that decides the weights at a given step: everything but how many steps there are.

        A cosine schedule is the exception, because there the number of steps bends every learning rate.
        """
        settings = asdict(self)
        if self.schedule == CONSTANT:
            del settings["steps"]
        return settings


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must be between {low} and {high}.")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError naming the setting when its value is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} is '{value}', but must be one of {', '.join(map(repr, choices))}.")
