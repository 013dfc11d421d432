"""What is derived when the user leaves a setting at 0: from the purpose and the number of pictures.

Where the numbers come from. Every trainer and guide that was compared states its learning rate together with rank and
alpha, so rates are put here as rate x alpha / rank, what an adapter of scale 1 would be given:

    learning rate    1e-4   ai-toolkit (FLUX, 16 / 16), diffusers (SDXL, FLUX), FluxTrainer; kohya's SDXL guide and
                            OneTrainer lie below, at 5e-5 and 2e-5. No source tells the families apart.
    rank 16, alpha = rank   one subject. kohya and ai-toolkit use 16 for FLUX; alpha = rank because files then have the
                            same strength in every tool.
    rank 32                 styles, kohya's for SDXL: a style touches every layer.
    steps                   100 passes over each picture of a character make 20 pictures 2,000 steps, ai-toolkit's
                            number; the limits enclose kohya's default of 1,600. Styles come with more pictures and
                            are seen less often each; concepts lie between. Never fewer than 200: in 18 steps of 192
                            pictures the toy world's concept was not learned, though each was seen as often.
    constant rate           every trainer's default. It lets a run be extended, and the Picker chooses where to stop.
    no average (EMA)        off in every trainer; "average of the last K" and `ema` are there to be switched on.
    noise levels            those of the family (timesteps.py), for every purpose: more of low noise for a style, as
                            ai-toolkit's "style" has it, learned colour and shape half as surely (docs/benchmarks.md).
    batches                 a step over n pictures is n times fewer steps at sqrt(n) times the rate, which fits small
                            batches better than n times (spacepxl, demystifying-sd-finetuning); at most 16 times fewer
                            at 4 times the rate. n is what batches really hold: few pictures may have the same size.
    8 to 18 checkpoints     each with previews and validation, on numbers people can read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from .config import (
    ADAFACTOR,
    ADAMW,
    ADAMW_8BIT,
    LION,
    LOHA,
    LOKR,
    LORA,
    MOST_STEPS,
    OFT,
    PRODIGY,
    SCHEDULE_FREE,
    LoraConfig,
    ObjectiveConfig,
    TextConfig,
    TrainConfig,
    one_of,
    within,
)
from .families import ATTENTION_AND_FEED_FORWARD
from .optimizer import require
from .plan_notes import notes_on
from .schedule import CONSTANT, warmup_steps

AUTOMATIC, ON, OFF, EVERY_SECOND = "automatic", "on", "off", "every second block"
CHECKPOINTING = (AUTOMATIC, ON, OFF, EVERY_SECOND)
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

LEARNING_RATE = 1e-4
"""Of AdamW, at scale alpha / rank = 1 and one picture a step."""

FEWEST_STEPS, MOST_AT_ONCE = 200, 16
"""Steps that any training needs, however many pictures each of them sees; pictures a step beyond which neither steps
nor rate change."""

OPTIMIZER_RATES = {
    ADAMW: 1.0,
    ADAMW_8BIT: 1.0,
    ADAFACTOR: 1.0,
    LION: 1 / 3,
    SCHEDULE_FREE: 2.0,
}
"""Factors on the learning rate. Lion's steps are larger, 3 to 10 times (Chen et al. 2023, section 5); schedule-free
takes 1 to 10 times AdamW's rate (Defazio et al. 2024). Prodigy finds the rate itself and is given 1."""

KIND_RATES = {LOHA: 2.0}
"""Factors on the learning rate. A LoHa's change is a product of more small numbers, so it grows more slowly: measured
on the toy world (docs/benchmarks.md)."""

KIND_DECAYS, KIND_STEPS = {OFT: 4.0}, {OFT: 2}
"""Weight decay where the usual one does not suit, and factors on the derived steps. AdamW turns all planes of an OFT at
one pace, also those of which the pictures say nothing. Decay turns these back; then learning takes longer
(docs/benchmarks.md)."""

PRESERVED_STEPS = 0.5
"""The share that preservation adds to the derived steps at weight 1 and above, in proportion below. It takes back some
of what each step teaches, so that the concept comes later (docs/benchmarks.md)."""


