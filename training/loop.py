"""The training loop. Read this first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .batches import Batch
from .config import TrainConfig
from .ema import Average
from .lora import Adapters
from .objective import Objective
from .optimizer import forget_still, load_state, optimizer_for, set_learning_rate, state_of, training_weights
from .schedule import learning_rate

BROKEN_STEPS_ALLOWED = 2
"""A third step in a row without a finite loss and gradient ends the run."""


class Denoiser(Protocol):
    """A loaded model as training sees it."""

    prediction: str
    """"eps", "v" or "flow"."""
    sigmas: Tensor | None
    """The model's table of noise levels (eps, v), or None when they are continuous (flow)."""
    device: torch.device
    loss_scale: float
    """What the loss of a picture is multiplied with before backward, so that half-precision gradients do not vanish."""

    parts: int
    """In how many parts a batch goes through the network."""

    def adapted(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the adapters and gradients reach them; outside, it is as it was."""

    def base(self) -> AbstractContextManager[None]:
        """Within `adapted`: the network as it was, without gradients."""

    def text_of(self, batch: Batch) -> Sequence[dict[str, Tensor]]:
        """The text of each example, by the text encoders as they are now."""

    def __call__(
        self, noisy: Tensor, sigma: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]
    ) -> Tensor:
        """The raw answer of the network (B, C, h, w) for noisy latents at `sigma` (B,), each with its own text."""


@dataclass(frozen=True)
class Snapshot:
    """Everything needed to go on from a step, in memory of its own."""

    step: int
    weights: dict[str, Tensor]
    """What a file says."""
    optimizer: dict[str, Tensor]
    """All else that is needed to go on bit for bit."""
    ema: dict[str, Tensor] | None = None
    """The running average of the weights, where one is kept."""
    losses: dict[str, Tensor] | None = None
    """What a rise of the loss is measured against, where that is watched."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, done. `number` counts from 1; `loss` is NaN when the step was skipped as not finite."""

    number: int
    loss: float
    learning_rate: float
    skipped: bool
    norm: float = math.nan
    """Of the whole gradient, before it was limited."""
    sigmas: tuple[float, ...] = ()
    """The noise level of each picture,"""
    losses: tuple[float, ...] = ()
    """and its loss."""
    _taken: Callable[[int], Snapshot] | None = field(default=None, repr=False)

    def snapshot(self) -> Snapshot:
        """An owned copy of the state after this step; RuntimeError once the next step has begun to change it."""
        return self._taken(self.number)


def train(
    denoiser: Denoiser,
    batches: Sequence[Batch],
    adapters: Adapters,
    config: TrainConfig,
    resume: Snapshot | None = None,
    slowdown: float = 1.0,
) -> Iterator[Step]:
    """Train the adapters and yield each step once it is done; to stop, stop iterating.

    Every random choice is a function of (seed, step), so a run that continues from a snapshot equals one that never
    stopped. The network carries the adapters only while a step is computed: whoever receives a step finds the model
    as it was. `slowdown` is a factor on the learning rate. FloatingPointError after three steps in a row whose loss or
    gradient is not finite.
    """
    state, scale = State.begin(adapters, config, resume), loss_scale(denoiser, config)
    objective, broken = Objective(config.objective, config.seed), 0
    for step in range(state.step, config.steps):
        rate = slowdown * rate_at(step, config)
        set_learning_rate(state.optimizer, rate, done=step / config.steps)
        adapters.zero_grad()
        losses, sigmas, loss = [], [], 0.0
        with training_weights(state.optimizer):
            for number in range(step * config.accumulation, (step + 1) * config.accumulation):
                batch = batches[number]
                found = add_gradients(denoiser, objective, adapters, batch, number, share=scale / config.accumulation)
                losses, sigmas = losses + found.losses, sigmas + found.sigmas
                loss += math.fsum(found.losses) / len(found.losses) / config.accumulation
            forget_still(state.optimizer)
            norm = clip_gradient(adapters.values.grad, config.clip_norm, scale)
            skipped = not (math.isfinite(loss) and math.isfinite(norm))
            broken = broken + 1 if skipped else 0
            if broken > BROKEN_STEPS_ALLOWED:
                raise FloatingPointError(
                    f"The loss was not a finite number for {broken} steps in a row, up to step {step + 1}: "
                    "lower learning_rate, or look for a broken picture among " + ", ".join(batch.names) + "."
                )
            if not skipped:
                state.change(step)
        state.step = step + 1
        loss = math.nan if skipped else loss
        yield Step(step + 1, loss, rate, skipped, norm, tuple(sigmas), tuple(losses), state.snapshot)


@dataclass(frozen=True)
class Found:
    """The loss and the noise level of each picture of a micro-batch."""

    losses: list[float]
    sigmas: list[float]


def add_gradients(
    denoiser: Denoiser, objective: Objective, adapters: Adapters, batch: Batch, number: int, share: float
) -> Found:
    """Add the gradient of micro-batch `number` to the adapters', `share` times the mean over its pictures."""
    losses, sigmas = [], []
    with denoiser.adapted():
        question = objective.question(denoiser, batch, number)
        for place, part in enumerate(question.parts(denoiser.parts)):
            found = torch.zeros_like(part.sigma)
            with adapters.dropping(objective.seed, number, place):
                for term in objective.terms(denoiser, part):
                    (term.sum() * (share / len(question))).backward()
                    found += term.detach()
            told = torch.stack([found.float(), part.sigma.float()]).tolist()
            losses, sigmas = losses + told[0], sigmas + told[1]
    return Found(losses, sigmas)


def loss_scale(denoiser: Denoiser, config: TrainConfig) -> float:
    """What the mean loss of a step is multiplied with: each of its pictures has a share of it and needs the scale."""
    return denoiser.loss_scale * config.batch_size * config.accumulation if denoiser.loss_scale > 1 else 1.0


def rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of the 0-based `step`."""
    return learning_rate(
        step,
        peak=config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        schedule=config.schedule,
        restarts=config.restarts,
    )


@dataclass
class State:
    """All that a step changes. `step` is how many are done, None while one is changing it."""

    adapters: Adapters
    optimizer: torch.optim.Optimizer
    average: Average | None
    step: int | None = 0

    @classmethod
    def begin(cls, adapters: Adapters, config: TrainConfig, resume: Snapshot | None) -> State:
        """The state of fresh adapters, or the one of a snapshot."""
        optimizer = optimizer_for(adapters, config)
        if resume is None:
            return cls(adapters, optimizer, Average(adapters, config.ema) if config.ema else None)
        adapters.load(resume.weights)
        load_state(optimizer, resume.optimizer)
        average = Average(adapters, config.ema, resume.ema) if config.ema else None
        return cls(adapters, optimizer, average, resume.step)

    def change(self, step: int) -> None:
        """Take the step whose gradients are there."""
        self.step = None
        self.optimizer.step()
        self.adapters.limit_norms()
        if self.average is not None:
            self.average.follow(step)

    def snapshot(self, step: int) -> Snapshot:
        """An owned copy of the state after `step`; RuntimeError when it is another one by now."""
        if step != self.step:
            raise RuntimeError(f"The state of step {step} is gone: a snapshot must be taken before the next step.")
        average = None if self.average is None else self.average.state()
        return Snapshot(step, self.adapters.state(), state_of(self.optimizer), average)


def clip_gradient(gradient: Tensor, limit: float, loss_scale: float) -> float:
    """Undo the loss scale, limit the norm of the whole gradient (0 = no limit), and return the norm before that."""
    if loss_scale != 1:
        gradient.div_(loss_scale)
    norm = torch.linalg.vector_norm(gradient).item()
    if limit and norm > limit:
        gradient.mul_(limit / norm)
    return norm
