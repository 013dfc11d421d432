"""Every setting with its default, and the rule that makes it valid. A typo is an error, never a silent default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from .families import ATTENTION_AND_FEED_FORWARD, LAYER_PRESETS
from .patterns import overrides, patterns
from .schedule import CONSTANT, SCHEDULES

HIGHEST_RANK, HIGHEST_RATE, MOST_STEPS = 1024, 1000, 1_000_000
LORA, DORA, LOHA, LOKR, OFT = "lora", "dora", "loha", "lokr", "oft"
KINDS = (LORA, DORA, LOHA, LOKR, OFT)
L2, HUBER, SMOOTH_L1 = "l2", "huber", "smooth l1"
LOSSES = (L2, HUBER, SMOOTH_L1)
HUBER_SCHEDULES = ("snr", "exponential", "constant")
AUTOMATIC = "automatic"
UNIFORM, LOGIT_NORMAL, SHIFT, RESOLUTION_SHIFT = "uniform", "logit-normal", "shift", "resolution shift"
CONTENT, STYLE = "content", "style"
TIMESTEPS = (AUTOMATIC, UNIFORM, LOGIT_NORMAL, SHIFT, RESOLUTION_SHIFT, CONTENT, STYLE)
ADAMW, ADAMW_8BIT, ADAFACTOR, PRODIGY, LION = "adamw", "adamw 8-bit", "adafactor", "prodigy", "lion"
SCHEDULE_FREE = "schedule-free"
OPTIMIZERS = (ADAMW, ADAMW_8BIT, ADAFACTOR, PRODIGY, LION, SCHEDULE_FREE)


@dataclass(frozen=True)
class LoraConfig:
    """What is added to the model. `alpha` 0 means "the same as rank", which makes the scale alpha / rank 1."""

    rank: int = 16
    alpha: float = 0.0
    layers: str = ATTENTION_AND_FEED_FORWARD
    kind: str = LORA
    rank_stabilized: bool = False
    """The scale is alpha / sqrt(rank) (Kalajdzievski 2023); files say it as an alpha that every loader reads right."""
    conv_rank: int = 0
    """The rank of adapters on 3 x 3 convolutions; 0 leaves them alone."""
    include: str = ""
    """A pattern per line: layers that are adapted beside those of `layers`."""
    exclude: str = ""
    """A pattern per line: layers that are not adapted."""
    ranks: str = ""
    """`pattern = rank` per line, the last that matches a layer wins; 0 leaves the layer alone."""
    dropout: float = 0.0
    max_norm: float = 0.0
    """The largest Frobenius norm a layer's change may have; 0 sets no limit."""
    lokr_factor: int = 0
    """Of kind "lokr": how many parts a layer's sides are divided into at most, -1 near their square root; 0 gives the
    adapter as much room as a LoRA of the rank has, or less where its sides cannot be divided so."""

    def __post_init__(self) -> None:
        within("rank", self.rank, 1, HIGHEST_RANK)
        within("alpha", self.alpha, 0, 1024)
        one_of("layers", self.layers, LAYER_PRESETS)
        one_of("kind", self.kind, KINDS)
        within("conv_rank", self.conv_rank, 0, HIGHEST_RANK)
        within("dropout", self.dropout, 0, 0.95)
        within("max_norm", self.max_norm, 0, 1e6)
        within("lokr_factor", self.lokr_factor, -1, HIGHEST_RANK)
        patterns(self.include, "include")
        patterns(self.exclude, "exclude")
        overrides(self.ranks, "ranks", HIGHEST_RANK, whole=True)

    def alpha_for(self, rank: int) -> float:
        """The alpha of adapters of this rank: the setting, 0 meaning the rank, and sqrt(rank) times it if stabilized.

        A loader divides by the rank, so alpha sqrt(rank) gives the alpha / sqrt(rank) of Kalajdzievski 2023.
        """
        alpha = float(self.alpha or rank)
        return alpha * math.sqrt(rank) if self.rank_stabilized else alpha


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network is asked, and how its answer is judged (docs of each term in timesteps.py and losses.py)."""

    loss: str = L2
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    min_snr_gamma: float = 0.0
    debiased: bool = False
    noise_offset: float = 0.0
    multires_iterations: int = 0
    multires_discount: float = 0.3
    input_perturbation: float = 0.0
    timesteps: str = AUTOMATIC
    timestep_shift: float = 3.0
    """Of timesteps "shift"."""
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    """Of timesteps "logit-normal"."""
    timestep_low: float = 0.0
    timestep_high: float = 1.0
    """The range that is trained, as fractions of the schedule from clean to noise."""
    stratify: int = 0
    """How many noise levels in a row are spread evenly over the distribution; 0 draws each on its own."""
    mask_floor: float = 0.1
    """What counts outside a mask, where pictures have one."""
    preservation: float = 0.0
    """The weight of answering as the base model does when the trigger word is replaced by the class word."""
    class_words: str = ""
    """Of preservation: what the trigger word stands for, such as "woman"; empty takes them from the folder's name."""
    mask_preservation: float = 0.0
    """The weight of answering as the base model does outside a mask, where pictures have one."""

    def __post_init__(self) -> None:
        one_of("loss", self.loss, LOSSES)
        one_of("huber_schedule", self.huber_schedule, HUBER_SCHEDULES)
        one_of("timesteps", self.timesteps, TIMESTEPS)
        within("huber_c", self.huber_c, 1e-4, 10)
        within("min_snr_gamma", self.min_snr_gamma, 0, 100)
        within("noise_offset", self.noise_offset, 0, 1)
        within("multires_iterations", self.multires_iterations, 0, 16)
        within("multires_discount", self.multires_discount, 0, 1)
        within("input_perturbation", self.input_perturbation, 0, 1)
        within("timestep_shift", self.timestep_shift, 0.01, 100)
        within("timestep_std", self.timestep_std, 0.01, 10)
        within("timestep_mean", self.timestep_mean, -10, 10)
        within("timestep_low", self.timestep_low, 0, 1)
        within("timestep_high", self.timestep_high, 0, 1)
        if self.timestep_low >= self.timestep_high:
            raise ValueError(
                f"timestep_low is {self.timestep_low}, but must be below timestep_high, {self.timestep_high}."
            )
        within("stratify", self.stratify, 0, 10_000)
        within("mask_floor", self.mask_floor, 0, 1)
        within("preservation", self.preservation, 0, 100)
        within("mask_preservation", self.mask_preservation, 0, 100)


