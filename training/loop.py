"""The training loop. Read this first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .batches import Batch
from .config import TrainConfig
from .lora import Adapters
from .noise import loss_per_sample, mix, noise_like, target, training_sigmas
from .optimizer import adamw, load_state, set_learning_rate, state_of
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
    """What the loss is multiplied with before backward, so that half-precision gradients do not vanish."""

    def adapted(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the adapters and gradients reach them; outside, it is as it was."""

    def __call__(
        self, noisy: Tensor, sigma: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]
    ) -> Tensor:
        """The raw answer of the network (B, C, h, w) for noisy latents at `sigma` (B,), each with its own text."""


@dataclass(frozen=True)
class Snapshot:
    """Everything needed to go on from a step, in memory of its own."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One optimizer step, done. `number` counts from 1; `loss` is NaN when the step was skipped as not finite."""

    number: int
    loss: float
    learning_rate: float
    skipped: bool
    _adapters: Adapters = field(repr=False)
    _optimizer: torch.optim.Optimizer = field(repr=False)

    def snapshot(self) -> Snapshot:
        """An owned copy of the state after this step; ask before the next step is taken."""
        return Snapshot(self.number, self._adapters.state(), state_of(self._optimizer))


def train(
    denoiser: Denoiser,
    batches: Sequence[Batch],
    adapters: Adapters,
    config: TrainConfig,
    resume: Snapshot | None = None,
) -> Iterator[Step]:
    """Train the adapters and yield each step once it is done; to stop, stop iterating.

    Every random choice is a function of (seed, step), so a run that continues from a snapshot equals one that never
    stopped. The network carries the adapters only while a step is computed: whoever receives a step finds the model
    as it was. FloatingPointError after three steps in a row whose loss or gradient is not finite.
    """
    optimizer = adamw([adapters.values], config.weight_decay)
    if resume is not None:
        adapters.load(resume.weights)
        load_state(optimizer, resume.optimizer)
    broken = 0
    for step in range(resume.step if resume else 0, config.steps):
        rate = learning_rate(
            step, peak=config.learning_rate, steps=config.steps, warmup=config.warmup, schedule=config.schedule
        )
        set_learning_rate(optimizer, rate)
        adapters.zero_grad()
        loss = 0.0
        for number in range(step * config.accumulation, (step + 1) * config.accumulation):
            with denoiser.adapted():
                part = batch_loss(denoiser, batches[number], config.seed, number) / config.accumulation
                (part * denoiser.loss_scale).backward()
            loss += part.item()
        norm = clip_gradient(adapters.values.grad, config.clip_norm, denoiser.loss_scale)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        broken = broken + 1 if skipped else 0
        if broken > BROKEN_STEPS_ALLOWED:
            raise FloatingPointError(
                f"The loss was not a finite number for {broken} steps in a row, up to step {step + 1}: "
                "lower learning_rate, or look for a broken picture among " + ", ".join(batches[number].names) + "."
            )
        if not skipped:
            optimizer.step()
        yield Step(step + 1, math.nan if skipped else loss, rate, skipped, adapters, optimizer)


def batch_loss(denoiser: Denoiser, batch: Batch, seed: int, number: int) -> Tensor:
    """The loss of micro-batch `number`: the mean over its pictures, each at its own noise level with its own text.

    Where pictures have masks or weights, the error counts inside the mask only, and each picture times its weight.
    """
    sigma = training_sigmas(denoiser.sigmas, len(batch.latents), batch.size, seed, number).to(denoiser.device)
    noise = noise_like(batch.latents, seed, "noise", number).to(denoiser.device)
    latents = batch.latents.to(denoiser.device)
    noisy = mix(denoiser.prediction, latents, noise, sigma)
    predicted = denoiser(noisy, sigma, batch.text, batch.size)
    masks = None if batch.masks is None else batch.masks.to(denoiser.device)
    losses = loss_per_sample(predicted, target(denoiser.prediction, latents, noise, sigma), masks)
    return (losses * batch.weights.to(losses)).mean()


def clip_gradient(gradient: Tensor, limit: float, loss_scale: float) -> float:
    """Undo the loss scale, limit the norm of the whole gradient (0 = no limit), and return the norm before that."""
    if loss_scale != 1:
        gradient.div_(loss_scale)
    norm = torch.linalg.vector_norm(gradient).item()
    if limit and norm > limit:
        gradient.mul_(limit / norm)
    return norm