@dataclass(frozen=True)
class ExpertSettings:
    """The knobs of the Training Settings node; the defaults are what a run without that node uses.

    Names that a configuration has too (`LoraConfig`, `ObjectiveConfig`, `TrainConfig`) mean the same there.
    """

    layers: str = ATTENTION_AND_FEED_FORWARD
    alpha: float = 0.0
    batch_size: int = 1
    accumulation: int = 1
    schedule: str = CONSTANT
    warmup: float = 0.0
    checkpointing: str = AUTOMATIC
    weight_decay: float = -1.0
    """Below 0 is what suits the kind."""
    clip_norm: float = 1.0
    save_precision: str = "fp16"

    kind: str = LoraConfig.kind
    optimizer: str = TrainConfig.optimizer
    text_encoder_rate: float = TextConfig.encoder_rate
    text_encoder_stop: float = TextConfig.encoder_stop
    new_tokens: int = TextConfig.new_tokens
    token_rate: float = TextConfig.token_rate

    rank_stabilized: bool = LoraConfig.rank_stabilized
    conv_rank: int = LoraConfig.conv_rank
    include: str = LoraConfig.include
    exclude: str = LoraConfig.exclude
    ranks: str = LoraConfig.ranks
    rates: str = TrainConfig.rates
    dropout: float = LoraConfig.dropout
    max_norm: float = LoraConfig.max_norm

    restarts: int = TrainConfig.restarts
    lora_plus: float = TrainConfig.lora_plus
    ema: float = TrainConfig.ema
    average_last: int = 0
    """The mean of that many last checkpoints is written too; 0 and 1 write none."""

    timesteps: str = ObjectiveConfig.timesteps
    timestep_shift: float = ObjectiveConfig.timestep_shift
    timestep_mean: float = ObjectiveConfig.timestep_mean
    timestep_std: float = ObjectiveConfig.timestep_std
    timestep_low: float = ObjectiveConfig.timestep_low
    timestep_high: float = ObjectiveConfig.timestep_high
    stratify: int = ObjectiveConfig.stratify

    loss: str = ObjectiveConfig.loss
    huber_c: float = ObjectiveConfig.huber_c
    huber_schedule: str = ObjectiveConfig.huber_schedule
    min_snr_gamma: float = ObjectiveConfig.min_snr_gamma
    debiased: bool = ObjectiveConfig.debiased
    noise_offset: float = ObjectiveConfig.noise_offset
    multires_iterations: int = ObjectiveConfig.multires_iterations
    multires_discount: float = ObjectiveConfig.multires_discount
    input_perturbation: float = ObjectiveConfig.input_perturbation
    mask_floor: float = ObjectiveConfig.mask_floor
    preservation: float = ObjectiveConfig.preservation
    class_words: str = ObjectiveConfig.class_words

    preview_every: int = 0
    """Steps between two rows of previews, rounded to checkpoints; 0 draws them at every checkpoint."""
    validate_every: int = 0
    """Steps between two validations; 0 validates at every checkpoint."""

    offload: float = -1.0
    """The share of the model's weights that is streamed to the device instead of kept there; -1 is automatic."""

    lokr_factor: int = LoraConfig.lokr_factor

    mask_preservation: float = ObjectiveConfig.mask_preservation

    def __post_init__(self) -> None:
        one_of("checkpointing", self.checkpointing, CHECKPOINTING)
        one_of("save_precision", self.save_precision, PRECISIONS)
        within("average_last", self.average_last, 0, 100)
        within("preview_every", self.preview_every, 0, 1_000_000)
        within("validate_every", self.validate_every, 0, 1_000_000)
        if self.offload != -1:
            within("offload", self.offload, 0, 1)

    def part(self, config: type, **more: object) -> object:
        """A configuration made of the settings it shares names with, and of `more`."""
        shared = {field.name for field in fields(config)} & {field.name for field in fields(self)}
        return config(**{name: getattr(self, name) for name in shared} | more)