@dataclass(frozen=True)
class TextConfig:
    """What is trained in the text encoders. Rates are factors on the learning rate; 0 leaves that part alone."""

    encoder_rate: float = 0.0
    encoder_stop: float = 1.0
    """The fraction of the run after which the text encoders' adapters stay as they are."""
    new_tokens: int = 0
    """Token embeddings trained in place of the trigger word (pivotal tuning)."""
    token_rate: float = 1.0

    def __post_init__(self) -> None:
        within("encoder_rate", self.encoder_rate, 0, 10)
        within("encoder_stop", self.encoder_stop, 0, 1)
        within("new_tokens", self.new_tokens, 0, 32)
        within("token_rate", self.token_rate, 0, 1000)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. `steps` counts optimizer steps; `learning_rate` is the peak of the schedule."""

    steps: int = 1000
    learning_rate: float = 1e-4
    batch_size: int = 1
    accumulation: int = 1
    schedule: str = CONSTANT
    warmup: float = 0
    """Steps, or below 1 a fraction of all steps."""
    restarts: int = 1
    """Of schedule "cosine with restarts": how many cosines."""
    optimizer: str = ADAMW
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    lora_plus: float = 1.0
    """The factor on the learning rate of the up factors (Hayou et al. 2024)."""
    rates: str = ""
    """`pattern = factor` per line on the learning rate of layers, the last that matches wins."""
    ema: float = 0.0
    """The decay of the averaged copy of the adapters; 0 keeps none."""
    seed: int = 0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        within("steps", self.steps, 1, MOST_STEPS)
        within("learning_rate", self.learning_rate, 1e-8, 10.0)
        within("batch_size", self.batch_size, 1, 256)
        within("accumulation", self.accumulation, 1, 1024)
        within("warmup", self.warmup, 0, 1_000_000)
        within("restarts", self.restarts, 1, 1000)
        within("weight_decay", self.weight_decay, 0, 10.0)
        within("clip_norm", self.clip_norm, 0, 1000.0)
        within("lora_plus", self.lora_plus, 0.01, 1000)
        overrides(self.rates, "rates", HIGHEST_RATE)
        within("ema", self.ema, 0, 0.99999)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == SCHEDULE_FREE and self.schedule != CONSTANT:
            raise ValueError(
                f"schedule is '{self.schedule}', but optimizer '{SCHEDULE_FREE}' averages the weights instead of "
                f"lowering the learning rate: choose schedule '{CONSTANT}' or another optimizer."
            )
        if self.optimizer == PRODIGY and (self.lora_plus != 1 or self.rates.strip()):
            name = "lora_plus" if self.lora_plus != 1 else "rates"
            raise ValueError(
                f"{name} is '{getattr(self, name)}', but optimizer '{PRODIGY}' finds one learning rate for all "
                f"layers: leave {name} as it was or choose another optimizer."
            )
        own_rates = {"text_encoder_rate": self.text.encoder_rate or 1}
        own_rates |= {"token_rate": self.text.token_rate} if self.text.new_tokens else {}
        for name, rate in own_rates.items():
            if self.optimizer == PRODIGY and rate != 1:
                raise ValueError(
                    f"{name} is {rate:g}, but optimizer '{PRODIGY}' finds one learning rate for all that is trained: "
                    f"set {name} to 1, or choose another optimizer."
                )

    @property
    def bends_with_steps(self) -> bool:
        """Whether the learning rate of a step depends on how many steps there are."""
        stops = self.text.encoder_rate and 0 < self.text.encoder_stop < 1
        return self.schedule != CONSTANT or 0 < self.warmup < 1 or bool(stops)

    def identity(self) -> dict[str, object]:
        """All that decides the weights at a given step: everything but how many steps there are.

        A schedule that falls, a warm-up or a stop of the text encoders given as a fraction are the exception, because
        there the number of steps bends every learning rate.
        """
        settings = asdict(self)
        if not self.bends_with_steps:
            del settings["steps"]
        return settings


def within(name: str, value: float, low: float, high: float) -> None:
    """ValueError naming the setting when its value lies outside the range, ends included."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but must be between {low} and {high}.")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError naming the setting when its value is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} is '{value}', but must be one of {', '.join(map(repr, choices))}.")
