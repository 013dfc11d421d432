"""What a user should know about a plan before it is trained: a sentence for what works but is seldom meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from .batches import in_turns
from .config import (
    DORA,
    LOHA,
    LOKR,
    LORA,
    OFT,
    PRODIGY,
    SCHEDULE_FREE,
    LoraConfig,
    ObjectiveConfig,
    TextConfig,
    TrainConfig,
)
from .dataset import REGULARIZATION, Dataset
from .identity import idle
from .schedule import warmup_steps

LEAST_SCALE, MOST_SCALE = 1 / 4, 2.0
"""Beyond these the learning rate of scale 1 learns next to nothing, or wildly."""
CALLED = {"encoder_stop": "text_encoder_stop"}
"""What the node calls settings that have another name in a configuration."""
LEAST_FILL = 0.7
"""How full batches must be on average so that nothing is said about them."""


def notes_on(lora: LoraConfig, train: TrainConfig, *, derived_rate: bool = False) -> tuple[str, ...]:
    """What is odd about the settings themselves; `derived_rate` says that the learning rate is not the user's."""
    notes, rate, prodigy = [], train.learning_rate, train.optimizer == PRODIGY
    if prodigy and rate < 0.1:
        notes.append(
            f"Prodigy finds the learning rate itself and multiplies it with yours: {rate:g} makes it "
            "learn next to nothing, 1 is usual."
        )
    if not prodigy and rate > 0.1:
        notes.append(f"Learning rate {rate:g} is for Prodigy; {train.optimizer} takes about 0.0001.")
    if train.optimizer == SCHEDULE_FREE and train.ema:
        notes.append("schedule-free averages the weights itself: ema averages its averages.")
    scale = _scale(lora)
    if derived_rate and not prodigy and not LEAST_SCALE < scale < MOST_SCALE:
        notes.append(
            f"alpha and rank make changes {scale:.3g} times as large, and the learning rate is derived for 1: "
            f"{rate / scale:.2g} would learn about as fast."
        )
    if lora.kind == LOKR and not lora.lokr_factor and (lora.alpha or lora.rank_stabilized):
        notes.append(
            "alpha and rank_stabilized have no effect on a LoKr whose lokr_factor is 0, since its factors are whole."
        )
    if lora.kind == OFT and train.weight_decay == TrainConfig.weight_decay:
        notes.append(f"OFT turns more of the model than it has to at weight_decay {train.weight_decay:g}: -1 suits it.")
    if lora.kind == OFT and lora.alpha:
        notes.append(f"alpha {lora.alpha:g} limits how far an OFT may turn the model: 0 sets no limit.")
    notes += _notes_on_idle(lora, train)
    if train.steps <= warmup_steps(train.warmup, train.steps):
        notes.append(f"The warm-up takes all {train.steps} steps: make it shorter.")
    if train.text.encoder_rate and not train.text.encoder_stop:
        notes.append("text_encoder_stop is 0, so the text encoders are not trained.")
    return tuple(notes)


def notes_on_pictures(dataset: Dataset, train: TrainConfig) -> tuple[str, ...]:
    """What is odd about the steps and batches for these pictures."""
    notes = [*_notes_on_masks(dataset, train.objective)]
    shown, there = dataset.shares
    if there > shown:
        notes.append(f"{there} regularization pictures take turns: {shown} in each round, as many as of the others.")
    pictures, batches = epoch_of(dataset, train.batch_size)
    seen = train.steps * train.accumulation / batches
    if pictures / batches < LEAST_FILL * train.batch_size:
        notes.append(
            f"Batches hold {pictures / batches:.2g} pictures on average instead of {train.batch_size}, as few have the "
            f"same size: {train.steps} steps show each {seen:.3g} times."
        )
    elif seen < 1:
        notes.append(f"{train.steps} steps show {seen:.0%} of the pictures: ask for more to show all of them.")
    return tuple(notes)


def _notes_on_idle(lora: LoraConfig, train: TrainConfig) -> Iterator[str]:
    """What was set and changes nothing, because of what else was set."""
    values = {**asdict(lora), **asdict(train.text), **asdict(train.objective), **asdict(train)}
    usual = {**asdict(LoraConfig()), **asdict(TextConfig()), **asdict(ObjectiveConfig()), **asdict(TrainConfig())}
    names = [name for name in idle(asdict(lora), asdict(train)) if values[name] != usual[name]]
    if names:
        told = ", ".join(CALLED.get(name, name) for name in names)
        yield f"Without effect beside the other settings: {told}."


def _notes_on_masks(dataset: Dataset, objective: ObjectiveConfig) -> Iterator[str]:
    if objective.mask_floor and any(example.fill_masked for example in dataset.examples):
        yield f"What fill_masked paints is learned too, at mask_floor {objective.mask_floor:g}: 0 suits it."
    if objective.mask_preservation and not any(example.mask for example in dataset.examples):
        yield "mask_preservation does nothing here, as no picture that is trained on has a mask."


def _scale(lora: LoraConfig) -> float:
    """The factor on a layer of the rank itself, for kinds in which alpha is one."""
    if lora.kind not in (LORA, DORA, LOHA):
        return 1.0
    return lora.alpha_for(lora.rank) / lora.rank


def epoch_of(dataset: Dataset, batch_size: int) -> tuple[int, int]:
    """How many pictures and batches an epoch has, as `Batches` makes them."""
    own, others = Counter(), Counter()
    for example in dataset.examples:
        for size in dataset.sizes_of(example):
            (others if example.role == REGULARIZATION else own)[size] += example.repeats
    totals = own.total(), others.total()
    counts = [own[size] + in_turns(others[size], *totals) for size in {**own, **others}]
    return sum(counts), sum(-(-count // batch_size) for count in counts)