@dataclass(frozen=True)
class Plan:
    """A run with nothing left to derive. It says itself in short lines."""

    lora: LoraConfig
    train: TrainConfig
    save_every: int
    preview_every: int
    validate_every: int
    average_last: int = 0
    notes: tuple[str, ...] = ()
    """What the user should know about the chosen combination."""

    def __str__(self) -> str:
        train, lora, objective, text = self.train, self.lora, self.train.objective, self.train.text
        lines = [
            f"{train.steps} steps at learning rate {train.learning_rate:g}, {_room(lora)}, {lora.layers}, "
            f"batch {train.batch_size}"
            + (f" x {train.accumulation}" if train.accumulation > 1 else "")
            + f", a checkpoint every {self.save_every} steps",
            f"{lora.kind}, {train.optimizer}{_pulled(train)}, {_schedule(train)}, noise levels {objective.timesteps}, "
            f"loss {objective.loss}, previews every {self.preview_every} steps, "
            + (f"validation every {self.validate_every}, " if self.validate_every != self.save_every else "")
            + (f"averaged with decay {train.ema:g}" if train.ema else "no average"),
        ]
        if text.encoder_rate or text.new_tokens:
            lines.append(_text(text))
        return "\n".join([*lines, *self.notes])


def plan(
    preset: str,
    pictures: int,
    settings: ExpertSettings,
    *,
    steps: int = 0,
    learning_rate: float = 0.0,
    rank: int = 0,
    save_every: int = 0,
    seed: int = 0,
    regularization: int = 0,
    fill: float = 0.0,
) -> Plan:
    """The run for `pictures` pictures; 0 derives a value from the preset.

    ValueError names what is out of range or cannot go together, or the Python package that the optimizer lacks.

    Pictures for `regularization`, as many as come while each of the others comes once, take steps of their own, so
    that each of the others is still seen as often. `fill` is how many pictures a batch holds on average, 0 for as many
    as `batch_size` says.
    """
    one_of("preset", preset, tuple(PRESETS))
    purpose = PRESETS[preset]
    per_step = max(1.0, (fill or settings.batch_size) * settings.accumulation)
    derived = min(max(purpose.passes * pictures, purpose.fewest_steps), purpose.most_steps)
    derived = round(derived * KIND_STEPS.get(settings.kind, 1) * (1 + PRESERVED_STEPS * min(1, settings.preservation)))
    derived = derived * (pictures + regularization) // max(1, pictures)
    derived = max(int(derived / min(per_step, MOST_AT_ONCE)), min(derived, FEWEST_STEPS))
    train = settings.part(
        TrainConfig,
        steps=steps or min(derived, MOST_STEPS),
        learning_rate=learning_rate or derived_rate(settings.optimizer, per_step, settings.kind),
        weight_decay=_decay(settings),
        seed=seed,
        objective=settings.part(ObjectiveConfig),
        text=settings.part(
            TextConfig, encoder_rate=settings.text_encoder_rate, encoder_stop=settings.text_encoder_stop
        ),
    )
    require(train.optimizer)
    lora = settings.part(LoraConfig, rank=rank or purpose.rank)
    if lora.max_norm and train.optimizer == SCHEDULE_FREE:
        raise ValueError(
            f"max_norm is {lora.max_norm:g}, but optimizer '{SCHEDULE_FREE}' trains at another point than the one that "
            "is limited: set max_norm to 0 or choose another optimizer."
        )
    if save_every < 0:
        raise ValueError(f"save_every is {save_every}, but must be 0 (derive it) or more.")
    every = save_every or rounded(train.steps / 10)
    return Plan(
        lora,
        train,
        every,
        preview_every=every * max(1, round(settings.preview_every / every)),
        validate_every=settings.validate_every or every,
        average_last=settings.average_last,
        notes=notes_on(lora, train, derived_rate=not learning_rate),
    )


def derived_rate(optimizer: str, per_step: float, kind: str = LORA) -> float:
    """The learning rate when the user gives none, for steps over `per_step` pictures."""
    if optimizer == PRODIGY:
        return 1.0
    one_of("optimizer", optimizer, (*OPTIMIZER_RATES, PRODIGY))
    rate = (
        LEARNING_RATE * OPTIMIZER_RATES[optimizer] * KIND_RATES.get(kind, 1.0) * math.sqrt(min(per_step, MOST_AT_ONCE))
    )
    return float(f"{rate:.2g}")


