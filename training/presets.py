"""What is derived when the user leaves a setting at 0: from the purpose, the family and the number of pictures."""

from __future__ import annotations

from dataclasses import dataclass

from .config import LoraConfig, TrainConfig, one_of
from .families import ATTENTION_AND_FEED_FORWARD, Family
from .schedule import CONSTANT

AUTOMATIC, ON, OFF = "automatic", "on", "off"
PRECISIONS = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Preset:
    """One purpose: how often each picture is seen, within which limits, and how much room the LoRA gets."""

    passes: int
    fewest_steps: int
    most_steps: int
    rank: int


PRESETS = {
    "character": Preset(passes=100, fewest_steps=800, most_steps=3000, rank=16),
    "object": Preset(passes=80, fewest_steps=600, most_steps=2500, rank=16),
    "style": Preset(passes=40, fewest_steps=1000, most_steps=6000, rank=32),
    "concept": Preset(passes=60, fewest_steps=1000, most_steps=5000, rank=16),
}

LEARNING_RATES = {"sdxl": 1e-4, "flux": 1e-4}


@dataclass(frozen=True)
class ExpertSettings:
    """The knobs of the Training Settings node; the defaults are what a run without that node uses."""

    layers: str = ATTENTION_AND_FEED_FORWARD
    alpha: float = 0.0
    batch_size: int = 1
    accumulation: int = 1
    schedule: str = CONSTANT
    warmup: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    checkpointing: str = AUTOMATIC
    save_precision: str = "fp16"

    def __post_init__(self) -> None:
        one_of("checkpointing", self.checkpointing, (AUTOMATIC, ON, OFF))
        one_of("save_precision", self.save_precision, PRECISIONS)


@dataclass(frozen=True)
class Plan:
    """A run with nothing left to derive."""

    lora: LoraConfig
    train: TrainConfig
    save_every: int

    def __str__(self) -> str:
        return (
            f"{self.train.steps} steps at learning rate {self.train.learning_rate:g}, rank {self.lora.rank}, "
            f"alpha {self.lora.alpha or self.lora.rank:g}, {self.lora.layers}, batch {self.train.batch_size}"
            + (f" x {self.train.accumulation}" if self.train.accumulation > 1 else "")
            + f", a checkpoint every {self.save_every} steps"
        )


def plan(
    preset: str,
    family: Family,
    pictures: int,
    settings: ExpertSettings,
    *,
    steps: int = 0,
    learning_rate: float = 0.0,
    rank: int = 0,
    save_every: int = 0,
    seed: int = 0,
    regularization: int = 0,
) -> Plan:
    """The run for `pictures` pictures; 0 derives a value from the preset. ValueError names what is out of range.

    Pictures for `regularization` take steps of their own, so that each of the others is still seen as often.
    """
    one_of("preset", preset, tuple(PRESETS))
    purpose = PRESETS[preset]
    per_step = settings.batch_size * settings.accumulation
    derived = min(max(purpose.passes * pictures, purpose.fewest_steps), purpose.most_steps)
    derived = derived * (pictures + regularization) // max(1, pictures) // max(1, per_step)
    train = TrainConfig(
        steps=steps or max(1, derived),
        learning_rate=learning_rate or LEARNING_RATES[family.name],
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        schedule=settings.schedule,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        seed=seed,
    )
    lora = LoraConfig(rank=rank or purpose.rank, alpha=settings.alpha, layers=settings.layers)
    if save_every < 0:
        raise ValueError(f"save_every is {save_every}, but must be 0 (derive it) or more.")
    return Plan(lora, train, save_every or rounded(train.steps / 10))


def rounded(value: float) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50, 100, ... so that checkpoints fall on numbers people can read."""
    choices = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
    return min(choices, key=lambda choice: abs(choice - value))