def _decay(settings: ExpertSettings) -> float:
    if settings.weight_decay >= 0:
        return settings.weight_decay
    return KIND_DECAYS.get(settings.kind, TrainConfig.weight_decay)


def fitted(
    plan: Plan,
    minutes: float,
    seconds_per_step: float,
    seconds_per_save: float,
    *,
    seconds_per_validation: float = 0.0,
    seconds_once: float = 0.0,
    done: int = 0,
) -> Plan:
    """The plan cut to the steps that fit into `minutes`, its warm-up and intervals in proportion; never longer.

    Steps that are `done` already take no time. Checkpoints, with their previews and validation, get a quarter of the
    time at most, and so do validations between them; `seconds_once` pass in any case. ValueError when `minutes` is too
    short for one step and one checkpoint.
    """
    seconds, whole = 60 * minutes - seconds_once, plan.train.steps - done
    if seconds_per_step + seconds_per_save > seconds:
        raise ValueError(
            f"stop_after is {minutes:g} minutes, but one step and one checkpoint take "
            f"{(seconds_once + seconds_per_step + seconds_per_save) / 60:.1f} minutes: allow more time."
        )
    saves = -(-whole // plan.save_every)
    between = whole // plan.validate_every if plan.validate_every != plan.save_every else 0
    beside = saves * seconds_per_save + between * seconds_per_validation
    if whole * seconds_per_step + beside <= seconds:
        return plan
    saves = max(1, min(saves, int(seconds / 4 // max(seconds_per_save, 1e-9))))
    between = min(between, int(seconds / 4 // max(seconds_per_validation, 1e-9)))
    left = seconds - saves * seconds_per_save
    between = between if left - between * seconds_per_validation >= seconds_per_step else 0
    steps = min(whole, max(1, int((left - between * seconds_per_validation) / seconds_per_step)))
    every = -(-steps // saves)
    ratio = (done + steps) / plan.train.steps
    return replace(
        plan,
        train=replace(plan.train, steps=done + steps, warmup=_in_proportion(plan.train.warmup, ratio)),
        save_every=every,
        preview_every=every * max(1, round(plan.preview_every / plan.save_every)),
        validate_every=-(-steps // between) if between else every,
        notes=(*plan.notes, f"{steps} of {whole} steps fit into {minutes:g} minutes."),
    )


def _in_proportion(warmup: float, ratio: float) -> float:
    return warmup if warmup < 1 else max(1, round(warmup * ratio))


def _room(lora: LoraConfig) -> str:
    """The rank, and what else says how an adapter of this kind is made."""
    limit = f", alpha {lora.alpha:g}" if lora.alpha else ""
    others = {OFT: limit, LOKR: f", lokr_factor {lora.lokr_factor}{limit}" if lora.lokr_factor else ""}
    return f"rank {lora.rank}" + others.get(lora.kind, f", alpha {lora.alpha or lora.rank:g}")


def _schedule(train: TrainConfig) -> str:
    rising = warmup_steps(train.warmup, train.steps)
    times = f" x {train.restarts}" if "restarts" in train.schedule else ""
    return f"{train.schedule}{times}" + (f" after {rising} steps of warm-up" if rising else "")


def _pulled(train: TrainConfig) -> str:
    usual = train.weight_decay == TrainConfig.weight_decay
    return "" if usual else f" with weight decay {train.weight_decay:g}"


def _text(text: TextConfig) -> str:
    parts = []
    if text.encoder_rate:
        until = f" for the first {text.encoder_stop:.0%}" if text.encoder_stop < 1 else ""
        parts.append(f"text encoders at {text.encoder_rate:g} times the learning rate{until}")
    if text.new_tokens:
        parts.append(f"{text.new_tokens} new tokens at {text.token_rate:g} times")
    return ", ".join(parts)


def rounded(value: float) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50, 100, ... so that checkpoints fall on numbers people can read."""
    choices = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
    return min(choices, key=lambda choice: abs(choice - value))
